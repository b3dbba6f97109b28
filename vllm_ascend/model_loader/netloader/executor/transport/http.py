"""HTTP: runs of blocks as bodies of answers, from and into host memory.

Where the tensors are in host memory, the source gathers from them and the client reads into them.
Elsewhere a run passes through a buffer of host memory at either end.
"""

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Protocol

import torch

from ...utils import Buffer
from ..chunks.blocks import Run
from ..devices import Accelerator
from ..memory import host_buffer, host_view, in_place, write
from ..store import BlockStore
from .messages import from_host, to_host

# Bytes that are checked at once when they have come: the processor still has them in its cache.
_PIECE = 4 << 20


class Blocks(Protocol):
    """The way to get blocks from a source; see `interaction.elastic.ElasticClient`."""

    def ask_blocks(self, weights: str, first: int, last: int) -> None:
        """Ask for a run."""

    def receive_blocks(self, nbytes: int, into: Iterable[Sequence[Buffer]]) -> None:
        """Read the run that was asked for into buffers, piece by piece."""


class HostStaging:
    """One buffer of host memory, for what is elsewhere or in pieces, one after the other."""

    def __init__(self) -> None:
        self._buffer: torch.Tensor | None = None

    def take(self, nbytes: int, accelerator: Accelerator | None) -> torch.Tensor:
        """Return so many bytes of it, uint8, which the accelerator copies from and to fast."""
        if self._buffer is None or self._buffer.numel() < nbytes:
            if accelerator is None:
                self._buffer = torch.empty(nbytes, dtype=torch.uint8)
            else:
                self._buffer = accelerator.empty_host(nbytes)
        return self._buffer[:nbytes]


class HttpSender:
    """See `elastic_load.Sender`.

    Args:
        store: the weights.
        write: sends buffers, one after the other.
    """

    def __init__(self, store: BlockStore, write: Callable[[Sequence[Buffer]], object]) -> None:
        self._store = store
        self._write = write
        self._staging = HostStaging()
        self._parts: Sequence[torch.Tensor] = ()

    def send(self, run: Run) -> None:
        """Send a run, whose memory stays until the next one is sent."""
        store = self._store
        if (accelerator := store.device.accelerator) is None:
            self._parts = store.parts(run)
        else:
            host = self._staging.take(store.blocks.size_of(run), accelerator)
            to_host(run, store, host, accelerator)
            self._parts = [host]
        self._write([host_buffer(part) for part in self._parts])


class HttpReceiver:
    """See `elastic_load.Receiver`.

    Two requests are under way, so that the source has the next one when it is done with one, while
    the client still reads or checks.

    Args:
        source: where the blocks come from.
        store: what is filled.
        verify: whether blocks in host memory are checked as they come.
    """

    batch = 1
    ahead = 2
    max_bytes = sys.maxsize

    def __init__(self, source: Blocks, store: BlockStore, *, verify: bool) -> None:
        self._verify = verify
        self._source = source
        self._store = store
        self._asked: deque[Run] = deque()
        self._staging = HostStaging()

    def request(self, runs: Sequence[Run]) -> None:
        """Ask for a run; a connection with nothing to fetch may end meanwhile."""
        for run in runs:
            self._asked.append(run)
            self._source.ask_blocks(self._store.digests.weights, run.first, run.last)

    def receive(self) -> Callable[[], list[int]]:
        """Read the run into the tensors, or into memory of its own where they are elsewhere."""
        run, store = self._asked.popleft(), self._store
        nbytes = store.blocks.size_of(run)
        if (accelerator := store.device.accelerator) is not None:
            host = self._staging.take(nbytes, accelerator)
            self._source.receive_blocks(nbytes, [[host_view(host)]])
            from_host(run, store, host, accelerator)
            return partial(store.wrong, run)
        wrong: list[int] = []
        self._source.receive_blocks(nbytes, self._in_place(run, wrong))
        return (lambda: wrong) if self._verify else partial(store.wrong, run)

    def _in_place(self, run: Run, wrong: list[int]) -> Iterator[Sequence[Buffer]]:
        for piece in self._store.blocks.split(run, _PIECE):
            memory = self._store.memory(piece)
            if memory is not None:
                yield memory
            else:
                yield from self._beside(piece)
            if self._verify:
                wrong += self._store.wrong(piece, memory)

    def _beside(self, run: Run) -> Iterator[Sequence[Buffer]]:
        """Receive into memory of its own what goes to tensors with gaps."""
        tensors, spans = self._store.tensors, self._store.blocks.spans(run)
        places = [in_place(span, tensors) for span in spans]
        buffers = [
            torch.empty(span.nbytes, dtype=torch.uint8) if place is None else place
            for span, place in zip(spans, places, strict=True)
        ]
        yield [host_view(buffer) for buffer in buffers]
        for span, place, buffer in zip(spans, places, buffers, strict=True):
            if place is None:
                write(span, tensors, buffer)
