"""What the threads of one load do with its sources."""

import contextlib
import math
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping

import msgspec

from .. import metrics
from ..config import NetLoaderConfig, Transport
from ..errors import (
    MakesRoom,
    ProtocolError,
    SourceBusy,
    SourceError,
    SourceLost,
    SourceRefused,
    SourceUnreachable,
    TransferCorrupt,
)
from ..executor.chunks.blocks import Run
from ..executor.chunks.digests import is_of_instance, is_one_of, of_instance
from ..executor.devices import Accelerator, Device
from ..executor.elastic_load import P2PLoad, Receiver
from ..executor.scheduler import Peer, Scheduler
from ..executor.store import BlockStore
from ..executor.transport.group import CLIENT, GroupReceiver, TransferGroup, form_group
from ..executor.transport.http import HttpReceiver
from ..identity import ModelIdentity, Revision
from ..interaction import api
from ..interaction.api import Code, Done, Join, Joined, Status
from ..interaction.elastic import ElasticClient, GroupControl
from ..interaction.source_queue import SourceQueue
from ..utils import Address, logger, one_line, parse_address, shortened, size
from .target import Postponed, Relay, Target

# Seconds between two questions for others that get the same weights: at first, and at most.
_FIRST_QUESTION, _LAST_QUESTION = 1.0, 10.0
# Connections for news that are made anew in a session, as they hold no place at the source.
_NEWS_AGAIN = 2
# Seconds, at least and at most, after which an incomplete source is asked to form a group again.
_FORM_AGAIN = 0.02, 0.1
# Seconds without news in a group after which another source is asked, with which one has to form.
_TRY_ANOTHER = 3.0
# Seconds to wait for a group that this rank forms with another one.
_TURN = 2.0
# Seconds between two looks at threads of a session that is over, and for those of no use to end.
_LOOK, _LEAVE = 0.05, 0.2
# Times PROGRESS_TIMEOUT for a run to come from a source that may send a byte now and then.
_OVERDUE = 3
# Times PROGRESS_TIMEOUT, at least and at most, without news of sources that all load themselves.
_ORPHANED = 1.0, 3.0
_ITSELF = "this is the instance itself"
# What a failure without a code is called among the metrics; the first that fits.
_KINDS = {
    SourceUnreachable: "unreachable",
    SourceLost: "lost",
    MakesRoom: "left",
    SourceBusy: "later",
    ProtocolError: "protocol_error",
    TransferCorrupt: "wrong_bytes",
}


def connect(address: Address, config: NetLoaderConfig) -> ElasticClient:
    """Connect as a client with this configuration does.

    Raises:
        SourceUnreachable: it cannot be reached.
    """
    return ElasticClient.connect(
        address,
        connect=config.connect_timeout,
        handshake=config.handshake_timeout,
        progress=config.progress_timeout,
        credentials=config.credentials,
    )


def status_of(address: Address, config: NetLoaderConfig) -> Status:
    """Ask a rank for its status.

    Raises:
        SourceError: it does not answer.
    """
    with connect(address, config) as client:
        return client.status()


