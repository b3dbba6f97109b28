"""The source's story: models offered, and sessions in which clients pull their blocks."""

import errno
import ipaddress
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import xxhash

from . import metrics, model_files
from .config import NetLoaderConfig, Transport
from .credentials import is_loopback
from .errors import CannotListen, Gone, Preparing, ProtocolError, SourceBusy, Withdrawn
from .executor.chunks.blocks import Run
from .executor.chunks.digests import of_instance
from .executor.rate_limiter import RateLimiter
from .executor.scheduler import FirstCopy
from .executor.store import BlockStore
from .executor.view.offered import Viewed
from .identity import ModelIdentity
from .interaction import api
from .interaction.api import Bytes, Code, Done, Endpoint, Feed, Join, Joined, Peer, Refusal
from .interaction.cold_start import Phase
from .interaction.elastic import ElasticServer, Session
from .interaction.peer_book import PeerBook
from .port_file import PortFile
from .served import Served, ServedGroup, as_refusals
from .utils import Address, Buffer, FewLines, logger, one_line, parse_address, shortened, words_of
from .version import __version__

_PIECE = 8 << 20  # bytes of a run that are sent at once over HTTP
_GATHERED_AT_ONCE = 2 << 20  # bytes of regions: the client reads some while others are gathered
# Part of its own time to load for which a replica goes on serving those that still load from it.
_LINGER = 0.05
# Places for clients while a model is loaded, in those at other times: a load that leaves one source
# finds another that has a place free, and there is no inference that this could slow down.
_PLACES_WHILE_LOADING = 2
_LAST_RUNS = 2.0  # seconds for runs on their way to arrive, when their memory is about to change
_UNTIL_CUT = 5.0  # seconds for sessions to let go of that memory once they have been cut
_BETWEEN_CHECKS = 1.0  # seconds from one check of blocks for a client to the next
_MOST_CHECKED = 16  # blocks of one
# Clients that pass on what they get and are fed at once through groups, each of which takes memory
# of the device and seconds to form. Others get from these what they have.
_CHILDREN = 2
_LOOK = 0.5  # seconds between two looks at whether a client that waits is still there
_MOST_TOLD = 5  # differences in one line of the log
_MADE_READY = "the weights are being made ready for inference"
_SHUTTING_DOWN = "the source is shutting down"
_REPLACED = "the weights are being replaced"
_CHANGED = "the weights have changed since they were offered"


@dataclass(frozen=True)
class Offer:
    """One model of this instance, or the reason why it is not to be had.

    Attributes:
        identity: what it is.
        store: its weights; None: not to be had.
        reason: why not.
        loaded_from: `disk`, the addresses of the sources, or the call that has changed it since.
        ranks: returns the weights digests of the instance's ranks, as far as they are known.
        endpoints: returns where the instance's ranks listen, as far as that is known.
        feeds: returns where the weights come from that are being loaded.
        folder: has the model's other files; None: there is none.
        code: what a client is refused with that asks for what is not to be had.
        phase: how far its load is.
        can_read: returns whether this instance would read its disk for others; see `cold_start`.
        view: the checkpoint as it is seen through the weights; None: it cannot be seen.
        why_no_view: why not.
    """

    identity: ModelIdentity
    store: BlockStore | None
    reason: str = ""
    loaded_from: str = "disk"
    ranks: Callable[[], Mapping[int, str]] = dict
    endpoints: Callable[[], Mapping[int, Endpoint]] = dict
    feeds: Callable[[], list[Feed]] = list
    folder: Path | None = None
    code: Code = Code.CANNOT_SERVE
    phase: Phase = Phase.LOADING
    can_read: Callable[[], bool | None] = lambda: False
    view: Viewed | None = None
    why_no_view: str = "they did not come from a checkpoint here"

    def instance(self) -> dict[int, str]:
        """Return the weights digests of the instance's ranks, as far as they are known now."""
        ranks = dict(self.ranks())
        if self.store is not None and ranks:
            ranks[self.identity.rank] = self.store.digests.weights
        return ranks


