"""Runs of a tensor's bytes, in row-major order, read and written in place where memory allows."""

from collections.abc import Sequence

import torch

from .devices import Device
from .plan import Chunk, Piece

_INDEXABLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def size_of(tensor: torch.Tensor) -> int:
    """Return the number of bytes of a tensor's elements."""
    return tensor.nbytes


def in_place(piece: Piece, tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Return a piece as its tensor's own memory.

    Args:
        piece: which bytes.
        tensors: the plan's tensors, any dtype, shape and strides.

    Returns:
        A uint8 view of shape [piece.nbytes], or None where the tensor is not contiguous.
    """
    tensor = tensors[piece.tensor]
    if not tensor.is_contiguous():
        return None
    return bytes_of(tensor)[piece.offset : piece.offset + piece.nbytes]


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return a contiguous tensor's memory as uint8 of shape [nbytes]."""
    # view(-1) keeps the stride of a single element, which another dtype's view does not take
    return tensor.detach().as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def read(piece: Piece, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return a piece's bytes, uint8 of shape [piece.nbytes]: a view if possible, else a copy."""
    view = in_place(piece, tensors)
    if view is not None:
        return view
    tensor = _indexable(tensors[piece.tensor])
    return tensor[_elements(piece, tensor)].view(torch.uint8)


def write(piece: Piece, tensors: Sequence[torch.Tensor], data: torch.Tensor) -> None:
    """Set a piece's bytes from `data`, uint8 of shape [piece.nbytes]."""
    view = in_place(piece, tensors)
    if view is not None:
        view.copy_(data)
        return
    tensor = _indexable(tensors[piece.tensor])
    # a clone starts at a multiple of any element's size, which a slice of a message may not
    tensor[_elements(piece, tensor)] = data.clone().view(tensor.dtype)


def pack(
    chunk: Chunk, tensors: Sequence[torch.Tensor], staging: torch.Tensor, device: Device
) -> torch.Tensor:
    """Gather a chunk's pieces into a message.

    Args:
        chunk: which bytes.
        tensors: the plan's tensors.
        staging: uint8 memory of at least `chunk.nbytes`.
        device: where all of it is.

    Returns:
        The message: the first `chunk.nbytes` of `staging`.
    """
    message = staging[: chunk.nbytes]
    device.pack(contiguous_parts(chunk, tensors), message)
    return message


def unpack(
    chunk: Chunk, tensors: Sequence[torch.Tensor], message: torch.Tensor, device: Device
) -> None:
    """Scatter a message of `chunk.nbytes` into the chunk's pieces."""
    parts = _whole_tensors(chunk, tensors)
    if parts is not None:
        device.unpack(message, parts)
        return
    sizes = [piece.nbytes for piece in chunk.pieces]
    for piece, data in zip(chunk.pieces, message.split(sizes), strict=True):
        write(piece, tensors, data)


def piece_hashes(
    chunk: Chunk, tensors: Sequence[torch.Tensor], device: Device
) -> tuple[bytes, ...]:
    """Hash each piece of a chunk as it stands in the tensors' memory."""
    return device.hashes(contiguous_parts(chunk, tensors))


def contiguous_parts(chunk: Chunk, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return a contiguous tensor of each piece's bytes: its own memory if possible, or a copy."""
    parts = _whole_tensors(chunk, tensors)
    return [read(piece, tensors) for piece in chunk.pieces] if parts is None else parts


def _whole_tensors(chunk: Chunk, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor] | None:
    """Return the tensors of a packed chunk without a look at each piece, if all are contiguous.

    A model can have a hundred thousand small tensors, and every view of one costs microseconds.
    """
    if len(chunk.pieces) == 1:
        return None  # may be a part of a tensor
    parts = [tensors[piece.tensor] for piece in chunk.pieces]
    return parts if all(map(torch.Tensor.is_contiguous, parts)) else None


def _indexable(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's memory as a dtype of its size that indexing knows, which not all are."""
    dtype = _INDEXABLE.get(tensor.element_size())
    return tensor.detach() if dtype is None else tensor.detach().view(dtype)


def _elements(piece: Piece, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    size = tensor.element_size()
    positions = torch.arange(
        piece.offset // size, (piece.offset + piece.nbytes) // size, device=tensor.device
    )
    return torch.unravel_index(positions, tensor.shape)
