"""The one walk over a model: every tensor that can be reached from it, wherever it stands."""

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType

import torch
from torch import nn

from ...errors import LayoutUnsupported

# Where torch keeps what `named_parameters` and the like return, and what has no tensors.
_OF_TORCH = vars(nn.Module()).keys()
# State of inference that happens to be on modules: empty when a model has been loaded, or counted
# up while it runs; and adapters, which requests bring.
_OF_INFERENCE = frozenset(
    {
        "kv_cache",
        "key_cache",
        "value_cache",
        "expert_load_view",
        "moe_load",
        "punica_wrapper",
        "lora_manager",
        "lora_a_stacked",
        "lora_a_stacked_2d",
        "lora_b_stacked",
    }
)
# Objects whose class, or a base of it, begins so belong to the instance and not to the model. Not
# all that is called a configuration does: vLLM's FusedMoEQuantConfig has scales.
_OF_INSTANCE = (
    "vllm.config",
    "vllm.distributed",
    "vllm.model_executor.layers.quantization.base_config.QuantizationConfig",
    "vllm.tokenizers",
    "vllm_ascend.ascend_config",
    "vllm_ascend.distributed",
    "torch.distributed",
    "torch._dynamo",
    "torch._inductor",
    "transformers",
    "tokenizers",
    "threading",
    "logging",
)
# Most attributes are of these.
_HOLD_NOTHING = frozenset({type(None), bool, int, float, str, torch.dtype, torch.device})
_DEEPEST = 9


class Kind(Enum):
    """What a tensor is to the module that has it."""

    WEIGHT = "a parameter or a persistent buffer"
    BUFFER = "a buffer that no checkpoint has"
    PLAIN = "an attribute, or inside of one"


@dataclass(frozen=True)
class Found:
    """A tensor of a model.

    Attributes:
        name: as in `layers.0.attn.impl.W_UV`, `layers.0.scales[1]` or
            `pooler.poolers_by_task['embed'].head.projector.0.weight`.
        tensor: the tensor itself.
        kind: what it is.
        in_tree: whether the module that has it is one of `model.named_modules()`.
    """

    name: str
    tensor: torch.Tensor
    kind: Kind
    in_tree: bool


def walk(model: nn.Module) -> list[Found]:
    """Find every tensor that can be reached from a model, in an order that its code alone decides.

    Modules are looked into wherever they stand, also in dicts, lists and attributes of objects that
    torch passes over. Configurations, process groups, tokenizers and compiled code are left alone.

    Returns:
        Parameters and buffers of the module tree under all their names, then the others.

    Raises:
        LayoutUnsupported: tensors are in a set, which has no order; names it.
    """
    found = [*_parameters("", model, True), *_buffers("", model, True)]
    tree = {id(module) for module in model.modules()}
    seen: set[int] = set()
    for path, module in model.named_modules():
        found += _attributes(path, module, tree, seen)
    return [one for one in found if not _OF_INFERENCE.intersection(re.split(r"[.\[]", one.name))]


def _parameters(path: str, module: nn.Module, in_tree: bool) -> Iterator[Found]:
    for name, parameter in module.named_parameters(path, remove_duplicate=False):
        yield Found(name, parameter, Kind.WEIGHT, in_tree)


def _buffers(path: str, module: nn.Module, in_tree: bool) -> Iterator[Found]:
    for inner, owner in module.named_modules(prefix=path, remove_duplicate=False):
        for name, buffer in owner.named_buffers(inner, recurse=False, remove_duplicate=False):
            derived = name.rpartition(".")[2] in owner._non_persistent_buffers_set
            yield Found(name, buffer, Kind.BUFFER if derived else Kind.WEIGHT, in_tree)


def _attributes(path: str, module: nn.Module, tree: set[int], seen: set[int]) -> Iterator[Found]:
    for attribute, value in vars(module).items():
        if attribute not in _OF_TORCH:
            name = f"{path}.{attribute}" if path else attribute
            yield from _inside(name, value, tree, seen, 0)


def _inside(
    name: str, value: object, tree: set[int], seen: set[int], depth: int
) -> Iterator[Found]:
    if isinstance(value, torch.Tensor):
        yield Found(name, value, Kind.PLAIN, True)
        return
    if type(value) in _HOLD_NOTHING:
        return
    if isinstance(value, nn.Module):
        yield from _outside(name, value, tree, seen)
        return
    if id(value) in seen or depth > _DEEPEST or _is_none_of_ours(value):
        return
    inside: Iterator[tuple[str, object]] | list[tuple[str, object]]
    if isinstance(value, Mapping):
        inside = [(f"{name}[{key!r}]", item) for key, item in value.items()]
    elif isinstance(value, list | tuple):
        inside = [(f"{name}[{index}]", item) for index, item in enumerate(value)]
    elif isinstance(value, set | frozenset):
        if any(isinstance(item, torch.Tensor | nn.Module) for item in value):
            raise LayoutUnsupported(f"{name} is a set with tensors, which has no order")
        return
    elif hasattr(value, "__dict__"):
        inside = [(f"{name}.{key}", item) for key, item in vars(value).items()]
    else:
        return
    seen.add(id(value))
    for inner, item in inside:
        yield from _inside(inner, item, tree, seen, depth + 1)


def _outside(path: str, module: nn.Module, tree: set[int], seen: set[int]) -> Iterator[Found]:
    """Find the tensors of a module's modules that are not in the tree, which are visited anyway."""
    inner = [
        (name, one)
        for name, one in module.named_modules(prefix=path)
        if id(one) not in tree and id(one) not in seen
    ]
    seen.update(id(one) for _, one in inner)
    for name, one in inner:
        for of_torch in (one._parameters, one._buffers):
            for key, tensor in of_torch.items():
                if tensor is not None:
                    derived = key in one._non_persistent_buffers_set
                    kind = Kind.BUFFER if derived else Kind.WEIGHT
                    yield Found(f"{name}.{key}", tensor, kind, False)
    for name, one in inner:
        yield from _attributes(name, one, tree, seen)


def _is_none_of_ours(value: object) -> bool:
    if isinstance(value, type | ModuleType | FunctionType | MethodType | BuiltinFunctionType):
        return True
    # mypy takes a class's __hash__ for that of its objects
    return _is_of_instance(type(value))  # type: ignore[arg-type]


@functools.cache
def _is_of_instance(kind: type) -> bool:
    bases = (f"{base.__module__}.{base.__qualname__}" for base in kind.__mro__)
    return any(base.startswith(_OF_INSTANCE) for base in bases)
