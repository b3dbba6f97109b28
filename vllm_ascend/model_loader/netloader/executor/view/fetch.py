"""What of a checkpoint a rank fetches from the ranks of a source, and in which requests.

Pure: equal records give equal requests. Of a checkpoint tensor the boxes are fetched that loading
reads, and nothing else. Each box is fetched once, from one rank.
"""

import time
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import msgspec

from ...errors import LoadFailed, ProtocolError
from .boxes import Box, without
from .casts import gives, keeps
from .records import Copy, Kept, Records, Seen, chain_of, dtype_of, nbytes_of

# A tensor that is read in more boxes is fetched as the box around them.
_MOST_BOXES = 1024

_FEW = 8  # boxes that are looked at one by one


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
        return nbytes_of(self.box.size, self.through[-1])


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
        kept: number of a tensor -> its boxes whose values came along with the records.
    """

    tensors: Sequence[Seen]
    parts: Sequence[list[Part]]
    kept: dict[int, dict[Box, Kept]]

    @property
    def nbytes(self) -> int:
        """Bytes that travel."""
        return sum(part.nbytes for parts in self.parts for part in parts)


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


class _Offer(NamedTuple):
    box: Box
    through: tuple[str, ...]
    rank: int
    copy: Copy


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
            known = found.get(seen.name)
            if known is None:
                found[seen.name] = Seen(seen.name, seen.dtype, seen.shape)
            elif known.shape != seen.shape or known.dtype != seen.dtype:
                raise ProtocolError(
                    f"{seen.name} is {known.dtype} {known.shape} at one rank of the source and "
                    f"{seen.dtype} {seen.shape} at another one"
                )
    return [*found.values()]


def find(
    needs: Records, ranks: Sequence[Records], prefer: int, seconds: float = 30.0
) -> tuple[Fetch, list[Missing]]:
    """Find what a rank reads of a checkpoint in what the ranks of a source have.

    Args:
        needs: the records of a load that was only pretended here.
        ranks: the records of the source's ranks.
        prefer: the rank to take from what several have.
        seconds: it may take.

    Returns:
        What to fetch, and what no rank can give.

    Raises:
        ProtocolError: see `catalog`.
        LoadFailed: it takes longer.
    """
    deadline = time.monotonic() + seconds
    tensors = catalog(ranks)
    wanted = {seen.name: seen for seen in needs.tensors if seen.copies or seen.kept}
    order = sorted(range(len(ranks)), key=lambda rank: (rank != prefer % len(ranks), rank))
    # What several have is taken from the first one.
    there: dict[str, list[tuple[int, Seen]]] = {name: [] for name in wanted}
    for rank in order:
        for seen in ranks[rank].tensors:
            if seen.name in there:
                there[seen.name].append((rank, seen))
    found = Fetch(tensors, [[] for _ in ranks], {})
    missing: list[Missing] = []
    for number, seen in enumerate(tensors):
        if (need := wanted.get(seen.name)) is None:
            continue
        has = there[seen.name]
        if (whole := _whole(number, need, has)) is not None:
            found.parts[has[0][0]].append(whole)
            continue
        offers: dict[tuple[Box, tuple[str, ...]], _Offer] = {}
        kept: dict[Box, Kept] = {}
        for rank, one in has:
            for copy in _joined(one.copies):
                box, through = copy.box, chain_of(copy, one)
                offers.setdefault((box, through), _Offer(box, through, rank, copy))
            for value in one.kept:
                if value.values is not None:
                    kept.setdefault(value.box, value)
        offered = [*offers.values()]
        missing += _find_one(number, found, _wanted(need), offered, kept, deadline)
    return found, missing


def _whole(number: int, need: Seen, has: Sequence[tuple[int, Seen]]) -> Part | None:
    """Return the one part that a tensor is made of, as nearly all are where the first has it."""
    copies = has[0][1].copies if has else ()
    if not copies or len(need.copies) != 1 or need.kept or any(seen.kept for _, seen in has):
        return None
    want, copy = need.copies[0], copies[0]
    box = want.box
    if want.through or copy.through or (box != copy.box and box.meet(copy.box) != box):
        return None
    through = chain_of(copy, has[0][1])
    return Part(number, box, copy.parameter, copy.at(box.start), copy.stride, through)


def _find_one(
    number: int,
    found: Fetch,
    wants: Sequence[_Wanted],
    offered: Sequence[_Offer],
    kept: Mapping[Box, Kept],
    deadline: float,
) -> Iterator[Missing]:
    """Add to a fetch what of one tensor is to be had; yield what is not."""

    def in_time() -> None:
        if time.monotonic() > deadline:
            raise LoadFailed(f"what {found.tensors[number].name} is made of takes too long")

    here, near_wants = [*kept], _near([want.box for want in wants])
    near_kept, near_offered = _near(here), _near([offer.box for offer in offered])
    for index, want in enumerate(wants):
        left = [want.box]
        for other in near_wants(want.box):
            if other < index:
                left = without(left, wants[other].box)
        for other in near_kept(want.box) if left else ():
            in_time()
            if (smaller := without(left, here[other])) != left:
                left = smaller
                found.kept.setdefault(number, {})[here[other]] = kept[here[other]]
        why = "no rank of the source has it"
        for other in near_offered(want.box) if left else ():
            in_time()
            box, through, rank, copy = offered[other]
            common = [both for one in left if (both := one.meet(box)) is not None]
            if not common:
                continue
            if not gives(through, want.through):
                why = f"the source has it as {' -> '.join(through)}"
                continue
            found.parts[rank].extend(
                Part(number, both, copy.parameter, copy.at(both.start), copy.stride, through)
                for both in common
            )
            left = without(left, box)
            if not left:
                break
        for box in left:
            yield Missing(found.tensors[number].name, box, why)


def _near(boxes: Sequence[Box]) -> Callable[[Box], Sequence[int]]:
    """Return what gives the numbers of the boxes that may have something of another one."""
    every = range(len(boxes))
    if len(boxes) <= _FEW or not boxes[0].start:
        return lambda _: every
    axis = _main_axis(boxes)
    order = sorted(every, key=lambda number: boxes[number].start[axis])
    lows = [boxes[number].start[axis] for number in order]
    longest = max(box.size[axis] for box in boxes)

    def near(box: Box) -> Sequence[int]:
        low = box.start[axis]
        first = bisect_right(lows, low - longest)
        return sorted(order[first : bisect_left(lows, low + box.size[axis])])

    return near


def _main_axis(boxes: Sequence[Box | Copy]) -> int:
    """Return the axis along which boxes differ, as those of experts and of columns do."""
    axes = range(len(boxes[0].start))
    return max(axes, key=lambda axis: len({box.start[axis] for box in boxes}))


def _joined(copies: Sequence[Copy]) -> Sequence[Copy]:
    """Join copies that follow each other at equal steps, such as those of a tensor's experts."""
    if len(copies) <= _FEW or not copies[0].start:
        return copies
    axis = _main_axis(copies)

    def line(copy: Copy) -> tuple[Any, ...]:
        others = copy.start[:axis], copy.start[axis + 1 :]
        return copy.parameter, copy.through, copy.size, copy.stride, others

    lines = defaultdict(list)
    for copy in copies:
        lines[line(copy)].append(copy)
    return [one for of_line in lines.values() for one in _joined_line(of_line, axis)]


