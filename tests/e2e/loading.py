"""Loads models as a vLLM worker does, in this process and without an engine."""

import contextlib
import functools
import gc
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_HOST_IP", "127.0.0.1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import (
    destroy_model_parallel,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers import rotary_embedding
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.models import registry as model_registry
from vllm.plugins import load_general_plugins

from vllm_ascend.model_loader.netloader import registry
from vllm_ascend.model_loader.netloader.executor.model.processed import processed_tensors

# vLLM looks at a model's class in a process of its own, which imports vLLM once more.
model_registry._run_in_subprocess = lambda look: look()


def make_config(
    path: Path | str,
    load_format: str = "netloader",
    *,
    revision: str | None = None,
    download_dir: str | None = None,
    tp: int = 1,
    pp: int = 1,
    engine: Mapping[str, Any] | None = None,
    **extra: Any,
) -> VllmConfig:
    """Return the configuration of an instance with this `model_loader_extra_config`.

    It waits for no source that is not there. `engine` has further arguments of the engine.
    """
    if load_format == "netloader":
        extra = {"SOURCE_WAIT": 0} | extra
    load_general_plugins()
    return EngineArgs(
        model=str(path),
        revision=revision,
        download_dir=download_dir,
        tensor_parallel_size=tp,
        pipeline_parallel_size=pp,
        load_format=load_format,
        model_loader_extra_config=extra,
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=256,
        use_tqdm_on_load=False,
        **(engine or {}),
    ).create_engine_config()


@functools.cache
def freeze() -> None:
    """Look through what was imported no more: vLLM 0.32 looks for garbage twice in each load."""
    gc.collect()
    gc.freeze()


@contextlib.contextmanager
def worker(
    config: VllmConfig, rank: int = 0, meeting: Path | None = None
) -> Iterator[BaseModelLoader]:
    """Be a worker of an instance, with the loader that it would use.

    Several of them need a file to meet at. Their group lasts as long as their processes.
    """
    freeze()
    # vLLM's CPU worker does the same: without an accelerator both raise.
    torch.accelerator.empty_cache = lambda: None
    torch.accelerator.synchronize = lambda *_: None
    with set_current_vllm_config(config):
        if not torch.distributed.is_initialized():
            store = meeting or Path(tempfile.mkdtemp()) / "meeting"
            world_size = config.parallel_config.world_size
            init_distributed_environment(world_size, rank, f"file://{store}", rank, "gloo")
        # Anew each time, because which groups there are depends on the model.
        destroy_model_parallel()
        initialize_model_parallel(
            config.parallel_config.tensor_parallel_size,
            config.parallel_config.pipeline_parallel_size,
        )
        yield get_model_loader(config.load_config)


def load(config: VllmConfig) -> nn.Module:
    """Load the model of an instance, which shares no rotary table with others of this process."""
    rotary_embedding._ROPE_DICT.clear()
    with worker(config) as loader:
        return loader.load_model(vllm_config=config, model_config=config.model_config)


def reload_from(config: VllmConfig, model: nn.Module, address: str) -> None:
    """Reload a model in use from another source."""
    config.load_config.model_loader_extra_config["SOURCE"][0]["sources"] = [address]
    with worker(config) as loader:
        loader.load_weights(model, config.model_config)


def store_of(model: nn.Module) -> Any:
    """Return what an instance offers of a model, once it knows."""
    registry.wait_for_renewal()
    known = registry.in_use(model)
    assert known is not None
    assert known.server is not None
    offer = known.server._offers[known.identity.group]
    assert offer.store is not None, offer.reason
    return offer.store


def assert_same(one: nn.Module, other: nn.Module) -> None:
    """Assert that two models hold the same tensors, and that their linear layers do the same.

    On a CPU the weights of linear layers are in opaque handles, so these layers are run. One that
    cannot be run has given its weight away: what was made of it is among the tensors. The processor
    decides which is which. Elsewhere all weights are tensors.
    """
    ours, theirs = processed_tensors(one), processed_tensors(other)
    assert ours.keys() <= theirs.keys(), sorted(ours.keys() - theirs.keys())
    # vLLM 0.27 drops a second name of a tensor while it reads a checkpoint.
    for name in theirs.keys() - ours.keys():
        assert _memory(theirs[name]) in {_memory(theirs[known]) for known in ours}, name
    for name, tensor in ours.items():
        if not _is_address(tensor):
            assert torch.equal(_bytes(tensor), _bytes(theirs[name])), name
    if next(one.parameters()).device.type != "cpu":
        return
    others = dict(other.named_modules())
    generator = torch.Generator().manual_seed(0)
    ran = 0
    for name, module in one.named_modules():
        if not isinstance(module, LinearBase) or _never_runs(module):
            continue
        # A head may have another dtype than its model. Kernels take what they get for their own.
        given = torch.randn(3, module.input_size, generator=generator).to(module.params_dtype)
        if (output := _output(module, given)) is not None:
            assert torch.equal(_bytes(output), _bytes(_output(others[name], given))), name
            ran += 1
            continue
        assert _output(others[name], given) is None, name
        assert _held_beside(one, module, ours) >= module.input_size * module.output_size, name
    assert ran


def _never_runs(layer: nn.Module) -> bool:
    """Return whether this holds a weight for others only, as the convolution of Mamba does."""
    return isinstance(layer.quant_method, UnquantizedLinearMethod) and not hasattr(
        layer, "cpu_linear"
    )


def _output(layer: nn.Module, given: torch.Tensor) -> torch.Tensor | None:
    """Return what a linear layer makes of an input; None if its weight was taken away from it."""
    try:
        output = layer(given)
    except RuntimeError:
        if layer.weight.numel():
            raise
        return None
    return output[0] if isinstance(output, tuple) else output


def _held_beside(model: nn.Module, layer: nn.Module, tensors: Mapping[str, torch.Tensor]) -> int:
    """Count the elements that modules with this layer inside hold themselves."""
    count = 0
    for path, holder in model.named_modules():
        inside = dict(holder.named_children())
        if layer not in inside.values():
            continue
        for name, tensor in tensors.items():
            if name.startswith(f"{path}."):
                attribute = name.removeprefix(f"{path}.").partition(".")[0]
                count += 0 if attribute in inside else tensor.numel()
    return count


def _is_address(tensor: torch.Tensor) -> bool:
    """Return whether this is where a kernel keeps its copy, which each process has elsewhere."""
    return tensor.dtype == torch.int64 and tensor.numel() == 1 and tensor.item() >= 1 << 32


def _memory(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.nbytes


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
