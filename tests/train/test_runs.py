"""Run folders: nothing is overwritten, one process at a time, and what is read back is what was written."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from morex.train.errors import RunFolderError
from morex.train.metrics import MetricsWriter
from morex.train.runs import RunFolder, environment, read_json, read_json_lines
from train.helpers import configure, files_of, run, run_until_crash


def test_a_finished_run_is_not_overwritten(corpus: Path, tmp_path: Path) -> None:
    done = run(configure("vanilla", corpus), tmp_path / "run")
    before = files_of(done.path)
    with pytest.raises(RunFolderError, match=r"holds a finished run; nothing was overwritten: name another folder"):
        run(configure("vanilla", corpus, "train.lr=0.1"), done.path)
    assert files_of(done.path) == before


def test_an_unfinished_run_is_not_overwritten(corpus: Path, tmp_path: Path) -> None:
    crashed = run_until_crash(configure("vanilla", corpus), tmp_path / "run", step=5)
    before = files_of(crashed.path)
    with pytest.raises(RunFolderError, match=r"holds a run; nothing was overwritten: .*`morex train --resume "):
        run(configure("vanilla", corpus), crashed.path)
    assert files_of(crashed.path) == before


def test_the_command_that_goes_on_can_be_pasted() -> None:
    words = shlex.split(RunFolder(Path("runs/my first")).resume_command)
    assert words == ["morex", "train", "--resume", "runs/my first"]


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints", "tokenizer", "env.json", "summary.json"])
def test_files_that_a_run_would_write_are_not_overwritten(name: str, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("precious")
    with pytest.raises(RunFolderError):
        run(configure("vanilla", corpus), tmp_path / "run")
    assert (tmp_path / "run" / name).read_text() == "precious"


def test_other_files_may_stand_beside_a_run(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("precious")
    assert run(configure("vanilla", corpus), tmp_path).summary() is not None
    assert (tmp_path / "notes.txt").read_text() == "precious"


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_file_is_no_run_folder(place: str, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(RunFolderError, match=r"cannot be made or written \(.*\); name another folder"):
        run(configure("vanilla", corpus), tmp_path / place)
    assert (tmp_path / "file").read_text() == "precious"


def test_a_config_that_fails_leaves_no_run(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="vocab_size"):
        run(configure("vanilla", corpus, "model.vocab_size=100"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match="vocab_size"):
        run(configure("vanilla", corpus, "model.vocab_size=100"), tmp_path / "run")
    assert (tmp_path / "run").is_dir() and not RunFolder(tmp_path / "run").is_run()
    assert run(configure("vanilla", corpus), tmp_path / "run").summary() is not None


def test_a_second_training_on_the_same_folder_is_refused(corpus: Path, tmp_path: Path) -> None:
    held = RunFolder(tmp_path / "run")
    with held.locked():
        before = files_of(held.path)
        with pytest.raises(RunFolderError, match=rf"is in use by process {os.getpid()}; wait for it"):
            run(configure("vanilla", corpus), held.path)
        assert files_of(held.path) == before
    assert run(configure("vanilla", corpus), held.path).summary() is not None


def test_the_lock_holds_between_processes_and_ends_with_its_process(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from morex.train.runs import RunFolder\n"
        "with RunFolder(Path(sys.argv[1])).locked():\n"
        "    print('held', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(RunFolderError, match=f"in use by process {process.pid}"), RunFolder(tmp_path).locked():
            raise AssertionError("both hold it")
    finally:
        process.kill()
        process.communicate()
    with RunFolder(tmp_path).locked():
        pass


def test_the_config_comes_back_as_it_was(corpus: Path, tmp_path: Path) -> None:
    config = configure("more-tuned", corpus, "train.lr=0.00001", "train.eps=1e-12")
    assert run(config, tmp_path / "run").config() == config


def test_a_folder_without_a_run_says_so(tmp_path: Path) -> None:
    empty = RunFolder(tmp_path)
    assert not empty.is_run() and empty.metrics() == [] and empty.summary() is None and empty.environment() is None
    with pytest.raises(RunFolderError, match=r"is not a run folder: it has no config\.yaml"):
        empty.config()


def test_an_unfinished_last_line_is_left_out_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1}\n{"kind": "eval", "step": 1}\n{"kind": "tr')
    done = RunFolder(tmp_path)
    assert [line["kind"] for line in done.metrics()] == ["train", "eval"]
    assert done.metrics("eval") == [{"kind": "eval", "step": 1}]
    path.write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(RunFolderError, match="line 2 is not valid JSON"):
        read_json_lines(path)


def test_lines_after_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {step}}}\n' for step in range(1, 6)) + '{"step"')
    with MetricsWriter(path, 3) as writer:
        writer.write({"step": 4, "loss": 0.5})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "loss": 0.5}\n'


def test_json_that_is_not_an_object_is_named(tmp_path: Path) -> None:
    for content in ("[1]", "{", "\x00"):
        (tmp_path / "summary.json").write_text(content)
        with pytest.raises(RunFolderError, match=r"summary\.json' is damaged"):
            read_json(tmp_path / "summary.json")


def test_the_environment_names_what_matters_for_a_result() -> None:
    found = environment(torch.device("cpu"))
    assert found["versions"]["torch"] == torch.__version__
    assert found["cpu"] and found["cores"] == os.cpu_count() and found["threads"] == torch.get_num_threads()
    assert found["commit"] is None or len(found["commit"].removesuffix("-dirty")) == 40
    assert json.loads(json.dumps(found)) == found
