"""Records: which box of which checkpoint tensor is where in the parameters of one rank.

They are what travels, so they hold numbers and names only, and are looked at before they are used.
"""

import functools
import zlib
from collections.abc import Iterator
from math import prod
from typing import Annotated

import msgspec
import torch

from ...errors import ProtocolError
from .boxes import Box, reach, row_major

VERSION = 1

# What a peer's records may take once unpacked: 4 times those of a rank of DeepSeek-V3 at TP=8.
_MOST_BYTES = 40 << 20
_MOST_TENSORS = 400_000
# Tensors, copies and the like of all ranks of an instance together, also 4 times as many.
MOST_ENTRIES = 6_000_000
_MOST_AXES = 16
_MOST_DTYPES = 16  # that elements may go through
# Which tensors of a checkpoint can be made of their elements.
_DTYPES = {
    *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
    *("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
    *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
}


class Copy(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A box of a checkpoint tensor, and where its elements are in the memory of a parameter.

    Attributes:
        start: the box's first index, for each dimension.
        size: number of its elements, for each dimension.
        parameter: number of the parameter in `Records.parameters`.
        offset: where the box's first element is, in elements from the parameter's first one.
        stride: steps in the parameter's memory, for each dimension of the box.
        through: the dtype that the elements were seen as, then those that they were cast to, the
            last one as they are in memory; empty: that of the checkpoint tensor.
    """

    start: tuple[int, ...]
    size: tuple[int, ...]
    parameter: int
    offset: int
    stride: tuple[int, ...]
    through: Annotated[tuple[str, ...], msgspec.Meta(max_length=_MOST_DTYPES)] = ()

    @property
    def box(self) -> Box:
        """The box."""
        return Box(self.start, self.size)

    def at(self, start: tuple[int, ...]) -> int:
        """Return where an element of the box is, in elements from the parameter's first one."""
        steps = zip(start, self.start, self.stride, strict=True)
        return self.offset + sum((here - first) * step for here, first, step in steps)


class Kept(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A box that something was computed from, or that was changed before it was copied.

    Attributes:
        start: the box's first index, for each dimension.
        size: number of its elements, for each dimension.
        values: its bytes in row-major order; None: too many to keep.
    """

    start: tuple[int, ...]
    size: tuple[int, ...]
    values: bytes | None = None

    @property
    def box(self) -> Box:
        """The box."""
        return Box(self.start, self.size)


class Seen(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A checkpoint tensor as one rank has it.

    Attributes:
        name: its name in the checkpoint.
        dtype: as in `bfloat16`.
        shape: its dimensions.
        copies: what the rank's parameters have of it.
        kept: what was kept of it aside.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    copies: tuple[Copy, ...] = ()
    kept: tuple[Kept, ...] = ()


class Parameter(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A parameter that has something of the checkpoint.

    Attributes:
        name: its name in the model, the first one if it has several.
        dtype: as in `bfloat16`.
        shape: its dimensions.
        stride: its steps in memory, for each dimension; 0 where that has one element.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def extent(self) -> int:
        """Number of elements from its first to its last one in memory."""
        return reach(self.shape, self.stride)

    @property
    def is_dense(self) -> bool:
        """Whether its memory from the first to the last element has nothing but its elements."""
        dims = sorted((step, n) for n, step in zip(self.shape, self.stride, strict=True) if n > 1)
        return [step for step, _ in dims] == [*row_major(tuple(n for _, n in dims[::-1]))[::-1]]


class Fill(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Memory of a parameter that loading fills with one number, before what is copied there.

    Attributes:
        parameter: number of the parameter in `Records.parameters`.
        offset: the first element, counted from the parameter's first one.
        size: number of elements, for each dimension.
        stride: steps in memory, for each dimension.
        value: the number.
    """

    parameter: int
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    value: bool | int | float


class Records(msgspec.Struct, frozen=True):
    """How one rank's parameters came from a checkpoint.

    Attributes:
        tensors: the checkpoint tensors that loading looked at, in that order, as the last one that
            is written to a place counts; those without copies and without kept values are in no
            parameter.
        parameters: the parameters that were copied into or filled.
        fills: memory that is filled rather than copied.
        computed: parameter -> why its values cannot be told from copies, such as the operation
            that made them.
        overwritten: whether a tensor was written over another one, so that they would be other
            weights in another order.
    """

    tensors: tuple[Seen, ...]
    parameters: tuple[Parameter, ...]
    fills: tuple[Fill, ...] = ()
    computed: dict[str, str] = {}
    overwritten: bool = False

    @property
    def entries(self) -> int:
        """Number of tensors, copies, kept boxes, parameters, fills and computed parameters."""
        seen = sum(1 + len(seen.copies) + len(seen.kept) for seen in self.tensors)
        return seen + len(self.parameters) + len(self.fills) + len(self.computed)


_NONE, _NO_NAMES = msgspec.Raw(b"\x90"), msgspec.Raw(b"\x80")


class _SeenUnread(msgspec.Struct, array_like=True, gc=False):
    name: msgspec.Raw
    dtype: msgspec.Raw
    shape: msgspec.Raw
    copies: msgspec.Raw = _NONE
    kept: msgspec.Raw = _NONE


class _Unread(msgspec.Struct):
    tensors: Annotated[tuple[_SeenUnread, ...], msgspec.Meta(max_length=_MOST_TENSORS)]
    parameters: msgspec.Raw
    fills: msgspec.Raw = _NONE
    computed: msgspec.Raw = _NO_NAMES


_UNREAD, _RECORDS = msgspec.msgpack.Decoder(_Unread), msgspec.msgpack.Decoder(Records)


def chain_of(copy: Copy, seen: Seen) -> tuple[str, ...]:
    """Return the dtypes that a copy's elements went through, from the first to that in memory."""
    return copy.through or (seen.dtype,)


@functools.lru_cache(maxsize=256)
def dtype_of(name: str) -> torch.dtype:
    """Return the dtype of a name such as `bfloat16`.

    Raises:
        ProtocolError: there is none of that name that a view can have.
    """
    dtype = getattr(torch, name) if name in _DTYPES else None
    if not isinstance(dtype, torch.dtype):
        raise ProtocolError(f"unknown dtype {name!r} (supported: {', '.join(sorted(_DTYPES))})")
    return dtype


@functools.lru_cache(maxsize=1 << 12)
def nbytes_of(shape: tuple[int, ...], dtype: str) -> int:
    """Return how many bytes a tensor has.

    Raises:
        ProtocolError: see `dtype_of`.
    """
    return prod(shape) * dtype_of(dtype).itemsize


def name_of(dtype: torch.dtype) -> str:
    """Return a dtype's name, such as `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def parameter_of(name: str, tensor: torch.Tensor) -> Parameter:
    """Return how records describe a parameter."""
    shape = tuple(tensor.shape)
    stride = tuple(step if n != 1 else 0 for n, step in zip(shape, tensor.stride(), strict=True))
    return Parameter(name, name_of(tensor.dtype), shape, stride)


def encode(records: Records) -> bytes:
    """Return records as they travel."""
    return bytes([VERSION]) + zlib.compress(msgspec.msgpack.encode(records))


def decode(data: bytes, most: int = MOST_ENTRIES) -> Records:
    """Return the records that a peer sent, looked at as `check` does.

    Args:
        data: as they travelled.
        most: entries that they may have.

    Raises:
        ProtocolError: these are no records, or wrong ones; says what is wrong.
    """
    if data[:1] != bytes([VERSION]):
        raise ProtocolError(f"unsupported version {data[:1].hex()} of records (supported: 01)")
    unpack = zlib.decompressobj()
    try:
        plain = unpack.decompress(data[1:], _MOST_BYTES)
        if not unpack.eof:
            raise ProtocolError(f"records of more than {_MOST_BYTES} bytes, or cut short")
        # Counted first: a few bytes unpack to one object each, which takes far more.
        if (entries := _entries(_UNREAD.decode(plain))) > most:
            raise ProtocolError(f"records of {entries} entries; allowed: {most}")
        records = _RECORDS.decode(plain)
    except (zlib.error, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"not records: {error}") from None
    check(records)
    return records


def _entries(records: _Unread) -> int:
    seen = sum(1 + _length(seen.copies) + _length(seen.kept) for seen in records.tensors)
    others = (records.parameters, records.fills, records.computed)
    return seen + sum(map(_length, others))


def _length(whole: msgspec.Raw) -> int:
    """Return how many elements a MessagePack array, or pairs a map, says it has."""
    head = bytes(memoryview(whole)[:5])
    if 0x80 <= head[0] <= 0x9F:
        return head[0] & 0xF
    return int.from_bytes(head[1:3] if head[0] in (0xDC, 0xDE) else head[1:5], "big")


def check(records: Records) -> None:
    """Check that records stay inside of what they talk about.

    Raises:
        ProtocolError: they do not; names the tensor or parameter.
    """
    for problem in _problems(records):
        raise ProtocolError(f"wrong records: {problem}")


def _problems(records: Records) -> Iterator[str]:
    parameters = records.parameters
    widths = [dtype_of(parameter.dtype).itemsize for parameter in parameters]
    for number, parameter in enumerate(parameters):
        shape, stride = parameter.shape, parameter.stride
        same = len(shape) == len(stride) <= _MOST_AXES
        if not same or min((*shape, *stride), default=0) < 0:
            yield f"parameter {number} cannot have the shape {shape[: _MOST_AXES + 1]} so laid out"
            return
    extents = [parameter.extent for parameter in parameters]
    for seen in records.tensors:
        width = dtype_of(seen.dtype).itemsize
        if len(seen.shape) > _MOST_AXES or min(seen.shape, default=0) < 0:
            yield f"{seen.name} cannot have the shape {seen.shape[: _MOST_AXES + 1]}"
        regions: tuple[Copy | Kept, ...] = (*seen.copies, *seen.kept)
        for one in regions:
            # Looked at first: what is cached stays in memory, also of what is refused.
            same = len(one.start) == len(one.size) == len(seen.shape)
            if not same or not _inside(one.start, one.size, seen.shape):
                box = f"{one.start[: _MOST_AXES + 1]} + {one.size[: _MOST_AXES + 1]}"
                yield f"{seen.name} of shape {seen.shape} has no box {box}"
        for kept in seen.kept:
            if kept.values is not None and len(kept.values) != prod(kept.size) * width:
                yield f"{seen.name} has {len(kept.values)} bytes for the box of {kept.size}"
        for copy in seen.copies:
            if not _in_memory(copy, extents):
                yield f"{seen.name} is said to be outside of parameter {copy.parameter}"
                continue
            chain = [dtype_of(name).itemsize for name in copy.through] or [width]
            if (chain[0], chain[-1]) != (width, widths[copy.parameter]):
                yield f"{seen.name} ({seen.dtype}) cannot be in {parameters[copy.parameter]}"
    for fill in records.fills:
        if not _in_memory(fill, extents):
            yield f"a fill outside of parameter {fill.parameter}"


@functools.lru_cache(maxsize=1 << 12)
def _inside(start: tuple[int, ...], size: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    axes = zip(start, size, shape, strict=True)
    return all(first >= 0 and n > 0 and first + n <= whole for first, n, whole in axes)


def _in_memory(region: Copy | Fill, extents: list[int]) -> bool:
    if not 0 <= region.parameter < len(extents):
        return False
    if not len(region.size) == len(region.stride) <= _MOST_AXES:
        return False
    if region.offset < 0 or min(region.size, default=1) < 1 or min(region.stride, default=0) < 0:
        return False
    return region.offset + reach(region.size, region.stride) <= extents[region.parameter]
