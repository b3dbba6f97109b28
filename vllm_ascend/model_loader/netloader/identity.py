"""Who may exchange weights with whom, and the readable difference."""

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any, TypeAlias

import msgspec

from .errors import ConfigError
from .utils import plain

CHECKPOINT = "checkpoint"  # the layout of a folder, which no instance has
OF_EACH_TENSOR = "that of each tensor"
MAX_REVISION_BYTES = 128
MAX_CONFIG_BYTES = 16 << 10  # of JSON, all settings together
MAX_SETTING_BYTES = 512  # of JSON, the value of one
_COMMIT = "[0-9a-f]{40}"
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_LARGEST_INT = 1 << 53
# Settings that neither weights nor their use depend on: where a configuration comes from, who wrote
# it, how it is trained, what is generated, what is returned. A setting that is not known counts.
_MEANINGLESS = re.compile(
    r"""
    _.* | transformers_version | torch_dtype | dtype | auto_map | tokenizer_class
    | attn_implementation | unsloth_version | unsloth_fixed | torchscript | use_bfloat16
    | gradient_checkpointing | finetuning_task | task_specific_params | id2label | label2id
    | initializer_(range|factor|std) | init_std | .*(dropout|pdrop|drop_path|layerdrop).*
    | router_aux_loss_coef | router_z_loss_coef | router_jitter_noise | aux_loss_alpha | seq_aux
    | pretraining_tp | chunk_size_feed_forward | use_cache | return_dict(_in_generate)?
    | output_(attentions|hidden_states|router_logits|scores)
    | max_length | min_length | max_new_tokens | do_sample | early_stopping | num_beams
    | num_beam_groups | diversity_penalty | typical_p | repetition_penalty | length_penalty
    | (encoder_)?no_repeat_ngram_size | bad_words_ids | num_return_sequences
    | remove_invalid_values | exponential_decay_length_penalty | forced_[be]os_token_id
    | (begin_)?suppress_tokens | max_position(_embeddings)?
    """,
    re.VERBOSE,
)
_OF_QUANTIZATION = ("quantization_config", "compression_config")
_VERSION = re.compile(r"[0-9]+(\.[0-9a-z+]+)+")
# Rotary embeddings of these types are made from the longest position, too.
_SCALED_BY_LENGTH = ("dynamic", "longrope")
Settings: TypeAlias = dict[str, Any]
# Fields that say which part of the weights a rank has, and as what.
PLACEMENT = {"rank", "tp", "pp", "pcp", "dp", "dp_rank", "ep", "ep_rank", "dtype"}
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
        rank: which part of the weights: the global rank, or, where data-parallel replicas hold the
            same weights, the rank inside of the replica.
        tp: tensor-parallel size.
        pp: pipeline-parallel size.
        pcp: prefill-context-parallel size.
        dp: data-parallel size; 1 where replicas hold the same weights.
        dp_rank: data-parallel rank; 0 where replicas hold the same weights.
        ep: expert-parallel size; 1 where experts are not spread over ranks.
        ep_rank: expert-parallel rank.
        dtype: dtype of the model, as in `torch.bfloat16`; of a folder `OF_EACH_TENSOR`.
        quantization: quantization method, if any.
        config: dotted name -> value of the settings in the model's configuration.
        defaults: of the settings that the configuration's class has filled in, or has under another
            name, too. A setting that only one side knows makes no difference if it is one of these.
        layout: what the tensors are: `raw` or `processed`; of a folder `checkpoint`.
        vllm_version: in the processed layout the version whose post-processing made them; None in
            the raw layout, where the manifest decides.
    """

    group: str
    model: str
    revision: Revision
    rank: int
    tp: int
    pp: int
    pcp: int
    dp: int
    dp_rank: int
    ep: int
    ep_rank: int
    dtype: str
    quantization: str | None
    config: Settings
    defaults: Settings
    layout: str
    vllm_version: str | None

    def of_checkpoint(self) -> "ModelIdentity":
        """Return it without what decides which part of a checkpoint a rank has, and as what."""
        whole = {"rank": 0, "tp": 1, "pp": 1, "pcp": 1, "dp": 1, "dp_rank": 0, "ep": 1}
        return msgspec.structs.replace(
            self, **whole, ep_rank=0, dtype="", layout="", vllm_version=None
        )

    def as_told_by(self, folder: "ModelIdentity") -> "ModelIdentity":
        """Return it with only as much as a folder with a checkpoint can tell of it.

        A folder has settings as they are written, before any are filled in, renamed or added.
        """
        settings = self.defaults | self.config
        known = {name: settings[name] for name in settings if name in folder.defaults}
        return msgspec.structs.replace(
            self,
            quantization=folder.quantization,
            config=known,
            defaults={},
            layout=folder.layout,
            vllm_version=None,
        )

    def differences(self, other: "ModelIdentity") -> list[tuple[str, Any, Any]]:
        """Return each field that differs, with this side's value and the other's."""
        here, there = msgspec.structs.asdict(self), msgspec.structs.asdict(other)
        if self.revision.differs(other.revision):
            here["revision"], there["revision"] = self.revision.name, other.revision.name
        else:
            del here["revision"]
        differ = [
            (field, here[field], there[field])
            for field in here
            if field not in ("config", "defaults") and here[field] != there[field]
        ]
        ours, theirs = self.defaults | self.config, other.defaults | other.config
        for name in sorted(ours.keys() | theirs.keys()):
            one, another = ours.get(name), theirs.get(name)
            known_to_both = name in ours and name in theirs
            if one != another and (known_to_both or name in self.config or name in other.config):
                differ.append((f"config.{name}", one, another))
        return differ


def plain_identity(**fields: Any) -> ModelIdentity:
    """Make an identity of plain types out of what vLLM gives for its fields.

    Raises:
        ConfigError: a message cannot carry a field; names it.
    """
    revision: Revision = fields.pop("revision")
    settings = {field: fields.pop(field) for field in ("config", "defaults")}
    try:
        made = {field: plain(field, value) for field, value in fields.items()}
        name = plain("revision", revision.name)
        return msgspec.convert(
            made | settings | {"revision": {"name": name, "pinned": revision.pinned}},
            ModelIdentity,
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


def flattened(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of nested settings that decide weights or their use, by dotted names.

    All settings do but those known not to. A value is what JSON has; one of more than
    `MAX_SETTING_BYTES` is a digest of it, and so are the largest groups of settings that make the
    whole larger than `MAX_CONFIG_BYTES`.
    """
    found = {name: _bounded(value) for name, value in _flat(_meaningful(_jsonable(settings)), "")}
    by_group: dict[str, dict[str, Any]] = {}
    for name, value in found.items():
        by_group.setdefault(name.partition(".")[0], {})[name] = value
    for group in sorted(by_group, key=lambda group: -len(_json(by_group[group]))):
        if len(_json(found)) <= MAX_CONFIG_BYTES:
            return found
        whole = _json(by_group[group])
        digest = _digest(whole)
        if len(whole) <= len(_json({group: digest})):
            break  # nor are those to come any larger
        for name in by_group[group]:
            del found[name]
        found[group] = digest
    return found if len(_json(found)) <= MAX_CONFIG_BYTES else {"*": _digest(_json(found))}


