"""Runs command lines in this process and looks at what they leave."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from documents import TINY_TRAINING
from morex.cli import main

TINY = ["--tiny", *(word for key, value in TINY_TRAINING.items() for word in ("--set", f"{key}={value}"))]

Stdin = Callable[[bytes], None]


@dataclass
class Result:
    """What a command line came to."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class Shell:
    """Runs command lines in this process, in a folder with a corpus."""

    def __init__(self, capture: pytest.CaptureFixture[str]) -> None:
        self.capture = capture

    def __call__(self, *words: str | Path) -> Result:
        code = main([str(word) for word in words])
        captured = self.capture.readouterr()
        return Result(code, captured.out, captured.err)

    def succeeds(self, *words: str | Path) -> Result:
        result = self(*words)
        assert result.code == 0, result.err
        return result

    def refuses(self, *words: str | Path) -> str:
        """One sentence on stderr, exit code 2, nothing on stdout; returns the sentence."""
        result = self(*words)
        assert result.code == 2, result
        assert result.out == ""
        assert re.fullmatch(r"error: [^\n]{10,}\n", result.err), result.err
        assert "Traceback" not in result.err
        return result.err.removeprefix("error: ").strip()


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
