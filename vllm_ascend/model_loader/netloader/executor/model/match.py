"""Whether two sides mean the same tensors: named tensors described, and matched with a manifest."""

import functools
import itertools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
import xxhash
from torch.nn.parameter import UninitializedTensorMixin

from ...errors import LayoutUnsupported
from ...utils import plain, shortened
from ..chunks.manifest import NO_MEANING, PROCESSED, Manifest, Sample, Scalar, TensorEntry

MAX_NAMED = 5  # how many differences a refusal spells out
_MAX_SHOWN = 400  # characters of each
_MAX_VALUE = 120  # characters of one side's value
# The memory of a tensor with a format is replaced while it is filled, and that of no view of it.
_TURNED = "{} is {} and strided {}, and such memory cannot be filled"
# How far apart two processors, or two versions of torch, may come out with the same number.
_ROUNDING = 0.02


class Described(NamedTuple):
    """What named tensors are to others.

    Attributes:
        manifest: their manifest.
        tensors: those of its entries that are no aliases, in order, as they are sent.
        sizes: number of bytes of each of these.
    """

    manifest: Manifest
    tensors: list[torch.Tensor]
    sizes: list[int]


def describe(
    tensors: Mapping[str, torch.Tensor],
    layout: str,
    attributes: Mapping[str, Scalar],
    formats: Mapping[str, str],
    meaning: Mapping[str, str] = NO_MEANING,
) -> Described:
    """Make the manifest of named tensors.

    Args:
        tensors: name -> tensor, any dtype, shape and strides.
        layout: the manifest's layout.
        attributes: the manifest's attributes.
        formats: name -> format of those of them that have one.
        meaning: the manifest's meaning.

    Raises:
        LayoutUnsupported: a tensor has no memory yet, or an attribute is no plain value.
    """
    entries: list[TensorEntry] = []
    distinct: list[torch.Tensor] = []
    sizes: list[int] = []
    seen: dict[object, str] = {0: ""}  # address 0: there is no memory
    for name, tensor in tensors.items():
        try:
            alone = seen.setdefault(tensor.data_ptr(), name) is name
        except (RuntimeError, ValueError):
            alone = False
        # As a rule it is. A load waits for this, and a call for each of many tensors takes longer.
        alias_of = None if alone else _alias_of(name, tensor, tensors, seen)
        dtype, shape, nbytes = _kind_of(tensor.dtype, tensor.shape)
        stride = _stride_of(tensor) if layout == PROCESSED else None
        form = formats.get(name)
        if form and stride:
            raise LayoutUnsupported(_TURNED.format(name, form, [*stride]))
        entries.append(TensorEntry(name, dtype, shape, alias_of, stride, form))
        if alias_of is None:
            distinct.append(_as_sent(tensor) if layout == PROCESSED else tensor)
            sizes.append(nbytes)
    try:
        carried = {
            name: plain(f"attribute {name}", value) for name, value in sorted(attributes.items())
        }
    except ValueError as error:
        raise LayoutUnsupported(str(error)) from None
    manifest = Manifest(layout, entries, carried, dict(sorted(meaning.items())))
    return Described(manifest, distinct, sizes)


def match(
    manifest: Manifest,
    tensors: Mapping[str, torch.Tensor],
    required: Collection[str],
    formats: Mapping[str, str],
    meaning: Mapping[str, str] = NO_MEANING,
    made: Mapping[str, Sample] | None = None,
    own: Described | None = None,
) -> list[torch.Tensor]:
    """Find a manifest's tensors among a model's own.

    Args:
        manifest: what the source offers.
        tensors: name -> tensor of this side.
        required: names among them that the manifest must have.
        formats: name -> format of those of them that have one when they are in use.
        meaning: this side's; see `Manifest`.
        made: samples of the tensors that this side has made itself; None: they are not compared.
        own: what `describe` has said of `tensors`; None: it was not asked.

    Returns:
        This side's tensors of the entries that are no aliases, in order, as they are received.

    Raises:
        LayoutUnsupported: the two differ; names the first differing tensors.
    """
    if meant := _different_meaning(manifest.meaning, meaning):
        raise LayoutUnsupported(f"tensors are not made in the same way: {_first(meant)}")
    differences: list[str] = []
    if own is not None and manifest.tensors is own.manifest.tensors and not formats:
        matched = own.tensors
    else:
        matched, differences = _compared(manifest, tensors, required, formats)
    if made is not None:
        differences += _made_differently(manifest.made, made)
    if differences:
        raise LayoutUnsupported(f"tensors differ: {_first(differences)}")
    return matched


