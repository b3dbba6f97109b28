"""Spans of tensors' bytes, in row-major order, read and written in place where memory allows."""

import functools
from collections.abc import Iterator, Sequence
from ctypes import Array, c_ubyte
from typing import TypeAlias

import torch

from ..utils import Buffer
from .chunks.blocks import Span

# Some bytes of a tensor: a contiguous tensor, or a buffer where its memory is the host's.
Part: TypeAlias = torch.Tensor | Buffer
# By the names that manifests have.
DTYPES = {str(one): one for one in vars(torch).values() if isinstance(one, torch.dtype)}
# As which elements of any dtype are copied: every operator knows these.
INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def as_tensor(part: Part) -> torch.Tensor:
    """Return a part as a tensor."""
    if isinstance(part, torch.Tensor):
        return part
    if not len(part):  # no tensor is made of such a buffer
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(part, dtype=torch.uint8)


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


def host_buffer(tensor: torch.Tensor) -> Array[c_ubyte]:
    """Return a contiguous tensor's memory, which is the host's, as a buffer.

    The tensor has to stay while it is used: one that keeps it takes twice as long to make.
    """
    return _array(tensor.nbytes).from_address(tensor.data_ptr())


def host_view(tensor: torch.Tensor) -> Array[c_ubyte]:
    """Return a contiguous tensor's memory, which is the host's, as a buffer that keeps it."""
    memory = host_buffer(tensor)
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
    # Half as long as a slice of all of its bytes takes: messages of a group wait for it.
    size, start = tensor.element_size(), tensor.storage_offset()
    elements = (span.nbytes // size,)
    memory = tensor.detach() if tensor.requires_grad else tensor
    return memory.as_strided(elements, (1,), start + span.offset // size).view(torch.uint8)


def read(span: Span, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return a span's bytes as a contiguous tensor: its own memory if possible, else a copy."""
    view = in_place(span, tensors)
    if view is not None:
        return view
    boxes = list(_boxes(span, tensors[span.tensor]))
    data = torch.empty(
        span.nbytes // boxes[0].itemsize, dtype=boxes[0].dtype, device=boxes[0].device
    )
    for part, box in zip(data.split([box.numel() for box in boxes]), boxes, strict=True):
        part.view(box.shape).copy_(box)
    return data.view(torch.uint8)


def contiguous(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor as it is if it has no gaps, else its bytes in row-major order."""
    return tensor if tensor.is_contiguous() else read(Span(0, 0, tensor.nbytes), [tensor])


def write(span: Span, tensors: Sequence[torch.Tensor], data: torch.Tensor) -> None:
    """Set a span's bytes from `data`, uint8 of shape [span.nbytes]."""
    view = in_place(span, tensors)
    if view is not None:
        bytes_of(view).copy_(data)
        return
    boxes = list(_boxes(span, tensors[span.tensor]))
    # a clone starts at a multiple of any element's size, which a slice of a message may not
    parts = data.clone().view(boxes[0].dtype).split([box.numel() for box in boxes])
    for part, box in zip(parts, boxes, strict=True):
        box.copy_(part.view(box.shape))


def _boxes(span: Span, tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield views of a tensor that have a span's elements, one after the other, and no others.

    Sessions fill different spans of one tensor at the same time. Indexing would do for one of them:
    a device may do it on a copy of the tensor, which loses what others have written meanwhile.
    """
    dtype = INTEGER.get(tensor.element_size())  # which every operator knows
    whole = tensor.detach() if dtype is None else tensor.detach().view(dtype)
    first, size = span.offset // whole.itemsize, span.nbytes // whole.itemsize
    return _within(whole, first, first + size)


def _within(tensor: torch.Tensor, first: int, end: int) -> Iterator[torch.Tensor]:
    """Yield views with the elements from `first` up to `end`, counted in row-major order."""
    if first == 0 and end == tensor.numel():
        yield tensor
        return
    row = tensor[0].numel()
    (top, start), (bottom, rest) = divmod(first, row), divmod(end, row)
    if top == bottom:
        yield from _within(tensor[top], start, rest)
        return
    if start:
        yield from _within(tensor[top], start, row)
        top += 1
    if top < bottom:
        yield tensor[top:bottom]
    if rest:
        yield from _within(tensor[bottom], 0, rest)
