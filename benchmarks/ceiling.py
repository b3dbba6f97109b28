"""What NetLoader itself costs: the data plane over a device that moves and hashes in no time."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch

from vllm_ascend.model_loader.netloader.executor.chunks.blocks import BLOCK_BYTES, Blocks, Run
from vllm_ascend.model_loader.netloader.executor.chunks.digests import DIGEST_BYTES, Digests
from vllm_ascend.model_loader.netloader.executor.chunks.manifest import RAW
from vllm_ascend.model_loader.netloader.executor.devices import Accelerator
from vllm_ascend.model_loader.netloader.executor.devices.cpu import CpuDevice
from vllm_ascend.model_loader.netloader.executor.elastic_load import P2PLoad, P2PSend
from vllm_ascend.model_loader.netloader.executor.memory import Part
from vllm_ascend.model_loader.netloader.executor.model.match import describe
from vllm_ascend.model_loader.netloader.executor.rate_limiter import RateLimiter
from vllm_ascend.model_loader.netloader.executor.scheduler import Scheduler
from vllm_ascend.model_loader.netloader.executor.store import BlockStore
from vllm_ascend.model_loader.netloader.executor.transport.group import (
    CLIENT,
    SOURCE,
    GroupReceiver,
    GroupSender,
    TransferGroup,
)

_CHUNK_BYTES = 4 << 20


class NullDevice(CpuDevice):
    """Every message is there at once, and all digests are zeros."""

    def digests(self, parts: Sequence[Part]) -> bytes:
        """See `devices.Device`."""
        sizes = [part.nbytes if isinstance(part, torch.Tensor) else len(part) for part in parts]
        return bytes(DIGEST_BYTES * sum(-(-size // BLOCK_BYTES) or 1 for size in sizes))

    def empty(self, nbytes: int) -> torch.Tensor:
        """See `devices.Accelerator`."""
        return torch.empty(nbytes, dtype=torch.uint8)

    def reachable(self, tensor: torch.Tensor) -> bool:
        """See `devices.Accelerator`."""
        return True

    def nothing(self, *_: Any) -> None:
        """Move a message, or wait until it was moved."""

    pack = unpack = send = receive = wait = close = nothing


class _Answers:
    """A source that answers at once; see `transport.group.Control`."""

    answered = True

    def __init__(self, blocks: Blocks) -> None:
        self._blocks = blocks

    def ask(self, runs: Sequence[Run]) -> None:
        self._sizes = [self._blocks.size_of(run) for run in runs]

    def answer(self) -> list[int]:
        return self._sizes


def gb_per_s(named: dict[str, torch.Tensor], rounds: int) -> float:
    """Return how fast the slower end of a session is, whatever the link and the device."""
    device = NullDevice()
    accelerator = cast(Accelerator, device)
    manifest, tensors, sizes = describe(named, RAW, {}, {})
    blocks = Blocks(sizes)
    runs = blocks.cut(_CHUNK_BYTES, large_alone=True)
    digests = Digests(bytes(DIGEST_BYTES * blocks.count), "none:0")

    def store(complete: bool) -> BlockStore:
        return BlockStore(manifest, blocks, tensors, digests, device, complete=complete)

    def group(rank: int) -> TransferGroup:
        nobody = cast(Any, object())
        return TransferGroup(nobody, nobody, rank, accelerator, 10.0, lambda: False)

    def receive() -> None:
        filled = store(complete=False)
        receiver = GroupReceiver(_Answers(blocks), group(CLIENT), filled, accelerator, _CHUNK_BYTES)
        scheduler = Scheduler(blocks, runs)
        P2PLoad(receiver, filled, scheduler, verify=True, keep_alive=10.0).run()

    def send() -> None:
        offered = store(complete=True)
        sender = GroupSender(group(SOURCE), offered, accelerator)
        sends = P2PSend(offered, sender, RateLimiter(None))
        for run in runs:
            sends.send(run)
        sender.finish()

    return blocks.nbytes / 1e9 / max(_median(receive, rounds), _median(send, rounds))


def _median(do: Callable[[], None], rounds: int) -> float:
    """Return the seconds of CPU that something takes."""
    seconds = []
    for _ in range(rounds):
        started = time.thread_time()
        do()
        seconds.append(time.thread_time() - started)
    return statistics.median(seconds)
