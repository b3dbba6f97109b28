"""What a source offers of a checkpoint: its records, and elements of the parameters they name."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple, Protocol

import msgspec
import numpy as np
import torch

from ...errors import ProtocolError, Withdrawn
from ...utils import Buffer
from ..memory import INTEGER, bytes_of, host_memory, host_view
from .boxes import last_of, reach
from .records import Parameter, Records, encode, parameter_of


class Region(Protocol):
    """Elements of a parameter; see `interaction.api.Region`."""

    @property
    def parameter(self) -> int:
        """Number of the parameter in `Records.parameters`."""

    @property
    def offset(self) -> int:
        """The first element, counted from the parameter's first one."""

    @property
    def size(self) -> Sequence[int]:
        """Number of elements, for each dimension."""

    @property
    def stride(self) -> Sequence[int]:
        """Steps in memory, for each dimension."""


class _Part(NamedTuple):
    """A part of a region, which is a region."""

    parameter: int
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class Viewed:
    """A checkpoint as it is seen through the parameters of one rank.

    Attributes:
        records: what of the checkpoint is where; see `records.encode`.
        parameters: the memory of `Records.parameters`, in this order.
    """

    records: bytes
    parameters: Sequence[torch.Tensor]

    def nbytes_of(self, regions: Sequence[Region]) -> int:
        """Return how many bytes regions have.

        Raises:
            ProtocolError: one is not inside of a parameter; says which.
        """
        return sum(map(self._nbytes_of, regions))

    def pieces(self, regions: Sequence[Region], nbytes: int) -> Iterator[list[Region]]:
        """Cut regions that are inside of their parameters into pieces of so many bytes at most.

        Yields:
            Regions that have the same elements in the same order, some of them of each piece.
        """
        piece: list[Region] = []
        size = 0
        for region in regions:
            itemsize = self.parameters[region.parameter].element_size()
            for part in _cut(region, max(1, nbytes // itemsize)):
                more = prod(part.size) * itemsize
                if piece and size + more > nbytes:
                    yield piece
                    piece, size = [], 0
                piece.append(part)
                size += more
        if piece:
            yield piece

    def gather(
        self, regions: Sequence[Region], into: torch.Tensor, stop: threading.Event | None = None
    ) -> None:
        """Copy the elements of regions, each in row-major order, one after the other.

        Args:
            regions: which elements; none of them is read if one is not inside of its parameter.
            into: uint8 without gaps, of `nbytes_of` these regions.
            stop: once set no further region is copied.

        Raises:
            Withdrawn: `stop` was set.
            ProtocolError: one is not inside of a parameter; says which.
        """
        ends, end = [], 0
        for region in regions:
            end += self._nbytes_of(region)
            ends.append(end)
        at = 0
        for region, end in zip(regions, ends, strict=True):
            if stop is not None and stop.is_set():  # many small regions take seconds
                raise Withdrawn("the weights were withdrawn while regions were copied")
            elements = self._of(region)
            place = into[at:end]
            if place.storage_offset() % elements.element_size():  # not where such elements can be
                place.copy_(bytes_of(elements.contiguous()))
            else:
                place.view(elements.dtype).view(elements.shape).copy_(elements)
            at = end

    def elements(
        self, regions: Sequence[Region], staging: torch.Tensor, stop: threading.Event | None = None
    ) -> list[Buffer]:
        """Return the elements of regions of host memory, each in row-major order.

        Args:
            regions: which elements.
            staging: uint8 without gaps, of `nbytes_of` these regions, for those whose elements do
                not follow each other in their parameter; the others are given as they are there.
            stop: once set no further region is looked at.

        Raises:
            Withdrawn: `stop` was set.
            ProtocolError: one is not inside of a parameter; says which.
        """
        found: list[Buffer] = []
        at = 0
        for region in regions:
            nbytes = self._nbytes_of(region)
            if stop is not None and stop.is_set():  # many small regions take seconds
                raise Withdrawn("the weights were withdrawn while regions were copied")
            elements = self._of(region)
            if _is_dense(region):
                found.append(host_memory(elements.data_ptr(), nbytes))
            else:
                place = staging[at : at + nbytes]
                at += nbytes
                # Not by torch: its threads wait for each other, and each session is a thread.
                np.copyto(
                    place.numpy().view(elements.numpy().dtype).reshape(region.size),
                    elements.numpy(),
                )
                found.append(host_view(place))
        return found

    def _of(self, region: Region) -> torch.Tensor:
        """Return the elements of a region, as integers if there are such."""
        memory = self.parameters[region.parameter].detach()
        first = memory.storage_offset() + region.offset
        elements = memory.as_strided([*region.size], [*region.stride], first)
        return elements.view(INTEGER.get(memory.element_size(), memory.dtype))

    def _nbytes_of(self, region: Region) -> int:
        if not 0 <= region.parameter < len(self.parameters):
            allowed = f"0-{len(self.parameters) - 1}" if self.parameters else "none"
            raise ProtocolError(f"there is no parameter {region.parameter}; allowed: {allowed}")
        memory = self.parameters[region.parameter]
        extent, size, stride = reach(memory.shape, memory.stride()), region.size, region.stride
        inside = (
            len(size) == len(stride)
            and region.offset >= 0
            and min(size, default=1) >= 1
            and min(stride, default=0) >= 0
            and region.offset + last_of(size, stride) < extent
        )
        if not inside:
            raise ProtocolError(
                f"a region of size {[*size]} and stride {[*stride]} at {region.offset} is not "
                f"inside of parameter {region.parameter}, which has {extent} elements"
            )
        return prod(size) * memory.element_size()


def _is_dense(region: Region) -> bool:
    """Return whether the elements follow each other in memory."""
    expected = 1
    for n, step in zip(reversed(region.size), reversed(region.stride), strict=True):
        if n > 1 and step != expected:
            return False
        expected *= n
    return True


def _cut(region: Region, count: int) -> Iterator[Region]:
    """Cut a region into parts of so many elements at most, in order."""
    size, stride = tuple(region.size), tuple(region.stride)
    if prod(size) <= count:
        yield region
        return
    axis = next(axis for axis, n in enumerate(size) if n > 1)
    row = prod(size[axis + 1 :])
    step = max(1, count // row)
    for first in range(0, size[axis], step):
        rows = min(step, size[axis] - first)
        part = (*size[:axis], rows, *size[axis + 1 :])
        offset = region.offset + first * stride[axis]
        yield from _cut(_Part(region.parameter, offset, part, stride), count)


def viewed(records: Records, tensors: Mapping[str, torch.Tensor]) -> Viewed:
    """Offer a checkpoint as it is seen through tensors.

    Args:
        records: how the checkpoint's tensors came into parameters.
        tensors: name -> tensor; a parameter that is none of them, laid out as it was loaded, is
            left out, and so is one with gaps, or that is not made of copies alone.
    """
    numbers: dict[int, int] = {}
    parameters: list[Parameter] = []
    memory: list[torch.Tensor] = []
    why_not = dict(records.computed)
    for number, parameter in enumerate(records.parameters):
        tensor = tensors.get(parameter.name)
        if tensor is None or parameter != parameter_of(parameter.name, tensor):
            why_not.setdefault(parameter.name, "not kept as it was loaded")
        elif not parameter.is_dense:
            why_not.setdefault(parameter.name, "other elements may be between its own")
        if tensor is None or parameter.name in why_not:
            continue
        numbers[number] = len(parameters)
        parameters.append(parameter)
        memory.append(tensor)
    if len(parameters) < len(records.parameters):
        records = _renumbered(records, numbers, tuple(parameters), why_not)
    return Viewed(encode(records), memory)


def _renumbered(
    records: Records,
    numbers: Mapping[int, int],
    parameters: tuple[Parameter, ...],
    computed: dict[str, str],
) -> Records:
    replace = msgspec.structs.replace
    return Records(
        tensors=tuple(
            replace(
                seen,
                copies=tuple(
                    replace(copy, parameter=numbers[copy.parameter])
                    for copy in seen.copies
                    if copy.parameter in numbers
                ),
            )
            for seen in records.tensors
        ),
        parameters=parameters,
        fills=tuple(
            replace(fill, parameter=numbers[fill.parameter])
            for fill in records.fills
            if fill.parameter in numbers
        ),
        computed=computed,
        overwritten=records.overwritten,
    )
