"""Signals: the first is noted and said, the second stops at once; handlers come back."""

import io
import signal
import threading

import pytest
from rich.console import Console

from morex.train.interrupt import stop_on_signals


class Interrupting(io.StringIO):
    """Sends SIGINT while the first text is being written, and notes which thread wrote what."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[tuple[threading.Thread, str]] = []

    def write(self, text: str) -> int:
        if not self.written:
            signal.raise_signal(signal.SIGINT)
        self.written.append((threading.current_thread(), text))
        return super().write(text)


def test_a_signal_amid_printing_disturbs_neither_what_is_printed_nor_the_message() -> None:
    file = Interrupting()
    console = Console(file=file, width=120)
    with stop_on_signals(console) as stop:
        assert not stop.asked
        console.print("step 3: held-out loss 4.9")
        assert stop.signal_number == signal.SIGINT
    assert file.getvalue() == (
        "step 3: held-out loss 4.9\nstopping after this step, to save; once more stops at once without saving\n"
    )
    assert file.written[0][0] is threading.main_thread()
    assert file.written[-1][0] is not threading.main_thread()


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_stops_at_once(second: signal.Signals) -> None:
    with pytest.raises(KeyboardInterrupt), stop_on_signals(Console(file=io.StringIO())) as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.signal_number == signal.SIGTERM
        signal.raise_signal(second)


def test_former_handlers_come_back_and_nothing_listens_on() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    threads = threading.active_count()
    with stop_on_signals(Console(file=io.StringIO())):
        assert signal.getsignal(signal.SIGINT) is not before[signal.SIGINT]
    assert {number: signal.getsignal(number) for number in before} == before
    assert threading.active_count() == threads


def test_outside_the_main_thread_nothing_is_asked_and_nothing_fails() -> None:
    asked: list[bool] = []

    def body() -> None:
        with stop_on_signals(Console(file=io.StringIO())) as stop:
            asked.append(stop.asked)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert asked == [False]
