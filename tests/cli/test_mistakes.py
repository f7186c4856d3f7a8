"""What a user who made a mistake is told: one sentence, exit code 2, and nothing overwritten."""

import errno
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import morex
from cli.shell import TINY, Shell, contents
from documents import CORPUS
from morex.cli import main
from morex.train import trainer
from morex.train.runs import RunFolder

TINY_CORPUS = ["--tiny", "--set", f"data.corpus={CORPUS}", "--set", "data.tokenizer.kind=byte"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["trian"], "No such command 'trian'; did you mean 'train'"),
        (["xyzzy"], "No such command 'xyzzy'; known: analyze, bench, .*, train"),
        (["train"], "Missing argument.*CONFIG"),
        (["train", "vanilla", "--stpes", "3"], "No such option: --stpes"),
        (["train", "vanilla", "--steps", "3"], "No such option: --steps; .*--set train.steps=VALUE"),
        (["train", "vanilla", "--batch-size", "3"], "--set train.batch_size=VALUE"),
        (["train", "mor-exprt"], "unknown preset 'mor-exprt'; did you mean 'mor-expert'"),
        (["train", "missing.yaml"], "'missing.yaml' does not exist"),
        (["train", "vanilla", "--set", "train.lrr=1"], "unknown key 'train.lrr'; did you mean 'lr'"),
        (["train", "vanilla", "--set", "train.epochs=3"], "unknown key 'train.epochs'; did you mean 'steps'"),
        (["train", "vanilla", "--set", "learning_rate=1"], "unknown key 'learning_rate'; did you mean 'train.lr'"),
        (["train", "vanilla", "--set", "steps=3"], "unknown key 'steps'; did you mean .*'train.steps'"),
        (
            ["train", "more-a", "--set", "model.mixer.depth.kind=halting"],
            "unknown key 'model.mixer.depth': only model.mixer.kind 'recursive' has it",
        ),
        (["train", "moe", "--set", "model.mixer.top_k=2"], "did you mean 'model.mixer.router.top_k'"),
        (["train", "vanilla", "--set", "model.depth.kind=expert_choise"], "expert_choise.*expert_choice"),
        (["train", "vanilla", "--set", "train.lr"], "'train.lr' must have the form a.b=value"),
        (["train", "vanilla", "--set", "model.d_model=30"], "d_model 30 .*heads 4"),
        (["train", "recursive", "--set", "model.schedule.layers=9"], "layers 9 .*8 and 11"),
        (["train", "vanilla", "--set", "model.depth.kind=token_choice"], "token_choice.*recursions is 1, use 2"),
        (["train", "moe", "--set", "model.mixer.router.top_k=5"], "top_k 5 .*4 experts"),
        (["train", "vanilla", "--resume"], "--resume needs the run"),
        (["train", "--resume", "nowhere", "--out", "nowhere"], "unknown preset 'nowhere'"),
        (["train", "--resume", "nowhere"], "'nowhere' is not a run folder: it has no config.yaml"),
        (["train", "--branch", "nowhere"], "'nowhere' is neither a run folder nor a checkpoint"),
        (["train", "--branch", "--resume", "nowhere"], "leave --resume and --tiny out"),
        (["eval", "nowhere"], "'nowhere' is neither a run folder nor a checkpoint"),
        (["generate", "nowhere", "--prompt", "a"], "'nowhere' is neither a run folder nor a checkpoint"),
        (["generate", "nowhere"], "nothing to continue"),
        (["generate", "nowhere", "--prompts", "missing.txt"], "'missing.txt': no such file"),
        (["generate", "nowhere", "--prompt", "a", "--max-new-tokens", "few"], "--max-new-tokens"),
        (["presets", "--seq-len", "0"], "--seq-len 0 must be 1 or more"),
        (["compare", "dmeo"], "unknown study 'dmeo'; did you mean 'demo'"),
        (["compare", "demo", "--on", "slurm"], "--on 'slurm' is unknown; use local, ray"),
        (
            ["compare", "demo", "--ray-address", "one:6379"],
            "--ray-address one:6379 is for cells on a cluster; add --on ray",
        ),
        (["compare", "demo", "--cell-cpus", "2"], "--cell-cpus 2 is for cells on a cluster; add --on ray"),
        (["presets", "vanila"], "unknown preset 'vanila'; did you mean 'vanilla'"),
        (["data", "vanilla", "--set", "data.corpus=missing.txt"], "missing.txt"),
        (["data"], "Missing argument.*CONFIG"),
        (["data", "prepare", "vanilla"], "Missing option.*--out"),
        (["data", "prepare", "vanilla", "--out", "shards", "--workers", "0"], "--workers"),
        (["data", "prepare", "vanilla", "--out", "shards", "--set", "data.task.kind=parity"], "cannot be prepared"),
        (["data", "check", "nowhere"], "'nowhere' has no token shards: there is no shards.json"),
        (["data", "vanilla", "--set", "data.corpus=memory://nowhere"], "'memory://nowhere' is not there"),
        (["train", "vanilla", "--set", "data.mixture=[{corpus: a, weight: -1}]"], "data.mixture.0.weight -1"),
        (["train", "vanilla", "--set", "data.mixture=[{corpus: a, wieght: 1}]"], "data.mixture.0.wieght.*'weight'"),
        (["train", "vanilla", "--set", "data.mixture=[{weight: 1}]"], "'data.mixture.0.corpus' is missing"),
        (["bench", "train", "vanila"], "unknown preset 'vanila'; did you mean 'vanilla'"),
        (["bench", "train"], "Missing argument.*PRESET"),
        (["bench", "train", "more", "--rounds", "0"], "--rounds 0 must be 1 or more"),
        (["bench", "train", "more", "--precision", "fp8"], "--precision 'fp8' is unknown; use fp32, bf16"),
        (["bench", "train", "more", "--device", "tpu"], "'tpu'"),
        (["bench", "train", "more", "--expert-loads", "half"], "--expert-loads 'half' must be numbers with commas"),
        (["bench", "train", "more", "--expert-loads", "0.5,0.5"], "name 2 experts, but 'more' has 4"),
        (["bench", "train", "more", "--expert-loads", "nan,1,1,1"], "must be 0 or more and sum to 1"),
        (["bench", "train", "vanilla", "--expert-loads", "0.5,0.5"], "presets that have experts, not vanilla"),
        (["bench", "train", "more", "--threads", "100000"], "100000 CPU threads are too many for"),
        (
            ["bench", "train", "more", "--json", "nowhere/speed.json"],
            "--json 'nowhere/speed.json' .*no folder 'nowhere'",
        ),
        (["bench", "train", "more", "--json", "."], "--json '.' is a folder"),
        (["train", "vanilla", "--set", "train.threads=100000", *TINY_CORPUS], "100000 CPU threads are too many for"),
        (["train", "."], "unknown preset '.'"),
        (["train", "./"], "'.' is a folder; a config is a YAML file, or a preset by name"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_mistakes_get_one_sentence(words: list[str], sentence: str, shell: Shell) -> None:
    assert re.search(sentence, shell.refuses(*words))
    assert sorted(os.listdir()) == [CORPUS]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("empty.txt", b"", "empty"),
        ("small.txt", b"Too little text for one window.\n", "small.txt|corpus|token"),
        ("picture.png", b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + bytes(range(256)) * 40, "picture.png"),
        ("latin.txt", "caf\xe9 \xfcber stra\xdfe ".encode("latin-1") * 400, "latin.txt.*UTF-8"),
        ("lines.jsonl", b'{"body": "no text here"}\n' * 400, "text.*body|'text'"),
    ],
)
def test_unusable_corpora_get_one_sentence(name: str, content: bytes, sentence: str, shell: Shell) -> None:
    Path(name).write_bytes(content)
    words = ["train", "vanilla", "--out", "run", *TINY, "--set", f"data.corpus={name}"]
    assert re.search(sentence, shell.refuses(*words, "--set", "data.tokenizer.kind=byte"))
    assert not (Path("run") / "checkpoints").exists() and not (Path("run") / "metrics.jsonl").exists()


