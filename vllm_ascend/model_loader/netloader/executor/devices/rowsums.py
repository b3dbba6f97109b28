"""Digests of blocks that an accelerator computes where the bytes are.

The bytes are cut into rows, and of each row `LANES` weighted sums are taken, of its bytes as int8:
one product of two int8 matrices, however many rows there are, which devices with int8 matrix units
compute at the speed of their memory. It is exact in int32, as 4096 x 128 x 127 is below 2**31.

This is multilinear hashing (Carter and Wegman, "Universal classes of hash functions", 1979), over
the integers, with fixed odd weights from -127 to 127. A byte that changes alone changes every sum:
no weight is 0, and nothing overflows. When several change, to whatever values, then for all weights
but one of a lane given, at most one of the 128 values of that one leaves the lane's sum as it was.
So an error goes unnoticed with a probability of 128**-16 = 2**-112 at most. The weights are no
secret: this is about errors, not about attackers.

Only the sums, 1/64 of the bytes, and what is left after the last full row are copied to the host,
where XXH3 makes one digest of them, which keeps the rows in their order.
"""

import functools
import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

import torch
import xxhash

from ...utils import logger
from ..chunks.blocks import BLOCK_BYTES
from ..memory import bytes_of

ALGORITHM = "rowsums_xxh3_128"
ROW_BYTES = 4096
LANES = 16

# Rows [n, ROW_BYTES] and weights [ROW_BYTES, LANES], int8 -> sums [n, LANES], int32, exact.
Product: TypeAlias = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# Matrix units may not take a matrix that begins at any byte.
_ALIGNMENT = 64


def exact_product(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Compute a `Product` wherever there is float64, of which it takes eight times the bytes."""
    return (rows.double() @ weights.double()).to(torch.int32)


def digests(parts: Sequence[torch.Tensor], product: Product = exact_product) -> bytes:
    """Return the digests of blocks.

    Args:
        parts: contiguous tensors of any dtype and shape, all of one device; each begins a block.
        product: the device's.

    Returns:
        For each block 16 bytes: XXH3 of the sums of its rows (int32, little endian, `LANES` to a
        row), the bytes after its last full row, and its number of bytes (8 bytes, little endian).
    """
    parts = [bytes_of(part) for part in parts]
    rows = [part.numel() // ROW_BYTES for part in parts]
    full = [_rows_of(part, count) for part, count in zip(parts, rows, strict=True) if count]
    ends = [part[count * ROW_BYTES :] for part, count in zip(parts, rows, strict=True)]
    rows_of_all = _joined(full)
    sums = _to_host(
        None if rows_of_all is None else product(rows_of_all, _weights(rows_of_all.device))
    )
    rest = _to_host(_joined([end for end in ends if end.numel()]))
    found = []
    sum_at = rest_at = 0
    for part in parts:
        for offset in range(0, part.numel() or 1, BLOCK_BYTES):
            nbytes = min(BLOCK_BYTES, part.numel() - offset)
            sums_end = sum_at + nbytes // ROW_BYTES * LANES * 4
            rest_end = rest_at + nbytes % ROW_BYTES
            hasher = xxhash.xxh3_128(sums[sum_at:sums_end])
            hasher.update(rest[rest_at:rest_end])
            hasher.update(nbytes.to_bytes(8, "little"))
            found.append(hasher.digest())
            sum_at, rest_at = sums_end, rest_end
    return b"".join(found)


def agrees_with_host(device: torch.device, product: Product = exact_product) -> bool:
    """Return whether a device computes what a CPU computes.

    Raises:
        RuntimeError: the device has no memory for it just now, which says nothing of its product.
    """
    rows, weights = _noise(256, ROW_BYTES), _weights(torch.device("cpu"))
    adds = weights[:, 0] > 0
    rows[0], rows[1] = torch.where(adds, 127, -128), torch.where(adds, -128, 127)  # largest sums
    there = rows.to(device), _weights(device)
    try:
        found = product(*there).cpu()
    except Exception:  # this version of the device's software may not have it
        logger.debug("NetLoader: %s has no product of int8 matrices", device, exc_info=True)
        return False
    return torch.equal(found, exact_product(rows, weights))


def _rows_of(part: torch.Tensor, rows: int) -> torch.Tensor:
    part = part[: rows * ROW_BYTES]
    if part.data_ptr() % _ALIGNMENT:
        part = part.clone()
    return part.view(torch.int8).view(rows, ROW_BYTES)


def _joined(tensors: list[torch.Tensor]) -> torch.Tensor | None:
    if len(tensors) < 2:
        return tensors[0] if tensors else None
    return torch.cat(tensors)


def _to_host(tensor: torch.Tensor | None) -> memoryview:
    if tensor is None:
        return memoryview(b"")
    return memoryview(tensor.contiguous().cpu().view(torch.uint8).numpy().reshape(-1))


@functools.cache
def _weights(device: torch.device) -> torch.Tensor:
    return kept_on(device, _noise(ROW_BYTES, LANES) | 1)


def kept_on(device: torch.device, tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of a host's tensor on a device, which stays there.

    The thread that loads a model may allocate in a pool that vLLM's sleep mode unmaps, and does not
    fill again after level 2. Torch's pools are for one thread only, and this one is another.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(tensor.to, device).result()


def _noise(rows: int, columns: int) -> torch.Tensor:
    """Return int8 that are the same in all versions of everything."""
    data = bytearray(hashlib.shake_256(b"netloader").digest(rows * columns))
    return torch.frombuffer(data, dtype=torch.int8).view(rows, columns)
