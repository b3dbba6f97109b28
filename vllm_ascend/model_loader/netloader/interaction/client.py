"""A client's end of a connection to a source: `ElasticClient`."""

import contextlib
import http.client
import re
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, TypeVar, cast

import msgspec
import xxhash

from ..credentials import Credentials
from ..errors import (
    OtherPlacement,
    ProtocolError,
    SourceBusy,
    SourceError,
    SourceLost,
    SourceRefused,
    SourceSilent,
    SourceUnreachable,
    TransferCorrupt,
)
from ..identity import PLACEMENT
from ..utils import Address, Buffer, Patience, shortened, within, words_of
from . import api
from .api import Done, Join, Joined, Refusal, Status
from .tls import ALERT, NotAdmitted, TlsWire
from .wire import Wire

_LEAST_RATE = 1_000_000  # bytes per second of a file
_LAST_WORDS = 0.2  # seconds for them to arrive, on their way since before the transfer failed
_SERVER = "NetLoader"
_TLS_THERE = "it uses TLS, and this instance has none (SECRET_FILE or TLS_CERT)"
_BROKEN = (OSError, http.client.HTTPException)
# How a source answers as a rule. The standard library takes longer to read it than all else takes
# that is done for a chunk.
_PLAIN_ANSWER = re.compile(
    rb"HTTP/1\.1 200 OK\r\nServer: NetLoader\r\n"
    rb"Content-Type: [!-~]{1,100}\r\nContent-Length: ([0-9]{1,18})\r\n\r\n"
)

S = TypeVar("S", bound=msgspec.Struct)


@dataclass(frozen=True)
class _Answer:
    """An answer up to its body, which has `length` bytes if that is known."""

    status: int
    length: int | None
    will_close: bool = False
    server: str = _SERVER
    retry_after: str = ""


