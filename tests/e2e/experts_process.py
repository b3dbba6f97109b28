"""One of two ranks over which experts are spread: loads a seed and two clients of it.

``python -m tests.e2e.experts_process RANK STORE FULL BARE PREFIX`` prints, as JSON, whether the
client that places experts as the seed does has the seed's weights, and why the other one has none.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import get_model_loader

from vllm_ascend.model_loader.netloader.errors import NetLoaderError

from .loading import load_general_plugins


def configured(model: str, placement: str, extra: dict[str, Any]) -> VllmConfig:
    """Return the configuration of an instance of two ranks."""
    return EngineArgs(
        model=model,
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=128,
        tensor_parallel_size=2,
        enable_expert_parallel=True,
        expert_placement_strategy=placement,
        load_format="netloader",
        use_tqdm_on_load=False,
        model_loader_extra_config=extra,
    ).create_engine_config()


def load(config: VllmConfig) -> nn.Module:
    """Load a model as this rank."""
    with set_current_vllm_config(config):
        if not torch.distributed.is_initialized():
            init_distributed_environment(2, rank, f"file://{store}", rank, "gloo")
            initialize_model_parallel(2)
        loader = get_model_loader(config.load_config)
        return loader.load_model(vllm_config=config, model_config=config.model_config)


def main() -> None:
    """Load them, and print what came of it."""
    torch.accelerator.empty_cache = lambda: None
    torch.accelerator.synchronize = lambda *_: None
    load_general_plugins()
    seed = load(configured(full, "linear", {"MODEL": "m", "OUTPUT_PREFIX": prefix}))
    address = Path(f"{prefix}{rank}.txt").read_text()
    client = {
        "MODEL": "m",
        "LISTEN_PORT": 1,
        "SOURCE": [{"device_id": rank, "sources": [address]}],
        "SOURCE_WAIT": 0,
        "FALLBACK": False,
    }
    expected = dict(seed.named_parameters())
    same = load(configured(bare, "linear", client)).named_parameters()
    equal = all(torch.equal(tensor, expected.pop(name)) for name, tensor in same)
    try:
        load(configured(bare, "round_robin", client))
        reason = ""
    except NetLoaderError as error:
        reason = str(error).replace(address, "SOURCE")
    torch.distributed.barrier()  # the seed's other rank may still be asked
    print(json.dumps({"equal": equal and not expected, "reason": reason}))


if __name__ == "__main__":
    rank = int(sys.argv[1])
    store, full, bare, prefix = sys.argv[2:]
    main()