def _compared(
    manifest: Manifest,
    tensors: Mapping[str, torch.Tensor],
    required: Collection[str],
    formats: Mapping[str, str],
) -> tuple[list[torch.Tensor], list[str]]:
    """Return what a manifest's entries are here, and how they differ; see `match`."""
    differences: list[str] = []
    matched: list[torch.Tensor] = []
    seen: dict[object, str] = {}
    processed = manifest.layout == PROCESSED
    for entry in manifest.tensors:
        name = entry.name
        tensor = tensors.get(name)
        if tensor is None:
            differences.append(f"{name} is only there")
            continue
        dtype = str(tensor.dtype)
        if tensor.shape != entry.shape or dtype != entry.dtype:
            here = _kind(dtype, tensor.shape)
            there = _kind(entry.dtype, entry.shape)
            differences.append(f"{name} is {here} here and {there} there")
            continue
        stride = _stride_of(tensor) if processed else None
        form = formats.get(name)
        if form and stride:
            differences.append(_TURNED.format(name, form, [*stride]))
            continue
        if (form or stride) != (entry.format or entry.stride):
            here, there = _stored(stride, form), _stored(entry.stride, entry.format)
            differences.append(f"{name} is {here} here and {there} there")
            continue
        alias_of = _alias_of(name, tensor, tensors, seen)
        if alias_of != entry.alias_of:
            differences.append(
                f"{name} shares the memory of {alias_of or 'no other'} here and of "
                f"{entry.alias_of or 'no other'} there"
            )
        elif alias_of is None:
            matched.append(_as_sent(tensor) if processed else tensor)
        elif entry.format is not None and tensor is not tensors[alias_of]:
            # Such memory is replaced while it is filled, and that of one tensor object only.
            differences.append(f"{name} shares memory in {entry.format} with {alias_of}")
    known = {entry.name for entry in manifest.tensors}
    if len(known) < len(manifest.tensors):
        differences.append("a name is there twice")
    # Memory that came under one of its names came: vLLM 0.27 drops a tied head while it loads.
    differences += [
        f"{name} is only here"
        for name in sorted(name for name in required if name not in known)
        if _alias_of(name, tensors[name], tensors, seen) is None
    ]
    return matched, differences


