"""Records of weights that vLLM has reloaded in place from a checkpoint of the same tensors.

What is where stays as it was, as the model's code puts tensors of the same names, shapes and dtypes
where it put those before. Only the values that were kept aside are others.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import msgspec
import torch

from ...utils import one_line
from ..memory import bytes_of
from .boxes import Unmapped, box_of
from .records import Kept, Records, name_of

Weights: TypeAlias = Iterable[tuple[str, torch.Tensor]]


class Reread:
    """Takes note of a checkpoint that a model reads once more.

    Args:
        records: how the weights came from the checkpoint that it read before.
        all_read: whether these are those of the checkpoint that it has now.
    """

    def __init__(self, records: Records, *, all_read: bool = False) -> None:
        self._records = records
        self._seen = {seen.name: seen for seen in records.tensors}
        known = records.tensors if all_read else ()
        self._kept: dict[str, tuple[Kept, ...]] = {seen.name: seen.kept for seen in known}
        self._other = ""

    def watch(self, weights: Weights) -> Weights:
        """Return a checkpoint's tensors, each of which is taken note of as it comes.

        A model may go through them as often as through those it was given.
        """
        return self._watched(weights) if isinstance(weights, Iterator) else _Watched(self, weights)

    def records(self) -> Records:
        """Return how the weights came from this checkpoint.

        Raises:
            Unmapped: that is not known, as it has other tensors.
        """
        if problem := self._other or self._problem():
            raise Unmapped(
                f"this reload {problem}, so instances of other sizes cannot load from here"
            )
        replace = msgspec.structs.replace
        tensors = (
            replace(seen, kept=self._kept.get(seen.name, ())) for seen in self._records.tensors
        )
        return replace(self._records, tensors=tuple(tensors))

    def _problem(self) -> str:
        for seen in self._records.tensors:
            if (seen.copies or seen.kept) and seen.name not in self._kept:
                return f"did not include {seen.name}"
        before = [seen.name for seen in self._records.tensors if seen.name in self._kept]
        if self._records.overwritten and before != [*self._kept]:
            return "had tensors that share memory in another order"
        return ""

    def _watched(self, weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
        for one in weights:
            try:
                self._note(*one)
            except Exception as error:  # the reload is worth more than its view
                self._other = f"had tensors that cannot be noted ({one_line(error)})"
            yield one

    def _note(self, name: str, tensor: torch.Tensor) -> None:
        seen, dtype, shape = self._seen.get(name), name_of(tensor.dtype), tuple(tensor.shape)
        if seen is None or (seen.dtype, seen.shape) != (dtype, shape):
            self._other = f"had {name} ({dtype} {shape}), which was not in the checkpoint before"
            return
        self._kept.pop(name, None)  # the last one that is written to a place counts
        self._kept[name] = tuple(_again(kept, tensor) for kept in seen.kept)


@dataclass(frozen=True)
class _Watched:
    reread: Reread
    weights: Weights

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self.reread._watched(self.weights)


def _again(kept: Kept, tensor: torch.Tensor) -> Kept:
    if kept.values is None:
        return kept
    part = box_of(tensor, kept.box)
    return msgspec.structs.replace(kept, values=bytes_of(part.contiguous()).cpu().numpy().tobytes())
