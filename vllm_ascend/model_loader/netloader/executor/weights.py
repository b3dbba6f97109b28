"""`Weights`: a model as a source sends it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from .devices import Device
from .digest import Digests, digest_model
from .manifest import Manifest, Scalar, describe
from .plan import Plan, make_plan


@dataclass(frozen=True)
class Weights:
    """What a source sends.

    Attributes:
        manifest: names, dtypes, shapes and layout.
        tensors: the tensors without aliases, in the manifest's order.
        plan: the chunks they are hashed and sent in.
        digests: checksums of all of them.
    """

    manifest: Manifest
    tensors: Sequence[torch.Tensor]
    plan: Plan
    digests: Digests

    def names(self) -> list[str]:
        """Return the name of each tensor."""
        return [entry.name for entry in self.manifest.tensors if entry.alias_of is None]


def make_weights(
    tensors: Mapping[str, torch.Tensor],
    layout: str,
    attributes: Mapping[str, Scalar],
    chunk_bytes: int,
    device: Device,
) -> Weights:
    """Describe, cut and hash named tensors as they are to be served.

    Args:
        tensors: name -> tensor.
        layout: the manifest's layout.
        attributes: the manifest's attributes.
        chunk_bytes: chunk size in bytes.
        device: where the tensors are.

    Raises:
        LayoutUnsupported: a tensor has no memory.
    """
    manifest, distinct = describe(tensors, layout, attributes, device.format_of)
    plan = make_plan([tensor.nbytes for tensor in distinct], chunk_bytes)
    return Weights(manifest, distinct, plan, digest_model(manifest, plan, distinct, device))
