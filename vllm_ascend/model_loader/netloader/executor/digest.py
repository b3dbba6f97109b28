"""Checksums of pieces, chunks and whole models.

A chunk's digest is the hash of its pieces' hashes, and a model's digest the hash of its chunks'
digests and its manifest: so each tensor's part is known by itself, and can be named when it
differs, and nobody can take a tensor for another one of its shape.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec
import torch
import xxhash

from .devices import Device
from .manifest import Manifest
from .pieces import piece_hashes
from .plan import Plan


@dataclass(frozen=True)
class Digests:
    """Checksums of a model under one plan.

    Attributes:
        pieces: for each chunk the hash of each of its pieces.
        chunks: for each chunk its digest in hex.
        model: digest of the whole model in hex, manifest included; it depends on the chunk size.
    """

    pieces: tuple[tuple[bytes, ...], ...]
    chunks: tuple[str, ...]
    model: str


def chunk_digest(hashes: Iterable[bytes]) -> str:
    """Return a chunk's digest from the hashes of its pieces."""
    return xxhash.xxh3_128_hexdigest(b"".join(hashes))


def combine(manifest: Manifest, pieces: Iterable[tuple[bytes, ...]]) -> Digests:
    """Make all digests of a model from its manifest and the hashes of its pieces."""
    hashes = tuple(pieces)
    chunks = tuple(map(chunk_digest, hashes))
    return Digests(hashes, chunks, model_digest(manifest, chunks))


def model_digest(manifest: Manifest, chunks: Iterable[str]) -> str:
    """Return a model's digest from its manifest and the digests of its chunks, in order."""
    return xxhash.xxh3_128_hexdigest(msgspec.json.encode([manifest, *chunks]))


def digest_model(
    manifest: Manifest, plan: Plan, tensors: Sequence[torch.Tensor], device: Device
) -> Digests:
    """Hash a whole model."""
    device.synchronize()
    tensors = device.readable(tensors)
    return combine(manifest, (piece_hashes(chunk, tensors, device) for chunk in plan.chunks))
