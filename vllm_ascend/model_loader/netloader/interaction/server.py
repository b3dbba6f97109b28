"""A rank's HTTP server: `ElasticServer`, and what it asks of whoever serves the weights."""

import base64
import contextlib
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import Any, NoReturn, Protocol, cast

import msgspec

from ..credentials import Credentials
from ..utils import Buffer, logger, one_line, shortened
from . import api
from .api import Bytes, Code, Done, Join, Joined, Refusal, Status
from .page import PAGE, PAGE_HEADERS
from .tls import Doorkeeper, NotAdmitted, TlsWire
from .wire import Wire

# That hold no place; over that one is cut: the oldest that has no certificate where one is needed,
# else the one that has asked nothing for longest.
MAX_CONNECTIONS = 64
_MOST_READING = 2  # of the connections, files or records
_TURN = 1.0  # seconds to wait for that
_LAST_WORDS = 0.2  # seconds for sessions to tell their clients why the server stops
_FORMING = 0.5  # seconds until a group that is being formed is looked at again
_LINGER = 1.0  # seconds for a peer to stop sending once it was told that it need not
_JSON, _TEXT, _BYTES = "application/json", "text/plain; charset=utf-8", "application/octet-stream"
_TLS = b"\x16"  # how a handshake begins
_OTHER_NETLOADER = "it runs the NetLoader shipped in vLLM Ascend, which cannot load from this one"
_NO_TLS_HERE = "it uses TLS, and this instance has none (SECRET_FILE or TLS_CERT)"
_HTML, _PROMETHEUS = "text/html; charset=utf-8", "text/plain; version=0.0.4; charset=utf-8"
# What this package's own clients ask for most: parsing it with the standard library takes longer
# than all else that is done for it.
_PLAIN_GET = re.compile(
    rb"GET ([!-~]{1,%d}) HTTP/1\.1\r\nHost: [!-~]{1,300}\r\n\r\n" % (api.MAX_TARGET - 16)
)
_REQUEST_LINE = re.compile(rb"[A-Za-z]{1,20} [!-~]+ HTTP/1\.[01]\r?\n")
# The NetLoader in vLLM Ascend sends bare JSON and reads 1,024 bytes of an answer in its own form.
_NACK = (
    b'{"label":"JOIN_NACK","content":"this is a NetLoader that speaks HTTP; '
    b'the NetLoader shipped in vLLM Ascend cannot load from it"}'
)


class Session:
    """What a service knows of one connection.

    Attributes:
        peer: the client's end of it.
        local_host: this machine's address that the client uses.
    """

    def __init__(self, wire: Wire) -> None:
        self.peer = wire.peer
        self.local_host = wire.local_host
        self._wire = wire
        self._lock = threading.Lock()
        self._at_the_end: list[Callable[[], object]] | None = []

    def gone(self) -> bool:
        """Return whether the client has ended the connection; whoever waits asks now and then."""
        return self._wire.hung_up

    def cut(self) -> None:
        """End the connection, also while something is being sent."""
        self._wire.cut()

    def on_close(self, call: Callable[[], object]) -> None:
        """Call something when the connection ends, the last one first; now if it has ended."""
        with self._lock:
            if self._at_the_end is not None:
                self._at_the_end.append(call)
                return
        call()

    def close(self) -> None:
        """End what has to end with the connection; the server's to call."""
        with self._lock:
            calls, self._at_the_end = self._at_the_end or [], None
        for call in reversed(calls):
            try:
                call()
            except Exception:
                logger.exception("NetLoader: %s: ending the session failed", self.peer)


class Group(Protocol):
    """A two-rank group of one session; `Session.on_close` ends it."""

    def exchange(self, values: list[api.Value]) -> list[api.Value]:
        """Take what the client has set in the group's store, return what is new on this side.

        Waits up to `api.MAX_EXCHANGE_SECONDS` for something new, unless the client has set
        something.
        """

    @property
    def forming(self) -> bool:
        """Whether it is still being formed, which has a deadline of its own."""

    @property
    def max_bytes(self) -> int:
        """Size of a run that is not to be exceeded."""

    def sizes(self, runs: list[api.Run]) -> list[int | None]:
        """Return the bytes of each run that `send` is called for next; None: it is not to be."""

    def send(self, runs: list[api.Run]) -> None:
        """Send the runs through the group, in order, or start to."""

    def settle(self) -> None:
        """Return when all that was sent has arrived."""


