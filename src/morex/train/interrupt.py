"""Ctrl-C and SIGTERM: the first asks for a stop after the step in hand, the second stops at once."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from types import FrameType

from rich.console import Console


@dataclass
class StopRequest:
    """Set by the first signal; the training loop looks at it after every step."""

    signal_number: int | None = None

    @property
    def asked(self) -> bool:
        return self.signal_number is not None


@contextmanager
def stop_on_signals(console: Console) -> Iterator[StopRequest]:
    """Listens inside the block and puts the former handlers back after it. Outside the main thread it cannot listen."""
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    # A handler runs between any two instructions of the main thread, also of one that is printing or importing what to
    # print with, so another thread says what was heard. Of the queues only this one may be filled from a handler.
    heard: SimpleQueue[str | None] = SimpleQueue()

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.asked:
            raise KeyboardInterrupt
        stop.signal_number = number
        heard.put("stopping after this step, to save; once more stops at once without saving")

    def say() -> None:
        while (text := heard.get()) is not None:
            console.print(text, style="yellow")

    speaker = threading.Thread(target=say, daemon=True)
    speaker.start()
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        heard.put(None)
        speaker.join()