def _joined_line(copies: list[Copy], axis: int) -> Iterator[Copy]:
    copies.sort(key=lambda copy: (copy.start[axis], copy.offset))
    width = copies[0].size[axis]
    first = 0
    while first < len(copies):
        copy, end = copies[first], first + 1
        step = copies[end].offset - copy.offset if end < len(copies) else 0
        if step >= 0 and (width == 1 or step == width * copy.stride[axis]):
            start, offset = copy.start[axis], copy.offset
            while end < len(copies) and (copies[end].start[axis], copies[end].offset) == (
                start + (end - first) * width,
                offset + (end - first) * step,
            ):
                end += 1
        if end - first > 1:
            size, stride = [*copy.size], [*copy.stride]
            size[axis] *= end - first
            stride[axis] = step if width == 1 else stride[axis]
            copy = msgspec.structs.replace(copy, size=tuple(size), stride=tuple(stride))
        yield copy
        first = end


def _wanted(seen: Seen) -> list[_Wanted]:
    """Return the boxes of a tensor that loading reads."""
    wanted = {_Wanted(kept.box, ()) for kept in seen.kept}
    for copy in _joined(seen.copies):
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


def is_copied(needs: Records) -> bool:
    """Return whether a load does nothing but copy, in whatever order its tensors come."""
    kept = any(seen.kept for seen in needs.tensors)
    return not (kept or needs.computed or needs.overwritten)


def copies_in(need: Seen) -> Callable[[Box], Iterator[tuple[Box, Copy]]]:
    """Return what gives, for a box of a tensor, the copies of it, each with its part of the box."""
    copies = _joined(need.copies)
    near = _near([copy.box for copy in copies])

    def found(box: Box) -> Iterator[tuple[Box, Copy]]:
        for number in near(box):
            if (both := box.meet(copies[number].box)) is not None:
                yield both, copies[number]

    return found


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
    return [
        [
            Request(rank, tuple(batch), needed[batch[0].tensor])
            for batch in pieces(parts, most_bytes, most_parts)
        ]
        for rank, parts in enumerate(fetch.parts)
    ]


def pieces(parts: Iterable[Part], most_bytes: int, most_parts: int) -> Iterator[list[Part]]:
    """Cut parts into pieces of so many bytes, and of so many parts, at most.

    Yields:
        The parts of each piece, which have the same elements in the same order.
    """
    batch: list[Part] = []
    nbytes = 0
    for part in (small for whole in parts for small in _cut(whole, most_bytes)):
        if batch and (nbytes + part.nbytes > most_bytes or len(batch) == most_parts):
            yield batch
            batch, nbytes = [], 0
        batch.append(part)
        nbytes += part.nbytes
    if batch:
        yield batch


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
    written = [(each.parameters, each.fills, each.computed) for each in (one, other)]
    same = written[0] == written[1] and len(one.tensors) == len(other.tensors)
    return same and all(map(_is_read_alike, one.tensors, other.tensors))


def _is_read_alike(one: Seen, other: Seen) -> bool:
    if one == other:
        return True
    kept, others = ([each.box for each in seen.kept] for seen in (one, other))
    return kept == others and one == msgspec.structs.replace(other, kept=one.kept)
