"""The source's story: a model offered, and sessions in which clients pull it."""

import functools
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass

import msgspec

from .config import MIB, NetLoaderConfig
from .errors import ProtocolError
from .executor.devices import Device
from .executor.digest import Digests, digest_model
from .executor.elastic_load import P2PSend
from .executor.pace import Pace
from .executor.pieces import size_of
from .executor.plan import Plan, make_plan
from .executor.process_group import SOURCE, form_group
from .executor.weights import Weights
from .identity import ModelIdentity
from .interaction.elastic import ElasticServer
from .interaction.protocol import (
    PROTOCOL,
    Abort,
    Connection,
    Done,
    Fetch,
    Join,
    JoinAck,
    JoinNack,
    Missing,
    Request,
    Sending,
    Status,
    StoreSet,
    shortened,
)
from .port_file import PortFile
from .utils import Address, gigabytes_per_second, logger, one_line, unmapped

# Plans and digests kept for such clients, besides the model's own.
_OTHER_CHUNKINGS = 2


@dataclass(frozen=True)
class Chunking:
    """A model cut into chunks of one size.

    Attributes:
        plan: the chunks.
        digests: their checksums.
    """

    plan: Plan
    digests: Digests


class Offer:
    """One model of this instance, or the reason why it is not to be had.

    Args:
        identity: what it is.
        weights: its tensors; None: not to be had.
        reason: why not.
        device: where the tensors are.

    Attributes:
        declined: why it is not to be had; empty if it is.
        withdrawn: set once it is not to be had any more.
    """

    def __init__(
        self,
        identity: ModelIdentity,
        weights: Weights | None,
        device: Device,
        reason: str = "",
    ) -> None:
        self.identity = identity
        self.weights = weights
        self.device = device
        self.declined = reason
        self.withdrawn = threading.Event()
        self._lock = threading.Lock()
        self._chunkings: OrderedDict[int, Chunking] = OrderedDict()

    def withdraw(self, reason: str) -> None:
        """Send nothing of it any more."""
        self.declined = reason
        self.withdrawn.set()

    @functools.cached_property
    def manifest(self) -> msgspec.Raw:
        """The manifest as it travels."""
        assert self.weights is not None
        return msgspec.Raw(msgspec.json.encode(self.weights.manifest))

    def chunking(self, chunk_bytes: int) -> Chunking:
        """Return the model's chunks of one size; 0: the size it was hashed in, at no cost."""
        assert self.weights is not None
        own = self.weights.plan.chunk_bytes
        if chunk_bytes in (0, own):
            return Chunking(self.weights.plan, self.weights.digests)
        with self._lock:
            if chunk_bytes not in self._chunkings:
                tensors = self.weights.tensors
                plan = make_plan([size_of(tensor) for tensor in tensors], chunk_bytes)
                digests = digest_model(self.weights.manifest, plan, tensors, self.device)
                self._chunkings[chunk_bytes] = Chunking(plan, digests)
            self._chunkings.move_to_end(chunk_bytes)
            while len(self._chunkings) > _OTHER_CHUNKINGS:
                self._chunkings.popitem(last=False)
            return self._chunkings[chunk_bytes]


