"""Boxes of tensors: strided memory cut into boxes, and what two boxes have in common."""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import islice
from math import prod
from typing import NamedTuple, TypeAlias

import torch

# Size, stride on one side, stride on the other: one dimension of elements that are copied.
Dim: TypeAlias = tuple[int, int, int]

# An interleaved tensor takes a box for each of its columns, one scale for many rows one for each.
_MOST_BOXES = 1 << 16
_MOST_REPEATS = 1 << 12


class Unmapped(Exception):
    """Elements cannot be told as boxes of a checkpoint tensor; the message says which."""


class Box(NamedTuple):
    """A box of a tensor.

    Attributes:
        start: index of its first element, for each dimension.
        size: number of elements, for each dimension.
    """

    start: tuple[int, ...]
    size: tuple[int, ...]

    def meet(self, other: "Box") -> "Box | None":
        """Return the box that two boxes have in common."""
        start = tuple(map(max, self.start, other.start))
        ends = zip(*self, *other, strict=True)
        size = tuple(min(a + n, b + m) - at for at, (a, n, b, m) in zip(start, ends, strict=True))
        return Box(start, size) if all(n > 0 for n in size) else None

    def minus(self, hole: "Box") -> list["Box"]:
        """Return what is left of this box without a box inside of it."""
        left = []
        start, size = list(self.start), list(self.size)
        for axis, (first, count) in enumerate(zip(*hole, strict=True)):
            for low, high in (
                (start[axis], first),
                (first + count, start[axis] + size[axis]),
            ):
                if low < high:
                    before, after = slice(None, axis), slice(axis + 1, None)
                    left.append(
                        Box(
                            (*start[before], low, *start[after]),
                            (*size[before], high - low, *size[after]),
                        )
                    )
            start[axis], size[axis] = first, count
        return left


class Piece(NamedTuple):
    """A box, and where its elements are on the other side.

    Attributes:
        box: the box.
        offset: where the box's first element is on the other side.
        stride: steps there, for each dimension of the box.
    """

    box: Box
    offset: int
    stride: tuple[int, ...]


# A model's layers and experts are alike: these are asked for the same few things again and again.
@lru_cache(maxsize=1 << 12)
def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of row-major order without gaps."""
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= n
    return tuple(reversed(strides))


def last_of(size: Sequence[int], stride: Sequence[int]) -> int:
    """Return how far the last element of a strided region is from the first one."""
    return sum((n - 1) * step for n, step in zip(size, stride, strict=True))


@lru_cache(maxsize=1 << 12)
def reach(size: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Return how many elements of memory a strided region takes, with those between."""
    return 0 if 0 in size else 1 + last_of(size, stride)


def boxes(shape: Sequence[int], offset: int, dims: Iterable[Dim]) -> list[Piece]:
    """Cut a strided region of a tensor into boxes.

    Args:
        shape: the tensor's shape; its elements are counted in row-major order.
        offset: number of the region's first element.
        dims: the region; strides on the first side count elements of the tensor.

    Raises:
        Unmapped: the region goes beyond the tensor, or takes too many boxes.
    """
    whole, dims = tuple(shape), tuple(dims)
    if (piece := _one_box(whole, offset, dims)) is not None:
        return [piece]
    wanted = [dim for dim in dims if dim[0] != 1]
    if any(n == 0 for n, _, _ in wanted):
        return []
    if not 0 <= offset <= prod(whole) - 1 - sum((n - 1) * a for n, a, _ in wanted):
        raise Unmapped(f"elements beyond the shape {whole}")
    if prod(n for n, a, _ in wanted if a == 0) > _MOST_REPEATS:
        raise Unmapped(f"more than {_MOST_REPEATS} copies of one element")
    found = list(islice(_cut(whole, row_major(whole), offset, wanted, 0), _MOST_BOXES + 1))
    if len(found) > _MOST_BOXES:
        raise Unmapped(f"more than {_MOST_BOXES} boxes of the shape {whole}")
    return found


@lru_cache(maxsize=1 << 12)
def _one_box(shape: tuple[int, ...], offset: int, dims: tuple[Dim, ...]) -> Piece | None:
    """Return a region as one box if it has the tensor's own dimensions, as nearly all have."""
    if len(dims) != len(shape) or 0 in shape:
        return None
    start, rest = [], offset
    for (n, a, _), whole, step in zip(dims, shape, row_major(shape), strict=True):
        first, rest = divmod(rest, step)
        if (n != 1 and a != step) or first < 0 or not 0 < n <= whole - first:
            return None
        start.append(first)
    if rest:
        return None
    size, stride = (tuple(n for n, _, _ in dims), tuple(b if n != 1 else 0 for n, _, b in dims))
    return Piece(Box(tuple(start), size), 0, stride)


def _cut(
    shape: tuple[int, ...], strides: tuple[int, ...], offset: int, dims: list[Dim], at: int
) -> Iterable[Piece]:
    start = tuple(offset // step % n for step, n in zip(strides, shape, strict=True))
    taken: dict[int, tuple[int, int]] = {}
    rest = _joined(dims)
    while rest:
        n, a, b = rest.pop(0)
        axis = next((i for i, step in enumerate(strides) if step <= a and shape[i] > 1), -1)
        span = strides[axis] * shape[axis] if axis >= 0 else 0
        room = -(-(span - offset % span) // a) if span else n  # steps before the axis ends
        if n <= room and span and a == strides[axis] and axis not in taken:
            taken[axis] = n, b
            continue
        aligned = n > room and offset % span < a and span % a == 0
        if aligned and n % room == 0:
            rest[:0] = [(n // room, room * a, room * b), (room, a, b)]
            continue
        if n > room:  # as far as whole ones go, or to the end of the axis; then the others
            first = n // room * room if aligned else room
            parts = [(0, first), (first, n - first)]
        else:
            parts = [(i, 1) for i in range(n)]
        others = [*rest, *((m, strides[i], q) for i, (m, q) in taken.items())]
        for i, count in parts:
            more = [(count, a, b), *others]
            yield from _cut(shape, strides, offset + i * a, more, at + i * b)
        return
    size, stride = ([taken.get(i, (1, 0))[side] for i in range(len(shape))] for side in (0, 1))
    yield Piece(Box(start, tuple(size)), at, tuple(stride))


def _joined(dims: Iterable[Dim]) -> list[Dim]:
    """Join dimensions that follow each other without a gap on both sides; widest step first."""
    joined: list[Dim] = []
    for n, a, b in sorted((dim for dim in dims if dim[0] != 1), key=lambda dim: (-dim[1], -dim[2])):
        if joined and joined[-1][1:] == (n * a, n * b):
            joined[-1] = (joined[-1][0] * n, a, b)
        else:
            joined.append((n, a, b))
    return joined


def gaps(shape: Sequence[int], covered: Iterable[Box]) -> list[Box]:
    """Return what is left of a tensor without some boxes of it."""
    left = [Box((0,) * len(shape), tuple(shape))]
    for box in covered:
        left = without(left, box)
    return left


def without(parts: Iterable[Box], box: Box) -> list[Box]:
    """Return what is left of boxes without another one."""
    left = []
    for part in parts:
        common = part.meet(box)
        left += [part] if common is None else part.minus(common)
    return left


def box_of(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    """Return a box of a tensor as a view."""
    return tensor[tuple(slice(start, start + n) for start, n in zip(*box, strict=True))]
