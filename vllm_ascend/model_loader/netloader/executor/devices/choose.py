"""Which device moves a tensor: what devices have in common knows none of their modules."""

import torch

from ...errors import LayoutUnsupported
from . import Device
from .cpu import CpuDevice


def device_of(device: torch.device | str, hccl_buffer_mb: int) -> Device:
    """Return what moves tensors of a device.

    Args:
        device: as vLLM names it; without an index, the one that this thread has chosen.
        hccl_buffer_mb: memory in MB that HCCL takes for each direction of a session.

    Raises:
        LayoutUnsupported: NetLoader does not know such devices.
    """
    device = torch.device(device)
    if device.type == "cpu":
        return CpuDevice()
    # Imported when needed: torch_npu is there for NPUs only.
    if device.type == "npu":
        from .npu import npu_device

        return npu_device(device.index, hccl_buffer_mb)
    if device.type == "cuda":
        from .cuda import cuda_device

        return cuda_device(device.index)
    raise LayoutUnsupported(f"NetLoader moves no tensors between devices of kind {device.type!r}")
