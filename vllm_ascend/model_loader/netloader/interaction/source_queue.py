"""Which source a load asks next: who is new, who is to be asked later, and who has failed."""

import random
import sys
import threading
import time
from bisect import insort
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from enum import Enum

from ..errors import (
    MakesRoom,
    OtherPlacement,
    SourceBusy,
    SourceError,
    SourceUnreachable,
    TransferCorrupt,
)
from ..utils import Address, one_line

# Seconds between two attempts at a source: at first, and at most.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 10.0
# A pause of more than this part of the time so far might be most of a load.
_PART_PAUSED = 2
_FIRST_PAUSE_NAMED = 0.1  # at first, of those that others name, as they may begin to load just now
# Seconds for which a source is asked again, whatever the deadline says, whose session has brought
# something and has ended because it did not suit at the moment; also those since something has
# come after which those that others name are not asked any more.
_GRACE = 30.0
_GRACES = 3  # times that one that only others have named gets this
MAX_HEARD = 256  # sources of one load that others may name
_REVIVALS = 3  # processes after the first one that others may name at an address


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
    hearsay: bool = False
    lied: bool = False
    cut_otherwise: bool = False
    turn: float = 0.0  # among those that were given, or among those that others have named
    revivals: int = 0
    graces: int = 0
    until: float = 0.0  # asked again at least so long