class Sessions:
    """What the threads of one load do: ask one source after the other, and pull from it."""

    def __init__(
        self,
        queue: SourceQueue,
        target: Target,
        identity: ModelIdentity,
        config: NetLoaderConfig,
        device: Device,
        worker: int,
        wanted: str | None,
        relay: Relay | None,
    ) -> None:
        self._queue = queue
        self._relay = relay
        self._peer = relay.peer if relay is not None else None
        target.met = self._met
        target.feeds = self.feeds
        self._target = target
        self._identity = identity
        self._config = config
        self._device = device
        self._worker = worker
        self._wanted = wanted
        self._lock = threading.Lock()
        # By source and weights digest: those that go on, and the bytes of those that are over.
        self._pulls: list[tuple[tuple[Address, str], P2PLoad]] = []
        self._gave: Counter[tuple[Address, str]] = Counter()
        self._over_http: list[tuple[Address, _HttpSession, Scheduler]] = []
        self._relays: set[tuple[Address, str]] = set()  # those that were incomplete
        self._loading: set[Address] = set()  # those that were when they were asked last
        # So that of those that wait for each other one reads the disk and the rest hears of it.
        self._patience = config.progress_timeout * random.uniform(*_ORPHANED)
        self._came, self._stirred = 0, time.monotonic()  # what had come, and when there was news
        # What sources that SOURCE names have, and their lists of ranks. Those that others name may
        # have nothing else, and their own lists do not count.
        self._vouched: dict[str, Mapping[int, str]] = {}

    def work(self) -> None:
        """Pull from one source after the other until the store is complete or none is left."""
        with self._device.attached():
            while (address := self._queue.next()) is not None:
                self._try(address)

    def keep_asking(self) -> None:
        """Ask now and then who else gets the same weights, until the load is over."""
        pause = _FIRST_QUESTION
        while not self._queue.over.wait(pause):
            pause = min(2 * pause, _LAST_QUESTION)
            with self._lock:
                origins = [origin for origin, _ in self._pulls]
            if not origins:
                continue
            address, weights = random.choice(origins)
            try:
                with self._connect(address) as client:
                    peers = client.peers(weights)
            except (SourceError, RuntimeError) as error:  # RuntimeError: no more threads
                logger.debug("NetLoader: asking for peers: %s", one_line(error))
            else:
                for peer in peers:
                    self._met(weights, peer)

    def cut_overdue(self) -> None:
        """End sessions whose blocks never come, or with untrusted sources: come too late."""
        late, trusted = self._queue.late, self._slowest()
        untrusted = _OVERDUE * self._config.progress_timeout
        with self._lock:
            sessions = [*self._over_http]
        for address, session, scheduler in sessions:
            longest = trusted if session.peer.trusted else untrusted
            if late and not session.peer.trusted:
                session.cut(SourceLost(f"{address}: too slow, and SOURCE_WAIT is over"))
            elif scheduler.held_for(session.peer) > longest:
                session.cut(SourceLost(f"{address}: no blocks for {longest:g} s"))

    def end(self) -> None:
        """End the sessions that go on, as the load is over."""
        with self._lock:
            sessions = [*self._over_http]
        for address, session, _ in sessions:
            session.cut(SourceLost(f"{address}: the load is over"))

    def _slowest(self) -> float:
        """Return twice the seconds that a run takes at the least rate that a source can have.

        It sends a client 1 MiB in half of PROGRESS_TIMEOUT then, and on each connection two runs
        are asked for.
        """
        config = self._config
        runs = 2 * self._target.chunk_mib * config.connections
        return max(runs, _OVERDUE) * config.progress_timeout

    def orphaned(self) -> bool:
        """Return whether all that can be asked load themselves, and wait for each other."""
        came, now = self.bytes_received(), time.monotonic()
        if came != self._came or self._target.weights is None:
            self._came, self._stirred = came, now
        with self._lock:
            loading = {*self._loading}
        return now - self._stirred > self._patience and not self._queue.has_others(loading)

    def peers(self) -> int:
        """Return the number of sources that are pulled from just now."""
        with self._lock:
            return len({address for (address, _), _ in self._pulls})

    def feeds(self) -> list[api.Feed]:
        """Return what each source has given so far."""
        return [api.Feed(str(address), nbytes) for address, nbytes in self._shares().items()]

    def relayed(self) -> str:
        """Return what came from those that were loading themselves and what they got, if any."""
        if self._relay is None:
            return ""
        with self._lock:
            relays = {address for address, weights in self._relays}
        came = sum(nbytes for address, nbytes in self._shares().items() if address in relays)
        passed_on = self._relay.bytes_sent
        if not came and not passed_on:
            return ""
        return f", relayed {size(came)} in and {size(passed_on)} out"

    def bytes_received(self) -> int:
        """Return the bytes that have come, at most what there is to come."""
        return min(sum(self._shares().values()), self._target.nbytes)

    def shares(self) -> str:
        """Return the sources with what each gave, for the log."""
        gave = {address: nbytes for address, nbytes in self._shares().items() if nbytes}
        if len(gave) == 1:
            return str(*gave)
        return ", ".join(f"{address} ({size(nbytes)})" for address, nbytes in gave.items())

    def givers(self) -> list[Address]:
        """Return the sources in SOURCE that gave something, the one that gave most first."""
        gave = Counter(self._shares()).most_common()
        return [address for address, n in gave if n and not self._queue.is_hearsay(address)]

    def _shares(self) -> dict[Address, int]:
        """Return what each source gave of the weights that are being loaded."""
        with self._lock:
            gave = self._gave.copy()
            for origin, pull in self._pulls:
                gave[origin] += pull.bytes_received
        wanted = self._target.weights
        return {address: nbytes for (address, weights), nbytes in gave.items() if weights == wanted}

    def _try(self, address: Address) -> None:
        before = self._brought(address)
        try:
            self._pull(address)
            # Only now, with the session closed: a process may end right after its load.
            self._queue.succeeded()
            metrics.count(metrics.SOURCE_ATTEMPTS, api.COMPLETE)
        except Postponed as error:
            self._queue.postpone(address, str(error))
            logger.info("NetLoader rank %d: source %s", self._worker, error)
        except Exception as error:
            # Whatever goes wrong with a source must not cost the start: there is the next one.
            self._note(address, _blamed(address, error), self._brought(address) > before)

    def _brought(self, address: Address) -> int:
        """Return the bytes that have come from a source in sessions that are over."""
        with self._lock:
            return sum(nbytes for (origin, _), nbytes in self._gave.items() if origin == address)

    def _vouch(self, weights: str, ranks: Mapping[int, str]) -> None:
        self._vouched[weights] = ranks or self._vouched.get(weights, {})

    def _is_own(self, instance: str) -> bool:
        return self._relay is not None and self._relay.peer.instance == instance

    def _met(self, weights: str, peer: api.Peer) -> None:
        """Let another that gets or has these weights be asked as well."""
        if weights == self._target.weights:
            self._ask_too(peer.address, peer.instance)

    def _ask_too(self, address: str, instance: str) -> None:
        if self._relay is not None and self._relay.peer.instance != instance:
            with contextlib.suppress(ValueError):  # no address
                self._queue.heard(parse_address(address), instance)

    def _note(self, address: Address, error: SourceError, brought: bool) -> None:
        if self._queue.over.is_set():
            return  # nobody waits for this source any more
        if self._is_own(error.instance):
            error = SourceRefused(f"{address}: {_ITSELF}")
        if error.weights is not None and not self._queue.is_hearsay(address):
            self._vouch(error.weights, error.ranks)
        for other, instance in error.peers if error.weights in self._vouched else ():
            self._ask_too(other, instance)
        # What was ended on this side has no code. A source whose own load is complete prepares.
        soon = brought and error.code in ("", Code.PREPARING.text)
        metrics.count(metrics.SOURCE_ATTEMPTS, _kind(error))
        if error.code == Code.PREPARING.text:
            self._is_loading(address, False)
        elif error.code == Code.LOADING.text:  # one that reads its disk has everything soon
            self._is_loading(address, not error.retry_after)
        news = self._queue.failed(address, error, soon=soon)
        if news:
            self.warn(error, self._queue.waits(address))

    def _is_loading(self, address: Address, loading: bool) -> None:
        with self._lock:
            (self._loading.add if loading else self._loading.discard)(address)

    def warn(self, error: SourceError, again: bool) -> None:
        """Say what went wrong with a source; `again`: it is asked again."""
        wait = f"; asking again for up to SOURCE_WAIT {self._config.source_wait:g} s"
        logger.warning(
            "NetLoader rank %d: source %s%s",
            self._worker,
            one_line(error),
            wait if again and self._config.source_wait else "",
        )

    def _pull(self, address: Address) -> None:
        with self._connect(address) as client:
            joined = self._join(client)
            try:
                self._pull_from(address, client, joined)
            except BaseException as error:
                client.done(Done(complete=False, reason=one_line(error)))
                raise
            client.done(Done(complete=True))

    def _pull_from(self, address: Address, client: ElasticClient, joined: Joined) -> None:
        if self._is_own(joined.instance):
            raise SourceRefused(f"{address}: {_ITSELF}")
        if not self._queue.is_hearsay(address):
            self._vouch(joined.weights, joined.ranks)
        elif joined.weights not in self._vouched:
            raise SourceRefused(
                f"{address}: its weights are {joined.weights}, which no source in SOURCE has"
            )
        self._queue.joined(address, joined.instance)
        self._is_loading(address, not joined.complete)
        with self._target.agreed(address, joined) as (store, scheduler):
            if not joined.complete:
                with self._lock:
                    self._relays.add((address, joined.weights))
            if self._relay is not None:
                self._relay.know(joined.weights, address, joined.instance, complete=joined.complete)
                for peer in joined.peers:
                    self._met(joined.weights, peer)
            try:
                self._transfer(address, client, store, scheduler, joined.complete)
            except TransferCorrupt as error:
                self._report(address, store, error)
                raise

    def _report(self, address: Address, store: BlockStore, error: TransferCorrupt) -> None:
        """Ask the source whether its weights are still what it said, as they came wrong twice.

        One that only others have named might answer anything, to be asked again and again.

        Raises:
            SourceError: they are not.
        """
        if error.block is None or self._queue.is_hearsay(address):
            return
        try:
            # Answers to what was asked for before are still due on the session's own connection.
            with self._connect(address) as client:
                client.check(store.digests.weights, error.block, error.block)
        except SourceError as answer:
            if answer.code != Code.CHANGED.text:
                return
            changed = "the source's weights have changed since they were offered"
            raise SourceBusy(f"{address}: changed: {changed}", answer.code) from None

    def _connect(self, address: Address) -> ElasticClient:
        return connect(address, self._config)

    def _join(self, client: ElasticClient) -> Joined:
        """Ask for the weights that are being loaded; for any, if there are none yet."""
        identity, weights, peer = self._identity, self._target.weights, self._peer
        try:
            joined = client.join(Join(identity, weights, peer))
        except SourceRefused as error:
            if error.code != Code.OTHER_WEIGHTS.text:
                raise
            # Its weights count when nobody is left who has the others.
            joined = client.join(Join(identity, peer=peer))
        if self._queue.is_hearsay(client.address):
            vouched = dict(self._vouched.get(joined.weights, {}))
            joined = msgspec.structs.replace(joined, ranks=vouched)
        # What a list says of this rank is not to matter: its weights have to be those.
        pinned, ranks = self._config.weights_digest, {**joined.ranks, identity.rank: joined.weights}
        if not is_one_of(pinned, joined.weights, ranks):
            world = api.world_of(identity, len(ranks))
            settled = self._queue.is_hearsay(client.address) or (world and world <= ranks.keys())
            if any(map(is_of_instance, pinned or ())) and not settled:
                raise SourceBusy(
                    f"{client.address}: does not say yet what all of its ranks have, and "
                    "WEIGHTS_DIGEST is that of an instance"
                )
            raise SourceRefused(
                f"{client.address}: its weights are {joined.weights} of {of_instance(ranks)} and "
                f"WEIGHTS_DIGEST is {', '.join(pinned or ())}"
            )
        if self._wanted not in (None, joined.weights):
            raise SourceRefused(
                f"{client.address}: its weights are {joined.weights}, and {self._wanted} go with "
                "those of the other ranks"
            )
        self._compare_revisions(client.address, joined.revision)
        algorithm, there = self._device.digest_algorithm, joined.weights.partition(":")[0]
        if self._config.verify and there != algorithm:
            raise SourceRefused(f"{client.address}: digests are {algorithm} here and {there} there")
        return joined

    def _compare_revisions(self, address: Address, there: Revision) -> None:
        here = self._identity.revision
        if here.is_other(there):
            logger.warning(
                "NetLoader rank %d: source %s has commit %s of the model, which is commit %s here; "
                "without --revision the source's is taken",
                self._worker,
                address,
                shortened(str(there.name)),
                here.name,
            )

    def _transfer(
        self,
        address: Address,
        client: ElasticClient,
        store: BlockStore,
        scheduler: Scheduler,
        complete: bool,
    ) -> None:
        accelerator = self._device.accelerator
        peer = Peer(complete=complete, trusted=complete and not self._queue.is_hearsay(address))
        if accelerator is not None and self._config.transport is Transport.AUTO:
            try:
                control, group = self._form_group(client, store, accelerator)
            except (RuntimeError, SourceBusy, SourceRefused) as error:
                if isinstance(error, SourceBusy) and not complete:
                    raise  # it was forming others all the time
                logger.warning(
                    "NetLoader rank %d: source %s: no process group, so the weights come over "
                    "HTTP: %s",
                    self._worker,
                    address,
                    one_line(error),
                )
                if client.hung_up():  # it has waited less for the group than this side
                    with self._connect(address) as client:
                        client.join(Join(self._identity, store.digests.weights, self._peer))
                        self._transfer_over_http(address, client, store, scheduler, peer)
                    return
            else:
                through = GroupReceiver(control, group, store, accelerator, control.max_bytes)
                with group, self._news_of(address, store, scheduler, peer):
                    try:
                        self._receive(address, through, store, scheduler, peer, group)
                    except RuntimeError as error:  # torch's, which says what failed and not why
                        raise client.last_words() or error from None
                return
        self._transfer_over_http(address, client, store, scheduler, peer)

    def _transfer_over_http(
        self,
        address: Address,
        client: ElasticClient,
        store: BlockStore,
        scheduler: Scheduler,
        peer: Peer,
    ) -> None:
        session = _HttpSession(peer, client)
        with self._lock:
            self._over_http.append((address, session, scheduler))
        peer.cut = lambda: session.cut(
            SourceBusy(f"{address}: slow: others bring what it had left")
        )
        try:
            with (
                self._news_of(address, store, scheduler, peer),
                self._more_connections(address, store, scheduler, session),
            ):
                receiver = HttpReceiver(client, store, verify=self._config.verify)
                try:
                    self._receive(address, receiver, store, scheduler, peer)
                except TransferCorrupt as error:
                    if not peer.trusted:
                        session.cut(error)  # its further connections bring nothing better
                    raise
        except SourceLost:
            if session.cut_by is not None:
                raise session.cut_by from None
            raise
        finally:
            with self._lock:
                self._over_http.remove((address, session, scheduler))

    @contextlib.contextmanager
    def _news_of(
        self, address: Address, store: BlockStore, scheduler: Scheduler, peer: Peer
    ) -> Iterator[None]:
        """Learn which blocks come to an incomplete source, on a connection of its own."""
        if peer.complete:
            yield
            return
        with self._connect(address) as first:
            news = _HttpSession(peer, first)

            def learn() -> None:
                try:
                    self._learn(address, store, scheduler, news, first)
                except SourceError as error:
                    scheduler.lost(peer, error)
                except Exception as error:  # whatever a source says costs its own session
                    scheduler.lost(peer, ProtocolError(f"{address}: {one_line(error)}"))

            thread = threading.Thread(target=learn, name="netloader-load-news", daemon=True)
            thread.start()
            try:
                yield
            finally:
                news.cut(SourceLost(f"{address}: the session is over"))
                while thread.is_alive() and not news.dialing:
                    thread.join(_LOOK)

    def _learn(
        self,
        address: Address,
        store: BlockStore,
        scheduler: Scheduler,
        news: "_HttpSession",
        client: ElasticClient,
    ) -> None:
        since, weights, told, again = 0, store.digests.weights, 0, _NEWS_AGAIN
        wait = max(1, min(int(self._config.progress_timeout), api.MAX_WAIT_SECONDS))
        with contextlib.ExitStack() as connections:
            while not news.peer.complete:
                asked = time.monotonic()
                try:
                    have = client.have(weights, since, wait)
                except SourceLost:
                    if news.cut_by is not None or not again:
                        raise
                    again -= 1
                    news.dialing = True
                    client = connections.enter_context(self._connect(address))
                    news.add(client)
                    news.dialing = False
                    continue
                at_once = time.monotonic() - asked < wait / 2
                if at_once and not have.runs and not have.complete:
                    raise ProtocolError(f"{address}: has no news, and does not wait")
                told += len(have.runs)
                if told > store.blocks.count:
                    raise ProtocolError(f"{address}: has more news than there are blocks")
                since = have.version
                if have.runs:
                    self._stirred = time.monotonic()
                scheduler.heard(news.peer, map(Run._make, have.runs), complete=have.complete)

    @contextlib.contextmanager
    def _turn_to_connect(self) -> Iterator[None]:
        """Wait until this rank forms no other group, but not for long: its peer may never come."""
        turn = self._relay.connecting if self._relay is not None else None
        mine = turn is not None and turn.acquire(timeout=_TURN)
        try:
            yield
        finally:
            if turn is not None and mine:
                turn.release()

    def _form_group(
        self, client: ElasticClient, store: BlockStore, accelerator: Accelerator
    ) -> tuple[GroupControl, TransferGroup]:
        deadline = time.monotonic() + self._config.handshake_timeout
        while True:
            try:
                with self._turn_to_connect():
                    control = client.open_group(store.digests.weights)
                    group = form_group(
                        accelerator,
                        control.tell,
                        control.hear,
                        CLIENT,
                        client.local_host,
                        handshake=self._config.handshake_timeout,
                        progress=self._config.progress_timeout,
                        gone=client.hung_up,
                    )
                    return control, group
            except SourceBusy:
                # An incomplete source forms one at a time. Two that want one of each other must
                # not come back at the same moment.
                over = self._queue.over.wait(random.uniform(*_FORM_AGAIN))
                if over or time.monotonic() > deadline:
                    raise

    def _receive(
        self,
        address: Address,
        receiver: Receiver,
        store: BlockStore,
        scheduler: Scheduler,
        peer: Peer,
        group: TransferGroup | None = None,
    ) -> None:
        pull = P2PLoad(
            receiver,
            store,
            scheduler,
            verify=self._config.verify,
            keep_alive=self._config.progress_timeout / 3,
            peer=peer,
            others=self._queue.lacks_threads,
            patience=0.0 if group is None else _TRY_ANOTHER,
        )
        origin = address, store.digests.weights
        with self._lock:
            self._pulls.append((origin, pull))
        try:
            with group or contextlib.nullcontext():
                pull.run()
        finally:
            # Only now, with the group closed, can nothing of this session reach the tensors.
            scheduler.give_back(pull.outstanding)
            # Not kept any longer, as it has staging buffers of the device.
            with self._lock:
                self._pulls.remove((origin, pull))
                self._gave[origin] += pull.bytes_received

    @contextlib.contextmanager
    def _more_connections(
        self, address: Address, store: BlockStore, scheduler: Scheduler, session: "_HttpSession"
    ) -> Iterator[None]:
        """Let further connections to a source pull, too; what goes wrong with them is no news."""
        pulling: set[threading.Thread] = set()

        def pull() -> None:
            try:
                with self._device.attached(), self._connect(address) as client:
                    session.add(client)
                    client.join(Join(self._identity, store.digests.weights, self._peer))
                    pulling.add(threading.current_thread())
                    through = HttpReceiver(client, store, verify=self._config.verify)
                    self._receive(address, through, store, scheduler, session.peer)
                    client.done(Done(complete=True))
            except Exception as error:
                logger.debug("NetLoader: a further connection: %s", one_line(error))
                if isinstance(error, TransferCorrupt) and not session.peer.trusted:
                    session.cut(error)

        threads = [
            threading.Thread(target=pull, name=f"netloader-load-more-{index}", daemon=True)
            for index in range(self._config.connections - 1)
        ]
        try:
            for thread in threads:
                with contextlib.suppress(RuntimeError):  # no more threads: only speed is lost
                    thread.start()
            yield
        finally:
            ends = math.inf
            for thread in threads:
                # One that has not been let in yet brings nothing once all is here.
                while thread.is_alive() and (thread in pulling or time.monotonic() < ends):
                    thread.join(_LOOK)
                    if scheduler.finished or session.cut_by is not None:
                        ends = min(ends, time.monotonic() + _LEAVE)
            session.leave()


