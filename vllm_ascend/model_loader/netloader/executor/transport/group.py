"""Two-rank process groups: runs of blocks as messages between the memory of two devices."""

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch.distributed import PrefixStore, ProcessGroup

from ...errors import AskOthers, ProtocolError
from ..chunks.blocks import Run
from ..devices import Accelerator
from ..store import BlockStore
from .messages import own_memory, unpack
from .rendezvous import Hear, PeerStore, Tell

CLIENT, SOURCE = 0, 1

# Messages of one session that are under way. Each end has at most as many staging buffers of a
# message each, and only for runs that are packed.
WINDOW = 6
# Runs asked for in one request, and asked for in all before they have arrived: enough that the next
# ones are announced long before they are needed, since a round trip of the control plane can take
# as long as several messages when all cores are busy.
BATCH = 8
AHEAD = 2 * BATCH


class Control(Protocol):
    """The way to ask a source for runs."""

    def ask(self, runs: Sequence[Run]) -> None:
        """Ask for runs, in order, once the answer to what was asked before has been taken."""

    def answer(self) -> Sequence[int | None]:
        """Return the sizes in bytes of the runs that the source is about to send.

        None: it does not send this one, as it has sent it to others.
        """

    @property
    def answered(self) -> bool:
        """Whether `answer` has something to return, or at least the beginning of it."""


class TransferGroup:
    """Sends and receives messages that complete in the order in which they were started.

    Args:
        group: the two-rank group, which this object owns.
        store: the group's, which has to last as long as it: torch does not see to that.
        rank: `CLIENT` or `SOURCE`.
        accelerator: whose messages these are.
        timeout: seconds without a completed message after which the peer counts as lost.
        gone: whether the peer has hung up.
    """

    def __init__(
        self,
        group: ProcessGroup,
        store: PeerStore,
        rank: int,
        accelerator: Accelerator,
        timeout: float,
        gone: Callable[[], bool],
    ) -> None:
        self._group: ProcessGroup | None = group
        self._store = store
        self._peer = CLIENT if rank == SOURCE else SOURCE
        self._accelerator = accelerator
        self._timeout = timeout
        self._gone = gone
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
        self._started.append(self._accelerator.send(self._group, message, self._peer))

    def receive(self, message: torch.Tensor) -> None:
        """Start receiving into contiguous uint8 memory."""
        assert self._group is not None
        self._started.append(self._accelerator.receive(self._group, message, self._peer))

    def wait(self) -> None:
        """Return once the oldest message has happened.

        Raises:
            RuntimeError: the peer is gone, or the progress deadline passed.
        """
        self._accelerator.wait(self._started[0], self._timeout, self._gone)
        self._started.popleft()

    def close(self) -> None:
        """Leave the group; no byte is written to any tensor after this."""
        group, self._group = self._group, None
        if group is not None:
            self._accelerator.close(group, list(self._started))
        self._started.clear()  # now that none is on its way any more: see `in_flight`


