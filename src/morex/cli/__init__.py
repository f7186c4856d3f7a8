"""The command line. Commands import what they need when they run, so that `morex --help` answers at once.

A fault of the user's becomes one sentence on stderr and exit code 2; `--debug` shows the traceback instead. Results go
to stdout, progress and hints to stderr, so that `--json` can be piped.
"""

import os
import re
import sys
import time
import warnings
from collections.abc import Sequence
from typing import Any

from morex.cli import analysis, corpora, decoding, folders, generation, listing, run, scaling, studies
from morex.cli.app import Settings, app
from morex.loading import closest, places
from morex.train.errors import Interrupted, TrainingError

__all__ = ["app", "main"]
COMMANDS = (listing, corpora, run, folders, generation, analysis, studies, decoding, scaling)
"""Importing these modules adds their commands to the application, in this order."""
FIRST_SPEAKS = 5
"""Seconds in which the first of several ranks says what went wrong."""
INTERRUPTED = 130
"""Exit code after Ctrl-C."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code.

    Args:
        arguments: the words after `morex`; default: those of the process.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if "--debug" in words:  # it belongs before the command, but people add it to the end of the line that failed
        words = ["--debug", *(word for word in words if word != "--debug")]
    settings = Settings(words=tuple(words))
    _open_closed_streams()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            code = app(words, prog_name="morex", standalone_mode=False, obj=settings)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED, stopped=True)
    except Exception as error:
        if settings.debug or not _is_user_fault(error):
            raise
        code = getattr(error, "exit_code", 2)
        if getattr(error, "said_by_first", False):
            time.sleep(FIRST_SPEAKS)  # whoever started the ranks ends all as soon as one has failed
            return int(code)
        return _fail(_sentence(error), code, stopped=isinstance(error, Interrupted))
    if code == INTERRUPTED:  # typer turns Ctrl-C into an exit code
        return _fail("interrupted", code, stopped=True)
    return code if isinstance(code, int) else 0


def _open_closed_streams() -> None:
    """`>&-` leaves no stream to write to; what would go there goes nowhere."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115


def _is_user_fault(error: Exception) -> bool:
    """Whether an error is the user's: a bad value, file or command line, or an extra that is not installed."""
    if isinstance(error, ImportError):
        return error.name is None  # raised by us with a sentence; Python's own name the module
    # Faults in the command line itself have click's class, or that of typer's own copy of click, by typer's version.
    return isinstance(error, (ValueError, OSError, TrainingError)) or hasattr(error, "format_message")


def _sentence(error: Exception) -> str:
    """One sentence on one line."""
    if hasattr(error, "format_message"):
        text = _usage(error)
    elif isinstance(error, OSError) and error.strerror and error.filename:
        text = f"'{error.filename}': {error.strerror.lower()}"
    else:
        text = str(error) or type(error).__name__
    return " ".join(text.split())


def _usage(error: Any) -> str:
    """A fault in the command line itself, and what would work: the commands there are, or the key of the config."""
    message = str(error.format_message())
    option, command = getattr(error, "option_name", None), getattr(getattr(error, "ctx", None), "command", None)
    unknown, commands = re.match(r"No such command '([^']*)'", message), getattr(command, "commands", None)
    if unknown and commands:
        return f"No such command '{unknown[1]}'{closest(unknown[1], commands)}"
    if option and any("--set" in parameter.opts for parameter in getattr(command, "params", ())):
        from morex.config import Config

        there = [f"--set {place}=VALUE" for place in places(Config, option.lstrip("-").replace("-", "_"))]
        if there:
            return f"No such option: {option}; values of the config are changed with {' or '.join(there)}"
    return message


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)


def _fail(sentence: str, code: int, stopped: bool = False) -> int:
    print(sentence if stopped else f"error: {sentence}", file=sys.stderr)
    return code
