"""What differs between vLLM versions, and the vLLM internals that have no public name."""

import contextlib
import copy
import functools
import importlib.metadata
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import vllm
from huggingface_hub import try_to_load_from_cache
from torch import nn
from torch.distributed import PrefixStore
from vllm import envs
from vllm.config import ModelConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.reload import layerwise
from vllm.model_executor.model_loader.reload import meta as layerwise_meta
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models import adapters
from vllm.platforms import current_platform

from .agreement import Ranks
from .changes import After, Change
from .executor.chunks.manifest import PROCESSED, RAW
from .identity import (
    ModelIdentity,
    Revision,
    cached_snapshot,
    flattened,
    plain_identity,
    revision_name,
)
from .interaction.api import DRAFT_GROUP, TARGET_GROUP
from .utils import LOAD_FORMAT

# Integers that say which expert is where: of vLLM, of its EPLB, of vLLM Ascend; not how busy it is.
_EXPERT_MAP = re.compile(r"^(?!.*load).*(expert_|log2phy|phy2log|physical|logical)")
_DEEPEST_KERNEL = 2
# Files that vLLM's default loader reads weights from, and the parts of one that was split.
_WEIGHTS = re.compile(r"(?!training_args|optimizer|scheduler|scaler).*\.(safetensors|bin|pt)")
_SHARD = re.compile(r"(.+)-\d+-of-(\d+)(\.(?:safetensors|bin|pt))")


def is_cpu_platform() -> bool:
    """Return whether vLLM runs models on the CPU in this process."""
    return bool(current_platform.is_cpu())


@contextlib.contextmanager
def default_dtype_kept() -> Iterator[None]:
    """Leave torch's default dtype as it was, also when making or loading a model fails.

    vLLM sets the model's, and up to 0.27 leaves it behind after an error.
    """
    before = torch.get_default_dtype()
    try:
        yield
    finally:
        torch.set_default_dtype(before)


_ROTARY_OF_VLLM_ASCEND = "vllm_ascend.ops.rotary_embedding"


def remember_state(vllm_config: VllmConfig, model_config: ModelConfig) -> Callable[[], None]:
    """Remember what making a model changes outside of it.

    Layers enter themselves by name into containers of the compilation config, and refuse a name
    that is taken; which containers there are depends on the version, so all of them are remembered.
    Configurations of the model change as well: names of layers that are not quantized get vLLM's
    names, which mapped once more may be others, and some drafts put their layers' settings behind
    those of the target.

    Args:
        vllm_config: the instance's configuration, before the model is made.
        model_config: the model's.

    Returns:
        A function that brings the state back as it is now.
    """
    config = vllm_config.compilation_config
    assert is_dataclass(config)
    before = {
        field.name: value.copy()
        for field in fields(config)
        if isinstance(value := getattr(config, field.name, None), dict | list | set)
    }
    # A model that is filled shares no rotary table with one in use, nor with one that is made after
    # it: what a source sends is in the table before it is checked.
    _rotary_tables().clear()
    recorded = _recorded_tables()
    experts_before = list(_experts_of_vllm_ascend())
    counted = {kind: kind.moe_counter for kind in _counting_experts()}
    of_model = (vllm_config.quant_config, model_config.hf_config, model_config.hf_text_config)
    give_back = [_remembered(one) for one in of_model if one is not None]

    def restore() -> None:
        for one in give_back:
            one()
        _rotary_tables().clear()
        for name in _recorded_tables():
            setattr(sys.modules[_ROTARY_OF_VLLM_ASCEND], name, recorded.get(name))
        _experts_of_vllm_ascend()[:] = experts_before
        for kind in _counting_experts():
            kind.moe_counter = counted.get(kind, -1)
        for name, contents in before.items():
            container: Any = getattr(config, name)
            container.clear()
            if isinstance(container, list):
                container.extend(contents)
            else:
                container.update(contents)

    return restore


def _remembered(configuration: object) -> Callable[[], None]:
    """Return what gives a configuration, and those inside of it, the values that they have now."""
    values = {name: _copied(value) for name, value in vars(configuration).items()}
    inside = [_remembered(value) for value in values.values() if hasattr(value, "to_dict")]

    def restore() -> None:
        now = vars(configuration)
        now.update({name: _copied(value) for name, value in values.items()})
        for name in now.keys() - values.keys():
            del now[name]
        for one in inside:
            one()

    return restore


def _copied(value: Any) -> Any:
    """Copy containers, and leave what they hold as it is."""
    if isinstance(value, dict):
        copied = copy.copy(value)
        copied.update({key: _copied(one) for key, one in value.items()})
        return copied
    if isinstance(value, list):
        return [*map(_copied, value)]
    return copy.copy(value) if isinstance(value, set) else value


def _rotary_tables() -> dict[object, object]:
    """Return where vLLM keeps the rotary embeddings of all models of the process."""
    module = sys.modules.get("vllm.model_executor.layers.rotary_embedding")
    found: dict[object, object] = getattr(module, "_ROPE_DICT", {})
    return found


