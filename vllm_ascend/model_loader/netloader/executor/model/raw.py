"""Raw weights kept beside the processed ones, so that an instance can serve them.

Post-processing replaces or changes what the checkpoint filled in. A tensor that it replaces is kept
by reference; one that it changes in place is lost unless a copy was made before (INT8_CACHE), and
then nothing else may be sent in its place. What has changed is told by hashing before and after.
"""

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parameter import UninitializedTensorMixin

from ...config import Int8Cache
from ...errors import LayoutUnsupported
from ...utils import shortened
from ..chunks.blocks import Run
from ..chunks.manifest import NO_MEANING, RAW, Sample, Scalar
from ..devices import Device
from ..memory import bytes_of, contiguous
from ..store import BlockStore, make_store
from ..view.offered import Viewed, viewed
from ..view.records import Records
from .match import sample_of
from .walk import Found, Kind, walk

# Scales and the like: copying all of them costs little, and quantization rewrites them in place.
_SMALL = 64 << 10
# Bytes that are looked at together to see whether post-processing has changed them.
_COMPARED_AT_ONCE = 16 << 20
# Characters of an attribute's value that an error shows.
_SHOWN = 200


@dataclass(frozen=True)
class BeforeLoading:
    """What a model is like before its weights are loaded.

    Attributes:
        scalars: dotted name -> value of the plain attributes of all modules.
        derived: name -> digest of the tensors that no checkpoint has.
        plain: names of the tensors that are neither parameters nor buffers.
        parameters: name -> (dtype, shape) of the parameters that have memory.
    """

    scalars: Mapping[str, Scalar]
    derived: Mapping[str, bytes]
    plain: Set[str]
    parameters: Mapping[str, tuple[torch.dtype, torch.Size]]


def before_loading(model: nn.Module, device: Device) -> BeforeLoading:
    """Take note of what loading may change besides parameters and persistent buffers."""
    found = walk(model)
    return BeforeLoading(
        scalars=scalars(model),
        derived=_digests(_derived(found), device),
        plain=_plain(found),
        parameters=_kinds(model),
    )


def raw_tensors(model: nn.Module) -> tuple[dict[str, torch.Tensor], set[str]]:
    """Return what loading can fill, and the names that every checkpoint's load has to fill.

    Returns:
        Name -> tensor of all parameters and buffers under all their names, detached, so that a
        later change of a parameter's shape or memory leaves them alone; and the names of the
        parameters and persistent buffers among them. Those of modules outside of the module tree,
        which a constructor may have read from a folder, are among both.
    """
    return _raw(walk(model))


def _raw(found: Sequence[Found]) -> tuple[dict[str, torch.Tensor], set[str]]:
    fillable = [
        one
        for one in found
        if one.kind is not Kind.PLAIN
        and not isinstance(one.tensor, UninitializedTensorMixin)
        # vLLM keeps layers that a model goes without, outside of the tree and without memory.
        and (one.in_tree or not one.tensor.is_meta)
    ]
    required = {one.name for one in fillable if one.kind is Kind.WEIGHT}
    return {one.name: one.tensor.detach() for one in fillable}, required


