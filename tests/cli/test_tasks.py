"""Tasks on the command line: what `data` shows, and accuracy in `train` and `eval`."""

import os
import re
from pathlib import Path

import pytest

from cli.shell import Shell
from documents import CORPUS
from morex.cli import main

PARITY = ["--set", "data.task={kind: parity, difficulty: [3, 8], held_out: 40}"]
SHORT = [f"train.{option}" for option in ("steps=2", "batch_size=4", "seq_len=16", "device=cpu", "threads=1")]
TINY = ["--tiny", *PARITY, *(word for option in SHORT for word in ("--set", option))]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run of `mor-expert` on parity. Shared: do not change it."""
    folder = tmp_path_factory.mktemp("trained")
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert main(["train", "mor-expert", "--out", "run", *TINY]) == 0
    finally:
        os.chdir(before)
    return folder / "run"


def test_data_shows_examples(shell: Shell) -> None:
    out = shell.succeeds("data", "vanilla", *PARITY).out
    assert len(re.findall(r"^difficulty +[3-8]: [01]{3,8}= [01]$", out, re.M)) == 8
    assert "Task: parity. Tokenizer: symbols, 4 ids." in out
    assert "Held-out examples: 40, difficulty 3 to 8" in out
    found = shell.succeeds("data", "vanilla", *PARITY, "--json").json
    assert found["train"]["examples"] is None and found["train"]["most_tokens"] == 10
    assert set(found["answers"]) == {"0", "1"} and found["shortened"] == 0


def test_data_shows_a_classifiers_questions(shell: Shell) -> None:
    found = shell.succeeds("data", "sandbox-expert", "--json").json
    assert found["train"]["most_tokens"] == 64 and found["tokenizer"]["vocab_size"] == 1000


def test_train_prints_accuracy(shell: Shell) -> None:
    assert "held-out accuracy" in shell.succeeds("train", "vanilla", "--out", "run", *TINY).out


def test_eval_prints_accuracy_by_rule(trained: Path, shell: Shell) -> None:
    out = shell.succeeds("eval", trained, "--depths").out
    assert "40 examples" in out and "token accuracy" in out
    for rule in ("causal (as in decoding)", "oracle (sees later tokens)", "every token at depth 3"):
        assert re.search(rf"^ *{re.escape(rule)} +[\d.]+% +[\d.]+% +[\d.]+ *$", out, re.M), out


def test_eval_by_difficulty(trained: Path, shell: Shell) -> None:
    found = shell.succeeds("eval", trained, "--json").json["scores"]
    out = shell.succeeds("eval", trained, "--by-difficulty").out
    for level, score in found["by_difficulty"].items():
        assert re.search(rf"^ *{level} +{score['examples']} +{score['accuracy']:.2%} ", out, re.M), out
    assert re.search(rf"^ *all +40 +{found['all']['accuracy']:.2%} ", out, re.M)


def test_eval_at_other_difficulties(trained: Path, shell: Shell) -> None:
    scores = shell.succeeds("eval", trained, "--difficulty", "30:40", "--json").json["scores"]
    assert {int(level) for level in scores["by_difficulty"]} <= set(range(30, 41))
    by_option = shell.succeeds("eval", trained, "--set", "data.task.eval_difficulty=[30,40]", "--json").json["scores"]
    assert by_option == scores


def test_options_of_tasks_that_do_not_fit_are_refused(trained: Path, shell: Shell) -> None:
    assert "--difficulty 7 must have the form LOW:HIGH" in shell.refuses("eval", trained, "--difficulty", "7")
    assert "model.max_seq_len 64" in shell.refuses("eval", trained, "--difficulty", "7:99")
    assert "'addition'" in shell.refuses("data", "vanilla", "--set", "data.task.kind=additon")
    assert "is not among" in shell.refuses("generate", trained, "--prompt", "0x1=")


def test_recursions_that_follow_the_difficulty(shell: Shell) -> None:
    follows = ("data.task.difficulty=[3,3]", "data.task.eval_difficulty=[3,8]", "train.depth=difficulty")
    words = [word for option in follows for word in ("--set", option)]
    shell.succeeds("train", "recursive", "--out", "run", *TINY, *words)
    own = shell.succeeds("eval", "run").out
    assert own == shell.succeeds("eval", "run", "--depth", "difficulty").out and "depth difficulty" in own
    assert shell.succeeds("eval", "run", "--depth", "3").out != own
    found = shell.succeeds("analyze", "run", "--trace", "run.npz").out
    assert "depth by difficulty" in found and "depth by difficulty" in shell.succeeds("analyze", "run.npz").out
    assert [len(group["active_share"]) for group in shell.succeeds("analyze", "run", "--json").json["groups"]] == [8]


def test_a_corpus_has_no_difficulty(shell: Shell) -> None:
    words = [word for option in (f"data.corpus={CORPUS}", *SHORT) for word in ("--set", option)]
    shell.succeeds("train", "recursive", "--tiny", "--out", "run", *words)
    assert "'difficulty' is for the examples of a task" in shell.refuses("eval", "run", "--depth", "difficulty")
