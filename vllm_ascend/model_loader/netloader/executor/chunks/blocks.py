"""Blocks: the bytes of all tensors, cut and numbered in the same way on every instance.

Tensor by tensor, in manifest order, every `BLOCK_BYTES` make a block; a tensor's last block is
shorter, and a tensor without bytes has one block without bytes. Nothing of this depends on how
the bytes travel.
"""

import itertools
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

BLOCK_BYTES = 1 << 20

# A tensor is large from this part of a chunk on.
_LARGE = 8
# Tensors of a run: as many buffers as one system call takes.
_MOST_TENSORS = 1024


class Run(NamedTuple):
    """Consecutive blocks, which travel as one chunk.

    Attributes:
        first: number of the first block.
        last: number of the last block.
    """

    first: int
    last: int

    def __str__(self) -> str:
        return f"{self.first}-{self.last}"


class Span(NamedTuple):
    """A run of one tensor's bytes.

    Attributes:
        tensor: index of the tensor.
        offset: first byte, counted in the tensor's row-major order; a multiple of `BLOCK_BYTES`.
        nbytes: number of bytes.
    """

    tensor: int
    offset: int
    nbytes: int


def count_of(sizes: Iterable[int]) -> int:
    """Return how many blocks tensors of these sizes in bytes have."""
    return sum(max(1, -(-size // BLOCK_BYTES)) for size in sizes)


class Blocks:
    """The blocks of tensors of known sizes.

    Args:
        sizes: size of each tensor in bytes, in manifest order.

    Attributes:
        sizes: as given.
        firsts: number of each tensor's first block, and of the one after all of them.
        count: number of blocks.
        nbytes: number of bytes of all of them.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = tuple(sizes)
        self.firsts = [0]
        # Bytes before each block, and before the one after all of them.
        self._positions: list[int] = []
        start = 0
        for size in self.sizes:
            if size <= BLOCK_BYTES:
                self._positions.append(start)
            else:
                self._positions += range(start, start + size, BLOCK_BYTES)
            start += size
            self.firsts.append(len(self._positions))
        self._positions.append(start)
        self.count = self.firsts[-1]
        self.nbytes = start

    def contains(self, run: Run) -> bool:
        """Return whether there are such blocks."""
        return 0 <= run.first <= run.last < self.count

    def size_of(self, run: Run) -> int:
        """Return the number of bytes of a run."""
        return self._positions[run.last + 1] - self._positions[run.first]

    def blocks_of(self, tensor: int) -> Run:
        """Return the blocks of a tensor."""
        return Run(self.firsts[tensor], self.firsts[tensor + 1] - 1)

    def tensor_of(self, block: int) -> int:
        """Return the index of the tensor that a block belongs to."""
        return bisect_right(self.firsts, block) - 1

    def spans(self, run: Run) -> list[Span]:
        """Return a run's bytes as one span for each of its tensors, those without bytes too."""
        tensor = self.tensor_of(run.first)
        offset = (run.first - self.firsts[tensor]) * BLOCK_BYTES
        if run.last < self.firsts[tensor + 1]:
            return [Span(tensor, offset, self.size_of(run))]
        last = self.tensor_of(run.last)
        whole = [Span(at, 0, size) for at, size in enumerate(self.sizes[tensor:last], tensor)]
        whole[0] = Span(tensor, offset, self.sizes[tensor] - offset)
        end = self._positions[run.last + 1] - self._start_of(last)
        return [*whole, Span(last, 0, end)]

    def whole(self, run: Run) -> range | None:
        """Return the tensors that a run has, if it has all of each; None: it has parts."""
        first, last = self.tensor_of(run.first), self.tensor_of(run.last)
        if run.first == self.firsts[first] and run.last + 1 == self.firsts[last + 1]:
            return range(first, last + 1)
        return None

    def split(self, run: Run, max_bytes: int) -> list[Run]:
        """Split a run into such as are no larger than `max_bytes`, or else one block."""
        if self.size_of(run) <= max_bytes:
            return [run]
        return list(self._parts(run.first, run.last + 1, max_bytes))

    def cut(self, chunk_bytes: int, *, large_alone: bool = False) -> list[Run]:
        """Cut all blocks into runs, which are no larger than a chunk, or else one block.

        Args:
            chunk_bytes: bytes of a chunk.
            large_alone: whether a run that has blocks of a large tensor has no others, so that a
                message can be sent from and received into the tensor's own memory.
        """
        ends = [0, self.count]
        if large_alone:
            least = -(-chunk_bytes // _LARGE)
            large = [tensor for tensor, size in enumerate(self.sizes) if size >= least]
            ends[1:1] = [end for one in large for end in self.firsts[one : one + 2]]
        between = itertools.pairwise(ends)
        return [run for first, end in between for run in self._parts(first, end, chunk_bytes)]

    def _parts(self, first: int, end: int, max_bytes: int) -> Iterator[Run]:
        while first < end:
            most = self.tensor_of(first) + _MOST_TENSORS
            last = self.firsts[most] if most < len(self.sizes) else end
            limit = self._positions[first] + max_bytes
            after = bisect_right(self._positions, limit, first + 1, min(last, end) + 1) - 1
            after = max(after, first + 1)
            yield Run(first, after - 1)
            first = after

    def _start_of(self, tensor: int) -> int:
        return self._positions[self.firsts[tensor]]
