"""What differs by accelerator, and nothing else: one module for each."""

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch.distributed import ProcessGroup, Store

from ...utils import logger
from ..memory import Part


class Device(Protocol):
    """What the data plane needs of an accelerator."""

    @property
    def accelerator(self) -> "Accelerator | None":
        """This device if its memory is its own; None: it is the host's, which sockets can reach."""

    @property
    def digest_algorithm(self) -> str:
        """Name of the algorithm behind `digests`."""

    @property
    def layout(self) -> str:
        """The layout in which instances on this device exchange weights with INT8_CACHE=no."""

    def attached(self) -> AbstractContextManager[object]:
        """Enter in each thread that uses the device: chooses it, and a stream of the thread's own.

        What the thread queues there waits for nothing that inference does, and the other way round.
        """

    def digests(self, parts: Sequence[Part]) -> bytes:
        """Return the digests of blocks.

        Args:
            parts: of tensors of any dtype and shape; each begins a block.

        Returns:
            16 bytes for each `BLOCK_BYTES` of each part, and for what is left of it, if only that
            it has no bytes.
        """

    def formats(self, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, str]:
        """Name the way in which tensors lie in memory, of those of which strides do not tell it."""

    def readable(self, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Return tensors in which those with a format are copies without one.

        Such copies are made when an item is asked for, and only the last one is kept.
        """

    def writable(self, tensors: Sequence[torch.Tensor]) -> Callable[[], None]:
        """Give tensors with a format memory without one, whose contents are undefined.

        Returns:
            What to call to bring all of them back into their format with their new contents.

        Raises:
            LayoutUnsupported: a tensor shares its memory with another one that would not follow.
        """

    def prefault(self, tensors: Sequence[torch.Tensor], stop: threading.Event) -> None:
        """Have memory that is about to be written for the first time mapped; contents stay.

        Runs beside the transfer, in a thread of its own, until it is done or `stop` is set.
        """

    def synchronize(self) -> None:
        """Return once everything queued on the device has happened."""

    def empty_cache(self) -> None:
        """Give back memory that torch keeps for later: HCCL and NCCL ask the device for theirs.

        Waits for what is queued on the device, so nothing calls it while an instance infers.
        """


class Accelerator(Device, Protocol):
    """A device with memory and a fabric of its own, such as HCCL's or NCCL's."""

    def pack(self, tensors: Sequence[torch.Tensor], message: torch.Tensor) -> None:
        """Copy the bytes of contiguous tensors, one after the other, into a uint8 message."""

    def unpack(self, message: torch.Tensor, tensors: Sequence[torch.Tensor]) -> None:
        """Copy a uint8 message into contiguous tensors, one after the other."""

    def empty(self, nbytes: int) -> torch.Tensor:
        """Return uninitialized uint8 memory for staging."""

    def empty_host(self, nbytes: int) -> torch.Tensor:
        """Return uninitialized uint8 memory of the host that the device copies from and to fast."""

    def reachable(self, tensor: torch.Tensor) -> bool:
        """Return whether messages can be sent from and received into a tensor's own memory."""

    def create_group(
        self, store: Store, rank: int, local_host: str, timeout: float, gone: Callable[[], bool]
    ) -> ProcessGroup:
        """Make a two-rank process group outside torch's default one.

        Args:
            store: where the two meet; no other group uses its keys.
            rank: 0: the client, 1: the source.
            local_host: the address of this machine that the peer reaches.
            timeout: seconds for making it.
            gone: whether the peer has hung up; asked where the backend cannot tell by itself.

        Raises:
            RuntimeError: the peer did not come, or went away.
        """

    def send(self, group: ProcessGroup, message: torch.Tensor, peer: int) -> Any:
        """Start sending contiguous uint8 memory of the device; return what to `wait` for.

        Messages of one group complete in the order in which they were started.
        """

    def receive(self, group: ProcessGroup, message: torch.Tensor, peer: int) -> Any:
        """Start receiving into contiguous uint8 memory; see `send`."""

    def wait(self, transfer: Any, timeout: float, gone: Callable[[], bool]) -> None:
        """Return once a transfer has happened, not merely been queued.

        Args:
            transfer: what `send` or `receive` has returned.
            timeout: seconds after which the peer counts as lost.
            gone: whether the peer has hung up; asked where the backend cannot tell by itself.

        Raises:
            RuntimeError: it failed, the peer is gone, or `timeout` seconds passed.
        """

    def close(self, group: ProcessGroup, unfinished: Sequence[Any]) -> None:
        """Leave a group, after which no byte is written to any tensor.

        Args:
            group: the group, which nobody uses any more.
            unfinished: the transfers that were started and not waited for.
        """


def start_prefault(
    device: Device, tensors: Sequence[torch.Tensor], stop: threading.Event
) -> threading.Thread | None:
    """Start to `prefault` the memory of tensors in a thread; None: only speed is lost."""

    def prefault() -> None:
        try:
            device.prefault(tensors, stop)
        except Exception:  # only speed is lost
            logger.debug("NetLoader: cannot prefault memory", exc_info=True)

    thread = threading.Thread(target=prefault, name="netloader-prefault", daemon=True)
    try:
        thread.start()
    except RuntimeError:  # no more threads
        return None
    return thread
