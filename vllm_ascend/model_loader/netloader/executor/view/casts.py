"""What is kept of numbers that are cast from one dtype to another."""

from collections.abc import Sequence
from itertools import pairwise

import torch

from .records import dtype_of


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
