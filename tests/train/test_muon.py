"""Muon: what becomes of an update, whose it is, and that several ranks do what one does."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import morex
from morex.config import Config
from morex.model.lm import build_model
from morex.model.roles import roles
from morex.sections.train import TrainConfig
from morex.train.muon import Muon, orthogonal
from morex.train.optim import build_optimizer
from train.helpers import configure, run
from train.test_ranks import on_ranks, torchrun

MUON = TrainConfig(optimizer="muon", lr=0.01, weight_decay=0.1)


@pytest.mark.parametrize("shape", [(12, 12), (5, 30), (30, 5), (3, 8, 6)])
def test_singular_values_come_near_one_and_vectors_stay(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    turned = u.mT @ orthogonal(x) @ v.mT
    kept = torch.diagonal(turned, dim1=-2, dim2=-1)
    # Those that are small beside the norm come up more slowly.
    assert (kept > 0).all() and (kept < 1.25).all() and (kept[s > s.max() / 20] > 0.6).all()
    assert torch.allclose(turned, torch.diag_embed(kept), atol=1e-9)
    assert not orthogonal(torch.zeros(3, 4)).any()


def test_each_expert_is_made_orthogonal_by_itself() -> None:
    torch.manual_seed(0)
    experts = torch.randn(4, 6, 10, dtype=torch.float64) * torch.tensor([1e-3, 1.0, 1e3, 0.0]).view(4, 1, 1)
    for expert, found in zip(experts, orthogonal(experts), strict=True):
        assert torch.allclose(found, orthogonal(expert), atol=1e-12)


@pytest.mark.parametrize("shape", [(16, 16), (24, 8), (8, 24)])
def test_a_matrix_moves_as_under_torch(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    start = torch.randn(shape)
    own, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    options = {"lr": 0.02, "weight_decay": 0.3}
    mine = Muon([{"params": [own], "orthogonal": True}], momentum=0.9, dtype=torch.bfloat16, **options)
    reference = torch.optim.Muon([theirs], momentum=0.9, adjust_lr_fn="match_rms_adamw", **options)
    for _ in range(4):
        own.grad = torch.randn(shape)
        theirs.grad = own.grad.clone()
        mine.step()
        reference.step()
        moved = (theirs - start).abs().max()
        assert (own - theirs).abs().max() < 0.01 * moved and moved > 0.005


def test_matrices_of_blocks_and_experts_are_muons_and_the_rest_is_adamws() -> None:
    lora = ["model.lora={rank: 4}", "model.step_embedding=true", "model.recursion_norms=true"]
    mlp = ["model.depth.router=mlp", "model.depth.causal=aux_router"]
    seen: set[str] = set()
    for preset, overrides in (
        ("recursive", lora),
        ("mor-expert", mlp),
        ("more-tuned", []),
        ("huginn", []),
        ("moe", []),
    ):
        model = build_model(morex.load_config(preset, overrides, tiny=True).model)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        optimizer = build_optimizer(model, MUON)
        matrices = {
            names[id(parameter)]
            for group in optimizer.param_groups
            if group["orthogonal"]
            for parameter in group["params"]
        }
        others = set(names.values()) - matrices
        assert all(model.get_parameter(name).dim() >= 2 for name in matrices)
        assert not any(word in name for name in matrices for word in ("norm", "bias", "embedding", "lora", "head"))
        leaves = {"q", "k", "v", "o", "gate", "up", "down", "adapter"}
        assert all("lora" in name or not leaves & set(name.split(".")[-2:]) for name in others)
        seen |= {name.split(".")[-1] for name in matrices if "router" in name}
    assert seen == {"hidden"}  # of routers, only what maps width to width


def test_roles_of_what_maps_to_few_and_from_few() -> None:
    config = morex.load_config("recursive", ["model.lora={rank: 4}"], tiny=True).model
    found = roles(build_model(config, device="meta"))
    assert (
        found["stack.core.groups.0.lora.0.0.q.a"] == "output" and found["stack.core.groups.0.lora.0.0.q.b"] == "input"
    )
    found = roles(build_model(morex.load_config("more-tuned", ["model.mixer.depth.kind=threshold"], tiny=True).model))
    assert found["stack.core.blocks.0.mixer.router.weight"] == "output"
    assert {role for name, role in found.items() if ".mixer.depth." in name and "bias" not in name} == {"output"}
    assert found["embedding.weight"] == "input" and found["stack.core.blocks.0.mixer.step_embedding"] == "input"


def test_training_uses_it_and_learns(corpus: Path, tmp_path: Path) -> None:
    options = ("train.steps=30", "train.lr=0.01", "train.checkpoint_every=0", "train.log_every=30")
    found = {}
    for optimizer in ("adamw", "muon"):
        finished = run(configure("more-tuned", corpus, *options, f"train.optimizer={optimizer}"), tmp_path / optimizer)
        first, last = finished.metrics("train")
        assert last["loss"] < first["loss"] - 1
        found[optimizer] = load_file(finished.checkpoints / "step-30" / "optimizer.safetensors")
    matrix, router = "stack.core.blocks.0.mixer.gate", "stack.core.blocks.0.mixer.router.weight"
    kept = {name for name in found["muon"] if name.endswith(f"/{matrix}")}
    assert kept == {f"momentum_buffer/{matrix}"} and f"exp_avg_sq/{router}" in found["muon"]
    assert found["muon"][f"momentum_buffer/{matrix}"].shape == found["adamw"][f"exp_avg/{matrix}"].shape


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "copies"), [(3, 1), (4, 2)])
def test_divided_matrices_are_made_orthogonal_whole(ranks: int, copies: int) -> None:
    torchrun(ranks, Path(__file__).with_name("muon_program.py"), str(copies))


@pytest.mark.slow
def test_ranks_share_the_matrices(corpus: Path, tmp_path: Path) -> None:
    """Two ranks in float64, then one that goes on with their run, are one process."""
    from train.test_ranks import difference

    kinds = {"blocks": ("mor-expert", ()), "experts": ("more-tuned", ("model.mixer.router.experts=3",))}
    own = ("train.optimizer=muon", "train.precision=fp64", "train.schedule=constant", "train.checkpoint_every=0")
    configs = {name: configure(preset, corpus, *more, *own) for name, (preset, more) in kinds.items()}

    def until(config: Config, steps: int) -> Config:
        return config.model_copy(update={"train": config.train.model_copy(update={"steps": steps})})

    on_ranks(2, [(until(config, 12), tmp_path / name, False) for name, config in configs.items()], tmp_path)
    for name, config in configs.items():
        run(until(config, 16), tmp_path / name, resume=True)
        run(until(config, 16), tmp_path / f"{name} straight")
        assert difference(tmp_path / name, tmp_path / f"{name} straight") < 1e-8, name
