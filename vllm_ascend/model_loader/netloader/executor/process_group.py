"""A two-rank process group of one session, outside torch's global state."""

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed import PrefixStore, ProcessGroup

from .devices import Device
from .store import Hear, PeerStore, Tell

CLIENT, SOURCE = 0, 1
_TAGS = 1 << 30


class TransferGroup:
    """Sends and receives messages that complete in the order in which they were started.

    Each one travels under the next tag, so that a message that is missing or too many is noticed
    where the backend goes by tags.

    Args:
        group: the two-rank group, which this object owns.
        store: the group's, which has to last as long as it: torch does not see to that.
        rank: `CLIENT` or `SOURCE`.
        device: whose backend moves the bytes.
        timeout: seconds without a completed message after which the peer counts as lost.
        gone: whether the peer has hung up.
    """

    def __init__(
        self,
        group: ProcessGroup,
        store: PeerStore,
        rank: int,
        device: Device,
        timeout: float,
        gone: Callable[[], bool],
    ) -> None:
        self._group: ProcessGroup | None = group
        self._store = store
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


def form_group(
    device: Device,
    tell: Tell,
    hear: Hear,
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
        tell: see `PeerStore`.
        hear: see `PeerStore`.
        rank: `CLIENT` or `SOURCE`.
        local_host: the address of this machine that the peer reaches.
        handshake: seconds for what the two have to say, and as much again for gloo to connect.
        progress: seconds without a completed message after which the peer counts as lost.
        gone: whether the peer has hung up.

    Raises:
        RuntimeError: the peer did not come in time, or went away.
        ProtocolError: it has set what it must not.
        Exception: what `hear` raises that is no OSError.
    """
    store = PeerStore(tell, hear, handshake, device.acceptable)
    try:
        # A peer that has left again would have five times its deadline from gloo.
        store.meet(rank, "is here")
        names = PrefixStore("group", store)
        group = device.create_group(names, rank, local_host, store.remaining, gone)
        try:
            store.meet(rank, "has the group")
        except BaseException:
            device.close(group, [])
            raise
    except Exception as error:
        raise _reason(store.failure or error, handshake) from None
    finally:
        store.close()
    return TransferGroup(group, store, rank, device, progress, gone)


def _reason(error: Exception, handshake: float) -> Exception:
    if isinstance(error, TimeoutError):
        return RuntimeError(f"no process group within {handshake:g} s")
    return RuntimeError(str(error)) if isinstance(error, OSError) else error
