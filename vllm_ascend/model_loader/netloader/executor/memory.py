"""Spans of tensors' bytes, in row-major order, read and written in place where memory allows."""

import functools
from collections.abc import Sequence
from ctypes import Array, c_ubyte

import torch

from .chunks.blocks import Span

_INDEXABLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return a contiguous tensor's memory as uint8 of shape [nbytes]."""
    # view(-1) keeps the stride of a single element, which another dtype's view does not take
    return tensor.detach().as_strided((tensor.numel(),), (1,)).view(torch.uint8)


# Small tensors come in few sizes, and making a type costs more than all that is done with it.
@functools.lru_cache(maxsize=4096)
def _array(nbytes: int) -> type[Array[c_ubyte]]:
    return c_ubyte * nbytes


def host_memory(address: int, nbytes: int) -> Array[c_ubyte]:
    """Return memory of the host as a buffer; it has to stay while the buffer is used."""
    return _array(nbytes).from_address(address)


def host_view(tensor: torch.Tensor) -> Array[c_ubyte]:
    """Return a contiguous tensor's memory, which is the host's, as a buffer that keeps it."""
    memory = host_memory(tensor.data_ptr(), tensor.nbytes)
    memory.tensor = tensor  # type: ignore[attr-defined]
    return memory


def in_place(span: Span, tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Return a span as its tensor's own memory, or None where the tensor is not contiguous.

    A model can have a hundred thousand small tensors, and every view of one costs microseconds: a
    span that is all of a tensor is the tensor as it is.

    Args:
        span: which bytes.
        tensors: any dtype, shape and strides.

    Returns:
        A contiguous tensor of `span.nbytes` bytes, uint8 if it is a part of its tensor.
    """
    tensor = tensors[span.tensor]
    if not tensor.is_contiguous():
        return None
    if span.nbytes == tensor.nbytes:
        return tensor
    return bytes_of(tensor)[span.offset : span.offset + span.nbytes]


def read(span: Span, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return a span's bytes as a contiguous tensor: its own memory if possible, else a copy."""
    view = in_place(span, tensors)
    if view is not None:
        return view
    tensor = _indexable(tensors[span.tensor])
    return tensor[_elements(span, tensor)].view(torch.uint8)


def contiguous(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor as it is if it has no gaps, else its bytes in row-major order."""
    return tensor if tensor.is_contiguous() else read(Span(0, 0, tensor.nbytes), [tensor])


def write(span: Span, tensors: Sequence[torch.Tensor], data: torch.Tensor) -> None:
    """Set a span's bytes from `data`, uint8 of shape [span.nbytes]."""
    view = in_place(span, tensors)
    if view is not None:
        bytes_of(view).copy_(data)
        return
    tensor = _indexable(tensors[span.tensor])
    # a clone starts at a multiple of any element's size, which a slice of a message may not
    tensor[_elements(span, tensor)] = data.clone().view(tensor.dtype)


def _indexable(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's memory as a dtype of its size that indexing knows, which not all are."""
    dtype = _INDEXABLE.get(tensor.element_size())
    return tensor.detach() if dtype is None else tensor.detach().view(dtype)


def _elements(span: Span, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    size = tensor.element_size()
    positions = torch.arange(
        span.offset // size, (span.offset + span.nbytes) // size, device=tensor.device
    )
    return torch.unravel_index(positions, tensor.shape)
