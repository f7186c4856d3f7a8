"""Waits for an address to answer, without the stack traces that torch's own waiting prints."""

import socket
import time

ONE_TRY = 2.0
"""Seconds that one connection may take."""
PAUSE = 0.2
"""Seconds between two tries."""


def answers(host: str, port: int, seconds: float) -> bool:
    """Whether something takes connections there within so many seconds."""
    end = time.monotonic() + seconds
    while True:
        try:
            with socket.create_connection((host, port), timeout=ONE_TRY):
                return True
        except (OSError, OverflowError):
            if time.monotonic() > end:
                return False
        time.sleep(PAUSE)
