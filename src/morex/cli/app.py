"""The application: its root, the options that commands share, and how examples stand in a help page."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer


def examples(*lines: str) -> str:
    """An epilogue of examples that is shown line by line."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


app = typer.Typer(
    help="Language models with adaptive depth: train them, compare them with their dense twins, generate.",
    epilog=examples(
        "morex presets", "morex train mor-expert --out runs/first", "morex compare demo --out studies/demo"
    ),
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)
bench = typer.Typer(
    help="Measure speed and memory on this machine.",
    epilog=examples(
        "morex bench train more mor-expert --json speed.json",
        "morex bench decode mor-expert",
        "morex bench kv mor-expert",
    ),
    rich_markup_mode=None,
)
app.add_typer(bench, name="bench")


ConfigSource = Annotated[
    str, typer.Argument(metavar="CONFIG", help="A preset's name, or the path of a YAML file.", show_default=False)
]
RunFolder = Annotated[
    Path, typer.Argument(metavar="RUN", help="A run folder, or one of its checkpoint folders.", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=VALUE", help="Change one value of the config; may be repeated."),
]
Tiny = Annotated[
    bool, typer.Option("--tiny", help="Shrink the model to width 32 and vocabulary 512, for a quick trial.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Depth = Annotated[
    str | None,
    typer.Option(
        "--depth",
        metavar="POLICY",
        help="Depth at call time: a number of recursions, uniform:N, adaptive[:SPAN], progressive[:SPAN] or "
        "exit[:RULE][:THRESHOLD]; for the examples of a task also difficulty.",
    ),
]
Device = Annotated[str, typer.Option(metavar="NAME", help="auto, cpu, cuda or cuda:N.")]


@dataclass
class Settings:
    """What holds for every command."""

    debug: bool = False
    words: tuple[str, ...] = ()
    """The command line."""


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    context.obj.debug = debug
    if version:
        from morex import __version__

        typer.echo(f"morex {__version__}")
        raise typer.Exit()
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@bench.callback(invoke_without_command=True)
def bench_root(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
