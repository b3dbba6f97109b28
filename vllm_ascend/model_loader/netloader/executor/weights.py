"""`Weights`: a model as a source sends it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .digest import Digests
from .manifest import Manifest
from .plan import Plan


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
