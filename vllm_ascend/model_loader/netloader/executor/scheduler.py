"""Which runs of blocks come next, and from which session: what the sessions of a load share."""

import contextlib
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator

from .chunks.blocks import Blocks, Run

# What a session may hold in any case: one run under way and one asked for.
_LEAST_HELD = 2


class Scheduler:
    """Hands every run out once, and again when it comes back.

    Args:
        blocks: what is to be fetched.
        chunk_bytes: size of a run that is not to be exceeded.
    """

    def __init__(self, blocks: Blocks, chunk_bytes: int) -> None:
        runs = blocks.cut(chunk_bytes)
        self._blocks = blocks
        self._changed = threading.Condition()
        self._wanted = deque(runs)
        self._left = len(runs)
        self._sessions = 0

    @property
    def finished(self) -> bool:
        """Whether every run is done."""
        with self._changed:
            return self._left == 0

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Count as one of those that share what is left."""
        with self._changed:
            self._sessions += 1
        try:
            yield
        finally:
            with self._changed:
                self._sessions -= 1

    def take(self, limit: int, held: int = 0, max_bytes: int = sys.maxsize) -> list[Run]:
        """Return runs to fetch, none if none is wanted at the moment.

        Of several sessions each has at most half of its fair share of what is left, so that towards
        the end a slow source is not left with runs that a fast one could have brought.

        Args:
            limit: number of runs not to exceed.
            held: number of runs that the session has taken and that have not come yet.
            max_bytes: size of a run that the session's source sends at most; larger ones are split.
        """
        with self._changed:
            count = min(limit, len(self._wanted))
            if self._sessions > 1:
                share = -(-len(self._wanted) // (2 * self._sessions))
                count = min(count, max(share - held, _LEAST_HELD - held, 0))
            return [self._next(max_bytes) for _ in range(count)]

    def _next(self, max_bytes: int) -> Run:
        first, *others = self._blocks.split(self._wanted.popleft(), max_bytes)
        self._wanted.extendleft(reversed(others))
        self._left += len(others)
        return first

    def done(self) -> None:
        """Record that a run that was taken is in place."""
        with self._changed:
            self._left -= 1
            if self._left == 0:
                self._changed.notify_all()

    def give_back(self, runs: Iterable[Run]) -> None:
        """Want runs again that were taken and did not arrive."""
        with self._changed:
            self._wanted.extendleft(runs)
            self._changed.notify_all()

    def wait(self, timeout: float) -> None:
        """Return when a run is wanted or all are done, or after `timeout` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._wanted or self._left == 0, timeout)
