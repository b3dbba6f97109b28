"""A connected TCP socket on which every read and write ends in bounded time and memory."""

import contextlib
import http.client
import io
import math
import select
import socket
import struct
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ..utils import Address, Buffer, unmapped

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_IOV_MAX = 1024  # buffers that one system call takes


class Wire:
    """One connection; one thread reads and writes at a time, any may `cut` it or ask `hung_up`.

    The heads of messages are read through `stream`, under the deadline and within the bytes that
    `allow` grants to all reads together. Bulk bytes move by blocking calls, which take the
    interpreter's lock once for many megabytes, and fail after `progress` seconds without any.

    Args:
        sock: the socket, which belongs to this object from now on.
        progress: seconds.

    Attributes:
        peer: the other end.
        local_host: this end's address.
        stream: what came, buffered.
        budget: bytes that `stream` may still read.
        ends: by `time.monotonic`, when reading fails even while bytes come.

    Raises:
        OSError: the connection is gone already.
    """

    def __init__(self, sock: socket.socket, progress: float) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(progress))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(progress))
        peer = sock.getpeername()
        self.peer = Address(unmapped(peer[0]), peer[1])
        self.local_host = unmapped(sock.getsockname()[0])
        if self.local_host == self.peer.host:
            # Within a machine BBR, which many systems choose, sends next to nothing ahead of a
            # client that is busy with what it has: it takes the time of a copy for the way's.
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
        self._sock = sock
        self._progress = progress
        self._waits = progress
        self.ends = math.inf
        self.allow(0.0, 0)
        self.stream = _Stream(_Reader(self))

    def handshake(self, seconds: float) -> None:
        """Agree with the peer on how to go on; without TLS there is nothing to agree on.

        Raises:
            OSError: the connection failed, or the time is up.
        """

    @property
    def trusted(self) -> bool:
        """Whether the peer may ask everything; without TLS everybody may."""
        return True

    def allow(self, seconds: float, nbytes: int) -> None:
        """Let `stream` read for so long, and so many bytes, from now on."""
        self._seconds = seconds
        self._deadline = min(time.monotonic() + seconds, self.ends)
        self.budget = nbytes

    def makefile(self, _: str) -> "_Stream":
        """Return `stream`, as `http.client` asks for one for each answer."""
        return self.stream

    def read(self, buffer: "WriteableBuffer") -> int:
        """Read what is there, at least a byte; 0 at the end of the connection.

        Raises:
            OSError: the connection failed, or its time is up.
            LineTooLong: more came than was allowed.
        """
        if self.budget <= 0:
            raise http.client.LineTooLong("message")
        try:
            nbytes = self._read(buffer, self._deadline)
        except TimeoutError:
            raise TimeoutError(f"no complete message within {self._seconds:g} s") from None
        self.budget -= nbytes
        return nbytes

    def _read(self, buffer: "WriteableBuffer", deadline: float) -> int:
        if (left := deadline - time.monotonic()) <= 0:  # also while bytes go on coming
            raise TimeoutError("the time is up")
        self._sock.settimeout(left)
        return self._sock.recv_into(buffer)

    def send(self, views: Iterable[Buffer | bytes]) -> None:
        """Send buffers, gathered.

        Raises:
            OSError: the connection failed, or nothing could be sent for `progress` seconds.
        """
        left = [view for view in views if view][::-1]
        self._sock.settimeout(None)
        while left:
            batch = left[-1 : -_IOV_MAX - 1 : -1]
            try:
                nbytes = self._sock.sendmsg(batch)
            except BlockingIOError:
                raise TimeoutError(f"no data sent for {self._progress:g} s") from None
            _drop(left, batch, nbytes)

    def receive(self, views: Iterable[Buffer]) -> None:
        """Fill views with what comes next.

        Raises:
            OSError: the connection failed or ended, or nothing came for `progress` seconds.
        """
        left = [view for view in views if view][::-1]
        missing = sum(map(len, left))
        self.allow(self._progress, 1 << 62)
        if missing and (early := self.stream.peek()[:missing]):  # came along with the head
            self.stream.read(len(early))
            while early:
                view = memoryview(left.pop()).cast("B")
                nbytes = min(len(view), len(early))
                view[:nbytes], early = early[:nbytes], early[nbytes:]
                missing -= nbytes
                if nbytes < len(view):
                    left.append(view[nbytes:])
        self._take(left, missing)

    def _take(self, left: list[Any], missing: int) -> None:
        """Fill views in reversed order, which have so many bytes."""
        self._sock.settimeout(None)
        while left:
            batch = left[-1 : -_IOV_MAX - 1 : -1]
            self._wait_at_most(self._patience())
            try:
                nbytes = self._sock.recvmsg_into(batch, 0, socket.MSG_WAITALL)[0]
            except BlockingIOError:
                raise TimeoutError(f"no data received for {self._progress:g} s") from None
            if not nbytes:
                raise ConnectionResetError(f"the connection ended {missing} bytes too early")
            missing -= nbytes
            _drop(left, batch, nbytes)

    def _patience(self) -> float:
        """Return for how many seconds bytes are waited for.

        Raises:
            TimeoutError: for none any more.
        """
        if self.ends == math.inf:
            return self._progress
        if (left := self.ends - time.monotonic()) <= 0:
            raise TimeoutError("not all came in time")
        return min(left, self._progress)

    def _wait_at_most(self, seconds: float) -> None:
        if seconds != self._waits:
            self._waits = seconds
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(seconds))

    @property
    def has_data(self) -> bool:
        """Whether something has come that was not read yet."""
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        return bool(poll.poll(0))

    @property
    def hung_up(self) -> bool:
        """Whether the peer has closed the connection, or its process has ended."""
        poll = select.poll()
        try:
            poll.register(self._sock, select.POLLRDHUP)
        except ValueError:  # closed on this side
            return True
        return bool(poll.poll(0))

    def linger(self, seconds: float, nbytes: int) -> None:
        """Close, but let the peer read what it was told while it is still sending itself.

        Closing a socket with bytes that nobody has read makes the system tell the peer that the
        connection broke, which can overtake the last words.
        """
        self.allow(seconds, nbytes)
        unread = bytearray(1 << 16)
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)
            while self.budget > 0 and (came := Wire._read(self, unread, self._deadline)):
                self.budget -= came

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
        self._sock.close()

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._sock.fileno() < 0


class _Reader(io.RawIOBase):
    def __init__(self, wire: Wire) -> None:
        self._wire = wire

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        return self._wire.read(buffer)


class _Stream(io.BufferedReader):
    def close(self) -> None:
        """Do nothing: what comes after one answer belongs to the next."""


def _timeval(seconds: float) -> bytes:
    whole, fraction = divmod(seconds, 1)
    # 0 would mean to wait without end.
    return struct.pack("@ll", int(whole), max(int(fraction * 1e6), 1))


def _drop(left: list[Any], batch: list[Any], nbytes: int) -> None:
    """Take the first bytes away from buffers in reversed order; `batch` has the first ones."""
    if nbytes == sum(map(len, batch)):  # as it is but for signals and deadlines
        del left[-len(batch) :]
        return
    while nbytes:
        view = left.pop()
        if len(view) > nbytes:
            left.append(memoryview(view).cast("B")[nbytes:])
            return
        nbytes -= len(view)
