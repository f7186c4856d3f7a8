"""What the tests of the documentation share: the code blocks of a page, and running them at tiny sizes."""

import json
import re
import shlex
import subprocess
import tomllib
from dataclasses import dataclass
from io import BytesIO, TextIOWrapper
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

from morex.cli import main
from morex.config import Config
from morex.loading import load_config
from morex.sections.tasks import GeneratedTaskConfig
from morex.study.plan import plan
from morex.study.spec import load_study

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r'^```(?P<language>\w+)(?: title="(?P<title>[^"]+)")?\n(?P<text>.*?)^```$', re.M | re.S)
TABLE = re.compile(r"(?:^\|.*\|\n)+", re.M)
CORPUS = "corpus.txt"
TYPED = b"the people\n"
"""What a conversation of a page begins with."""
OWN_TEXT = "my-text.txt"
"""What pages call a text of the reader's."""
TINY_TRAINING = {
    "data.corpus": CORPUS,
    "data.val_fraction": "0.1",
    "data.tokenizer.vocab_size": "null",
    "train.steps": "3",
    "train.batch_size": "4",
    "train.accumulation": "1",
    "train.seq_len": "32",
    "train.warmup_steps": "1",
    "train.threads": "1",
    "train.device": "cpu",
}
# A generated task says how long its examples are and how many ids they need.
TINY_TASK = [
    "data.task.held_out=20", "train.steps=2", "train.batch_size=4", "train.threads=1", "train.device=cpu",
    "model.d_model=32",
]  # fmt: skip
TINY_STUDY = [
    "budget={kind: steps, value: 2}",
    "seeds=[0]",
    "sample={max_new_tokens: 4}",
    "report={decode_tokens: 4, map_tokens: 8, trace_windows: 2, reference: null}",
]
TINY_VARIANTS = ["variants=[{name: mor-expert}, {name: dense, twin_of: mor-expert, twin: equal_depth}]"]
TINY_MODEL = ["model.d_model=32", "model.vocab_size=512"]
TINY_BENCH = ["--steps", "1", "--rounds", "1", "--batch-size", "2", "--seq-len", "16", "--no-memory"]


