"""The rate limiter of a source, over all its sessions."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

_LOOK = 0.5  # seconds after which whoever waits asks again whether the client is gone


@dataclass(eq=False)
class _Turn:
    """A message that waits: when it may start, for how long it keeps others back, its next look."""

    start: float
    seconds: float
    looks: float


class RateLimiter:
    """Tells each message when it may start, first come, first served.

    Time in which nothing was sent earns no credit, so that a burst does not follow it.

    Args:
        rate: bytes per second over all who share this object; None: no limit.
    """

    def __init__(self, rate: int | None) -> None:
        self._rate = rate
        self._lock = threading.Lock()
        self._next_start = time.monotonic()
        self._waiting: list[_Turn] = []

    def wait(
        self, nbytes: int, stop: threading.Event, gone: Callable[[], bool] = lambda: False
    ) -> None:
        """Return when a message of `nbytes` may start, or `stop` is set: then it is not to be sent.

        Args:
            nbytes: of the message.
            stop: ends the wait.
            gone: whether whom the message is for has gone.

        Raises:
            ConnectionResetError: it has gone.
        """
        if self._rate is None:
            return
        with self._lock:
            now = time.monotonic()
            turn = _Turn(max(now, self._next_start), nbytes / self._rate, now)
            self._next_start = turn.start + turn.seconds
            self._waiting.append(turn)
        try:
            while True:
                with self._lock:
                    now = time.monotonic()
                    turn.looks = min(turn.start, now + _LOOK)
                if turn.looks <= now:
                    return
                if gone():
                    raise ConnectionResetError("the client has gone")
                if stop.wait(turn.looks - now):
                    return
        finally:
            self._leave(turn)

    def _leave(self, turn: _Turn) -> None:
        """Start, or let those behind start earlier: when they look, and one after the other."""
        with self._lock:
            at = self._waiting.index(turn)
            del self._waiting[at]
            if turn.start <= time.monotonic():
                return
            self._next_start = turn.start
            for later in self._waiting[at:]:
                later.start = max(self._next_start, later.looks)
                self._next_start = later.start + later.seconds