def _meaningful(value: Any) -> Any:
    """Return settings without those that neither weights nor their use depend on."""
    if isinstance(value, list):
        return [_meaningful(item) for item in value]
    if not isinstance(value, dict):
        return value
    kept = {
        key: _of_quantization(item) if key in _OF_QUANTIZATION else _meaningful(item)
        for key, item in value.items()
        if not _MEANINGLESS.fullmatch(key)
    }
    rope = kept.get("rope_parameters")
    if isinstance(rope, dict):
        # Transformers 5 gathers here what used to stand beside it; vLLM reads it here only.
        for former in ("rope_theta", "rope_scaling", "partial_rotary_factor"):
            kept.pop(former, None)
        if "rope_type" in rope:
            rope.pop("type", None)
        if rope.get("rope_type") in _SCALED_BY_LENGTH:
            kept["max_position_embeddings"] = value.get("max_position_embeddings")
    return kept


def _of_quantization(settings: Any) -> Any:
    """Return a method's settings, of which all count but the version of what has written them."""
    if isinstance(settings, dict) and _VERSION.fullmatch(str(settings.get("version"))):
        return {key: value for key, value in settings.items() if key != "version"}
    return settings


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {_text(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(map(_text, value))
    if isinstance(value, Enum):
        return _jsonable(value.value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int) and abs(value) <= _LARGEST_INT:
        return int(value)
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    return _text(value)


def _text(value: Any) -> str:
    """Return a value as text that JSON can carry, and that is the same in all processes."""
    text = _ADDRESS.sub("", str(value))
    return text.encode(errors="backslashreplace").decode()


def _flat(settings: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, None if value == {} else value


def _bounded(value: Any) -> Any:
    encoded = _json(value)
    return value if len(encoded) <= MAX_SETTING_BYTES else _digest(encoded)


def _json(value: Any) -> bytes:
    return msgspec.json.encode(value, order="sorted")


def _digest(encoded: bytes) -> str:
    return f"sha256 {hashlib.sha256(encoded).hexdigest()[:16]} of {len(encoded)} bytes"
