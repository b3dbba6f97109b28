"""Digests: of blocks, of tensors, and of weights, whose name the last one is.

A tensor's digest is that of its blocks' digests, and the weights digest is that of the manifest,
without `made`, and of all tensors' digests. So equal weights have equal names on every instance,
nobody can take a tensor for another one of its shape, and no setting of the transfer is in any of
it. Devices compute the digests of blocks; all that is made of these is XXH3 with 128 bits.
"""

import itertools
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import msgspec
import xxhash

from ...errors import ProtocolError
from .blocks import Blocks
from .manifest import Manifest

DIGEST_BYTES = 16
_INSTANCE = "instance:"


@dataclass(frozen=True)
class Digests:
    """The digests of some weights.

    Attributes:
        blocks: those of all blocks in order, `DIGEST_BYTES` each.
        weights: the weights digest: name of the blocks' algorithm, a colon, 32 hex digits.
    """

    blocks: bytes
    weights: str

    def of(self, block: int) -> bytes:
        """Return the digest of a block."""
        return self.blocks[block * DIGEST_BYTES : (block + 1) * DIGEST_BYTES]

    @property
    def algorithm(self) -> str:
        """The algorithm of the blocks' digests."""
        return self.weights.partition(":")[0]


def check_length(of_blocks: bytes, count: int) -> None:
    """Check that there are digests for so many blocks.

    Raises:
        ProtocolError: there are more or fewer.
    """
    if len(of_blocks) != count * DIGEST_BYTES:
        raise ProtocolError(
            f"{len(of_blocks)} bytes of digests came for {count} blocks; "
            f"expected: {count * DIGEST_BYTES}"
        )


def combine(algorithm: str, manifest: Manifest, blocks: Blocks, of_blocks: bytes) -> Digests:
    """Make the weights digest from those of all blocks.

    Args:
        algorithm: name of the blocks' algorithm.
        manifest: the weights' manifest.
        blocks: its blocks.
        of_blocks: their digests in order, `DIGEST_BYTES` each.

    Raises:
        ProtocolError: there are more or fewer digests than blocks.
    """
    check_length(of_blocks, blocks.count)
    whole = xxhash.xxh3_128(msgspec.json.encode(msgspec.structs.replace(manifest, made={})))
    ends = [block * DIGEST_BYTES for block in blocks.firsts]
    of_tensors = [xxhash.xxh3_128_digest(of_blocks[at:end]) for at, end in itertools.pairwise(ends)]
    whole.update(b"".join(of_tensors))
    return Digests(bytes(of_blocks), f"{algorithm}:{whole.hexdigest()}")


def of_instance(weights: Mapping[int, str]) -> str:
    """Return the instance digest: that of the weights digests of all its ranks."""
    lines = "".join(f"{rank} {weights[rank]}\n" for rank in sorted(weights))
    whole = xxhash.xxh3_128(lines.encode())
    return f"{_INSTANCE}{whole.hexdigest()}"


def is_of_instance(digest: str) -> bool:
    """Return whether a digest is one of an instance, and not of a rank."""
    return digest.startswith(_INSTANCE)


def is_one_of(pinned: Collection[str] | None, weights: str, ranks: Mapping[int, str]) -> bool:
    """Return whether weights are among those that an operator allows.

    Args:
        pinned: weights digests, and instance digests; None: all are allowed.
        weights: the weights digest of a rank.
        ranks: those of all ranks of its instance.
    """
    return pinned is None or weights in pinned or of_instance(ranks) in pinned
