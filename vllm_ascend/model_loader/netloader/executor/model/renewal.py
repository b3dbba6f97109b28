"""Offering a model's weights anew once they have changed in place."""

import threading
import weakref
from collections.abc import Collection, Mapping

import torch
from torch import nn

from ...errors import LayoutUnsupported
from ..chunks.manifest import PROCESSED, RAW, Scalar
from ..store import BlockStore
from .match import match
from .processed import processed_tensors
from .raw import is_scalar


class Renewal:
    """What a model's store needs to be hashed anew after the model's weights have changed.

    Most of the store's tensors are the model's own memory, which vLLM keeps when it changes
    weights. In the raw layout the others are kept beside it, as post-processing has replaced or
    changed them; they are brought up to date whenever it runs again.

    Args:
        model: post-processed, ready for inference.
        store: its weights, as they are offered.
        watched: the layers of which `refresh` is told.
    """

    def __init__(
        self, model: nn.Module, store: BlockStore, watched: Collection[nn.Module] = ()
    ) -> None:
        self.store = store
        self._watched = weakref.WeakSet(watched)
        self._model = weakref.ref(model)
        modules = dict(model.named_modules(remove_duplicate=False))
        self._beside: weakref.WeakKeyDictionary[nn.Module, dict[str, tuple[str, torch.Tensor]]]
        self._beside = weakref.WeakKeyDictionary()
        self._stale: set[str] = set()
        self._made_before: Mapping[str, bytes] | None = None
        if store.manifest.layout == RAW:  # in the other layout all are the model's own
            in_use = _memory(processed_tensors(model))
            for name, tensor in zip(store.manifest.names, store.tensors, strict=True):
                path, _, attribute = name.rpartition(".")
                if _where(tensor) not in in_use and path in modules:
                    self._beside.setdefault(modules[path], {})[attribute] = name, tensor
        # LoRA gives layers other names later on.
        self._holders = {
            name: (weakref.ref(modules[path]), attribute)
            for name in store.manifest.attributes
            for path, _, attribute in [name.rpartition(".")]
            if path in modules
        }
        self._scalars = self._attributes()

    def concerns(self, layer: nn.Module) -> bool:
        """Return whether raw tensors of a layer are kept beside it."""
        return layer in self._beside

    def refresh(self, layer: nn.Module) -> None:
        """Copy the raw tensors of a layer that is about to be post-processed again."""
        for attribute, (name, tensor) in self._beside.get(layer, {}).items():
            raw = getattr(layer, attribute, None)
            if isinstance(raw, torch.Tensor) and _kind(raw) == _kind(tensor):
                tensor.copy_(raw.detach())
                self._stale.discard(name)
            else:
                self._stale.add(name)

    def remember(self) -> None:
        """Take note of what post-processing has made, so that `hashed` sees what is written to."""
        if self._beside:
            self._made_before = self._made()

    def hashed(self, *, directly: bool, stop: threading.Event) -> BlockStore:
        """Return a store of the weights as they are now.

        Args:
            directly: whether tensors may have been written to without post-processing.
            stop: ends it early, as the weights are about to change again.

        Raises:
            LayoutUnsupported: what clients would need is not known any more; names it.
            Withdrawn: it was stopped.
        """
        model = self._model()
        if model is None:
            raise LayoutUnsupported("the model is gone")
        written = directly and (self._made_before is None or self._made() != self._made_before)
        self._made_before = None
        self._stale |= {
            name
            for layer, tensors in self._beside.items()
            for attribute, (name, _) in tensors.items()
            if layer not in self._watched
            or (written and _has_memory(getattr(layer, attribute, None)))
        }
        if self._stale:
            raise LayoutUnsupported(
                f"{min(self._stale)} was made by post-processing, and what it is made of now is "
                "not known"
            )
        beside = {id(tensor) for tensors in self._beside.values() for _, tensor in tensors.values()}
        used = processed_tensors(model)
        in_use = _memory(used)
        for name, tensor in zip(self.store.manifest.names, self.store.tensors, strict=True):
            if tensor.nbytes and id(tensor) not in beside and _where(tensor) not in in_use:
                self.store = self._found_again(name, used)
                break
        return self.store.hashed_anew(self._renewed_attributes(), stop)

    def _found_again(self, moved: str, used: Mapping[str, torch.Tensor]) -> BlockStore:
        """Return a store of the model's tensors, some of which post-processing has made anew.

        Raises:
            LayoutUnsupported: they are not those of before.
        """
        manifest = self.store.manifest
        if manifest.layout == RAW:
            raise LayoutUnsupported(f"{moved} is no longer where it was")
        try:
            formats = self.store.device.formats(used)
            tensors = match(manifest, used, (), formats, manifest.meaning)
        except LayoutUnsupported as error:
            raise LayoutUnsupported(f"{moved} is no longer where it was: {error}") from None
        return self.store.with_tensors(tensors)

    def _made(self) -> dict[str, bytes]:
        """Return the digests of what inference uses and clients do not get."""
        model, device = self._model(), self.store.device
        if model is None:
            return {}
        sent = {_where(tensor) for tensor in self.store.tensors}
        with device.attached():
            device.synchronize()
            return {
                name: device.digests(device.readable([tensor.contiguous()]))
                for name, tensor in processed_tensors(model).items()
                if _has_memory(tensor) and _where(tensor) not in sent
            }

    def _renewed_attributes(self) -> Mapping[str, Scalar]:
        now, known = self._attributes(), self.store.manifest.attributes
        # In the raw layout they are as they were before post-processing.
        if self.store.manifest.layout == RAW and now == self._scalars:
            return known
        if self.store.manifest.layout == PROCESSED and now.keys() == known.keys():
            return now
        changed = [name for name in known if now.get(name) != self._scalars.get(name)]
        raise LayoutUnsupported(f"attribute {min(changed)} has changed")

    def _attributes(self) -> dict[str, Scalar]:
        return {
            name: vars(module)[attribute]
            for name, (reference, attribute) in self._holders.items()
            if (module := reference()) is not None and is_scalar(vars(module).get(attribute, self))
        }


def _memory(tensors: Mapping[str, torch.Tensor]) -> set[tuple[int, int]]:
    return {_where(tensor) for tensor in tensors.values()}


def _where(tensor: torch.Tensor) -> tuple[int, int]:
    return (tensor.data_ptr() if tensor.numel() else 0), tensor.nbytes


def _kind(tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size]:
    return tensor.dtype, tensor.shape


def _has_memory(value: object) -> bool:
    return isinstance(value, torch.Tensor) and not value.is_meta and value.numel() > 0
