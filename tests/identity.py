"""The identity of the model that tests and benchmarks load."""

from typing import Any

import msgspec

from vllm_ascend.model_loader.netloader.executor.chunks.manifest import RAW
from vllm_ascend.model_loader.netloader.identity import ModelIdentity, Revision

IDENTITY = ModelIdentity(
    group="netloader",
    model="small",
    revision=Revision(),
    rank=0,
    tp=1,
    pp=1,
    dp=1,
    ep=False,
    dtype="torch.bfloat16",
    quantization=None,
    quantization_config="0123456789abcdef",
    config="fedcba9876543210",
    layout=RAW,
    vllm_version=None,
)


def identity(**changes: Any) -> ModelIdentity:
    return msgspec.structs.replace(IDENTITY, **changes)