class ElasticClient:
    """One connection to a source, which is a session there; made by `connect`.

    Every failure is a `SourceError` that begins with the source's address: what the answer's code
    means (see `api.Code`), `SourceLost` without an answer, `ProtocolError` for a wrong one. Of
    the threads, one at a time may ask; any may call `cut` and `hung_up`.
    """

    def __init__(
        self, address: Address, dial: Callable[[], Wire], handshake: float, progress: float
    ) -> None:
        self.address = address
        self._wire = dial()
        self._dial = dial
        self._handshake = handshake
        self._progress = progress
        self._lock = threading.Lock()
        self._cut = False
        self._answered = False  # something, over the present connection
        self._has_groups = False
        self._unanswered: deque[bytes] = deque()
        self._again = False  # whether these may be said once more over another connection

    @classmethod
    def connect(
        cls,
        address: Address,
        *,
        connect: float,
        handshake: float,
        progress: float,
        credentials: Credentials | None = None,
    ) -> "ElasticClient":
        """Connect to a source.

        Args:
            address: where it listens.
            connect: seconds to find its name and to reach it.
            handshake: seconds for a TLS handshake, and for an answer.
            progress: seconds without any byte, while bytes are due.
            credentials: of this instance; None: there is no TLS.

        Raises:
            SourceUnreachable: it cannot be reached.
            SourceRefused: it does not let this instance in, or this instance does not trust it.
        """

        def dial() -> Wire:
            wire = _connected(address, connect, progress, credentials)
            try:
                wire.handshake(handshake)
            except OSError as error:
                wire.close()
                if isinstance(error, NotAdmitted) and error.kind != "broken":
                    raise SourceRefused(f"{address}: {error}") from None
                # It has accepted the connection: somebody is there.
                raise SourceSilent(f"{address}: cannot connect: {_reason(error)}") from None
            return wire

        return cls(address, dial, handshake, progress)

    @property
    def local_host(self) -> str:
        """The address of this machine that the source sees."""
        return self._wire.local_host

    def __enter__(self) -> "ElasticClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection, for good."""
        self.cut()
        self._wire.close()

    def cut(self) -> None:
        """End the connection for good; a thread that waits for an answer gets an error."""
        with self._lock:
            self._cut = True
            self._wire.cut()

    @contextlib.contextmanager
    def ended_after(self, seconds: float) -> Iterator[None]:
        """End the connection where what is asked inside takes longer, also while bytes trickle.

        Raises:
            SourceLost: it has taken longer.
        """
        before, ends = self._wire.ends, time.monotonic() + seconds
        self._wire.ends = min(before, ends)
        try:
            yield
        except SourceLost:
            if time.monotonic() >= ends and not self._cut:
                raise SourceLost(f"{self.address}: not all came within {seconds:g} s") from None
            raise
        finally:
            self._wire.ends = before

    def hung_up(self) -> bool:
        """Return whether the source has closed the connection, or its process has ended."""
        return self._wire.hung_up

    def join(self, join: Join) -> Joined:
        """Ask for a model's weights; the session begins.

        Raises:
            SourceError: see the class.
        """
        path = api.JOIN.format(group=join.identity.group)
        joined = self._ask(path, join, Joined, self._handshake, api.MAX_JOINED)
        left_out = joined.manifest is msgspec.UNSET or joined.blocks is msgspec.UNSET
        if left_out and joined.weights != join.weights and not join.view:
            raise self._lied("the answer to a join has no manifest or no digests of blocks")
        return joined

    def ask_blocks(self, weights: str, first: int, last: int) -> None:
        """Ask for blocks, `last` included; `receive_blocks` has to come for each time, in order.

        Raises:
            SourceError: see the class.
        """
        path = api.BLOCKS.format(digest=weights, first=first, last=last)
        with self._failures():
            self._say("GET", path, b"")

    def receive_blocks(self, nbytes: int, into: Iterable[Sequence[Buffer]]) -> None:
        """Read the blocks that were asked for into memory.

        Args:
            nbytes: of all of them.
            into: where they go, piece by piece; the next one is taken once the one before is full.

        Raises:
            SourceError: see the class; what `into` has then is anything.
        """
        with self._failures():
            answer = self._hear("GET", self._progress)
            if answer.length != nbytes:
                raise self._lied(f"sends {answer.length} bytes where blocks have {nbytes}")
            for views in into:
                self._wire.receive(views)
            self._close_after(answer)

    def check(self, weights: str, first: int, last: int) -> None:
        """Let the source compare blocks that came wrong, `last` included, with their digests.

        Raises:
            SourceError: see the class; with the code `changed` if its own are wrong.
        """
        path = api.CHECK.format(digest=weights, first=first, last=last)
        self._ask(path, api.Check(), api.Noted, self._handshake)

    def have(self, weights: str, since: int, wait: int) -> api.Have:
        """Ask which blocks have come to the source.

        Args:
            weights: digest of the weights.
            since: `version` of the answer before; 0: of all blocks.
            wait: seconds that the source waits for something new.

        Raises:
            SourceError: see the class.
        """
        path = api.HAVE.format(digest=weights, since=since, wait=wait)
        return self._ask(path, None, api.Have, self._handshake + wait)

    def peers(self, weights: str) -> list[api.Peer]:
        """Ask who else gets or has these weights.

        Raises:
            SourceError: see the class.
        """
        return self._ask(api.PEERS.format(digest=weights), None, api.Named, self._handshake).peers

    def records(self, weights: str) -> bytes:
        """Ask which box of which checkpoint tensor is where in the source's parameters.

        Raises:
            SourceError: see the class.
        """
        seconds = self._handshake + api.MAX_RECORDS / _LEAST_RATE
        with self.ended_after(seconds), self._failures():
            path = api.RECORDS.format(digest=weights)
            answer = self._open("GET", path, b"", self._progress)
            if answer.length is None or answer.length > api.MAX_RECORDS:
                limit = f"over the limit of {api.MAX_RECORDS}"
                raise self._lied(f"sends records of {answer.length} bytes, {limit}")
            content = bytearray(answer.length)
            self._wire.receive([memoryview(content)])
            self._close_after(answer)
        return bytes(content)

    def ask_regions(self, weights: str, regions: Sequence[api.Region]) -> None:
        """Ask for elements of the source's parameters; `receive_regions` has to come each time.

        Args:
            weights: digest of the weights.
            regions: which elements.

        Raises:
            SourceError: see the class.
        """
        body = msgspec.json.encode(api.Regions([*regions]))
        with self._failures():
            self._say("POST", api.REGIONS.format(digest=weights), body)

    def receive_regions(self, nbytes: int, into: Iterable[Sequence[Buffer]]) -> None:
        """Read the elements that were asked for first into memory.

        Args:
            nbytes: of all of them.
            into: where they go, one region after the other, piece by piece; the next one is taken
                once the one before is full.

        Raises:
            TransferCorrupt: they are not what their digest says; what `into` has is anything.
            SourceError: see the class; the same.
        """
        digest, came = bytearray(api.REGIONS_DIGEST), xxhash.xxh3_128()
        with self._failures():
            answer = self._hear("POST", self._progress)
            if answer.length != nbytes + len(digest):
                said = f"sends {answer.length} bytes where regions and their digest have"
                raise self._lied(f"{said} {nbytes + len(digest)}")
            for views in into:
                self._wire.receive(views)
                for view in views:
                    came.update(view)
            self._wire.receive([memoryview(digest)])
            self._close_after(answer)
        if came.digest() != digest:
            raise TransferCorrupt(f"{self.address}: regions came with wrong bytes")

    def open_group(self, weights: str) -> "GroupControl":
        """Let the source begin to form a two-rank group for blocks of these weights."""
        self._has_groups = True
        opened = self._ask(api.GROUPS, api.OpenGroup(weights), api.GroupOpened, self._handshake)
        return GroupControl(self, opened)

    def done(self, done: Done) -> None:
        """Say how the session has ended; whether the source hears it makes no difference."""
        with contextlib.suppress(SourceError):
            self._ask(api.DONE, done, api.Noted, _LAST_WORDS)

    def exchange(self, group: str, values: list[api.Value]) -> list[api.Value]:
        """Say what was set in a group's store here, and return what the source has set.

        Returns nothing if there is nothing new, for which the source waits up to a second, unless
        something was set here.
        """
        path = api.STORE.format(id=group)
        seconds = self._handshake + api.MAX_EXCHANGE_SECONDS
        return self._ask(path, api.StoreSet(values), api.StoreValues, seconds).values

    def ask_runs(self, group: str, runs: Sequence[api.Run]) -> None:
        """Ask for runs through a group; `hear_sizes` has to come next."""
        body = msgspec.json.encode(api.SendRuns([*runs]))
        with self._failures():
            self._say("POST", api.SEND.format(id=group), body)

    def hear_sizes(self) -> list[int | None]:
        """Return the sizes of the runs that were asked for; None: others are to be asked for it.

        The answer comes before the bytes, and after those of what was asked for before.
        """
        with self._failures():
            answer = self._hear("POST", self._progress)
            content = self._content(answer, api.MAX_BODY)
        return self._decoded(answer, content, api.Sizes).sizes

    @property
    def has_answer(self) -> bool:
        """Whether an answer has come, or the beginning of it."""
        return self._wire.has_data

    def files(self, group: str) -> list[api.ModelFile]:
        """Ask which files a model has beside its weights.

        Raises:
            SourceError: see the class.
        """
        return self._ask(api.FILES.format(group=group), None, api.Files, self._handshake).files

    def file(self, group: str, file: api.ModelFile) -> bytes:
        """Return what a file has; its digest is the caller's to check.

        Raises:
            SourceError: see the class.
        """
        content = bytearray(file.nbytes)
        seconds = self._handshake + file.nbytes / _LEAST_RATE
        with self.ended_after(seconds), self._failures():
            path = api.FILE.format(group=group, name=file.name)
            answer = self._open("GET", path, b"", self._progress)
            if answer.length != file.nbytes:
                raise self._lied(f"{file.name} has {answer.length} bytes, and not {file.nbytes}")
            self._wire.receive([memoryview(content)])
            self._close_after(answer)
        return bytes(content)

    def status(self) -> Status:
        """Ask how the source is."""
        return self._ask(api.STATUS, None, Status, self._handshake, api.MAX_STATUS)

    def last_words(self) -> SourceError | None:
        """Return why the source has ended the connection, if it has said so.

        To be asked when the transfer through a group has failed; nothing but `done` can follow.
        """
        self._wire.allow(_LAST_WORDS, api.MAX_HEAD)
        with contextlib.suppress(*_BROKEN, SourceError):
            while (answer := self._answer("POST")).status == HTTPStatus.OK:
                self._content(answer, api.MAX_BODY)  # it came before the transfer failed
                self._wire.budget = api.MAX_HEAD
            return self._refusal(answer)
        return None

    def _ask(
        self,
        path: str,
        question: msgspec.Struct | None,
        kind: type[S],
        seconds: float,
        limit: int = api.MAX_BODY,
    ) -> S:
        method, body = (
            ("POST", msgspec.json.encode(question)) if question is not None else ("GET", b"")
        )
        with self._failures():
            answer = self._open(method, path, body, seconds)
            content = self._content(answer, limit)
            self._close_after(answer)
        return self._decoded(answer, content, kind)

    def _decoded(self, answer: "_Answer", content: bytes, kind: type[S]) -> S:
        try:
            return api.decode(content, kind)
        except Refusal as invalid:
            if answer.server != _SERVER:
                raise self._not_ours(answer) from None
            raise self._lied(str(invalid)) from None

    def _open(self, method: str, path: str, body: bytes, seconds: float) -> "_Answer":
        """Ask, and return the answer up to its body if its status is 200."""
        self._say(method, path, body)
        return self._hear(method, seconds)

    def _say(self, method: str, path: str, body: bytes) -> None:
        head = [f"{method} {path} HTTP/1.1", f"Host: {self.address}"]
        if method == "POST":
            head += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        said = "\r\n".join([*head, "", ""]).encode("latin-1") + body
        self._unanswered.append(said)
        # A source closes idle connections; only what has nothing to lose is asked again.
        self._again = method == "GET" and self._answered and not self._has_groups
        if self._wire.closed:
            self._reconnect(ConnectionResetError("the connection has been closed"))
        else:
            self._send([said])

    def _send(self, requests: Iterable[bytes]) -> None:
        with contextlib.suppress(ConnectionError):  # it may have said why before it closed
            self._wire.send(requests)

    def _hear(self, method: str, seconds: float) -> "_Answer":
        """Return the answer to what was said first, up to its body, if its status is 200."""
        self._wire.allow(seconds, api.MAX_HEAD)
        try:
            answer = self._answer(method)
        except ConnectionError as error:
            self._reconnect(error)
            self._wire.allow(seconds, api.MAX_HEAD)
            answer = self._answer(method)
        self._answered = True
        self._unanswered.popleft()
        if answer.status != HTTPStatus.OK:
            raise self._refusal(answer)
        return answer

    def _answer(self, method: str) -> "_Answer":
        if self._wire.closed:  # as an earlier answer has announced
            raise ConnectionResetError("the connection has been closed")
        begin = self._wire.stream.peek()
        if begin.startswith(ALERT):
            raise NotAdmitted("tls", _TLS_THERE)
        if plain := _PLAIN_ANSWER.match(begin):
            self._wire.stream.read(plain.end())
            return _Answer(HTTPStatus.OK, int(plain[1]))
        answer = http.client.HTTPResponse(cast(Any, self._wire), method=method)
        answer.begin()
        server, retry_after = (answer.getheader(n, "") for n in ("Server", "Retry-After"))
        return _Answer(answer.status, answer.length, answer.will_close, server, retry_after)

    def _content(self, answer: "_Answer", limit: int) -> bytes:
        length = answer.length
        if length is None or length > limit:
            if answer.server != _SERVER:
                raise self._not_ours(answer)
            raise self._lied(f"an answer of {length} bytes, over the limit of {limit}")
        self._wire.budget = length
        content = self._wire.stream.read(length)
        if len(content) < length:
            raise ConnectionResetError("the connection ended within the answer")
        return content

    def _refusal(self, answer: "_Answer") -> SourceError:
        try:
            problem = api.decode(self._content(answer, api.MAX_BODY), api.Problem)
        except Refusal:
            return self._not_ours(answer)
        code = api.CODES.get(problem.code)
        if code is None and answer.server != _SERVER:
            return self._not_ours(answer)
        self._close_after(answer)
        later = answer.status == HTTPStatus.SERVICE_UNAVAILABLE
        kind = code.error if code else SourceBusy if later else SourceRefused
        fields = {one.field for one in problem.differences}
        if code is api.Code.OTHER_MODEL and fields and fields <= PLACEMENT:
            kind = OtherPlacement
        differ = [
            f"{shortened(one.field, 200)} is {shortened(one.client, 200)} here "
            f"and {shortened(one.source, 200)} there"
            for one in problem.differences
        ]
        said = [f"{self.address}: {shortened(problem.code, 200)}", shortened(problem.message)]
        seconds_later = re.fullmatch("[0-9]{1,4}", answer.retry_after)
        return kind(
            ": ".join([*said, "; ".join(differ)] if differ else said),
            problem.code if code else "",
            float(seconds_later[0]) if seconds_later else 0.0,
            tuple((peer.address, peer.instance) for peer in problem.peers),
            problem.weights,
            problem.instance,
            problem.ranks,
        )

    def _not_ours(self, answer: "_Answer") -> SourceRefused:
        self._wire.close()
        server = shortened(answer.server, 80)
        said = f"HTTP {answer.status} from {server}" if server else f"HTTP {answer.status}"
        return SourceRefused(f"{self.address}: this is not a NetLoader port ({said})")

    def _lied(self, what: str) -> ProtocolError:
        self._wire.close()
        return ProtocolError(f"{self.address}: {what}")

    def _close_after(self, answer: "_Answer") -> None:
        if answer.will_close:
            self._wire.close()

    def _reconnect(self, error: ConnectionError) -> None:
        with self._lock:
            may_ask_again = self._again and not self._cut
        if not may_ask_again:
            raise error
        wire = self._dial()
        wire.ends = self._wire.ends
        with self._lock:
            self._wire.close()
            self._wire = wire
            if self._cut:
                wire.cut()
        self._answered = self._again = False
        self._send(self._unanswered)

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except _BROKEN as error:
            self._wire.close()
            self._unanswered.clear()
            raise self._lost(error) from None

    def _lost(self, error: Exception) -> SourceError:
        if self._cut:
            return SourceLost(f"{self.address}: the connection was ended on this side")
        if isinstance(error, NotAdmitted) and error.kind != "broken":
            return SourceRefused(f"{self.address}: {error}")
        if isinstance(error, http.client.RemoteDisconnected):
            closed = "closed the connection without an answer"
            if not self._answered:
                closed += ", as the NetLoader shipped in vLLM Ascend does"
            return SourceLost(f"{self.address}: {closed}")
        if isinstance(error, http.client.HTTPException):
            return SourceRefused(f"{self.address}: this is not a NetLoader port (no HTTP)")
        return SourceLost(f"{self.address}: {_reason(error)}")


