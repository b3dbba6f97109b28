"""A connection inside TLS 1.3: `TlsWire`, and why a peer is not let in.

OpenSSL works in memory here, and `Wire` moves what it makes: so a deadline is the same with and
without TLS, any thread can cut a connection in its handshake, and one system call moves many of
TLS's records of 16 KiB.
"""

import contextlib
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, cast

from ..credentials import Credentials
from ..utils import Address, Buffer, FewLines, logger
from .wire import Wire

if TYPE_CHECKING:
    import socket

    from _typeshed import WriteableBuffer

ALERT = b"\x15\x03"  # how TLS says that it goes no further
_UNEXPECTED = b"\x15\x03\x03\x00\x02\x02\x0a"  # what OpenSSL does not say to HTTP
_PIECE = 256 << 10  # bytes that are encrypted or decrypted at once
_SMALL = 32 << 10  # the same of a request
_NOT_YET_VALID, _EXPIRED, _OTHER_HOST, _OTHER_IP = 9, 10, 62, 64  # of X509_V_ERR


class NotAdmitted(ConnectionError):
    """One end of a connection does not let the other in.

    Attributes:
        kind: one of a few words for why.
    """

    def __init__(self, kind: str, why: str) -> None:
        super().__init__(why)
        self.kind = kind


class TlsWire(Wire):
    """See `Wire`; `handshake` has to come first.

    Args:
        sock: the socket, which belongs to this object from now on.
        progress: seconds.
        credentials: who is let in.
        host: the source that this end has connected to; None: this end has accepted.

    Raises:
        OSError: the connection is gone already.
    """

    def __init__(
        self,
        sock: "socket.socket",
        progress: float,
        credentials: Credentials,
        host: str | None = None,
    ) -> None:
        super().__init__(sock, progress)
        self._credentials = credentials
        self._host = host
        self._trusted = False
        self._tls: ssl.SSLObject | None = None
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._received = memoryview(bytearray(_SMALL if host is None else _PIECE))
        self._heard = host is None  # something after the handshake

    def handshake(self, seconds: float) -> None:
        """See `Wire`."""
        deadline = time.monotonic() + seconds
        with self._failures():
            incoming, outgoing = self._incoming, self._outgoing
            if self._host is None:
                self._tls = self._credentials.accepting(incoming, outgoing)
            else:
                self._tls = self._credentials.connecting(incoming, outgoing, self._host)
            while not self._done(self._tls):
                try:
                    if not self._fetch(deadline):
                        raise ConnectionResetError("the connection ended in the TLS handshake")
                except TimeoutError:
                    raise TimeoutError(f"no complete TLS handshake in {seconds:g} s") from None
            self._flush()
        self._trusted = bool(self._tls.getpeercert(binary_form=True))

    @property
    def trusted(self) -> bool:
        """See `Wire`: whether the peer has a certificate, which was checked in the handshake."""
        return self._trusted

    def send(self, views: Iterable[Buffer | bytes]) -> None:
        """See `Wire`."""
        tls = self._established()
        for piece in _pieces(views):
            while piece:
                with self._failures():
                    piece = piece[tls.write(piece) :]
            self._flush()

    @property
    def has_data(self) -> bool:
        """See `Wire`; part of TLS's next record counts."""
        return bool(self._established().pending() or self._incoming.pending or super().has_data)

    def _read(self, buffer: "WriteableBuffer", deadline: float) -> int:
        tls = self._established()
        with self._failures():
            while True:
                try:
                    nbytes = cast(int, tls.read(len(memoryview(buffer)), cast(Any, buffer)))
                except ssl.SSLWantReadError:
                    if self._fetch(deadline):
                        continue
                    nbytes = 0
                if not nbytes and not self._heard:
                    raise ConnectionAbortedError(
                        "ended the connection right after the TLS handshake: it may not accept "
                        f"this instance's {self._whose()}"
                    )
                self._heard = True
                return nbytes

    def _take(self, left: list[Any], missing: int) -> None:
        tls, until = self._established(), 0.0  # 0: data has come since
        with self._failures():  # once, as entering it takes a good part of a record's time
            while left:
                view = memoryview(left.pop()).cast("B")
                while view:
                    try:
                        nbytes = cast(int, tls.read(len(view), cast(Any, view)))
                    except ssl.SSLWantReadError:
                        until = until or time.monotonic() + self._patience()
                        if self._fetch_some(until):
                            continue
                        nbytes = 0
                    if not nbytes:
                        early = f"the connection ended {missing} bytes too early"
                        raise ConnectionResetError(early)
                    view, missing, until = view[nbytes:], missing - nbytes, 0.0

    def _fetch_some(self, deadline: float) -> int:
        try:
            return self._fetch(deadline)
        except TimeoutError:
            raise TimeoutError(f"no data received for {self._progress:g} s") from None

    def _established(self) -> ssl.SSLObject:
        if self._tls is None:
            raise ConnectionAbortedError("there was no TLS handshake")
        return self._tls

    def _done(self, tls: ssl.SSLObject) -> bool:
        try:
            tls.do_handshake()
        except ssl.SSLWantReadError:
            return False
        return True

    def _fetch(self, deadline: float) -> int:
        self._flush()  # OpenSSL answers records that carry no data, of which a peer may send many
        nbytes = super()._read(self._received, deadline)
        self._incoming.write(self._received[:nbytes])
        return nbytes

    def _flush(self) -> None:
        if self._outgoing.pending:
            super().send([self._outgoing.read()])

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        """Say in plain words what OpenSSL finds wrong, and tell the peer."""
        try:
            yield
        except ssl.SSLError as error:
            problem = self._problem(error)
            with contextlib.suppress(OSError):
                if problem.kind == "no_tls" and self._host is None:
                    super().send([_UNEXPECTED])
                self._flush()
            raise problem from None

    def _problem(self, error: ssl.SSLError) -> NotAdmitted:
        reason = error.reason or ""
        words = reason.replace("_", " ").lower() or "it failed"
        if isinstance(error, ssl.SSLCertVerificationError):
            if error.verify_code == _EXPIRED:
                return NotAdmitted("expired", "its certificate has expired")
            if error.verify_code == _NOT_YET_VALID:
                return NotAdmitted("expired", "its certificate is not valid yet")
            if error.verify_code in (_OTHER_HOST, _OTHER_IP):
                why = "its certificate is for another name; set TLS_SERVER_NAME to the one it has"
                return NotAdmitted("name", f"{why} ({error.verify_message})")
            if self._credentials.by_secret:
                why = "its certificate does not belong to a secret in SECRET_FILE here"
                return NotAdmitted("certificate", why)
            why = f"its certificate is not accepted by TLS_CA here: {error.verify_message}"
            return NotAdmitted("certificate", why)
        if reason in ("HTTP_REQUEST", "HTTPS_PROXY_REQUEST", "WRONG_VERSION_NUMBER"):
            return NotAdmitted("no_tls", "it does not use TLS, and this instance does")
        if "PROTOCOL" in reason:
            return NotAdmitted("version", f"it has no TLS 1.3, which is needed ({words})")
        if "CERTIFICATE" in reason or "UNKNOWN_CA" in reason:
            why = f"it does not accept this instance's {self._whose()} ({words})"
            return NotAdmitted("declined", why)
        return NotAdmitted("broken", f"TLS failed: {words}")

    def _whose(self) -> str:
        return "secret" if self._credentials.by_secret else "certificate"


class Doorkeeper:
    """Counts who was not let in, and logs one line for each kind in ten seconds.

    Args:
        noted: called with the kind, each time.

    Attributes:
        counts: how often, by `NotAdmitted.kind`.
    """

    def __init__(self, noted: Callable[[str], object] = lambda kind: None) -> None:
        self._noted = noted
        self.counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._lines = FewLines()

    def note(self, peer: Address, error: NotAdmitted) -> None:
        """Take note of a peer that was not let in."""
        self._noted(error.kind)
        with self._lock:
            self.counts[error.kind] += 1
        if (more := self._lines.more(error.kind)) is not None:
            logger.warning("NetLoader: refused the connection of %s: %s%s", peer, error, more)


def _pieces(views: Iterable[Buffer | bytes]) -> Iterator[memoryview]:
    """Cut large views, and put small ones together, as each call of OpenSSL costs."""
    small = bytearray()
    for view in views:
        whole = memoryview(view).cast("B")
        if len(small) + len(whole) <= _PIECE:
            small += whole
            continue
        yield memoryview(small)
        small = bytearray()
        for begin in range(0, len(whole), _PIECE):
            yield whole[begin : begin + _PIECE]
    yield memoryview(small)
