"""Simulates a fleet that loads one model: NetLoader's own decisions, in virtual time.

The scheduler, the queue of sources, the book of peers and the rule for first copies are the ones
that clients and servers use; this module stands in the place of their threads and of the network.

Each node has an up link and a down link. An up link sends chunk after chunk, in turn for each of
its sessions that wants one; a down link takes them in the order in which they were sent. Only links
and latency take time. So it does not show what processors, memory and system calls cost.
"""

import argparse
import gc
import json
import random
import time
from array import array
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from heapq import heappop, heappush
from pathlib import Path
from typing import Any

from vllm_ascend.model_loader.netloader.config import NetLoaderConfig
from vllm_ascend.model_loader.netloader.errors import (
    MakesRoom,
    SourceBusy,
    SourceError,
    SourceLost,
    SourceUnreachable,
    TransferCorrupt,
)
from vllm_ascend.model_loader.netloader.executor.chunks.blocks import BLOCK_BYTES, Blocks, Run
from vllm_ascend.model_loader.netloader.executor.elastic_load import _IDLE as IDLE
from vllm_ascend.model_loader.netloader.executor.elastic_load import _TRY_ANOTHER as TRY_ANOTHER
from vllm_ascend.model_loader.netloader.executor.scheduler import FirstCopy, Peer, Scheduler
from vllm_ascend.model_loader.netloader.executor.transport.http import HttpReceiver
from vllm_ascend.model_loader.netloader.interaction import api
from vllm_ascend.model_loader.netloader.interaction.peer_book import PeerBook
from vllm_ascend.model_loader.netloader.interaction.source_queue import SourceQueue
from vllm_ascend.model_loader.netloader.loading.sessions import _FIRST_QUESTION as FIRST_QUESTION
from vllm_ascend.model_loader.netloader.loading.sessions import _LAST_QUESTION as LAST_QUESTION
from vllm_ascend.model_loader.netloader.serve import _LINGER as LINGER
from vllm_ascend.model_loader.netloader.serve import _PLACES_WHILE_LOADING as PLACES_WHILE_LOADING
from vllm_ascend.model_loader.netloader.utils import Address

CONFIG = NetLoaderConfig(source={})
WEIGHTS = "weights"
LATENCY = 0.0001  # seconds, one way
CONNECT = 0.001  # seconds from a connection to the answer to a join
RETRY_AFTER = 1.0  # seconds that a busy source asks for


@dataclass(frozen=True)
class Case:
    """One fleet.

    Attributes:
        replicas: that load.
        chunks: of the model.
        chunks_per_second: of a link of the ordinary speed.
        speeds: of links, relative to that one, drawn for each replica; the seed has the first.
        within: seconds within which the replicas start.
        killed: part of the replicas that die at half of the time of one load.
        stalled: part that stops sending then, and keeps its connections.
        lying: part that says that it has everything, and sends wrong bytes.
        slow: part whose links are ten times slower than the ordinary ones.
        seed_dies: when the seed has sent so many copies; 0: never.
        preparing: seconds after its load for which a replica serves nothing.
        seed: of everything random.
    """

    replicas: int
    chunks: int = 4096
    chunks_per_second: float = 300.0
    speeds: Sequence[float] = (1.0,)
    within: float = 0.05
    killed: float = 0.0
    stalled: float = 0.0
    lying: float = 0.0
    slow: float = 0.0
    seed_dies: float = 0.0
    preparing: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Result:
    """What has become of a fleet.

    Attributes:
        relative: the longest load of an honest replica that lived, in loads that it would have
            taken alone.
        median: the middle one.
        seed_copies: what the seed sent, in copies of the model.
        complete: honest replicas that lived and got everything.
        honest: those that lived.
        fallbacks: reasons of those that gave up, and how many have each.
        repeated: chunks that the seed sent again while it had some that it had sent to nobody.
        twice: chunks that a replica asked for again though nothing had gone wrong.
        most_sessions: that one source served at once.
        most_sources: that one replica pulled from at once.
        declined: requests that a source wanted others to be asked.
        joins: attempts to join, for each replica.
        seconds: of a processor that the simulation took.
    """

    relative: float
    median: float
    seed_copies: float
    complete: int
    honest: int
    fallbacks: dict[str, int]
    repeated: int
    twice: int
    most_sessions: int
    most_sources: int
    declined: int
    joins: float
    seconds: float


