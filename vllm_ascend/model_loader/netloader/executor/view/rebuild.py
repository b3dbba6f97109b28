"""Elements moved between parameters, and checkpoint tensors made of them."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch

from .boxes import Box
from .plan import Part, Place, keeps
from .records import Kept, Records, chain_of, dtype_of


def region(memory: torch.Tensor, place: Place, size: tuple[int, ...]) -> torch.Tensor:
    """Return elements of a parameter as a view, in the dtype that they have there."""
    first = memory.storage_offset() + place.offset
    return memory.as_strided(size, place.stride, first).view(dtype_of(place.through[-1]))


def move(part: Part, source: torch.Tensor, target: torch.Tensor) -> None:
    """Copy the elements of a part from a parameter of the source's to one here."""
    there, here = region(source, part.there, part.size), region(target, part.here, part.size)
    if part.there.through != part.here.through:
        there = there.to(dtype_of(part.there.through[0]))
        there = there.view(dtype_of(part.here.through[0]))
        for name in part.here.through[1:-1]:
            there = there.to(dtype_of(name))
    here.copy_(there)


def rebuild(
    name: str, ranks: Sequence[tuple[Records, Mapping[str, torch.Tensor]]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Make a checkpoint tensor of what the ranks of a source have of it.

    Args:
        name: the tensor's name.
        ranks: records and parameters of each rank; at least one rank has seen the tensor.

    Returns:
        The tensor, and which of its elements are known. What was rounded on its way into a
        parameter is not known.
    """
    found = [(one, *rank) for rank in ranks for one in rank[0].tensors if one.name == name]
    shape, dtype = found[0][0].shape, dtype_of(found[0][0].dtype)
    whole, known = torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=torch.bool)
    for seen, records, parameters in found:
        for copy in seen.copies:
            chain = [dtype_of(step) for step in chain_of(copy, seen)]
            if not all(keeps(a, b) for a, b in pairwise(chain)):
                continue
            parameter = records.parameters[copy.parameter].name
            place = Place(parameter, copy.offset, copy.stride, chain_of(copy, seen))
            elements = region(parameters[parameter], place, copy.size).to(chain[0]).view(dtype)
            box_of(whole, copy.box).copy_(elements)
            box_of(known, copy.box).fill_(True)
        for kept in seen.kept:
            if kept.values is not None:
                box_of(whole, kept.box).copy_(values_of(kept, dtype))
                box_of(known, kept.box).fill_(True)
    return whole, known


def values_of(kept: Kept, dtype: torch.dtype) -> torch.Tensor:
    """Return the values of a box that were kept aside."""
    return torch.frombuffer(bytearray(kept.values or b""), dtype=dtype).reshape(kept.size)


def box_of(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    """Return a box of a tensor as a view."""
    return tensor[tuple(slice(start, start + n) for start, n in zip(*box, strict=True))]
