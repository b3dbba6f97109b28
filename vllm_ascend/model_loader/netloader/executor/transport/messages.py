"""A run of blocks as one message in the memory of an accelerator, or in the host's beside it."""

import torch

from ..chunks.blocks import Run
from ..devices import Accelerator
from ..memory import bytes_of, in_place, write
from ..store import BlockStore


def own_memory(run: Run, store: BlockStore, accelerator: Accelerator) -> torch.Tensor | None:
    """Return a run's own memory if it is in one piece that messages can reach.

    Returns:
        uint8 of shape [size of the run], or None.
    """
    spans = store.blocks.spans(run)
    if len(spans) > 1:
        return None
    memory = in_place(spans[0], store.readable)
    if memory is None or not accelerator.reachable(memory):
        return None
    return memory if memory.dtype == torch.uint8 and memory.dim() == 1 else bytes_of(memory)


def unpack(run: Run, store: BlockStore, message: torch.Tensor, accelerator: Accelerator) -> None:
    """Copy a message, uint8 of the run's size on the device, into the run's memory."""
    spans = store.blocks.spans(run)
    parts = [place for span in spans if (place := in_place(span, store.tensors)) is not None]
    if len(parts) == len(spans):
        accelerator.unpack(message, parts)
        return
    datas = message.split([span.nbytes for span in spans])
    for span, data in zip(spans, datas, strict=True):
        write(span, store.tensors, data)


def to_host(run: Run, store: BlockStore, host: torch.Tensor, accelerator: Accelerator) -> None:
    """Copy a run's bytes to host memory, uint8 of the run's size."""
    message = own_memory(run, store, accelerator)
    if message is None:
        message = accelerator.empty(host.numel())
        accelerator.pack(store.parts(run), message)
    host.copy_(message)


def from_host(run: Run, store: BlockStore, host: torch.Tensor, accelerator: Accelerator) -> None:
    """Copy host memory, uint8 of the run's size, into the run's memory."""
    message = own_memory(run, store, accelerator)
    if message is not None:
        message.copy_(host)
        return
    message = accelerator.empty(host.numel())
    message.copy_(host)
    unpack(run, store, message, accelerator)
