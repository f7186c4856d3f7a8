"""SIGKILL at any moment costs at most the steps since the last checkpoint: what comes out is the same to the bit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from morex.train.runs import RunFolder
from train.helpers import checkpoint_bytes, configure, files_of, losses, run

PROGRAM = Path(__file__).with_name("kill_program.py")


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "kills", "seed"), [(1, 20, 1), (2, 4, 2)])
def test_a_run_that_was_killed_again_and_again_is_the_straight_run(
    ranks: int, kills: int, seed: int, corpus: Path, tmp_path: Path
) -> None:
    steps = 160 if ranks == 1 else 60
    config = configure("mor-threshold", corpus, f"train.steps={steps}", "train.checkpoint_every=3")
    folder, straight = tmp_path / "killed", tmp_path / "straight"
    job = {"config": config.to_dict(), "folder": str(folder), "ranks": ranks, "kills": kills, "seed": seed}
    for each in (job, {**job, "folder": str(straight), "kills": 0}):
        path = tmp_path / "job.json"
        path.write_text(json.dumps(each))
        done = subprocess.run([sys.executable, PROGRAM, path], capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
    killed, whole = RunFolder(folder), RunFolder(straight)
    assert [line["step"] for line in killed.metrics("train")] == [*range(1, steps + 1)]
    assert losses(killed) == losses(whole)
    before = killed.environment()
    assert before is not None and len(before["resumed"]) >= kills // 2  # they did not all come before the first step
    for name, content in files_of(whole.checkpoint_path(steps)).items():
        if name.endswith((".safetensors", "index.json")):
            assert files_of(killed.checkpoint_path(steps))[name] == content, name
    assert not killed.heartbeat_path.exists()
    if ranks == 1:
        assert checkpoint_bytes(run(config, tmp_path / "here"), steps) == checkpoint_bytes(killed, steps)