class WeightServer:
    """Serves the models of one worker process on one port; see `interaction.elastic.Service`.

    Args:
        config: port, bounds and deadlines.
        rank: this worker's number among all workers of the instance: its global rank, counted
            through all data-parallel replicas.
        host: the address of this machine that others reach.

    Attributes:
        process: names this server to others, so that another at its address is noticed.
        endpoint: where it listens; None: it has not been started.
        connecting: held while this rank forms a group for a load, in either role.
        renew: called with a group whose weights have changed without notice, once withdrawn; it is
            offered no more if nothing else is set.
        met: called with a weights digest and a peer that gets these weights.
    """

    def __init__(self, config: NetLoaderConfig, rank: int, host: str) -> None:
        self.config = config
        self.rank = rank
        self.process = uuid.uuid4().hex
        self.endpoint: Endpoint | None = None
        self.connecting = threading.Lock()
        self.renew: Callable[[str], object] = self._gives_up
        self.met: Callable[[str, Peer], object] = lambda weights, peer: None
        self._host = host
        self._offers: dict[str, Offer] = {}
        self._epochs: dict[str, int] = {}
        self._expected: set[str] = set()
        self._lingering: set[str] = set()
        self._found_changed: dict[str, list[BlockStore]] = {}  # whose readers may go on
        self._stopped = False
        self._peers = PeerBook()
        self._first_copies: dict[str, FirstCopy[Peer]] = {}  # by weights digest
        self._next_check = 0.0
        self._lines = FewLines()
        self._served: dict[Session, Served] = {}
        self._bytes_sent = 0  # in sessions that are over
        self._limiter = RateLimiter(config.max_send_rate)
        self._lock = threading.RLock()  # `status` asks for `bytes_sent`, and `_refuse` withdraws
        self._session_over = threading.Condition(self._lock)
        self._port_file: PortFile | None = None
        self._server = ElasticServer(
            self,
            max_sessions=config.max_sessions,
            handshake_timeout=config.handshake_timeout,
            progress_timeout=config.progress_timeout,
            idle_timeout=config.progress_timeout,
            credentials=config.credentials,
            turned_away=lambda kind: metrics.count(metrics.AUTHENTICATION_FAILURES, kind),
        )

    @property
    def listening(self) -> bool:
        """Whether it has been started."""
        return self.endpoint is not None

    @property
    def bytes_sent(self) -> int:
        """Bytes of blocks that were sent since the start."""
        with self._lock:
            return self._bytes_sent + sum(one.bytes_sent for one in self._served.values())

    def start(self, port: int) -> Address:
        """Listen on `port` (0: the system chooses) and publish the address (OUTPUT_PREFIX).

        Raises:
            CannotListen: the port is taken, or the host's address is none of this machine.
            OSError: the port file cannot be written; nothing is left open.
        """
        try:
            opened = self._server.start(self.config.listen_host, port)
        except OSError as error:
            raise CannotListen(_why_not(self.config, port, error)) from None
        address = Address(self._host, opened)
        if self.config.output_prefix is not None:
            self._port_file = PortFile(self.config.output_prefix, self.rank, address)
            try:
                self._port_file.publish()
            except OSError:
                self._server.stop()  # it may be started once more
                raise
        self.endpoint = Endpoint(str(address), self.process)
        logger.info(
            "NetLoader rank %d: listening on port %d of %s; clients use %s",
            self.rank,
            address.port,
            self.config.listen_host or "all addresses",
            address,
        )
        open_to_all = self.config.credentials is None and not is_loopback(self.config.listen_host)
        if open_to_all and self.rank == 0:  # one line for an instance
            logger.warning(
                "NetLoader rank %d: whoever reaches port %d can pull the weights; SECRET_FILE or "
                "TLS_CERT lets in only peers",
                self.rank,
                address.port,
            )
        return address

    def offer(self, offer: Offer) -> int:
        """Offer a model, in the place of any earlier one of its group; return its epoch."""
        group = offer.identity.group
        self.withdraw(group, Code.CHANGING, _REPLACED)
        with self._lock:
            self._epochs[group] = self._epochs.get(group, 0) + 1
            self._expected.discard(group)
            self._offers[group] = offer
            _show(offer)
            self._count_places()
            return self._epochs[group]

    def announce(self, offer: Offer) -> None:
        """Say of a model that is being loaded what there is of it; an epoch begins with `offer`."""
        group = offer.identity.group
        before = self._offers.get(group)
        if before is not None and before.store is not None:  # others may come into its memory
            self.withdraw(group, Code.CHANGING, _REPLACED)
        with self._lock:
            self._epochs.setdefault(group, 0)
            self._expected.discard(group)
            self._offers[group] = offer
            _show(offer)
            self._count_places()

    def expect(self, group: str) -> None:
        """Let clients that ask for this group's model come again later, as it is being loaded."""
        with self._lock:
            if group not in self._offers:
                self._expected.add(group)

    def withdraw(self, group: str, code: Code, reason: str) -> None:
        """Offer a group's model no more, and refuse who asks for it with a code and a reason.

        Sessions that pull it end. When this returns none of them reads the model's memory. A model
        that was no source to begin with keeps its own reason.
        """
        store = self._refuse(group, code, reason)
        with self._lock:
            stores = self._found_changed.pop(group, [])
        for one in [*stores, *([store] if store is not None else [])]:
            self._wait_for_readers(one)

    def linger(self, group: str, seconds: float) -> None:
        """Let no more clients in; return when those that pull a group's model have ended.

        Args:
            group: of a model whose load is complete.
            seconds: after which it returns in any case.
        """
        with self._session_over:
            offer = self._offers.get(group)
            if offer is None or offer.store is None:
                return
            store = offer.store
            self._lingering.add(group)
            self._session_over.wait_for(
                lambda: all(one.store is not store for one in self._served.values()), seconds
            )
            self._lingering.discard(group)

    def forget(self, group: str) -> None:
        """Offer a group's model no more, as it has been unloaded."""
        with self._lock:
            offer = self._offers.pop(group, None)
            metrics.show_model(group, None, 0)
        if offer is not None and offer.store is not None:
            self._withdraw(offer.store, Gone("the source has unloaded the model"))

    def stop(self) -> None:
        """Close the port and all sessions, and remove the port file if it is still this one's."""
        with self._lock:
            self._stopped = True
            for offer in self._offers.values():
                if offer.store is not None:
                    offer.store.withdraw(Gone(_SHUTTING_DOWN))
            for group in self._offers:
                metrics.show_model(group, None, 0)
            self._offers.clear()
            self._expected.clear()
        self._server.stop()
        if self._port_file is not None:
            self._port_file.remove()

    # What `ElasticServer` asks

    def join(self, session: Session, join: Join) -> Joined:
        """Let a client in whose model is this one."""
        group = join.identity.group
        with self._lock:
            offer, expected = self._offers.get(group), group in self._expected
            lingering = group in self._lingering
            epoch = self._epochs.get(group, 0)
        try:
            if self._stopped:
                raise Refusal(Code.GONE, _SHUTTING_DOWN)
            if offer is None and expected:
                raise Refusal(Code.LOADING, "the weights are being loaded")
            if offer is None:
                raise Refusal(Code.NO_MODEL, f"there is no model of group {group!r} here")
            if differ := _differences(join, offer):
                raise Refusal(Code.OTHER_MODEL, "the models differ", differences=differ)
            if offer.store is None:
                # Who loads from others has what these have in a moment.
                soon = offer.code is Code.LOADING and offer.phase is not Phase.READING
                raise Refusal(offer.code, offer.reason, retry_after=0 if soon else 1)
            if lingering:
                raise Refusal(Code.PREPARING, _MADE_READY)
            known = offer.store.digests.weights
            if join.weights not in (None, known):
                raise Refusal(Code.OTHER_WEIGHTS, f"the weights digest is {known}")
            if join.view:
                _view_of(offer)
            with self._lock:
                if join.peer is not None:
                    self._check_children(session, offer.store)
                served = self._session(session, offer.store)
                if join.peer is not None:
                    served.relay = served.relay or join.peer
                    self._peers.know(known, served.relay, session)
        except Refusal as refusal:
            self._log_refusal(session, refusal)
            refusal.problem = msgspec.structs.replace(refusal.problem, instance=self.process)
            raise
        if join.peer is not None:
            self.met(known, join.peer)
        joined = Joined(
            known,
            epoch,
            self.process,
            offer.identity.revision,
            self._others(known, join.peer),
            offer.store.complete,
            ranks=offer.instance(),
        )
        if join.weights == known or join.view:
            return joined
        return msgspec.structs.replace(
            joined,
            manifest=msgspec.Raw(offer.store.encoded_manifest),
            blocks=offer.store.digests.blocks,
        )

    def blocks(self, session: Session, weights: str, first: int, last: int) -> Bytes:
        """Return the bytes of blocks."""
        run = Run(first, last)
        with self._lock:
            served = self._session(session, self._store(weights, session))
        store = served.store
        if not store.blocks.contains(run):
            allowed = f"there are no blocks {run}; allowed: 0-{store.blocks.count - 1}"
            raise Refusal(Code.OUT_OF_RANGE, allowed)
        with as_refusals():
            store.check(run)
        if not self._sends(served, run):
            raise Refusal(Code.ASK_OTHERS, f"others have got blocks {run} from here")
        return Bytes(store.blocks.size_of(run), self._pieces(served, run))

    def records(self, session: Session, weights: str) -> bytes:
        """Return which box of which checkpoint tensor is where in the parameters."""
        with self._lock:
            return self._view(session, weights)[1].records

    def regions(self, session: Session, weights: str, regions: list[api.Region]) -> Bytes:
        """Return the elements of regions, and their digest."""
        with self._lock:
            store, view = self._view(session, weights)
            served = self._session(session, store)
        try:
            nbytes = view.nbytes_of(regions)
        except ProtocolError as error:
            raise Refusal(Code.OUT_OF_RANGE, shortened(str(error), 500)) from None
        if nbytes > api.MAX_GATHERED:
            over = f"the regions have {nbytes} bytes; allowed: {api.MAX_GATHERED} in one request"
            raise Refusal(Code.OUT_OF_RANGE, over)

        at_once = min(_GATHERED_AT_ONCE, self.config.max_message_bytes)

        def gathered() -> Generator[list[Buffer], None, None]:
            digest = xxhash.xxh3_128()
            for piece in view.pieces(regions, at_once):
                # A piece is read until the next one is asked for.
                with as_refusals(), served.gathered(view, piece) as views:
                    for one in views:
                        digest.update(one)
                    yield views
            yield [memoryview(digest.digest())]

        return Bytes(nbytes + api.REGIONS_DIGEST, gathered())

    def _view(self, session: Session, weights: str) -> tuple[BlockStore, Viewed]:
        """Return the store of a weights digest and its view; the lock is held."""
        store = self._store(weights, session)
        for offer in self._offers.values():
            if offer.store is store:
                return store, _view_of(offer)
        with as_refusals():
            store.check(Run(0, 0))  # says why it has been withdrawn
        raise Refusal(Code.CHANGED, "these weights are not served here any more")

    def others(self, join: Join) -> tuple[str, list[Peer], Mapping[int, str]] | None:
        """Return the digest of what a client wants, whom else to ask, and what goes with it."""
        with self._lock:
            offer = self._offers.get(join.identity.group)
        if offer is None or offer.store is None or _differences(join, offer):
            return None
        weights = offer.store.digests.weights
        if join.peer is not None:  # it will have what others want, soon
            self.know(weights, join.peer)
        return weights, self._others(weights, join.peer), offer.instance()

    def peers_of(self, weights: str) -> list[Peer]:
        """Return who else gets or has these weights."""
        return self._others(weights, None)

    def know(self, weights: str, peer: Peer, *, complete: bool = False) -> None:
        """Name a peer to others from now on; see `PeerBook.know`."""
        with self._lock:
            self._peers.know(weights, peer, complete=complete)

    def have(self, session: Session, weights: str, since: int, wait: int) -> api.Have:
        """Return which blocks have come, after waiting for something new."""
        with self._lock:
            store = self._store(weights, session)
        deadline = time.monotonic() + wait
        with as_refusals():
            while True:
                left = deadline - time.monotonic()
                runs = store.came(since, min(max(left, 0.0), _LOOK))[: api.MAX_NEWS]
                if runs or store.complete or left <= 0 or session.gone():
                    break
        version = since + len(runs)
        return api.Have(version, [*runs], store.complete and not store.came(version, 0.0))

    def open_group(self, session: Session, weights: str) -> ServedGroup:
        """Begin to form a two-rank group with the client."""
        with self._lock:
            served = self._session(session, self._store(weights, session))
        accelerator = served.store.device.accelerator
        if accelerator is None or self.config.transport is Transport.HTTP:
            raise Refusal(Code.NO_GROUPS, "this instance sends over HTTP only")
        loading = not served.store.complete
        # Clients that form groups with each other would wait for each other in turn.
        if loading and not self.connecting.acquire(blocking=False):
            raise Refusal(Code.BUSY, "another group is being formed")
        group = ServedGroup(session, served, accelerator, self.config, self._limiter, self._sends)
        if loading:
            group.call_when_formed(self.connecting.release)
        served.groups.append(group)
        session.on_close(group.close)
        group.start()
        return group

    def check(self, session: Session, weights: str, first: int, last: int) -> None:
        """Compare blocks that came wrong with their digests; withdraw weights that have changed."""
        run = Run(first, last)
        with self._lock:
            store = self._store(weights, session)
            if not store.blocks.contains(run) or last - first >= _MOST_CHECKED:
                allowed = f"{_MOST_CHECKED} of 0-{store.blocks.count - 1}"
                raise Refusal(Code.OUT_OF_RANGE, f"blocks {run} cannot be checked; {allowed} can")
            if not store.complete:  # the load has its own digests to go by
                raise Refusal(Code.LOADING, "the weights are being loaded")
            now = time.monotonic()
            # So that a client that reports what is not so cannot keep this instance busy.
            if now < self._next_check:
                raise Refusal(Code.BUSY, "blocks were checked for another client just now")
            self._next_check = now + _BETWEEN_CHECKS
        with as_refusals(), store.device.attached(), store.reading(run):
            wrong = store.wrong(run)
        if not wrong:
            return
        with self._lock:
            changed = [group for group, offer in self._offers.items() if offer.store is store]
        for group in changed:
            logger.warning(
                "NetLoader rank %d: no longer a source of %s, as the weights have changed without "
                "notice: found in %s, which %s reported",
                self.rank,
                weights,
                ", ".join(store.names(wrong)),
                session.peer,
            )
            if self._refuse(group, Code.CHANGING, _CHANGED) is store:
                with self._lock:
                    self._found_changed.setdefault(group, []).append(store)
            self.renew(group)
        raise Refusal(Code.CHANGED, _CHANGED)

    def _gives_up(self, group: str) -> None:
        self._refuse(group, Code.CANNOT_SERVE, _CHANGED)

    def done(self, session: Session, done: Done) -> None:
        """Take note of how the client's session has ended."""
        with self._lock:
            served = self._served.get(session)
        if served is not None:
            gave_up = f"the client gave up: {shortened(done.reason, 300)}"
            looked = done.reason == api.LOOKED and not served.bytes_sent
            served.end = api.COMPLETE if done.complete else api.LOOKED if looked else gave_up
            if done.complete and served.relay is not None:
                with self._lock:
                    self._peers.complete(served.relay)

    def status(self, sessions: int) -> api.Status:
        """Say how this instance is."""
        with self._lock:
            offers = [(offer, self._epochs[group]) for group, offer in self._offers.items()]
            served = [*self._served.values()]
            bytes_sent = self.bytes_sent
        # What other ranks have and where they listen takes asking, for which nobody is to wait.
        models = [self._model_status(offer, epoch) for offer, epoch in offers]
        return api.Status(
            version=__version__,
            instance=self.process,
            rank=self.rank,
            models=models,
            sessions=[one.status() for one in served],
            places=self._server.places,
            places_taken=sessions,
            bytes_sent=bytes_sent,
        )

    def files(self, group: str) -> list[api.ModelFile]:
        """Return which files a model has beside its weights."""
        return model_files.files_of(self._folder(group))

    def file(self, group: str, name: str) -> Bytes:
        """Return what such a file has."""
        content = model_files.read(self._folder(group), name)
        if content is None:
            raise Refusal(Code.NOT_FOUND, f"there is no file {name} for clients here")
        return content

    def _folder(self, group: str) -> Path:
        with self._lock:
            offer = self._offers.get(group)
        if offer is None:
            raise Refusal(Code.NO_MODEL, f"there is no model of group {group!r} here")
        if offer.folder is None:
            raise Refusal(Code.NOT_FOUND, "this instance has no folder of the model")
        return offer.folder

    def metrics(self) -> bytes:
        """Return the metrics of this process."""
        return metrics.exposition()

    def _model_status(self, offer: Offer, epoch: int) -> api.ModelStatus:
        ranks, store = offer.instance(), offer.store
        return api.ModelStatus(
            offer.identity,
            _state(offer),
            offer.reason,
            store.digests.weights if store is not None else None,
            epoch,
            offer.loaded_from,
            of_instance(ranks) if ranks else None,
            ranks,
            self._endpoints(offer),
            bool(offer.can_read()),
            nbytes=store.blocks.nbytes if store is not None else 0,
            blocks=store.blocks.count if store is not None else 0,
            blocks_here=store.blocks_here if store is not None else 0,
            map=_map(store) if store is not None else "",
            feeds=offer.feeds(),
        )

    def _endpoints(self, offer: Offer) -> dict[int, Endpoint]:
        own = {offer.identity.rank: self.endpoint} if self.endpoint is not None else {}
        return {**offer.endpoints(), **own}

    def _refuse(self, group: str, code: Code, reason: str) -> BlockStore | None:
        """Offer a group's model no more; return its store, if it was offered."""
        with self._lock:
            offer = self._offers.get(group)
            if offer is None or (offer.store is None and offer.code is Code.CANNOT_SERVE):
                return None
            self._offers[group] = replace(offer, store=None, view=None, code=code, reason=reason)
            _show(self._offers[group])
            self._count_places()
        if offer.store is not None:
            kind = Preparing if code is Code.PREPARING else Withdrawn
            self._withdraw(offer.store, kind(reason))
        return offer.store

    def _count_places(self) -> None:
        """Say how many clients are fed at once; the lock is held."""
        stores = [offer.store for offer in self._offers.values()]
        loading = any(
            store is not None and not store.complete and store.device.accelerator is None
            for store in stores
        )
        # With a rate limit, more clients would get less than their deadlines allow. Groups take
        # memory of a device whose model is just being made.
        more = loading and self.config.max_send_rate is None
        self._server.places = self.config.max_sessions * (_PLACES_WHILE_LOADING if more else 1)

    def _withdraw(self, store: BlockStore, why: Withdrawn) -> None:
        store.withdraw(why)
        with self._lock:
            self._first_copies.pop(store.digests.weights, None)

    def _store(self, weights: str, session: Session) -> BlockStore:
        """Return the store of a weights digest; the lock is held.

        That of a session may have been withdrawn, and knows why.
        """
        for offer in self._offers.values():
            if offer.store is not None and offer.store.digests.weights == weights:
                return offer.store
        served = self._served.get(session)
        if served is not None and served.store.digests.weights == weights:
            return served.store
        if self._stopped:
            raise Refusal(Code.GONE, _SHUTTING_DOWN)
        for offer in self._offers.values():
            if offer.store is None and offer.code in (Code.LOADING, Code.PREPARING):
                raise Refusal(offer.code, offer.reason)  # they may be what it gets ready
        raise Refusal(Code.CHANGED, "these weights are not served here, or no longer")

    def _session(self, session: Session, store: BlockStore) -> Served:
        """Return what a session gets from a store, which may be new to it; the lock is held."""
        served = self._served.get(session)
        if served is not None and served.store is store:
            return served
        if served is None:
            session.on_close(lambda: self._over(session))
        elif served.groups:  # whose messages nobody would wait for any more
            raise Refusal(Code.BAD_REQUEST, "the groups of this connection are for other weights")
        else:
            self._end(session, served)
        metrics.SESSIONS_STARTED.inc()
        served = self._served[session] = Served(session, store, self._limiter)
        return served

    def _check_children(self, session: Session, store: BlockStore) -> None:
        """Let further clients get from others what those have that get it through groups.

        Raises:
            Refusal: there are enough that pass on what they get; the lock is held.
        """
        if store.device.accelerator is None or self.config.transport is Transport.HTTP:
            return
        children = [
            other for other, one in self._served.items() if one.store is store and one.relay
        ]
        if len(children) >= _CHILDREN and session not in children:
            feeding = f"{len(children)} clients are fed that pass on what they get"
            raise Refusal(Code.BUSY, feeding)

    def _over(self, session: Session) -> None:
        with self._session_over:
            served = self._served.pop(session)
            self._end(session, served)
            self._session_over.notify_all()

    def _others(self, weights: str, client: Peer | None) -> list[Peer]:
        """Return whom else a client can ask."""
        with self._lock:
            there = {one.relay.address for one in self._served.values() if one.relay is not None}
            return self._peers.others(weights, client.address if client else None, there)

    def _sends(self, served: Served, run: Run) -> bool:
        """Return whether a client gets a run now, or is to ask others for it."""
        if served.relay is None or not served.store.complete:
            return True
        weights, blocks = served.store.digests.weights, served.store.blocks
        with self._lock:
            if weights not in self._first_copies:
                self._first_copies[weights] = FirstCopy(blocks.count)
            return self._first_copies[weights].sends(served.relay, run)

    def _end(self, session: Session, served: Served) -> None:
        """Count and log what a session got from a store; the lock is held."""
        self._bytes_sent += served.bytes_sent
        ends = {"": "went_away", api.COMPLETE: api.COMPLETE, api.LOOKED: "looked"}
        end = ends.get(served.end, "gave_up")
        metrics.count(metrics.SESSIONS_FINISHED, end)
        usual = end == api.COMPLETE and served.bytes_sent
        more = "" if usual else self._lines.more((end, session.peer.host))
        if more is not None:
            served.log(self.rank, more)
        if served.relay is not None:
            complete = served.end == api.COMPLETE
            gone = self._peers.left(served.relay, session, complete=complete)
            weights = served.store.digests.weights
            if not any(
                one.relay is not None and one.store is served.store
                for other, one in self._served.items()
                if other is not session
            ):  # the next ones may not reach those that have gone
                self._first_copies.pop(weights, None)
            elif (first_copy := self._first_copies.get(weights)) is not None:
                first_copy.gone(served.relay, complete=not gone)

    def _pieces(self, served: Served, run: Run) -> Generator[list[Buffer], None, None]:
        """Yield the memory of a run, piece by piece, as the rate limiter lets them go."""
        nbytes = min(_PIECE, self.config.max_message_bytes)
        # A piece is read until the next one is asked for.
        with as_refusals(), served.store.device.attached(), served.store.reading(run):
            for piece in served.store.blocks.split(run, nbytes):
                yield served.views(piece)

    def _wait_for_readers(self, store: BlockStore) -> None:
        """Return when no session reads a store's memory; those that go on for too long are cut."""
        with self._lock:
            sessions = [session for session, one in self._served.items() if one.store is store]
            groups = [group for session in sessions for group in self._served[session].groups]
        settling = [threading.Thread(target=group.settle_last, daemon=True) for group in groups]
        for thread in settling:
            thread.start()

        def is_idle(deadline: float) -> bool:
            for thread in settling:
                thread.join(max(0.0, deadline - time.monotonic()))
            left = max(0.0, deadline - time.monotonic())
            settled = not any(thread.is_alive() for thread in settling)
            return store.idle(left) and settled and not any(group.in_flight for group in groups)

        if is_idle(time.monotonic() + _LAST_RUNS):
            return
        for session in sessions:
            session.cut()
        deadline = time.monotonic() + _UNTIL_CUT
        with self._session_over:
            over = self._session_over.wait_for(
                lambda: self._served.keys().isdisjoint(sessions), _UNTIL_CUT
            )
        if not (is_idle(deadline) and over):
            logger.error(
                "NetLoader rank %d: sessions still read the weights %s, which change now",
                self.rank,
                store.digests.weights,
            )

    def _log_refusal(self, session: Session, refusal: Refusal) -> None:
        # A client that is to come again asks many times.
        log = logger.debug if refusal.code.error is SourceBusy else logger.info
        more = self._lines.more((refusal.code, session.peer.host))
        if more is None:
            return
        differ = [*map(str, refusal.problem.differences)]
        if len(differ) > _MOST_TOLD:
            differ[_MOST_TOLD:] = [f"and {len(differ) - _MOST_TOLD} more"]
        told = one_line(": ".join([str(refusal), *differ]))
        log("NetLoader rank %d: declined %s: %s%s", self.rank, session.peer, told, more)


