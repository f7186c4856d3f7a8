"""`chat`: the text so far, what continues it as it comes, and the commands in between."""

import sys
from collections.abc import Generator, Iterator
from contextlib import closing, suppress
from dataclasses import replace

from rich.console import COLOR_SYSTEMS, Console
from rich.style import Style

from morex.cli.results import Meter
from morex.cli.terminal import console
from morex.infer import Completion, Engine, Event, Params
from morex.infer.request import as_ids, check_params
from morex.loading import closest
from morex.model.checks import check_decodes

PALETTE = ((58, 95, 224), (125, 91, 214), (184, 75, 181), (217, 71, 111), (224, 96, 43), (217, 122, 28))
"""Blue to orange, red, green and blue from 0 to 255: ever lighter, and all readable on black and on white."""
FEW_COLOURS = ("bright_blue", "magenta", "red", "yellow")
"""The same way on a terminal of 16 colours, which are the user's own."""
SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")
MOST_IN_LEGEND = 8
CONTROLS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
"""What would move a terminal's cursor or change its colours."""
COMMANDS = {
    "/reset": "begin a new text",
    "/depth": "POLICY, as --depth; alone: leave it to the router",
    "/temperature": "X; 0 takes the likeliest token, without filters",
    "/help": "show this",
    "/quit": "leave; so does Ctrl-D",
}
HELP = """What you type is appended to the text so far as it is, spaces included, and the model goes on from there.
An empty line lets it go on; a backslash at the end of a line goes on in the next; //text is text with one slash.
Ctrl-C stops an answer."""


class Conversation:
    """A text that two write in turns. The engine has it in its cache, so that a turn computes what is new."""

    def __init__(self, engine: Engine, params: Params) -> None:
        """Args:
        engine: with a tokenizer.
        params: of every turn; turn i draws from (seed, i).
        """
        self.engine, self.params = engine, params
        self.filters = {"top_k": params.top_k, "top_p": params.top_p, "min_p": params.min_p}
        self.clear()

    def clear(self) -> None:
        """Begins a new text."""
        self.tokens: list[int] = []
        self.turns = 0

    @property
    def deepest(self) -> int:
        """Recursions that a token takes at most, summed over routed groups."""
        model = self.engine.model
        groups = model.config.schedule.resolved.num_groups
        return groups * model.policy(self.params.depth, None).recursions

    def set_depth(self, depth: str | None) -> None:
        """Raises ValueError where the model cannot take it."""
        params = replace(self.params, depth=depth)
        check_decodes(self.engine.model.config, depth)
        self.engine.model.policy(depth, None)
        self._set(params)

    def set_temperature(self, temperature: float) -> None:
        """Filters, which have no effect at temperature 0, are back at the next other one. Raises ValueError."""
        filters = self.filters if temperature else dict.fromkeys(self.filters)
        self._set(replace(self.params, temperature=temperature, **filters))

    def _set(self, params: Params) -> None:
        check_params(params, self.engine.model.config.vocab_size, self.engine.tokenizer)
        self.params = params

    def turn(self, text: str) -> Generator[Event]:
        """What continues the text so far and this; what has come when the iterator is closed stays in the text.

        Raises:
            ValueError: there is nothing to continue, or no room for it; the text so far stays as it was.
        """
        vocab_size = self.engine.model.config.vocab_size
        new = as_ids(text, vocab_size, self.engine.tokenizer) if text else []
        if not self.tokens and not new:
            raise ValueError("there is no text yet that the model could go on with; give some")
        try:
            stream = self.engine.stream_request(self.tokens + new, replace(self.params, row=self.turns))
        except ValueError as error:
            raise ValueError(f"{error}; or begin a new text with /reset") from None
        self.turns += 1
        try:
            yield from stream
        finally:
            stream.close()
            assert stream.completion is not None
            self._keep(stream.completion)
        if stream.completion.error is not None:
            raise ValueError(stream.completion.error)

    def _keep(self, done: Completion) -> None:
        """The text so far, without the token that was a sign of its end."""
        if done.reason != "error":
            signs = {self.params.eos_id, *self.params.stop_ids}
            self.tokens = done.tokens[:-1] if done.new and done.new[-1] in signs else done.tokens


