"""The chunk plan: a manifest's bytes cut into chunks.

It is a pure function of the tensors' sizes and the chunk size, so both sides make the same one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgspec

# A tensor from this part of a chunk on travels in chunks of its own: copying it into a packed
# chunk would cost more than the message that it saves.
_OWN_CHUNK = 8
# Cuts fall on multiples of the largest element (complex128), so that no element is torn.
_ALIGN = 16


class Piece(msgspec.Struct, frozen=True, gc=False):
    """A run of one tensor's bytes.

    Attributes:
        tensor: index of the tensor.
        offset: first byte, counted in the tensor's row-major order.
        nbytes: number of bytes, at least 1.
    """

    tensor: int
    offset: int
    nbytes: int


class Chunk(NamedTuple):
    """The unit of transfer, verification and retry: pieces that travel in one message.

    Attributes:
        pieces: one piece of a tensor, or several whole tensors; their bytes follow each other in
            the message.
        nbytes: number of bytes of all of them.
    """

    pieces: tuple[Piece, ...]
    nbytes: int


@dataclass(frozen=True)
class Plan:
    """All chunks of a model.

    Attributes:
        chunk_bytes: the size no chunk exceeds.
        chunks: the chunks; a position in here is a chunk's number on the wire.
        nbytes: number of bytes of all chunks.
    """

    chunk_bytes: int
    chunks: tuple[Chunk, ...]
    nbytes: int


def make_plan(sizes: Sequence[int], chunk_bytes: int) -> Plan:
    """Cut tensors into chunks: large ones are cut, small ones are packed together in order.

    Args:
        sizes: size of each tensor in bytes.
        chunk_bytes: largest size of a chunk, at least 16.

    Returns:
        A plan that has every byte of every tensor exactly once.

    Raises:
        ValueError: `chunk_bytes` is too small.
    """
    if chunk_bytes < _ALIGN:
        raise ValueError(f"chunk_bytes is {chunk_bytes}; allowed: {_ALIGN} and more")
    chunks: list[Chunk] = []
    packed: list[Piece] = []
    packed_bytes = 0

    def flush() -> None:
        nonlocal packed, packed_bytes
        if packed:
            chunks.append(Chunk(tuple(packed), packed_bytes))
            packed, packed_bytes = [], 0

    for tensor, size in enumerate(sizes):
        if size * _OWN_CHUNK >= chunk_bytes:
            parts = -(-size // (chunk_bytes // _ALIGN * _ALIGN))
            step = -(-size // (parts * _ALIGN)) * _ALIGN
            for offset in range(0, size, step):
                piece = Piece(tensor, offset, min(step, size - offset))
                chunks.append(Chunk((piece,), piece.nbytes))
        elif size:
            if packed_bytes + size > chunk_bytes:
                flush()
            packed.append(Piece(tensor, 0, size))
            packed_bytes += size
    flush()
    return Plan(chunk_bytes, tuple(chunks), sum(sizes))
