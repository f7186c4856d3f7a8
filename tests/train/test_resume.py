"""A run that stops and goes on is, to the bit, the run that never stopped."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from morex.config import Config
from morex.loading import ConfigError
from morex.model.lm import LanguageModel
from morex.train import precision
from morex.train.errors import CheckpointError, Interrupted, RunFolderError
from morex.train.interrupt import stop_on_signals
from morex.train.runs import RunFolder
from train.helpers import (
    KINDS,
    QUIET,
    checkpoint_bytes,
    configure,
    files_of,
    losses,
    run,
    run_until_crash,
    state_of,
)


@pytest.mark.parametrize("kind", KINDS)
def test_resuming_after_a_crash_is_bit_equal(kind: str, corpus: Path, tmp_path: Path) -> None:
    preset, overrides = KINDS[kind]
    config = configure(preset, corpus, *overrides)
    straight = run(config, tmp_path / "straight")
    crashed = run_until_crash(config, tmp_path / "crashed", step=5)
    assert [line["step"] for line in crashed.metrics("train")] == [1, 2, 3, 4]
    assert crashed.summary() is None
    resumed = run(config, crashed.path, resume=True)

    assert checkpoint_bytes(resumed, 6) == checkpoint_bytes(straight, 6)
    assert losses(resumed) == losses(straight)
    mine, theirs = resumed.summary(), straight.summary()
    assert mine is not None and theirs is not None
    assert mine["val_loss"] == theirs["val_loss"] and mine["final_train_loss"] == theirs["final_train_loss"]
    assert state_of(resumed, 6)["loader"] == state_of(straight, 6)["loader"]
    environment = resumed.environment()
    assert environment is not None and [again["step"] for again in environment["resumed"]] == [3]


def test_a_run_without_checkpoints_starts_again(corpus: Path, tmp_path: Path) -> None:
    config = configure("mor-threshold", corpus)
    straight = run(config, tmp_path / "straight")
    crashed = run_until_crash(config, tmp_path / "crashed", step=2)
    resumed = run(config, crashed.path, resume=True)
    assert checkpoint_bytes(resumed, 6) == checkpoint_bytes(straight, 6)
    assert losses(resumed) == losses(straight)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_saves(number: signal.Signals, corpus: Path, tmp_path: Path) -> None:
    config = configure("mor-expert", corpus, "train.checkpoint_every=0")
    straight = run(config, tmp_path / "straight")
    before = signal.getsignal(number)
    update = LanguageModel.update_routers

    def kill(self: LanguageModel, stats: Any, step: int) -> None:
        if step == 4:
            os.kill(os.getpid(), number)
        update(self, stats, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LanguageModel, "update_routers", kill)
        with pytest.raises(Interrupted) as caught:
            run(config, tmp_path / "run")
    stopped = RunFolder(tmp_path / "run")
    assert (caught.value.exit_code, caught.value.signal_number) == (0, number)
    assert str(caught.value) == f"stopped and saved at step 4 of 6; go on with `morex train --resume {stopped.path}`"
    assert signal.getsignal(number) is before
    assert [path.name for path in stopped.checkpoints.iterdir()] == ["step-4"] and stopped.summary() is None

    resumed = run(config, stopped.path, resume=True)
    assert checkpoint_bytes(resumed, 6) == checkpoint_bytes(straight, 6)
    assert losses(resumed) == losses(straight)


def test_evaluations_due_at_the_stop_are_made_up_for(corpus: Path, tmp_path: Path) -> None:
    config = configure("vanilla", corpus, "train.eval_every=2")
    straight = run(config, tmp_path / "straight")
    update = LanguageModel.update_routers

    def kill(self: LanguageModel, stats: Any, step: int) -> None:
        if step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        update(self, stats, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LanguageModel, "update_routers", kill)
        with pytest.raises(Interrupted):
            run(config, tmp_path / "run")
    resumed = run(config, tmp_path / "run", resume=True)
    evaluations = [[(line["step"], line["val_loss"]) for line in done.metrics("eval")] for done in (resumed, straight)]
    assert evaluations[0] == evaluations[1] and [step for step, _ in evaluations[0]] == [2, 4, 6]


def test_a_process_told_to_stop_saves_and_can_go_on(corpus: Path, tmp_path: Path) -> None:
    """The real thing: another process, a real Ctrl-C."""
    config = configure("vanilla", corpus, "train.steps=100000", "train.schedule=constant", "train.checkpoint_every=0")
    (tmp_path / "config.yaml").write_text(config.model_dump_json(), encoding="utf-8")
    program = (
        "import sys, signal, morex\n"
        "from morex.train.errors import Interrupted\n"
        "from morex.train.trainer import train\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "try:\n"
        "    train(morex.load_config(sys.argv[1]), sys.argv[2])\n"
        "except Interrupted as stopped:\n"
        "    print(stopped)\n"
        "    sys.exit(stopped.exit_code)\n"
    )
    done = RunFolder(tmp_path / "run")
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "config.yaml"), str(done.path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while process.poll() is None and not done.metrics("train"):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    assert f"go on with `morex train --resume {done.path}`" in output
    (saved,) = done.checkpoints.iterdir()
    step = int(saved.name.removeprefix("step-"))
    finished = run(with_train(config, steps=step + 2), done.path, resume=True)
    assert [line["step"] for line in finished.metrics("train")] == list(range(1, step + 3))


def test_the_second_signal_stops_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), stop_on_signals(QUIET) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("still running")


def test_the_first_signal_says_what_happens() -> None:
    console = Console(record=True, file=open(os.devnull, "w", encoding="utf-8"), width=120)  # noqa: SIM115
    with stop_on_signals(console):
        os.kill(os.getpid(), signal.SIGTERM)
    assert "stopping after this step" in console.export_text()


def test_outside_the_main_thread_nobody_listens(corpus: Path, tmp_path: Path) -> None:
    thread = threading.Thread(target=run, args=(configure("vanilla", corpus), tmp_path / "run"))
    thread.start()
    thread.join()
    assert RunFolder(tmp_path / "run").summary() is not None


def test_a_finished_run_goes_on_to_more_steps(corpus: Path, tmp_path: Path) -> None:
    config = configure("mor-token", corpus, "train.schedule=constant")
    straight = run(config, tmp_path / "straight")
    run(with_train(config, steps=3), tmp_path / "run")
    longer = run(config, tmp_path / "run", resume=True)
    assert checkpoint_bytes(longer, 6) == checkpoint_bytes(straight, 6)
    assert losses(longer) == losses(straight)
    assert longer.config().train.steps == 6
    summary = longer.summary()
    assert summary is not None and summary["steps"] == 6


def test_a_finished_run_stays_as_it_is(corpus: Path, tmp_path: Path) -> None:
    config = configure("vanilla", corpus)
    done = run(config, tmp_path / "run")
    before = {name: content for name, content in files_of(done.path).items() if name != "env.json"}
    run(config, done.path, resume=True)
    after = {name: content for name, content in files_of(done.path).items() if name != "env.json"}
    assert before == after


@pytest.mark.parametrize(
    ("schedule", "crash", "steps", "sentence"),
    [
        ("cosine", 5, 12, "train.steps 12 instead of 6 does not fit the 3 steps done: train.schedule 'cosine'"),
        ("trapezoid", 5, 12, None),
        ("trapezoid", None, 12, "train.schedule 'trapezoid'"),
        ("constant", 5, 12, None),
        ("constant", None, 4, "train.steps 4 is less than the 6 steps that this run has done"),
    ],
)
def test_another_number_of_steps_needs_a_schedule_that_allows_it(
    schedule: str, crash: int | None, steps: int, sentence: str | None, corpus: Path, tmp_path: Path
) -> None:
    config = configure("vanilla", corpus, f"train.schedule={schedule}", "train.cooldown_fraction=0.3")
    if crash is None:
        run(config, tmp_path / "run")
    else:
        run_until_crash(config, tmp_path / "run", crash)
    longer = with_train(config, steps=steps)
    if sentence is None:
        straight = run(longer, tmp_path / "straight")
        assert losses(run(longer, tmp_path / "run", resume=True)) == losses(straight)
    else:
        with pytest.raises(CheckpointError) as caught:
            run(longer, tmp_path / "run", resume=True)
        assert sentence in str(caught.value)


def test_a_budget_in_seconds_is_kept_and_cannot_be_changed(corpus: Path, tmp_path: Path) -> None:
    config = configure("vanilla", corpus)
    run(config, tmp_path / "run", max_seconds=1000.0)
    assert state_of(run(config, tmp_path / "run", resume=True), 6)["max_seconds"] == 1000.0
    with pytest.raises(CheckpointError, match=r"a budget of 7.0 seconds instead of 1000.0 does not fit the 6 steps"):
        run(config, tmp_path / "run", resume=True, max_seconds=7.0)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.lr=0.1", "train.lr is 0.003 there and 0.1 here"),
        ("model.d_model=64", "model.d_model is 32 there and 64 here"),
        ("train.batch_size=8", "train.batch_size is 4 there and 8 here"),
        ("data.seed=3", "data.seed is 0 there and 3 here"),
        ("train.accumulation=2", "train.accumulation is 1 there and 2 here"),
    ],
)
def test_another_config_is_refused(override: str, sentence: str, corpus: Path, tmp_path: Path) -> None:
    run_until_crash(configure("vanilla", corpus), tmp_path / "run", step=5)
    before = files_of(tmp_path / "run")
    with pytest.raises(ConfigError) as caught:
        run(configure("vanilla", corpus, override), tmp_path / "run", resume=True)
    assert sentence in str(caught.value) and "train.steps" in str(caught.value)
    assert files_of(tmp_path / "run") == before


def test_what_only_reports_may_change(corpus: Path, tmp_path: Path) -> None:
    config = configure("vanilla", corpus)
    straight = run(config, tmp_path / "straight")
    run_until_crash(config, tmp_path / "run", step=5)
    changed = with_train(config, log_every=2, eval_every=2, checkpoint_every=1, keep_checkpoints=1, threads=1)
    resumed = run(changed, tmp_path / "run", resume=True)
    assert checkpoint_bytes(resumed, 6) == checkpoint_bytes(straight, 6)
    assert [line["step"] for line in resumed.metrics("train")] == [1, 2, 3, 4, 6]
    assert [path.name for path in resumed.checkpoints.iterdir()] == ["step-6"]


def test_a_precision_settled_once_is_kept(corpus: Path, tmp_path: Path) -> None:
    config = configure("vanilla", corpus, "train.precision=auto")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "cpu_has_bf16", lambda: True)
        patch.setattr(precision, "BF16_MIN_WIDTH", 1)
        run_until_crash(config, tmp_path / "run", step=5)
    resumed = run(config, tmp_path / "run", resume=True)
    assert resumed.config().train.precision == "bf16"
    fresh = run(config, tmp_path / "fresh")
    assert fresh.config().train.precision == "fp32"


def test_a_changed_corpus_is_refused(corpus: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(corpus.read_text(encoding="utf-8"), encoding="utf-8")
    config = configure("vanilla", text)
    run_until_crash(config, tmp_path / "run", step=5)
    text.write_text(corpus.read_text(encoding="utf-8").replace("fox", "cat"), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"the text of data\.corpus '.*text\.txt' has changed since"):
        run(config, tmp_path / "run", resume=True)


def test_nothing_to_resume_is_said_before_a_folder_is_made(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"'.*nowhere' is not a run folder: it has no config.yaml"):
        run(configure("vanilla", corpus), tmp_path / "nowhere", resume=True)
    assert not (tmp_path / "nowhere").exists()


def with_train(config: Config, **changes: Any) -> Config:
    """The config with other training options."""
    return config.model_copy(update={"train": config.train.model_copy(update=changes)})
