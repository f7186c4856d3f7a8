"""What `generate` makes of its prompts: the engine continues them, and each result goes where it was asked to go."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TextIO

from morex.cli.prompts import Prompt
from morex.cli.terminal import console, print_json

if TYPE_CHECKING:
    from morex.data.encoding import Tokenizer
    from morex.infer import Completion, Engine, Event, Params


@dataclass
class Ask:
    """A prompt, ready for the engine."""

    index: int
    """Place among the prompts."""
    prompt: Prompt
    params: "Params | None" = None
    tokens: list[int] = field(default_factory=list)
    recursions: int = 0
    """That its tokens take at most."""
    error: str | None = None
    """Why it is refused, in one sentence."""

    @property
    def longest(self) -> int:
        """Tokens at last."""
        return len(self.tokens) + (0 if self.params is None else self.params.max_new_tokens)

    @property
    def texts(self) -> list[tuple[int, int]]:
        """Tokens of its text at last, and those of a draft beside it, with the recursions of each."""
        found = [(self.longest, self.recursions)]
        if self.params is not None and self.params.draft is not None:
            found.append((self.params.draft, self.params.draft_depth))
        return found


@dataclass
class Result:
    """What has become of one prompt."""

    ask: Ask
    error: str | None
    completion: "Completion | None" = None
    depths: list[float | None] = field(default_factory=list)
    """Of each new token, the recursions of the pass that it came from; None where they are not known."""

    def record(self, tokenizer: "Tokenizer") -> dict[str, Any]:
        """What `--json` and `--out` write of it."""
        found: dict[str, Any] = {"prompt": self.ask.prompt.text}
        done, params = self.completion, self.ask.params
        if done is not None and params is not None:
            found |= {"text": self.text(tokenizer), "new_text": done.text, "new_tokens": len(done.new)}
            found["reason"] = done.reason
            if params.draft is not None:
                found |= {"drafted": done.drafted, "accepted": done.accepted}
            if params.logprobs is not None or params.trace:
                found["tokens"] = self._tokens(done, tokenizer)
            if params.trace:
                found["trace"] = done.trace
        if self.error is not None:
            found["error"] = self.error
        return dict(plain(found))

    def text(self, tokenizer: "Tokenizer") -> str:
        """The prompt and its continuation."""
        assert self.completion is not None
        return tokenizer.decode(self.completion.prompt) + self.completion.text

    def _tokens(self, done: "Completion", tokenizer: "Tokenizer") -> list[dict[str, Any]]:
        """Every new token, and what was asked about it."""
        found: list[dict[str, Any]] = [{"id": token, "text": tokenizer.decode([token])} for token in done.new]
        for own, logprobs in zip(found, done.logprobs or [], strict=False):
            own["logprob"] = logprobs.token
            own["likeliest"] = [
                {"id": token, "text": tokenizer.decode([token]), "logprob": value}
                for token, value in logprobs.likeliest
            ]
        for own, depth in zip(found, self.depths, strict=False):
            if depth is not None:
                own["depth"] = depth
        return found


class Meter:
    """How fast new tokens come, and how deep they go."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.tokens = self.depths = 0
        self.depth = 0.0
        """Sum of the depths that are known, which are so many."""

    def note(self, event: "Event") -> None:
        """Counts the new token of an event, if it has one."""
        self.tokens += event.token is not None
        if event.depth is not None:
            self.depths += 1
            self.depth += event.depth

    @property
    def mean_depth(self) -> float | None:
        """None where it is not known."""
        return self.depth / self.depths if self.depths else None

    @property
    def speed(self) -> str:
        """New tokens a second."""
        return f"{self.tokens / max(time.perf_counter() - self.started, 1e-9):,.0f} tokens/s"

    def __str__(self) -> str:
        return self.speed if self.mean_depth is None else f"{self.speed}, mean depth {self.mean_depth:.2f}"