def _why_not(config: NetLoaderConfig, port: int, error: OSError) -> str:
    """Return why a port cannot be opened, with the key that decides it."""
    if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
        host = config.listen_host
        return f"LISTEN_HOST is {host!r}, which is no address of this machine: {_words(error)}"
    of_port = port and error.errno in (errno.EADDRINUSE, errno.EACCES)
    key = f"LISTEN_PORT is {config.listen_port}, and " if of_port else ""
    return f"{key}port {port} cannot be opened: {_words(error)}"


def _words(error: OSError) -> str:
    # The rest of what `socket.create_server` says is the address.
    if error.errno is not None and error.errno > 0:  # else not of the system, but of a look-up
        return os.strerror(error.errno)
    return one_line(words_of(error))


class Relay:
    """What a load in progress passes on; its server listens already.

    Args:
        server: this rank's.
        offer: of the model that is being loaded, without a store.

    Attributes:
        peer: this rank as others know it.
        server: as given.
        connecting: see `WeightServer`.
        group: of the model.
    """

    def __init__(self, server: WeightServer, offer: Offer) -> None:
        assert server.endpoint is not None
        self.peer = Peer(server.endpoint.address, server.endpoint.instance)
        self.server = server
        self.connecting = server.connecting
        self.group = offer.identity.group
        self._offer = offer
        self._sent_before = server.bytes_sent
        self._began = time.monotonic()

    @property
    def bytes_sent(self) -> int:
        """Bytes of blocks that were passed on."""
        return self.server.bytes_sent - self._sent_before

    def announce(self, phase: Phase) -> None:
        """Say how far the load is, of which nothing is passed on."""
        self._offer = replace(self._offer, phase=phase)
        self.server.announce(self._offer)

    def begin(
        self,
        store: BlockStore,
        met: Callable[[str, Peer], object],
        ranks: Callable[[], Mapping[int, str]] = dict,
        feeds: Callable[[], list[Feed]] = list,
    ) -> None:
        """Pass on what comes to a store from now on, in the place of any other.

        Args:
            store: to be filled, with verified blocks only.
            met: called with the weights digest and a peer that gets these weights.
            ranks: see `Offer`; what the sources have said of theirs.
            feeds: see `Offer`.
        """
        self.end(complete=False)
        self._began = time.monotonic()
        self.server.met = met
        self.server.announce(replace(self._offer, store=store, ranks=ranks, feeds=feeds))

    def know(self, weights: str, address: Address, instance: str, *, complete: bool) -> None:
        """Name a source of this load to others; `complete`: it has every block."""
        if _is_local(address) and not _is_local(parse_address(self.peer.address)):
            return  # others would reach somebody else there
        self.server.know(weights, Peer(str(address), instance), complete=complete)

    def end(self, *, complete: bool) -> None:
        """Pass nothing on any more; when this returns nobody reads the store's memory.

        Many replicas that start together complete together, too, and need each other to the end.

        Args:
            complete: whether the weights have come, and are about to be post-processed.
        """
        code, reason = self._offer.code, self._offer.reason
        if complete:
            code, reason = Code.PREPARING, _MADE_READY
            self.server.linger(self.group, _LINGER * (time.monotonic() - self._began))
        self.server.met = lambda weights, peer: None
        self.server.withdraw(self.group, code, reason)


