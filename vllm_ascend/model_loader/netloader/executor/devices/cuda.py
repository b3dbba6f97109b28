"""GPUs: NCCL."""

import functools
import os
import threading
from collections.abc import Callable
from datetime import timedelta

import torch
from torch.distributed import ProcessGroup, Store

from .streams import StreamDevice

# NCCL's watchdog ends the process when an operation fails or takes longer than its group allows,
# and what it does about it is read from here when a group is made.
_ERROR_HANDLING = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
_NEVER = timedelta(days=365)
_environment = threading.Lock()


class CudaDevice(StreamDevice):
    """See `devices.Device`."""

    def create_group(
        self, store: Store, rank: int, local_host: str, timeout: float, gone: Callable[[], bool]
    ) -> ProcessGroup:
        """Make a NCCL group that leaves peers that die or stall to their session."""
        from torch.distributed import ProcessGroupNCCL

        options = ProcessGroupNCCL.Options()
        options._timeout = _NEVER
        options.group_name = "netloader"
        with _environment:
            before = os.environ.get(_ERROR_HANDLING)
            os.environ[_ERROR_HANDLING] = "0"
            try:
                group = ProcessGroupNCCL(store, rank, 2, options)
            finally:
                if before is None:
                    del os.environ[_ERROR_HANDLING]
                else:
                    os.environ[_ERROR_HANDLING] = before
        return self.connect(timeout, gone, lambda: self.exchange(group, rank, timeout, gone))

    def int8_product(self, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Have cuBLAS do it, which takes no fewer than 17 rows."""
        count = len(rows)
        if count < 17:
            rows = torch.cat([rows, rows.new_zeros(17 - count, rows.shape[1])])
        return torch._int_mm(rows, weights)[:count]


@functools.cache
def cuda_device(index: int | None) -> CudaDevice:
    """Return a GPU; without an index, the one that this thread has chosen."""
    if index is None:
        return cuda_device(torch.cuda.current_device())
    return CudaDevice(torch.device("cuda", index), torch.cuda)
