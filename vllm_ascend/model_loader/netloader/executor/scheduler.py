"""Which runs of blocks come next, and from whom: what the sessions of a load or a source share.

Nothing here opens a connection or looks at a tensor: events come in, decisions go out, and the
clock is given. `benchmarks.fleet_simulation` runs it in virtual time.
"""

import contextlib
import sys
import threading
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import Generic, TypeVar

from .chunks.blocks import Blocks, Run

# What a session may hold in any case: one run under way and one asked for.
_LEAST_HELD = 2
# Seconds after which a source is asked again for what it wanted others to be asked for.
_ASK_AGAIN = 0.1
# Seconds for which a run is under way at least before another source is asked for it.
_SLOW = 1.0
# Seconds between two comparisons of what incomplete sources bring.
_REVIEW = 1.0
# Seconds without a run from a source after which it sends what it has sent to others before.
STARVED = 2.0
# Seconds for which a client looks for a run elsewhere once everything has been sent to somebody.
_ELSEWHERE = 1.0
# How many times longer a client takes for a run than another one that passes on little.
_MUCH_SLOWER = 3
# Of a client's runs, how many later others ask for one again if they cannot get it there; and how
# many blocks they ask for again at least before this is said of the client.
_LONG_AGO, _LEAST_MISSED, _PART_MISSED = 4, 4, 8
# In an entry of a heap the number of a run stands below its priority.
_BITS = 32
_MASK = (1 << _BITS) - 1

C = TypeVar("C")


class Peer:
    """What the scheduler knows of the source of one session.

    Args:
        complete: whether it has every block.
        trusted: whether a run that comes wrong is asked for once more, as that may be chance.

    Attributes:
        failure: why it has no news of further blocks.
        makes_room: whether it is left for another one, as it brings less.
        seconds: that the last run has taken; 0: none has come.
        cut: ends the session at once, so that others can bring what it holds; None: nothing does.
    """

    def __init__(self, *, complete: bool = True, trusted: bool = True) -> None:
        self.complete = complete
        self.trusted = trusted
        self.failure: Exception | None = None
        self.makes_room = False
        self.seconds = 0.0
        self.cut: Callable[[], object] | None = None
        self._since = 0.0  # when there was something new last
        self._got = 0.0  # when a run came last
        self._began = 0.0
        self._brought = 0  # runs since the last review
        self._has: bytearray | None = None
        # Runs by priority. An entry whose run has become less urgent since is put back when it
        # comes to the top, one whose run is not wanted any more is dropped there.
        self._open: list[int] = []
        self._declined: set[int] = set()
        self._ask_again = 0.0


