"""The rate limiter of a source, over all its sessions."""

import threading
import time


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

    def wait(self, nbytes: int, stop: threading.Event) -> None:
        """Return when a message of `nbytes` may start, or when `stop` is set."""
        if self._rate is None:
            return
        with self._lock:
            now = time.monotonic()
            start = max(now, self._next_start)
            self._next_start = start + nbytes / self._rate
        stop.wait(start - now)
