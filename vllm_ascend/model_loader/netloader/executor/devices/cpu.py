"""CPUs: gloo over TCP, xxh3 for checksums."""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from ctypes import CDLL, PYFUNCTYPE, c_char, c_int, c_size_t, c_void_p
from datetime import timedelta

import torch
import xxhash
from torch.distributed import ProcessGroup, ProcessGroupGloo, Store, Work

from ..manifest import RAW

_HUGE_PAGE = 2 << 20
_MADV_HUGEPAGE, _MADV_POPULATE_WRITE = 14, 23  # <sys/mman.h> of Linux; 5.14 has the second
# Pages are found in blocks, huge ones as long as that is done at so many bytes per second, twice
# what small ones reach; else so many blocks at most have small ones before it is tried again.
_BLOCK, _FAST, _LONGEST_WAIT = 2 * _HUGE_PAGE, 4e9, 64
# Gloo calls a peer that has published its address and does not answer as often, each time for as
# long as its timeout says.
_CONNECT_ATTEMPTS = 5
# Messages and trailers have tags of their own: gloo ends the process that gets more bytes under a
# tag than it has room for.
_TRAILER_TAGS = 1 << 30
_trailer = torch.empty(1, dtype=torch.uint8)  # its content says nothing
_libc = CDLL(None)
_madvise = _libc.madvise
_madvise.argtypes = (c_void_p, c_size_t, c_int)
# Unlike ctypes.memmove it keeps the GIL: to give it away for every small tensor would let threads
# take turns ten thousand times.
_memmove = PYFUNCTYPE(c_void_p, c_void_p, c_void_p, c_size_t)(("memmove", _libc))


class CpuDevice:
    """See `devices.Device`."""

    digest_algorithm = "xxh3_128"
    # vLLM packs a CPU's linear weights into opaque handles: nothing processed is left to send.
    layout = RAW

    def create_group(
        self, store: Store, rank: int, local_host: str, timeout: float, gone: Callable[[], bool]
    ) -> ProcessGroup:
        """Make a gloo group that talks over the interface of `local_host`."""
        options = ProcessGroupGloo._Options()
        # Gloo takes less than a millisecond for no deadline at all.
        options._timeout = timedelta(seconds=max(timeout / _CONNECT_ATTEMPTS, 0.01))
        with _batch_scheduling():
            # Not lazily, with the first message: the store is only there for now.
            device = ProcessGroupGloo.create_device(hostname=local_host, lazy_init=False)
        options._devices = [device]
        return ProcessGroupGloo(store, rank, 2, options)

    def acceptable(self, theirs: bytes, ours: bytes) -> bool:
        """Compare the lengths in an address with those in this side's.

        gloo believes them, and would read beyond the end of the message. A host name comes first,
        then the address and two numbers; the length of either text is in eight bytes before it.
        """
        return _lengths(theirs) == _lengths(ours)

    def attached(self) -> AbstractContextManager[object]:
        """There is nothing to choose."""
        return contextlib.nullcontext()

    # A trailer of one byte follows each message. When a connection breaks, gloo wakes up those who
    # wait for a message that has not begun, but not those who wait for one that is half here. So
    # the trailer is waited for, and a peer that dies is noticed at once.

    def send(
        self, group: ProcessGroup, message: torch.Tensor, peer: int, tag: int
    ) -> tuple[Work, Work]:
        """Send with a trailer."""
        work = group.send([message], peer, tag)
        return work, group.send([_trailer], peer, _TRAILER_TAGS + tag)

    def receive(
        self, group: ProcessGroup, message: torch.Tensor, peer: int, tag: int
    ) -> tuple[Work, Work]:
        """Receive with a trailer."""
        work = group.recv([message], peer, tag)
        return work, group.recv([_trailer], peer, _TRAILER_TAGS + tag)

    def wait(self, transfer: tuple[Work, Work], timeout: float, gone: Callable[[], bool]) -> None:
        """Wait for gloo, which closes the connection when the time is up."""
        message, trailer = transfer
        trailer.wait(timedelta(seconds=timeout))
        message.wait(timedelta(seconds=timeout))

    def close(self, group: ProcessGroup, unfinished: Sequence[tuple[Work, Work]]) -> None:
        """Abort; gloo closes a connection once nobody refers to an operation on it."""
        group.abort()

    def hashes(self, tensors: Sequence[torch.Tensor]) -> tuple[bytes, ...]:
        """See `hash`."""
        return tuple(map(self.hash, tensors))

    def hash(self, tensor: torch.Tensor) -> bytes:
        """Return the XXH3 128-bit hash; the GIL is released for large data."""
        nbytes = tensor.nbytes
        if not nbytes:
            return xxhash.xxh3_128_digest(b"")
        return xxhash.xxh3_128_digest((c_char * nbytes).from_address(tensor.data_ptr()))

    # A model can have a hundred thousand small tensors. By address a copy costs under a
    # microsecond; by torch's operators and views it is five to ten.

    def pack(self, tensors: Sequence[torch.Tensor], message: torch.Tensor) -> None:
        """Copy by address."""
        end = message.data_ptr()
        for tensor in tensors:
            nbytes = tensor.nbytes
            _memmove(end, tensor.data_ptr(), nbytes)
            end += nbytes

    def unpack(self, message: torch.Tensor, tensors: Sequence[torch.Tensor]) -> None:
        """Copy by address."""
        start = message.data_ptr()
        for tensor in tensors:
            nbytes = tensor.nbytes
            _memmove(tensor.data_ptr(), start, nbytes)
            start += nbytes

    def empty(self, nbytes: int) -> torch.Tensor:
        """Return host memory."""
        return torch.empty(nbytes, dtype=torch.uint8)

    def reachable(self, tensor: torch.Tensor) -> bool:
        """All memory is a CPU's."""
        return True

    def format_of(self, tensor: torch.Tensor) -> str | None:
        """Strides tell everything."""
        return None

    def readable(self, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Return them as they are."""
        return tensors

    def writable(self, tensors: Sequence[torch.Tensor]) -> Callable[[], None]:
        """Nothing has to be done."""
        return lambda: None

    def prepare(self, tensors: Sequence[torch.Tensor], stop: threading.Event) -> None:
        """Have the kernel find the pages ahead of the transfer, huge ones where these come fast.

        On a machine of one's own huge pages are many times as fast as small ones. On a virtual
        machine whose host takes back free memory they can be four times as slow, as the host then
        finds every one of their small pages anew. So each attempt is timed, and after slow ones
        the next is further away.
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


@contextlib.contextmanager
def _batch_scheduling() -> Iterator[None]:
    """Let threads that are started meanwhile not preempt others when they wake up.

    Gloo's thread has level-triggered events and only tries to lock a connection. When it wakes up
    on the core of the thread that has it locked, it spins until its time slice ends, some 3 ms.
    """
    before = None
    with contextlib.suppress(OSError):  # where a sandbox forbids it, only speed is lost
        if os.sched_getscheduler(0) == os.SCHED_OTHER:
            before = os.sched_getparam(0)
            os.sched_setscheduler(0, os.SCHED_BATCH, before)
    try:
        yield
    finally:
        if before is not None:
            with contextlib.suppress(OSError):
                os.sched_setscheduler(0, os.SCHED_OTHER, before)


def _lengths(address: bytes) -> tuple[int, int]:
    """Return the length of what gloo sets, without the host's name, and the length inside of it."""
    host = 8 + int.from_bytes(address[:8], "little")
    return len(address) - host, int.from_bytes(address[host : host + 8], "little")
