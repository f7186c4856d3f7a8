"""`data`: what a config trains on, described, prepared and checked."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from morex.cli.app import AsJson, ConfigSource, Overrides, app, examples
from morex.cli.terminal import number, print_json, print_table
from morex.loading import load_config

if TYPE_CHECKING:
    from morex.sections.train import TrainConfig

SHOWN_CHARACTERS = 90
"""Of a task's question; longer ones lose their middle."""
MEGABYTE = 1 << 20


class _Describes(TyperGroup):
    """A group whose first word may also be a config, which is then described."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or (args[0] not in self.commands and args[0] != "--help"):
            args = ["describe", *args]
        return super().parse_args(ctx, args)


data = typer.Typer(
    cls=_Describes,
    help="Describe, prepare and check what a config trains on.\n\n`morex data CONFIG` is `morex data describe CONFIG`.",
    short_help="Describe, prepare and check what a config trains on.",
    epilog=examples(
        "morex data vanilla",
        "morex data vanilla --set data.corpus=book.txt --set data.tokenizer.kind=byte",
        "morex data vanilla --set data.task.kind=addition",
        "morex data prepare vanilla --set data.corpus=books --out shards/books",
        "morex data check shards/books",
    ),
    rich_markup_mode=None,
)
app.add_typer(data, name="data")


@data.command(
    epilog=examples(
        "morex data describe vanilla",
        "morex data describe more --set data.val_fraction=0.05 --json",
        "morex data describe vanilla --set data.corpus=shards/books",
    )
)
def describe(config: ConfigSource, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Prepare the corpus or the task of a config and describe it.

    Documents, bytes and tokens on both sides of the split, and how often training sees the text; of a task examples,
    difficulties and lengths. Prepared tokens are kept in the cache folder ($MOREX_CACHE, default ~/.cache/morex), where
    training finds them.
    """
    settings = load_config(config, overrides or [])
    from morex.data.inspect import describe, describe_task

    if settings.data.task is not None:
        task = describe_task(settings)
        print_json(task) if as_json else _print_task(task, settings.train)
        return

    description = describe(settings.data, settings.model.vocab_size, settings.train.seq_len)
    seen = _tokens_seen(settings.train)
    description["epochs"] = seen / description["train"]["tokens"]
    for member in description["mixture"]:
        member["epochs"] = member["share"] * seen / member["tokens"]
    if as_json:
        print_json(description)
        return
    _print_description(description, settings.train)


@data.command(
    epilog=examples(
        "morex data prepare vanilla --set data.corpus=books --out shards/books",
        "morex data prepare vanilla --set 'data.corpus=hf:roneneldan/TinyStories' --out shards/stories --workers 16",
    )
)
def prepare(
    config: ConfigSource,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder of the shards.", show_default=False)],
    overrides: Overrides = None,
    workers: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Processes that encode; default: one for each core.")
    ] = None,
    shard_size: Annotated[int, typer.Option(min=1, metavar="MIB", help="Mebibytes of a shard.")] = 256,
    as_json: AsJson = False,
) -> None:
    """Bring a corpus into a folder of token shards, to train on as data.corpus.

    The same command goes on behind the last finished shard if it was ended. The files do not depend on the number of
    processes.
    """
    settings = load_config(config, overrides or [])
    from morex.data.prepare import prepare_folder

    written = prepare_folder(settings.data, settings.model.vocab_size, out, workers or _cores(), shard_size * MEGABYTE)
    _print_shards(written.folder, written.index.summary() | {"kept": written.kept}, as_json)


@data.command(epilog=examples("morex data check shards/books", "morex data check shards/books --json"))
def check(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder of token shards.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Read a folder of token shards and compare each with its checksum."""
    from morex.data.shards import check_shards

    _print_shards(folder, check_shards(folder, f"folder '{folder}'").summary(), as_json)


def _cores() -> int:
    """Cores that this process may use."""
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _print_shards(folder: Path, summary: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        print_json({"folder": str(folder), **summary})
        return
    sides = {"training": summary["train"], "held out": summary["val"]}
    columns = ("shards", "documents", "bytes", "tokens")
    rows = [[name, *(number(side[column]) for column in columns)] for name, side in sides.items()]
    print_table([str(folder), *columns], rows)
    if summary.get("kept"):
        print(f"Found finished and whole: {summary['kept']:,} shards.")
    print(f"Train on it with --set data.corpus={folder}")


def _tokens_seen(train: "TrainConfig") -> int:
    return train.steps * train.batch_size * train.seq_len


def _print_task(task: Mapping[str, Any], train: "TrainConfig") -> None:
    for example in task["examples"]:
        question = " ".join(example["question"].split())
        if len(question) > SHOWN_CHARACTERS:
            question = f"{question[: SHOWN_CHARACTERS // 2]} … {question[-SHOWN_CHARACTERS // 2 :]}"
        print(f"difficulty {example['difficulty']:>2}: {question} {' '.join(example['answer'].split())}")
    tokenizer, sides = task["tokenizer"], {"training": task["train"], "held-out": task["val"]}
    print(f"Task: {task['task']}. Tokenizer: {tokenizer['kind']}, {tokenizer['vocab_size']:,} ids.")
    for name, side in sides.items():
        number = "no end" if side["examples"] is None else f"{side['examples']:,}"
        print(
            f"{name.capitalize()} examples: {number}, difficulty {side['easiest']} to {side['hardest']}, "
            f"{side['mean_tokens']:.1f} tokens on average, {side['most_tokens']} at most."
        )
    if task["answers"]:
        shares = ", ".join(f"{answer} {share:.1%}" for answer, share in task["answers"].items())
        print(f"Answers: {shares}.")
    if task["shortened"]:
        print(f"Examples shortened at the beginning to fit {train.seq_len} tokens: {task['shortened']:,}.")


def _print_description(description: Mapping[str, Any], train: "TrainConfig") -> None:
    sides = {"training": description["train"], "held out": description["val"], "all": description}
    columns = {
        "documents": "documents",
        "bytes": "bytes",
        "tokens": "tokens",
        "bytes_per_token": "bytes/token",
        "windows": f"windows of {train.seq_len}",
    }
    rows = [[name, *(number(side[key]) if key in side else "" for key in columns)] for name, side in sides.items()]
    print_table([str(description["corpus"]), *columns.values()], rows)
    tokenizer = description["tokenizer"]
    print(f"Tokenizer: {tokenizer['kind']}, {tokenizer['vocab_size']:,} ids.")
    print(f"Split: by {description['split']}.")
    if description["left_out"]:
        print(f"Left out of training: {description['left_out']:,} documents that are held out.")
    print(
        f"Training: {train.steps:,} steps of {train.batch_size} x {train.seq_len} tokens see the training text "
        f"{description['epochs']:.2f} times."
    )
    for member in description["mixture"]:
        print(
            f"Member {member['corpus']}: {member['share']:.2%} of the windows, {member['tokens']:,} tokens, seen "
            f"{member['epochs']:.2f} times."
        )
    if description["folder"] is not None:
        print(f"Token shards: {description['folder']}")
    print(f"The text begins: {' '.join(description['sample'].split())}")
