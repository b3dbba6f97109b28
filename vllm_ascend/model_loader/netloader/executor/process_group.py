"""A two-rank process group of one session, outside torch's global state."""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta

import torch
from torch.distributed import PrefixStore, ProcessGroup, Store, TCPStore, Work

from .devices import Device

CLIENT, SOURCE = 0, 1
# Messages and trailers have tags of their own: gloo ends the process that gets more bytes under a
# tag than it has room for.
_TAGS = 1 << 30


class TransferGroup:
    """Sends and receives messages that complete in the order in which they were started.

    Gloo may match messages out of order, so each one travels under the next tag, and a message
    that is missing or too many is noticed; backends without tags keep the order by themselves.

    A trailer of one byte follows each message. When a connection breaks, gloo wakes up those who
    wait for a message that has not begun, but not those who wait for one that is half here. So the
    trailer is waited for, and a peer that dies is noticed at once.

    Args:
        group: the two-rank group, which this object owns.
        rank: `CLIENT` or `SOURCE`.
        device: whose backend moves the bytes.
        timeout: seconds without a completed message after which the peer counts as lost.
    """

    def __init__(self, group: ProcessGroup, rank: int, device: Device, timeout: float) -> None:
        self._group: ProcessGroup | None = group
        self._peer = CLIENT if rank == SOURCE else SOURCE
        self._device = device
        self._timeout = timeout
        self._tag = 0
        self._trailer = device.empty(1)
        self._started: deque[tuple[Work, Work]] = deque()

    def __enter__(self) -> "TransferGroup":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def in_flight(self) -> int:
        """Number of messages started and not waited for."""
        return len(self._started)

    def send(self, message: torch.Tensor) -> None:
        """Start sending contiguous uint8 memory, which must stay as it is until `wait`."""
        assert self._group is not None
        send, tag = self._group.send, self._next_tag()
        work = send([message], self._peer, tag)
        self._started.append((work, send([self._trailer], self._peer, _TAGS + tag)))

    def receive(self, message: torch.Tensor) -> None:
        """Start receiving into contiguous uint8 memory."""
        assert self._group is not None
        receive, tag = self._group.recv, self._next_tag()
        work = receive([message], self._peer, tag)
        self._started.append((work, receive([self._trailer], self._peer, _TAGS + tag)))

    def wait(self) -> None:
        """Return once the oldest message has happened.

        Raises:
            RuntimeError: the peer is gone, or the progress deadline passed.
        """
        message, trailer = self._started[0]
        self._device.wait(trailer, self._timeout)
        self._device.wait(message, self._timeout)
        self._started.popleft()

    def close(self) -> None:
        """Leave the group; no byte is written to any tensor after this.

        Gloo keeps a connection open for as long as an operation on it is referred to, so this
        object is the only one that does.
        """
        group, self._group = self._group, None
        self._started.clear()
        if group is not None:
            group.abort()

    def _next_tag(self) -> int:
        self._tag = (self._tag + 1) % _TAGS
        return self._tag


def host_store(local_host: str, timeout: float) -> TCPStore:
    """Open a store on a port that the system chooses, for one session.

    Raises:
        RuntimeError: it cannot be opened.
    """
    return _store(local_host, 0, timeout, hosted=True)


def _store(host: str, port: int, timeout: float, *, hosted: bool) -> TCPStore:
    return TCPStore(
        host,
        port,
        world_size=2,
        is_master=hosted,
        timeout=timedelta(seconds=timeout),
        wait_for_workers=False,
    )


def form_group(
    device: Device,
    store: Store,
    session: str,
    rank: int,
    local_host: str,
    *,
    handshake: float,
    progress: float,
) -> TransferGroup:
    """Form the two-rank group of a session.

    Args:
        device: whose backend moves the bytes.
        store: where the two meet.
        session: the session's name, the prefix of its keys.
        rank: `CLIENT` or `SOURCE`.
        local_host: the address of this machine that the peer reaches.
        handshake: seconds for the peer to come, and then for forming the group.
        progress: seconds without a completed message after which the peer counts as lost.

    Raises:
        RuntimeError: the peer did not come in time, or went away.
    """
    peer = CLIENT if rank == SOURCE else SOURCE
    meeting = PrefixStore(session, store)
    meeting.set(f"rank {rank} is here", "")
    meeting.wait([f"rank {peer} is here"], timedelta(seconds=handshake))
    group = device.create_group(PrefixStore("group", meeting), rank, local_host, handshake)
    return TransferGroup(group, rank, device, progress)


def join_group(
    device: Device,
    host: str,
    port: int,
    session: str,
    local_host: str,
    *,
    handshake: float,
    progress: float,
) -> TransferGroup:
    """Form a session's group as its client, at the store that the source has opened.

    Args:
        device: whose backend moves the bytes.
        host: the source.
        port: the store's.
        session: see `form_group`.
        local_host: see `form_group`.
        handshake: seconds for all of it.
        progress: see `form_group`.

    Raises:
        RuntimeError: the source did not answer in time, or went away.
    """

    def join() -> TransferGroup:
        store = _store(host, port, handshake, hosted=False)
        return form_group(
            device, store, session, CLIENT, local_host, handshake=handshake, progress=progress
        )

    return _within(handshake, join)


def _within(seconds: float, join: Callable[[], TransferGroup]) -> TransferGroup:
    """Call `join` in a thread that is left behind when it takes too long.

    A TCPStore reads some answers without a deadline: it waits for ever for one that is stopped.
    """
    future: Future[TransferGroup] = Future()

    def run() -> None:
        try:
            group = join()
        except BaseException as error:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)
        else:
            if future.set_running_or_notify_cancel():
                future.set_result(group)
            else:
                group.close()

    threading.Thread(target=run, name="netloader-join", daemon=True).start()
    try:
        return future.result(seconds)
    except TimeoutError:
        if future.cancel():
            raise RuntimeError(f"no process group within {seconds:g} s") from None
        return future.result()
