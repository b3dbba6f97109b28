"""What differs between vLLM versions, and the vLLM internals that have no public name."""

import contextlib
import importlib.metadata
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
import vllm
from huggingface_hub import try_to_load_from_cache
from torch import nn
from vllm import envs
from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.reload import layerwise
from vllm.model_executor.model_loader.reload import meta as layerwise_meta
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models import adapters
from vllm.platforms import current_platform

from .executor.chunks.manifest import RAW
from .identity import (
    ModelIdentity,
    Revision,
    cached_snapshot,
    digest_of_settings,
    plain_identity,
    revision_name,
)
from .interaction.api import DRAFT_GROUP, TARGET_GROUP


def is_cpu_platform() -> bool:
    """Return whether vLLM runs models on the CPU in this process."""
    return bool(current_platform.is_cpu())


def remember_registrations(vllm_config: VllmConfig) -> Callable[[], None]:
    """Remember what making a model adds to process-wide state.

    Layers enter themselves by name into containers of the compilation config, and refuse a name
    that is taken; which containers there are depends on the version, so all of them are remembered.

    Args:
        vllm_config: the instance's configuration, before the model is made.

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
    experts_before = list(_experts_of_vllm_ascend())

    def restore() -> None:
        _experts_of_vllm_ascend()[:] = experts_before
        for name, contents in before.items():
            container: Any = getattr(config, name)
            container.clear()
            if isinstance(container, list):
                container.extend(contents)
            else:
                container.update(contents)

    return restore


def _experts_of_vllm_ascend() -> list[nn.Module]:
    """Return the list in which vLLM Ascend's expert layers enter themselves, if it is there."""
    adaptor = sys.modules.get("vllm_ascend.eplb.adaptor.vllm_adaptor")
    found: list[nn.Module] = getattr(
        getattr(adaptor, "VllmEplbAdaptor", None), "_registered_moe_layers", []
    )
    return found


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
    settings = model_config.hf_config.to_dict()
    quantization = settings.get("quantization_config") or settings.get("compression_config") or {}
    return plain_identity(
        group=DRAFT_GROUP if draft else TARGET_GROUP,
        model=model,
        revision=revision_of(model_config),
        rank=rank,
        tp=parallel.tensor_parallel_size,
        pp=parallel.pipeline_parallel_size,
        # Replicas of a dense model hold the same tensors; experts are spread over all of them.
        dp=parallel.data_parallel_size if getattr(model_config, "is_moe", True) else 1,
        ep=bool(parallel.enable_expert_parallel),
        dtype=str(model_config.dtype),
        quantization=model_config.quantization,
        quantization_config=digest_of_settings(quantization),
        config=digest_of_settings(settings),
        layout=layout,
        vllm_version=None if layout == RAW else _post_processing(),
    )


def name_of(model_config: ModelConfig) -> str:
    """Return the name that a model was asked for by.

    With HF_HUB_OFFLINE vLLM puts the folder of the Hub's cache in its place.
    """
    snapshot = cached_snapshot(model_config.model)
    return snapshot[0] if snapshot else model_config.model


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


def groups_to_come(vllm_config: VllmConfig, loaded: ModelIdentity) -> list[str]:
    """Return the groups of the models that this process loads after a model."""
    has_draft = _draft_of(vllm_config) is not None
    return [DRAFT_GROUP] if has_draft and loaded.group == TARGET_GROUP else []


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


def can_reload_from_sources(device: torch.device) -> bool:
    """Return whether a model in use can be filled from sources without being made anew."""
    return device.type == "cpu"  # elsewhere vLLM's layerwise reload has not been tried


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


def _is_attention(layer: nn.Module) -> bool:
    if hasattr(layerwise, "is_deferred_attention_layer"):  # vLLM 0.28 and later
        return bool(layerwise.is_deferred_attention_layer(layer))
    return isinstance(layer, layerwise.Attention | layerwise.MLAAttention)
