"""Who may exchange weights with whom, and the readable difference."""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

import msgspec

from .errors import ConfigError
from .utils import plain

MAX_REVISION_BYTES = 128
_COMMIT = "[0-9a-f]{40}"
_SNAPSHOT = re.compile(rf"(?:.*/)?models--([^/]+)/snapshots/({_COMMIT})/?")


class Revision(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which revision of its model an instance has.

    Attributes:
        name: the commit; where that is not known the branch or tag asked for; None: not known.
        pinned: whether a revision other than `main` was asked for.
    """

    name: str | None = None
    pinned: bool = False

    def differs(self, other: "Revision") -> bool:
        """Return whether two instances of a model must not share weights.

        An instance that asked for no revision, or for `main`, takes what its sources have: most
        commits to `main` change no weights. Nor does a folder say which revision it is, and
        whether a tag is a certain commit cannot be said where the tag has not been resolved.
        Commits are compared where both are known and one was asked for, also as a branch or tag.
        """
        return (self.pinned or other.pinned) and self.is_other(other)

    def is_other(self, other: "Revision") -> bool:
        """Return whether both are known, and are not the same."""
        if self.name is None or other.name is None or self.name == other.name:
            return False
        return is_commit(self.name) == is_commit(other.name)


class ModelIdentity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that must be equal on both sides before tensors are even compared.

    Attributes:
        group: which of an instance's models: the target, or a speculative draft.
        model: the name given as MODEL, by default the `--model` argument.
        revision: which revision it is; see `Revision.differs` for when it matters.
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
    revision: Revision
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

    def differences(self, other: "ModelIdentity") -> list[tuple[str, Any, Any]]:
        """Return each field that differs, with this side's value and the other's."""
        here, there = msgspec.structs.asdict(self), msgspec.structs.asdict(other)
        if self.revision.differs(other.revision):
            here["revision"], there["revision"] = self.revision.name, other.revision.name
        else:
            del here["revision"]
        return [(field, here[field], there[field]) for field in here if here[field] != there[field]]


def plain_identity(**fields: Any) -> ModelIdentity:
    """Make an identity of plain types out of what vLLM gives for its fields.

    Raises:
        ConfigError: a message cannot carry a field; names it.
    """
    revision: Revision = fields.pop("revision")
    try:
        made = {field: plain(field, value) for field, value in fields.items()}
        name = plain("revision", revision.name)
        return msgspec.convert(
            made | {"revision": {"name": name, "pinned": revision.pinned}}, ModelIdentity
        )
    except (ValueError, msgspec.ValidationError) as error:
        raise ConfigError(f"the model's identity: {error}") from None


def revision_name(asked: str) -> str:
    """Return a revision that was asked for, if it is short enough.

    Raises:
        ConfigError: it is too long.
    """
    if len(json.dumps(asked)) - 2 > MAX_REVISION_BYTES:
        raise ConfigError(
            f"--revision is {asked[:MAX_REVISION_BYTES]!r}...; allowed: a name of up to "
            f"{MAX_REVISION_BYTES} bytes (as JSON)"
        )
    return asked


def is_commit(revision: str) -> bool:
    """Return whether a revision is the hash of a commit."""
    return re.fullmatch(_COMMIT, revision) is not None


def cached_snapshot(path: str) -> tuple[str, str] | None:
    """Return the model's name and the commit that a folder of the Hub's cache stands for."""
    match = _SNAPSHOT.fullmatch(path)
    # The cache writes org/name as org--name, and no name on the Hub has two hyphens in a row.
    return (match[1].replace("--", "/"), match[2]) if match else None


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