class Display:
    """Writes answers to stdout, and everything else to stderr."""

    def __init__(self, show_depth: bool) -> None:
        self.answers, self.said = console(), console(stderr=True)
        self.show_depth, self.deepest = show_depth, 1

    @property
    def has_colours(self) -> bool:
        return has_colours(self.answers)

    @property
    def _system(self) -> str:
        return self.answers.color_system or "standard"

    def _colour(self, depth: float) -> Style:
        return colour(depth, self.deepest, few=self._system == "standard")

    def piece(self, event: Event) -> None:
        """The text that is certain with a new token. Where a token completes text that was held back, it is all its."""
        text = event.text.translate(CONTROLS) if self.answers.is_terminal else event.text
        if not text:
            return
        if self.show_depth and event.depth is not None:
            if self.has_colours:
                text = self._colour(event.depth).render(text, color_system=COLOR_SYSTEMS[self._system])
            else:
                text += subscript(event.depth)
        self._write(text)

    def end(self) -> None:
        """An answer is over."""
        self._write("\n")

    def _write(self, text: str) -> None:
        # As it is: a console would wrap lines and expand tabs.
        self.answers.file.write(text)
        self.answers.file.flush()

    def legend(self) -> None:
        """Which colour is which depth."""
        if self.has_colours:
            step = -(-self.deepest // MOST_IN_LEGEND)
            shown = sorted({*range(0, self.deepest, step), self.deepest})
            self.said.print("depth", *(f"[{self._colour(depth)}]{depth}[/]" for depth in shown))
        else:
            self.say(f"behind each token stands its depth, 0 to {self.deepest}")

    def say(self, text: str, style: str | None = "dim") -> None:
        self.said.print(text, style=style, markup=False, soft_wrap=True)


class Chat:
    """Turns and commands, line by line."""

    def __init__(self, conversation: Conversation, display: Display, is_interactive: bool) -> None:
        self.conversation, self.display, self.is_interactive = conversation, display, is_interactive
        self.session = Meter()
        """Of all turns."""
        self.failed = 0
        """Turns and commands that were refused."""

    def run(self, lines: Iterator[str] | None = None) -> None:
        """Until /quit, or until there are no more lines; default: those of stdin."""
        if self.is_interactive:
            self.display.say("The model continues the text that you begin. /help lists the commands; Ctrl-D leaves.")
        self._show_legend()
        for line in lines or (typed() if self.is_interactive else piped()):
            if line.strip() == "/quit":
                return
            try:
                if line.startswith("/") and not line.startswith("//"):
                    self._command(line)
                else:
                    self._turn(line[1:] if line.startswith("//") else line)
            except ValueError as error:
                self.failed += 1
                self.display.say(f"error: {error}", style=None)

    def _show_legend(self) -> None:
        if self.display.show_depth:
            self.display.deepest = self.conversation.deepest
            self.display.legend()

    def _command(self, line: str) -> None:
        name, _, argument = line.strip().partition(" ")
        argument = argument.strip()
        if name == "/reset":
            self.conversation.clear()
        elif name == "/depth":
            self.conversation.set_depth(argument or None)
            self._show_legend()
        elif name == "/temperature":
            try:
                temperature = float(argument)
            except ValueError:
                raise ValueError(f"temperature '{argument}' must be a number, such as 0.8") from None
            self.conversation.set_temperature(temperature)
        elif name == "/help":
            self.display.say("\n".join([HELP, *(f"  {name:14}{what}" for name, what in COMMANDS.items())]), style=None)
        else:
            raise ValueError(f"there is no command '{name}'{closest(name, COMMANDS)}; //text is text with one slash")

    def _turn(self, text: str) -> None:
        meter = Meter()
        with closing(self.conversation.turn(text)) as events:
            try:
                for event in events:
                    meter.note(event)
                    self.session.note(event)
                    self.display.piece(event)
            except KeyboardInterrupt:
                if not self.is_interactive:
                    raise
            finally:
                if meter.tokens:
                    self.display.end()
        if self.display.show_depth:
            self._show_rates(meter)

    def _show_rates(self, meter: Meter) -> None:
        mean, so_far = meter.mean_depth, self.session.mean_depth
        depth = "" if mean is None else f"mean depth {mean:.2f} of {self.display.deepest}, {so_far:.2f} so far; "
        self.display.say(f"{depth}{meter.tokens} tokens, {meter.speed}")


def colour(depth: float, deepest: int, few: bool = False) -> Style:
    """Of a token, on the way from the first to the last colour of a palette."""
    share = min(max(depth / max(deepest, 1), 0), 1)
    if few:
        return Style.parse(FEW_COLOURS[round(share * (len(FEW_COLOURS) - 1))])
    place = share * (len(PALETTE) - 1)
    low = min(int(place), len(PALETTE) - 2)
    mixed = [round(a + (b - a) * (place - low)) for a, b in zip(PALETTE[low], PALETTE[low + 1], strict=True)]
    return Style.parse(f"rgb({mixed[0]},{mixed[1]},{mixed[2]})")


def subscript(depth: float) -> str:
    """A depth as a small number."""
    return f"{depth:.3g}".translate(SUBSCRIPTS)


def has_colours(screen: Console) -> bool:
    """Whether colours are seen: on a terminal that has some, unless the user asked for none (NO_COLOR)."""
    return screen.is_terminal and screen.color_system is not None and not screen.no_color


def is_interactive() -> bool:
    """Whether somebody types and reads."""
    return all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))


def typed() -> Iterator[str]:
    """Turns from a terminal, until Ctrl-D."""
    with suppress(ImportError):
        import readline  # noqa: F401  # lets input() edit lines and go back to earlier ones
    lines: list[str] = []
    while True:
        try:
            line = input(". " if lines else "> ")
        except KeyboardInterrupt:
            lines = []
            print()
            continue
        except EOFError:
            print()
            return
        lines.append(line.removesuffix("\\"))
        if not line.endswith("\\"):
            yield "\n".join(lines)
            lines = []


def piped() -> Iterator[str]:
    """Turns from stdin, one a line; what is no UTF-8 is refused with its turn."""
    for line in () if sys.stdin is None else sys.stdin.buffer:
        yield line.decode("utf-8", errors="surrogateescape").rstrip("\r\n")