class Batch:
    """Prompts on their way through an engine; what becomes of one concerns no other."""

    def __init__(self, engine: "Engine", asks: Sequence[Ask], ahead: int) -> None:
        """Args:
        ahead: prompts that the engine knows at a time.
        """
        self.engine, self.asks, self.ahead = engine, asks, ahead
        self.meter = Meter()
        self.failed = self.done = 0

    def results(self, tick: Callable[[], None]) -> Iterator[Result]:
        """Each result as soon as it is there; `tick` is called after every step of the engine."""
        waiting, going = iter(self.asks), dict[int, Result]()
        while True:
            while len(going) < self.ahead and (ask := next(waiting, None)) is not None:
                result = Result(ask, ask.error)
                if ask.error is None:
                    try:
                        going[self.engine.add(ask.tokens, ask.params)] = result
                    except ValueError as error:
                        result.error = str(error)
                if result.error is not None:
                    yield self._count(result)
            if not going:
                return
            for event in self.engine.step():
                self.meter.note(event)
                if event.token is not None:
                    going[event.number].depths.append(event.depth)
                if event.reason is not None:
                    result = going.pop(event.number)
                    result.completion = self.engine.take(event.number)
                    result.error = result.completion.error
                    yield self._count(result)
            tick()

    def _count(self, result: Result) -> Result:
        self.done += 1
        self.failed += result.error is not None
        return result


class Sinks:
    """Where results go: a file, JSON on stdout, or else their texts on stdout."""

    def __init__(self, tokenizer: "Tokenizer", out: Path | None, as_json: bool) -> None:
        self.tokenizer, self.as_json = tokenizer, as_json
        self.file: TextIO | None = None
        if out is not None:
            # Half a character, which a terminal may have sent, becomes its JSON escape.
            self.file = out.open("w", encoding="utf-8", errors="backslashreplace")
        self.prints = out is None and not as_json
        self.records: dict[int, dict[str, Any]] = {}
        self.texts: dict[int, str | None] = {}
        """Of those whose turn has not come."""
        self.printed = self.next = 0

    def take(self, result: Result) -> None:
        """Writes a result; a text waits for those before it."""
        ask = result.ask
        record = result.record(self.tokenizer)
        if self.file is not None:
            print(json.dumps({"index": ask.index, **record}, ensure_ascii=False), file=self.file, flush=True)
        if self.as_json:
            self.records[ask.index] = record
        if self.prints:
            self.texts[ask.index] = result.text(self.tokenizer) if result.error is None else None
            if result.error is not None:
                console(stderr=True).print(f"error: prompt {ask.index}: {result.error}", markup=False, soft_wrap=True)
            while self.next in self.texts:
                self._print(self.texts.pop(self.next))
                self.next += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self.file is not None:
            self.file.close()

    def finish(self) -> None:
        """All results are there."""
        if self.as_json:
            print_json([self.records[index] for index in sorted(self.records)])

    def _print(self, text: str | None) -> None:
        if text is not None:
            print(f"\n{text}" if self.printed else text, flush=True)
            self.printed += 1


class BatchProgress:
    """A bar on stderr, on a terminal only and not where the texts go to the same one."""

    def __init__(self, batch: Batch, shows: bool) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.batch = batch
        detail = TextColumn("[dim]{task.fields[meter]}")
        self.bar = Progress(
            TextColumn("prompts"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            detail,
            TextColumn("left"),
            TimeRemainingColumn(),
            console=(screen := console(stderr=True)),
            transient=True,
            redirect_stdout=False,
            disable=not (shows and screen.is_terminal),
            refresh_per_second=4,
        )
        self.task = self.bar.add_task("", total=len(batch.asks), meter="")

    def tick(self) -> None:
        self.bar.update(self.task, completed=self.batch.done, meter=str(self.batch.meter))

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()


def plain(content: Any) -> Any:
    """A copy of plain data and of what holds such, for JSON: numbers that it cannot write become None."""
    if is_dataclass(content) and not isinstance(content, type):
        content = asdict(content)
    if isinstance(content, dict):
        return {str(key): plain(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [plain(value) for value in content]
    if hasattr(content, "tolist"):
        return plain(content.tolist())
    return None if isinstance(content, float) and not isfinite(content) else content
