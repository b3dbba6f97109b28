"""The rate limiter of a source, over all its sessions."""

import threading
import time
from collections.abc import Callable

_LOOK = 0.5  # seconds after which whoever waits asks again whether the client is gone


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

    def wait(
        self, nbytes: int, stop: threading.Event, gone: Callable[[], bool] = lambda: False
    ) -> None:
        """Return when a message of `nbytes` may start, `stop` is set, or nobody waits for it.

        Args:
            nbytes: of the message.
            stop: ends the wait.
            gone: whether whom the message is for has gone.
        """
        if self._rate is None:
            return
        with self._lock:
            start = max(time.monotonic(), self._next_start)
            self._next_start = start + nbytes / self._rate
        while (left := start - time.monotonic()) > 0 and not gone():
            if stop.wait(min(left, _LOOK)):
                return
