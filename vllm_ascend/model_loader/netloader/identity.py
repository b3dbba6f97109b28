"""Who may exchange weights with whom, and the readable difference."""

import hashlib
from collections.abc import Mapping
from typing import Any

import msgspec


class ModelIdentity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that must be equal on both sides before tensors are even compared.

    Attributes:
        group: which of an instance's models: the target, or a speculative draft.
        model: the name given as MODEL, by default the `--model` argument.
        revision: the model revision asked for, if any.
        rank: global rank.
        tp: tensor-parallel size.
        pp: pipeline-parallel size.
        dp: data-parallel size; 1 where experts are not spread over it.
        ep: whether experts are spread over ranks.
        dtype: dtype of the model, as in `torch.bfloat16`.
        quantization: quantization method, if any.
        quantization_config: digest of the quantization's settings.
        config: digest of the model's configuration.
        layout: what the tensors are: `raw` or `processed`.
        vllm_version: in the processed layout the version whose post-processing made them; None in
            the raw layout, where the manifest decides.
    """

    group: str
    model: str
    revision: str | None
    rank: int
    tp: int
    pp: int
    dp: int
    ep: bool
    dtype: str
    quantization: str | None
    quantization_config: str
    config: str
    layout: str
    vllm_version: str | None

    def digest(self) -> str:
        """Return the hex SHA-256 of all fields (a JOIN has no room for the fields themselves)."""
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()

    def differences(self, other: "ModelIdentity") -> list[str]:
        """Return one phrase for each field that differs, with both values."""
        return [
            f"{field} is {getattr(self, field)!r} here and {getattr(other, field)!r} there"
            for field in self.__struct_fields__
            if getattr(self, field) != getattr(other, field)
        ]


def digest_of_settings(settings: Mapping[str, Any]) -> str:
    """Return 16 hex digits that depend on nested settings, but not on the order of their keys.

    Keys that begin with an underscore are left out, and `transformers_version`: they say where
    the settings come from, and who wrote them.

    Args:
        settings: JSON-like values; anything else counts by its `str`.
    """
    canonical = msgspec.json.encode(_plain(settings), enc_hook=str, order="sorted")
    return hashlib.sha256(canonical).hexdigest()[:16]


def _plain(value: Any) -> Any:
    """Return settings with text for keys, and sets in an order that is always the same."""
    if isinstance(value, Mapping):
        return {
            str(key): _plain(item)
            for key, item in value.items()
            if not str(key).startswith("_") and key != "transformers_version"
        }
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    return value
