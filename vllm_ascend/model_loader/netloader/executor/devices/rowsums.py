"""Checksums that an accelerator computes where the bytes are.

The bytes are cut into rows, and of each row four weighted sums are taken modulo 2**32, of its
16-bit words with fixed odd weights: multilinear hashing (Carter and Wegman, "Universal classes of
hash functions", 1979), of which accelerators do all rows at once. A word that changes always
changes all four sums, and several that change leave all four as they were with a probability of
2**-64 at most: the weights are 32 bits, of which a difference in the highest bit of two words
leaves 16. Only the sums, 1/256 of the bytes, and what is left after the last full row are copied to
the host, where XXH3 makes one checksum of them, which keeps the rows in their order.
"""

import functools
import hashlib
from collections.abc import Sequence

import torch
import xxhash

from ..pieces import bytes_of

ALGORITHM = "rowsums-xxh3_128"
ROW_BYTES = 4096
LANES = 4

# Rows that are summed in one step; a step takes about nine times their bytes.
_STEP = 1024


def hashes(tensors: Sequence[torch.Tensor]) -> tuple[bytes, ...]:
    """Return the checksum of each tensor.

    Args:
        tensors: contiguous tensors of any dtype and shape, all of one device.

    Returns:
        For each one the XXH3 128-bit hash of its row sums (int32, little endian, `LANES` to a row),
        the bytes after its last full row, and its number of bytes (8 bytes, little endian).
    """
    parts = [bytes_of(tensor) for tensor in tensors]
    rows = [part.numel() // ROW_BYTES for part in parts]
    full = [_rows_of(part, count) for part, count in zip(parts, rows, strict=True) if count]
    ends = [part[count * ROW_BYTES :] for part, count in zip(parts, rows, strict=True)]
    sums = _to_host(row_sums(_joined(full)) if full else None)
    rest = _to_host(_joined([end for end in ends if end.numel()]))
    digests = []
    sum_at = rest_at = 0
    for part, count, end in zip(parts, rows, ends, strict=True):
        sums_end, rest_end = sum_at + count * LANES * 4, rest_at + end.numel()
        hasher = xxhash.xxh3_128(sums[sum_at:sums_end])
        hasher.update(rest[rest_at:rest_end])
        hasher.update(part.numel().to_bytes(8, "little"))
        digests.append(hasher.digest())
        sum_at, rest_at = sums_end, rest_end
    return tuple(digests)


def row_sums(rows: torch.Tensor) -> torch.Tensor:
    """Return the weighted sums of rows.

    Args:
        rows: int16 of shape [n, ROW_BYTES / 2].

    Returns:
        int32 of shape [n, LANES].
    """
    weights = _weights(rows.device)
    sums = []
    for step in rows.split(_STEP):
        words = step.to(torch.int32)
        lanes = [(words * weight).sum(1, dtype=torch.int32) for weight in weights]
        sums.append(torch.stack(lanes, 1))
    return _joined(sums)


def agrees_with_host(device: torch.device) -> bool:
    """Return whether a device computes what a CPU computes."""
    rows = _noise(_STEP // 2, ROW_BYTES // 2, torch.int16)
    return torch.equal(row_sums(rows.to(device)).cpu(), row_sums(rows))


def _rows_of(part: torch.Tensor, rows: int) -> torch.Tensor:
    part = part[: rows * ROW_BYTES]
    if part.storage_offset() % 2:
        part = part.clone()  # a view as words has to begin at one
    return part.view(torch.int16).view(rows, ROW_BYTES // 2)


def _joined(tensors: list[torch.Tensor]) -> torch.Tensor | None:
    if len(tensors) < 2:
        return tensors[0] if tensors else None
    return torch.cat(tensors)


def _to_host(tensor: torch.Tensor | None) -> memoryview:
    if tensor is None:
        return memoryview(b"")
    return memoryview(tensor.contiguous().cpu().view(torch.uint8).numpy().reshape(-1))


@functools.cache
def _weights(device: torch.device) -> tuple[torch.Tensor, ...]:
    return tuple((_noise(LANES, ROW_BYTES // 2, torch.int32) | 1).to(device))


def _noise(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Return numbers that are the same in all versions of everything."""
    data = bytearray(hashlib.shake_256(b"netloader").digest(rows * columns * dtype.itemsize))
    return torch.frombuffer(data, dtype=dtype).view(rows, columns)
