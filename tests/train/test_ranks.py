"""Several ranks train what one process trains. They exchange by gloo, on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import morex
from morex.config import Config
from morex.data.errors import DataError
from morex.data.loader import Loader, Part
from morex.data.stream import TokenStream
from morex.loading import load_config
from morex.nn.block import Block
from morex.train.errors import Interrupted
from morex.train.ranks import _sendable
from morex.train.runs import RunFolder
from train.helpers import KINDS, configure, run

PROGRAM = Path(__file__).with_name("rank_program.py")
DOUBLE = "train.precision=fp64"
# Dropout is drawn by each rank for its own tokens.
FEW_TOKENS = "train.batch_size=2", "train.seq_len=4", "data.mask_documents=false"
MIXTURE = "model.mixer={kind: moe, router: {experts: 4, top_k: 2}}"
ROUTED_EXPERTS = "model.mixer={kind: recursive, depth: {kind: halting}}"
FAMILIES = {name: kind for name, kind in KINDS.items() if name != "dropout"} | {
    # In some recursions one rank has no token, in some neither has.
    "few tokens": ("mor-token", (MIXTURE, *FEW_TOKENS)),
    "few tokens, experts with steps by a router": ("mor-token", (ROUTED_EXPERTS, *FEW_TOKENS)),
}
NARROW = (
    *("expert_choice", "token_choice loss-free", "threshold", "halting", "exit gate"),
    *("moe loss-free", "experts routed", "recurrent layer"),
)
"""Families that are trained in fp32 too."""
BLOCKS = {"core_units": "blocks"}
EXCHANGES = "allgather", "reduce_scatter"
VARIED = "dense", "threshold", "experts routed"
CHANGES: tuple[dict[str, Any], ...] = (
    {"shards": 1},
    {"core_units": "blocks"},
    {"core_units": "blocks", "recompute": "recursions"},
    {"recompute": "steps"},
    {"recompute": "selective"},
    {"recompute": "recursions", "compile": True},
)
"""Families that are also trained in these ways: with a copy of the weights on each rank, and so on."""


def on_ranks(ranks: int, jobs: list[tuple[Config, Path, bool]], tmp_path: Path) -> None:
    """Trains (config, folder, resume) one after another."""
    listing = tmp_path / f"jobs-{ranks}.json"
    found = [{"config": config.to_dict(), "folder": str(folder), "resume": resume} for config, folder, resume in jobs]
    listing.write_text(json.dumps(found), encoding="utf-8")
    torchrun(ranks, PROGRAM, str(listing))


def torchrun(ranks: int, program: Path, *arguments: str) -> None:
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", str(program), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]


def lines(folder: Path) -> list[dict[str, Any]]:
    return RunFolder(folder).metrics("train")


def difference(one: Path, other: Path) -> float:
    """The largest difference in any loss or gradient norm of any step, over its size."""
    mine, theirs = lines(one), lines(other)
    assert [line["step"] for line in mine] == [line["step"] for line in theirs] and mine
    found = [0.0]
    for own, line in zip(mine, theirs, strict=True):
        assert own["losses"].keys() == line["losses"].keys() and own["tokens"] == line["tokens"]
        pairs = [(own["losses"][name], line["losses"][name]) for name in own["losses"]]
        pairs.append((own["grad_norm"], line["grad_norm"]))
        found += [abs(a - b) / max(1.0, abs(b)) for a, b in pairs]
    return max(found)


@pytest.mark.slow
def test_two_ranks_are_one_process(corpus: Path, tmp_path: Path) -> None:
    """Every family over fifty steps in float64, some over five in fp32; weights divided, or a copy on each rank."""
    plan: list[tuple[str, str, int, dict[str, Any]]] = []
    plan += [(name, "fp64", 50, {}) for name in FAMILIES]
    plan += [(name, "fp32", 5, {}) for name in NARROW]
    plan += [(name, "fp64", 5, change) for name in VARIED for change in CHANGES]
    jobs, wrong = [], {}
    for name, precision, steps, change in plan:
        preset, overrides = FAMILIES[name]
        own = (f"train.precision={precision}", f"train.steps={steps}", "train.batch_size=8", "train.checkpoint_every=0")
        config = configure(preset, corpus, *own, *overrides)
        divided = config.model_copy(update={"train": config.train.model_copy(update=change)})
        one = tmp_path / f"{name} {precision} {steps}"
        jobs.append((config, divided, one, tmp_path / f"{one.name} {change}"))
    on_ranks(2, [(divided, two, False) for _, divided, _, two in jobs], tmp_path)
    for config, _, one, two in jobs:
        if not one.exists():
            run(config, one)
        limit = 1e-8 if config.train.precision == "fp64" else 1e-5
        mine, theirs = RunFolder(two).summary(), RunFolder(one).summary()
        assert mine is not None and theirs is not None
        found = difference(two, one), abs(mine["val_loss"] - theirs["val_loss"])
        if max(found) > limit:
            wrong[two.name] = found
    assert not wrong


@pytest.mark.slow
def test_ranks_recur_as_often(tmp_path: Path) -> None:
    """Depths go by the difficulty of examples, of which a rank may have easy ones alone; units of the core, and losses
    of routers inside it, are for all ranks together."""
    task = ("data.task={kind: addition, difficulty: [1, 3]}", "train.depth=difficulty", MIXTURE)
    own = ("train.precision=fp64", "train.batch_size=2", "train.steps=8", "train.log_every=1", "train.accumulation=1")
    whole = morex.load_config("recursive", [*task, *own, "train.seq_len=32", "train.warmup_steps=0"], tiny=True)
    blocks = whole.model_copy(update={"train": whole.train.model_copy(update=BLOCKS)})
    on_ranks(2, [(config, tmp_path / name, False) for name, config in (("core", whole), ("blocks", blocks))], tmp_path)
    run(whole, tmp_path / "one")
    assert max(difference(tmp_path / name, tmp_path / "one") for name in ("core", "blocks")) < 1e-8


@pytest.mark.parametrize("preset", ["recursive", "mor-expert", "mor-token", "mor-act", "ouro"])
def test_ranks_visit_every_recursion_in_evaluation(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank none of whose rows goes on runs the blocks on a token that changes nothing."""
    model: Any = morex.build_model(morex.load_config(preset, tiny=True).model).eval()
    schedule, visits = model.config.schedule.resolved, []
    monkeypatch.setattr(Block, "forward", _counted(Block.forward, visits))
    tokens, found = torch.randint(50, (2, 6), generator=torch.Generator().manual_seed(0)), []
    for ranks, deepest in ((1, 1), (2, schedule.recursions)):
        monkeypatch.setattr("morex.nn.ranks.num_ranks", lambda ranks=ranks: ranks)
        monkeypatch.setattr("morex.nn.ranks.largest", lambda depth, ranks=ranks: schedule.recursions)
        visits.clear()
        with torch.no_grad():
            found.append(model(tokens, depth=torch.tensor([1, 1])).logits)
        assert len(visits) == schedule.prelude + deepest * schedule.core + schedule.coda
    assert torch.equal(*found)


