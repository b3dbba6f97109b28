"""What a rank needs of a checkpoint, found in what the ranks of a source have of it.

Pure: equal records give equal plans.
"""

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from .boxes import Box, without
from .records import Copy, Records, Seen, chain_of, dtype_of


@dataclass(frozen=True)
class Place:
    """Elements in the memory of a parameter.

    Attributes:
        parameter: the parameter's name.
        offset: the first element, counted from the parameter's first one.
        stride: steps in memory, for each dimension.
        through: see `Copy`, with the dtype of the checkpoint tensor where that is empty.
    """

    parameter: str
    offset: int
    stride: tuple[int, ...]
    through: tuple[str, ...]


@dataclass(frozen=True)
class Part:
    """Elements that travel.

    Attributes:
        rank: the source's rank that has them.
        size: number of elements, for each dimension.
        there: where they are at the source.
        here: where they go.
    """

    rank: int
    size: tuple[int, ...]
    there: Place
    here: Place


@dataclass(frozen=True)
class Missing:
    """A box that no rank of a source can give.

    Attributes:
        name: the checkpoint tensor.
        box: the box of it.
        why: what is wrong.
    """

    name: str
    box: Box
    why: str

    def __str__(self) -> str:
        start, size = self.box
        ends = [f"{a}:{a + n}" for a, n in zip(start, size, strict=True)]
        return f"{self.name}[{', '.join(ends)}]: {self.why}"


class _Offers:
    """What the ranks of a source have of one checkpoint tensor, found by where it is."""

    def __init__(self, copies: Sequence[tuple[int, Seen, Copy]]) -> None:
        axes = range(len(copies[0][2].start)) or [0]
        # Experts and interleaved columns are thousands of copies; they differ along one axis.
        self.axis = max(
            axes, key=lambda axis: len({c.start[axis : axis + 1] for _, _, c in copies})
        )
        self.copies = sorted(copies, key=lambda copy: self._low(copy[2]))
        self.lows = [self._low(copy) for _, _, copy in self.copies]
        self.longest = max(self._length(copy) for _, _, copy in self.copies)

    def _low(self, one: Copy) -> int:
        return one.start[self.axis] if one.start else 0

    def _length(self, one: Copy) -> int:
        return one.size[self.axis] if one.size else 1

    def near(self, need: Copy) -> list[tuple[int, Seen, Copy]]:
        low = self._low(need)
        first = bisect_right(self.lows, low - self.longest)
        return self.copies[first : bisect_left(self.lows, low + self._length(need))]


def plan(needs: Records, ranks: Sequence[Records], prefer: int) -> tuple[list[Part], list[Missing]]:
    """Find what a rank needs in what the ranks of a source have.

    Args:
        needs: the records of a load that was only pretended here.
        ranks: the records of the source's ranks, by their numbers.
        prefer: the rank to take from what several have.

    Returns:
        The parts, which fill every box that is needed once, and what no rank can give.
    """
    found: dict[str, list[tuple[int, Seen, Copy]]] = defaultdict(list)
    for rank, records in enumerate(ranks):
        for seen in records.tensors:
            found[seen.name] += [(rank, seen, copy) for copy in seen.copies]
    offers = {name: _Offers(copies) for name, copies in found.items() if copies}
    there = [[parameter.name for parameter in records.parameters] for records in ranks]
    here = [parameter.name for parameter in needs.parameters]
    parts: list[Part] = []
    missing: list[Missing] = []
    for seen in needs.tensors:
        for need in seen.copies:
            left, why = [need.box], "no rank of the source has it"
            near = offers[seen.name].near(need) if seen.name in offers else []
            for rank, offered, copy in sorted(near, key=lambda one: (one[0] != prefer, one[0])):
                if (offered.dtype, offered.shape) != (seen.dtype, seen.shape):
                    why = f"{offered.dtype} {offered.shape} there, {seen.dtype} {seen.shape} here"
                    continue
                if not gives(chain_of(copy, offered), chain_of(need, seen)):
                    why = f"{chain_of(copy, offered)} there, {chain_of(need, seen)} here"
                    continue
                for box in left:
                    if (common := box.meet(copy.box)) is not None:
                        parts.append(
                            Part(
                                rank,
                                common.size,
                                _place(there[rank], copy, offered, common),
                                _place(here, need, seen, common),
                            )
                        )
                left = without(left, copy.box)
                if not left:
                    break
            missing += [Missing(seen.name, box, why) for box in left]
    return parts, missing


def _place(names: list[str], copy: Copy, seen: Seen, box: Box) -> Place:
    return Place(names[copy.parameter], copy.at(box.start), copy.stride, chain_of(copy, seen))


def gives(there: tuple[str, ...], here: tuple[str, ...]) -> bool:
    """Return whether elements that went through some dtypes can stand for what others would be.

    They can if nothing was lost on the way there, but for which of the values that are no number a
    value that is no number is, or if both went the same way and one step lost something: what has
    been rounded once is rounded to itself, which is not so for two roundings.
    """
    losses = sum(not keeps(dtype_of(a), dtype_of(b)) for a, b in pairwise(there))
    return losses == 0 or (there == here and losses == 1)


def shortest(chain: Sequence[torch.dtype]) -> list[torch.dtype]:
    """Return the fewest dtypes that give what casting from one to the next gives."""
    steps = [chain[0]]
    for dtype in chain[1:]:
        if len(steps) > 1 and keeps(steps[-2], steps[-1]):
            steps.pop()
        if dtype != steps[-1]:
            steps.append(dtype)
    return steps


def keeps(narrow: torch.dtype, wide: torch.dtype) -> bool:
    """Return whether a dtype has every number that another one has."""
    if narrow == wide:
        return True
    if not narrow.is_floating_point or not wide.is_floating_point:
        return False
    a, b = torch.finfo(narrow), torch.finfo(wide)
    return (
        narrow.itemsize < wide.itemsize
        and a.eps >= b.eps
        and a.max <= b.max
        and a.smallest_normal * a.eps >= b.smallest_normal * b.eps
    )