class SourceQueue:
    """The sources of one load, in order of preference, handed to the threads that ask them.

    Names may stand for more of them at each look-up; see `found`.

    A source that says "later" is asked again as long as the load waits; one that cannot be reached
    too, unless one that could be reached has failed and none has said "later". Those that others
    have named come after those that were given, and keep no load waiting.

    Args:
        addresses: where to look, in order of preference.
        seconds: for how long to wait for sources that may serve later; 0: not at all.
        clock: returns seconds.
        spread: returns a random number from its first argument to its second one.
        most_hearsay: how many that only others have named are asked at once.
    """

    def __init__(
        self,
        addresses: Iterable[Address],
        seconds: float,
        clock: Callable[[], float] = time.monotonic,
        spread: Callable[[float, float], float] = random.uniform,
        most_hearsay: int = sys.maxsize,
    ) -> None:
        self._most_hearsay = most_hearsay
        self._clock = clock
        self._spread = spread
        self._listed = [*dict.fromkeys(addresses)]
        self._sources = [_Source(one, turn=turn) for turn, one in enumerate(self._listed)]
        # Those in each state, in the order of `_turn`.
        self._in_state: dict[_State, list[_Source]] = {state: [] for state in _State}
        self._in_state[_State.NEW] += self._sources
        self._heard = 0
        self._known = {source.address: source for source in self._sources}
        self._began = clock()
        self._deadline = self._began + seconds
        self._changed = threading.Condition()
        self._problems: Mapping[str, SourceError] = {}
        self._idle = 0
        self._held = False
        self._polled = 0.0
        self._progress = clock()
        self.over = threading.Event()

    def next(self) -> Address | None:
        """Return the source to ask now, as soon as there is one; None: the load is over."""
        with self._changed:
            while (address := self.poll()) is None and not self.over.is_set():
                self._idle += 1
                self._changed.wait(self.pause())
                self._idle -= 1
            return address

    def poll(self) -> Address | None:
        """Return the source to ask now; None: there is none at the moment, or the load is over."""
        with self._changed:
            if self.over.is_set():
                return None
            now = self._polled = self._clock()
            source = self._due(now)
            if source is not None and not self._is_one_too_many(source):
                self._put(source, _State.ASKED)
                source.attempts += 1
                return source.address
            if not self._may_go_on(now):
                self._finish()
            return None

    def pause(self) -> float | None:
        """Return the seconds until something is due; None: somebody else has to act first."""
        with self._changed:
            waiting = self._in(_State.LATER, _State.UNREACHABLE)
            if not (waiting or self._problems or self._held):
                return None
            times = [time for source in waiting for time in (source.due, source.until)]
            # Since the queue was looked at, not since now: nothing may come due in between unseen.
            ahead = [time for time in (self._deadline, *times) if time > self._polled]
            return max(0.0, min(ahead) - self._clock()) if ahead else None

    @property
    def idle(self) -> bool:
        """Whether a thread waits for a source to ask, and the load for sources."""
        with self._changed:
            return self._idle > 0 and self._clock() < self._deadline

    def hold(self, held: bool) -> None:
        """Say whether the load waits for what a look-up may show, though there is nobody to ask."""
        with self._changed:
            self._held = held
            self._changed.notify_all()

    def progressed(self) -> None:
        """Take note that enough has come to go on for a while."""
        with self._changed:
            self._progress = self._clock()
            self._changed.notify_all()

    @property
    def late(self) -> bool:
        """Whether the load has waited for as long as it may, and too little comes."""
        with self._changed:
            return self._clock() >= max(self._deadline, self._progress + _GRACE)

    def joined(self, address: Address, instance: str) -> None:
        """Take note of which process there is at an address.

        Raises:
            SourceBusy: it is being asked at another address just now.
        """
        with self._changed:
            listed = not self._known[address].hearsay
            for source in self._in(_State.ASKED):
                if listed and source.hearsay:
                    continue  # it may only call itself so
                if source.instance == instance != "" and source.address != address:
                    raise SourceBusy(f"{address}: is asked as {source.address} already")
            self._known[address].instance = instance

    def heard(self, address: Address, instance: str) -> None:
        """Take note of another source that somebody has named.

        One that nobody but others has named, and that has failed or had other weights, is asked
        again a few times if another process has come to its address, unless it has sent wrong
        bytes.
        """
        with self._changed:
            known = self._known.get(address)
            if known is None:
                if self._heard >= MAX_HEARD:
                    return
                self._heard += 1
            elif known.instance != instance:
                if not known.hearsay or known.lied or known.revivals >= _REVIVALS:
                    return
                known.revivals += known.state is not _State.ASKED
            # Clients that were told of the same peers in the same order must not all ask the same
            # ones: the rest would hear of blocks through these only.
            self._add(address, instance, hearsay=True, turn=self._spread(0.5, 1.5))
            self._changed.notify_all()

    def lacks_threads(self, idle: int | None = None) -> bool:
        """Return whether there is a source to ask and no thread that may ask it.

        Args:
            idle: threads that wait for one; None: those in `next`.
        """
        with self._changed:
            source = self._due(self._clock())
            none = self._idle == 0 if idle is None else idle == 0
            return source is not None and (none or self._is_one_too_many(source))

    def has_others(self, incomplete: Set[Address]) -> bool:
        """Return whether a source may have what those do not have that are still loading."""
        with self._changed:
            left = self._in(_State.NEW, _State.LATER, _State.OTHER, _State.ASKED)
            return any(source.address not in incomplete for source in left)

    def is_hearsay(self, address: Address) -> bool:
        """Return whether nobody but others has named a source."""
        with self._changed:
            return self._known[address].hearsay

    def _add(
        self, address: Address, instance: str, *, hearsay: bool = False, turn: float = 0.0
    ) -> None:
        if (source := self._known.get(address)) is None:
            source = _Source(address, instance=instance, hearsay=hearsay, turn=turn)
            self._known[address] = source
            self._sources.append(source)
            insort(self._in_state[_State.NEW], source, key=_turn)
        elif source.instance != instance and source.state is not _State.ASKED:
            self._put(source, _State.NEW)
            source.attempts, source.due = 0, 0.0
            source.instance = instance

    def _put(self, source: _Source, state: _State) -> None:
        self._in_state[source.state].remove(source)
        source.state = state
        insort(self._in_state[state], source, key=_turn)

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
            for address, instance in endpoints:
                self._add(address, instance)
                self._heard -= self._known[address].hearsay
                self._known[address].hearsay = False
            order = [*self._listed, *(address for address, _ in endpoints)]
            rank = {address: -index for index, address in enumerate(reversed(order))}
            self._sources.sort(key=lambda source: rank.get(source.address, 1))
            for turn, source in enumerate(self._sources):
                source.turn = source.turn if source.hearsay else turn
            for sources in self._in_state.values():
                sources.sort(key=_turn)
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

    def failed(self, address: Address, error: Exception, *, soon: bool = False) -> bool:
        """Take note of what went wrong with a source.

        Args:
            address: of the source.
            error: what went wrong.
            soon: whether it has given something and may give more soon: it is asked again for a
                while, whatever the deadline says.

        Returns:
            Whether this is news: not the same that was said of it before.
        """
        reason = one_line(error)
        with self._changed:
            source = self._known[address]
            news = source.reason != reason and not isinstance(error, MakesRoom)
            if news:
                source.reason = reason
            state = _State.FAILED
            source.lied = isinstance(error, TransferCorrupt)
            source.cut_otherwise = isinstance(error, OtherPlacement)
            if isinstance(error, SourceBusy | SourceUnreachable):
                later = isinstance(error, SourceBusy)
                state = _State.LATER if later else _State.UNREACHABLE
                if later and soon and not (source.hearsay and source.graces >= _GRACES):
                    source.graces += 1
                    source.until = self._clock() + _GRACE
                first = _FIRST_PAUSE_NAMED if source.hearsay else _FIRST_PAUSE
                longest = max(first, (self._clock() - self._began) / _PART_PAUSED)
                pause = min(first * 2 ** min(source.attempts - 1, 10), longest, _LONGEST_PAUSE)
                asked_for = error.retry_after if isinstance(error, SourceError) else 0.0
                # Jitter keeps clients that were refused together from coming back together.
                source.due = self._clock() + max(pause, asked_for) * self._spread(0.75, 1.25)
            self._put(source, state)
            self._changed.notify_all()
            return news

    def postpone(self, address: Address, reason: str) -> None:
        """Ask a source again when nobody is left who has the weights that are being loaded."""
        with self._changed:
            source = self._known[address]
            self._put(source, _State.OTHER)
            source.reason = reason
            self._changed.notify_all()

    def waits(self, address: Address) -> bool:
        """Return whether a source is asked again by itself."""
        with self._changed:
            source = self._known[address]
            return source.state in (_State.LATER, _State.UNREACHABLE) and self._may_go_on(
                self._clock()
            )

    def reasons(self) -> list[str]:
        """Return what went last wrong with each source that something went wrong with."""
        with self._changed:
            reasons = [source.reason for source in self._sources if source.reason]
            return [*reasons, *map(one_line, self._problems.values())]

    def others(self) -> list[str]:
        """Return the sources that have refused as their ranks have other parts of the weights."""
        with self._changed:
            asked = [str(source.address) for source in self._sources if source.cut_otherwise]
            named = [
                name for name, error in self._problems.items() if isinstance(error, OtherPlacement)
            ]
            return [*asked, *named]

    def known(self) -> list[str]:
        """Return the sources that were given, or that names stand for."""
        with self._changed:
            return [str(source.address) for source in self._sources if not source.hearsay]

    def _finish(self) -> None:
        self.over.set()
        self._changed.notify_all()

    def _in(self, *states: _State) -> list[_Source]:
        return [source for state in states for source in self._in_state[state]]

    def _due(self, now: float) -> _Source | None:
        due = [
            source
            for state in (_State.NEW, _State.LATER, _State.UNREACHABLE)
            for source in self._first_due(state, now)
        ]
        if due:
            return min(due, key=lambda one: (one.hearsay, one.state is not _State.NEW, one.turn))
        # Nobody else is left: begin anew with what the others have.
        if not self._in(_State.ASKED) and (other := self._in(_State.OTHER)):
            return other[0]
        return None

    def _first_due(self, state: _State, now: float) -> list[_Source]:
        for source in self._in_state[state]:
            if source.due <= now and self._may_ask(source, now):
                return [source]
        return []

    def _is_one_too_many(self, source: _Source) -> bool:
        asked = sum(one.hearsay for one in self._in(_State.ASKED))
        return source.hearsay and asked >= self._most_hearsay

    def _may_ask(self, source: _Source, now: float) -> bool:
        if source.state is not _State.NEW:
            return now < max(self._deadline, source.until)
        if not source.hearsay or now < self._deadline:
            return True
        # So that those that bring nothing cannot keep the load from the disk.
        return bool(self._in(_State.ASKED)) and now < self._progress + _GRACE

    def _may_go_on(self, now: float) -> bool:
        if self._in(_State.ASKED):
            return True
        if any(self._may_ask(source, now) for source in self._in(_State.LATER)):
            return True
        if now >= self._deadline:
            return False
        if self._held:
            return True
        problems = [*self._problems.values()]
        later = [problem for problem in problems if isinstance(problem, SourceBusy)]
        if later:
            return True
        unreached = [problem for problem in problems if isinstance(problem, SourceUnreachable)]
        failed = self._in(_State.FAILED) or len(unreached) < len(problems)
        return bool(self._in(_State.UNREACHABLE) or unreached) and not failed


def _turn(source: _Source) -> tuple[bool, float]:
    return source.hearsay, source.turn