def test_a_mistyped_corpus_is_told_as_it_was_typed(shell: Shell) -> None:
    sentence = shell.refuses("train", "vanilla", "--out", "run", "--set", "data.corpus=tinyshakespear")
    assert (
        sentence.startswith("data.corpus 'tinyshakespear' is neither") and "did you mean 'tinyshakespeare'" in sentence
    )


def test_vocabulary_that_is_too_small_for_the_tokenizer(shell: Shell) -> None:
    words = ["train", "vanilla", "--out", "run", *TINY, "--set", "model.vocab_size=97"]
    assert re.search("97", shell.refuses(*words, "--set", "data.tokenizer.kind=byte"))


def test_a_model_without_a_causal_rule_is_told_how_to_decode(shell: Shell) -> None:
    trained = shell.succeeds("train", "mor-expert", "--out", "run", *TINY, "--set", "model.depth.causal=none")
    assert "morex generate" not in trained.err and "fixed --depth" in trained.err
    sentence = shell.refuses("generate", "run", "--prompt", "a")
    assert "give a fixed depth, such as 3" in sentence and "oracle" not in sentence
    assert "give a fixed one" in shell.refuses("generate", "run", "--prompt", "a", "--depth", "oracle")
    shell.succeeds("generate", "run", "--prompt", "a", "--depth", "3", "--max-new-tokens", "2")


