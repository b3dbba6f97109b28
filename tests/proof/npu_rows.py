"""The rows of the proof on simulated NPUs; both layouts where post-processing does something."""

from functools import partial
from pathlib import Path

from tests.npu_sim.models import make_mla_moe, make_plain, make_quantized

from .rows import Row

ONLY_CPUS = "a model in use on npu is not filled from sources"
RAW = {"INT8_CACHE": "hbm"}
NPU = {"gpu_memory_utilization": 0.3}  # of three instances
ASCEND = {**NPU, "quantization": "ascend"}


def _quantized(kind: str, path: Path, seed: int) -> None:
    plain = path.with_name(f"{path.name}-plain")
    make_plain(plain, seed)
    make_quantized(plain, path, kind)


_STATIC, _DYNAMIC = (partial(_quantized, kind) for kind in ("W8A8", "W8A8_DYNAMIC"))
ROWS = [
    Row("Llama", make_plain, engine=NPU, reload=ONLY_CPUS, from_disk=True),
    Row("W8A8", _STATIC, engine=ASCEND, reload=ONLY_CPUS, from_disk=True),
    Row("W8A8, raw", _STATIC, engine=ASCEND, config=RAW, reload=ONLY_CPUS, from_disk=True),
    Row("W8A8_DYNAMIC", _DYNAMIC, engine=ASCEND, reload=ONLY_CPUS, from_disk=True),
    Row("W8A8_DYN., raw", _DYNAMIC, engine=ASCEND, config=RAW, reload=ONLY_CPUS, from_disk=True),
    Row("MLA + MoE", make_mla_moe, engine=NPU, reload=ONLY_CPUS, from_disk=True),
    Row("MLA + MoE, raw", make_mla_moe, engine=NPU, config=RAW, reload=ONLY_CPUS, from_disk=True),
]