class GroupControl:
    """A client's way to the source's end of a two-rank group; made by `ElasticClient.open_group`.

    Args:
        client: the connection.
        opened: what the source has answered.

    Attributes:
        max_bytes: size of a run that is not to be exceeded.
    """

    def __init__(self, client: ElasticClient, opened: api.GroupOpened) -> None:
        self.max_bytes = opened.max_bytes
        self._client = client
        self._id = opened.id
        self._heard: list[api.Value] = []

    def tell(self, key: str, value: bytes) -> None:
        """Set a value in the group's store.

        At once, as a backend may wait for its peer next, which waits for this value.

        Raises:
            SourceError: see `ElasticClient`.
        """
        self._heard += self._client.exchange(self._id, [(key, value)])

    def hear(self, timeout: float) -> tuple[str, bytes]:
        """Return the value that the source has set next.

        Raises:
            TimeoutError: there was none in time.
            SourceError: see `ElasticClient`.
        """
        deadline = time.monotonic() + timeout
        while not self._heard:
            if time.monotonic() > deadline:
                raise TimeoutError(f"the source set no value for {timeout:g} s")
            self._heard += self._client.exchange(self._id, [])
        return self._heard.pop(0)

    def ask(self, runs: Sequence[api.Run]) -> None:
        """Ask for runs; `answer` has to come next."""
        self._client.ask_runs(self._id, runs)

    def answer(self) -> list[int | None]:
        """Return the sizes of the runs that the source sends now; None: it does not send one."""
        return self._client.hear_sizes()

    @property
    def answered(self) -> bool:
        """Whether `answer` has something to return, or at least the beginning of it."""
        return self._client.has_answer


def _connected(
    address: Address, seconds: float, progress: float, credentials: Credentials | None
) -> Wire:
    def connect() -> Wire:
        sock = socket.create_connection((address.host, address.port), timeout=seconds)
        try:
            if sock.getsockname() == sock.getpeername():
                # The system chose the port itself as the near end: nobody listens there.
                raise ConnectionRefusedError("Connection refused")
            if credentials is None:
                return Wire(sock, progress)
            return TlsWire(sock, progress, credentials, address.host)
        except OSError:
            sock.close()
            raise

    try:
        # In a thread, as nothing else bounds the time that finding a name takes.
        return within(Patience(seconds, lambda: False, 0.0), connect, Wire.close)
    except TimeoutError:
        silent = f"no connection within {seconds:g} s"
        raise SourceSilent(f"{address}: cannot connect: {silent}") from None
    except (OSError, UnicodeError) as error:
        why = _reason(error)
    raise SourceUnreachable(f"{address}: cannot connect: {why}")


def _reason(error: BaseException) -> str:
    return shortened(words_of(error))
