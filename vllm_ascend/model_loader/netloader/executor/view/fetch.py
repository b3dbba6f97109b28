"""What of a checkpoint a rank fetches from the ranks of a source, and in which requests.

Pure: equal records give equal requests. A checkpoint tensor is made anew of the boxes that loading
reads, and of nothing else. Each box is fetched once, from one rank.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import NamedTuple

import msgspec

from ...errors import ProtocolError
from .boxes import Box, without
from .plan import Missing, gives, keeps
from .records import Copy, Kept, Records, Seen, chain_of, dtype_of

# A tensor that is read in more boxes is fetched as the box around them.
_MOST_BOXES = 1024


class Part(NamedTuple):
    """A box of a checkpoint tensor, and where its elements are at a rank of a source.

    Attributes:
        tensor: number of the tensor in `Fetch.tensors`.
        box: the box.
        parameter: number of the parameter there.
        offset: the first element, counted from the parameter's first one.
        stride: steps there, for each dimension of the box.
        through: see `records.Copy`, never empty.
    """

    tensor: int
    box: Box
    parameter: int
    offset: int
    stride: tuple[int, ...]
    through: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that travel."""
        return prod(self.box.size) * dtype_of(self.through[-1]).itemsize


class Request(NamedTuple):
    """Parts that come from one rank in one answer.

    Attributes:
        rank: number of the rank.
        parts: what comes, in this order.
        start: bytes that tensors before the first one of these need, from all ranks.
    """

    rank: int
    parts: tuple[Part, ...]
    start: int

    @property
    def nbytes(self) -> int:
        """Bytes that travel."""
        return sum(part.nbytes for part in self.parts)


@dataclass(frozen=True)
class Fetch:
    """What makes the tensors of a checkpoint, as far as they are read.

    Attributes:
        tensors: what they are, in the order in which they are loaded; without copies.
        parts: what each rank of the source has to give, in the order of the tensors.
        kept: number of a tensor -> boxes whose values came along with the records.
    """

    tensors: Sequence[Seen]
    parts: Sequence[Sequence[Part]]
    kept: Mapping[int, Sequence[Kept]]

    @property
    def nbytes(self) -> int:
        """Bytes that travel."""
        return sum(part.nbytes for parts in self.parts for part in parts)


class _Wanted(NamedTuple):
    box: Box
    through: tuple[str, ...]  # dtypes that lose something, the same at the source; empty: none may


def catalog(ranks: Sequence[Records]) -> list[Seen]:
    """Return the tensors of a checkpoint that any rank has seen, in the order of the first ranks.

    Raises:
        ProtocolError: two ranks differ in what a tensor is.
    """
    found: dict[str, Seen] = {}
    for records in ranks:
        for seen in records.tensors:
            plain = Seen(seen.name, seen.dtype, seen.shape)
            known = found.setdefault(seen.name, plain)
            if known != plain:
                raise ProtocolError(
                    f"{seen.name} is {known.dtype} {known.shape} at one rank of the source and "
                    f"{seen.dtype} {seen.shape} at another one"
                )
    return [*found.values()]


def find(needs: Records, ranks: Sequence[Records], prefer: int) -> tuple[Fetch, list[Missing]]:
    """Find what a rank reads of a checkpoint in what the ranks of a source have.

    Args:
        needs: the records of a load that was only pretended here.
        ranks: the records of the source's ranks.
        prefer: the rank to take from what several have.

    Returns:
        What to fetch, and what no rank can give.

    Raises:
        ProtocolError: see `catalog`.
    """
    tensors = catalog(ranks)
    wanted = {seen.name: _wanted(seen) for seen in needs.tensors}
    order = sorted(range(len(ranks)), key=lambda rank: (rank != prefer % len(ranks), rank))
    copies: dict[str, list[tuple[int, Copy, tuple[str, ...]]]] = defaultdict(list)
    kept: dict[str, list[Kept]] = defaultdict(list)
    for rank in order:
        for seen in ranks[rank].tensors:
            copies[seen.name] += [(rank, copy, chain_of(copy, seen)) for copy in seen.copies]
            kept[seen.name] += [one for one in seen.kept if one.values is not None]
    parts: list[list[Part]] = [[] for _ in ranks]
    values: dict[int, list[Kept]] = {}
    missing: list[Missing] = []
    for number, seen in enumerate(tensors):
        done: list[Box] = []
        for want in wanted.get(seen.name, ()):
            left = [want.box]
            for box in done:
                left = without(left, box)
            for one in kept[seen.name] if left else ():
                if (smaller := without(left, one.box)) != left:
                    left = smaller
                    values.setdefault(number, []).append(one)
            why = "no rank of the source has it"
            for rank, copy, through in copies[seen.name] if left else ():
                if not any(box.meet(copy.box) for box in left):
                    continue
                if not gives(through, want.through):
                    why = f"the source has it as {' -> '.join(through)}"
                    continue
                for box in left:
                    if (common := box.meet(copy.box)) is not None:
                        at = copy.at(common.start)
                        part = Part(number, common, copy.parameter, at, copy.stride, through)
                        parts[rank].append(part)
                left = without(left, copy.box)
                if not left:
                    break
            missing += [Missing(seen.name, box, why) for box in left]
            done.append(want.box)
    return Fetch(tensors, parts, values), missing


