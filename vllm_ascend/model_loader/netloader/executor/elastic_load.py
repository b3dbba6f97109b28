"""The two ends of a transfer: `P2PLoad` receives, `P2PSend` sends."""

import itertools
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ..errors import ProtocolError, TransferCorrupt
from .devices import Device
from .digest import chunk_digest
from .ledger import Ledger
from .pieces import in_place, pack, piece_hashes, unpack
from .plan import Chunk, Plan
from .process_group import TransferGroup

# Messages of one session that are under way. Each end has at most as many staging buffers of a
# chunk each, and only for chunks that are packed.
WINDOW = 6
# Chunks asked for in one request, and asked for in all before they have arrived: enough that the
# next ones are announced long before they are needed, since a round trip of the control plane can
# take as long as several chunks when all cores are busy.
BATCH = 8
AHEAD = 2 * BATCH


class Answer(Protocol):
    """What a source says about the chunks it is about to send."""

    @property
    def chunks(self) -> list[int]:
        """The chunks, in the order in which they travel."""

    @property
    def digests(self) -> list[str]:
        """Their digests."""

    @property
    def sizes(self) -> list[int]:
        """Their numbers of bytes."""


class Control(Protocol):
    """The way to ask a source for chunks."""

    def request(self, chunks: list[int]) -> None:
        """Ask for chunks, in order."""

    def sending(self) -> Answer:
        """Return the answer to the oldest request not answered yet."""

    @property
    def answered(self) -> bool:
        """Whether `sending` has something to return, or at least the beginning of it."""


@dataclass(frozen=True)
class Target:
    """A model that is being filled, by one session or several.

    Attributes:
        names: name of each tensor.
        tensors: the plan's tensors, in order; their memory is written.
        plan: the chunks.
        ledger: which of them are done.
        verify: whether digests are checked.
    """

    names: Sequence[str]
    tensors: Sequence[torch.Tensor]
    plan: Plan
    ledger: Ledger
    verify: bool


class _Staging:
    """At most `WINDOW` buffers for packed chunks, made when first needed and used again."""

    def __init__(self, device: Device, nbytes: int) -> None:
        self._device = device
        self._nbytes = nbytes
        self._free: list[torch.Tensor] = []

    def take(self) -> torch.Tensor:
        return self._free.pop() if self._free else self._device.empty(self._nbytes)

    def give_back(self, buffer: torch.Tensor) -> None:
        self._free.append(buffer)


