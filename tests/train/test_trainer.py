"""The training loop: it learns, accumulates exactly, and writes down what it did."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from morex.config import Config
from morex.data.loader import Batch, Loader
from morex.data.prepare import prepare
from morex.model.count import count
from morex.model.lm import LanguageModel, build_model
from morex.train import trainer
from morex.train.errors import AnomalyError
from morex.train.runs import RunFolder
from morex.train.setup import Training, begin
from morex.train.trainer import forward_backward, loop
from train.helpers import KINDS, QUIET, checkpoint_bytes, configure, run, state_of

TRAINING_KEYS = {
    "kind", "step", "tokens", "loss", "lr", "tokens_per_s", "flops_per_s", "grad_norm", "seconds", "memory_bytes",
    "losses", "active_share", "expert_load", "expert_balance", "expert_z", "router_entropy", "mean_updates",
    "remainder", "ponder", "exit_probability", "router_state",
}  # fmt: skip
SUMMARY_KEYS = {
    "steps", "tokens", "seconds", "train_flops", "final_train_loss", "val_loss", "perplexity", "bits_per_byte",
    "tokens_per_s", "peak_memory_bytes", "parameters", "unique_non_embedding", "train_flops_per_token",
    "decode_flops_per_token", "kv_bytes_per_token", "finished",
}  # fmt: skip


@pytest.mark.parametrize(
    "preset",
    ["vanilla", "recursive", "mor-expert", "mor-token", "mor-threshold", "mor-act", "moe", "more", "more-tuned"],
)
def test_the_held_out_loss_goes_down(preset: str, corpus: Path, tmp_path: Path) -> None:
    config = configure(
        preset, corpus, "train.steps=60", "train.lr=0.01", "train.eval_every=20", "train.log_every=20", "train.clip=1"
    )
    done = run(config, tmp_path / "run")
    first, *_, last = [line["val_loss"] for line in done.metrics("eval")]
    # Ten letters or so are in use: guessing among them costs less than 3 nats, guessing among 257 bytes 5.5.
    assert last < first and last < 3.2


def test_a_run_writes_down_what_it_did(corpus: Path, tmp_path: Path) -> None:
    config = configure("mor-expert", corpus, "train.eval_every=4", "train.log_every=2", "train.precision=auto")
    summary = trainer.train(config, tmp_path / "run", console=QUIET)
    done = run(config, tmp_path / "again")

    # 16 tokens have 10 and 5 active ones at recursions 2 and 3, and not the 2/3 and 1/3 that the router is set to.
    spent = count(config.model, seq_len=16, shares=(1.0, 10 / 16, 5 / 16)).train_flops_per_token
    assert spent < summary["train_flops_per_token"]

    lines = done.metrics("train")
    assert [line["step"] for line in lines] == [1, 2, 4, 6]
    for line in lines:
        assert set(line) >= TRAINING_KEYS | {"loss_router_bce"}
        assert line["loss"] == line["losses"]["lm"]
        assert line["loss_router_bce"] == line["losses"]["router_bce"]
        assert line["tokens"] == line["step"] * 4 * 16
        assert line["flops_per_s"] == pytest.approx(line["tokens_per_s"] * spent)
        assert line["flops"] == pytest.approx(line["tokens"] * spent)
    assert [line["step"] for line in done.metrics("eval")] == [4, 6]
    assert {"val_loss", "val_loss_oracle", "perplexity", "bits_per_byte", "flops"} <= set(done.metrics("eval")[0])

    assert set(summary) >= SUMMARY_KEYS
    assert summary["steps"] == 6 and summary["tokens"] == 6 * 64 and summary["finished"] is True
    assert summary["train_flops"] == pytest.approx(summary["tokens"] * spent)
    assert summary["final_train_loss"] == lines[-1]["loss"]
    assert summary["val_loss"] == done.metrics("eval")[-1]["val_loss"]
    assert summary == json.loads((tmp_path / "run" / "summary.json").read_text())
    assert done.config().train.precision == summary["precision"] != "auto"
    environment = done.environment()
    assert environment is not None and environment["versions"]["torch"] == torch.__version__
    assert environment["threads"] == torch.get_num_threads() and environment["device"] == "cpu"
    assert sorted(path.name for path in done.checkpoints.iterdir()) == ["step-3", "step-6"]


def test_evaluation_lines_say_more_where_there_is_more(corpus: Path, tmp_path: Path) -> None:
    deep = run(configure("recursive", corpus, "eval.depths=true", "train.steps=1"), tmp_path / "deep")
    (line,) = deep.metrics("eval")
    assert line["val_loss_by_depth"].keys() == {"1", "2", "3"}
    assert line["val_loss_by_depth"]["3"] == line["val_loss"] and "val_loss_oracle" not in line
    blind = run(configure("mor-expert", corpus, "model.depth.causal=none", "train.steps=1"), tmp_path / "blind")
    (line,) = blind.metrics("eval")
    assert line["val_loss_is_oracle"] is True and line["val_loss"] == line["val_loss_oracle"]
    summary = blind.summary()
    assert summary is not None and summary["val_loss_is_oracle"] is True


def test_a_held_out_loss_that_is_not_finite_stops_the_run(corpus: Path, tmp_path: Path) -> None:
    class Nonsense:
        loss = math.nan

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "evaluate_by", lambda *arguments, **options: Nonsense())
        with pytest.raises(AnomalyError, match=r"the held-out loss is nan at step 6; training stopped .*step-3"):
            run(configure("vanilla", corpus), tmp_path / "run")
    assert RunFolder(tmp_path / "run").metrics("eval") == []


def test_router_reports_are_shares(corpus: Path, tmp_path: Path) -> None:
    config = configure("mor-random", corpus, "model.mixer={kind: moe, router: {experts: 4, top_k: 2}}")
    line = run(config, tmp_path / "run").metrics("train")[-1]
    (shares,) = line["active_share"].values()
    assert shares[0] == 1.0 and shares[0] > shares[1] > shares[2] > 0
    assert line["expert_load"].keys() == line["router_entropy"].keys() and len(line["expert_load"]) > 1
    for load in line["expert_load"].values():
        assert len(load) == 4 and sum(load) == pytest.approx(1)
    assert all(0 < entropy <= math.log(4) + 1e-6 for entropy in line["router_entropy"].values())


def test_accumulation_changes_nothing(corpus: Path, tmp_path: Path) -> None:
    weights = []
    for parts in (1, 4):
        config = configure("vanilla", corpus, "train.precision=fp64", f"train.accumulation={parts}")
        done = run(config, tmp_path / str(parts))
        weights.append(load_file(done.checkpoints / "step-6" / "model.safetensors"))
    one, four = weights
    for name, tensor in one.items():
        assert tensor.dtype == torch.float64
        torch.testing.assert_close(four[name], tensor, rtol=0, atol=1e-12)


def test_microbatches_weigh_by_predicted_tokens(corpus: Path, tmp_path: Path) -> None:
    """Rows that predict few tokens count for few, and a microbatch that predicts none for nothing."""
    gradients, means = [], []
    for parts in (1, 4):
        config = configure("recursive", corpus, "train.precision=fp64", f"train.accumulation={parts}")
        t = assemble(config, tmp_path / str(parts))
        batch = t.loader.next_batch()
        batch.labels[1, 4:] = -100
        batch.labels[2] = -100
        found, _ = forward_backward(t, batch)
        means.append(found["lm"])
        gradients.append([parameter.grad for parameter in t.model.parameters()])
    expected = direct_loss(t.model, batch)
    assert means == pytest.approx([expected, expected], abs=1e-12)
    for one, four in zip(*gradients, strict=True):
        torch.testing.assert_close(one, four, rtol=0, atol=1e-12)


def test_auxiliary_losses_reach_the_gradient_with_their_weight(corpus: Path, tmp_path: Path) -> None:
    """Ten times the weight, ten times the balance loss's part of the router's gradient."""

    def gradient(weight: float) -> Tensor:
        config = configure(
            "moe", corpus, "train.precision=fp64", "train.accumulation=2", f"model.mixer.router.balance_weight={weight}"
        )
        t = assemble(config, tmp_path / str(weight))
        forward_backward(t, t.loader.next_batch())
        (router, *_) = (tensor for name, tensor in t.model.named_parameters() if name.endswith("mixer.router.weight"))
        assert router.grad is not None
        return router.grad

    bare, one, ten = gradient(0.0), gradient(0.01), gradient(0.1)
    assert (one - bare).norm() > 0
    torch.testing.assert_close(ten - bare, 10 * (one - bare), rtol=1e-9, atol=1e-15)


def test_routers_are_updated_once_a_step_with_all_microbatches(corpus: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []

    def note(self: LanguageModel, stats: Any, step: int) -> None:
        calls.append((step, int(stats["stack.core.groups.0.router"]["tokens"])))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LanguageModel, "update_routers", note)
        run(configure("mor-token", corpus, "train.accumulation=2", "train.steps=3"), tmp_path / "run")
    assert calls == [(1, 64), (2, 64), (3, 64)]


@pytest.mark.parametrize("kind", ["dense", "expert_choice", "experts routed"])
def test_training_twice_is_equal_to_the_bit(kind: str, corpus: Path, tmp_path: Path) -> None:
    preset, overrides = KINDS[kind]
    config = configure(preset, corpus, *overrides, "train.steps=3")
    first, second = run(config, tmp_path / "a"), run(config, tmp_path / "b")
    assert checkpoint_bytes(first, 3) == checkpoint_bytes(second, 3)


def test_clipping_bounds_the_update_and_not_the_report(corpus: Path, tmp_path: Path) -> None:
    norms = {}
    for clip in (0, 1e-4):
        done = run(configure("vanilla", corpus, "train.steps=1", f"train.clip={clip}"), tmp_path / str(clip))
        norms[clip] = done.metrics("train")[0]["grad_norm"]
    moments = load_file(tmp_path / "0.0001" / "checkpoints" / "step-1" / "optimizer.safetensors")
    # After one step the first moment is (1 - beta1) times the gradient that was applied.
    applied = sum(float(m.square().sum()) for name, m in moments.items() if name.startswith("exp_avg/")) ** 0.5 / 0.1
    assert norms[0] == norms[1e-4] > 0.1
    assert applied == pytest.approx(1e-4, rel=1e-3)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_value_that_is_not_finite_stops_before_the_update(where: str, corpus: Path, tmp_path: Path) -> None:
    t = assemble(configure("vanilla", corpus), tmp_path / "run")
    backward = forward_backward

    def poisoned(training: Training, batch: Batch) -> tuple[dict[str, float], Any]:
        found, stats = backward(training, batch)
        if training.state.step == 4:
            if where == "loss":
                found["lm"] = math.nan
            else:
                training.model.norm.weight.grad[3] = math.inf
        return found, stats

    weights: dict[int, dict[str, Tensor]] = {}

    def note(stats: Any, step: int) -> None:
        weights[step] = {name: tensor.clone() for name, tensor in t.model.state_dict().items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "forward_backward", poisoned)
        patch.setattr(t.model, "update_routers", note)
        with pytest.raises(AnomalyError) as caught:
            loop(t, QUIET)
    sentence = str(caught.value)
    assert "at step 5" in sentence and "step-3" in sentence and "train.lr below 0.003" in sentence
    assert ("loss 'lm' is nan" if where == "loss" else "gradient norm is inf") in sentence
    for name, tensor in t.model.state_dict().items():
        assert torch.equal(tensor, weights[4][name])
    assert [path.name for path in t.run.checkpoints.iterdir()] == ["step-3"]
    assert [line["step"] for line in t.run.metrics("train")] == [1, 2, 3, 4]


def test_bf16_trains_in_bf16_with_fp32_weights(corpus: Path, tmp_path: Path) -> None:
    results = {
        precision: run(configure("vanilla", corpus, f"train.precision={precision}"), tmp_path / precision)
        for precision in ("fp32", "bf16")
    }
    first = {precision: done.metrics("train")[0]["loss"] for precision, done in results.items()}
    assert first["bf16"] != first["fp32"] and first["bf16"] == pytest.approx(first["fp32"], abs=0.02)
    weights = load_file(results["bf16"].checkpoints / "step-6" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_a_budget_in_seconds_ends_the_run_and_plans_the_learning_rate(corpus: Path, tmp_path: Path) -> None:
    clock = iter(range(10**6))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.time, "perf_counter", lambda: float(next(clock)))  # a step takes one second
        done = run(configure("vanilla", corpus, "train.steps=1000"), tmp_path / "run", max_seconds=8)
    lines = done.metrics("train")
    assert [line["seconds"] for line in lines] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert lines[1]["lr"] == pytest.approx(0.003)
    assert lines[-1]["lr"] == pytest.approx(0.0003)
    summary = done.summary()
    assert summary is not None and summary["steps"] == 8 and summary["seconds"] == 8
    assert state_of(done, 8)["max_seconds"] == 8


def test_no_steps_evaluate_and_save_the_initial_weights(corpus: Path, tmp_path: Path) -> None:
    config = configure("vanilla", corpus, "train.steps=0")
    done = run(config, tmp_path / "run")
    summary = done.summary()
    assert summary is not None and summary["steps"] == 0 and summary["final_train_loss"] is None
    saved = load_file(done.checkpoints / "step-0" / "model.safetensors")
    for name, tensor in build_model(config.model).state_dict().items():
        assert torch.equal(saved[name], tensor)


def test_the_first_loss_is_that_of_the_initial_weights_on_the_first_batch(corpus: Path, tmp_path: Path) -> None:
    config = configure("vanilla", corpus, "train.steps=1")
    done = run(config, tmp_path / "run")
    data = prepare(config.data, config.model.vocab_size, config.train.seq_len)
    batch = Loader(data.train, config.train.seq_len, config.train.batch_size, seed=config.data.seed).next_batch()
    assert done.metrics("train")[0]["loss"] == pytest.approx(direct_loss(build_model(config.model), batch), abs=1e-5)


def assemble(config: Config, folder: Path) -> Training:
    """A training that has not taken a step."""
    folder.mkdir()
    return begin(RunFolder(folder), config, resume=False, max_seconds=None)


@torch.no_grad()
def direct_loss(model: LanguageModel, batch: Batch) -> float:
    """The mean over predicted tokens, straight from the logits."""
    wanted = batch.labels[:, 1:]
    logits = model(batch.tokens).logits.flatten(0, 1)
    losses = torch.nn.functional.cross_entropy(logits, wanted.flatten(), reduction="none")
    return float(losses.sum() / (wanted != -100).sum())