class Node:
    """A replica, or the seed: what its client and its server have between them."""

    def __init__(self, fleet: "Fleet", name: str, speed: float) -> None:
        self.address = Address(name, 1)
        self.peer = api.Peer(str(self.address), name)
        self.speed = speed
        self.seconds = 1 / (fleet.case.chunks_per_second * speed)  # of a chunk, on its links
        self.began = 0.0
        self.finished: float | None = None
        self.lingers = False
        self.alive = True
        self.lying = False
        self.stalled = False
        self.offers = self.complete = False
        self.reason = ""
        self.came: list[Run] = []
        self.tells = False
        # By chunk: how often it may be asked for, while nothing goes wrong.
        self.may_ask = array("i", [1]) * fleet.case.chunks
        self.queue: SourceQueue | None = None
        self.scheduler: Scheduler | None = None
        self.book = PeerBook(fleet.clock)
        self.first: FirstCopy[str] = FirstCopy(fleet.case.chunks, fleet.clock)
        self.ups: dict[Session, None] = {}
        self.downs: dict[Session, None] = {}
        self.joining = 0
        self.polls_at: float | None = None
        # Links
        self.ring: deque[Session] = deque()
        self.sending = False
        self.pumps_at: float | None = None
        self.down_free = 0.0


class Session:
    """A client pulls from a source."""

    def __init__(self, client: Node, source: Node, peer: Peer) -> None:
        self.client = client
        self.source = source
        self.peer = peer
        self.alive = True
        self.held: deque[Run] = deque()
        self.asked: deque[tuple[float, Run]] = deque()
        self.wrong: set[Run] = set()
        self.since = 0
        self.asks_again = False
        self.leaves = False
        self.brought = False
        self.last = 0.0


