"""Blocks: the bytes of all tensors, cut and numbered in the same way on every instance.

Tensor by tensor, in manifest order, every `BLOCK_BYTES` make a block; a tensor's last block is
shorter, and a tensor without bytes has one block without bytes. Nothing of this depends on how
the bytes travel.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple

BLOCK_BYTES = 1 << 20

# A tensor from this part of a chunk on shares no chunk with others, so that a message can be sent
# from and received into its own memory.
_OWN_CHUNK = 8
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
        parts = []
        first, end = run.first, run.last + 1
        while first < end:
            limit = self._positions[first] + max_bytes
            after = max(bisect_right(self._positions, limit, first + 1, end + 1) - 1, first + 1)
            parts.append(Run(first, after - 1))
            first = after
        return parts

    def cut(self, chunk_bytes: int) -> list[Run]:
        """Cut all blocks into runs to ask for: no larger than a chunk, or else one block.

        A run has blocks of one large tensor, or of several small ones.

        Args:
            chunk_bytes: bytes of a chunk.
        """
        return list(self._cut(chunk_bytes))

    def _cut(self, chunk_bytes: int) -> Iterator[Run]:
        step, firsts = max(1, chunk_bytes // BLOCK_BYTES), self.firsts
        least = -(-chunk_bytes // _OWN_CHUNK)
        large = [tensor for tensor, size in enumerate(self.sizes) if size >= least]
        small = 0
        for tensor in [*large, len(self.sizes)]:
            while small < tensor:
                full, most = self._start_of(small) + chunk_bytes, min(tensor, small + _MOST_TENSORS)
                between = range(small + 1, most + 1)
                after = small + bisect_right(between, full, key=self._start_of)
                yield Run(firsts[small], firsts[after] - 1)
                small = after
            if tensor < len(self.sizes):
                after = firsts[tensor + 1]
                for block in range(firsts[tensor], after, step):
                    yield Run(block, min(block + step, after) - 1)
                small = tensor + 1

    def _start_of(self, tensor: int) -> int:
        return self._positions[self.firsts[tensor]]
