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
    pcp=1,
    dp=1,
    dp_rank=0,
    ep=1,
    ep_rank=0,
    dtype="torch.bfloat16",
    quantization=None,
    config={"hidden_size": 4},
    defaults={},
    layout=RAW,
    vllm_version=None,
)


def identity(**changes: Any) -> ModelIdentity:
    return msgspec.structs.replace(IDENTITY, **changes)