class Service(Protocol):
    """Whoever has the weights; called in the threads of connections.

    Every method may raise `Refusal`. What else it raises is logged, and the client is told
    `internal`; if the client is gone, any exception will do to end a wait.
    """

    def join(self, session: Session, join: Join) -> Joined:
        """Let a client in."""

    def blocks(self, session: Session, digest: str, first: int, last: int) -> Bytes:
        """Return the bytes of blocks, `last` included."""

    def others(self, join: Join) -> tuple[str, list[api.Peer], Mapping[int, str]] | None:
        """Return the digest of what a client wants, whom else to ask, and what goes with it."""

    def have(self, session: Session, weights: str, since: int, wait: int) -> api.Have:
        """Return which blocks have come, after waiting for something new."""

    def peers_of(self, weights: str) -> list[api.Peer]:
        """Return who else gets or has these weights."""

    def records(self, session: Session, weights: str) -> bytes:
        """Return which box of which checkpoint tensor is where."""

    def regions(self, session: Session, weights: str, regions: list[api.Region]) -> Bytes:
        """Return the elements of regions, and their digest."""

    def check(self, session: Session, weights: str, first: int, last: int) -> None:
        """Compare blocks that a client has got wrong with their digests."""

    def open_group(self, session: Session, weights: str) -> Group:
        """Begin to form a group, in a thread of its own."""

    def done(self, session: Session, done: Done) -> None:
        """Take note of how a client's session ends."""

    def files(self, group: str) -> list[api.ModelFile]:
        """Return which files a model has beside its weights."""

    def file(self, group: str, name: str) -> Bytes:
        """Return what such a file has."""

    def status(self, sessions: int) -> Status:
        """Say how this instance is."""

    def metrics(self) -> bytes:
        """Return the metrics of this process as Prometheus reads them."""


