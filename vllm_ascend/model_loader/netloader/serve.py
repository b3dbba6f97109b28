"""The source's story: models offered, and sessions in which clients pull their blocks."""

import contextlib
import threading
import time
import uuid
from collections.abc import Generator, Iterator
from concurrent.futures import Future
from dataclasses import dataclass

import msgspec

from . import __version__
from .config import NetLoaderConfig, Transport
from .errors import NotHere, ProtocolError, SourceBusy, Withdrawn
from .executor.chunks.blocks import Run
from .executor.devices import Accelerator
from .executor.elastic_load import P2PSend
from .executor.rate_limiter import RateLimiter
from .executor.store import BlockStore
from .executor.transport.group import SOURCE, GroupSender, TransferGroup, form_group
from .executor.transport.http import HttpSender
from .executor.transport.rendezvous import Mailbox
from .identity import ModelIdentity
from .interaction import api
from .interaction.api import Bytes, Code, Done, Join, Joined, Refusal
from .interaction.elastic import ElasticServer, Session
from .port_file import PortFile
from .utils import Address, logger, one_line, rate, shortened, size

# Names this process to others, so that another one at the same address is noticed.
INSTANCE = uuid.uuid4().hex

_PIECE = 4 << 20  # bytes of a run that are sent at once over HTTP


@dataclass(frozen=True)
class Offer:
    """One model of this instance, or the reason why it is not to be had.

    Attributes:
        identity: what it is.
        store: its weights; None: not to be had.
        reason: why not.
        loaded_from: `disk`, or the addresses of the sources.
    """

    identity: ModelIdentity
    store: BlockStore | None
    reason: str = ""
    loaded_from: str = "disk"


