"""One request seen by itself, beside whatever else the engine does."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Self

from morex.infer.request import Completion, Event

if TYPE_CHECKING:
    from morex.infer.engine import Engine


class RequestStream(Iterator[Event]):
    """The events of one request, up to its end. To close it, or to let go of it, cancels the request."""

    def __init__(self, engine: "Engine", number: int) -> None:
        self.engine, self.number = engine, number
        self.completion: Completion | None = None
        """What has become of the request, once it has ended or the stream is closed."""

    def __next__(self) -> Event:
        if self.completion is not None:
            raise StopIteration
        event = self.engine.next_event(self.number)
        if event.reason is not None:
            self.completion = self.engine.take(self.number)
        return event

    def close(self) -> None:
        """Cancels the request, if it goes on."""
        if self.completion is None:
            self.engine.cancel(self.number)
            self.completion = self.engine.take(self.number)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        # Perhaps in the middle of a step, so the engine only takes note of it.
        if self.completion is None:
            self.engine.forget(self.number)
