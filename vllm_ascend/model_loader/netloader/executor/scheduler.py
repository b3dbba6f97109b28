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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from .chunks.blocks import Blocks, Run

# What a session may hold in any case: one run under way and one asked for.
_LEAST_HELD = 2
# Seconds after which a source is asked again for what it wanted others to be asked for: when nobody
# who brings something has it, and else.
_ASK_AGAIN, _ASK_LATER = 0.1, 0.5
# Seconds for which a run is under way at least before another source is asked for it.
_SLOW = 1.0
# Seconds between two comparisons of what incomplete sources bring.
_REVIEW = 1.0
# Seconds without a run from a source after which it sends what it has sent to others before.
STARVED = 2.0
# How many turns that is at least, where each of its clients gets a run in turn.
_TURNS = 4
# How many times longer a client waits that passes on little.
_PATIENCE = 4
# Seconds without a run after which a source is not counted on for others' runs.
_ELSEWHERE = 1.0
# Part of the time so far, if that is less, for which a source is left to others that have brought.
_PART_RELIEVED = 16
# A client has passed on what it got when its source has sent so many runs more, or when this part
# of the time so far has gone, if that is less; but not before so many seconds.
_PASSED_ON, _PART_PASSED_ON, _LEAST_PASSED_ON = 32, 8, 0.2
# Of so many runs of a client one, and as many blocks at least, are missed by others before it is
# said to pass on little, and so many times as many as those of other clients. A block that is
# missed for so many times as long as it takes to pass one on counts for as many.
_PART_MISSED, _LEAST_MISSED, _MUCH_MORE = 16, 2, 2
# How many times longer than from another source a run takes from one that brings much less.
_MUCH_SLOWER = 3

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
        self._blocks = bytearray()  # of an incomplete one: 1 for each block that it has
        self._runs = 0  # of an incomplete one, by number, a bit for each, while it has a session
        self._declined = 0  # by number
        self._ask_again = 0.0
        self._prefers_others = False  # it has declined something, and `SOURCE` names it


