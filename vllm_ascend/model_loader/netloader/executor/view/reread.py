"""Records of weights that vLLM has reloaded in place from a checkpoint of the same tensors.

What is where stays as it was, as the model's code puts tensors of the same names, shapes and dtypes
where it put those before. Only the values that were kept aside are others.
"""

from collections.abc import Iterable, Iterator
from typing import TypeAlias

import msgspec
import torch

from ..memory import bytes_of
from .boxes import Unmapped
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

    def watch(self, weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield a checkpoint's tensors as they come, and take note of each."""
        for name, tensor in weights:
            seen, dtype, shape = self._seen.get(name), name_of(tensor.dtype), tuple(tensor.shape)
            if seen is not None and (seen.dtype, seen.shape) == (dtype, shape):
                self._kept[name] = tuple(_again(kept, tensor) for kept in seen.kept)
            else:
                self._other = f"{name} ({dtype} {shape}) was not in the checkpoint before"
            yield name, tensor

    def records(self) -> Records:
        """Return how the weights came from this checkpoint.

        Raises:
            Unmapped: that is not known, as it has other tensors.
        """
        if self._other:
            raise Unmapped(self._other)
        for seen in self._records.tensors:
            if (seen.copies or seen.kept) and seen.name not in self._kept:
                raise Unmapped(f"{seen.name} was not read again")
        replace = msgspec.structs.replace
        tensors = (
            replace(seen, kept=self._kept.get(seen.name, ())) for seen in self._records.tensors
        )
        return replace(self._records, tensors=tuple(tensors))


def _again(kept: Kept, tensor: torch.Tensor) -> Kept:
    if kept.values is None:
        return kept
    part = tensor[tuple(slice(a, a + n) for a, n in zip(*kept.box, strict=True))]
    return msgspec.structs.replace(kept, values=bytes_of(part.contiguous()).cpu().numpy().tobytes())
