"""Which chunks of a load are wanted, in flight and done: what its sessions share."""

import contextlib
import threading
from collections import deque
from collections.abc import Iterable, Iterator

# What a session may hold in any case: one chunk under way and one asked for.
_LEAST_HELD = 2


class Ledger:
    """Hands every chunk out once, and again when it comes back.

    Args:
        chunks: number of chunks; they are numbered from 0.
    """

    def __init__(self, chunks: int) -> None:
        self._changed = threading.Condition()
        self._wanted = deque(range(chunks))
        self._hashes: list[tuple[bytes, ...] | None] = [None] * chunks
        self._left = chunks
        self._sessions = 0

    @property
    def finished(self) -> bool:
        """Whether every chunk is done."""
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

    def take(self, limit: int, held: int = 0) -> list[int]:
        """Return chunks to fetch, none if none is wanted at the moment.

        Of several sessions each has at most half of its fair share of what is left, so that towards
        the end a slow source is not left with chunks that a fast one could have brought.

        Args:
            limit: number of chunks not to exceed.
            held: number of chunks that the session has taken and that have not come yet.
        """
        with self._changed:
            count = min(limit, len(self._wanted))
            if self._sessions > 1:
                share = -(-len(self._wanted) // (2 * self._sessions))
                count = min(count, max(share - held, _LEAST_HELD - held, 0))
            return [self._wanted.popleft() for _ in range(count)]

    def done(self, chunk: int, hashes: tuple[bytes, ...]) -> None:
        """Record that a chunk is in place, with the hashes of its pieces."""
        with self._changed:
            if self._hashes[chunk] is None:
                self._left -= 1
            self._hashes[chunk] = hashes
            if self._left == 0:
                self._changed.notify_all()

    def give_back(self, chunks: Iterable[int]) -> None:
        """Want chunks again that were taken and did not arrive."""
        with self._changed:
            self._wanted.extendleft(chunks)
            self._changed.notify_all()

    def wait(self, timeout: float) -> None:
        """Return when a chunk is wanted or all are done, or after `timeout` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._wanted or self._left == 0, timeout)

    def hashes(self) -> tuple[tuple[bytes, ...], ...]:
        """Return the hashes of the pieces of all chunks, once every chunk is done."""
        with self._changed:
            assert self._left == 0
            return tuple(hashes for hashes in self._hashes if hashes is not None)
