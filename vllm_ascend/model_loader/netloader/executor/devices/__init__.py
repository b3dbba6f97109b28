"""What differs by accelerator, and nothing else: one module for each."""

import threading
from collections.abc import Sequence
from typing import Protocol

import torch
from torch.distributed import ProcessGroup, Store, Work

from ...errors import LayoutUnsupported


class Device(Protocol):
    """What the data plane needs of an accelerator."""

    @property
    def digest_algorithm(self) -> str:
        """Name of the algorithm behind `hash`."""

    @property
    def layout(self) -> str:
        """The layout in which instances on this device exchange weights with INT8_CACHE=no."""

    def create_group(
        self, store: Store, rank: int, local_host: str, timeout: float
    ) -> ProcessGroup:
        """Make a two-rank process group outside torch's default one.

        Args:
            store: where the two meet; no other group uses its keys.
            rank: 0: the client, 1: the source.
            local_host: the address of this machine that the peer reaches.
            timeout: seconds for making it.

        Raises:
            RuntimeError: the peer did not come, or went away.
        """

    def wait(self, work: Work, timeout: float) -> None:
        """Return once a transfer has happened, not merely been queued.

        Raises:
            RuntimeError: it failed, or `timeout` seconds passed.
        """

    def hash(self, tensor: torch.Tensor) -> bytes:
        """Return the checksum of a contiguous tensor's bytes, whatever its dtype and shape."""

    def pack(self, tensors: Sequence[torch.Tensor], message: torch.Tensor) -> None:
        """Copy the bytes of contiguous tensors, one after the other, into a uint8 message."""

    def unpack(self, message: torch.Tensor, tensors: Sequence[torch.Tensor]) -> None:
        """Copy a uint8 message into contiguous tensors, one after the other."""

    def empty(self, nbytes: int) -> torch.Tensor:
        """Return uninitialized uint8 memory for staging."""

    def prepare(self, tensors: Sequence[torch.Tensor], stop: threading.Event) -> None:
        """Get memory ready that is about to be written for the first time; contents stay.

        Runs beside the transfer, in a thread of its own, until it is done or `stop` is set.
        """

    def synchronize(self) -> None:
        """Return once everything queued on the device has happened."""


def device_of(kind: str) -> Device:
    """Return the device of a kind, as in `torch.device.type`.

    Raises:
        LayoutUnsupported: NetLoader does not know that kind.
    """
    if kind == "cpu":
        from .cpu import CpuDevice

        return CpuDevice()
    raise LayoutUnsupported(f"NetLoader moves no tensors between devices of kind {kind!r}")
