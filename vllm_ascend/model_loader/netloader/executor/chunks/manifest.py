"""The manifest: which tensors there are, in which layout and order."""

import contextlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, TypeAlias

import msgspec

from ...errors import ProtocolError
from ...utils import one_line

# A tensor takes up to 12 values, and its attributes some more. Each costs up to 200 bytes in
# memory, and the answer to a join has room for tens of millions.
MAX_VALUES = 1 << 18  # in a manifest, and
MAX_VALUES_PER_TENSOR = 32  # more for each tensor of the client's own model
MAX_VALUES_WITHOUT_MODEL = 1 << 22  # the same for a command
RAW, PROCESSED = "raw", "processed"
NO_MEANING: Mapping[str, str] = MappingProxyType({})

# Python takes 0.1 ms for one of 4,000 digits.
Integer: TypeAlias = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
Scalar: TypeAlias = bool | Integer | float | str | None
# Of a tensor that both sides make themselves: some of its values, or all of them as hexadecimal.
Sample: TypeAlias = list[float | str] | str


class TensorEntry(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One tensor.

    Attributes:
        name: dotted name in the model.
        dtype: as in `torch.bfloat16`.
        shape: its dimensions.
        alias_of: name of the earlier entry whose memory this one shares entirely (tied weights);
            such an entry has no bytes of its own.
        stride: its strides in elements, in the processed layout, where inference goes by them;
            None: those of row-major order without gaps.
        format: how it lies in memory if strides do not tell it, as in `FRACTAL_NZ`.
    """

    name: str
    dtype: str
    shape: tuple[Integer, ...]
    alias_of: str | None = None
    stride: tuple[Integer, ...] | None = None
    format: str | None = None


class Manifest(msgspec.Struct, frozen=True, omit_defaults=True):
    """What some weights consist of.

    Attributes:
        layout: `raw`: tensors as the checkpoint fills them, before post-processing; `processed`:
            as inference uses them, after it; `checkpoint`: as the checkpoint has them, under its
            names.
        tensors: the tensors in order. The bytes of one are its elements: in the order in which they
            lie in memory where `stride` tells it and there are no gaps, else in row-major order,
            whatever its strides in memory.
        attributes: dotted name -> value of the plain attributes that loading has set on modules, in
            the order of their names.
        meaning: what decided what the tensors are and how they lie, such as which expert each slot
            has, and which kernel they were made for: it has to be the same on both sides.
        made: name -> sample of the tensors that both sides make themselves and that do not travel,
            such as tables of a rotary embedding; they are compared, and are no part of the weights
            digest, as processors round differently.
    """

    layout: str
    tensors: list[TensorEntry]
    attributes: dict[str, Scalar]
    meaning: dict[str, str] = {}
    made: dict[str, Sample] = {}

    @property
    def names(self) -> list[str]:
        """The names of the tensors that have bytes of their own, in order."""
        return [entry.name for entry in self.tensors if entry.alias_of is None]


_MANIFESTS = msgspec.json.Decoder(Manifest)
_INVALID = msgspec.MsgspecError, UnicodeDecodeError, RecursionError
_FIELDS = msgspec.json.Decoder(dict[str, msgspec.Raw])


def decode(raw: bytes, tensors: int | None, own: list[TensorEntry] | None = None) -> Manifest:
    """Return the manifest that a source has sent.

    Args:
        raw: as JSON.
        tensors: how many the client's own model has; None: there is none.
        own: the entries of that model, for a manifest with the same ones: to compare a hundred
            thousand takes a small part of the time that it takes to read them.

    Raises:
        ProtocolError: it is no manifest, or has more values than would fit.
    """
    most = MAX_VALUES_WITHOUT_MODEL
    if tensors is not None:
        most = MAX_VALUES + MAX_VALUES_PER_TENSOR * tensors
    # Of a list or an object each value but the first comes after one; those in texts count, too.
    values = raw.count(b",")
    if values > most:
        whose = "" if tensors is None else f" for a model of {tensors} tensors"
        raise ProtocolError(f"manifest has {values} values; allowed: up to {most}{whose}")
    if own is not None:
        with contextlib.suppress(*_INVALID):  # what is wrong is said below
            fields = _FIELDS.decode(raw)
            if fields.get("tensors") == msgspec.Raw(msgspec.json.encode(own)):
                fields["tensors"] = msgspec.Raw(b"[]")
                rest = _MANIFESTS.decode(msgspec.json.encode(fields))
                return msgspec.structs.replace(rest, tensors=own)
    try:
        return _MANIFESTS.decode(raw)
    except _INVALID as error:
        raise ProtocolError(f"not a valid manifest: {one_line(error)}") from None
