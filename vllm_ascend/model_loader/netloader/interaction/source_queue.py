"""Which source a load asks next: who is new, who is to be asked later, and who has failed."""

import random
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from ..errors import SourceBusy, SourceError, SourceUnreachable
from ..utils import Address, one_line

# Seconds between two attempts at a source: at first, and at most.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 10.0


class _State(Enum):
    """Where a source stands.

    NEW, LATER (it said so) and UNREACHABLE are to be asked when their time has come, OTHER (it has
    other weights than those that are being loaded) when nobody is left who has these.
    """

    NEW = "new"
    LATER = "later"
    UNREACHABLE = "unreachable"
    OTHER = "other"
    ASKED = "asked"
    FAILED = "failed"


@dataclass
class _Source:
    address: Address
    state: _State = _State.NEW
    due: float = 0.0
    attempts: int = 0
    reason: str = ""


class SourceQueue:
    """The sources of one load, in order of preference, handed to the threads that ask them.

    A source that says "later" is asked again as long as the load waits; one that cannot be reached
    too, unless one that could be reached has failed and none has said "later".

    Args:
        addresses: where to look, in order of preference.
        seconds: for how long to wait for sources that may serve later; 0: not at all.
    """

    def __init__(self, addresses: Iterable[Address], seconds: float) -> None:
        self._sources = [_Source(address) for address in dict.fromkeys(addresses)]
        self._deadline = time.monotonic() + seconds
        self._changed = threading.Condition()
        self.over = threading.Event()

    def next(self) -> Address | None:
        """Return the source to ask now, as soon as there is one; None: the load is over."""
        with self._changed:
            while not self.over.is_set():
                now = time.monotonic()
                if (source := self._due(now)) is not None:
                    source.state = _State.ASKED
                    source.attempts += 1
                    return source.address
                if not self._may_go_on(now):
                    self._finish()
                    break
                self._changed.wait(self._pause(now))
            return None

    def succeeded(self) -> None:
        """Ask nobody any more: the load is complete."""
        with self._changed:
            self._finish()

    def failed(self, address: Address, error: Exception) -> bool:
        """Take note of what went wrong with a source.

        Returns:
            Whether this is news: not the same that was said of it before.
        """
        reason = one_line(error)
        with self._changed:
            source = self._source(address)
            news = source.reason != reason
            source.reason = reason
            source.state = _State.FAILED
            if isinstance(error, SourceBusy | SourceUnreachable):
                later = isinstance(error, SourceBusy)
                source.state = _State.LATER if later else _State.UNREACHABLE
                pause = min(_FIRST_PAUSE * 2 ** min(source.attempts - 1, 10), _LONGEST_PAUSE)
                asked_for = error.retry_after if isinstance(error, SourceError) else 0.0
                # Jitter keeps clients that were refused together from coming back together.
                source.due = time.monotonic() + max(pause, asked_for) * random.uniform(0.75, 1.25)
            self._changed.notify_all()
            return news

    def postpone(self, address: Address, reason: str) -> None:
        """Ask a source again when nobody is left who has the weights that are being loaded."""
        with self._changed:
            source = self._source(address)
            source.state, source.reason = _State.OTHER, reason
            self._changed.notify_all()

    def waits(self, address: Address) -> bool:
        """Return whether a source is asked again by itself."""
        with self._changed:
            source = self._source(address)
            return source.state in (_State.LATER, _State.UNREACHABLE) and self._may_go_on(
                time.monotonic()
            )

    def reasons(self) -> list[str]:
        """Return what went last wrong with each source that something went wrong with."""
        with self._changed:
            return [source.reason for source in self._sources if source.reason]

    def _source(self, address: Address) -> _Source:
        return next(source for source in self._sources if source.address == address)

    def _finish(self) -> None:
        self.over.set()
        self._changed.notify_all()

    def _in(self, *states: _State) -> list[_Source]:
        return [source for source in self._sources if source.state in states]

    def _due(self, now: float) -> _Source | None:
        if new := self._in(_State.NEW):
            return new[0]
        if now < self._deadline:
            waiting = self._in(_State.LATER, _State.UNREACHABLE)
            if due := [source for source in waiting if source.due <= now]:
                return due[0]
        # Nobody else is left: begin anew with what the others have.
        if not self._in(_State.ASKED) and (other := self._in(_State.OTHER)):
            return other[0]
        return None

    def _may_go_on(self, now: float) -> bool:
        if self._in(_State.ASKED):
            return True
        if now >= self._deadline:
            return False
        if self._in(_State.LATER):
            return True
        return bool(self._in(_State.UNREACHABLE)) and not self._in(_State.FAILED)

    def _pause(self, now: float) -> float | None:
        """Return the seconds until something is due; None: somebody else has to act first."""
        waiting = [source.due for source in self._in(_State.LATER, _State.UNREACHABLE)]
        if not waiting or now >= self._deadline:
            return None
        return max(0.0, min(*waiting, self._deadline) - now)