class WeightServer:
    """Serves the models of one worker process on one port.

    Args:
        config: port, bounds and deadlines.
        rank: this worker's global rank.
        host: the address of this machine that others reach.

    Attributes:
        listening: whether it has been started.
    """

    def __init__(self, config: NetLoaderConfig, rank: int, host: str) -> None:
        self._config = config
        self._rank = rank
        self._host = host
        self._offers: dict[str, Offer] = {}
        self._expected: set[str] = set()
        self._bytes_sent = 0
        self._pace = Pace(config.max_send_rate)
        self._lock = threading.Lock()
        self._offered = threading.Condition(self._lock)
        self._port_file: PortFile | None = None
        self.listening = False
        self._server = ElasticServer(
            self._serve,
            self._status,
            self._await_offer,
            max_sessions=config.max_sessions,
            handshake_timeout=config.handshake_timeout,
        )

    def start(self, port: int) -> Address:
        """Listen on `port` (0: the system chooses) and publish the address (OUTPUT_PREFIX).

        Raises:
            OSError: the port is taken, or the port file cannot be written; nothing is left open.
        """
        address = Address(self._host, self._server.start(self._config.listen_host, port))
        if self._config.output_prefix is not None:
            self._port_file = PortFile(self._config.output_prefix, self._rank, address)
            try:
                self._port_file.publish()
            except OSError:
                self.stop()
                raise
        self.listening = True
        logger.info("NetLoader rank %d: listening on %s", self._rank, address)
        return address

    def offer(self, offer: Offer) -> None:
        """Offer a model, in the place of any earlier one of its group."""
        self.withdraw(offer.identity.group)
        with self._offered:
            self._offers[offer.identity.group] = offer
            self._expected.discard(offer.identity.group)
            self._offered.notify_all()

    def expect(self, group: str) -> None:
        """Let clients that ask for this group's model wait a little, as it is being loaded."""
        with self._lock:
            if group not in self._offers:
                self._expected.add(group)

    def withdraw(self, group: str) -> None:
        """Offer a group's model no more; sessions that pull it end."""
        with self._lock:
            offer = self._offers.pop(group, None)
        if offer is not None:
            offer.withdraw("the weights are being replaced")

    def stop(self) -> None:
        """Close the port and all sessions, and remove the port file if it is still this one's."""
        with self._lock:
            for offer in self._offers.values():
                offer.withdraw("the source is shutting down")
            self._offers.clear()
            self._expected.clear()
            self._offered.notify_all()
        self._server.stop()
        if self._port_file is not None:
            self._port_file.remove()

    def _status(self, sessions: int) -> Status:
        with self._lock:
            identities = [offer.identity for offer in self._offers.values()]
            sent = self._bytes_sent
        return Status(identities, sessions, self._config.max_sessions, sent)

    def _await_offer(self, join: Join) -> None:
        """Wait for a model that is being loaded."""
        # A client waits for its answer for as long as its own deadline says, likely the same.
        patience = self._config.handshake_timeout / 2
        with self._offered:
            self._offered.wait_for(lambda: join.group_name not in self._expected, patience)

    def _serve(self, join: Join, connection: Connection) -> None:
        with self._lock:
            offer = self._offers.get(join.group_name)
        nack = self._objection(join, offer)
        if nack is not None:
            logger.info(
                "NetLoader rank %d: declined %s: %s",
                self._rank,
                _peer(connection),
                nack.reason,
            )
            connection.send(nack, self._config.handshake_timeout)
            return
        assert offer is not None
        with offer.device.attached():
            session = _Session(self._config, self._rank, offer, join, connection, self._pace)
            try:
                session.run()
            finally:
                with self._lock:
                    self._bytes_sent += session.bytes_sent

    def _objection(self, join: Join, offer: Offer | None) -> JoinNack | None:
        if join.protocol != PROTOCOL:
            return JoinNack(f"protocol {join.protocol} is not spoken here, only {PROTOCOL}")
        if offer is None:
            yet = " yet" if join.group_name in self._expected else ""
            return JoinNack(f"there is no model of group {join.group_name!r} here{yet}")
        own = offer.identity
        if join.identity != own.digest() or join.revision.differs(own.revision):
            return JoinNack("the models differ", own)
        if offer.declined:
            return JoinNack(offer.declined)
        if join.chunk_bytes % MIB or join.chunk_bytes > self._config.max_chunk_bytes:
            largest = self._config.max_chunk_bytes
            return JoinNack(
                f"chunks of {join.chunk_bytes} bytes are not made here, only multiples of {MIB} up "
                f"to {largest}",
                max_chunk_bytes=largest,
            )
        return None


