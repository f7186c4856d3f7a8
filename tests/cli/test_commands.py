"""Every command, end to end at tiny sizes."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

import morex
from cli.shell import TINY, Shell, contents
from documents import CORPUS

COMMANDS = [
    "presets",
    "train",
    "eval",
    "generate",
    "chat",
    "analyze",
    "compare",
    "bench",
    "data",
    "plan",
    "runs",
    "export",
]
PARTS = ["data describe", "data prepare", "data check", "bench train", "bench decode", "bench kv"]


# What it costs to start, and what help says


def test_importing_the_command_line_loads_no_torch() -> None:
    program = "import sys, morex.cli; sys.exit(sorted({'torch', 'numpy'} & sys.modules.keys()) or None)"
    assert subprocess.run([sys.executable, "-c", program], check=False, capture_output=True).returncode == 0


def test_module_runs_as_a_program() -> None:
    done = subprocess.run([sys.executable, "-m", "morex", "--help"], capture_output=True, text=True, check=True)
    for command in COMMANDS:
        assert re.search(rf"^  {command} +[A-Z].*\.$", done.stdout, re.M), command


def test_help_needs_no_torch() -> None:
    program = "import sys; from morex.cli import main; main(['train', '--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False, capture_output=True).returncode == 0


def test_without_a_command_it_shows_the_help(shell: Shell) -> None:
    assert shell.succeeds().out == shell.succeeds("--help").out
    assert shell.succeeds("bench").out == shell.succeeds("bench", "--help").out


@pytest.mark.parametrize("command", [*COMMANDS, *PARTS])
def test_help_has_examples(command: str, shell: Shell) -> None:
    text = shell.succeeds(*command.split(), "--help").out
    examples = re.findall(rf"^    morex {command}\b.*$", text.partition("Examples:")[2], re.M)
    assert len(examples) >= 1 + (command != "bench")


def test_version(shell: Shell) -> None:
    assert shell.succeeds("--version").out == f"morex {morex.__version__}\n"


# presets and data


def test_presets_as_json_are_the_counts(shell: Shell) -> None:
    rows = {row["preset"]: row for row in shell.succeeds("presets", "--json").json}
    assert list(rows) == morex.presets()
    assert rows["more"]["parameters"] == 1_457_920 and rows["more-baseline"]["parameters"] == 336_640
    config = morex.load_config("mor-expert")
    counted = morex.count(config.model, seq_len=config.train.seq_len)
    assert rows["mor-expert"]["train_flops_per_token"] == counted.train_flops_per_token
    assert rows["mor-expert"]["seq_len"] == config.train.seq_len


def test_presets_at_another_length(shell: Shell) -> None:
    (row,) = shell.succeeds("presets", "vanilla", "--seq-len", "2048", "--json").json
    model = morex.load_config("vanilla").model
    assert row["decode_flops_per_token"] == morex.count(model, seq_len=2048).decode_flops_per_token


def test_presets_as_a_table_is_not_cut(shell: Shell) -> None:
    out = shell.succeeds("presets").out
    for name in morex.presets():
        assert re.search(rf"^ *{name} +[\d,]+ +[\d,]+ +\d+ ", out, re.M), name
    assert "6,888,009,728" in out and "…" not in out


def test_data_describes_the_corpus(shell: Shell) -> None:
    words = ["data", "vanilla", "--set", f"data.corpus={CORPUS}", "--set", "data.tokenizer.kind=byte"]
    words += ["--set", "train.steps=2", "--set", "train.batch_size=8", "--set", "train.seq_len=64"]
    described = shell.succeeds(*words, "--json").json
    size = Path(CORPUS).stat().st_size
    assert described["bytes"] == size
    assert described["train"]["bytes"] + described["val"]["bytes"] == size
    assert described["epochs"] == pytest.approx(2 * 8 * 64 / described["train"]["tokens"])
    table = shell.succeeds(*words).out
    assert f"{described['train']['tokens']:,}" in table and "byte" in table


def test_data_says_what_is_left_out_of_training(shell: Shell) -> None:
    lines = [json.dumps({"body": f"the story of number {i} " * 20}) for i in range(20)]
    Path("train.jsonl").write_text("\n".join(lines))
    Path("held-out.jsonl").write_text("\n".join(lines[:3]))
    words = ["data", "vanilla", "--set", "data.corpus=train.jsonl", "--set", "data.val_corpus=held-out.jsonl"]
    words += ["--set", "data.column=body", "--set", "data.tokenizer.kind=byte", "--set", "train.seq_len=64"]
    assert "Left out of training: 3 documents" in shell.succeeds(*words).out


def test_data_describes_by_either_name(shell: Shell) -> None:
    words = ["vanilla", "--set", f"data.corpus={CORPUS}", "--set", "data.tokenizer.kind=byte", "--json"]
    assert shell.succeeds("data", *words).json == shell.succeeds("data", "describe", *words).json
    assert shell.succeeds("data", "--json", *words[:-1]).json == shell.succeeds("data", *words).json


def test_shards_are_prepared_checked_and_trained_on(shell: Shell) -> None:
    own = ["--set", f"data.corpus={CORPUS}", "--set", "data.tokenizer.kind=byte", "--set", "data.val_fraction=0.1"]
    made = shell.succeeds("data", "prepare", "vanilla", "--out", "shards", "--workers", "1", *own, "--json").json
    assert made["train"]["shards"] == 1 and made["kept"] == 0
    assert made["train"]["bytes"] + made["val"]["bytes"] == Path(CORPUS).stat().st_size
    before = contents(Path("shards"))
    again = shell.succeeds("data", "prepare", "vanilla", "--out", "shards", *own)
    assert "Found finished and whole: 2 shards." in again.out and "--set data.corpus=shards" in again.out
    assert contents(Path("shards")) == before
    assert shell.succeeds("data", "check", "shards", "--json").json["train"] == made["train"]
    described = shell.succeeds("data", "vanilla", "--set", "data.corpus=shards", "--json").json
    assert described["tokens"] == made["train"]["tokens"] + made["val"]["tokens"] and described["folder"] == "shards"
    shell.succeeds("train", "vanilla", "--out", "text", *TINY, *own)
    shell.succeeds("train", "vanilla", "--out", "run", *TINY, "--set", "data.corpus=shards")
    losses = [json.loads(Path(run, "summary.json").read_text())["val_loss"] for run in ("text", "run")]
    assert losses[0] == losses[1]
    assert morex.load_config("run/config.yaml").data.corpus == str(Path("shards").absolute())
    Path("shards", "val-00000.tokens").write_bytes(b"")
    assert "has changed since it was indexed" in shell.refuses("eval", "run")


def test_a_mixture_is_trained_on_and_goes_on(shell: Shell) -> None:
    Path("other.txt").write_text("another text, which is not that of the corpus; " * 400)
    mixture = f"data.mixture=[{{corpus: {CORPUS}, weight: 3}}, {{corpus: other.txt, epochs: 9}}]"
    words = [*TINY, "--set", mixture, "--set", "data.tokenizer.kind=byte", "--set", "train.schedule=constant"]
    assert (
        "Member other.txt: 25.00% of the windows"
        in shell.succeeds("data", "vanilla", *words[words.index("--set") :]).out
    )
    shell.succeeds("train", "vanilla", "--out", "run", *words)
    shell.succeeds("train", "--resume", "run", "--set", "train.steps=5")
    shell.succeeds("train", "vanilla", "--out", "whole", *words, "--set", "train.steps=5")
    resumed, whole = (json.loads(Path(run, "summary.json").read_text()) for run in ("run", "whole"))
    assert (resumed["val_loss"], resumed["final_train_loss"]) == (whole["val_loss"], whole["final_train_loss"])
    dry = shell.refuses("train", "vanilla", "--out", "dry", *words, "--set", "train.steps=100000")
    assert "data.mixture runs dry: 100,000 steps" in dry and "other.txt" in dry
    assert not Path("dry", "metrics.jsonl").exists()


# train, eval, generate


def test_train_leaves_a_run_folder(trained: Path) -> None:
    assert {"config.yaml", "metrics.jsonl", "summary.json", "env.json"} <= set(contents(trained))
    assert json.loads((trained / "summary.json").read_text())["steps"] == 3
    assert morex.load_config(trained / "config.yaml").model.d_model == 32


def test_a_run_finds_its_corpora_from_everywhere(shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("held-out.txt").write_text("another text, which no model has seen. " * 20)
    shell.succeeds("train", "vanilla", "--out", "run", *TINY, "--set", "data.val_corpus=held-out.txt")
    run = Path("run").absolute()
    config = morex.load_config(run / "config.yaml")
    assert config.data.corpus == str(Path(CORPUS).absolute())
    assert config.data.val_corpus == str(Path("held-out.txt").absolute())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    loss = shell.succeeds("eval", str(run), "--json").json["loss"]
    assert loss == pytest.approx(json.loads((run / "summary.json").read_text())["val_loss"], rel=1e-5)


def test_train_names_the_folder_by_preset_and_date(shell: Shell) -> None:
    result = shell.succeeds("train", "vanilla", *TINY)
    (folder,) = Path("runs").iterdir()
    assert re.fullmatch(r"vanilla-\d{8}-\d{6}", folder.name)
    assert str(folder) in result.out and f"morex eval {folder}" in result.err


def test_train_from_a_file_with_overrides(shell: Shell) -> None:
    Path("mine.yaml").write_text(yaml.safe_dump({"preset": "recursive", "train": {"lr": 0.01}}))
    shell.succeeds("train", "mine.yaml", "--out", "run", *TINY, "--set", "model.kv=shared_first")
    config = morex.load_config("run/config.yaml")
    assert (config.train.lr, config.model.kv, config.model.schedule.recursions) == (0.01, "shared_first", 3)


def test_resume_goes_on(shell: Shell) -> None:
    constant = ["--set", "train.schedule=constant"]
    shell.succeeds("train", "mor-token", "--out", "run", *TINY, *constant)
    shell.succeeds("train", "--resume", "run", "--set", "train.steps=5")
    shell.succeeds("train", "mor-token", "--out", "whole", *TINY, *constant, "--set", "train.steps=5")
    resumed, whole = (json.loads(Path(run, "summary.json").read_text()) for run in ("run", "whole"))
    assert resumed["steps"] == whole["steps"] == 5
    assert resumed["val_loss"] == whole["val_loss"]


def test_resume_of_a_run_by_config_and_out(shell: Shell) -> None:
    shell.succeeds("train", "vanilla", "--out", "run", *TINY)
    result = shell.succeeds("train", "vanilla", "--out", "run", "--resume", *TINY)
    assert re.search(r"steps +3\b", result.out)


def test_a_branch_of_a_run(shell: Shell) -> None:
    plan = ["--set", "train.schedule=trapezoid", "--set", "train.budgets=[3]", "--set", "train.checkpoint_every=0"]
    shell.succeeds("train", "vanilla", "--out", "long", *TINY, *plan, "--set", "train.steps=6")
    shell.succeeds("train", "--branch", "long", "--set", "train.steps=3")
    shell.succeeds("train", "vanilla", "--out", "alone", *TINY, *plan, "--set", "train.steps=3")
    branch, alone = (json.loads(Path(run, "summary.json").read_text()) for run in ("long-3", "alone"))
    assert branch["steps"] == alone["steps"] == 3 and branch["val_loss"] == alone["val_loss"]
    sentence = shell.refuses("train", "--branch", "long/checkpoints/step-6", "--set", "train.steps=4")
    assert "long' has the learning rates of train.steps 4" in sentence and not Path("long-4").exists()


def test_eval_repeats_the_summary(trained: Path, shell: Shell) -> None:
    summary = json.loads((trained / "summary.json").read_text())
    result = shell.succeeds("eval", trained, "--json").json
    assert result["loss"] == summary["val_loss"]
    assert result["oracle_loss"] == summary["val_loss_oracle"]
    assert result["by_depth"] is None


def test_eval_shows_oracle_and_causal_side_by_side(trained: Path, shell: Shell) -> None:
    result = shell.succeeds("eval", trained, "--depths", "--json").json
    out = shell.succeeds("eval", trained, "--depths").out
    assert re.search(rf"causal \(as in decoding\) +{result['loss']:.4f} +[\d.]+ +{result['bits_per_byte']:.4f}", out)
    assert re.search(rf"oracle \(sees later tokens\) +{result['oracle_loss']:.4f} ", out)
    for r in ("1", "2", "3"):
        assert re.search(rf"depth {r} +{result['by_depth'][r]:.4f} ", out)


def test_eval_of_a_checkpoint_at_one_depth(trained: Path, shell: Shell) -> None:
    by_depth = shell.succeeds("eval", trained, "--depths", "--json").json["by_depth"]
    one = shell.succeeds("eval", trained / "checkpoints" / "step-3", "--depth", "1", "--json").json
    assert one["loss"] == by_depth["1"] and one["oracle_loss"] is None


def test_generate_continues_every_prompt(trained: Path, shell: Shell) -> None:
    Path("prompts.txt").write_text("the people of the town\n\npeace\n")
    words = ["--prompt", "the river", "--prompts", "prompts.txt", "--max-new-tokens", "5"]
    results = shell.succeeds("generate", trained, *words, "--json").json
    assert [result["prompt"] for result in results] == ["the river", "the people of the town", "peace"]
    for result in results:
        assert result["text"].startswith(result["prompt"]) and 1 <= result["new_tokens"] <= 5
    alone = shell.succeeds("generate", trained, "--prompt", "peace", "--max-new-tokens", "5", "--json").json
    assert alone == results[2:]
    assert shell.succeeds("generate", trained, *words).out == "\n\n".join(r["text"] for r in results) + "\n"


def test_generate_draws_by_its_seed(trained: Path, shell: Shell) -> None:
    words = ["generate", trained, "--prompt", "the", "--temperature", "1.5", "--max-new-tokens", "12", "--seed"]
    first, again, other = (shell.succeeds(*words, seed).out for seed in ("1", "1", "2"))
    assert first == again != other


# compare and bench


def test_compare_trains_a_study_and_goes_on(shell: Shell) -> None:
    settings = {"model": {"d_model": 32, "vocab_size": 512}, "data": {"corpus": CORPUS, "val_fraction": 0.1}}
    settings["train"] = {"batch_size": 4, "seq_len": 32, "warmup_steps": 1, "threads": 1}
    variants = [{"name": "mor-expert"}, {"name": "twin", "twin_of": "mor-expert", "twin": "equal_depth"}]
    study = {"set": settings, "variants": variants, "report": {"decode_tokens": 4, "map_tokens": 8}}
    Path("mine.yaml").write_text(yaml.safe_dump(study))
    words = ["compare", "mine.yaml", "--out", "study", "--set", "budget.value=2", "--set", "sample.max_new_tokens=4"]
    first = shell.succeeds(*words)
    assert {"report.html", "table.csv", "results.json"} <= set(contents(Path("study")))
    assert re.search(r"^mor-expert +\d", first.out, re.M) and str(Path("study", "report.html")) in first.out
    again = shell.succeeds(*words)
    assert again.out == first.out and "2 of 2 cells are finished already" in again.err
    assert "another study" in shell.refuses(*words, "--set", "budget.value=3")


def test_compare_ends_with_1_where_a_cell_failed(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [SimpleNamespace(failed=0), SimpleNamespace(failed=1)]
    monkeypatch.setattr("morex.study.compare.compare", lambda *_, **__: SimpleNamespace(rows=rows))
    assert shell("compare", "demo").code == 1


def test_bench_measures_and_writes_what_it_measured(shell: Shell) -> None:
    words = ["bench", "train", "more-baseline", "mor-expert", "--steps", "1", "--rounds", "1", "--no-memory"]
    words += ["--batch-size", "2", "--seq-len", "16", "--set", "model.d_model=32", "--json", "speed.json"]
    result = shell.succeeds(*words)
    content = json.loads(Path("speed.json").read_text())
    assert [row["preset"] for row in content["rows"]] == ["more-baseline", "mor-expert"]
    routed = content["rows"][1]
    assert routed["explained"] == pytest.approx(routed["flop_ratio"] / routed["time_ratio"])
    assert re.search(rf"^ *mor-expert +unrolled +fp32 .* {routed['flop_ratio']:.2f} ", result.out, re.M)
    assert content["machine"]["versions"]["torch"]
