"""A two-rank process group of one session, outside torch's global state."""

from collections import deque
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import PrefixStore, ProcessGroup, Store, TCPStore

from ..utils import within
from .devices import Device

CLIENT, SOURCE = 0, 1
_TAGS = 1 << 30


class TransferGroup:
    """Sends and receives messages that complete in the order in which they were started.

    Each one travels under the next tag, so that a message that is missing or too many is noticed
    where the backend goes by tags.

    Args:
        group: the two-rank group, which this object owns.
        rank: `CLIENT` or `SOURCE`.
        device: whose backend moves the bytes.
        timeout: seconds without a completed message after which the peer counts as lost.
        gone: whether the peer has hung up.
    """

    def __init__(
        self,
        group: ProcessGroup,
        rank: int,
        device: Device,
        timeout: float,
        gone: Callable[[], bool],
    ) -> None:
        self._group: ProcessGroup | None = group
        self._peer = CLIENT if rank == SOURCE else SOURCE
        self._device = device
        self._timeout = timeout
        self._gone = gone
        self._tag = 0
        self._started: deque[Any] = deque()

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
        started = self._device.send(self._group, message, self._peer, self._next_tag())
        self._started.append(started)

    def receive(self, message: torch.Tensor) -> None:
        """Start receiving into contiguous uint8 memory."""
        assert self._group is not None
        started = self._device.receive(self._group, message, self._peer, self._next_tag())
        self._started.append(started)

    def wait(self) -> None:
        """Return once the oldest message has happened.

        Raises:
            RuntimeError: the peer is gone, or the progress deadline passed.
        """
        self._device.wait(self._started[0], self._timeout, self._gone)
        self._started.popleft()

    def close(self) -> None:
        """Leave the group; no byte is written to any tensor after this.

        Gloo keeps a connection open for as long as an operation on it is referred to, so this
        object is the only one that does.
        """
        group, self._group = self._group, None
        unfinished = list(self._started)
        self._started.clear()
        if group is not None:
            self._device.close(group, unfinished)

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
    gone: Callable[[], bool],
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
        gone: whether the peer has hung up.

    Raises:
        RuntimeError: the peer did not come in time, or went away.
    """
    peer = CLIENT if rank == SOURCE else SOURCE
    meeting = PrefixStore(session, store)
    meeting.set(f"rank {rank} is here", "")
    meeting.wait([f"rank {peer} is here"], timedelta(seconds=handshake))
    group = device.create_group(PrefixStore("group", meeting), rank, local_host, handshake)
    return TransferGroup(group, rank, device, progress, gone)


def join_group(
    device: Device,
    host: str,
    port: int,
    session: str,
    local_host: str,
    *,
    handshake: float,
    progress: float,
    gone: Callable[[], bool],
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
        gone: see `form_group`.

    Raises:
        RuntimeError: the source did not answer in time, or went away.
    """

    def join() -> TransferGroup:
        store = _store(host, port, handshake, hosted=False)
        with device.attached():
            return form_group(
                device,
                store,
                session,
                CLIENT,
                local_host,
                handshake=handshake,
                progress=progress,
                gone=gone,
            )

    try:
        # A TCPStore reads some answers without a deadline: it waits for ever for one that is
        # stopped.
        return within(handshake, join, TransferGroup.close)
    except TimeoutError:
        raise RuntimeError(f"no process group within {handshake:g} s") from None