def _is_local(address: Address) -> bool:
    """Return whether an address means another machine on each one."""
    try:
        ip = ipaddress.ip_address(address.host.partition("%")[0])
    except ValueError:
        return address.host == "localhost"
    return ip.is_loopback or ip.is_link_local


def _differences(join: Join, offer: Offer) -> list[api.Difference]:
    return api.differences(join.identity, offer.identity, view=join.view)


def _view_of(offer: Offer) -> Viewed:
    """Return the view that an offer has.

    Raises:
        Refusal: it has none; says why.
    """
    if offer.view is not None:
        return offer.view
    if offer.store is not None and not offer.store.complete:
        raise Refusal(Code.LOADING, "the weights are being loaded")
    raise Refusal(Code.NO_VIEW, f"there are no records of these weights: {offer.why_no_view}")


def _show(offer: Offer) -> None:
    """Show what is offered among the metrics."""
    nbytes = offer.store.blocks.nbytes if offer.store is not None else 0
    metrics.show_model(offer.identity.group, _state(offer), nbytes)


def _map(store: BlockStore) -> str:
    """Return how much of which blocks is here, as digits; see `api.ModelStatus`."""
    return "".join(str(int(9 * part)) for part in store.here(api.MAX_CELLS))


def _state(offer: Offer) -> str:
    if offer.store is None:
        return offer.phase.value if offer.code is Code.LOADING else offer.code.text
    return "serving" if offer.store.complete else Code.LOADING.text