class WeightServer:
    """Serves the models of one worker process on one port; see `interaction.elastic.Service`.

    Args:
        config: port, bounds and deadlines.
        rank: this worker's number among all workers of the instance: its global rank, counted
            through all data-parallel replicas.
        host: the address of this machine that others reach.

    Attributes:
        listening: whether it has been started.
    """

    def __init__(self, config: NetLoaderConfig, rank: int, host: str) -> None:
        self.config = config
        self.rank = rank
        self.listening = False
        self._host = host
        self._offers: dict[str, Offer] = {}
        self._epochs: dict[str, int] = {}
        self._unavailable: dict[str, Refusal] = {}
        self._served: dict[Session, _Served] = {}
        self._bytes_sent = 0  # in sessions that are over
        self._limiter = RateLimiter(config.max_send_rate)
        self._lock = threading.Lock()
        self._port_file: PortFile | None = None
        self._server = ElasticServer(
            self,
            max_sessions=config.max_sessions,
            handshake_timeout=config.handshake_timeout,
            progress_timeout=config.progress_timeout,
            idle_timeout=config.progress_timeout,
        )

    def start(self, port: int) -> Address:
        """Listen on `port` (0: the system chooses) and publish the address (OUTPUT_PREFIX).

        Raises:
            OSError: the port is taken, or the port file cannot be written; nothing is left open.
        """
        address = Address(self._host, self._server.start(self.config.listen_host, port))
        if self.config.output_prefix is not None:
            self._port_file = PortFile(self.config.output_prefix, self.rank, address)
            try:
                self._port_file.publish()
            except OSError:
                self.stop()
                raise
        self.listening = True
        logger.info(
            "NetLoader rank %d: listening on port %d of %s; clients use %s",
            self.rank,
            address.port,
            self.config.listen_host or "all addresses",
            address,
        )
        return address

    def offer(self, offer: Offer) -> None:
        """Offer a model, in the place of any earlier one of its group."""
        group = offer.identity.group
        self.withdraw(group)
        with self._lock:
            self._epochs[group] = self._epochs.get(group, 0) + 1
            self._unavailable.pop(group, None)
            self._offers[group] = offer

    def expect(self, group: str) -> None:
        """Let clients that ask for this group's model come again later, as it is being loaded."""
        with self._lock:
            if group not in self._offers:
                self._unavailable[group] = Refusal(Code.LOADING, "the weights are being loaded")

    def withdraw(self, group: str) -> None:
        """Offer a group's model no more; sessions that pull it end."""
        with self._lock:
            offer = self._offers.pop(group, None)
            if offer is not None:
                reason = "the weights are being replaced"
                self._unavailable[group] = Refusal(Code.CHANGING, reason)
        if offer is not None and offer.store is not None:
            offer.store.withdraw(reason)

    def stop(self) -> None:
        """Close the port and all sessions, and remove the port file if it is still this one's."""
        with self._lock:
            for offer in self._offers.values():
                if offer.store is not None:
                    offer.store.withdraw("the source is shutting down")
            self._offers.clear()
            self._unavailable.clear()
        self._server.stop()
        if self._port_file is not None:
            self._port_file.remove()

    # What `ElasticServer` asks

    def join(self, session: Session, join: Join) -> Joined:
        """Let a client in whose model is this one."""
        group = join.identity.group
        with self._lock:
            offer, unavailable = self._offers.get(group), self._unavailable.get(group)
            epoch = self._epochs.get(group, 0)
        try:
            if offer is None:
                raise unavailable or Refusal(
                    Code.NO_MODEL, f"there is no model of group {group!r} here"
                )
            if differ := api.differences(join.identity, offer.identity):
                raise Refusal(Code.OTHER_MODEL, "the models differ", differences=differ)
            if offer.store is None:
                raise Refusal(Code.CANNOT_SERVE, offer.reason)
            known = offer.store.digests.weights
            if join.weights not in (None, known):
                raise Refusal(Code.OTHER_WEIGHTS, f"the weights digest is {known}")
        except Refusal as refusal:
            self._log_refusal(session, refusal)
            raise
        with self._lock:
            self._session(session, offer.store)
        joined = Joined(known, epoch, INSTANCE, offer.identity.revision)
        if join.weights == known:
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
            served = self._session(session, self._store(weights))
        store = served.store
        if not store.blocks.contains(run):
            allowed = f"there are no blocks {run}; allowed: 0-{store.blocks.count - 1}"
            raise Refusal(Code.OUT_OF_RANGE, allowed)
        with _as_refusals():
            store.check(run)
        return Bytes(store.blocks.size_of(run), self._pieces(served, run))

    def open_group(self, session: Session, weights: str) -> "_ServedGroup":
        """Begin to form a two-rank group with the client."""
        with self._lock:
            served = self._session(session, self._store(weights))
        accelerator = served.store.device.accelerator
        if accelerator is None or self.config.transport is Transport.HTTP:
            raise Refusal(Code.NO_GROUPS, "this instance sends over HTTP only")
        group = _ServedGroup(session, served, accelerator, self.config, self._limiter)
        session.on_close(group.close)
        group.start()
        return group

    def done(self, session: Session, done: Done) -> None:
        """Take note of how the client's session has ended."""
        with self._lock:
            served = self._served.get(session)
        if served is not None:
            gave_up = f"the client gave up: {shortened(done.reason, 300)}"
            served.end = api.COMPLETE if done.complete else gave_up

    def status(self, sessions: int) -> api.Status:
        """Say how this instance is."""
        with self._lock:
            models = [
                api.ModelStatus(
                    offer.identity,
                    "serving" if offer.store is not None else Code.CANNOT_SERVE.text,
                    offer.reason,
                    offer.store.digests.weights if offer.store is not None else None,
                    self._epochs[group],
                    offer.loaded_from,
                )
                for group, offer in self._offers.items()
            ]
            served = [*self._served.values()]
            bytes_sent = self._bytes_sent + sum(one.bytes_sent for one in served)
        return api.Status(
            version=__version__,
            instance=INSTANCE,
            rank=self.rank,
            models=models,
            sessions=[one.status() for one in served],
            places=self.config.max_sessions,
            places_taken=sessions,
            bytes_sent=bytes_sent,
        )

    def _store(self, weights: str) -> BlockStore:
        """Return the store of a weights digest; the lock is held."""
        for offer in self._offers.values():
            if offer.store is not None and offer.store.digests.weights == weights:
                return offer.store
        raise Refusal(Code.CHANGED, "these weights are not served here, or no longer")

    def _session(self, session: Session, store: BlockStore) -> "_Served":
        """Return what a session gets from a store, which may be new to it; the lock is held."""
        served = self._served.get(session)
        if served is not None and served.store is store:
            return served
        if served is None:
            session.on_close(lambda: self._over(session))
        else:
            self._end(served)
        served = self._served[session] = _Served(session, store, self._limiter)
        return served

    def _over(self, session: Session) -> None:
        with self._lock:
            self._end(self._served.pop(session))

    def _end(self, served: "_Served") -> None:
        """Count and log what a session got from a store; the lock is held."""
        self._bytes_sent += served.bytes_sent
        served.log(self.rank)

    def _pieces(self, served: "_Served", run: Run) -> Generator[list[memoryview], None, None]:
        """Yield the memory of a run, piece by piece, as the rate limiter lets them go."""
        nbytes = min(_PIECE, self.config.max_message_bytes)
        with served.store.device.attached():
            for piece in served.store.blocks.split(run, nbytes):
                with _as_refusals():
                    views = served.views(piece)
                yield views

    def _log_refusal(self, session: Session, refusal: Refusal) -> None:
        # A client that is to come again asks many times.
        log = logger.debug if refusal.code.error is SourceBusy else logger.info
        log(
            "NetLoader rank %d: declined %s: %s",
            self.rank,
            session.peer,
            one_line(": ".join([str(refusal), *map(str, refusal.problem.differences)])),
        )


