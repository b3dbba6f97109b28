"""Import hooks that give torch_npu its libraries and vLLM Ascend its kernels.

Every interpreter reads this at its start, so it must stay cheap: it loads nothing, and waits for
the imports.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NoReturn

PR_SET_TIMERSLACK, ONE_MILLISECOND = 29, 1_000_000  # <sys/prctl.h>, in nanoseconds
LIBRARIES = os.environ["NPUSIM_LIB"]
# libnpusim.so first: the others need it, and are otherwise empty.
CANN = (
    "npusim",
    "acl_op_compiler",
    "acl_tdt_channel",
    "ascendcl",
    "atb",
    "ge_runner",
    "graph",
    "hccl",
    "hcomm",
    "nnopbase",
)


def _library(name: str) -> str:
    return os.path.join(LIBRARIES, f"lib{name}.so")


def before_torch_npu() -> None:
    """Loads CANN by path, so that nobody needs LD_LIBRARY_PATH."""
    import ctypes

    import torch  # noqa: F401  libopapi.so needs libtorch_cpu.so

    # A thread of torch_npu looks for work every few microseconds: a sixth of a core in each process
    # that does nothing. Now whatever sleeps there may do so for a millisecond longer.
    ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, ctypes.c_ulong(ONE_MILLISECOND))
    for name in CANN:
        ctypes.CDLL(_library(name), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(_library("opapi"))


def before_torchvision() -> None:
    """Lets torchvision be imported where it is a build for CUDA, whose operators do not load."""
    import torch
    import torchvision.extension

    if not torchvision.extension._has_ops():
        for name in ("nms", "qnms"):
            schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{name}", schema)


def after_torch_npu(module: ModuleType) -> None:
    """Puts CPU kernels in the place of torch_npu's."""
    import torch

    torch.ops.load_library(_library("npusim_fallback"))
    from . import ops

    ops.install_aten()


def after_atb(module: ModuleType) -> None:
    """Gives the atb operators, which CANN's NNAL has on hardware, CPU kernels."""
    from . import ops

    ops.install_atb(module)


def after_block_table(module: ModuleType) -> None:
    """Replaces vLLM Ascend's one Triton kernel that a plain model needs."""
    from . import ops

    module._compute_slot_mapping_kernel = ops.SlotMapping()  # type: ignore[attr-defined]


def after_shm_broadcast(module: ModuleType) -> None:
    """Lets ranks sleep until they are told something, as there are more of them than cores."""
    module.SpinCondition.__init__.__defaults__ = (0,)


def after_camem(module: ModuleType) -> None:
    """Gives sleep mode the memory that vLLM Ascend's own library would give it."""
    from . import sleep

    module.__dict__.update(sleep.functions())


def after_device_op(module: ModuleType) -> None:
    """Defines operators that vLLM Ascend's own library would have."""
    from . import ops

    ops.install_custom()


BEFORE = {
    "torch_npu": before_torch_npu,
    "torchvision._meta_registrations": before_torchvision,
}
AFTER = {
    "torch_npu": after_torch_npu,
    "torch_npu.op_plugin.atb._atb_ops": after_atb,
    "vllm.distributed.device_communicators.shm_broadcast": after_shm_broadcast,
    "vllm_ascend.device.device_op": after_device_op,
    "vllm_ascend.device_allocator.camem": after_camem,
    "vllm_ascend.worker.block_table": after_block_table,
}


class Hooks(importlib.abc.MetaPathFinder):
    """Runs the functions above around the imports that they are named after."""

    busy: frozenset[str] = frozenset()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Finds a module where it is, and wraps how it runs."""
        if name in ("acl", "acl.rt"):
            return importlib.machinery.ModuleSpec(name, PyAcl(), is_package=name == "acl")
        if (name not in AFTER and name not in BEFORE) or name in self.busy:
            return None
        self.busy = self.busy | {name}
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.busy = self.busy - {name}
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            if before := BEFORE.get(name):
                before()
            run(module)
            if after := AFTER.get(name):
                after(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


class PyAcl(importlib.abc.Loader):
    """Makes `acl`, which comes with CANN; vLLM Ascend imports a name from it, and no more."""

    def exec_module(self, module: ModuleType) -> None:
        """Fills the module."""

        def memcpy(*arguments: Any) -> NoReturn:
            raise NotImplementedError("npusim: acl.rt.memcpy is not simulated")

        module.memcpy = memcpy  # type: ignore[attr-defined]


sys.meta_path.insert(0, Hooks())
