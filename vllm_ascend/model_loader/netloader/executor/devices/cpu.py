"""CPUs: gloo over TCP, xxh3 for checksums."""

from collections.abc import Sequence
from ctypes import CDLL, c_char, c_int, c_size_t, c_void_p, memmove
from datetime import timedelta

import torch
import xxhash
from torch.distributed import ProcessGroup, ProcessGroupGloo, Store, Work

from ..manifest import RAW

_HUGE_PAGE = 2 << 20
_MADV_HUGEPAGE = 14  # <sys/mman.h> of Linux
_madvise = CDLL(None).madvise
_madvise.argtypes = (c_void_p, c_size_t, c_int)


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

    def hash(self, tensor: torch.Tensor) -> bytes:
        """Return the XXH3 128-bit hash; the GIL is released for large data."""
        if not tensor.numel():
            return xxhash.xxh3_128_digest(b"")
        return xxhash.xxh3_128_digest((c_char * tensor.nbytes).from_address(tensor.data_ptr()))

    # A model can have a hundred thousand small tensors. By address a copy costs under a
    # microsecond; by torch's operators and views it is five to ten.

    def pack(self, tensors: Sequence[torch.Tensor], message: torch.Tensor) -> None:
        """Copy by address."""
        end = message.data_ptr()
        for tensor in tensors:
            memmove(end, tensor.data_ptr(), tensor.nbytes)
            end += tensor.nbytes

    def unpack(self, message: torch.Tensor, tensors: Sequence[torch.Tensor]) -> None:
        """Copy by address."""
        start = message.data_ptr()
        for tensor in tensors:
            memmove(tensor.data_ptr(), start, tensor.nbytes)
            start += tensor.nbytes

    def empty(self, nbytes: int) -> torch.Tensor:
        """Return host memory."""
        return torch.empty(nbytes, dtype=torch.uint8)

    def prepare(self, tensors: Sequence[torch.Tensor]) -> None:
        """Ask for huge pages: page faults of 4 KiB cost as much as the whole transfer."""
        for tensor in tensors:
            start = -(-tensor.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
            end = (tensor.data_ptr() + tensor.nbytes) // _HUGE_PAGE * _HUGE_PAGE
            # A view's bytes may be spread over more memory than it has, some of it not its own.
            if start < end and tensor.is_contiguous():
                _madvise(start, end - start, _MADV_HUGEPAGE)  # advice: refusing it does no harm

    def synchronize(self) -> None:
        """Nothing is queued on a CPU."""
