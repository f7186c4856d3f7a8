"""Training on tasks: learning one to the end, its metrics, resumption, and what is refused."""

from pathlib import Path
from typing import Any

import pytest

import morex
from morex.config import Config
from morex.data.source import mean_length, prepare_source, training_loader
from morex.eval.loss import evaluate
from morex.loading import ConfigError
from train.helpers import checkpoint_bytes, losses, run, run_until_crash, state_of

PATTERN = "data.task={kind: pattern, numbers: 12, difficulty: [11, 13], held_out: 64}"
BITS = "data.task={kind: parity, difficulty: [1, 3], eval_difficulty: [1, 5], held_out: 16}"
CLASSIFIER = "model.head={kind: classifier, classes: 4}"
SHORT = (
    "train.batch_size=4",
    "train.accumulation=2",
    "train.steps=6",
    "train.log_every=1",
    "train.eval_every=0",
    "train.checkpoint_every=3",
)


def configure(preset: str, *overrides: str) -> Config:
    common = ("model.vocab_size=14", PATTERN, "train.seq_len=16", "train.precision=fp32", "train.warmup_steps=2")
    return morex.load_config(preset, [*common, *overrides], tiny=True)


@pytest.mark.parametrize("head", [(), (CLASSIFIER,)])
def test_a_tiny_model_learns_a_task_to_the_end(tmp_path: Path, head: tuple[str, ...]) -> None:
    plan = ("train.steps=90", "train.batch_size=32", "train.lr=0.01", "train.eval_every=0", "train.checkpoint_every=0")
    folder = run(configure("vanilla", *plan, *head), tmp_path / "run")
    summary = folder.summary()
    assert summary is not None and summary["val_accuracy"] >= 0.98
    assert summary["val_examples"] == 64 and summary["val_tokens"] == (64 if head else 128)
    (line,) = folder.metrics("eval")
    assert line["val_accuracy"] == summary["val_accuracy"] and list(line["val_accuracy_by_difficulty"]) == [
        "11",
        "12",
        "13",
    ]
    assert "bits_per_byte" not in line
    last = folder.metrics("train")[-1]
    assert last["loss"] == last["losses"]["classification" if head else "lm"] < 0.5


@pytest.mark.parametrize("head", [(), (CLASSIFIER,)])
@pytest.mark.parametrize("preset", ["mor-expert", "mor-threshold", "moe"])
def test_a_crashed_training_goes_on_to_the_bit(tmp_path: Path, preset: str, head: tuple[str, ...]) -> None:
    config = configure(preset, *SHORT, *head)
    straight = run(config, tmp_path / "straight")
    run_until_crash(config, tmp_path / "crashed", 5)
    resumed = run(config, tmp_path / "crashed", resume=True)
    assert losses(resumed) == losses(straight)
    assert checkpoint_bytes(resumed, 6) == checkpoint_bytes(straight, 6)
    assert state_of(resumed, 6)["loader"] == state_of(straight, 6)["loader"]


def test_depths_and_the_oracle_are_in_the_metrics(tmp_path: Path) -> None:
    folder = run(configure("mor-expert", *SHORT, "eval.depths=true"), tmp_path / "run")
    (line,) = folder.metrics("eval")
    assert list(line["val_accuracy_by_depth"]) == ["1", "2", "3"] and "val_accuracy_oracle" in line


def test_a_run_on_a_task_loads_and_answers(tmp_path: Path) -> None:
    folder = run(
        configure("vanilla", *SHORT, "data.task={kind: parity, difficulty: [3, 8], held_out: 5}"), tmp_path / "run"
    )
    model, tokenizer = morex.load(folder.path)
    ids = model.generate([tokenizer.encode("0110=")], max_new_tokens=2)
    assert tokenizer.decode(ids[0]).startswith("0110=")


REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "too few token ids": (("data.task={kind: copy}",), r"1002 token ids .*model.vocab_size is 14; set .*1002"),
    "long training examples": (
        ("data.task={kind: parity, difficulty: [2, 15]}",),
        r"data.task.difficulty up to 15 .*17 tokens.*train.seq_len 16",
    ),
    "long held-out examples": (
        ("data.task={kind: parity, difficulty: [2, 5], eval_difficulty: [2, 100]}",),
        r"eval_difficulty up to 100 .*102 tokens.*model.max_seq_len 64",
    ),
    "an empty range": (("data.task={kind: parity, difficulty: [5, 2]}",), r"difficulty \[5, 2\] is empty.*\[2, 5\]"),
    "no room for the run": (("data.task={kind: pattern, difficulty: [10, 12]}",), r"\[10, 12\] begins below 11"),
    "no room for the targets": (
        ("data.task={kind: counting, balanced: true, difficulty: [5, 12]}",),
        r"\[5, 12\] begins below 6",
    ),
    "too few numbers": (("data.task={kind: pattern, numbers: 9}",), r"numbers 9 .*use 11"),
    "a target that never comes": (("data.task={kind: counting, numbers: 9}",), r"numbers 9 .*use 43"),
    "too many hops": (
        ("data.task={kind: p_hop, length: 20, difficulty: [1, 6]}",),
        r"6 hops over 4 letters.*length 24",
    ),
    "no such bAbI task": (("data.task={kind: babi, tasks: [21]}",), r"data.task.tasks.* 21"),
    "unknown option": (("data.task={kind: parity, digits: 3}",), r"unknown key 'data.task.digits'"),
    "a classifier of sums": (("data.task.kind=addition", CLASSIFIER), r"longer than a class.*model.head.kind 'lm'"),
    "a classifier in words": (("data.task.kind=babi", CLASSIFIER), r"'babi' is answered in words.*'lm'"),
    "too few classes": (("model.head={kind: classifier, classes: 3}",), r"has 4 classes.*use model.head.classes 4"),
    "all places of a classifier": (
        ("data.task={kind: p_hop, length: 10, difficulty: [1, 2], places: all}", "model.vocab_size=17", CLASSIFIER),
        r"places 'all' .*one class; use places 'last' or model.head.kind 'lm'",
    ),
    "more recursions than there are": (
        (BITS, "train.depth=difficulty"),
        r"train.depth 'difficulty' asks for up to 3 recursions.*the model has 1; use model.schedule.recursions 3",
    ),
    "masked documents": (("data.mask_documents=true",), r"mask_documents is for a corpus"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_before_anything_is_made(case: str) -> None:
    overrides, pattern = REFUSED[case]
    with pytest.raises(ConfigError, match=pattern) as refusal:
        configure("vanilla", *overrides)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("preset", "overrides", "pattern"),
    [
        ("recursive", ("data.task=null",), r"data.corpus 'sotu' has no such examples; set data.task"),
        ("recursive", ("data.task={kind: babi}",), r"data.task 'babi' has no such examples"),
        ("mor-token", (BITS,), r"leaves model.depth.kind 'token_choice' nothing to decide; use .*'fixed'"),
        ("recursive", (BITS, "model.step_embedding=true"), r"up to 5 recursions.*weights for each of 3"),
        (
            "recursive",
            (
                BITS,
                "model.attention={heads: 4, window: 4, global_every: 2}",
                "model.schedule={sharing: middle_cycle, layers: 5}",
            ),
            r"which steps of this model are global; leave model.attention.global_every out",
        ),
    ],
)
def test_a_depth_that_cannot_follow_the_difficulty_is_refused(
    preset: str, overrides: tuple[str, ...], pattern: str
) -> None:
    with pytest.raises(ConfigError, match=pattern) as refusal:
        configure(preset, "train.depth=difficulty", *overrides)
    assert "\n" not in str(refusal.value)