def test_a_classifier_is_not_asked_for_text(shell: Shell) -> None:
    short = [word for option in ("steps=1", "batch_size=2", "device=cpu") for word in ("--set", f"train.{option}")]
    shell.succeeds("train", "sandbox-token", "--tiny", "--out", "run", *short, "--set", "data.task.held_out=4")
    for words in (["generate", "run", "--prompt", "To be"], ["chat", "run"]):
        assert "'classifier' does not decode" in shell.refuses(*words)


def test_the_tiny_form_keeps_the_sharing(shell: Shell) -> None:
    short = ["--set", "train.steps=1", "--set", "model.schedule.layers=11"]
    shell.succeeds("train", "mor-token", "--out", "run", *TINY, *short)
    assert "layers 10" in shell.refuses("train", "mor-token", "--tiny", "--set", "model.schedule.layers=10")


def test_an_existing_run_is_not_overwritten(trained: Path, shell: Shell) -> None:
    before = contents(trained)
    sentence = shell.refuses("train", "vanilla", "--out", trained, *TINY)
    # Its cosine has come to its end, so that it is no use to go on with more steps.
    assert "holds a finished run; nothing was overwritten" in sentence and "--resume" not in sentence
    assert "train.lr" in shell.refuses("train", "--resume", trained, "--set", "train.lr=0.5")
    assert contents(trained) == before


def test_a_damaged_checkpoint_is_refused(shell: Shell) -> None:
    shell.succeeds("train", "vanilla", "--out", "run", *TINY)
    (weights,) = Path("run").rglob("model.safetensors")
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    before = contents(Path("run"))
    for words in (["eval", weights.parent], ["generate", weights.parent, "--prompt", "a"]):
        assert re.search("damaged: model.safetensors", shell.refuses(*words))
    assert contents(Path("run")) == before


def test_warnings_are_one_line_each(shell: Shell) -> None:
    shell.succeeds("train", "vanilla", "--out", "run", *TINY, "--set", "train.checkpoint_every=2")
    (weights,) = Path("run").glob("checkpoints/step-3/model.safetensors")
    weights.write_bytes(b"")
    result = shell.succeeds("eval", "run", "--json")
    assert result.json["tokens"] > 0
    assert re.fullmatch(r"warning: checkpoint [^\n]*step-3' is damaged[^\n]*\n", result.err)


def test_generate_refuses_a_model_without_a_causal_rule(shell: Shell) -> None:
    shell.succeeds("train", "mor-expert", "--out", "run", *TINY, "--set", "model.depth.causal=none")
    for words in (["generate", "run", "--prompt", "the"], ["chat", "run"]):
        assert "aux_loss" in shell.refuses(*words)
    result = shell.succeeds("eval", "run")
    assert "oracle" in result.out and "causal" not in result.out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--temperature", "-1"], "temperature -1"),
        (["--temperature", "nan"], "temperature nan must be 0"),
        (["--temperature", "inf"], "temperature inf must be 0"),
        (["--seed", "99999999999999999999"], "seed 99999999999999999999 must be an integer between"),
        (["--top-k", "0"], "top_k 0"),
        (["--max-new-tokens", "-1"], "max_new_tokens -1"),
        (["--top-p", "1.5"], "top_p 1.5"),
        (["--top-k", "5"], "top_k 5 has no effect at temperature 0"),
        (["--top-p", "0.5", "--temperature", "0"], "top_p 0.5 has no effect at temperature 0"),
        (["--depth", "9"], "depth '?9'?"),
        (["--depth", "deep"], "depth 'deep'.*uniform:N"),
        (["--depth", "oracle"], "oracle"),
        (["--device", "tpu"], "'tpu'"),
    ],
    ids=" ".join,
)
def test_generate_refuses_options_out_of_range(words: list[str], sentence: str, trained: Path, shell: Shell) -> None:
    assert re.search(sentence, shell.refuses("generate", trained, "--prompt", "the", *words))


def test_a_key_that_stands_twice(shell: Shell) -> None:
    Path("twice.yaml").write_text("preset: vanilla\ntrain:\n  lr: 1.0e-3\n  steps: 5\n  lr: 3.0e-4\n")
    assert "config 'twice.yaml' has the key 'lr' twice, in lines 3 and 5" in shell.refuses("train", "twice.yaml")


def test_prompt_file_that_is_not_text(trained: Path, shell: Shell) -> None:
    Path("prompts.txt").write_bytes(b"\xff\xfe\x00")
    assert "'prompts.txt' is not UTF-8" in shell.refuses("generate", trained, "--prompts", "prompts.txt")


def test_a_run_folder_in_use_is_refused(shell: Shell) -> None:
    run = RunFolder(Path("run"))
    with run.locked():
        assert f"in use by process {os.getpid()}" in shell.refuses("train", "vanilla", "--out", "run", *TINY)
    assert list(contents(Path("run"))) == [".lock"]