class _HttpSession:
    """The connections to one source over HTTP, which can be cut together.

    Attributes:
        peer: the source.
        cut_by: why they were cut; None: they were not.
        dialing: whether another one is being made.
    """

    def __init__(self, peer: Peer, client: ElasticClient) -> None:
        self.peer = peer
        self.cut_by: SourceError | None = None
        self.dialing = False
        self._left = False
        self._lock = threading.Lock()
        self._clients = [client]

    def add(self, client: ElasticClient) -> None:
        """Take note of a further connection."""
        with self._lock:
            self._clients.append(client)
            if self._left or self.cut_by is not None:
                client.cut()

    def leave(self) -> None:
        """End all connections but the first, also those that have yet to be made."""
        with self._lock:
            self._left = True
            for client in self._clients[1:]:
                client.cut()

    def cut(self, why: SourceError) -> None:
        """End all connections at once, also while something is received."""
        with self._lock:
            self.cut_by = self.cut_by or why
            for client in self._clients:
                client.cut()


def _kind(error: SourceError) -> str:
    """Return what a failure is called among the metrics."""
    kinds = (name for kind, name in _KINDS.items() if isinstance(error, kind))
    return error.code or next(kinds, "refused")


def _blamed(address: Address, error: Exception) -> SourceError:
    """Return what went wrong with a source as an error that begins with its address."""
    if isinstance(error, SourceError):
        return (
            error if str(error).startswith(f"{address}: ") else type(error)(f"{address}: {error}")
        )
    if isinstance(error, RuntimeError):  # torch raises them
        return SourceLost(f"{address}: transfer failed: {one_line(error)}")
    logger.debug("NetLoader: %s", address, exc_info=error)
    return SourceLost(f"{address}: {type(error).__name__}: {one_line(error)}")
