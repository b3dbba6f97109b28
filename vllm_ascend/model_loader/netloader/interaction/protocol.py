"""The messages of the control plane, their framing and their limits.

A message is a JSON object `{"label": ..., "content": {...}}` in UTF-8 on one line. The labels JOIN,
JOIN_ACK and JOIN_NACK and the first seven fields of a JOIN are those of the NetLoader in vLLM
Ascend, which sends its JOIN without a newline and reads with a single 1,024-byte read; this side
therefore keeps a JOIN below that size and accepts one that is complete without a newline.

A session::

    client                                source
      JOIN             ->
                       <-  JOIN_ACK | JOIN_NACK
      FETCH nothing    ->
      STORE_SET        <->  STORE_SET            (both build the process group)
                       <-  SENDING nothing
      FETCH chunks     ->
                       <-  SENDING chunks, digests, sizes    (the bytes in the process group)
      ...
      DONE | ABORT     ->

`STATUS` may stand in the place of a JOIN.
"""

import contextlib
import select
import socket
import threading
import time
from typing import Annotated, TypeAlias, TypeVar

import msgspec

from ..errors import ProtocolError
from ..identity import ModelIdentity, Revision

PROTOCOL = 2
MAX_JOIN_BYTES = 1024
MAX_REQUEST_BYTES = 64 << 10
MAX_MESSAGE_BYTES = 64 << 20
TARGET_GROUP, DRAFT_GROUP = "netloader", "netloader_draft"

# What a log line shows of a text that a peer chose
_MAX_REASON = 2000

Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Port: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=65535)]
ShortText: TypeAlias = Annotated[str, msgspec.Meta(max_length=4096)]
Digest: TypeAlias = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{0,128}$")]
Chunks: TypeAlias = Annotated[list[Count], msgspec.Meta(max_length=4096)]


class Join(msgspec.Struct, frozen=True):
    """A client asks for a session; see `identity.ModelIdentity` for what must be equal.

    Attributes:
        device_id: the client's global rank.
        model_path: name of the model.
        tp: tensor-parallel size.
        pp: pipeline-parallel size.
        port: port of the client's store; unused in protocol 2.
        group_name: which model of the instance, the target or the draft.
        int8_cache: the client's INT8_CACHE.
        protocol: 2; absent from a client that speaks the NetLoader protocol of vLLM Ascend.
        identity: digest of the client's identity.
        revision: which revision of the model the client wants; not in the digest.
        layouts: layouts the client can take.
        chunk_bytes: the chunk size this client needs because it has chunks of that size already; 0:
            the source's choice.
        listen: where the client will listen itself, if that is known.
    """

    device_id: Count
    model_path: ShortText
    tp: Count
    pp: Count
    port: Port = 0
    group_name: ShortText = TARGET_GROUP
    int8_cache: ShortText = "no"
    protocol: int = 1
    identity: Digest = ""
    revision: Revision = Revision()
    layouts: list[str] = []
    chunk_bytes: Count = 0
    listen: ShortText | None = None


class JoinAck(msgspec.Struct, frozen=True):
    """The source accepts.

    Attributes:
        chunk_bytes: chunk size of this session in bytes.
        digest_algorithm: algorithm of all digests of this session.
        model_digest: digest of the whole model; sources with equal ones are interchangeable.
        manifest: a `manifest.Manifest`, which the control plane passes on unread.
        revision: which revision of the model the source has.
    """

    chunk_bytes: Annotated[int, msgspec.Meta(ge=1, le=64 << 20)]
    digest_algorithm: ShortText
    model_digest: Digest
    manifest: msgspec.Raw
    revision: Revision = Revision()


class JoinNack(msgspec.Struct, frozen=True):
    """The source declines.

    Attributes:
        reason: for people.
        identity: the source's identity where that is what differs.
        max_chunk_bytes: the size up to which the source makes chunks where that is what is wrong.
    """

    reason: str
    identity: ModelIdentity | None = None
    max_chunk_bytes: Count = 0