@dataclass(frozen=True)
class CodeBlock:
    """A fenced block: its language, its title where it has one, its text."""

    language: str
    title: str | None
    text: str

    @property
    def commands(self) -> list[list[str]]:
        """The words of each command of a console block; a backslash at the end of a line joins it with the next."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [shlex.split(line.removeprefix("$ "), comments=True) for line in lines if line.startswith("$ ")]


@dataclass(frozen=True)
class Table:
    """A table: its heading and its rows, as the texts of their cells."""

    heading: list[str]
    rows: list[list[str]]


def code_blocks(page: Path) -> list[CodeBlock]:
    """The fenced blocks of a Markdown page, in order."""
    text = page.read_text(encoding="utf-8")
    assert len(BLOCK.findall(text)) * 2 == len(re.findall(r"^```", text, re.M)), f"{page} has a fence that is not read"
    return [CodeBlock(found["language"], found["title"], found["text"]) for found in BLOCK.finditer(text)]


def blocks_and_tables(text: str) -> list[CodeBlock | Table]:
    """The fenced blocks and the tables of a Markdown text, in order."""
    found: dict[int, CodeBlock | Table] = {
        match.start(): CodeBlock(match["language"], match["title"], match["text"]) for match in BLOCK.finditer(text)
    }
    for match in TABLE.finditer(text):
        heading, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in match[0].splitlines())
        found[match.start()] = Table(heading, rows)
    return [part for _, part in sorted(found.items())]


def apply_diff(path: Path, diff: str) -> None:
    """Applies one hunk: its lines that stay or go must stand in the file exactly once."""
    before = "".join(line[1:] + "\n" for line in diff.splitlines() if line[:1] in (" ", "-"))
    after = "".join(line[1:] + "\n" for line in diff.splitlines() if line[:1] in (" ", "+"))
    text = path.read_text(encoding="utf-8")
    assert text.count(before) == 1, f"{path} does not have these lines once:\n{before}"
    path.write_text(text.replace(before, after), encoding="utf-8")


def write_corpus(folder: Path, *others: str) -> None:
    """A small text with some repetition, as CORPUS and under other names in `folder`."""
    words = re.findall(
        r"\w+", "the river rose in the night and the people of the town met in congress to speak of peace"
    )
    lines = [" ".join(words[(i * step) % len(words)] for i in range(12)) for step in range(1, 12)] * 25
    for name in (CORPUS, *others):
        (folder / name).write_text(".\n".join(lines) + ".\n", encoding="utf-8")


def run_page(page: Path, folder: Path) -> list[str]:
    """Runs every block of a page in order, in `folder`, the current one; returns the commands that ran.

    Console commands of `morex` run at tiny sizes, others dry: what `make` would do, whether an extra exists. YAML with
    a title becomes a file, and must be a valid config, or a study that can be planned; so do JSON lines. Python runs as
    it is.
    """
    write_corpus(folder, OWN_TEXT)
    return [command for block in code_blocks(page) for command in run_block(block, folder, str(page))]


def run_block(block: CodeBlock, folder: Path, origin: str) -> list[str]:
    """Runs one block of a page, as `run_page` does; returns the commands that ran."""
    match block.language:
        case "console":
            assert block.commands, f"{origin} has a console block without a command: {block.text}"
            for command in block.commands:
                run_command(command)
            return [shlex.join(command) for command in block.commands]
        case "python":
            exec(compile(block.text, origin, "exec"), {"__name__": Path(origin).stem})
        case "json":
            assert block.title and all(isinstance(json.loads(line), dict) for line in block.text.splitlines())
            (folder / block.title).write_text(block.text, encoding="utf-8")
        case "yaml":
            assert block.title, f"{origin} has a YAML block without a title"
            (folder / block.title).write_text(block.text, encoding="utf-8")
            if "variants:" in block.text:
                assert plan(load_study(block.title)).cells
            else:
                assert load_config(block.title)
        case other:
            raise AssertionError(f"{origin} has a block of {other}, which nothing runs")
    return []


def run_command(words: list[str]) -> None:
    """Runs one command of a page; asserts that it ends well."""
    match words:
        case ["make", *targets]:
            done = subprocess.run(["make", "--dry-run", *targets], cwd=ROOT, capture_output=True, text=True, check=True)
            assert done.stdout.strip()
        case [_, "-m", "venv", _]:
            pass  # the standard library's; nothing of ours
        case [pip, "install", *arguments] if pip.endswith("pip"):
            project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
            extras = re.findall(r"\.\[(\w+)\]", " ".join(arguments))
            assert extras and set(extras) <= set(project["optional-dependencies"])
            assert (ROOT / arguments[arguments.index("--constraint") + 1]).is_file()
        case ["morex", *arguments]:
            with patch("sys.stdin", TextIOWrapper(BytesIO(TYPED))):
                assert main(shrunk(arguments)) == 0, shlex.join(words)
        case _:
            raise AssertionError(f"nothing runs {shlex.join(words)}")


def shrunk(words: list[str]) -> list[str]:
    """A command line of `morex` with a tiny model, text and budget, its own choices otherwise kept."""
    own_corpus = any(word.startswith("data.corpus=") for word in words)
    training = {key: value for key, value in TINY_TRAINING.items() if not (own_corpus and key == "data.corpus")}
    changes = [f"{key}={value}" for key, value in training.items()]
    match words:
        case ["train", source, *rest] if "--resume" not in words:
            own = [change for option, change in pairwise(rest) if option == "--set"]
            changes = TINY_TASK if on_generated_task(load_config(source, own)) else [*changes, *TINY_MODEL]
        case ["data", "prepare", *_]:
            changes = ["data.tokenizer.vocab_size=400"]
        case ["data", "check", *_]:
            return words
        case ["data", source, *_] if on_generated_task(load_config(source)):
            changes = TINY_TASK
        case ["data", *_]:
            pass
        case ["compare", source, *_]:
            study = load_study(source)
            if on_generated_task(plan(study).cells[0].config):
                *others, last = study.to_dict()["variants"]
                pair = [*(other for other in others if other["name"] == last["twin_of"]), last]
                changes = [*TINY_STUDY, f"variants={json.dumps(pair)}", *TINY_TASK]
            else:
                changes = [*TINY_STUDY, *TINY_VARIANTS, *changes, *TINY_MODEL]
        case ["bench", "train", *_]:
            return [*words, *TINY_BENCH]
        case _:
            return words
    return [*words, *(word for change in changes for word in ("--set", change))]


def on_generated_task(config: Config) -> bool:
    """Whether a config trains on a task that is made up, and not read."""
    return isinstance(config.data.task, GeneratedTaskConfig)
