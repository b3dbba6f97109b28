"""CPUs: host memory, and XXH3 for digests."""

import contextlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from ctypes import CDLL, byref, c_int, c_size_t, c_ubyte, c_void_p

import torch
import xxhash

from ..chunks.blocks import BLOCK_BYTES
from ..chunks.manifest import RAW
from ..memory import Part, host_buffer

_HUGE_PAGE = 2 << 20
_MADV_HUGEPAGE, _MADV_POPULATE_WRITE = 14, 23  # <sys/mman.h> of Linux; 5.14 has the second
# Pages are found in blocks, huge ones as long as that is done at so many bytes per second, twice
# what small ones reach; else so many blocks at most have small ones before it is tried again.
_BLOCK, _FAST, _LONGEST_WAIT = 2 * _HUGE_PAGE, 4e9, 64
_madvise, _mincore = CDLL(None).madvise, CDLL(None).mincore
_madvise.argtypes = (c_void_p, c_size_t, c_int)
_mincore.argtypes = (c_void_p, c_size_t, c_void_p)


class CpuDevice:
    """See `devices.Device`."""

    accelerator = None
    digest_algorithm = "xxh3_128"
    # vLLM packs a CPU's linear weights into opaque handles: nothing processed is left to send.
    layout = RAW

    def attached(self) -> AbstractContextManager[object]:
        """There is nothing to choose."""
        return contextlib.nullcontext()

    def digests(self, parts: Sequence[Part]) -> bytes:
        """Hash each block with XXH3, 128 bits; the GIL is released for large data."""
        digest, found = xxhash.xxh3_128_digest, []
        for part in parts:
            memory = host_buffer(part) if isinstance(part, torch.Tensor) else part
            if len(memory) <= BLOCK_BYTES:
                found.append(digest(memory))
                continue
            view = memoryview(memory)
            starts = range(0, len(view), BLOCK_BYTES)
            found += [digest(view[start : start + BLOCK_BYTES]) for start in starts]
        return b"".join(found)

    def formats(self, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, str]:
        """Strides tell everything."""
        return {}

    def readable(self, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Return them as they are."""
        return tensors

    def writable(self, tensors: Sequence[torch.Tensor]) -> Callable[[], None]:
        """Nothing has to be done."""
        return lambda: None

    def prefault(self, tensors: Sequence[torch.Tensor], stop: threading.Event) -> None:
        """Have the kernel find the pages ahead of the transfer, huge ones where these come fast.

        On a machine of one's own huge pages are many times as fast as small ones. On a virtual
        machine whose host takes back free memory they can be four times as slow, as the host then
        finds every one of their small pages anew. So each attempt is timed, and after slow ones
        the next is further away. Memory that is there is left alone, as in a reload: looking for
        its pages would cost a fifth of the transfer's time.
        """
        wait, longest = 0, 1
        for tensor in tensors:
            # A view's bytes may be spread over more memory than it has, some of it not its own.
            if tensor.nbytes < _HUGE_PAGE or not tensor.is_contiguous():
                continue
            first = -(-tensor.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
            end = (tensor.data_ptr() + tensor.nbytes) // _HUGE_PAGE * _HUGE_PAGE
            for start in range(first, end, _BLOCK):
                if stop.is_set():
                    return
                if _is_there(start):
                    continue
                nbytes = min(_BLOCK, end - start)
                if wait:
                    wait -= 1
                    _madvise(start, nbytes, _MADV_POPULATE_WRITE)
                    continue
                # Both are advice: an older kernel refuses it, and no harm is done.
                _madvise(start, nbytes, _MADV_HUGEPAGE)
                begun = time.thread_time()
                _madvise(start, nbytes, _MADV_POPULATE_WRITE)
                if time.thread_time() - begun > nbytes / _FAST:
                    wait, longest = longest, min(2 * longest, _LONGEST_WAIT)
                else:
                    longest = 1

    def synchronize(self) -> None:
        """Nothing is queued on a CPU."""

    def empty_cache(self) -> None:
        """Nothing is kept."""


def _is_there(address: int) -> bool:
    """Return whether the page that begins at an address has been found."""
    found = c_ubyte()
    return _mincore(address, 1, byref(found)) == 0 and found.value & 1 == 1