class _Staging:
    """Buffers for packed runs, made when first needed and used again."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._nbytes = 0
        self._free: list[torch.Tensor] = []

    def take(self, nbytes: int) -> torch.Tensor:
        """Return a buffer of at least so many bytes."""
        if nbytes > self._nbytes:
            self._nbytes = nbytes
            self._free.clear()
        return self._free.pop() if self._free else self._accelerator.empty(self._nbytes)

    def give_back(self, buffer: torch.Tensor) -> None:
        if buffer.numel() == self._nbytes:
            self._free.append(buffer)


class GroupSender:
    """See `elastic_load.Sender`.

    Args:
        group: the session's group.
        store: the weights.
        accelerator: where they are.
    """

    def __init__(self, group: TransferGroup, store: BlockStore, accelerator: Accelerator) -> None:
        self._group = group
        self._store = store
        self._accelerator = accelerator
        self._staging = _Staging(accelerator)
        self._staged: deque[torch.Tensor | None] = deque()

    @property
    def in_flight(self) -> int:
        """Number of runs that may not have been sent yet."""
        return self._group.in_flight

    def send(self, run: Run) -> None:
        """Start sending a run, after waiting for room in the window."""
        while self._group.in_flight >= WINDOW:
            self._finish_oldest()
        nbytes = self._store.blocks.size_of(run)
        if not nbytes:
            return
        message, buffer = own_memory(run, self._store, self._accelerator), None
        if message is None:
            buffer = self._staging.take(nbytes)
            message = buffer[:nbytes]
            self._accelerator.pack(self._store.parts(run), message)
        self._staged.append(buffer)
        self._group.send(message)

    def finish(self) -> None:
        """Wait until every run has been sent.

        Raises:
            RuntimeError: one could not be sent.
        """
        while self._group.in_flight:
            self._finish_oldest()

    def _finish_oldest(self) -> None:
        self._group.wait()
        buffer = self._staged.popleft()
        if buffer is not None:
            self._staging.give_back(buffer)


class GroupReceiver:
    """See `elastic_load.Receiver`.

    Args:
        control: the way to ask the source.
        group: the session's group.
        store: what is filled.
        accelerator: where its tensors are.
        max_bytes: size of a message that the source makes at most.
    """

    batch = BATCH
    ahead = AHEAD

    def __init__(
        self,
        control: Control,
        group: TransferGroup,
        store: BlockStore,
        accelerator: Accelerator,
        max_bytes: int,
    ) -> None:
        self.max_bytes = max_bytes
        self._control = control
        self._group = group
        self._store = store
        self._accelerator = accelerator
        self._staging = _Staging(accelerator)
        self._to_ask: deque[Sequence[Run]] = deque()
        self._asked: Sequence[Run] | None = None
        self._announced: deque[Run] = deque()
        self._arriving: deque[tuple[Run, torch.Tensor | None, torch.Tensor | None]] = deque()
        self._declined: set[Run] = set()

    def request(self, runs: Sequence[Run]) -> None:
        """Ask as soon as the source has answered what was asked before."""
        self._to_ask.append(runs)
        self._ask_next()
        if not runs:
            while self._to_ask or self._asked is not None:
                self._hear()

    def receive(self) -> Callable[[], list[int]]:
        """Wait for the oldest run, and unpack it."""
        # A source with a rate to keep answers long after the first runs of the batch before it
        # are here.
        while self._asked is not None and (
            not (self._announced or self._arriving) or self._control.answered
        ):
            self._hear()
        while self._announced and len(self._arriving) < WINDOW:
            self._start(self._announced.popleft())
        run, message, buffer = self._arriving[0]
        if run in self._declined:
            self._declined.remove(run)
            self._arriving.popleft()
            raise AskOthers(f"others have got blocks {run} from the source")
        if message is not None:
            self._group.wait()
        parts = None if message is None else [message]
        # Meanwhile the backend receives the messages behind this one.
        if message is not None and buffer is not None:
            unpack(run, self._store, message, self._accelerator)
            self._staging.give_back(buffer)
            parts = None  # what counts is what the tensors have
        self._arriving.popleft()
        return partial(self._store.wrong, run, parts)

    def _ask_next(self) -> None:
        if self._asked is None and self._to_ask:
            self._asked = self._to_ask.popleft()
            self._control.ask(self._asked)

    def _hear(self) -> None:
        sizes, asked = self._control.answer(), self._asked
        assert asked is not None
        expected = [self._store.blocks.size_of(run) for run in asked]
        if len(sizes) != len(asked) or any(
            there not in (here, None) for here, there in zip(expected, sizes, strict=True)
        ):
            # A backend may end this process if more comes than there is room for.
            raise ProtocolError(f"blocks have {expected} bytes here and {sizes} there")
        self._declined.update(run for run, size in zip(asked, sizes, strict=True) if size is None)
        self._announced.extend(asked)
        self._asked = None
        self._ask_next()

    def _start(self, run: Run) -> None:
        nbytes = 0 if run in self._declined else self._store.blocks.size_of(run)
        message, buffer = None, None
        if nbytes:
            message = own_memory(run, self._store, self._accelerator)
            if message is None:
                buffer = self._staging.take(nbytes)
                message = buffer[:nbytes]
            self._group.receive(message)
        self._arriving.append((run, message, buffer))


def form_group(
    accelerator: Accelerator,
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
        accelerator: whose messages these are.
        tell: see `PeerStore`.
        hear: see `PeerStore`.
        rank: `CLIENT` or `SOURCE`.
        local_host: the address of this machine that the peer reaches.
        handshake: seconds for what the two have to say.
        progress: seconds without a completed message after which the peer counts as lost.
        gone: whether the peer has hung up.

    Raises:
        RuntimeError: the peer did not come in time, or went away.
        ProtocolError: it has set what it must not.
        Exception: what `hear` raises that is no OSError.
    """
    store = PeerStore(tell, hear, handshake)
    try:
        store.meet(rank, "is here")
        names = PrefixStore("group", store)
        group = accelerator.create_group(names, rank, local_host, store.remaining, gone)
        try:
            store.meet(rank, "has the group")
        except BaseException:
            accelerator.close(group, [])
            raise
    except Exception as error:
        raise _reason(store.failure or error, handshake) from None
    finally:
        store.close()
    return TransferGroup(group, store, rank, accelerator, progress, gone)


def _reason(error: Exception, handshake: float) -> Exception:
    if isinstance(error, TimeoutError):
        return RuntimeError(f"no process group within {handshake:g} s")
    return RuntimeError(str(error)) if isinstance(error, OSError) else error