class Scheduler:
    """Hands every run out once, and again when it comes back.

    Of the runs that a session's source has, those come first that the fewest incomplete sources
    have, as these can be passed on to most others. Sets of runs are integers with a bit for each
    run, so that a decision costs a few operations on such integers.

    Args:
        blocks: what is to be fetched.
        runs: all of them, in the order in which those come that are equally urgent. Clients with
            different orders do not all ask a source for the same run.
        clock: returns seconds.
    """

    def __init__(
        self, blocks: Blocks, runs: Iterable[Run], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._blocks = blocks
        self._clock = clock
        self._changed = threading.Condition()
        # A run's number says in which order runs come that are equally urgent.
        self._runs = [*runs]
        self._wanted = (1 << len(self._runs)) - 1
        self._urgent = 0  # that come at once when they are wanted
        # How many incomplete sources have a run: bit by bit, that of the least value first.
        self._having: list[int] = []
        self._number_of = array("q", [0]) * blocks.count  # by block
        for number, run in enumerate(self._runs):
            self._renumber(run, number)
        self._wanting = len(self._runs)
        self._left = len(self._runs)
        self._held: dict[Run, tuple[Peer, float]] = {}  # by whom, and since when
        self._sessions: Counter[Peer] = Counter()
        self._began = self._reviewed = clock()
        self._came = 0
        self._least: Peer | None = None  # of the incomplete sources, at the last review

    @property
    def finished(self) -> bool:
        """Whether every run is done."""
        return self._left == 0

    @contextlib.contextmanager
    def session(self, peer: Peer) -> Iterator[Peer]:
        """Count as one of those that share what is left, with a session's source."""
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
                if not peer.complete and 1 in peer._blocks:
                    self._count(peer, range(len(self._runs)))

    def end(self, peer: Peer) -> None:
        """Count a session no more."""
        with self._changed:
            self._sessions[peer] -= 1
            if not self._sessions[peer]:
                del self._sessions[peer]
                self._forget(peer)
                self._changed.notify_all()  # a slower one may be needed now

    def heard(self, peer: Peer, runs: Iterable[Run], *, complete: bool) -> None:
        """Record which blocks have come to the source of a session, which may yet begin."""
        with self._changed:
            if peer.complete:
                return
            if complete:
                self._forget(peer)
                peer.complete = True
                self._changed.notify_all()
                return
            blocks = peer._blocks = peer._blocks or bytearray(self._blocks.count)
            numbers = set()
            for first, last in runs:  # which may be any numbers
                at, end = first, min(last + 1, len(blocks))
                while (at := blocks.find(0, at, end)) >= 0:
                    blocks[at] = 1
                    numbers.add(self._number_of[at])
            if numbers and peer in self._sessions:
                if self._count(peer, numbers) & self._wanted:
                    peer._since = self._clock()
                self._changed.notify_all()  # what another one holds may be asked for here soon

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
            peer._declined |= 1 << number
            peer._prefers_others = peer.trusted
            now = self._clock()
            lacking = peer._declined
            for one in self._sessions:
                if one is not peer and now - one._got < _ELSEWHERE:
                    lacking &= 0 if one.complete else ~one._runs
            peer._ask_again = now + (_ASK_AGAIN if lacking else _ASK_LATER)
            self._want(number)
            self._changed.notify_all()

    def take(
        self, peer: Peer, limit: int, held: int = 0, max_bytes: int = sys.maxsize
    ) -> list[Run]:
        """Return runs to fetch, none if none is wanted at the moment.

        Of several sessions each has at most half of its fair share of what is left, so that towards
        the end a slow source is not left with runs that a fast one could have brought. With more
        than two, an incomplete source is asked for one at a time: what waits in its queue could
        come from others, and would be passed on from there sooner.

        Args:
            peer: the session's source.
            limit: number of runs not to exceed.
            held: number of runs that the session has taken and that have not come yet.
            max_bytes: size of a run that the session's source sends at most; larger ones are split.
        """
        with self._changed:
            count, sessions = min(limit, self._wanting), self._sessions.total()
            if sessions > 1:
                share = -(-self._wanting // (2 * sessions))
                count = min(count, max(share - held, _LEAST_HELD - held, 0))
                if sessions > _LEAST_HELD and not peer.complete:
                    count = min(count, max(1 - held, 0))
            taken: list[Run] = []
            while len(taken) < count and (number := self._best(peer)) is not None:
                taken.append(self._take(number, max_bytes))
            if taken:
                peer._since = self._clock()
                self._held.update(dict.fromkeys(taken, (peer, peer._since)))
            return taken

    def done(self, run: Run) -> None:
        """Record that a run that was taken is in place."""
        with self._changed:
            holder, since = self._held.pop(run)
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
            self._wanted &= ~(1 << self._number_of[run.first])
            self._wanting -= 1
            self._left -= 1

    @property
    def wanted(self) -> list[Run]:
        """The runs that nobody has taken."""
        with self._changed:
            bits = reversed(f"{self._wanted:b}")
            return [run for run, bit in zip(self._runs, bits, strict=False) if bit == "1"]

    def give_back(self, runs: Iterable[Run]) -> None:
        """Want runs again that were taken and did not arrive."""
        with self._changed:
            for run in runs:
                self._held.pop(run, None)
                number = self._number_of[run.first]
                self._urgent |= 1 << number
                self._want(number)
            self._changed.notify_all()

    def wait(self, peer: Peer, timeout: float) -> None:
        """Return when the source has a run that is wanted, or no more news, or all are done.

        Args:
            peer: the session's source.
            timeout: seconds after which it returns in any case.
        """

        def over() -> bool:
            return self._left == 0 or peer.failure is not None or self._best(peer) is not None

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

    def _elsewhere(self, peer: Peer) -> Iterator[tuple[float, Peer]]:
        """Yield who holds what this source has, too, and from when on that is to be given up."""
        if not peer.seconds:
            return
        now = self._clock()
        spared: dict[Peer, bool] = {}
        for run, (holder, since) in self._held.items():
            if holder is peer or holder.cut is None:
                continue
            number = self._number_of[run.first]
            if self._has(peer, number) and not peer._declined >> number & 1:
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
        lacking = self._wanted
        for run, (by, _) in self._held.items():
            if by is peer:
                lacking |= 1 << self._number_of[run.first]
        for other in others:
            lacking &= ~other._runs
        return lacking != 0

    def asks_again(self, peer: Peer) -> float | None:
        """Return when a source that wants others to be asked is asked again; None: now."""
        again = max(peer._ask_again if peer._declined else 0.0, self._relieved_until(peer))
        return again if self._clock() < again else None

    def _relieved_until(self, peer: Peer) -> float:
        """Return until when a source that feeds many is left to those that bring as much."""
        if not peer._prefers_others:
            return 0.0
        brought = max(
            (
                one._got
                for one in self._sessions
                if one.complete
                and not one.trusted
                and 0 < one.seconds <= _MUCH_SLOWER * peer.seconds
            ),
            default=self._began,
        )
        return brought + min((brought - self._began) / _PART_RELIEVED, _ELSEWHERE)

    def _best(self, peer: Peer) -> int | None:
        if (until := self._relieved_until(peer)) and self._clock() < until:
            return None
        there = self._wanted if peer.complete else self._wanted & peer._runs
        if peer._declined:  # what was declined comes last
            if accepted := there & ~peer._declined:
                there = accepted
            elif self._clock() < peer._ask_again:
                return None
            else:
                peer._declined = 0
        if not there:
            return None
        there = there & self._urgent or _least(self._having, there)
        number = (there & -there).bit_length() - 1
        return None if self._comes_sooner(peer, number) else number

    def _comes_sooner(self, peer: Peer, number: int) -> bool:
        """Return whether all that is left will have come from others before a run from a source."""
        if len(self._sessions) == 1 or not peer.seconds or not self._came:
            return False
        interval = (self._clock() - self._began) / self._came
        return peer.seconds > _MUCH_SLOWER * interval * (self._wanting + 1) and any(
            0 < _MUCH_SLOWER * other.seconds < peer.seconds and self._has(other, number)
            for other in self._sessions
        )

    def _take(self, number: int, max_bytes: int) -> Run:
        self._wanted ^= 1 << number
        self._wanting -= 1
        first, *others = self._blocks.split(self._runs[number], max_bytes)
        if others:
            self._runs[number] = first
            parts = range(len(self._runs), len(self._runs) + len(others))
            self._runs += others
            for part, run in zip(parts, others, strict=True):
                self._renumber(run, part)
                self._urgent |= 1 << part
                self._want(part)
            self._left += len(others)
            for peer in self._sessions:
                if peer._blocks and not peer.complete:
                    self._count(peer, [number, *parts])
        return first

    def _want(self, number: int) -> None:
        self._wanted |= 1 << number
        self._wanting += 1

    def _has(self, peer: Peer, number: int) -> bool:
        return peer.complete or bool(peer._runs >> number & 1)

    def _renumber(self, run: Run, number: int) -> None:
        numbers = array("q", [number]) * (run.last - run.first + 1)
        self._number_of[run.first : run.last + 1] = numbers

    def _count(self, peer: Peer, numbers: Iterable[int]) -> int:
        """Let an incomplete source count for those runs that it has; return which are new."""
        there = bytearray(len(self._runs) // 8 + 1)  # an integer is slow to grow bit by bit
        for number in numbers:
            run = self._runs[number]
            if peer._blocks.find(0, run.first, run.last + 1) < 0:
                there[number // 8] |= 1 << number % 8
        news = int.from_bytes(there, "little")
        news &= ~peer._runs
        peer._runs |= news
        carried = news
        for place, bits in enumerate(self._having):
            self._having[place], carried = bits ^ carried, bits & carried
        if carried:
            self._having.append(carried)
        return news

    def _forget(self, peer: Peer) -> None:
        """Let an incomplete source count no more."""
        borrowed, peer._runs = peer._runs, 0
        for place, bits in enumerate(self._having):
            self._having[place], borrowed = bits ^ borrowed, ~bits & borrowed


def _least(counts: Sequence[int], among: int) -> int:
    """Return those of a set whose counts, given bit by bit, are least."""
    for bits in reversed(counts):
        among = among & ~bits or among
    return among


class FirstCopy(Generic[C]):
    """Decides whether a source sends a run now: each block once before it sends one twice.

    As long as there are blocks that it has sent to nobody, a client gets those, and is to ask
    others for the rest. Once everything has been sent to somebody, a client gets what it still asks
    for: whoever got it may be slow, or lie. The next one does only when that one has had time to
    pass it on. A client that is told to ask others for a while, and for some turns of all clients,
    gets what it asks for: it may reach nobody else. If meanwhile nobody got what nobody had, that
    counts as sent: all that are here have it from others.

    Where others ask for a client's blocks long after it got them, and for those of other clients
    much less, it passes on little or nothing. It is to ask others, and waits longer until it gets
    what it asks for, unless nobody else got anything for a while.

    Args:
        count: number of blocks.
        clock: returns seconds.
    """

    def __init__(self, count: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = clock()
        self._runs = 0
        self._news, self._last_news = 0, self._began  # runs that nobody had, and when one was sent
        self._unwanted = False  # what is unsent
        # To whom a block was sent last, and when; None: nobody has it from here.
        self._sent: list[tuple[C, float] | None] = [None] * count
        self._unsent = {*range(count)}
        self._clients: dict[C, _Client] = {}

    def sends(self, client: C, run: Run) -> bool:
        """Return whether a client gets a run that it asks for; it counts as sent then."""
        now = self._clock()
        if not self._clients:  # nobody was there for a while
            self._began, self._runs = now, 0
            self._news, self._last_news = 0, now
        me = self._clients.setdefault(client, _Client(now, now))
        blocks = range(run.first, run.last + 1)
        others = {
            block: sent
            for block in blocks
            if (sent := self._sent[block]) is not None and sent[0] != client
        }
        part = min(1 / _PART_PASSED_ON, _PASSED_ON / max(self._runs, 1))
        passed_on = max(_LEAST_PASSED_ON, part * (now - self._began))
        # What one gets whose turn comes as often as that of others. Runs that are sent again do not
        # count, as these wait for it.
        turn = len(self._clients) * (self._last_news - self._began) / max(self._news, 1)
        passes_on = self._passes_on(me, now)
        patience = max(STARVED, _TURNS * turn) * (1 if passes_on else _PATIENCE)
        if me.refused is None or now - me.refused < patience:
            if not self._unsent or self._unwanted:
                refused = any(now - when <= min(passed_on, STARVED) for _, when in others.values())
            else:
                long = max(passed_on, 2 * turn)
                for block, (holder, when) in others.items():
                    if me.began <= when < now - long and holder in self._clients:
                        self._clients[holder].misses(block, (now - when) / long)
                refused = bool(others)
            if refused or not passes_on:
                me.refused = now if me.refused is None else me.refused
                return False
        elif self._last_news <= me.refused:
            self._unwanted = True
        if not self._unsent.isdisjoint(blocks):
            self._unsent.difference_update(blocks)
            self._news, self._last_news, self._unwanted = self._news + 1, now, False
        me.served, me.refused = now, None
        me.runs += 1
        self._runs += 1
        self._sent[run.first : run.last + 1] = [(client, now)] * len(blocks)
        return True

    def gone(self, client: C, *, complete: bool = False) -> None:
        """Record that a client asks no more; unless `complete`, it passes on nothing either."""
        if self._clients.pop(client, None) is not None and not complete:
            self._sent = [None if sent and sent[0] == client else sent for sent in self._sent]

    def _passes_on(self, one: "_Client", now: float) -> bool:
        others = [other for other in self._clients.values() if other is not one]
        if all(now - other.served > STARVED for other in others):
            return True  # at least it is nobody's loss
        if one.missing < max(_LEAST_MISSED, one.runs / _PART_MISSED):
            return True
        # Those that ask may be those that lie, and all may be slow to pass something on. So only
        # those do not that are missed much more than the others.
        missing, runs = sum(other.missing for other in others), sum(other.runs for other in others)
        return one.missing * runs <= _MUCH_MORE * missing * one.runs


@dataclass
class _Client:
    """What a source knows of one that it sends to.

    Attributes:
        began: when it asked first.
        served: when it got something last.
        refused: since when it has been told to ask others; None: it has not, since then.
        runs: that it got.
        missing: how many times as long as it takes to pass one on others have missed its blocks.
    """

    began: float
    served: float
    refused: float | None = None
    runs: int = 0
    missing: float = 0.0
    _missed: dict[int, float] = field(default_factory=dict)  # by block

    def misses(self, block: int, times: float) -> None:
        """Count a block that others ask for."""
        more = times - self._missed.get(block, 0.0)
        if more > 0:
            self._missed[block] = times
            self.missing += more