def test_depth_follows_difficulty(tmp_path: Path) -> None:
    """One step by hand: loss, gradient and FLOPs are those of examples at depths of their own."""
    plan = (*SHORT, BITS, "train.steps=2", "train.depth=difficulty", "eval.depths=true", "eval.deepest=5")
    folder = run(configure("recursive", *plan), tmp_path / "run")
    config = folder.config()
    task = prepare_source(config)
    batch = training_loader(task, config).next_batch()
    assert batch.difficulty is not None and len(batch.difficulty.unique()) > 1
    model = morex.build_model(config.model)
    loss = model(batch.tokens, labels=batch.labels, lengths=batch.lengths, depth=batch.difficulty).loss
    first, _ = folder.metrics("train")
    assert loss is not None and first["loss"] == pytest.approx(loss.item(), abs=1e-6)
    assert batch.lengths is not None
    shares = [float(batch.lengths[batch.difficulty >= r].sum() / batch.lengths.sum()) for r in (1, 2, 3)]
    counted = morex.count(config.model, seq_len=mean_length(task, config), shares=tuple(shares))
    assert first["flops"] == pytest.approx(first["tokens"] * counted.train_flops_per_token)
    (line,) = folder.metrics("eval")
    trained = morex.load(folder.path)[0]
    by_hand = evaluate(trained, task.val, 16, 8, depth="difficulty")
    assert line["val_loss"] == pytest.approx(by_hand.loss, abs=1e-6)
    assert list(line["val_accuracy_by_depth"]) == ["1", "2", "3", "4", "5"]


def test_a_classifier_without_a_task_is_refused(tmp_path: Path, corpus: Path) -> None:
    config = configure("vanilla", CLASSIFIER, "data.task=null", f"data.corpus={corpus}")
    with pytest.raises(ConfigError, match=r"has no classes .*data.task.kind pattern"):
        run(config, tmp_path / "run")


def test_another_task_does_not_go_on(tmp_path: Path) -> None:
    config = configure("vanilla", *SHORT)
    run_until_crash(config, tmp_path / "run", 5)
    other: dict[str, Any] = config.to_dict()
    other["data"]["task"]["difficulty"] = [11, 12]
    with pytest.raises(ConfigError, match=r"data.task.difficulty"):
        run(Config.model_validate(other), tmp_path / "run", resume=True)


@pytest.mark.parametrize("head", [(), (CLASSIFIER,)])
@pytest.mark.parametrize("preset", ["vanilla", "mor-token"])
def test_flops_are_counted_at_the_length_of_the_examples(tmp_path: Path, preset: str, head: tuple[str, ...]) -> None:
    """Room that no example needs costs nothing."""
    plan = ("train.steps=2", "train.log_every=1", "data.task.difficulty=[12,12]", *head)
    tight, wide = (run(configure(preset, *plan, f"train.seq_len={n}"), tmp_path / str(n)) for n in (16, 60))
    ours, theirs = tight.summary(), wide.summary()
    assert ours is not None and theirs is not None
    for key in ("train_flops", "train_flops_per_token", "decode_flops_per_token"):
        assert ours[key] == theirs[key]
    if preset == "vanilla":
        length = 12 if head else 12 + 2  # the cue and the answer; the end of the text is predicted alone
        counted = morex.count(tight.config().model, seq_len=length)
        assert ours["train_flops_per_token"] == counted.train_flops_per_token
        assert ours["train_flops"] == ours["tokens"] * counted.train_flops_per_token


def test_the_mean_length_weighs_tokens() -> None:
    """Attention costs a token as many pairs as its own sequence is long."""
    config = configure("vanilla", "data.task.difficulty=[11,14]", "train.batch_size=2048")
    task = prepare_source(config)
    lengths = training_loader(task, config).next_batch().lengths
    assert lengths is not None
    assert mean_length(task, config) == round(float((lengths**2).sum() / lengths.sum()))