class StoreSet(msgspec.Struct, frozen=True):
    """What one side tells the other while they build the process group.

    Attributes:
        key: name of a value in the group's store.
        value: at most 16 KiB; JSON has it in base64.
    """

    key: ShortText
    value: Annotated[bytes, msgspec.Meta(max_length=16 << 10)]


class Fetch(msgspec.Struct, frozen=True):
    """The client wants chunks, in this order; an empty list says that it is still there."""

    chunks: Chunks


class Sending(msgspec.Struct, frozen=True):
    """The source sends chunks in this order.

    Attributes:
        chunks: which.
        digests: those of their bytes.
        sizes: their numbers of bytes.
    """

    chunks: Chunks
    digests: Annotated[list[Digest], msgspec.Meta(max_length=4096)]
    sizes: Chunks


class Missing(msgspec.Struct, frozen=True):
    """The source does not have these chunks (any more) and will not send them."""

    chunks: Chunks
    reason: str


class Done(msgspec.Struct, frozen=True):
    """The client has all it wanted from this session.

    Attributes:
        complete: whether the client's model is complete.
        model_digest: digest of the whole model as the client has it; empty if not complete.
    """

    complete: bool
    model_digest: Digest = ""


class Abort(msgspec.Struct, frozen=True):
    """The sender gives the session up."""

    reason: str


class StatusRequest(msgspec.Struct, frozen=True):
    """Anybody may ask a source how it is."""


class Status(msgspec.Struct, frozen=True):
    """How a source is.

    Attributes:
        identities: identity of each model it serves.
        sessions: number of open sessions.
        max_sessions: bound on them.
        bytes_sent: bytes of tensors sent since the start.
    """

    identities: list[ModelIdentity]
    sessions: Count
    max_sessions: Count
    bytes_sent: Count


Request: TypeAlias = Join | StoreSet | Fetch | Done | Abort | StatusRequest
Reply: TypeAlias = JoinAck | JoinNack | StoreSet | Sending | Missing | Abort | Status
Message: TypeAlias = Request | Reply
M = TypeVar("M", bound=Message)

_REQUESTS: dict[str, type[Request]] = {
    "JOIN": Join,
    "STORE_SET": StoreSet,
    "FETCH": Fetch,
    "DONE": Done,
    "ABORT": Abort,
    "STATUS": StatusRequest,
}
_REPLIES: dict[str, type[Reply]] = {
    "JOIN_ACK": JoinAck,
    "JOIN_NACK": JoinNack,
    "STORE_SET": StoreSet,
    "SENDING": Sending,
    "MISSING": Missing,
    "ABORT": Abort,
    "STATUS": Status,
}
_LABELS = {kind: label for labels in (_REQUESTS, _REPLIES) for label, kind in labels.items()}


class _Envelope(msgspec.Struct):
    label: str
    content: msgspec.Raw = msgspec.Raw(b"{}")


_envelope = msgspec.json.Decoder(_Envelope)


def encode(message: Message) -> bytes:
    """Return a message as its line, newline included.

    Raises:
        ProtocolError: the message is larger than any receiver takes.
    """
    content = msgspec.Raw(msgspec.json.encode(message))
    line = msgspec.json.encode(_Envelope(_LABELS[type(message)], content)) + b"\n"
    limit = MAX_JOIN_BYTES if isinstance(message, Join) else MAX_MESSAGE_BYTES
    if len(line) > limit:
        label = _LABELS[type(message)]
        raise ProtocolError(f"a {label} of {len(line)} bytes is over the limit of {limit}")
    return line


def decode_request(line: bytes | bytearray) -> Request:
    """Parse what a client sent.

    Raises:
        ProtocolError: it is not a valid request; says why.
    """
    return _decode(line, _REQUESTS)


def decode_reply(line: bytes | bytearray) -> Reply:
    """Parse what a source sent.

    Raises:
        ProtocolError: it is not a valid reply; says why.
    """
    return _decode(line, _REPLIES)