def _counted(forward: Any, visits: list[int]) -> Any:
    def counted(self: Block, *arguments: Any, **options: Any) -> Any:
        visits.append(1)
        return forward(self, *arguments, **options)

    return counted


@pytest.mark.slow
def test_any_number_of_ranks_goes_on_with_the_run_of_any_other(corpus: Path, tmp_path: Path) -> None:
    """1 rank, then 2, then 4, then 2 with a copy each, then 1: losses and weights of a straight run."""
    plan = [(1, None), (2, None), (4, 2), (2, 1), (1, None)]
    kinds = {"expert_choice": "mor-expert", "threshold": "mor-threshold", "experts": "more-tuned"}
    configs = {
        name: configure(
            preset, corpus, DOUBLE, "train.batch_size=8", "train.schedule=constant", "train.checkpoint_every=0"
        )
        for name, preset in kinds.items()
    }
    for stage, (ranks, shards) in enumerate(plan, start=1):
        change = {"steps": 2 * stage, "shards": shards}
        jobs = [
            (config.model_copy(update={"train": config.train.model_copy(update=change)}), tmp_path / name, stage > 1)
            for name, config in configs.items()
        ]
        on_ranks(ranks, jobs, tmp_path)
    for name, config in configs.items():
        last = config.model_copy(update={"train": config.train.model_copy(update={"steps": 2 * len(plan)})})
        run(last, tmp_path / f"{name} straight")
        assert difference(tmp_path / name, tmp_path / f"{name} straight") < 1e-8, name
        for file in ("model.safetensors", "optimizer.safetensors"):
            mine, theirs = (
                load_file(RunFolder(tmp_path / folder).checkpoints / f"step-{2 * len(plan)}" / file)
                for folder in (name, f"{name} straight")
            )
            own = {key: value for key, value in mine.items() if not key.startswith("random/")}
            assert own.keys() == {key for key in theirs if not key.startswith("random/")}
            for key, value in own.items():
                assert torch.allclose(value.double(), theirs[key].double(), rtol=1e-6, atol=1e-8), (name, key)