class P2PSend:
    """Sends chunks of a model in the order asked for.

    Args:
        group: the session's group.
        tensors: the plan's tensors.
        plan: the chunks.
        device: where the tensors are.
    """

    def __init__(
        self,
        group: TransferGroup,
        tensors: Sequence[torch.Tensor],
        plan: Plan,
        device: Device,
    ) -> None:
        self._group = group
        self._tensors = device.readable(tensors)
        self._plan = plan
        self._device = device
        self._staging = _Staging(device, plan.chunk_bytes)
        self._staged: deque[torch.Tensor | None] = deque()
        self.bytes_sent = 0

    def post(self, chunk: int) -> None:
        """Start sending a chunk, after waiting for room in the window.

        Raises:
            RuntimeError: an earlier chunk could not be sent.
        """
        while self._group.in_flight >= WINDOW:
            self._finish_oldest()
        planned = self._plan.chunks[chunk]
        message, buffer = _own_memory(planned, self._tensors, self._device), None
        if message is None:
            buffer = self._staging.take()
            message = pack(planned, self._tensors, buffer, self._device)
        self._staged.append(buffer)
        self._group.send(message)
        self.bytes_sent += planned.nbytes

    @property
    def in_flight(self) -> int:
        """Number of chunks posted that may not have been sent yet."""
        return self._group.in_flight

    def finish(self) -> None:
        """Wait until every chunk posted has been sent.

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


@dataclass(frozen=True)
class _Arrival:
    chunk: int
    digest: str
    buffer: torch.Tensor | None


class P2PLoad:
    """Pulls what a model still lacks from one source, verified chunk by chunk.

    Args:
        control: the way to ask the source.
        group: the session's group.
        target: the model.
        device: where its tensors are.
        keep_alive: seconds after which a session with nothing to fetch says that it is there.
    """

    def __init__(
        self,
        control: Control,
        group: TransferGroup,
        target: Target,
        device: Device,
        *,
        keep_alive: float,
    ) -> None:
        self._control = control
        self._group = group
        self._target = target
        self._device = device
        self._keep_alive = keep_alive
        self._staging = _Staging(device, target.plan.chunk_bytes)
        self._requested: deque[list[int]] = deque()
        self._announced: deque[tuple[int, str]] = deque()
        self._arriving: deque[_Arrival] = deque()
        self._wrong_before: set[int] = set()
        self.bytes_received = 0

    @property
    def outstanding(self) -> list[int]:
        """Chunks taken from the ledger that are neither done nor given back."""
        return [
            *itertools.chain.from_iterable(self._requested),
            *(chunk for chunk, _ in self._announced),
            *(arrival.chunk for arrival in self._arriving),
        ]

    def run(self) -> None:
        """Fetch until every chunk of the model is done, here or by another session.

        After an exception the `outstanding` chunks can be given back to the ledger, once the group
        is closed.

        Raises:
            SourceLost: the control connection failed.
            RuntimeError: the process group failed.
            ProtocolError: the source sends other chunks than those asked for.
            TransferCorrupt: a chunk came with wrong bytes for the second time.
        """
        with self._target.ledger.session():
            while not self._target.ledger.finished:
                self._request()
                if self._requested and not self._announced and self._may_hear():
                    self._hear()
                self._receive()
                if self._arriving:
                    self._group.wait()
                    # Meanwhile the backend's own thread receives the messages behind this one.
                    self._settle(self._arriving[0])
                elif not self._requested:
                    self._idle()

    def _request(self) -> None:
        held = len(self.outstanding)
        if held <= AHEAD - BATCH and (chunks := self._target.ledger.take(BATCH, held)):
            self._requested.append(chunks)
            self._control.request(chunks)

    def _may_hear(self) -> bool:
        # A source with a rate to keep answers a request long after the first chunks of the one
        # before it are here.
        return not self._arriving or self._control.answered

    def _hear(self) -> None:
        answer = self._control.sending()
        wanted = self._requested[0]
        if answer.chunks != wanted:
            raise ProtocolError(f"chunks {wanted} were asked for, {answer.chunks} announced")
        sizes = [self._target.plan.chunks[chunk].nbytes for chunk in wanted]
        if answer.sizes != sizes:
            # Gloo would end this process if more came than there is room for.
            raise ProtocolError(f"chunks {wanted} have {sizes} bytes here and {answer.sizes} there")
        self._requested.popleft()
        self._announced.extend(zip(wanted, answer.digests, strict=True))

    def _receive(self) -> None:
        while self._announced and len(self._arriving) < WINDOW:
            chunk, digest = self._announced[0]
            planned = self._target.plan.chunks[chunk]
            message, buffer = _own_memory(planned, self._target.tensors, self._device), None
            if message is None:
                buffer = self._staging.take()
                message = buffer[: planned.nbytes]
            self._group.receive(message)
            self._announced.popleft()
            self._arriving.append(_Arrival(chunk, digest, buffer))

    def _land(self, arrival: _Arrival) -> tuple[bytes, ...] | None:
        target, device = self._target, self._device
        planned = target.plan.chunks[arrival.chunk]
        if arrival.buffer is not None:
            unpack(planned, target.tensors, arrival.buffer[: planned.nbytes], device)
        if not target.verify:
            return ()
        # Read back from the tensors, so that a chunk put in the wrong place is noticed as well.
        hashes = piece_hashes(planned, target.tensors, device)
        return hashes if chunk_digest(hashes) == arrival.digest else None

    def _settle(self, arrival: _Arrival) -> None:
        hashes = self._land(arrival)
        if hashes is None and arrival.chunk in self._wrong_before:
            names = _names(self._target, self._target.plan.chunks[arrival.chunk])
            raise TransferCorrupt(f"wrong bytes twice in chunk {arrival.chunk} ({names})")
        self._arriving.popleft()
        if arrival.buffer is not None:
            self._staging.give_back(arrival.buffer)
        if hashes is None:
            self._wrong_before.add(arrival.chunk)
            self._target.ledger.give_back([arrival.chunk])
        else:
            self.bytes_received += self._target.plan.chunks[arrival.chunk].nbytes
            self._target.ledger.done(arrival.chunk, hashes)

    def _idle(self) -> None:
        self._target.ledger.wait(self._keep_alive)
        if not self._target.ledger.finished:
            self._control.request([])
            self._control.sending()


def _own_memory(
    chunk: Chunk, tensors: Sequence[torch.Tensor], device: Device
) -> torch.Tensor | None:
    memory = in_place(chunk.pieces[0], tensors) if len(chunk.pieces) == 1 else None
    return memory if memory is not None and device.reachable(memory) else None


def _names(target: Target, chunk: Chunk) -> str:
    return ", ".join(_first_few(target.names[piece.tensor] for piece in chunk.pieces))


def _first_few(names: Iterable[str], limit: int = 3) -> list[str]:
    every = list(names)
    more = len(every) - limit
    return every if more <= 0 else [*every[:limit], f"and {more} more"]