def weights_outside(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters and buffers of modules that stand outside of the module tree."""
    return {
        one.name: one.tensor.detach()
        for one in walk(model)
        if not one.in_tree and one.kind is not Kind.PLAIN and not one.tensor.is_meta
    }


def without_doubles(raw: BlockStore, model: nn.Module) -> BlockStore:
    """Put a model's own tensors in the place of raw ones that are equal, so that these can go."""
    own = {one.name: one.tensor.detach() for one in walk(model) if one.kind is not Kind.PLAIN}
    tensors = [
        mine if (mine := own.get(name)) is not None and _same(mine, tensor) else tensor
        for name, tensor in zip(raw.manifest.names, raw.tensors, strict=True)
    ]
    return raw.with_tensors(tensors)


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    if (one.dtype, one.shape, one.device) != (other.dtype, other.shape, other.device):
        return False
    return one.is_contiguous() and torch.equal(bytes_of(one), bytes_of(other))


def samples_of(model: nn.Module) -> dict[str, Sample]:
    """Describe the tensors that a model has made itself, so that both sides can compare theirs.

    Args:
        model: the model, not post-processed yet.
    """
    return {one.name: sample_of(one.tensor) for one in _derived(walk(model))}


def capture_loaded(
    model: nn.Module, before: BeforeLoading, device: Device, meaning: Mapping[str, str] = NO_MEANING
) -> BlockStore:
    """Keep references to what a checkpoint has just filled.

    Args:
        model: the model, not post-processed yet.
        before: what it was like before loading.
        device: where the tensors are.
        meaning: see `Manifest`.

    Raises:
        LayoutUnsupported: loading left something that the raw layout cannot carry; names it.
    """
    found = walk(model)
    derived = _derived(found)
    digests = _digests(derived, device)
    changed = {name for name in digests if digests[name] != before.derived.get(name)}
    plain = _plain(found)
    if lost := sorted((plain - before.plain) | (plain & changed)):
        raise LayoutUnsupported(
            f"{lost[0]} was created while loading and is neither a parameter nor a buffer"
        )
    kinds = _kinds(model)
    if new := sorted(name for name in kinds if kinds[name] != before.parameters.get(name)):
        # Online quantization: a client's model has not been through it when it receives.
        raise LayoutUnsupported(f"{new[0]} was created while loading, as online quantization does")
    attributes = {
        name: value
        for name, value in scalars(model).items()
        if name not in before.scalars or before.scalars[name] != value
    }
    everything, required = _raw(found)
    filled = required | changed
    tensors = {name: tensor for name, tensor in everything.items() if name in filled}
    made = {one.name: sample_of(one.tensor) for one in derived if one.name not in changed}
    return make_store(tensors, RAW, attributes, device, meaning, made)


def owners_of(
    model: nn.Module, attributes: Mapping[str, Scalar]
) -> dict[str, tuple[nn.Module, str]]:
    """Find the modules whose plain attributes loading has set at a source, and change nothing.

    Returns:
        Dotted name -> the module here, and what the attribute is called there.

    Raises:
        LayoutUnsupported: a module does not exist here, or a name is taken by something that is no
            plain value; says which, the value at the source, and what it has to be.
    """
    owners = {}
    for name, value in attributes.items():
        path, _, attribute = name.rpartition(".")
        there = f"attribute {name} is {shortened(repr(value), _SHOWN)} there"
        try:
            module = model.get_submodule(path)
        except AttributeError:
            raise LayoutUnsupported(f"{there}, and there is no such module here") from None
        if (kind := _not_plain(module, attribute, value)) is not None:
            raise LayoutUnsupported(
                f"{there}, and is not a plain value (None, a bool, a number or a string) but "
                f"{kind} here"
            )
        owners[name] = module, attribute
    return owners


def _not_plain(module: nn.Module, name: str, value: Scalar) -> str | None:
    """Return what a name stands for that cannot be given a plain value; None: it can."""
    if name.startswith("__"):
        return "a name of Python's own"
    existing = getattr(module, name, None)
    if not isinstance(existing, float) and not is_scalar(existing):
        return f"a {type(existing).__name__}"
    registered = (module._parameters, module._buffers, module._modules)
    if value is not None and any(name in names for names in registered):
        return "a parameter, buffer or module that is left out"
    kept = inspect.getattr_static(type(module), name, None)
    return "a property" if isinstance(kept, property) and kept.fset is None else None


def apply_attributes(model: nn.Module, attributes: Mapping[str, Scalar]) -> None:
    """Set the plain attributes that loading has set at the source.

    Raises:
        LayoutUnsupported: see `owners_of`; nothing is set.
    """
    for name, (module, attribute) in owners_of(model, attributes).items():
        setattr(module, attribute, attributes[name])


def copy_int8(
    raw: BlockStore, cache: Int8Cache, parts: Sequence[str] | None
) -> dict[int, torch.Tensor]:
    """Copy the tensors that post-processing may change in place, before it runs.

    Args:
        raw: the weights.
        cache: where to keep copies of int8 tensors; NO: none are made.
        parts: parts of names that `cache` applies to; None: all.

    Returns:
        Index -> copy: the int8 tensors chosen, and all small ones, whatever `cache` is.
    """
    copies: dict[int, torch.Tensor] = {}
    for index, (name, tensor) in enumerate(zip(raw.manifest.names, raw.tensors, strict=True)):
        chosen = parts is None or any(part in name for part in parts)
        if tensor.dtype == torch.int8 and cache is not Int8Cache.NO and chosen:
            place = torch.device("cpu") if cache is Int8Cache.DRAM else tensor.device
            copies[index] = tensor.to(place, copy=True)
        elif tensor.dtype != torch.int8 and tensor.nbytes < _SMALL:
            copies[index] = tensor.clone()
    return copies


def after_processing(
    raw: BlockStore, copies: Mapping[int, torch.Tensor], in_use: Mapping[str, torch.Tensor]
) -> BlockStore:
    """Put copies in the place of what post-processing has changed or what is to leave the device.

    The other copies are dropped.

    Args:
        raw: the weights.
        copies: see `copy_int8`.
        in_use: the tensors that inference uses, which matter only if there are copies in host
            memory: what was copied there and is not in use is kept there only.

    Raises:
        LayoutUnsupported: a tensor has changed and there is no copy; names it.
    """
    raw.device.synchronize()
    changed = _changed(raw)
    names = raw.manifest.names
    if lost := [names[index] for index in sorted(changed) if index not in copies]:
        raise LayoutUnsupported(
            f"post-processing has changed {lost[0]}"
            + (f" and {len(lost) - 1} more tensors" if len(lost) > 1 else "")
            + ", and no copy was kept (INT8_CACHE hbm or dram keeps int8 tensors)"
        )
    used = {tensor.untyped_storage().data_ptr() for tensor in in_use.values()}
    tensors = [
        copies[index]
        if index in changed
        or (
            index in copies
            and copies[index].device != tensor.device
            and tensor.untyped_storage().data_ptr() not in used
        )
        else tensor
        for index, tensor in enumerate(raw.tensors)
    ]
    return raw.with_tensors(tensors)


def viewed_through(raw: BlockStore, records: Records) -> Viewed:
    """Return a checkpoint as it is seen through raw weights.

    Args:
        raw: the weights, as others get them.
        records: how they came from the checkpoint.
    """
    named = dict(zip(raw.manifest.names, raw.tensors, strict=True))
    formats = raw.device.formats(named)
    # Of the others strides tell where their elements are.
    tensors = {name: tensor for name, tensor in named.items() if name not in formats}
    for entry in raw.manifest.tensors:
        if entry.alias_of in tensors:
            tensors[entry.name] = tensors[entry.alias_of]
    return viewed(records, tensors)


def _changed(raw: BlockStore) -> set[int]:
    """Return the tensors whose bytes are not what they were when they were hashed."""
    gone = {
        index
        for index, tensor in enumerate(raw.tensors)
        if tensor.untyped_storage().nbytes() < _end(tensor)
    }
    changed = set(gone)
    for run in raw.blocks.cut(_COMPARED_AT_ONCE, large_alone=True):
        for part in _without(run, gone, raw) if gone else [run]:
            changed |= {raw.blocks.tensor_of(block) for block in raw.wrong(part)}
    return changed


def _without(run: Run, tensors: set[int], store: BlockStore) -> Iterator[Run]:
    """Return the parts of a run that have no block of certain tensors."""
    first = run.first
    for span in store.blocks.spans(run):
        if span.tensor in tensors:
            gone = store.blocks.blocks_of(span.tensor)
            if first < gone.first:
                yield Run(first, gone.first - 1)
            first = gone.last + 1
    if first <= run.last:
        yield Run(first, run.last)


def _end(tensor: torch.Tensor) -> int:
    """Return the position in its storage at which a tensor's last byte ends."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = tensor.storage_offset() + sum((size - 1) * stride for size, stride in steps)
    return (last + 1) * tensor.element_size() if tensor.numel() else 0


def _derived(found: Sequence[Found]) -> list[Found]:
    """Return what no checkpoint has and a model makes itself, in most cases, each thing once.

    What lies in the memory of a parameter, such as a view of it, comes with that.
    """
    derived: dict[object, Found] = {}
    of_weights = {_storage(one.tensor) for one in found if one.kind is Kind.WEIGHT}
    for one in found:
        if one.kind is Kind.WEIGHT or isinstance(one.tensor, UninitializedTensorMixin):
            continue
        if one.tensor.is_meta or not one.tensor.numel():
            continue
        if _storage(one.tensor) not in of_weights:
            region = _storage(one.tensor), one.tensor.data_ptr(), one.tensor.shape
            derived.setdefault(region, one)
    return [*derived.values()]


def _plain(found: Sequence[Found]) -> set[str]:
    return {one.name for one in found if one.kind is Kind.PLAIN}


def _storage(tensor: torch.Tensor) -> int:
    if isinstance(tensor, UninitializedTensorMixin):
        return 0
    return tensor.untyped_storage().data_ptr()


def _digests(derived: Sequence[Found], device: Device) -> dict[str, bytes]:
    return {one.name: device.digests([contiguous(one.tensor)]) for one in derived}


def _kinds(model: nn.Module) -> dict[str, tuple[torch.dtype, torch.Size]]:
    return {
        name: (parameter.dtype, parameter.shape)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if not parameter.is_meta and not isinstance(parameter, UninitializedTensorMixin)
    }


def is_scalar(value: object) -> bool:
    """Return whether an attribute is a plain value, which travels in a manifest."""
    if isinstance(value, float):
        return math.isfinite(value)  # JSON has no other
    return value is None or isinstance(value, bool | int | str)


def scalars(model: nn.Module) -> dict[str, Scalar]:
    """Return dotted name -> value of the plain attributes of all modules."""
    return {
        f"{path}.{name}" if path else name: value
        for path, module in model.named_modules(remove_duplicate=False)
        for name, value in vars(module).items()
        if is_scalar(value)
    }
