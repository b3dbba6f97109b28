"""Checksums of pieces, chunks and whole models.

A chunk's digest is the hash of its pieces' hashes, and a model's digest the hash of its chunks'
digests: so each tensor's part is known by itself, and can be named when it differs.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import xxhash

from .devices import Device
from .pieces import contiguous_parts
from .plan import Chunk, Plan


@dataclass(frozen=True)
class Digests:
    """Checksums of a model under one plan.

    Attributes:
        pieces: for each chunk the hash of each of its pieces.
        chunks: for each chunk its digest in hex.
        model: digest of the whole model in hex; it depends on the chunk size.
    """

    pieces: tuple[tuple[bytes, ...], ...]
    chunks: tuple[str, ...]
    model: str


def piece_hashes(
    chunk: Chunk, tensors: Sequence[torch.Tensor], device: Device
) -> tuple[bytes, ...]:
    """Hash each piece of a chunk as it stands in the tensors' memory."""
    return tuple(map(device.hash, contiguous_parts(chunk, tensors)))


def chunk_digest(hashes: Iterable[bytes]) -> str:
    """Return a chunk's digest from the hashes of its pieces."""
    return xxhash.xxh3_128_hexdigest(b"".join(hashes))


def combine(pieces: Iterable[tuple[bytes, ...]]) -> Digests:
    """Make all digests of a model from the hashes of its pieces."""
    hashes = tuple(pieces)
    chunks = tuple(map(chunk_digest, hashes))
    return Digests(hashes, chunks, model_digest(chunks))


def model_digest(chunks: Iterable[str]) -> str:
    """Return a model's digest from those of its chunks, in order."""
    return xxhash.xxh3_128_hexdigest("".join(chunks).encode())


def digest_model(plan: Plan, tensors: Sequence[torch.Tensor], device: Device) -> Digests:
    """Hash a whole model."""
    device.synchronize()
    return combine(piece_hashes(chunk, tensors, device) for chunk in plan.chunks)