def test_a_run_is_evaluated_as_it_was_trained(shell: Shell) -> None:
    shell.succeeds("train", "vanilla", "--out", "run", *TINY)
    assert "the model of a run is trained as it is" in shell.refuses("eval", "run", "--set", "model.d_model=64")
    text = Path(CORPUS).read_text(encoding="utf-8")
    Path(CORPUS).write_text(text + "And one more line.\n", encoding="utf-8")
    assert re.search(f"{CORPUS}' has changed since .*--set data.corpus=", shell.refuses("eval", "run"))
    shell.succeeds("eval", "run", "--set", f"data.corpus={CORPUS}")


def test_a_run_is_the_same_from_every_folder(
    trained: Path, shell: Shell, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = shell.succeeds("eval", trained, "--json").json
    folder = trained.resolve()
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert shell.succeeds("eval", folder, "--json").json == here


def test_a_checkpoint_of_another_run_is_refused(trained: Path, shell: Shell) -> None:
    shell.succeeds("train", "vanilla", "--out", "other", *TINY)
    shutil.rmtree("other/checkpoints")
    shutil.copytree(trained / "checkpoints", "other/checkpoints")
    before = contents(Path("other"))
    assert "is of another config" in shell.refuses("train", "--resume", "other", "--set", "train.steps=9")
    assert "is of another model than config.yaml" in shell.refuses("eval", "other")
    assert "is of another model than config.yaml" in shell.refuses("generate", "other", "--prompt", "a")
    assert contents(Path("other")) == before


def test_a_prompt_that_is_no_text(trained: Path, shell: Shell) -> None:
    assert "is not valid UTF-8" in shell.refuses("generate", trained, "--prompt", "bad\udcff")


@pytest.mark.parametrize("closed", [">&-", "2>&-"])
def test_closed_streams_are_no_fault(closed: str) -> None:
    words = f"{shlex.quote(sys.executable)} -m morex presets {closed}"
    done = subprocess.run(["sh", "-c", words], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "Traceback" not in done.stderr


def test_a_full_disk_keeps_what_was_saved(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    shell.succeeds("train", "vanilla", "--out", "run", *TINY, "--set", "train.schedule=constant")
    before = contents(Path("run/checkpoints"))

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("morex.train.storage.write_whole", full)
    result = shell("train", "--resume", "run", "--set", "train.steps=5")
    assert result.code == 2
    assert re.search(r"^error: no space left[^\n]*--resume run", result.err, re.M) and "Traceback" not in result.err
    assert contents(Path("run/checkpoints")) == before


def test_a_loss_that_is_not_finite_stops_the_run(shell: Shell) -> None:
    result = shell("train", "vanilla", "--out", "run", *TINY, "--set", "train.lr=1e38", "--set", "train.steps=9")
    assert result.code == 2
    assert re.search(r"^error: [^\n]*step \d", result.err, re.M) and "Traceback" not in result.err
    assert not (Path("run") / "summary.json").exists()


@pytest.mark.parametrize("place", [0, 1])
def test_debug_shows_the_traceback(place: int, shell: Shell) -> None:
    words = ["train", "nothing-like-it"]
    words.insert(2 * place, "--debug")
    with pytest.raises(morex.ConfigError, match="unknown preset"):
        main(words)


def test_our_own_faults_are_not_hidden(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise TypeError("a fault of the program's")

    monkeypatch.setattr("morex.cli.listing.load_config", broken)
    with pytest.raises(TypeError, match="a fault of the program's"):
        main(["presets"])


def test_a_missing_extra_is_one_sentence_but_a_broken_installation_is_not(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    def needs(error: ImportError) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise error

        monkeypatch.setattr("morex.cli.listing.load_config", fail)

    needs(ImportError("figures need plotly; run pip install 'morex[viz]'"))
    assert "morex[viz]" in shell.refuses("presets")
    needs(ModuleNotFoundError("No module named 'torch'", name="torch"))
    with pytest.raises(ModuleNotFoundError):
        main(["presets"])


def test_interrupted_training_saves_and_says_how_to_go_on(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first signal stops after the step in hand: exit code 0, a checkpoint, and the command that continues."""

    step = trainer.forward_backward

    def interrupting(*arguments: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "forward_backward", interrupting)
        result = shell("train", "vanilla", "--out", "my run", *TINY)
    assert result.code == 0
    found = re.search("go on with `morex (.*)`", result.err)
    assert found and "error" not in result.err
    shell.succeeds(*shlex.split(found[1]))
    assert json.loads(Path("my run/summary.json").read_text())["steps"] == 3


def test_ctrl_c_where_there_is_nothing_to_save_is_one_word(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupting(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module("morex.analysis.analyze"), "folder_for", interrupting)
    result = shell("analyze", "run")
    assert (result.code, result.out, result.err.strip()) == (130, "", "interrupted")