def test_loaders_of_ranks_draw_the_batch_together() -> None:
    """Row by row, microbatch by microbatch."""
    stream = TokenStream(np.arange(1000, dtype=np.uint16), np.zeros(1, dtype=np.int64), 1000)
    for microbatches in (1, 2):
        whole = Loader(stream, 9, 12, "random", seed=3)
        ranks = [Loader(stream, 9, 12, "random", seed=3, part=Part(rank, 3, microbatches)) for rank in range(3)]
        for _ in range(3):
            parts = [loader.next_batch().labels.unflatten(0, (microbatches, -1)) for loader in ranks]
            assert torch.equal(torch.cat(parts, 1).flatten(0, 1), whole.next_batch().labels)
        assert [loader.state_dict() for loader in ranks] == [whole.state_dict()] * 3
    with pytest.raises(DataError, match=r"train.batch_size 12 cannot be divided over 5 ranks"):
        Loader(stream, 9, 12, part=Part(0, 5))


@pytest.mark.slow
def test_shared_weights_are_gathered_once_a_pass(tmp_path: Path) -> None:
    """However often they recur: once for the core, each block of prelude and coda, and both ends of the pass."""
    schedules = [({"sharing": "cycle", "layers": 6, "recursions": recursions}, 2) for recursions in (2, 3)] + [
        ({"sharing": "middle_cycle", "layers": 8, "recursions": recursions}, 4) for recursions in (2, 3)
    ]
    configs = [
        load_config("vanilla", [f"model.schedule={json.dumps(schedule)}"], tiny=True) for schedule, _ in schedules
    ]
    by_block = [config.model_copy(update={"train": config.train.model_copy(update=BLOCKS)}) for config in configs]
    result, program = tmp_path / "counts.json", PROGRAM.with_name("gather_program.py")
    torchrun(2, program, str(result), *[json.dumps(config.to_dict()) for config in configs + by_block])
    found = [
        [[sum(n for name, n in counts.items() if kind in name) for counts in passes] for kind in EXCHANGES]
        for passes in json.loads(result.read_text())
    ]
    for (schedule, units), config, (gathers, scatters), (many, parts) in zip(
        schedules, configs, found[: len(configs)], found[len(configs) :], strict=True
    ):
        # Both ends stay gathered until the backward pass is over.
        assert gathers == [units, units - 1] and scatters == [0, units], schedule
        # With blocks as units each is gathered for every use, and once more for the gradient of that; its gradients are
        # added up. The core has no other weights here.
        resolved = config.model.schedule.resolved
        uses = resolved.unrolled_depth - (units - 2)
        assert many == [units - 1 + uses, units - 2 + uses] and parts == [0, units - 1 + resolved.core], schedule


def test_an_error_that_cannot_travel_says_the_same_in_another_class() -> None:
    sent = _sendable(Interrupted("stopped", 2))  # cannot be made from its message alone
    assert type(sent) is RuntimeError and str(sent) == "Interrupted: stopped"
    error = DataError("no text")
    assert _sendable(error) is error and _sendable(None) is None