def _decode(line: bytes | bytearray, labels: dict[str, type[M]]) -> M:
    try:
        envelope = _envelope.decode(line)
        kind = labels.get(envelope.label)
        if kind is None:
            raise ProtocolError(
                f"label {shortened(envelope.label, 40)!r} is not one of {', '.join(labels)}"
            )
        content = bytes(envelope.content)
        if kind is JoinNack and content.startswith(b'"'):  # as vLLM Ascend's NetLoader sends it
            content = b'{"reason":%b}' % content
        return msgspec.json.decode(content, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"not a valid message: {shortened(str(error))}") from None


def shortened(text: str, limit: int = _MAX_REASON) -> str:
    """Return a peer's text made fit for a log: one line, printable, bounded."""
    printable = "".join(char if char.isprintable() else " " for char in text[: limit + 1])
    return printable if len(printable) <= limit else f"{printable[:limit]}..."


class Connection:
    """Messages over a connected TCP socket, every read and write under a deadline.

    One thread sends and receives at a time; any other may `cut` or `close` it.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = bytearray()
        self._in_use = threading.Lock()
        self._newline_due = False
        self.local_host = sock.getsockname()[0]
        self.peer_host, self.peer_port = sock.getpeername()[:2]

    def send(self, message: Message, timeout: float) -> None:
        """Send one message.

        Raises:
            OSError: the connection failed, or `timeout` seconds did not suffice.
        """
        line = encode(message)
        with self._in_use:
            self._sock.settimeout(timeout)
            self._sock.sendall(line)

    def receive_request(
        self, timeout: float, limit: int = MAX_REQUEST_BYTES, *, first: bool = False
    ) -> Request:
        """Receive one message of a client.

        Args:
            timeout: seconds for the whole message to arrive.
            limit: size in bytes over which a message is refused.
            first: accept a complete JSON object without a newline.

        Raises:
            OSError: the connection failed or ended, or the time was up.
            ProtocolError: what came is not a valid message.
        """
        with self._in_use:
            line = self._line(timeout, limit, bare=first)
        return decode_request(line)

    def receive_reply(self, timeout: float, limit: int = MAX_MESSAGE_BYTES) -> Reply:
        """Receive one message of a source; see `receive_request`."""
        with self._in_use:
            line = self._line(timeout, limit, bare=False)
        return decode_reply(line)

    def _line(self, timeout: float, limit: int, *, bare: bool) -> bytearray:
        deadline = time.monotonic() + timeout
        searched = 0
        while (end := self._buffer.find(b"\n", searched)) < 0:
            searched = len(self._buffer)
            if searched > limit:
                raise ProtocolError(f"a message of over {limit} bytes")
            if bare and self._buffer.rstrip().endswith(b"}") and _is_json(self._buffer):
                end, self._newline_due = searched, True
                break
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise TimeoutError(f"no complete message within {timeout:g} s")
            self._sock.settimeout(remaining)
            try:
                data = self._sock.recv(min(1 << 20, limit + 1))
            except TimeoutError:
                raise TimeoutError(f"no complete message within {timeout:g} s") from None
            if not data:
                raise ConnectionResetError("the peer closed the connection")
            self._buffer += data
        if end > limit:
            raise ProtocolError(f"a message of over {limit} bytes")
        line = self._buffer[:end]
        del self._buffer[: end + 1]
        if self._newline_due and not bare:
            self._newline_due = False
            if not line.strip():  # the end of a first message that was complete without it
                return self._line(deadline - time.monotonic(), limit, bare=False)
        return line

    @property
    def has_data(self) -> bool:
        """Whether something has come that was not received yet."""
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        return bool(self._buffer or poll.poll(0))

    @property
    def hung_up(self) -> bool:
        """Whether the peer has closed the connection, or its process has ended."""
        poll = select.poll()
        poll.register(self._sock, select.POLLRDHUP)
        return bool(poll.poll(0))

    def cut(self) -> None:
        """End the connection; the thread that waits in it gets an OSError.

        Closing it here would give its descriptor free, and a thread that wakes up too late would
        find another connection under that number and go on waiting.
        """
        with contextlib.suppress(OSError):  # not connected any more
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connection, once no other thread is in it any more."""
        self.cut()
        with self._in_use:
            self._sock.close()


def _is_json(data: bytearray) -> bool:
    try:
        msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return True