class Scheduler:
    """Hands every run out once, and again when it comes back.

    Of the runs that a session's source has, those come first that the fewest incomplete sources
    have, as these can be passed on to most others. A decision costs the logarithm of the number of
    runs, whatever that number and the number of sources are.

    Args:
        blocks: what is to be fetched.
        chunk_bytes: size of a run that is not to be exceeded.
        shuffle: puts runs into the order in which those come that are equally urgent; None: as
            they are. Clients with different orders do not all ask a source for the same run.
        clock: returns seconds.
    """

    def __init__(
        self,
        blocks: Blocks,
        chunk_bytes: int,
        shuffle: Callable[[list[Run]], object] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        runs = blocks.cut(chunk_bytes)
        if shuffle is not None:
            shuffle(runs)
        self._blocks = blocks
        self._clock = clock
        self._changed = threading.Condition()
        # A run's number says in which order runs come that are equally urgent.
        self._runs = runs
        self._wanted = bytearray(b"\1") * len(runs)
        self._urgency = array("q", [1]) * len(runs)  # 0: at once; else 1 and who has it
        self._number_of = array("q", [0]) * blocks.count  # by block
        for number, run in enumerate(self._runs):
            self._renumber(run, number)
        self._wanting = len(runs)
        self._left = len(runs)
        self._held: dict[Run, tuple[Peer | None, float]] = {}  # by whom, and since when
        self._sessions: Counter[Peer] = Counter()
        self._began = self._reviewed = clock()
        self._came = 0
        self._least: Peer | None = None  # of the incomplete sources, at the last review
        self._anybody: Peer | None = None  # in the place of a peer that is not named

    @property
    def finished(self) -> bool:
        """Whether every run is done."""
        with self._changed:
            return self._left == 0

    @contextlib.contextmanager
    def session(self, peer: Peer | None = None) -> Iterator[Peer]:
        """Count as one of those that share what is left.

        Args:
            peer: the session's source; None: one that has every block.
        """
        peer = peer or Peer()
        self.begin(peer)
        try:
            yield peer
        finally:
            self.end(peer)

    def begin(self, peer: Peer) -> None:
        """Count a session with a source among those that share what is left."""
        with self._changed:
            self._sessions[peer] += 1
            peer._since = peer._got = self._clock()
            if self._sessions[peer] == 1:
                peer._began = peer._since
                self._welcome(peer)

    def end(self, peer: Peer) -> None:
        """Count a session no more."""
        with self._changed:
            self._sessions[peer] -= 1
            if not self._sessions[peer]:
                del self._sessions[peer]
                self._forget(peer)

    def heard(self, peer: Peer, runs: Iterable[Run], *, complete: bool) -> None:
        """Record which blocks have come to the source of a session, which may yet begin."""
        with self._changed:
            if peer.complete:
                return
            begun = peer in self._sessions
            if complete:
                if begun:
                    self._forget(peer)
                peer.complete = True
                if begun:
                    self._welcome(peer)
            else:
                if peer._has is None:
                    peer._has = bytearray(self._blocks.count)
                has = peer._has
                news = []
                for first, last in runs:  # which may be any numbers
                    at, end = first, min(last + 1, len(has))
                    while (at := has.find(0, at, end)) >= 0:
                        has[at] = 1
                        news.append(at)
                numbers = dict.fromkeys(self._number_of[block] for block in news)
                if any(self._wanted[number] and self._has(peer, number) for number in numbers):
                    peer._since = self._clock()
                if begun:
                    self._count(peer, numbers)
            self._changed.notify_all()

    def lost(self, peer: Peer, failure: Exception) -> None:
        """Record why there is no more news of a session's source."""
        with self._changed:
            peer.failure = failure
            self._changed.notify_all()

    def declined(self, peer: Peer, run: Run) -> None:
        """Want a run again that the source wants others to be asked for."""
        with self._changed:
            self._held.pop(run, None)
            number = self._number_of[run.first]
            peer._declined.add(number)
            peer._ask_again = self._clock() + _ASK_AGAIN
            self._want(number)
            self._changed.notify_all()

    def take(
        self, limit: int, held: int = 0, max_bytes: int = sys.maxsize, peer: Peer | None = None
    ) -> list[Run]:
        """Return runs to fetch, none if none is wanted at the moment.

        Of several sessions each has at most half of its fair share of what is left, so that towards
        the end a slow source is not left with runs that a fast one could have brought. With more
        than two, an incomplete source is asked for one at a time: what waits in its queue could
        come from others, and would be passed on from there sooner.

        Args:
            limit: number of runs not to exceed.
            held: number of runs that the session has taken and that have not come yet.
            max_bytes: size of a run that the session's source sends at most; larger ones are split.
            peer: the session's source; None: one that has every block.
        """
        with self._changed:
            count, sessions = min(limit, self._wanting), self._sessions.total()
            if sessions > 1:
                share = -(-self._wanting // (2 * sessions))
                count = min(count, max(share - held, _LEAST_HELD - held, 0))
                if sessions > _LEAST_HELD and peer is not None and not peer.complete:
                    count = min(count, max(1 - held, 0))
            taken: list[Run] = []
            while len(taken) < count and (number := self._best(peer)) is not None:
                taken.append(self._take(number, max_bytes))
            if taken:
                now = self._clock()
                self._held.update(dict.fromkeys(taken, (peer, now)))
                if peer is not None:
                    peer._since = now
            return taken

    def done(self, run: Run) -> None:
        """Record that a run that was taken is in place."""
        with self._changed:
            holder, since = self._held.pop(run)
            if holder is not None:
                holder._got = self._clock()
                holder._brought += 1
                holder.seconds = max(holder._got - since, sys.float_info.min)
            self._came += 1
            self._left -= 1
            if self._left == 0:
                self._changed.notify_all()

    def skip(self, run: Run) -> None:
        """Record that a run is in place which nobody has taken."""
        with self._changed:
            self._wanted[self._number_of[run.first]] = 0
            self._wanting -= 1
            self._left -= 1

    @property
    def wanted(self) -> list[Run]:
        """The runs that nobody has taken."""
        with self._changed:
            return [run for run, wanted in zip(self._runs, self._wanted, strict=True) if wanted]

    def give_back(self, runs: Iterable[Run]) -> None:
        """Want runs again that were taken and did not arrive."""
        with self._changed:
            for run in runs:
                self._held.pop(run, None)
                number = self._number_of[run.first]
                self._urgency[number] = 0
                self._want(number)
            self._changed.notify_all()

    def wait(self, timeout: float, peer: Peer | None = None) -> None:
        """Return when the source has a run that is wanted, or no more news, or all are done.

        Args:
            timeout: seconds after which it returns in any case.
            peer: the session's source; None: one that has every block.
        """

        def over() -> bool:
            failed = peer is not None and peer.failure is not None
            return self._left == 0 or failed or self._best(peer) is not None

        with self._changed:
            now = self._clock()
            if (again := self.asks_again(peer)) is not None:
                timeout = min(timeout, again - now)
            for since, _ in self._elsewhere(peer):
                timeout = min(timeout, max(0.0, since - now))
            self._changed.wait_for(over, timeout)

    def slow(self, peer: Peer) -> Callable[[], object] | None:
        """Return what cuts the session of a source, as this one brings what that holds sooner.

        To be asked for a source of which nothing else is wanted.
        """
        with self._changed:
            now = self._clock()
            for due, holder in self._elsewhere(peer):
                if due <= now:
                    cut, holder.cut = holder.cut, None
                    return cut
            return None

    def brings_least(self, peer: Peer) -> bool:
        """Return whether a source is the one to leave for another, if there is another.

        Sources that stay together get and have the same blocks, and nothing for each other. So a
        load leaves the one of its incomplete sources that has brought least, again and again.
        """
        with self._changed:
            now = self._clock()
            if now - self._reviewed >= _REVIEW:
                old = [
                    one
                    for one in self._sessions
                    if not one.complete and now - one._began >= _REVIEW
                ]
                self._least = min(old, key=lambda one: one._brought, default=None)
                for one in self._sessions:
                    one._brought = 0
                self._reviewed = now
            return self._least is peer

    def held_for(self, peer: Peer) -> float:
        """Return for how many seconds a source has been asked for the oldest run that it holds."""
        with self._changed:
            asked = [since for holder, since in self._held.values() if holder is peer]
            return self._clock() - min(asked) if asked else 0.0

    def idle_for(self, peer: Peer) -> float:
        """Return for how many seconds an incomplete source has had nothing that was wanted."""
        with self._changed:
            return 0.0 if peer.complete else self._clock() - peer._since

    def nothing_for(self, peer: Peer) -> float:
        """Return for how many seconds no run has come from a source, whatever it has."""
        with self._changed:
            return self._clock() - peer._got

    def _elsewhere(self, peer: Peer | None) -> Iterator[tuple[float, Peer]]:
        """Yield who holds what this source has, too, and from when on that is to be given up."""
        if peer is None or not peer.seconds:
            return
        now = self._clock()
        spared: dict[Peer, bool] = {}
        for run, (holder, since) in self._held.items():
            if holder is None or holder is peer or holder.cut is None:
                continue
            number = self._number_of[run.first]
            if number not in peer._declined if peer.complete else self._has(peer, number):
                due = since + max(_SLOW, 4 * peer.seconds)
                if due <= now:
                    if holder not in spared:
                        spared[holder] = self._is_needed(holder)
                    if spared[holder]:
                        continue
                yield due, holder

    def _is_needed(self, peer: Peer) -> bool:
        """Return whether what it has of what is wanted, or holds, is all that there is of it."""
        others = [other for other in self._sessions if other is not peer]
        if not peer.complete or any(other.complete for other in others):
            return False
        held = {self._number_of[run.first] for run, (by, _) in self._held.items() if by is peer}
        return not all(
            any(self._has(other, number) for other in others)
            for number, wanted in enumerate(self._wanted)
            if wanted or number in held
        )

    def asks_again(self, peer: Peer | None) -> float | None:
        """Return when a source is asked again for what it declined; None: it may be asked now."""
        if peer is None or not peer._declined or self._clock() >= peer._ask_again:
            return None
        return peer._ask_again

    def _best(self, peer: Peer | None) -> int | None:
        if peer is None:
            if self._anybody is None:
                self._anybody = Peer()
                self._welcome(self._anybody)
            peer = self._anybody
        while True:
            entries = peer._open
            if not entries:  # what was declined comes last
                if not peer._declined or self._clock() < peer._ask_again:
                    return None
                again = [number for number in peer._declined if self._wanted[number]]
                peer._declined.clear()
                for number in again:
                    self._push(peer, number)
                if not again:
                    return None
            number = entries[0] & _MASK
            if not self._wanted[number] or number in peer._declined:
                heappop(entries)
            elif entries[0] >> _BITS < self._urgency[number]:
                heappop(entries)
                self._push(peer, number)
            else:
                return None if self._comes_sooner(peer, number) else number

    def _comes_sooner(self, peer: Peer, number: int) -> bool:
        """Return whether all that is left will have come from others before a run from a source."""
        if not peer.seconds or not self._came:
            return False
        interval = (self._clock() - self._began) / self._came
        return peer.seconds > _MUCH_SLOWER * interval * (self._wanting + 1) and any(
            0 < _MUCH_SLOWER * other.seconds < peer.seconds and self._has(other, number)
            for other in self._sessions
        )

    def _take(self, number: int, max_bytes: int) -> Run:
        self._wanted[number] = 0
        self._wanting -= 1
        first, *others = self._blocks.split(self._runs[number], max_bytes)
        self._runs[number] = first
        for run in others:
            other = len(self._runs)
            self._runs.append(run)
            self._wanted.append(0)
            self._urgency.append(0)
            self._renumber(run, other)
            self._want(other)
        self._left += len(others)
        return first

    def _want(self, number: int) -> None:
        self._wanted[number] = 1
        self._wanting += 1
        if self._urgency[number]:
            self._urgency[number] = 1 + sum(
                not peer.complete and self._has(peer, number) for peer in self._sessions
            )
        for peer in self._peers():
            if self._has(peer, number):
                self._push(peer, number)

    def _peers(self) -> Iterable[Peer]:
        return self._sessions if self._anybody is None else (self._anybody, *self._sessions)

    def _push(self, peer: Peer, number: int) -> None:
        heappush(peer._open, self._urgency[number] << _BITS | number)
        # Runs that are put in again and again, as sources come and go, are in it several times.
        if len(peer._open) > 4 * len(self._runs):
            self._fill(peer)

    def _fill(self, peer: Peer) -> None:
        peer._open = [
            urgency << _BITS | number
            for number, urgency in enumerate(self._urgency)
            if self._wanted[number] and self._has(peer, number)
        ]
        heapify(peer._open)

    def _has(self, peer: Peer, number: int) -> bool:
        run = self._runs[number]
        return peer._has is None or peer._has.find(0, run.first, run.last + 1) < 0

    def _renumber(self, run: Run, number: int) -> None:
        numbers = array("q", [number]) * (run.last - run.first + 1)
        self._number_of[run.first : run.last + 1] = numbers

    def _count(self, peer: Peer, numbers: Iterable[int]) -> None:
        """Let an incomplete source count for those runs that it has."""
        for number in numbers:
            if self._has(peer, number):
                if self._urgency[number]:
                    self._urgency[number] += 1
                self._push(peer, number)

    def _welcome(self, peer: Peer) -> None:
        """Let a source count."""
        if not peer.complete:
            peer._open.clear()
            if peer._has is None:
                peer._has = bytearray(self._blocks.count)
            elif 1 in peer._has:
                self._count(peer, (n for n, wanted in enumerate(self._wanted) if wanted))
            return
        peer._has = None
        self._fill(peer)

    def _forget(self, peer: Peer) -> None:
        """Let an incomplete source count no more."""
        if peer.complete:
            return
        for number, wanted in enumerate(self._wanted):
            if wanted and self._urgency[number] and self._has(peer, number):
                self._urgency[number] -= 1
                for other in self._peers():
                    if other is not peer and self._has(other, number):
                        self._push(other, number)


class FirstCopy(Generic[C]):
    """Decides whether a source sends a run now: each block once before it sends one twice.

    As long as there are blocks that it has sent to nobody, a client is to ask others for those
    that they have got. A client that got nothing for a while gets one of those: it may reach
    nobody else.

    A client that takes much longer than another one, and one whose blocks others ask for again
    long after it got them, passes on little or nothing. What it has got counts as sent to nobody,
    and it is to ask others, too.

    Args:
        count: number of blocks.
        clock: returns seconds.
    """

    def __init__(self, count: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._sent_to: list[C | None] = [None] * count
        self._sent_at = array("d", [0.0]) * count
        self._unsent = count
        self._clients: dict[C, _Client] = {}

    def sends(self, client: C, run: Run) -> bool:
        """Return whether a client gets a run that it asks for; it counts as sent then."""
        now = self._clock()
        me = self._clients.setdefault(client, _Client(now))
        blocks = range(run.first, run.last + 1)
        if not self._unsent:
            others = any(self._sent_to[block] != client for block in blocks)
            return not others or now - me.asked.setdefault(run.first, now) >= _ELSEWHERE
        for holder in {self._sent_to[block] for block in blocks} - {None, client}:
            assert holder is not None
            self._ask_again(holder, blocks, now)
        others = any(self._sent_to[block] not in (None, client) for block in blocks)
        passes_on = self._passes_on(client, now)
        if (others or not passes_on) and now - me.served < STARVED:
            return False
        me.served = now
        me.runs += 1
        if passes_on:
            for block in blocks:
                if self._sent_to[block] is None:
                    self._sent_to[block], self._sent_at[block] = client, now
                    self._unsent -= 1
        return True

    def gone(self, client: C, *, complete: bool = False) -> None:
        """Record that a client asks no more; unless `complete`, it passes on nothing either."""
        if self._clients.pop(client, None) is not None and not complete:
            self._release(client)

    def _ask_again(self, holder: C, blocks: Iterable[int], now: float) -> None:
        """Take note that another client asks for what a client has got."""
        one = self._clients.get(holder)
        if one is None:  # it is complete, and has gone
            return
        long_ago = now - _LONG_AGO * (now - one.began) / max(one.runs, 1)
        for block in blocks:
            if self._sent_to[block] == holder and self._sent_at[block] < long_ago:
                self._sent_to[block] = None
                self._unsent += 1
                one.missed += 1
        if not self._passes_on(holder, now):
            self._release(holder)

    def _passes_on(self, client: C, now: float) -> bool:
        one = self._clients[client]
        if one.misses():
            # Those that ask may be those that lie: it is not to be said of most.
            accused = sum(other.misses() for other in self._clients.values())
            return 2 * accused > len(self._clients)
        # One that takes much and passes on nothing says nothing of the others.
        others = (other for other in self._clients.values() if not other.misses())
        fastest = max(other.pace(now) for other in others)
        asked = fastest * (now - one.began) / _MUCH_SLOWER
        return one.runs < _LEAST_HELD or one.runs > asked

    def _release(self, client: C) -> None:
        self._unsent += self._sent_to.count(client)
        self._sent_to = [None if holder == client else holder for holder in self._sent_to]


@dataclass
class _Client:
    """What a source knows of one that it sends to: `runs` since `began`."""

    began: float
    served: float = field(init=False)
    runs: int = 0
    missed: int = 0  # blocks that others have asked for again
    asked: dict[int, float] = field(default_factory=dict)  # when first for what others have got

    def __post_init__(self) -> None:
        self.served = self.began

    def misses(self) -> bool:
        return self.missed >= max(_LEAST_MISSED, self.runs / _PART_MISSED)

    def pace(self, now: float) -> float:
        # The first runs are asked for at once.
        return max(0, self.runs - _LEAST_HELD) / (now - self.began) if now > self.began else 0.0