class _Served:
    """What one session gets: the store it pulls, and how much of it was sent."""

    def __init__(self, session: Session, store: BlockStore, limiter: RateLimiter) -> None:
        self.store = store
        self.end = ""
        self._peer = session.peer
        self._started = time.monotonic()
        self._views: list[memoryview] = []
        self._http = P2PSend(store, HttpSender(store, self._views.extend), limiter)
        self._group: P2PSend | None = None

    @property
    def bytes_sent(self) -> int:
        """Bytes of blocks that were sent, by any transport."""
        return self._http.bytes_sent + (self._group.bytes_sent if self._group else 0)

    def views(self, run: Run) -> list[memoryview]:
        """Return the memory of a run that goes out over HTTP."""
        self._views.clear()
        self._http.send(run)
        return [*self._views]

    def through(self, sender: GroupSender, limiter: RateLimiter) -> P2PSend:
        """Return what sends through a group."""
        self._group = P2PSend(self.store, sender, limiter)
        return self._group

    def status(self) -> api.SessionStatus:
        """Say how far it is."""
        seconds = time.monotonic() - self._started
        return api.SessionStatus(
            str(self._peer), self.store.digests.weights, self.bytes_sent, round(seconds, 3)
        )

    def log(self, rank: int) -> None:
        """Write the session's one line: a warning unless it ended as it should."""
        seconds = time.monotonic() - self._started
        log = logger.info if self.end == api.COMPLETE else logger.warning
        log(
            "NetLoader rank %d: sent %s of %s (%d tensors) in %.2f s (%s) to %s, weights digest "
            "%s: %s",
            rank,
            size(self.bytes_sent),
            size(self.store.blocks.nbytes),
            len(self.store.tensors),
            seconds,
            rate(self.bytes_sent, seconds),
            self._peer,
            self.store.digests.weights,
            one_line(self.end) or "the client went away",
        )


class _ServedGroup:
    """The source's end of a two-rank group; see `interaction.elastic.Group`."""

    def __init__(
        self,
        session: Session,
        served: _Served,
        accelerator: Accelerator,
        config: NetLoaderConfig,
        limiter: RateLimiter,
    ) -> None:
        self.max_bytes = config.max_message_bytes
        self._session = session
        self._served = served
        self._accelerator = accelerator
        self._config = config
        self._limiter = limiter
        self._mailbox = Mailbox()
        self._formed: Future[TransferGroup] = Future()
        self._sender: GroupSender | None = None
        self._send: P2PSend | None = None

    def start(self) -> None:
        """Begin to form the group, in a thread of its own."""
        threading.Thread(target=self._form, name="netloader-group", daemon=True).start()

    def exchange(self, values: list[api.Value]) -> list[api.Value]:
        """Pass values of the group's store on, both ways."""
        with _as_refusals():
            return self._mailbox.exchange(values, api.MAX_EXCHANGE_SECONDS)

    def sizes(self, runs: list[api.Run]) -> list[int]:
        """Return the sizes of runs that can be sent."""
        blocks = self._served.store.blocks
        sizes = []
        for run in (Run(*run) for run in runs):
            if not blocks.contains(run) or blocks.size_of(run) > self.max_bytes:
                allowed = f"blocks 0-{blocks.count - 1}, {self.max_bytes} bytes of them at once"
                raise Refusal(Code.OUT_OF_RANGE, f"blocks {run} asked for; allowed: {allowed}")
            with _as_refusals():
                self._served.store.check(run)
            sizes.append(blocks.size_of(run))
        return sizes

    def send(self, runs: list[api.Run]) -> None:
        """Start to send runs, after waiting for room in the window."""
        with self._accelerator.attached(), _as_refusals():
            send = self._ready()
            for run in runs:
                send.send(Run(*run))

    def settle(self) -> None:
        """Return when all that was sent has arrived."""
        if self._sender is not None:
            with self._accelerator.attached(), _as_refusals():
                self._sender.finish()

    def close(self) -> None:
        """Leave the group, or stop forming it."""
        self._mailbox.close()
        with contextlib.suppress(Exception):  # it was not formed
            self._formed.result(self._config.handshake_timeout).close()

    def _form(self) -> None:
        config, mailbox = self._config, self._mailbox
        try:
            with self._accelerator.attached():
                group = form_group(
                    self._accelerator,
                    mailbox.tell,
                    mailbox.hear,
                    SOURCE,
                    self._session.local_host,
                    handshake=config.handshake_timeout,
                    progress=config.progress_timeout,
                    gone=self._session.gone,
                )
        except BaseException as error:
            self._formed.set_exception(error)
        else:
            self._formed.set_result(group)

    def _ready(self) -> P2PSend:
        """Return what sends through the group, once that is formed."""
        if self._send is None:
            handshake = self._config.handshake_timeout
            try:
                group = self._formed.result(handshake)
            except TimeoutError:
                raise RuntimeError(f"no process group within {handshake:g} s") from None
            self._sender = GroupSender(group, self._served.store, self._accelerator)
            self._send = self._served.through(self._sender, self._limiter)
        return self._send


@contextlib.contextmanager
def _as_refusals() -> Iterator[None]:
    """Tell the client in a code what keeps the data plane from sending."""
    try:
        yield
    except Withdrawn as error:
        raise Refusal(Code.CHANGED, str(error)) from None
    except NotHere as error:
        raise Refusal(Code.NOT_HERE, str(error)) from None
    except (RuntimeError, ProtocolError, TimeoutError) as error:  # torch raises RuntimeErrors
        raise Refusal(Code.TRANSFER_FAILED, one_line(error)) from None
