"""What accelerators whose work is queued on streams have in common."""

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple, cast

import torch
from torch.distributed import ProcessGroup, Work

from ...utils import Patience, logger, within
from ..chunks.manifest import PROCESSED
from ..memory import Part, as_tensor, bytes_of
from . import Accelerator, rowsums
from .cpu import CpuDevice

# How often a transfer is looked at: at first often, as a chunk takes a fraction of a millisecond.
_FIRST_PAUSE, _LONGEST_PAUSE = 20e-6, 1e-3
# Seconds for what should have happened already, such as the end of what a peer sent and hung up.
GRACE = 0.5
# How long a backend is given to end what it was doing when its group is aborted.
_DRAIN = 5.0


class Transfer(NamedTuple):
    """A message on its way.

    Attributes:
        work: the backend's operation.
        message: the memory, which must not be used for anything else before the end of it.
    """

    work: Work
    message: torch.Tensor


# Messages of operations that did not end when their group was aborted. Nobody knows when they will,
# so their memory is never used again.
_abandoned: list[Transfer] = []


class StreamDevice:
    """What `devices.Device` asks for, as far as it is the same on all of them.

    Args:
        device: with its index.
        api: `torch.npu` or `torch.cuda`.
    """

    # Post-processed weights are tensors here, and are sent as inference uses them.
    layout = PROCESSED

    def __init__(self, device: torch.device, api: ModuleType) -> None:
        self.device = device
        self._api = api
        self._idle_streams: list[Any] = []

    @property
    def accelerator(self) -> Accelerator:
        """Its memory is its own."""
        return cast(Accelerator, self)  # with what subclasses add

    @functools.cached_property
    def _hashes_on_device(self) -> bool:
        agrees = rowsums.agrees_with_host(self.device, self.int8_product)
        if not agrees:
            logger.warning(
                "NetLoader: %s does not compute the digests that a CPU computes; they are computed "
                "on the host",
                self.device,
            )
        return agrees

    @property
    def digest_algorithm(self) -> str:
        """Row sums, unless the device cannot compute them or gets them wrong."""
        return rowsums.ALGORITHM if self._hashes_on_device else CpuDevice.digest_algorithm

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Choose the device for this thread, and a stream of low priority.

        Streams are used again: torch hands out the same few of them in turn, and after a few dozen
        sessions one would have been inference's.
        """
        self._api.set_device(self.device)
        try:
            stream = self._idle_streams.pop()
        except IndexError:
            stream = self._api.Stream(self.device)
        try:
            with self._api.stream(stream):
                yield
        finally:
            self._idle_streams.append(stream)

    def connect(
        self, timeout: float, gone: Callable[[], bool], meet: Callable[[], ProcessGroup]
    ) -> ProcessGroup:
        """Return the group in which `meet` has found the peer.

        Backends look for it in the thread that asks, with a deadline of their own, of minutes.

        Args:
            timeout: seconds, which `meet` keeps by itself where its backend lets it.
            gone: whether the peer has hung up.
            meet: makes the group, or raises and leaves nothing behind.

        Raises:
            RuntimeError: the time was up, or the peer has hung up.
        """

        def attached() -> ProcessGroup:
            with self.attached():
                return meet()

        # Longer than `meet` takes, which then has tidied up when its session ends.
        patience = Patience(timeout + GRACE, gone, 2 * GRACE)
        try:
            return within(patience, attached, lambda group: self.close(group, []))
        except TimeoutError:
            late = f"not connected within {timeout:.1f} s"
            raise RuntimeError("the peer has hung up" if patience.hung_up else late) from None

    def exchange(
        self, group: ProcessGroup, rank: int, timeout: float, gone: Callable[[], bool]
    ) -> ProcessGroup:
        """Send a byte from the source to the client, which makes the backend connect the two.

        Raises:
            RuntimeError: it did not arrive; the group is closed.
        """
        started: list[Transfer] = []
        try:
            start = self.send if rank else self.receive
            started.append(start(group, self.empty(1), 1 - rank))
            self.wait(started[0], timeout, gone)
        except RuntimeError:
            self.close(group, started)
            raise
        return group

    def send(self, group: ProcessGroup, message: torch.Tensor, peer: int) -> Transfer:
        """Send as int8, which every version of HCCL and NCCL knows."""
        return Transfer(group.send([message.view(torch.int8)], peer, 0), message)

    def receive(self, group: ProcessGroup, message: torch.Tensor, peer: int) -> Transfer:
        """Receive as int8."""
        return Transfer(group.recv([message.view(torch.int8)], peer, 0), message)

    def wait(self, transfer: Transfer, timeout: float, gone: Callable[[], bool]) -> None:
        """Ask the operation's event until it has happened.

        Its `wait` would only put streams in order, and synchronizing has no deadline.
        """
        patience, pause = Patience(timeout, gone, GRACE), _FIRST_PAUSE
        while not transfer.work.is_completed():
            if patience.over():
                stalled = f"no progress for {timeout:g} s"
                raise RuntimeError("the peer has hung up" if patience.hung_up else stalled)
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        if not transfer.work.is_success():
            raise RuntimeError("the peer has hung up" if gone() else "the transfer failed")

    def close(self, group: ProcessGroup, unfinished: Sequence[Transfer]) -> None:
        """Abort, and see to it that the operations that were under way have ended."""
        ended = self.abort(group, bool(unfinished))
        deadline = time.monotonic() + _DRAIN
        while not ended and unfinished and not unfinished[-1].work.is_completed():
            if time.monotonic() > deadline:
                logger.warning("NetLoader: %d transfers did not end when aborted", len(unfinished))
                _abandoned.extend(unfinished)
                return
            time.sleep(_LONGEST_PAUSE)

    def abort(self, group: ProcessGroup, unfinished: bool) -> bool:
        """Destroy a group's communicator.

        Args:
            group: the group.
            unfinished: whether operations may be under way.

        Returns:
            Whether they have certainly ended by now.
        """
        group.abort()
        return False

    def digests(self, parts: Sequence[Part]) -> bytes:
        """See `rowsums`; parts in host memory, as copies of INT8_CACHE are, are brought here."""
        tensors = [as_tensor(part) for part in parts]
        if self._hashes_on_device:
            here = [one if self.reachable(one) else one.to(self.device) for one in tensors]
            return rowsums.digests(here, self.int8_product)
        return CpuDevice().digests([one.cpu() for one in tensors])

    def int8_product(self, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """See `rowsums.Product`."""
        return rowsums.exact_product(rows, weights)

    def pack(self, tensors: Sequence[torch.Tensor], message: torch.Tensor) -> None:
        """Copy in one operation where all of it is on the device."""
        parts = [bytes_of(tensor) for tensor in tensors]
        if all(map(self.reachable, parts)):
            torch.cat(parts, out=message)
        else:
            _copy(parts, message.split([part.numel() for part in parts]))

    def unpack(self, message: torch.Tensor, tensors: Sequence[torch.Tensor]) -> None:
        """Copy to each tensor."""
        parts = [bytes_of(tensor) for tensor in tensors]
        _copy(message.split([part.numel() for part in parts]), parts)

    def empty(self, nbytes: int) -> torch.Tensor:
        """Return memory of the device."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def empty_host(self, nbytes: int) -> torch.Tensor:
        """Return pinned memory."""
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def reachable(self, tensor: torch.Tensor) -> bool:
        """Host memory is not: backends take tensors of their device only."""
        return tensor.device == self.device

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
        """A device's memory has no pages to be mapped."""

    def synchronize(self) -> None:
        """Wait for all streams of the device."""
        try:
            self._api.synchronize(self.device)
        except RuntimeError:
            # A session that was given up meanwhile: taking its work off the device ends this, too.
            self._api.synchronize(self.device)

    def empty_cache(self) -> None:
        """Have torch's allocator do it."""
        self._api.empty_cache()


def _copy(sources: Sequence[torch.Tensor], destinations: Sequence[torch.Tensor]) -> None:
    """Copy tensors one by one, between device and host too."""
    for source, destination in zip(sources, destinations, strict=True):
        destination.copy_(source)
