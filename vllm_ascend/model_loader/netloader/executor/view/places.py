"""Where the elements of a checkpoint's tensors go, and how they get there."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..memory import INTEGER
from .boxes import Box, box_of
from .fetch import Fetch, copies_in
from .records import Copy, Kept, Records, Seen, chain_of, dtype_of


class Place(NamedTuple):
    """Where elements of a checkpoint tensor go.

    Attributes:
        box: which elements.
        memory: theirs, of the box's size.
        through: dtypes that they go through, from that which they are seen as to that in memory.
    """

    box: Box
    memory: torch.Tensor
    through: tuple[str, ...]

    def put(self, values: torch.Tensor) -> None:
        """Set the elements to others, of any dtype of the same size as the first one."""
        values = values.view(dtype_of(self.through[0]))
        for name in self.through[1:]:
            values = values.to(dtype_of(name))
        # Not by torch: its threads wait for each other, and others read and hash meanwhile.
        np.copyto(_numbers(self.memory), _numbers(values))


class InPlace:
    """The host's memory that a model has for what loading copies there.

    Args:
        needs: what a load copies where, and that is all it does; see `fetch.is_copied`.
        model: its parameters are in the host's memory.
    """

    def __init__(self, needs: Records, model: nn.Module) -> None:
        named = {
            **dict(model.named_buffers(remove_duplicate=False)),
            **dict(model.named_parameters(remove_duplicate=False)),
        }
        self._parameters = [named[parameter.name].detach() for parameter in needs.parameters]
        self._needs = {seen.name: seen for seen in needs.tensors}
        self._copies: dict[str, Callable[[Box], Iterator[tuple[Box, Copy]]]] = {}

    def places(self, seen: Seen, box: Box) -> list[Place]:
        """Return where the elements of a box of a tensor go."""
        if (copies := self._copies.get(seen.name)) is None:
            copies = self._copies[seen.name] = copies_in(self._needs[seen.name])
        return [self._place(part, copy, chain_of(copy, seen)) for part, copy in copies(box)]

    def put_kept(self, fetch: Fetch) -> None:
        """Put the values where they go that came along with the records."""
        for number, boxes in fetch.kept.items():
            seen = fetch.tensors[number]
            for box, kept in boxes.items():
                put(self.places(seen, box), box, values_of(kept, dtype_of(seen.dtype)))

    def _place(self, box: Box, copy: Copy, through: tuple[str, ...]) -> Place:
        parameter = self._parameters[copy.parameter]
        first = parameter.storage_offset() + copy.at(box.start)
        memory = parameter.view(dtype_of(through[-1])).as_strided(box.size, copy.stride, first)
        return Place(box, memory, through)


def put(places: Iterable[Place], box: Box, values: torch.Tensor) -> None:
    """Put the elements of a box where they, or some of them, go."""
    for place in places:
        steps = zip(place.box.start, box.start, strict=True)
        inside = Box(tuple(a - b for a, b in steps), place.box.size)
        place.put(box_of(values, inside))


def values_of(kept: Kept, dtype: torch.dtype) -> torch.Tensor:
    """Return the values of a box that came along with the records."""
    return torch.frombuffer(bytearray(kept.values or b""), dtype=dtype).reshape(kept.size)


def _numbers(tensor: torch.Tensor) -> NDArray[Any]:
    """Return a tensor of host memory as numpy knows it."""
    return tensor.view(INTEGER.get(tensor.element_size(), tensor.dtype)).numpy()
