"""Which source a load asks next: who is new, who is to be asked later, and who has failed."""

import random
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
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
    instance: str = ""


class SourceQueue:
    """The sources of one load, in order of preference, handed to the threads that ask them.

    Names may stand for more of them at each look-up; see `found`.

    A source that says "later" is asked again as long as the load waits; one that cannot be reached
    too, unless one that could be reached has failed and none has said "later".

    Args:
        addresses: where to look, in order of preference.
        seconds: for how long to wait for sources that may serve later; 0: not at all.
    """

    def __init__(self, addresses: Iterable[Address], seconds: float) -> None:
        self._listed = [*dict.fromkeys(addresses)]
        self._sources = [_Source(address) for address in self._listed]
        self._deadline = time.monotonic() + seconds
        self._changed = threading.Condition()
        self._problems: Mapping[str, SourceError] = {}
        self._idle = 0
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
                self._idle += 1
                self._changed.wait(self._pause(now))
                self._idle -= 1
            return None

    @property
    def idle(self) -> bool:
        """Whether a thread waits for a source to ask, and the load for sources."""
        with self._changed:
            return self._idle > 0 and time.monotonic() < self._deadline

    def found(
        self, endpoints: Sequence[tuple[Address, str]], problems: Mapping[str, SourceError]
    ) -> list[SourceError]:
        """Take note of what names stand for now.

        A source that has failed is asked again if another process has come to its address.

        Args:
            endpoints: addresses, in order of preference, with what names the process there.
            problems: what stands in the way of further ones, by name or address.

        Returns:
            The problems that are news.
        """
        with self._changed:
            known = {source.address: source for source in self._sources}
            for address, instance in endpoints:
                source = known.get(address)
                if source is None:
                    source = known[address] = _Source(address, instance=instance)
                    self._sources.append(source)
                elif source.instance != instance and source.state is not _State.ASKED:
                    source.state, source.attempts = _State.NEW, 0
                    source.instance = instance
            order = [*self._listed, *(address for address, _ in endpoints)]
            rank = {address: -index for index, address in enumerate(reversed(order))}
            self._sources.sort(key=lambda source: rank.get(source.address, 1))
            news = [
                error
                for name, error in problems.items()
                if str(error) != str(self._problems.get(name, ""))
            ]
            self._problems = dict(problems)
            self._changed.notify_all()
            return news

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
            reasons = [source.reason for source in self._sources if source.reason]
            return [*reasons, *map(one_line, self._problems.values())]

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
        problems = [*self._problems.values()]
        later = [problem for problem in problems if isinstance(problem, SourceBusy)]
        if self._in(_State.LATER) or later:
            return True
        unreached = [problem for problem in problems if isinstance(problem, SourceUnreachable)]
        failed = self._in(_State.FAILED) or len(unreached) < len(problems)
        return bool(self._in(_State.UNREACHABLE) or unreached) and not failed

    def _pause(self, now: float) -> float | None:
        """Return the seconds until something is due; None: somebody else has to act first."""
        waiting = [source.due for source in self._in(_State.LATER, _State.UNREACHABLE)]
        if now >= self._deadline or not (waiting or self._problems):
            return None
        return max(0.0, min([*waiting, self._deadline]) - now)
