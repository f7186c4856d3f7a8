"""What `generate` is asked to continue: texts of the command line, and files of prompts with options of their own."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from morex.loading import ConfigError, closest

OPTIONS = (
    "max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "stop", "stop_ids",
    "logprobs", "depth", "draft", "draft_depth",
)  # fmt: skip
"""What a line of a JSONL file may say beside its prompt, in the words of `Params`."""
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
MOST_DIGITS = 18
"""Of a whole number that fits into 64 bits."""


@dataclass(frozen=True)
class Prompt:
    """One prompt."""

    text: Any
    """As it stands in the file; whether it is one is for the engine to say."""
    options: dict[str, Any] = field(default_factory=dict)
    """Its own, which override those of the command line."""
    error: str | None = None
    """What is wrong with its line, in one sentence."""


def all_prompts(texts: Sequence[str], file: Path | None) -> list[Prompt]:
    """Prompts of the command line, then those of the file; `-` is stdin. Raises ConfigError where there are none."""
    found = [*map(Prompt, texts), *(_read(file) if file else [])]
    if not found:
        raise ConfigError("there is nothing to continue: give --prompt TEXT, or --prompts FILE with one prompt a line")
    return found


def _read(path: Path) -> list[Prompt]:
    """Prompts of a file; empty lines are left out."""
    is_stdin = str(path) == "-"
    content = _stdin() if is_stdin else path.read_bytes()
    numbered = enumerate(content.removeprefix(BYTE_ORDER_MARK).split(b"\n"), 1)
    lines = [(number, line.removesuffix(b"\r")) for number, line in numbered if line.strip()]
    if path.suffix.lower() == ".jsonl" or (is_stdin and lines and _parse(*lines[0]).error is None):
        return [_parse(number, line) for number, line in lines]
    try:
        return [Prompt(line.decode("utf-8")) for _, line in lines]
    except UnicodeDecodeError:
        raise ConfigError(f"prompt file '{path}' is not UTF-8 text") from None


def _stdin() -> bytes:
    return b"" if sys.stdin is None else sys.stdin.buffer.read()


def _parse(number: int, line: bytes) -> Prompt:
    """One line of a JSONL file."""
    try:
        content = json.loads(line.decode("utf-8"), parse_int=_whole_number)
    except UnicodeDecodeError:
        return Prompt(None, error=f"line {number} is not UTF-8 text")
    except (ValueError, RecursionError) as error:
        return Prompt(None, error=f"line {number} is not valid JSON: {error}")
    if not isinstance(content, dict) or "prompt" not in content:
        return Prompt(None, error=f'line {number} must be an object with a prompt, such as {{"prompt": "The river"}}')
    text = content.pop("prompt")
    for name in content:
        if name not in OPTIONS:
            return Prompt(text, error=f"line {number} has the unknown option '{name}'{closest(name, OPTIONS)}")
    if not isinstance(content.get("depth"), str | int | None):
        return Prompt(text, error=f"line {number}: depth {content['depth']} must be text or a number of recursions")
    return Prompt(text, content)


def _whole_number(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"number {digits[:MOST_DIGITS]}... has more than {MOST_DIGITS} digits")
    return int(digits)