class ElasticServer:
    """One listening socket, an accept thread, and a thread for each connection.

    Args:
        service: what answers.
        max_sessions: connections that may join, or ask for blocks or a group, at once.
        handshake_timeout: seconds for a new connection to ask something, and for any request to
            arrive once it has begun.
        progress_timeout: seconds that sending may take without the client receiving anything.
        idle_timeout: seconds from an answer to the next request.
        credentials: who is let in; None: everybody, without TLS.
        turned_away: called with the kind of each refusal of one who is not let in.

    Attributes:
        door: who was not let in.
        places: as many connections may have a place; first `max_sessions`.
        reading: held for each connection that reads files or records; few at once.
    """

    def __init__(
        self,
        service: Service,
        *,
        max_sessions: int,
        handshake_timeout: float,
        progress_timeout: float,
        idle_timeout: float,
        credentials: Credentials | None = None,
        turned_away: Callable[[str], object] = lambda kind: None,
    ) -> None:
        self.service = service
        self.credentials = credentials
        self.door = Doorkeeper(turned_away)
        self.handshake_timeout = handshake_timeout
        self.idle_timeout = idle_timeout
        self.places = max_sessions
        self.reading = threading.BoundedSemaphore(_MOST_READING)
        self._progress_timeout = progress_timeout
        self._listener: socket.socket | None = None
        self._accepting: threading.Thread | None = None
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._waiting: dict[Wire, threading.Thread] = {}  # who has asked last comes last
        self._placed: dict[Wire, threading.Thread] = {}

    def start(self, host: str | None, port: int) -> int:
        """Listen, and accept connections in a thread of its own.

        Args:
            host: address to listen on; None: all of them, IPv4 and IPv6.
            port: port to listen on; 0: the system chooses.

        Returns:
            The port.

        Raises:
            OSError: the port is taken, the address is not one of this machine, or there are no more
                threads.
        """
        self._listener = _listen(host, port)
        self._stopping.clear()
        accepting = threading.Thread(
            target=self._accept, args=(self._listener,), name="netloader-accept", daemon=True
        )
        try:
            accepting.start()
        except RuntimeError as error:  # no more threads
            self._listener.close()
            raise OSError(str(error)) from None
        self._accepting = accepting
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
            placed, open_now = [*self._placed.values()], {**self._waiting, **self._placed}
        _join(placed, _LAST_WORDS)  # which may be telling their clients why
        for wire in open_now:
            wire.cut()
        _join([*open_now.values()], timeout)

    @property
    def sessions(self) -> int:
        """Number of connections that hold a place."""
        with self._lock:
            return len(self._placed)

    def admit(self, wire: Wire) -> bool:
        """Give a connection a place; return whether it had none.

        Raises:
            Refusal: all are taken.
        """
        with self._lock:
            if wire in self._placed:
                return False
            if len(self._placed) >= self.places:
                taken = f"{len(self._placed)} of {self.places} sessions are open"
                raise Refusal(Code.BUSY, taken)
            self._waiting.pop(wire, None)
            self._placed[wire] = threading.current_thread()
            return True

    def heard(self, wire: Wire) -> None:
        """Take note that a peer has asked something: others are cut before it."""
        with self._lock:
            if (thread := self._waiting.pop(wire, None)) is not None:
                self._waiting[wire] = thread

    def dismiss(self, wire: Wire) -> None:
        """Take a connection's place back."""
        with self._lock:
            self._waiting[wire] = self._placed.pop(wire)

    def _accept(self, listener: socket.socket) -> None:
        failing = False
        while not self._stopping.is_set():
            try:
                sock, _ = listener.accept()
            except OSError as error:
                if self._stopping.is_set():
                    return
                # Out of descriptors, say: what is open now will free some.
                if not failing:
                    logger.warning("NetLoader: cannot accept connections: %s", one_line(error))
                failing = True
                self._stopping.wait(0.2)
                continue
            failing = False
            try:
                wire = self._wire(sock)
            except OSError:  # gone already
                sock.close()
                continue
            thread = threading.Thread(
                target=self._serve, args=(wire,), name="netloader-session", daemon=True
            )
            with self._lock:
                if len(self._waiting) >= MAX_CONNECTIONS:
                    strangers = (one for one in self._waiting if not one.trusted)
                    oldest = next(strangers, next(iter(self._waiting)))
                    del self._waiting[oldest]  # now, as its thread may take its time to notice
                    oldest.cut()
                self._waiting[wire] = thread
            try:
                thread.start()
            except RuntimeError as error:  # no more threads
                logger.warning("NetLoader: cannot serve a connection: %s", one_line(error))
                self._forget(wire)

    def _wire(self, sock: socket.socket) -> Wire:
        if self.credentials is None:
            return Wire(sock, self._progress_timeout)
        return TlsWire(sock, self._progress_timeout, self.credentials)

    def _serve(self, wire: Wire) -> None:
        session = Session(wire)
        try:
            wire.handshake(self.handshake_timeout)
            _Handler(wire, session, self)
        except NotAdmitted as error:
            self.door.note(wire.peer, error)
            wire.linger(_LINGER, 1 << 20)
        except OSError as error:
            logger.debug("NetLoader: %s: %s", wire.peer, one_line(error))
        except Exception:
            # Whatever a peer provokes ends its own connection, never the server.
            logger.exception("NetLoader: %s: the connection failed", wire.peer)
        finally:
            session.close()
            self._forget(wire)

    def _forget(self, wire: Wire) -> None:
        wire.close()
        with self._lock:
            self._waiting.pop(wire, None)
            self._placed.pop(wire, None)