def _recorded_tables() -> dict[str, object]:
    """Return the rotary tables that vLLM Ascend keeps of the first model, by attribute."""
    module = sys.modules.get(_ROTARY_OF_VLLM_ASCEND)
    names = ("_cos_sin_cache", "_cos_cache", "_sin_cache")
    return {name: getattr(module, name) for name in names if hasattr(module, name)}


def _experts_of_vllm_ascend() -> list[nn.Module]:
    """Return the list in which vLLM Ascend's expert layers enter themselves, if it is there."""
    adaptor = sys.modules.get("vllm_ascend.eplb.adaptor.vllm_adaptor")
    found: list[nn.Module] = getattr(
        getattr(adaptor, "VllmEplbAdaptor", None), "_registered_moe_layers", []
    )
    return found


def _counting_experts() -> list[Any]:
    """Return the classes of vLLM Ascend that count their layers, from -1 on.

    A layer's number is where its experts stand in a file that places them.
    """
    module = sys.modules.get("vllm_ascend.ops.fused_moe.fused_moe")
    kinds = [kind for kind in getattr(module, "__dict__", {}).values() if isinstance(kind, type)]
    return [kind for kind in kinds if "moe_counter" in vars(kind)]


def identity_of(
    vllm_config: VllmConfig, model_config: ModelConfig, model: str, rank: int, layout: str
) -> ModelIdentity:
    """Work out who a model is.

    Args:
        vllm_config: the instance's configuration.
        model_config: the model's; the instance's own, or that of its speculative draft.
        model: the name to go by.
        rank: global rank.
        layout: layout in which its tensors are exchanged.

    Raises:
        ConfigError: a field is nothing that a message can carry.
    """
    parallel = vllm_config.parallel_config
    draft = model_config is _draft_of(vllm_config)
    config, defaults = _settings_of(model_config)
    # Replicas of a dense model hold the same tensors; experts are spread over all of them.
    moe = getattr(model_config, "is_moe", True)
    dp, dp_rank = 1, 0
    if moe and parallel.data_parallel_size > 1:
        dp, dp_rank = parallel.data_parallel_size, parallel.data_parallel_index
    pcp = getattr(parallel, "prefill_context_parallel_size", 1)
    across = parallel.tensor_parallel_size * pcp  # ranks of a pipeline stage
    spread = moe and bool(parallel.enable_expert_parallel)
    size = _ranks_of_replica(vllm_config)
    return plain_identity(
        group=DRAFT_GROUP if draft else TARGET_GROUP,
        model=model,
        revision=revision_of(model_config),
        rank=dp_rank * size + rank % size,
        tp=parallel.tensor_parallel_size,
        pp=parallel.pipeline_parallel_size,
        pcp=pcp,
        dp=dp,
        dp_rank=dp_rank,
        ep=dp * across if spread else 1,
        ep_rank=dp_rank * across + rank % across if spread else 0,
        dtype=str(model_config.dtype),
        quantization=model_config.quantization,
        config=config,
        defaults=defaults,
        layout=layout,
        vllm_version=None if layout == RAW else _post_processing(),
    )


