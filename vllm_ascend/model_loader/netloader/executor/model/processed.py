"""The processed layout: all tensors that inference uses, wherever post-processing has left them."""

import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..chunks.manifest import NO_MEANING, PROCESSED, Scalar
from ..devices import Device
from ..store import BlockStore, make_store

# Where torch keeps what `named_parameters` and the like return, and what has no tensors.
_OF_TORCH = vars(nn.Module()).keys()
# State of inference that happens to be on modules: empty when a model has been loaded, or counted
# up while it runs.
_OF_INFERENCE = frozenset({"kv_cache", "expert_load_view", "moe_load"})
# Objects of these belong to the instance and not to the model; so do all those named ...Config.
_OF_INSTANCE = ("vllm.config", "vllm.distributed", "vllm_ascend.distributed", "logging")
_DEEPEST = 4
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
    """Find every tensor of a model that has been post-processed.

    Post-processing leaves some as plain attributes of modules, or in lists, dicts and objects that
    hang there, such as an attention's `impl` (`impl.W_UV`) or a linear layer's `quant_method`.

    Returns:
        Name -> the tensor itself: parameters and buffers under all their names, then the others as
        in `layers.0.attn.impl.W_UV` or `layers.0.scales[1]`.
    """
    found: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    found |= model.named_buffers(remove_duplicate=False)
    seen: set[int] = set()
    for path, module in model.named_modules():
        for attribute, value in vars(module).items():
            if attribute not in _OF_TORCH:
                name = f"{path}.{attribute}" if path else attribute
                found |= _tensors(name, value, seen, 0)
    return {
        name: tensor
        for name, tensor in found.items()
        if not tensor.is_meta and not _OF_INFERENCE.intersection(re.split(r"[.\[]", name))
    }


def _tensors(
    name: str, value: object, seen: set[int], depth: int
) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
        return
    if id(value) in seen or depth > _DEEPEST or _is_none_of_ours(value):
        return
    inside: Iterator[tuple[str, object]] | list[tuple[str, object]]
    if isinstance(value, Mapping):
        inside = [(f"{name}[{key!r}]", item) for key, item in value.items()]
    elif isinstance(value, list | tuple | set | frozenset):
        inside = [(f"{name}[{index}]", item) for index, item in enumerate(value)]
    elif hasattr(value, "__dict__"):
        inside = [(f"{name}.{key}", item) for key, item in vars(value).items()]
    else:
        return
    seen.add(id(value))
    for inner, item in inside:
        yield from _tensors(inner, item, seen, depth + 1)


def _is_none_of_ours(value: object) -> bool:
    if isinstance(
        value, type | nn.Module | ModuleType | FunctionType | MethodType | BuiltinFunctionType
    ):
        return True  # submodules are visited by themselves
    kind = type(value)
    return kind.__name__.endswith("Config") or kind.__module__.startswith(_OF_INSTANCE)


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


def capture_processed(
    model: nn.Module,
    attributes: Mapping[str, Scalar],
    device: Device,
    meaning: Mapping[str, str] = NO_MEANING,
) -> BlockStore:
    """Describe and hash a post-processed model, as it is to be served.

    Args:
        model: the model, ready for inference.
        attributes: the plain attributes that loading has set.
        device: where the tensors are.
        meaning: see `Manifest`.

    Raises:
        LayoutUnsupported: a tensor has no memory.
    """
    return make_store(processed_tensors(model), PROCESSED, attributes, device, meaning)