class Fleet:
    """One case, from the first join to the last end."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.now = 0.0
        self.clock: Callable[[], float] = lambda: self.now
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._number = 0
        self.random = random.Random(case.seed)
        self.blocks = Blocks([case.chunks * BLOCK_BYTES])
        self.runs = self.blocks.cut(BLOCK_BYTES)  # the same for all: they would fill much memory
        self.solo = case.chunks / case.chunks_per_second
        self.seed = Node(self, "seed", case.speeds[0])
        self.seed.offers = self.seed.complete = True
        slow = round(case.slow * case.replicas)
        self.replicas = [
            *(Node(self, f"slow{index}", 0.1) for index in range(slow)),
            *(
                Node(self, f"replica{index}", self.random.choice(case.speeds))
                for index in range(case.replicas - slow)
            ),
        ]
        self.nodes = {node.address: node for node in (self.seed, *self.replicas)}
        self.sent_by_seed = self.repeated = self.twice = self.declines = self.joins = 0
        self.most_sessions = self.most_sources = 0
        self._seed_sent = bytearray(case.chunks)

    def run(self) -> Result:
        """Let everything happen."""
        began = time.process_time()
        case = self.case
        unlucky = self.random.sample(
            self.replicas, round((case.killed + case.stalled + case.lying) * case.replicas)
        )
        for node in self.replicas:
            self.at(self.random.uniform(0, case.within), self._start, node)
        for index, node in enumerate(unlucky):
            if index < round(case.killed * case.replicas):
                self.at(self.solo * self.random.uniform(0.4, 0.6), self._die, node)
            elif index < round((case.killed + case.stalled) * case.replicas):
                self.at(self.solo * self.random.uniform(0.4, 0.6), self._stall, node)
            else:
                node.lying = True
        events = self._events
        while events:
            self.now, _, what, arguments = heappop(events)
            what(*arguments)
        honest = [n for n in self.replicas if n.alive and not n.lying and not n.stalled]
        loads = sorted(self._relative(node) for node in honest if node.finished is not None)
        return Result(
            relative=round(loads[-1], 3) if loads else 0.0,
            median=round(loads[len(loads) // 2], 3) if loads else 0.0,
            seed_copies=round(self.sent_by_seed / case.chunks, 3),
            complete=len(loads),
            honest=len(honest),
            fallbacks=dict(Counter(node.reason for node in honest if node.finished is None)),
            repeated=self.repeated,
            twice=self.twice,
            most_sessions=self.most_sessions,
            most_sources=self.most_sources,
            declined=self.declines,
            joins=round(self.joins / case.replicas, 1),
            seconds=round(time.process_time() - began, 1),
        )

    def at(self, when: float, what: Callable[..., None], *arguments: Any) -> None:
        """Let something happen."""
        self._number += 1
        heappush(self._events, (when, self._number, what, arguments))

    def _relative(self, node: Node) -> float:
        assert node.finished is not None
        return (node.finished - node.began) / (self.solo / min(node.speed, self.seed.speed))

    # Whom to ask: see `loading.sessions.Sessions`

    def _start(self, node: Node) -> None:
        if node.alive:
            node.began = self.now
            node.queue = SourceQueue(
                [self.seed.address],
                CONFIG.source_wait,
                self.clock,
                self.random.uniform,
                most_hearsay=CONFIG.max_sources - 1,
            )
            self._poll(node)

    def _poll(self, node: Node) -> None:
        queue = node.queue
        if queue is None or not node.alive:
            return
        while self._idle(node):
            if (address := queue.poll()) is None:
                break
            node.joining += 1
            self.at(self.now + CONNECT, self._join, node, self.nodes[address])
        else:
            return
        if queue.over.is_set():
            if node.finished is None:
                node.reason = "; ".join(queue.reasons()) or "there are no sources"
        elif (pause := queue.pause()) is not None:
            when = self.now + pause + 1e-6
            if node.polls_at is None or when < node.polls_at or node.polls_at <= self.now:
                node.polls_at = when
                self.at(when, self._poll_at, node, when)

    def _poll_at(self, node: Node, when: float) -> None:
        if node.polls_at == when:
            node.polls_at = None
            self._poll(node)

    def _join(self, node: Node, source: Node) -> None:
        self.joins += 1
        queue = node.queue
        assert queue is not None
        if not node.alive or queue.over.is_set():
            node.joining -= 1
            return
        if source.stalled:
            self.at(
                self.now + CONFIG.handshake_timeout,
                self._refused,
                node,
                source,
                SourceLost("silent"),
            )
            return
        if not source.alive:
            self._refused(node, source, SourceUnreachable("connection refused"))
            return
        places = CONFIG.max_sessions * (1 if source.complete else PLACES_WHILE_LOADING)
        if len(source.ups) >= places or not source.offers:
            reason = "busy" if len(source.ups) >= places else "loading"
            source.book.know(WEIGHTS, node.peer)
            named = self._others(source, node) if source.came or source.complete else []
            peers = tuple((peer.address, peer.instance) for peer in named)
            error = SourceBusy(reason, reason, 0.0 if reason == "loading" else RETRY_AFTER, peers)
            self._refused(node, source, error)
            return
        node.joining -= 1
        self._hears(source, node.peer)
        trusted = source.complete and not queue.is_hearsay(source.address)
        session = Session(node, source, Peer(complete=source.complete, trusted=trusted))
        session.peer.cut = lambda: self._fail(session, SourceBusy("slow"))
        source.book.know(WEIGHTS, node.peer, session)
        named = self._others(source, node)
        source.ups[session] = node.downs[session] = None
        self.most_sessions = max(self.most_sessions, len(source.ups))
        self.most_sources = max(self.most_sources, len(node.downs))
        queue.joined(source.address, source.peer.instance)
        if node.scheduler is None:
            runs = [*self.runs]
            self.random.shuffle(runs)
            node.scheduler = Scheduler(self.blocks, runs, self.clock)
            node.offers = True
            self.at(self.now + FIRST_QUESTION, self._ask_for_peers, node, FIRST_QUESTION)
            if node.lying:
                node.came = [Run(0, self.case.chunks - 1)]
        node.book.know(WEIGHTS, source.peer, complete=source.complete)
        for peer in named:
            self._hears(node, peer)
        node.scheduler.begin(session.peer)
        if not session.peer.complete:
            self._news(session)
        self._request(session)
        self._poll(node)

    def _ask_for_peers(self, node: Node, pause: float) -> None:
        """Ask now and then who else gets the same weights: see `keep_asking`."""
        assert node.queue is not None
        if node.queue.over.is_set() or not node.alive:
            return
        pause = min(2 * pause, LAST_QUESTION)
        self.at(self.now + pause, self._ask_for_peers, node, pause)
        if node.downs:
            source = self.random.choice([*node.downs]).source
            if source.alive and not source.stalled:
                there = {session.client.peer.address for session in source.ups}
                for peer in source.book.others(WEIGHTS, None, there):
                    self._hears(node, peer)

    def _others(self, source: Node, node: Node) -> list[api.Peer]:
        there = {session.client.peer.address for session in source.ups}
        return source.book.others(WEIGHTS, node.peer.address, there)

    def _hears(self, node: Node, peer: api.Peer) -> None:
        if node.queue is not None and peer.instance != node.peer.instance:
            node.queue.heard(Address(peer.instance, 1), peer.instance)
            self._poll(node)

    def _refused(self, node: Node, source: Node, error: SourceError) -> None:
        node.joining -= 1
        self._failed(node, source, error)

    def _failed(self, node: Node, source: Node, error: SourceError, brought: bool = False) -> None:
        queue = node.queue
        if queue is None or queue.over.is_set() or not node.alive:
            return
        queue.failed(source.address, error, soon=brought and error.code in ("", "preparing"))
        for _, instance in error.peers:
            self._hears(node, api.Peer(instance, instance))
        self._poll(node)

    # What to pull: see `executor.elastic_load`

    def _request(self, session: Session) -> None:
        client = session.client
        scheduler = client.scheduler
        assert scheduler is not None
        if session.alive and self._makes_room(session):
            if not session.held:
                self._fail(session, MakesRoom("others may bring more"))
            return
        while session.alive and len(session.held) <= HttpReceiver.ahead - HttpReceiver.batch:
            runs = scheduler.take(session.peer, HttpReceiver.batch, len(session.held))
            if not runs:
                if not session.held and not session.leaves:
                    self._may_leave(session)
                when = scheduler.asks_again(session.peer)
                if when is not None and not session.asks_again:
                    session.asks_again = True
                    self.at(when, self._ask_again, session)
                return
            for run in runs:
                session.held.append(run)
                session.asked.append((self.now + LATENCY, run))
                client.may_ask[run.first] -= 1
                self.twice += client.may_ask[run.first] < 0
            if len(session.asked) == len(runs):
                session.source.ring.append(session)
                self._pump_at(session.source, self.now + LATENCY)

    def _makes_room(self, session: Session) -> bool:
        client = session.client
        assert client.scheduler is not None
        assert client.queue is not None
        if not session.peer.makes_room:
            session.peer.makes_room = client.scheduler.brings_least(
                session.peer
            ) and client.queue.lacks_threads(self._idle(client))
        return session.peer.makes_room

    def _idle(self, client: Node) -> int:
        return CONFIG.max_sources - len(client.downs) - client.joining

    def _may_leave(self, session: Session) -> None:
        session.leaves = False
        scheduler = session.client.scheduler
        assert scheduler is not None
        if not session.alive or session.held or scheduler.finished:
            return
        if (cut := scheduler.slow(session.peer)) is not None:
            cut()
        client = session.client
        assert client.queue is not None
        longest = TRY_ANOTHER
        if not client.queue.lacks_threads(self._idle(client)):
            longest = IDLE * CONFIG.progress_timeout / 3
        if scheduler.idle_for(session.peer) >= longest:
            self._fail(session, SourceBusy("has no blocks just now that are wanted"))
        elif session.alive and not session.held and not session.leaves:
            session.leaves = True
            self.at(self.now + TRY_ANOTHER, self._may_leave, session)

    def _ask_again(self, session: Session) -> None:
        session.asks_again = False
        self._request(session)

    def _request_all(self, client: Node) -> None:
        for session in [*client.downs]:
            if not session.held:  # else it waits for what it has asked for
                self._request(session)

    def _declined(self, session: Session) -> None:
        if session.alive:
            run = session.held.popleft()
            session.client.may_ask[run.first] += 1
            assert session.client.scheduler is not None
            session.client.scheduler.declined(session.peer, run)
            self._request_all(session.client)

    def _delivered(self, session: Session) -> None:
        if not session.alive:
            return
        client = session.client
        scheduler = client.scheduler
        assert scheduler is not None
        run = session.held[0]
        if session.source.lying:
            client.may_ask[run.first] += 1
            if run in session.wrong or not session.peer.trusted:
                self._fail(session, TransferCorrupt("wrong bytes"))
                return
            session.wrong.add(session.held.popleft())
            scheduler.give_back([run])
            self._request_all(client)
            return
        session.held.popleft()
        session.brought = True
        self._request(session)  # so that the next one is on its way while this one is checked
        if not client.lying:
            client.came.append(run)
            if client.ups and not client.tells:
                client.tells = True
                self.at(self.now + LATENCY, self._tell, client)
        scheduler.done(run)
        if client.queue is not None:
            client.queue.progressed()
        if scheduler.finished:
            self._finish(client)

    def _tell(self, source: Node) -> None:
        source.tells = False
        for session in [*source.ups]:
            if session.alive and not session.peer.complete:
                self._news(session)

    def _news(self, session: Session) -> None:
        """Let a client hear what has come to its source: see `Sessions._news_of`."""
        source, client = session.source, session.client
        runs = source.came[session.since :]
        session.since = len(source.came)
        assert client.scheduler is not None
        client.scheduler.heard(session.peer, runs, complete=False)
        if not session.held:
            self._request(session)

    def _finish(self, node: Node) -> None:
        assert node.queue is not None
        node.queue.succeeded()
        for session in [*node.downs]:
            session.source.book.complete(node.peer)
            session.source.book.left(node.peer, session, complete=True)
            session.source.first.gone(node.peer.address, complete=True)
            self._close(session)
        node.offers, node.lingers = False, True
        if node.ups:
            self.at(self.now + LINGER * (self.now - node.began), self._prepare, node)
        else:
            self._prepare(node)

    def _prepare(self, node: Node) -> None:
        if not node.lingers or not node.alive:
            return
        node.lingers = False
        node.finished = self.now
        for session in [*node.ups]:
            self._fail(session, SourceBusy("preparing", "preparing", RETRY_AFTER))
        self.at(self.now + self.case.preparing, self._serve, node)

    def _serve(self, node: Node) -> None:
        if node.alive:
            node.offers = node.complete = True

    def _fail(self, session: Session, error: SourceError) -> None:
        if not session.alive:
            return
        self._close(session)
        client, source = session.client, session.source
        gone = source.book.left(client.peer, session)
        source.first.gone(client.peer.address, complete=not gone)
        for run in session.held:
            client.may_ask[run.first] += 1
        assert client.scheduler is not None
        client.scheduler.give_back(session.held)
        if client.alive:
            self._failed(client, source, error, session.brought)
            self._request_all(client)

    def _close(self, session: Session) -> None:
        session.alive = False
        del session.source.ups[session], session.client.downs[session]
        if not session.source.ups:
            session.source.first = FirstCopy(self.case.chunks, self.clock)
            self._prepare(session.source)
        assert session.client.scheduler is not None
        session.client.scheduler.end(session.peer)

    # What the network does

    def _pump_at(self, node: Node, when: float) -> None:
        if not node.sending and (node.pumps_at is None or when < node.pumps_at):
            node.pumps_at = when
            self.at(when, self._pump_now, node, when)

    def _pump_now(self, node: Node, when: float) -> None:
        if node.pumps_at == when:
            node.pumps_at = None
            self._pump(node)

    def _sent(self, node: Node) -> None:
        node.sending = False
        self._pump(node)

    def _pump(self, node: Node) -> None:
        """Send the next chunk, in turn for each session that wants one."""
        ring = node.ring
        soonest: float | None = None
        for _ in range(len(ring)):
            if node.sending or node.stalled or not node.alive:
                return
            session = ring.popleft()
            if not session.alive:
                continue
            ready, run = session.asked[0]
            if ready > self.now:
                ring.append(session)
                soonest = ready if soonest is None else min(soonest, ready)
                continue
            session.asked.popleft()
            self._send(session, run)
            if session.asked:
                ring.append(session)
        if ring and not node.sending:
            self._pump_at(node, self.now if soonest is None else soonest)

    def _send(self, session: Session, run: Run) -> None:
        source, client = session.source, session.client
        if not self._sends(source, client, run):
            self.declines += 1
            session.last = max(session.last, self.now + LATENCY)
            self.at(session.last, self._declined, session)
            return
        if source is self.seed:
            self.sent_by_seed += 1
            self.repeated += self._seed_sent[run.first] and 0 in self._seed_sent
            self._seed_sent[run.first] = 1
            if self.case.seed_dies and self.sent_by_seed >= self.case.seed_dies * self.case.chunks:
                self.at(self.now, self._die, source)
        source.sending = True
        until = self.now + source.seconds
        self.at(until, self._sent, source)
        client.down_free = max(client.down_free, self.now) + client.seconds
        session.last = max(session.last, until + LATENCY, client.down_free + LATENCY)
        self.at(session.last, self._delivered, session)

    def _sends(self, source: Node, client: Node, run: Run) -> bool:
        """Say whether a client gets a run, or asks others: see `serve.WeightServer._sends`."""
        return not source.complete or source.first.sends(client.peer.address, run)

    def _die(self, node: Node) -> None:
        if node.alive and (node.finished is None or node is self.seed):
            node.alive = node.offers = False
            for session in [*node.downs]:
                self._fail(session, SourceLost("the client is gone"))
            for session in [*node.ups]:
                self._fail(session, SourceLost("connection reset"))

    def _stall(self, node: Node) -> None:
        if node.alive and node.finished is None:
            node.stalled = True
            for session in [*node.ups]:
                self.at(
                    self.now + CONFIG.progress_timeout, self._fail, session, SourceLost("silent")
                )


def simulate(case: Case) -> Result:
    """Return what becomes of a fleet; the same for the same case."""
    gc.disable()  # there are millions of objects and few cycles
    try:
        return Fleet(case).run()
    finally:
        gc.enable()


def cases(seed: int) -> dict[str, Case]:
    """Return the cases of the table, by name."""
    mixed = (1.0, 1.0, 1.0, 1.0, 0.5, 2.5)
    hundred = Case(100, speeds=mixed, seed=seed)
    small = Case(8, chunks=256, chunks_per_second=24.0, seed=seed)  # as in `fleet`
    return {
        "1 replica": Case(1, seed=seed),
        "2 replicas": Case(2, seed=seed),
        "8 replicas": Case(8, seed=seed),
        "8 replicas, one has a slow link": replace(small, slow=1 / 8),
        "8 replicas, one lies": replace(small, lying=1 / 8),
        "100 replicas, equal links": Case(100, seed=seed),
        "100 replicas": hundred,
        "100 replicas, 10 % die": replace(hundred, killed=0.1),
        "100 replicas, 5 % stall": replace(hundred, stalled=0.05),
        "100 replicas, 5 % lie": replace(hundred, lying=0.05),
        "100 replicas, seed dies after 1.1 copies": replace(hundred, seed_dies=1.1),
        "1000 replicas": replace(hundred, replicas=1000),
        "1000 replicas, 10 % die": replace(hundred, replicas=1000, killed=0.1),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--case", action="append", help="only those whose name begins so")
    options = parser.parse_args()
    results = {}
    print("| case | time | median | seed's copies | complete | joins each | declined | took |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, case in cases(options.seed).items():
        if options.case and not name.startswith(tuple(options.case)):
            continue
        results[name] = result = simulate(case)
        print(
            f"| {name} | {result.relative:.2f} | {result.median:.2f} | {result.seed_copies:.2f} | "
            f"{result.complete} of {result.honest} | {result.joins:.1f} | {result.declined} | "
            f"{result.seconds:.0f} s |",
            flush=True,
        )
        for reason, count in result.fallbacks.items():
            print(f"  {count} x {reason}"[:300])
    if options.json:
        options.json.write_text(
            json.dumps({name: asdict(result) for name, result in results.items()}, indent=2)
        )


if __name__ == "__main__":
    main()