def _settings_of(model_config: ModelConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings of a model by dotted names: those that were set, and the defaults.

    Which defaults a configuration writes out depends on the version of transformers.
    """
    config = model_config.hf_config
    settings, defaults = config.to_dict(), _defaults_of(config)
    online = getattr(model_config, "quantization_config", None)
    if online is not None:
        settings["online_quantization"] = str(online)
    found, of_class = flattened(settings), flattened(defaults)
    aliases = getattr(config, "attribute_map", {})
    # Which of a setting's two names is written depends on the version, too.
    either = {name for pair in aliases.items() for name in pair}
    found |= {alias: found[name] for alias, name in aliases.items() if name in found}
    filled = {
        name: value
        for name, value in found.items()
        if name in either or (name in of_class and of_class[name] == value)
    }
    return {name: found[name] for name in found if name not in filled}, filled


def _defaults_of(config: Any) -> dict[str, Any]:
    """Return what the classes of a configuration and of those inside of it fill in."""
    try:
        defaults: dict[str, Any] = type(config)().to_dict()
    except Exception:  # the class needs arguments
        defaults = {}
    inside = {key: value for key, value in vars(config).items() if hasattr(value, "to_dict")}
    return defaults | {key: _defaults_of(value) for key, value in inside.items()}


def worker_of(vllm_config: VllmConfig, rank: int) -> int:
    """Return a number that no other worker of an instance has, whichever replica it belongs to.

    Data-parallel replicas of a dense model each begin to count their ranks at 0. Those that a
    launcher from outside has started count them in one row, and do not know that they are several.

    Args:
        vllm_config: the instance's configuration.
        rank: global rank.
    """
    size = _ranks_of_replica(vllm_config)
    replica = max(int(vllm_config.parallel_config.data_parallel_index), rank // size)
    return replica * size + rank % size


def _ranks_of_replica(vllm_config: VllmConfig) -> int:
    parallel = vllm_config.parallel_config
    pcp = getattr(parallel, "prefill_context_parallel_size", 1)
    return int(parallel.tensor_parallel_size * parallel.pipeline_parallel_size * pcp)


def why_weights_move(vllm_config: VllmConfig) -> str:
    """Say why a rank's weights are not its own, if that is so.

    vLLM Ascend's `layer_sharding` keeps each layer on one rank, which sends it when it is used.
    """
    additional = getattr(vllm_config, "additional_config", None)
    if not isinstance(additional, dict) or not additional.get("layer_sharding"):
        return ""
    return "layer_sharding in --additional-config lets weights move from rank to rank"


def why_experts_move(vllm_config: VllmConfig, model_config: ModelConfig) -> str:
    """Say why nobody can know which expert a tensor of a model is, if that is so."""
    if not getattr(model_config, "is_moe", True):
        return ""
    parallel = vllm_config.parallel_config
    additional = getattr(vllm_config, "additional_config", None)
    of_ascend = (additional.get("eplb_config") if isinstance(additional, dict) else None) or {}
    if getattr(parallel, "enable_elastic_ep", False):
        setting = "--enable-elastic-ep"
    elif getattr(parallel, "enable_eplb", False):
        setting = "--enable-eplb"
    elif of_ascend.get("dynamic_eplb") or of_ascend.get("expert_map_record_path"):
        setting = "eplb_config in --additional-config"
    else:
        return ""
    return f"{setting} lets experts move from rank to rank while the model is in use"


def meaning_of(model: nn.Module, layout: str) -> dict[str, str]:
    """Say what decides the meaning of a model's tensors beside their names and kinds.

    In both layouts it is which expert each slot of an expert layer has. In the processed layout it
    is also what post-processing went by: the class of each layer's quantization method, the kernel
    or backend that it has chosen, which tells how weights are packed and whether the halves of
    `w13` are swapped, and the type of the KV cache, which tells where its scales come from.

    Args:
        model: as its tensors are exchanged: not yet post-processed in the raw layout.
        layout: RAW or PROCESSED.

    Returns:
        Path of a kind of layer and name -> value; `*` stands for the layers' numbers.
    """
    found: dict[str, dict[str, list[str]]] = {}
    for path, layer in model.named_modules():
        kind, numbers = re.sub(r"\d+", "*", path), ".".join(re.findall(r"\d+", path))
        named = _placement(layer)
        if layout == PROCESSED:
            named |= _made_for(layer)
        for name, value in named.items():
            found.setdefault(f"{kind}.{name}", {}).setdefault(value, []).append(numbers)
    return {
        field: "; ".join(
            value if len(values) == 1 else f"{value} in {' '.join(numbers)}"
            for value, numbers in values.items()
        )
        for field, values in found.items()
    }


def _placement(layer: nn.Module) -> dict[str, str]:
    """Return which experts a layer has where, if it has but some of them, or some twice."""
    tensors = {
        name: value
        for name, value in (vars(layer) | layer._buffers).items()
        if isinstance(value, torch.Tensor)
        and not (value.is_meta or value.is_floating_point() or value.dtype == torch.int8)
    }
    maps = {
        name: " ".join(map(str, tensor.flatten().tolist()))
        for name, tensor in tensors.items()
        if _EXPERT_MAP.search(name)
    }
    here = getattr(layer, "local_num_experts", None)
    if not maps and here != getattr(layer, "global_num_experts", here):
        # No map is left of the placement but the setting that it was made by.
        names = ("expert_placement_strategy", "ep_rank", "ep_size")
        return {name: str(getattr(layer, name, None)) for name in names}
    return maps


def _made_for(layer: nn.Module) -> dict[str, str]:
    """Return what a layer's post-processed tensors were made for."""
    named = {
        name: _described(value, 0)
        for name in ("quant_method", "scheme")
        if (value := getattr(layer, name, None)) is not None
    }
    for name in ("kv_cache_dtype", "calculate_kv_scales"):
        if (value := getattr(layer, name, None)) is not None:
            named[name] = str(value)
    impl = getattr(layer, "impl", None)
    if any(isinstance(value, torch.Tensor) for value in getattr(impl, "__dict__", {}).values()):
        named["impl"] = type(impl).__qualname__
    return named


def _described(value: object, depth: int) -> str:
    """Name a quantization method or kernel, and the kernels and backends that it has chosen."""
    chosen = []
    for name, item in sorted(getattr(value, "__dict__", {}).items()):
        if name.startswith("_") or name.endswith("config") or isinstance(item, torch.Tensor):
            continue
        if isinstance(item, Enum):
            chosen.append(f"{name}={item.name}")
        elif isinstance(item, type):
            chosen.append(f"{name}={item.__qualname__}")
        elif _is_kernel(item) and depth < _DEEPEST_KERNEL:
            chosen.append(f"{name}={_described(item, depth + 1)}")
    return type(value).__qualname__ + (f"({', '.join(chosen)})" if chosen else "")


def _is_kernel(value: object) -> bool:
    kind = type(value)
    ours = kind.__module__.startswith(("vllm.", "vllm_ascend."))
    return ours and not kind.__name__.endswith("Config")


def name_of(model_config: ModelConfig) -> str:
    """Return the name that a model was asked for by.

    With HF_HUB_OFFLINE vLLM puts the folder of the Hub's cache in its place, and for object storage
    a folder with the model's configuration.
    """
    asked = getattr(model_config, "model_weights", "") or model_config.model
    snapshot = cached_snapshot(asked)
    return snapshot[0] if snapshot else str(asked)


def folder_of(model_config: ModelConfig) -> Path | None:
    """Return the folder of a model, which may be one of the Hub's cache, if there is one."""
    model = model_config.model
    if os.path.isdir(model):
        return Path(model)
    with contextlib.suppress(ValueError):  # the model is no name of the Hub's
        cached = try_to_load_from_cache(
            model, "config.json", revision=model_config.revision or None
        )
        if isinstance(cached, str):
            return Path(cached).parent
    return None


def revision_of(model_config: ModelConfig) -> Revision:
    """Return which revision of a model an instance has.

    Raises:
        ConfigError: the revision asked for is too long to travel, and its commit is not known.
    """
    asked = model_config.revision
    pinned = asked not in (None, "", "main")
    commit = _commit_of(model_config)
    return Revision(commit or (revision_name(asked) if pinned else None), pinned)


def _commit_of(model_config: ModelConfig) -> str | None:
    """Return the commit of a model that comes from the Hub, if it can be told."""
    model, revision = model_config.model, model_config.revision
    if snapshot := cached_snapshot(model):
        return snapshot[1]
    # Since vLLM 0.30 a revision is a str, what was asked for, that also knows its commit.
    if resolved := getattr(revision, "resolved", None):
        return str(resolved)
    if os.path.exists(model) or envs.VLLM_USE_MODELSCOPE:
        return None
    # vLLM has read the configuration by now, which is why it is in the cache.
    for file in ("config.json", "params.json"):
        with contextlib.suppress(ValueError):  # the model is no name of the Hub's
            cached = try_to_load_from_cache(model, file, revision=revision or None)
            if isinstance(cached, str) and (snapshot := cached_snapshot(os.path.dirname(cached))):
                return snapshot[1]
    return None


def has_checkpoint(model_config: ModelConfig) -> bool:
    """Return whether vLLM's default loader would find all weights on this machine's disk.

    That is a folder with all files of a checkpoint, which may be one of the Hub's cache.
    """
    folder = str(getattr(model_config, "model_weights", "") or model_config.model)
    if not os.path.isdir(folder):
        if envs.VLLM_USE_MODELSCOPE:
            return False
        try:
            revision = model_config.revision or None
            cached = try_to_load_from_cache(folder, "config.json", revision=revision)
        except ValueError:  # no name of the Hub's
            return False
        if not isinstance(cached, str):
            return False
        folder = os.path.dirname(cached)
    return _is_checkpoint(Path(folder))


def _is_checkpoint(folder: Path) -> bool:
    """Return whether a folder has all files of a checkpoint, as far as their names tell."""
    try:
        files = {path.name for path in folder.iterdir() if path.exists()}  # links may lead nowhere
        wanted = {
            name
            for index in files
            if index.endswith(".index.json")
            for name in json.loads((folder / index).read_bytes())["weight_map"].values()
        }
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        return False
    for match in filter(None, map(_SHARD.fullmatch, files)):
        first, count, suffix = match.groups()
        numbers = range(1, int(count) + 1)
        wanted |= {f"{first}-{number:0{len(count)}}-of-{count}{suffix}" for number in numbers}
    return wanted <= files and any(map(_WEIGHTS.fullmatch, files))


def read_through(
    loader: DefaultModelLoader,
    model: nn.Module,
    model_config: ModelConfig,
    weights: Iterator[tuple[str, torch.Tensor]],
) -> None:
    """Let vLLM's default loader fill a model with an iterator in the place of files' tensors."""
    other: Any = copy.copy(loader)
    other.get_all_weights = lambda *_: weights
    other.counter_before_loading_weights = time.perf_counter()
    other.load_weights(model, model_config)


def groups_to_come(vllm_config: VllmConfig, loaded: ModelIdentity) -> list[str]:
    """Return the groups of the models that this process loads with NetLoader after a model."""
    if loaded.group != TARGET_GROUP or _draft_of(vllm_config) is None:
        return []
    own = getattr(vllm_config.speculative_config, "draft_load_config", None)
    return [DRAFT_GROUP] if own is None or own.load_format == LOAD_FORMAT else []


def ranks_of(vllm_config: VllmConfig, loaded: ModelIdentity) -> Ranks:
    """Return the ranks that load a model together: those of it in torch's process group.

    Replicas that share experts are as a rule in one group, and with elastic expert parallelism not.
    Other replicas are instances of their own, also where a launcher from outside has put them into
    one group.
    """
    group, size = torch.distributed.group.WORLD, _ranks_of_replica(vllm_config)
    world, together = group.size() if group is not None else 1, loaded.dp * size
    first, count = 0, together
    if world == size:
        first, count = loaded.rank // size * size, size
    worker = worker_of(vllm_config, group.rank() if group is not None else 0)
    if group is None or world % count:
        return Ranks(loaded.rank, [loaded.rank], loaded.group, worker=worker, workers=[worker])
    store = group.get_group_store()
    if world > count:
        store = PrefixStore(f"netloader instance {group.rank() // count}", store)
    ranks = [*range(first, first + count)]
    workers = [worker - loaded.rank + rank for rank in ranks]
    if loaded.group == DRAFT_GROUP:
        # Only the last pipeline stage has the draft; ranks count by replica, then by stage.
        before = size - size // vllm_config.parallel_config.pipeline_parallel_size
        ranks = [rank for rank in ranks if rank % size >= before]
    return Ranks(loaded.rank, ranks, loaded.group, store, worker=worker, workers=workers)


def _draft_of(vllm_config: VllmConfig) -> ModelConfig | None:
    """Return the configuration of the draft model, if there is one.

    Methods that draft without a model, such as ngram, have the target's in its place.
    """
    speculative = vllm_config.speculative_config
    if speculative is None or speculative.draft_model_config is speculative.target_model_config:
        return None
    return speculative.draft_model_config


def _post_processing() -> str:
    """Name the software that decides what post-processing makes of weights."""
    versions = [f"vllm {vllm.__version__}"]
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        versions.append(f"vllm-ascend {importlib.metadata.version('vllm-ascend')}")
    if torch.cuda.is_available():
        # Which kernels there are, and with them the order of packed weights, depends on it.
        major, minor = torch.cuda.get_device_capability()
        versions.append(f"compute capability {major}.{minor}")
    return ", ".join(versions)


def why_no_reload_from_sources(device: torch.device) -> str:
    """Say why a model in use cannot be filled from sources, if that is so.

    It would take memory for all weights a second time, as nothing may change before all are here.
    """
    if device.type == "cpu":
        return ""
    return f"a model in use on {device.type} is not filled from sources, only one on a CPU is"


def why_no_reload(model: nn.Module, device: torch.device) -> str:
    """Name a layer that vLLM cannot reload in place, if there is one.

    On CPUs, kernels of quantized layers and of experts hold packed copies of, or pointers to, their
    tensors. vLLM's layerwise reload leaves them as they are: the layer then computes with old
    weights or with freed memory (seen with vLLM 0.27.1 and 0.32.0, with its own loader). The same
    happens to a buffer that was made as a view of a parameter which has other memory by now, as
    those of Mamba's convolutions.
    """
    if device.type != "cpu":
        return ""
    safe = (UnquantizedLinearMethod, UnquantizedEmbeddingMethod, BaseKVCacheMethod)
    for path, layer in model.named_modules():
        method = getattr(layer, "quant_method", None)
        if isinstance(method, QuantizeMethodBase) and not isinstance(method, safe):
            return f"vLLM cannot reload {path} ({type(method).__name__}) in place on a CPU"
        for name in _views(layer):
            memory = layer.get_buffer(name).untyped_storage().data_ptr()
            if memory not in {one.untyped_storage().data_ptr() for one in layer.parameters()}:
                return f"vLLM cannot reload {path}.{name} (a view of a weight) in place on a CPU"
    return ""


def why_no_checkpoint(model: nn.Module) -> str:
    """Name a layer that keeps a model from loading a checkpoint while it is in use, if one does.

    Older vLLM finds no layer behind that of a LoRA adapter (seen with 0.27.1).
    """
    for path, layer in model.named_modules():
        wrapped = isinstance(getattr(layer, "base_layer", None), nn.Module)
        if wrapped and not hasattr(type(layer), "load_weights"):
            return f"this vLLM cannot load {path} ({type(layer).__name__}) from a checkpoint"
    return ""


def _views(layer: nn.Module) -> list[str]:
    """Return the buffers that were views of parameters when a layer was made.

    vLLM's reload takes no note of them.
    """
    info = layerwise.LAYERWISE_INFO.get(layer)
    if info is None:
        return []
    noted = info.restore_metadata[1].keys() | layerwise_meta.SKIP_TENSORS
    live = {name for name, buffer in layer._buffers.items() if buffer is not None}
    return sorted((layer._non_persistent_buffers_set & live) - noted)


@contextlib.contextmanager
def modules_without_files() -> Iterator[None]:
    """Have models made with the modules whose weights vLLM reads while it makes them.

    Those are the Dense modules of Sentence Transformers. vLLM leaves one out where its folder has
    no weights; here it is made, so that it can be filled from a source.
    """
    read = getattr(adapters, "_load_dense_weights", None)
    if read is None:
        yield
        return

    def read_or_leave(*arguments: Any, **named: Any) -> bool:
        read(*arguments, **named)
        return True

    adapters._load_dense_weights = read_or_leave
    try:
        yield
    finally:
        adapters._load_dense_weights = read


def places_of(model: nn.Module) -> tuple[dict[str, torch.Tensor], set[str]]:
    """Return where a reload puts the raw tensors of a model in use, which is left as it is.

    Returns:
        Name -> uninitialized memory of its own for each raw tensor of the module tree, shared where
        the model shares it; and the names of the parameters and persistent buffers among them.
    """
    tensors: dict[str, torch.Tensor] = {}
    required: set[str] = set()
    memory: dict[int, torch.Tensor] = {}
    for path, layer in model.named_modules(remove_duplicate=False):
        info = layerwise.LAYERWISE_INFO.get(layer)
        live = layerwise.get_layer_tensors(layer)
        recorded = info.restore_metadata[0] | info.restore_metadata[1] if info else {}
        kept = {name: live[name] for name in live.keys() & layerwise_meta.SKIP_TENSORS}
        for name, tensor in ((recorded | kept) if info else live).items():
            full = f"{path}.{name}" if path else name
            same = id(live.get(name, tensor))
            # A tied tensor that has not been processed is one object in several layers.
            if same not in memory:
                memory[same] = torch.empty(tensor.shape, dtype=tensor.dtype)
            tensors[full] = memory[same]
            if name not in layer._non_persistent_buffers_set:
                required.add(full)
    return tensors, required


def take_over_load(model: nn.Module, weights: object, fill: Callable[[], set[str]]) -> None:
    """Have a function called in the place of a model's `load_weights` when that gets an iterator.

    A model may go on computing when its iterator is at its end, as rerankers do. What is filled
    in from a source is what came of it there.

    Args:
        model: the model.
        weights: the iterator that the call is known by.
        fill: fills the model and returns the names that it has filled.
    """
    load = model.load_weights
    assert callable(load)

    def load_weights(given: Iterable[tuple[str, torch.Tensor]]) -> Any:
        with contextlib.suppress(AttributeError):
            del model.load_weights
        return fill() if given is weights else load(given)

    model.load_weights = load_weights


@contextlib.contextmanager
def load_watched(
    model: nn.Module,
    mode: AbstractContextManager[object],
    watch: Callable[[Iterable[tuple[str, torch.Tensor]]], Iterable[tuple[str, torch.Tensor]]],
) -> Iterator[None]:
    """Have what a model's `load_weights` is given pass through a function, as long as this lasts.

    Args:
        model: the model.
        mode: entered while `load_weights` runs.
        watch: takes the iterator of names and tensors, and returns the one to load.
    """
    own = vars(model).get("load_weights")
    load = model.load_weights
    assert callable(load)

    def load_weights(weights: Iterable[tuple[str, torch.Tensor]], *args: Any, **kwargs: Any) -> Any:
        with mode:
            return load(watch(weights), *args, **kwargs)

    model.load_weights = load_weights
    try:
        yield
    finally:
        del model.load_weights
        if own is not None:
            model.load_weights = own


def feed_reload(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put raw tensors into a model that `initialize_layerwise_reload` has prepared.

    vLLM's layerwise reload has taken the processed tensors away by then, and has put those of the
    unprocessed model in their place, on the meta device. Here each layer gets its raw tensors and
    is processed, and the outcome is copied into the memory that inference uses.

    Args:
        model: the model, in use until now.
        tensors: name -> raw tensor of every parameter and persistent buffer, and of the other
            buffers that loading changes.
    """
    for path, layer in model.named_modules():
        info = layerwise.get_layerwise_info(layer)
        present = {
            name: (tensor, tensors[full])
            for name, tensor in layerwise.get_layer_tensors(layer).items()
            if (full := f"{path}.{name}" if path else name) in tensors
        }
        if _is_attention(layer):
            # Attention comes last and takes its scales by their loaders.
            for tensor, raw in present.values():
                getattr(tensor, "weight_loader", default_weight_loader)(tensor, raw)
            continue
        if info.can_load() and not present:
            layerwise._place_kernel_tensors(layer, info)
            info.reset()
            continue
        for name, (tensor, raw) in present.items():
            if tensor.is_meta:
                with info.restore_device:
                    fresh = layerwise_meta.materialize_meta_tensor(tensor)
                setattr(layer, name, fresh)
                tensor = fresh
            tensor.data.copy_(raw)
        if info.can_load():
            layerwise._layerwise_process(layer, info)
            # vLLM takes those for what only post-processing makes.
            for name in layer._non_persistent_buffers_set & present.keys():
                getattr(layer, name).copy_(present[name][1])


def register_weight_transfer(
    pull: Callable[[VllmConfig, ModelConfig, nn.Module, Mapping[str, Any]], object],
) -> None:
    """Make the backend `netloader` of `--weight-transfer-config` known to a vLLM that has such.

    Args:
        pull: fills a model in use, with keys of NetLoader's configuration.
    """
    try:
        from vllm.distributed.weight_transfer import WeightTransferEngine
        from vllm.distributed.weight_transfer.base import (
            WeightTransferInitInfo,
            WeightTransferUpdateInfo,
        )
        from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    except ImportError:  # of another version
        return

    @dataclass
    class Begin(WeightTransferInitInfo):
        """There is no connection to a trainer."""

    @dataclass
    class Update(WeightTransferUpdateInfo):
        """Where the new weights are: see the keys SOURCE and WEIGHTS_DIGEST."""

        source: str | list[Any]
        weights_digest: str | None = None

    class Engine(WeightTransferEngine):
        """Pulls the weights of the instances that an update names."""

        init_info_cls = Begin
        update_info_cls = Update

        def init_transfer_engine(self, init_info: Begin) -> None:
            pass

        def start_weight_update(self) -> None:
            pass

        def receive_weights(self, update_info: Update) -> None:
            keys = {"SOURCE": update_info.source, "WEIGHTS_DIGEST": update_info.weights_digest}
            pull(self.vllm_config, self.model_config, self.model, keys)

        def finish_weight_update(self) -> None:
            pass

        @staticmethod  # vLLM before 0.28 asks for it
        def trainer_send_weights(iterator: Iterator[Any], trainer_args: Any) -> None:
            raise NotImplementedError("instances pull: a trainer only names sources")

        def shutdown(self) -> None:
            pass

    with contextlib.suppress(ValueError):  # it is known
        WeightTransferEngineFactory.register_engine(LOAD_FORMAT, Engine)


def _is_attention(layer: nn.Module) -> bool:
    if hasattr(layerwise, "is_deferred_attention_layer"):  # vLLM 0.28 and later
        return bool(layerwise.is_deferred_attention_layer(layer))
    return isinstance(layer, layerwise.Attention | layerwise.MLAAttention)


_WATCHED = "watched_by_netloader"
_PROCESS = "process_weights_after_loading"
Changing = Callable[[str | nn.Module, Change], AbstractContextManager[None]]


def watch(
    vllm_config: VllmConfig,
    model: nn.Module,
    changing: Changing,
    reading: Callable[[nn.Module, Any], Any],
    processing: Callable[[nn.Module], object],
) -> list[nn.Module]:
    """Tell of whatever changes the weights of an instance from now on, before it does.

    vLLM finds the methods of its worker by their names at each call; those that change weights are
    replaced once in each class.

    Args:
        vllm_config: the instance's configuration.
        model: one of its models, ready for inference.
        changing: entered around each change, with the name of the instance (`instance_of`), or with
            a model that may be one in use.
        reading: called with a model that may be one in use and the weights that its `load_weights`
            is given; returns those that it gets in their place.
        processing: called with each layer that is about to be post-processed.

    Returns:
        The layers of the model that `processing` is called for.
    """
    module, _, name = str(vllm_config.parallel_config.worker_cls).rpartition(".")
    worker = getattr(sys.modules.get(module), name, None)
    for method, change_of in _CHANGES.items():
        _replace(worker, method, functools.partial(_watched_worker, change_of, changing))
    runner = getattr(sys.modules.get("vllm.v1.worker.gpu_model_runner"), "GPUModelRunner", None)
    _replace(runner, "reload_weights", functools.partial(_watched_runner, changing))
    _replace(type(model), "load_weights", functools.partial(_watched_model, changing, reading))
    _moving_experts.add(instance_of(vllm_config))
    for module, name, method in _MOVING_EXPERTS:
        mover = getattr(sys.modules.get(module), name, None)
        _replace(mover, method, functools.partial(_watched_mover, changing))
    layers = []
    for layer in model.modules():
        quant_method = getattr(layer, "quant_method", None)
        if isinstance(quant_method, QuantizeMethodBase):
            # That of a class is none of an object for which vLLM Ascend has wrapped it
            # (multistream_overlap_shared_expert).
            own = _PROCESS in vars(quant_method)
            wrap = functools.partial(_watched_processing, processing, 0 if own else 1)
            _replace(quant_method if own else type(quant_method), _PROCESS, wrap)
            layers.append(layer)
    return layers


def instance_of(vllm_config: VllmConfig) -> str:
    """Return what names an instance in this process.

    vLLM gives its worker, its target and its draft configurations of their own, each with another
    `instance_id`; their layers enter themselves into one dictionary.
    """
    return str(id(vllm_config.compilation_config.static_forward_context))


def _replace(owner: Any, name: str, wrap: Callable[[Any], Any]) -> None:
    method = getattr(owner, name, None)
    if method is not None and not hasattr(method, _WATCHED):
        watched = functools.wraps(method)(wrap(method))
        setattr(watched, _WATCHED, True)
        setattr(owner, name, watched)


def _watched_worker(
    change_of: Callable[..., Change | None], changing: Changing, method: Any
) -> Any:
    def watched(worker: Any, *args: Any, **kwargs: Any) -> Any:
        change = change_of(*args, **kwargs)
        if change is None:
            return method(worker, *args, **kwargs)
        with changing(instance_of(worker.vllm_config), change):
            return method(worker, *args, **kwargs)

    return watched


def _watched_runner(changing: Changing, method: Any) -> Any:
    """The worker's method of that name calls this one; vLLM Ascend 0.23's worker has none.

    Up to vLLM 0.23 nobody sets the configuration, which loaders ask for.
    """

    def watched(runner: Any, *args: Any, **kwargs: Any) -> Any:
        config = runner.vllm_config
        with (
            set_current_vllm_config(config),
            changing(instance_of(config), _reload(*args, **kwargs)),
        ):
            return method(runner, *args, **kwargs)

    return watched


def _watched_model(
    changing: Changing, reading: Callable[[nn.Module, Any], Any], method: Any
) -> Any:
    def watched(model: Any, weights: Any, *args: Any, **kwargs: Any) -> Any:
        with changing(model, Change("load_weights", After.UNKNOWN)):
            return method(model, reading(model, weights), *args, **kwargs)

    return watched


def _watched_mover(changing: Changing, method: Any) -> Any:
    def watched(mover: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("is_profile", bool(args) and args[0] is True):
            return method(mover, *args, **kwargs)  # which measures only
        with contextlib.ExitStack() as changes:
            for instance in [*_moving_experts]:
                changes.enter_context(changing(instance, Change("EPLB", After.MOVED)))
            return method(mover, *args, **kwargs)

    return watched


def _watched_processing(processing: Callable[[nn.Module], object], at: int, method: Any) -> Any:
    def watched(*args: Any, **kwargs: Any) -> Any:
        processing([*args, *kwargs.values()][at])
        return method(*args, **kwargs)

    return watched


def _reload(*args: Any, **kwargs: Any) -> Change:
    """Weights in the checkpoint's form change once `load_weights` is called, others at once."""
    as_they_are = not kwargs.get("is_checkpoint_format", args[2] if len(args) > 2 else True)
    return Change("reload_weights", After.WHOLE, at_once=as_they_are, directly=as_they_are)


def _sleep(level: int = 1, **_: Any) -> Change | None:
    return Change(f"sleep level {level}", After.MORE, sleep=level) if level else None


def _wake_up(tags: list[str] | None = None, **_: Any) -> Change | None:
    awake = tags is None or "weights" in tags
    return Change("wake_up", After.AWAKE, at_once=False) if awake else None


def _discard(tags: tuple[str, ...], **_: Any) -> Change | None:
    return Change("discard", After.MORE, sleep=2) if "weights" in tags else None


def _always(change: Change) -> Callable[..., Change]:
    return lambda *_, **__: change


# What changes the weights of a worker, of those methods that its class has. A LoRA adapter has
# memory of its own. What other methods do, those of a `worker_extension_cls` among them, is noticed
# by `load_weights`, or by the digests.
_CHANGES: dict[str, Callable[..., Change | None]] = {
    "reload_weights": _reload,
    "start_weight_update": _always(Change("start_weight_update", After.MORE, directly=True)),
    "start_draft_weight_update": _always(
        Change("start_draft_weight_update", After.MORE, directly=True)
    ),
    "update_weights": _always(Change("update_weights", After.MORE, directly=True, goes_on=True)),
    "finish_weight_update": _always(
        Change("finish_weight_update", After.WHOLE, directly=True, goes_on=True)
    ),
    "reset_weights": _always(Change("reset_weights", After.MORE, directly=True)),
    "apply_model": _always(Change("apply_model", After.WHOLE, directly=True, perhaps=True)),
    "sleep": _sleep,
    "wake_up": _wake_up,
    "discard": _discard,
    "elastic_ep_execute": _always(Change("elastic EP", After.MOVED)),
}
# Module, class and method of what moves experts while an instance runs. The modules have been
# imported where that is so.
_ASCEND_EPLB = ("vllm_ascend.eplb.adaptor.vllm_adaptor", "VllmEplbAdaptor")
_MOVING_EXPERTS = (
    ("vllm.distributed.eplb.eplb_state", "EplbState", "rearrange"),
    # A layer's maps change before its weights do.
    (*_ASCEND_EPLB, "do_update_expert_map"),
    (*_ASCEND_EPLB, "do_update_log2phy_map"),
    (*_ASCEND_EPLB, "do_update_expert_weight"),
)
_moving_experts: set[str] = set()  # the instances in this process
