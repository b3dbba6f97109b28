"""CPUs: gloo over TCP, xxh3 for checksums."""

from datetime import timedelta

import torch
import xxhash
from torch.distributed import ProcessGroup, ProcessGroupGloo, Store, Work

from ..manifest import RAW


class CpuDevice:
    """See `devices.Device`."""

    digest_algorithm = "xxh3_128"
    # vLLM packs a CPU's linear weights into opaque handles: nothing processed is left to send.
    layout = RAW

    def create_group(
        self, store: Store, rank: int, local_host: str, timeout: float
    ) -> ProcessGroup:
        """Make a gloo group that talks over the interface of `local_host`."""
        options = ProcessGroupGloo._Options()
        options._timeout = timedelta(seconds=timeout)
        options._devices = [ProcessGroupGloo.create_device(hostname=local_host)]
        return ProcessGroupGloo(store, rank, 2, options)

    def wait(self, work: Work, timeout: float) -> None:
        """Wait for gloo, which closes the connection when the time is up."""
        work.wait(timedelta(seconds=timeout))

    def hash(self, data: torch.Tensor) -> bytes:
        """Return the XXH3 128-bit hash; the GIL is released for large data."""
        return xxhash.xxh3_128_digest(data.numpy())

    def empty(self, nbytes: int) -> torch.Tensor:
        """Return host memory."""
        return torch.empty(nbytes, dtype=torch.uint8)

    def synchronize(self) -> None:
        """Nothing is queued on a CPU."""