class _Session:
    """One client pulling one model."""

    def __init__(
        self,
        config: NetLoaderConfig,
        rank: int,
        offer: Offer,
        join: Join,
        connection: Connection,
        pace: Pace,
    ) -> None:
        self._config = config
        self._rank = rank
        self._offer = offer
        self._connection = connection
        self._pace = pace
        self._chunking = offer.chunking(join.chunk_bytes or self._chunk_bytes())
        self._end = "cut off"
        self.bytes_sent = 0

    def run(self) -> None:
        """Serve until the client is done, gives up or goes away; one log line says which."""
        started = time.monotonic()
        try:
            self._transfer()
        except (OSError, RuntimeError, ProtocolError) as error:  # torch raises RuntimeErrors
            self._end = one_line(error) or type(error).__name__
            # Cutting the connection tells a client that waits in a transfer, too.
        finally:
            seconds = time.monotonic() - started
            logger.info(
                "NetLoader rank %d: sent %.1f MB of %d tensors in %.2f s (%.2f GB/s) to %s, "
                "digest %s: %s",
                self._rank,
                self.bytes_sent / 1e6,
                len(self._offer.weights.tensors) if self._offer.weights else 0,
                seconds,
                gigabytes_per_second(self.bytes_sent, seconds),
                _peer(self._connection),
                self._chunking.digests.model,
                self._end,
            )

    def _chunk_bytes(self) -> int:
        """The chunk size for a client that does not mind; 0: the one hashed already."""
        assert self._offer.weights is not None
        own = self._offer.weights.plan.chunk_bytes
        return 0 if own <= self._config.max_chunk_bytes else self._config.chunk_bytes

    def _transfer(self) -> None:
        offer, config, connection = self._offer, self._config, self._connection
        assert offer.weights is not None
        ack = JoinAck(
            self._chunking.plan.chunk_bytes,
            offer.device.digest_algorithm,
            self._chunking.digests.model,
            offer.manifest,
            offer.identity.revision,
        )
        connection.send(ack, config.handshake_timeout)
        # A client that does not take the offer says so here, and nobody waits for its group.
        request = connection.receive_request(config.handshake_timeout)
        if not isinstance(request, Fetch):
            self._note_end(request)
            return
        with form_group(
            offer.device,
            self._tell,
            self._hear,
            SOURCE,
            unmapped(connection.local_host),
            handshake=config.handshake_timeout,
            progress=config.progress_timeout,
            gone=lambda: connection.hung_up,
        ) as group:
            sender = P2PSend(group, offer.weights.tensors, self._chunking.plan, offer.device)
            try:
                while isinstance(request, Fetch) and self._send(request, sender):
                    request = self._next_request(sender)
                if isinstance(request, Done):
                    sender.finish()
                self._note_end(request)
            finally:
                self.bytes_sent = sender.bytes_sent

    def _tell(self, key: str, value: bytes) -> None:
        self._connection.send(StoreSet(key, value), self._config.handshake_timeout)

    def _hear(self, timeout: float) -> tuple[str, bytes]:
        request = self._connection.receive_request(timeout)
        if isinstance(request, StoreSet):
            return request.key, request.value
        if isinstance(request, Abort):
            self._note_end(request)
            raise RuntimeError(self._end)
        raise ProtocolError(f"a {type(request).__name__} came before the process group")

    def _next_request(self, sender: P2PSend) -> Request:
        try:
            return self._connection.receive_request(self._config.progress_timeout)
        except TimeoutError:
            if not sender.in_flight:
                raise
            # A client whose chunks still move is slow, not gone.
            sender.finish()
            return self._connection.receive_request(self._config.progress_timeout)

    def _send(self, request: Fetch, sender: P2PSend) -> bool:
        """Serve a request; return whether another one may come."""
        timeout = self._config.progress_timeout
        count = len(self._chunking.plan.chunks)
        if any(chunk >= count for chunk in request.chunks):
            raise ProtocolError(f"chunks {request.chunks} asked for; there are {count}")
        if self._declined(request.chunks):
            return False
        digests = [self._chunking.digests.chunks[chunk] for chunk in request.chunks]
        sizes = [self._chunking.plan.chunks[chunk].nbytes for chunk in request.chunks]
        self._connection.send(Sending(request.chunks, digests, sizes), timeout)
        for index, (chunk, nbytes) in enumerate(zip(request.chunks, sizes, strict=True)):
            self._pace.wait(nbytes, self._offer.withdrawn)
            if self._declined(request.chunks[index:]):
                return False
            sender.post(chunk)
        return True

    def _declined(self, chunks: list[int]) -> bool:
        """Return whether the model is not to be had any more, and if so tell the client."""
        if self._offer.declined:
            missing = Missing(chunks, self._offer.declined)
            self._connection.send(missing, self._config.progress_timeout)
            self._end = self._offer.declined
        return bool(self._offer.declined)

    def _note_end(self, request: Request) -> None:
        if isinstance(request, Done):
            self._end = "complete"
            if request.model_digest and request.model_digest != self._chunking.digests.model:
                self._end = f"the client has digest {request.model_digest}"
        elif isinstance(request, Abort):
            self._end = f"the client gave up: {shortened(request.reason, 300)}"
        elif not isinstance(request, Fetch):
            raise ProtocolError(f"a {type(request).__name__} does not belong in a session")


def _peer(connection: Connection) -> Address:
    return Address(unmapped(connection.peer_host), connection.peer_port)
