"""The processed layout: all tensors that inference uses, wherever post-processing has left them."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..chunks.manifest import Scalar
from .walk import walk

# An integer beyond that is an address in this process.
_LARGEST_INT = 1 << 31

# All of `_FILLABLE` can hold it exactly.
_LARGEST_FILL = 127
_UNINITIALIZED = {
    torch.ops.aten.empty,
    torch.ops.aten.empty_like,
    torch.ops.aten.empty_permuted,
    torch.ops.aten.empty_strided,
    torch.ops.aten.new_empty,
    torch.ops.aten.new_empty_strided,
}
_FILLABLE = {
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
}


def processed_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Find every tensor of a model that has been post-processed, by its name in the walk.

    Post-processing leaves some as plain attributes of modules, or in lists, dicts and objects that
    hang there, such as an attention's `impl` (`impl.W_UV`) or a linear layer's `quant_method`.
    """
    return {one.name: one.tensor for one in walk(model) if not one.tensor.is_meta}


class _Defined(TorchDispatchMode):
    """Fills the memory of each new tensor with a small number, the next one with the next."""

    def __init__(self) -> None:
        super().__init__()
        self._count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in _UNINITIALIZED and not result.is_meta:
            self._count = self._count % _LARGEST_FILL + 1
            if result.dtype in _FILLABLE:
                result.fill_(self._count)
            else:
                result.zero_()
        return result


def defined_memory() -> AbstractContextManager[object]:
    """Return a context in which the memory of new tensors has defined contents.

    What post-processing makes of an empty model can depend on what it finds there; this way it
    does the same each time, divides by no zero, and takes no two tensors for the same. What no
    checkpoint fills, such as the embedding of an EAGLE draft, is the same in all instances.
    """
    return _Defined()


def changed_scalars(before: Mapping[str, Scalar], after: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Return the plain attributes that loading and post-processing have set.

    Addresses are left out, as a client has its own, and `training`, which `eval` sets.
    """
    return {
        name: value
        for name, value in after.items()
        if (name not in before or before[name] != value)
        and not (type(value) is int and abs(value) >= _LARGEST_INT)
        and name.rpartition(".")[2] != "training"
    }