def _different_meaning(there: Mapping[str, str], here: Mapping[str, str]) -> list[str]:
    differences = []
    for field in sorted(here.keys() | there.keys()):
        one, other = here.get(field), there.get(field)
        if one != other:
            # Tables of experts are long; what differs has to be among what is shown.
            pairs = zip(one or "", other or "", strict=False)
            same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
            begin = max(0, same - _MAX_VALUE // 2)
            differences.append(
                f"{field} is {_value(one, begin)} here and {_value(other, begin)} there"
            )
    return differences


def _value(text: str | None, begin: int) -> str:
    if text is None:
        return "nothing"
    return "..." * (begin > 0) + shortened(text[begin:], _MAX_VALUE)


def sample_of(tensor: torch.Tensor) -> Sample:
    """Describe a tensor that both sides make themselves, so that they can compare it.

    Returns:
        Of floating-point numbers some at positions that are ever farther apart: they are in any
        column of a table, and stay where they are when it gets more rows. Of others a digest.
    """
    flat = tensor.detach().reshape(-1)
    if not tensor.is_floating_point():
        return xxhash.xxh3_64_hexdigest(flat.cpu().contiguous().view(torch.uint8).numpy())
    sampled = itertools.takewhile(lambda at: at < flat.numel(), _positions())
    at = torch.tensor([*sampled], device=flat.device)
    values = flat[at].double().tolist()
    return [value if math.isfinite(value) else str(value) for value in values]


def _positions() -> Iterator[int]:
    at = 0
    while True:
        yield at
        at = max(at + 1, at * 9 // 8)


def _made_differently(there: Mapping[str, Sample], here: Mapping[str, Sample]) -> Iterator[str]:
    for name, values in there.items():
        own = here.get(name)
        if own is None:
            # Another version of vLLM may have one number more for each layer.
            if isinstance(values, str) or len(values) > 1:
                yield f"{name} is only there, and does not travel"
        elif isinstance(own, str) or isinstance(values, str):
            if own != values:
                yield f"{name}, which both make themselves, has other values here than there"
        else:
            for index, (one, other) in enumerate(zip(own, values, strict=False)):
                if not _close(one, other):
                    at = next(itertools.islice(_positions(), index, None))
                    yield (
                        f"{name}, which both make themselves, is {one} here and {other} there at "
                        f"element {at}"
                    )
                    break


def _close(one: float | str, other: float | str) -> bool:
    if isinstance(one, str) or isinstance(other, str):
        return one == other
    return math.isclose(one, other, rel_tol=_ROUNDING, abs_tol=_ROUNDING)


def _alias_of(
    name: str,
    tensor: torch.Tensor,
    tensors: Mapping[str, torch.Tensor],
    seen: dict[object, str],
) -> str | None:
    """Return which of the tensors seen before has the same memory entirely, and note this one."""
    try:
        address = tensor.data_ptr()
    except (RuntimeError, ValueError):
        address = 0
    if not address:
        # Asked of each of a hundred thousand tensors, this would take as long as all the rest.
        if tensor.is_meta or isinstance(tensor, UninitializedTensorMixin):
            raise LayoutUnsupported(f"{name} has no memory before its weights are loaded")
        return None
    if (first := seen.setdefault(address, name)) == name:
        return None
    # Rare: views that begin at the same place, or empty ones, of which nothing is shared.
    if tensor.numel() == 0:
        return None
    region = _region(tensor)
    if _region(tensors[first]) != region:
        first = seen.setdefault(region, name)
    return None if first == name else first


def _region(tensor: torch.Tensor) -> object:
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _stride_of(tensor: torch.Tensor) -> tuple[int, ...] | None:
    return None if tensor.is_contiguous() else tensor.stride()


def _as_sent(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor whose strides both sides have, or all of its memory where it has no gaps."""
    if tensor.is_contiguous() or not _has_no_gaps(tensor):
        return tensor
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def _has_no_gaps(tensor: torch.Tensor) -> bool:
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _stored(stride: tuple[int, ...] | None, storage_format: str | None) -> str:
    return storage_format or ("row-major" if stride is None else f"strided {list(stride)}")


# Of many tensors most are of few kinds, and each further question to a tensor takes as long.
@functools.lru_cache(maxsize=4096)
def _kind_of(dtype: torch.dtype, shape: torch.Size) -> tuple[str, tuple[int, ...], int]:
    return str(dtype), tuple(shape), math.prod(shape) * dtype.itemsize


def _kind(dtype: str, shape: Iterable[int]) -> str:
    return f"{dtype.removeprefix('torch.')}{list(shape)}"


def _first(differences: list[str]) -> str:
    # A source chooses the names that it has: bounded and printable before anybody reads them.
    named = "; ".join(shortened(difference, _MAX_SHOWN) for difference in differences[:MAX_NAMED])
    more = len(differences) - MAX_NAMED
    return f"{named}; and {more} more" if more > 0 else named
