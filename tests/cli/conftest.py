"""A shell in a folder with a corpus, and a finished run."""

import io
import os
import sys
from pathlib import Path

import pytest

from cli.shell import TINY, Shell, Stdin
from documents import CORPUS, write_corpus
from morex.cli import main


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    """A shell in an empty folder that holds the corpus."""
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path)
    return Shell(capsys)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run of `mor-expert`, finished. Shared: do not change it."""
    folder = tmp_path_factory.mktemp("trained")
    write_corpus(folder)
    before = Path.cwd()
    os.chdir(folder)
    try:
        corpus = ["--set", f"data.corpus={folder / CORPUS}"]
        assert main(["train", "mor-expert", "--out", "run", *TINY, *corpus]) == 0
    finally:
        os.chdir(before)
    return folder / "run"


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Stdin:
    """Sets what the next command reads."""
    return lambda content: monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