def _wanted(seen: Seen) -> list[_Wanted]:
    """Return the boxes of a tensor that loading reads."""
    wanted = {_Wanted(kept.box, ()) for kept in seen.kept}
    for copy in seen.copies:
        through = chain_of(copy, seen)
        exact = all(keeps(dtype_of(a), dtype_of(b)) for a, b in pairwise(through))
        wanted.add(_Wanted(copy.box, () if exact else through))
    if len({one.through for one in wanted if one.through}) > 1:
        # What was rounded to one of these dtypes cannot stand for what is rounded to another.
        wanted = {one._replace(through=()) for one in wanted}
    found = sorted(wanted, key=lambda one: (one.through, one.box))
    if len(found) > _MOST_BOXES:
        through = next((one.through for one in found if not one.through), found[0].through)
        return [_Wanted(_around([one.box for one in found]), through)]
    return found


def _around(boxes: Sequence[Box]) -> Box:
    start = tuple(map(min, zip(*(box.start for box in boxes), strict=True)))
    ends = [[a + n for a, n in zip(*box, strict=True)] for box in boxes]
    end = map(max, zip(*ends, strict=True))
    return Box(start, tuple(b - a for a, b in zip(start, end, strict=True)))


def requests(fetch: Fetch, most_bytes: int, most_parts: int) -> list[list[Request]]:
    """Return in which requests each rank is asked, in the order of the tensors.

    Args:
        fetch: what is fetched.
        most_bytes: of one answer; an element is not cut.
        most_parts: of one request.
    """
    needed = [0] * (len(fetch.tensors) + 1)
    for parts in fetch.parts:
        for part in parts:
            needed[part.tensor + 1] += part.nbytes
    for number in range(len(fetch.tensors)):
        needed[number + 1] += needed[number]
    found: list[list[Request]] = []
    for rank, parts in enumerate(fetch.parts):
        made: list[Request] = []
        batch: list[Part] = []
        nbytes = 0
        for part in (small for whole in parts for small in _cut(whole, most_bytes)):
            if batch and (nbytes + part.nbytes > most_bytes or len(batch) == most_parts):
                made.append(Request(rank, tuple(batch), needed[batch[0].tensor]))
                batch, nbytes = [], 0
            batch.append(part)
            nbytes += part.nbytes
        if batch:
            made.append(Request(rank, tuple(batch), needed[batch[0].tensor]))
        found.append(made)
    return found


def _cut(part: Part, most_bytes: int) -> Iterator[Part]:
    """Cut a part into smaller ones, along its first dimensions."""
    if part.nbytes <= most_bytes:
        yield part
        return
    start, size = part.box
    axis = next((axis for axis, n in enumerate(size) if n > 1), None)
    if axis is None:
        yield part
        return
    step = max(1, most_bytes * size[axis] // part.nbytes)
    for first in range(0, size[axis], step):
        count = min(step, size[axis] - first)
        box = Box(
            (*start[:axis], start[axis] + first, *start[axis + 1 :]),
            (*size[:axis], count, *size[axis + 1 :]),
        )
        offset = part.offset + first * part.stride[axis]
        yield from _cut(part._replace(box=box, offset=offset), most_bytes)


def same_reading(one: Records, other: Records) -> bool:
    """Return whether two loads have read and written the same, whatever the values were."""
    return _without_values(one) == _without_values(other)


def _without_values(records: Records) -> Records:
    tensors = tuple(
        msgspec.structs.replace(
            seen,
            kept=tuple(msgspec.structs.replace(kept, values=None) for kept in seen.kept),
        )
        for seen in records.tensors
    )
    return msgspec.structs.replace(records, tensors=tensors)
