"""Both ends of a control connection: `ElasticClient` and `ElasticServer`."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

from ..errors import ChunksRefused, ProtocolError, SourceLost, SourceRefused
from ..identity import ModelIdentity
from ..utils import Address, logger, unmapped
from .protocol import (
    MAX_JOIN_BYTES,
    MAX_REQUEST_BYTES,
    Abort,
    Connection,
    Done,
    Fetch,
    Join,
    JoinAck,
    JoinNack,
    Missing,
    Reply,
    Request,
    Sending,
    Status,
    StatusRequest,
    StoreSet,
    shortened,
)

_LAST_WORDS = 0.2  # seconds for them to arrive, on their way since before the transfer failed
MAX_HANDSHAKES = 64  # connections that have not joined yet; over that the oldest is dropped


class ElasticClient:
    """A client's side of one control connection.

    Every failure is a `SourceError` that begins with the source's address.
    """

    def __init__(
        self, address: Address, connection: Connection, handshake: float, progress: float
    ) -> None:
        self.address = address
        self._connection = connection
        self._handshake = handshake
        self._progress = progress

    @classmethod
    def connect(
        cls, address: Address, *, connect: float, handshake: float, progress: float
    ) -> "ElasticClient":
        """Connect to a source.

        Args:
            address: where it listens.
            connect: seconds to reach it.
            handshake: seconds for its answer to a JOIN.
            progress: seconds for any later answer.

        Raises:
            SourceLost: it cannot be reached.
        """
        try:
            sock = socket.create_connection((address.host, address.port), timeout=connect)
        except (OSError, UnicodeError) as error:
            raise SourceLost(f"{address}: cannot connect: {_reason(error)}") from None
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            return cls(address, Connection(sock), handshake, progress)
        except OSError as error:
            sock.close()
            raise SourceLost(f"{address}: cannot connect: {_reason(error)}") from None

    @property
    def local_host(self) -> str:
        """The address of this machine that the source sees."""
        return unmapped(self._connection.local_host)

    def __enter__(self) -> "ElasticClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def join(self, join: Join, identity: ModelIdentity) -> JoinAck:
        """Ask for a session.

        Args:
            join: the question.
            identity: this client's identity, to say what differs when the source declines.

        Raises:
            ChunksRefused: the source does not make the chunks asked for, but others.
            SourceRefused: the source declined.
            SourceLost: it did not answer, or not with a valid message.
        """
        reply = self._ask(join, self._handshake)
        if isinstance(reply, JoinAck):
            return reply
        if isinstance(reply, JoinNack):
            reason = shortened(reply.reason)
            if reply.max_chunk_bytes:
                raise ChunksRefused(f"{self.address}: refused: {reason}")
            if reply.identity is not None:
                reason += ": " + "; ".join(map(shortened, identity.differences(reply.identity)))
            raise SourceRefused(f"{self.address}: refused: {reason}")
        raise self._unexpected(reply)

    def request(self, chunks: list[int]) -> None:
        """Ask for chunks; `sending` has the answer, one for each request, in order."""
        with self._failures():
            self._connection.send(Fetch(chunks), self._progress)

    def sending(self) -> Sending:
        """Return the answer to the oldest request that has not been answered yet.

        Raises:
            SourceLost: the source gave up, went away, or does not have the chunks.
        """
        with self._failures():
            reply = self._connection.receive_reply(self._progress)
        if isinstance(reply, Sending) and len(reply.chunks) == len(reply.digests) == len(
            reply.sizes
        ):
            return reply
        raise self._unexpected(reply)

    def tell(self, key: str, value: bytes) -> None:
        """Set a value in the store of the process group that is being built."""
        self._connection.send(StoreSet(key, value), self._handshake)

    def hear(self, timeout: float) -> tuple[str, bytes]:
        """Return the key and the value that the source has set next.

        Raises:
            OSError: the connection failed or ended, or the time was up.
            ProtocolError: what came is not a valid message.
            SourceLost: the source gave up.
        """
        reply = self._connection.receive_reply(timeout, MAX_REQUEST_BYTES)
        if isinstance(reply, StoreSet):
            return reply.key, reply.value
        raise self._unexpected(reply)

    @property
    def answered(self) -> bool:
        """Whether something has come that `sending` has not returned yet."""
        return self._connection.has_data

    def hung_up(self) -> bool:
        """Return whether the source has closed the connection, or its process has ended."""
        return self._connection.hung_up

    def last_words(self) -> str:
        """Return why the source gave up, if it has said so; to be asked when a transfer failed."""
        deadline = time.monotonic() + 1  # for all that was said before
        with contextlib.suppress(OSError, ProtocolError):
            while time.monotonic() < deadline:
                reply = self._connection.receive_reply(_LAST_WORDS)
                if isinstance(reply, Abort | Missing):
                    return shortened(reply.reason)
        return ""

    def finish(self, last: Done | Abort) -> None:
        """Say goodbye; whether the source hears it makes no difference."""
        with contextlib.suppress(OSError, ProtocolError):
            self._connection.send(last, self._progress)

    def status(self) -> Status:
        """Ask how the source is, in the place of a JOIN."""
        reply = self._ask(StatusRequest(), self._handshake)
        if isinstance(reply, Status):
            return reply
        raise self._unexpected(reply)

    def _ask(self, request: Request, timeout: float) -> Reply:
        with self._failures():
            self._connection.send(request, timeout)
            return self._connection.receive_reply(timeout)

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ProtocolError) as error:
            raise SourceLost(f"{self.address}: {_reason(error)}") from None

    def _unexpected(self, reply: Reply) -> SourceLost:
        if isinstance(reply, Abort | Missing):
            return SourceLost(f"{self.address}: gave up: {shortened(reply.reason)}")
        return SourceLost(f"{self.address}: a {type(reply).__name__} does not belong here")


class ElasticServer:
    """One listening socket, an accept thread, and a thread for each connection.

    Args:
        handle_session: called in the connection's thread with a valid JOIN, once one of the
            `max_sessions` places is free; the session is over when it returns or raises.
        status: makes the answer to STATUS from the number of sessions.
        prepare: called before that, without a place, to wait for what the JOIN asks for.
        max_sessions: sessions at once; more are answered "busy".
        handshake_timeout: seconds in which a new connection has to send its first message.
    """

    def __init__(
        self,
        handle_session: Callable[[Join, Connection], None],
        status: Callable[[int], Status],
        prepare: Callable[[Join], None],
        *,
        max_sessions: int,
        handshake_timeout: float,
    ) -> None:
        self._handle_session = handle_session
        self._status = status
        self._prepare = prepare
        self._max_sessions = max_sessions
        self._handshake_timeout = handshake_timeout
        self._listener: socket.socket | None = None
        self._accepting: threading.Thread | None = None
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._handshakes: dict[Connection, threading.Thread] = {}
        self._sessions: dict[Connection, threading.Thread] = {}

    def start(self, host: str | None, port: int) -> int:
        """Listen, and accept connections in a thread of its own.

        Args:
            host: address to listen on; None: all of them, IPv4 and IPv6.
            port: port to listen on; 0: the system chooses.

        Returns:
            The port.

        Raises:
            OSError: the port is taken, or the address is not one of this machine.
        """
        self._listener = _listen(host, port)
        self._accepting = threading.Thread(
            target=self._accept, args=(self._listener,), name="netloader-accept", daemon=True
        )
        self._accepting.start()
        return int(self._listener.getsockname()[1])

    def stop(self, timeout: float = 5.0) -> None:
        """Close the port and every connection, and wait for the threads.

        Args:
            timeout: seconds that the threads are waited for, all together.
        """
        self._stopping.set()
        if self._listener is not None:
            with contextlib.suppress(OSError):  # wakes the accept thread; close alone does not
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
        if self._accepting is not None:  # first, as it may be about to add a connection
            self._accepting.join(timeout)
        with self._lock:
            sessions, open_now = [*self._sessions.values()], {**self._handshakes, **self._sessions}
        deadline = time.monotonic() + _LAST_WORDS
        for thread in sessions:  # which may be telling their clients why
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))
        for connection in open_now:
            connection.cut()
        for thread in open_now.values():
            if thread is not threading.current_thread():
                thread.join(timeout / len(open_now))

    @property
    def sessions(self) -> int:
        """Number of open sessions."""
        with self._lock:
            return len(self._sessions)

    def _accept(self, listener: socket.socket) -> None:
        while not self._stopping.is_set():
            try:
                sock, _ = listener.accept()
            except OSError as error:
                if self._stopping.is_set():
                    return
                # Out of descriptors, say: what is open now will free some.
                logger.warning("NetLoader: cannot accept a connection: %s", _reason(error))
                self._stopping.wait(0.2)
                continue
            try:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection = Connection(sock)
            except OSError:  # gone already
                sock.close()
                continue
            thread = threading.Thread(
                target=self._serve, args=(connection,), name="netloader-session", daemon=True
            )
            with self._lock:
                oldest = next(iter(self._handshakes)) if self._full() else None
                if oldest is not None:  # now, as its thread may take its time to notice
                    del self._handshakes[oldest]
                    oldest.cut()
                self._handshakes[connection] = thread
            try:
                thread.start()
            except RuntimeError as error:  # no more threads
                logger.warning("NetLoader: cannot serve a connection: %s", _reason(error))
                self._forget(connection)

    def _full(self) -> bool:
        return len(self._handshakes) >= MAX_HANDSHAKES

    def _serve(self, connection: Connection) -> None:
        peer = Address(unmapped(connection.peer_host), connection.peer_port)
        try:
            request = connection.receive_request(
                self._handshake_timeout, MAX_JOIN_BYTES, first=True
            )
            if isinstance(request, StatusRequest):
                connection.send(self._status(self.sessions), self._handshake_timeout)
            elif not isinstance(request, Join):
                raise ProtocolError(f"a {type(request).__name__} came before a JOIN")
            else:
                self._prepare(request)
                self._admit_and_handle(request, connection)
        except ProtocolError as error:
            logger.warning("NetLoader: %s: %s", peer, error)
            with contextlib.suppress(OSError):
                connection.send(JoinNack(str(error)), self._handshake_timeout)
        except OSError as error:
            logger.debug("NetLoader: %s: %s", peer, _reason(error))
        except Exception:
            # Whatever a peer provokes ends its own session, never the source.
            logger.exception("NetLoader: %s: the session failed", peer)
        finally:
            self._forget(connection)

    def _admit_and_handle(self, join: Join, connection: Connection) -> None:
        if self._admit(connection):
            self._handle_session(join, connection)
        else:
            busy = f"busy: {self._max_sessions} of {self._max_sessions} sessions are open"
            connection.send(JoinNack(busy), self._handshake_timeout)

    def _admit(self, connection: Connection) -> bool:
        with self._lock:
            if len(self._sessions) >= self._max_sessions:
                return False
            self._handshakes.pop(connection, None)
            self._sessions[connection] = threading.current_thread()
            return True

    def _forget(self, connection: Connection) -> None:
        with self._lock:
            self._handshakes.pop(connection, None)
            self._sessions.pop(connection, None)
        connection.close()


def _listen(host: str | None, port: int) -> socket.socket:
    if host is None and socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            # On a machine without IPv6 this fails, and IPv4 alone serves everybody there.
            return _create_server(socket.AF_INET6, "", port, dualstack=True)
    if host is None:
        return _create_server(socket.AF_INET, "", port)
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    return _create_server(family, host, port)


def _create_server(family: int, host: str, port: int, *, dualstack: bool = False) -> socket.socket:
    return socket.create_server((host, port), family=family, backlog=128, dualstack_ipv6=dualstack)


def _reason(error: BaseException) -> str:
    return shortened(getattr(error, "strerror", None) or str(error) or type(error).__name__)