class _Handler(BaseHTTPRequestHandler):
    """Answers the requests of one connection, one after the other, until it ends.

    Of the standard library's handler it takes the parsing of requests.
    """

    protocol_version = "HTTP/1.1"

    def __init__(self, wire: Wire, session: Session, server: ElasticServer) -> None:
        self._wire = wire
        self._session = session
        self._server = server
        self._groups: dict[str, Group] = {}
        self._refused = False
        # The base class serves the connection here: it is one in the form that it expects.
        super().__init__(cast(Any, wire), session.peer.host, cast(Any, server))

    def setup(self) -> None:
        self.rfile = self._wire.stream
        self.close_connection = False

    def finish(self) -> None:
        if self._refused:  # or there may be bytes that nobody has read
            self._wire.linger(_LINGER, 1 << 20)

    def handle(self) -> None:
        self._wire.allow(self._server.handshake_timeout, 1 << 20)
        while not self.close_connection:
            begin = self._peek()
            if not begin:
                return
            self._wire.allow(self._server.handshake_timeout, api.MAX_HEAD)
            self.close_connection = True  # until the request has been read to its end
            if begin == b"{":
                error = NotAdmitted("other_netloader", _OTHER_NETLOADER)
                self._server.door.note(self._session.peer, error)
                self._refused = True
                self._wire.send([_NACK])
                return
            self.command = ""
            try:
                if begin == _TLS:
                    self._server.door.note(self._session.peer, NotAdmitted("tls", _NO_TLS_HERE))
                    raise Refusal(Code.BAD_REQUEST, "this instance has no TLS")
                self._answer()
            except Refusal as refusal:
                self._refuse(refusal)
            self._wire.allow(self._server.idle_timeout, 1 << 20)

    def _peek(self) -> bytes:
        """Return the first byte of the next request, nothing at the end of the connection."""
        settled = not self._groups
        while True:
            try:
                return self.rfile.peek(1)[:1]  # type: ignore[attr-defined]
            except TimeoutError:
                if settled:
                    raise
            # A client that still forms a group, or whose bytes still move, is slow, not gone.
            groups = self._groups.values()
            try:
                with self._calls():
                    for group in groups:
                        group.settle()
            except Refusal as refusal:
                self._refuse(refusal)  # nobody has asked, but this is why the connection ends
                return b""
            settled = not any(group.forming for group in groups)
            self._wire.allow(self._server.idle_timeout if settled else _FORMING, 1 << 20)

    def _answer(self) -> None:
        plain = _PLAIN_GET.match(self.rfile.peek())  # type: ignore[attr-defined]
        if plain is not None:
            self.rfile.read(plain.end())
            self.requestline, self.path = plain[0].partition(b"\r")[0].decode(), plain[1].decode()
            self.command, keep, body, said = "GET", True, b"", ""
        else:
            with self._in_time():
                keep = self._read_head()
            body, said = self._read_body(), self.headers.get("Authorization", "")
        self.close_connection = not keep
        path, parameters = api.route(self.path)
        self._server.heard(self._wire)
        if not self._wire.trusted and path not in api.FOR_ALL:
            self._check_token(path, said)
        if self.command != api.METHODS[path]:
            allowed = f"method {self.command} for {path}; allowed: {api.METHODS[path]}"
            raise Refusal(Code.METHOD_NOT_ALLOWED, allowed)
        _ANSWERS[path](self, body, **parameters)

    def _check_token(self, path: str, authorization: str) -> None:
        """Refuse a client without a certificate that has no right token, or asks for more."""
        token, credentials = _token_in(authorization), self._server.credentials
        if token is None:
            error = NotAdmitted("no_certificate", f"it has no certificate, and asks for {path}")
        elif path not in api.WITH_TOKEN:
            error = NotAdmitted("no_certificate", f"a token is not enough to ask for {path}")
        elif credentials is None or not credentials.is_token(token):
            error = NotAdmitted("token", "its token is not the one of this instance")
        else:
            return
        self._server.door.note(self._session.peer, error)
        self.close_connection = True
        raise Refusal(Code.UNAUTHORIZED, "this needs the certificate of a peer or a token")

    def _read_head(self) -> bool:
        """Read a request up to its body; return whether the connection stays open after it."""
        line = self.rfile.readline(api.MAX_TARGET + 1)
        if not line.endswith(b"\n"):
            if len(line) > api.MAX_TARGET:
                limit = f"the first line has over {api.MAX_TARGET} bytes"
                raise Refusal(Code.URI_TOO_LONG, limit)
            raise ConnectionResetError("the connection ended within a request")
        if not _REQUEST_LINE.fullmatch(line):
            raise Refusal(Code.BAD_REQUEST, "this is not a request of HTTP/1.1")
        self.raw_requestline = line
        self.parse_request()  # or `send_error`
        keep, self.close_connection = not self.close_connection, True
        if self.headers.defects or self.headers.get_payload():
            raise Refusal(Code.BAD_REQUEST, "the headers are malformed")
        return keep and self.request_version != "HTTP/1.0"

    def _read_body(self) -> bytes:
        lengths = self.headers.get_all("Content-Length", [])
        if "Transfer-Encoding" in self.headers or (self.command == "POST" and not lengths):
            needed = "a body needs a Content-Length; chunked bodies are not supported"
            raise Refusal(Code.LENGTH_REQUIRED, needed)
        if not lengths:
            return b""
        if len(lengths) > 1 or not re.fullmatch("[0-9]{1,20}", lengths[0]):
            raise Refusal(Code.BAD_REQUEST, "Content-Length is not one number")
        length = int(lengths[0])
        large = self._wire.trusted and self.path.endswith("/regions")
        limit = api.MAX_REGIONS_BODY if large else api.MAX_BODY
        if length > limit:
            raise Refusal(Code.TOO_LARGE, f"the body has over {limit} bytes")
        if self.headers.get("Expect", "").lower() == "100-continue":
            self._wire.send([b"HTTP/1.1 100 Continue\r\n\r\n"])
        self._wire.budget = length
        with self._in_time():
            body = self.rfile.read(length) if length else b""
        if len(body) < length:
            raise ConnectionResetError("the connection ended within a request")
        return body

    @contextlib.contextmanager
    def _in_time(self) -> Iterator[None]:
        """Refuse a request of which some has come, and the rest stays out or trickles."""
        try:
            yield
        except TimeoutError:
            self.close_connection = True  # `parse_request` has its own view before all has come
            limit = f"the request was not complete within {self._server.handshake_timeout:g} s"
            raise Refusal(Code.TIMEOUT, limit) from None

    def handle_expect_100(self) -> bool:
        """Say nothing yet: `_read_body` may refuse."""
        return True

    def send_error(
        self, code: int, message: str | None = None, explain: str | None = None
    ) -> NoReturn:
        """Refuse what `parse_request` does not accept."""
        self.close_connection = True
        if code == Code.HEADERS.status:
            limit = f"the headers have over {api.MAX_HEAD} bytes, or there are over 100"
            raise Refusal(Code.HEADERS, limit)
        raise Refusal(Code.BAD_REQUEST, shortened(message or "", 200))

    # The answers

    def _join(self, body: bytes, group: str) -> None:
        join = api.decode(body, Join)
        if join.identity.group != group:
            named = f"the path names {group}, the identity {shortened(join.identity.group, 200)}"
            raise Refusal(Code.BAD_REQUEST, named)
        try:
            with self._place():
                joined = self._server.service.join(self._session, join)
        except Refusal as refusal:
            later = refusal.code.status == HTTPStatus.SERVICE_UNAVAILABLE
            if later and not refusal.problem.peers:
                with self._calls():
                    others = self._server.service.others(join)
                if others is not None:
                    refusal.name(*others)
            raise
        self._say(joined)

    def _have(self, body: bytes, digest: str, since: str, wait: str) -> None:
        seconds = min(int(wait), api.MAX_WAIT_SECONDS)
        with self._calls():
            have = self._server.service.have(self._session, digest, int(since), seconds)
        self._say(have)

    def _peers(self, body: bytes, digest: str) -> None:
        with self._calls():
            peers = self._server.service.peers_of(digest)
        self._say(api.Named(peers))

    def _blocks(self, body: bytes, digest: str, first: str, last: str) -> None:
        if int(first) > int(last):
            raise Refusal(Code.OUT_OF_RANGE, f"block {first} comes after block {last}")
        with self._place():
            run = self._server.service.blocks(self._session, digest, int(first), int(last))
            views = next(run.chunks, None)
        self._send_bytes(run, views, f"blocks {first} to {last}")

    def _send_bytes(self, run: Bytes, views: list[Buffer] | None, what: str) -> None:
        """Send bytes, of which the first have been made already."""
        head: list[Buffer | bytes] = [self._head(HTTPStatus.OK, _BYTES, run.nbytes)]
        left = run.nbytes
        try:
            with contextlib.closing(run.chunks):
                while views is not None and left >= (nbytes := sum(map(len, views))):
                    self._wire.send([*head, *views])
                    head, left = [], left - nbytes
                    with self._calls():
                        views = next(run.chunks, None)
        except Refusal as refusal:
            why = f"stopped within {what}: {refusal}"
            raise ConnectionAbortedError(why) from None
        if left or views is not None:
            raise RuntimeError(f"{what} do not have {run.nbytes} bytes")
        if head:
            self._wire.send(head)

    def _check(self, body: bytes, digest: str, first: str, last: str) -> None:
        api.decode(body, api.Check)
        if int(first) > int(last):
            raise Refusal(Code.OUT_OF_RANGE, f"block {first} comes after block {last}")
        with self._calls():
            self._server.service.check(self._session, digest, int(first), int(last))
        self._say(api.Noted())

    def _records(self, body: bytes, digest: str) -> None:
        with self._reading():
            records = self._server.service.records(self._session, digest)
        self._reply(HTTPStatus.OK, _BYTES, records)

    def _regions(self, body: bytes, digest: str) -> None:
        wanted = api.decode(body, api.Regions).regions
        with self._place():
            regions = self._server.service.regions(self._session, digest, wanted)
            views = next(regions.chunks, None)
        self._send_bytes(regions, views, "regions")

    def _open_group(self, body: bytes) -> None:
        weights = api.decode(body, api.OpenGroup).weights
        if len(self._groups) >= api.MAX_GROUPS:
            limit = f"a connection has {api.MAX_GROUPS} groups at most"
            raise Refusal(Code.BAD_REQUEST, limit)
        with self._place():
            group = self._server.service.open_group(self._session, weights)
        name = str(len(self._groups))
        self._groups[name] = group
        self._say(api.GroupOpened(name, group.max_bytes))

    def _exchange(self, body: bytes, id: str) -> None:
        values = api.decode(body, api.StoreSet).set
        with self._calls():
            values = self._group(id).exchange(values)
        self._say(api.StoreValues(values))

    def _send(self, body: bytes, id: str) -> None:
        runs = api.decode(body, api.SendRuns).runs
        with self._calls():
            sizes = self._group(id).sizes(runs)
        self._say(api.Sizes(sizes))
        try:
            with self._calls():
                self._group(id).send(
                    [run for run, size in zip(runs, sizes, strict=True) if size is not None]
                )
        except Refusal:
            self.close_connection = True
            raise

    def _done(self, body: bytes) -> None:
        done = api.decode(body, Done)
        with self._calls():
            self._server.service.done(self._session, done)
        self._say(api.Noted())

    def _files(self, body: bytes, group: str) -> None:
        with self._reading():
            files = self._server.service.files(group)
        self._say(api.Files(files))

    def _file(self, body: bytes, group: str, name: str) -> None:
        with self._reading():
            content = self._server.service.file(group, name)
            views = next(content.chunks, None)
        self._send_bytes(content, views, f"file {name}")

    def _status(self, body: bytes) -> None:
        with self._calls():
            status = self._server.service.status(self._server.sessions)
        self._say(status)

    def _metrics(self, body: bytes) -> None:
        with self._calls():
            exposition = self._server.service.metrics()
        self._reply(HTTPStatus.OK, _PROMETHEUS, exposition)

    def _page(self, body: bytes) -> None:
        self._reply(HTTPStatus.OK, _HTML, PAGE, *PAGE_HEADERS)

    def _healthz(self, body: bytes) -> None:
        self._reply(HTTPStatus.OK, _TEXT, b"ok\n")

    def _group(self, name: str) -> Group:
        try:
            return self._groups[name]
        except KeyError:
            raise Refusal(Code.NOT_FOUND, f"this connection has no group {name}") from None

    @contextlib.contextmanager
    def _place(self) -> Iterator[None]:
        """Call the service with a place, which is kept unless it refuses."""
        new = self._server.admit(self._wire)
        try:
            with self._calls():
                yield
        except Refusal:
            if new:
                self._server.dismiss(self._wire)
            raise

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Call the service for what takes long: few at once, and without a place."""
        if not self._server.reading.acquire(timeout=_TURN):
            raise Refusal(Code.BUSY, f"{_MOST_READING} clients are reading files or records")
        try:
            with self._calls():
                yield
        finally:
            self._server.reading.release()

    @contextlib.contextmanager
    def _calls(self) -> Iterator[None]:
        """Make a refusal of whatever else goes wrong in the service."""
        try:
            yield
        except Refusal:
            raise
        except Exception as error:
            if self._session.gone():
                raise ConnectionResetError(f"the client went away: {one_line(error)}") from None
            request = shortened(self.requestline, 200)
            logger.exception("NetLoader: %s: %s failed", self._session.peer, request)
            raise Refusal(Code.INTERNAL, "the source failed, and its log has the error") from None

    def _refuse(self, refusal: Refusal) -> None:
        code, peer = refusal.code, self._session.peer
        logger.debug("NetLoader: %s: answered %s: %s", peer, code.text, one_line(refusal))
        headers = []
        if code.status == HTTPStatus.SERVICE_UNAVAILABLE:
            headers.append(f"Retry-After: {refusal.retry_after}")
        if code is Code.UNAUTHORIZED:
            headers.append('WWW-Authenticate: Basic realm="NetLoader"')  # browsers ask for it then
            headers.append("WWW-Authenticate: Bearer")
        if code is Code.METHOD_NOT_ALLOWED:
            headers.append(f"Allow: {api.METHODS[api.route(self.path)[0]]}")
        body = msgspec.json.encode(refusal.problem) + b"\n"
        self._reply(code.status, _JSON, body, *headers)
        self._refused = self.close_connection

    def _say(self, answer: msgspec.Struct) -> None:
        with self._calls():
            body = msgspec.json.encode(answer) + b"\n"
        self._reply(HTTPStatus.OK, _JSON, body)

    def _reply(self, status: HTTPStatus, kind: str, body: bytes, *headers: str) -> None:
        head = self._head(status, kind, len(body), *headers)
        self._wire.send([head] if self.command == "HEAD" else [head, body])

    def _head(self, status: HTTPStatus, kind: str, length: int, *headers: str) -> bytes:
        lines = [
            f"HTTP/1.1 {status.value} {status.phrase}",
            "Server: NetLoader",
            f"Content-Type: {kind}",
            f"Content-Length: {length}",
            *headers,
        ]
        if self.close_connection:
            lines.append("Connection: close")
        return "\r\n".join([*lines, "", ""]).encode("latin-1")


_ANSWERS: dict[str, Callable[..., None]] = {
    api.JOIN: _Handler._join,
    api.BLOCKS: _Handler._blocks,
    api.CHECK: _Handler._check,
    api.HAVE: _Handler._have,
    api.PEERS: _Handler._peers,
    api.RECORDS: _Handler._records,
    api.REGIONS: _Handler._regions,
    api.GROUPS: _Handler._open_group,
    api.STORE: _Handler._exchange,
    api.SEND: _Handler._send,
    api.DONE: _Handler._done,
    api.FILES: _Handler._files,
    api.FILE: _Handler._file,
    api.STATUS: _Handler._status,
    api.METRICS: _Handler._metrics,
    api.PAGE: _Handler._page,
    api.HEALTHZ: _Handler._healthz,
}


def _token_in(authorization: str) -> str | None:
    """Return a bearer's token, or the password that a browser has asked for; None: neither."""
    scheme, _, given = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return given.strip()
    if scheme.lower() != "basic":
        return None
    try:
        return base64.b64decode(given).decode().partition(":")[2]
    except ValueError:
        return ""


def _join(threads: list[threading.Thread], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    for thread in threads:
        if thread is not threading.current_thread() and thread.ident is not None:
            thread.join(max(0.0, deadline - time.monotonic()))


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
