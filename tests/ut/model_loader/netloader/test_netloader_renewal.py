"""Weights hashed anew after they have changed in place."""

import threading

import pytest
import torch
from torch import nn

from vllm_ascend.model_loader.netloader.errors import LayoutUnsupported, Withdrawn
from vllm_ascend.model_loader.netloader.executor.chunks.manifest import PROCESSED, RAW
from vllm_ascend.model_loader.netloader.executor.model.raw import scalars
from vllm_ascend.model_loader.netloader.executor.model.renewal import Renewal

from .support import store_of


class Case:
    """A model of which `plain` is served as it is; post-processing has taken `packed` away."""

    def __init__(self, packed=True):
        self.plain, self.packed = nn.Linear(3, 4, bias=False), nn.Linear(3, 5, bias=False)
        self.module = nn.ModuleDict({"plain": self.plain, "packed": self.packed})
        self.raw = self.packed.weight.detach()
        self.plain.scale = 1.5
        tensors = {"plain.weight": self.plain.weight.detach(), "packed.weight": self.raw}
        self.store = store_of(tensors, attributes={"plain.scale": 1.0})
        if packed:
            self.pack()

    def pack(self):
        self.packed.weight = nn.Parameter(torch.empty(0), requires_grad=False)

    def renewal(self, watched=True):
        return Renewal(self.module, self.store, [self.packed] if watched else [])


def hashed(renewal, directly=False):
    return renewal.hashed(directly=directly, stop=threading.Event())


@pytest.fixture
def model():
    return Case()


def test_weights_that_are_the_models_own_are_hashed_where_they_are(model):
    renewal = model.renewal()
    model.plain.weight.data.add_(1)
    now = hashed(renewal, directly=True)
    assert now.digests.weights != model.store.digests.weights
    assert now.tensors[0].data_ptr() == model.plain.weight.data_ptr()
    assert now.manifest == model.store.manifest


def test_weights_that_have_not_changed_have_the_same_digest(model):
    assert hashed(model.renewal()).digests == model.store.digests


def test_attributes_of_a_module_with_two_names_are_found_under_both():
    """As MLA has its projections in vLLM 0.32."""
    model = nn.Module()
    model.proj = nn.Linear(3, 4, bias=False)
    model.mla = nn.Module()
    model.mla.proj = model.proj
    model.proj.processed = True
    tensors = {"proj.weight": model.proj.weight.detach()}
    renewal = Renewal(model, store_of(tensors, attributes=scalars(model), layout=PROCESSED))
    assert hashed(renewal).manifest.attributes == scalars(model)


def test_what_is_kept_beside_the_model_is_copied_when_its_layer_is_processed_again(model):
    renewal = model.renewal()
    new = torch.rand(5, 3)
    model.packed.weight = nn.Parameter(new.clone(), requires_grad=False)
    renewal.refresh(model.packed)
    model.pack()
    now = hashed(renewal)
    assert torch.equal(now.tensors[1], new)
    assert now.tensors[1].data_ptr() == model.raw.data_ptr()
    assert renewal.concerns(model.packed) and not renewal.concerns(model.plain)


def test_what_a_layer_cannot_be_read_from_any_more_is_refused_until_it_can(model):
    renewal = model.renewal()
    model.packed.weight = nn.Parameter(torch.rand(6, 3), requires_grad=False)
    renewal.refresh(model.packed)
    with pytest.raises(LayoutUnsupported, match=r"packed\.weight was made by post-processing"):
        hashed(renewal)
    model.packed.weight = nn.Parameter(torch.rand(5, 3), requires_grad=False)
    renewal.refresh(model.packed)
    hashed(renewal)


def test_what_was_made_of_raw_tensors_may_not_be_written_to_directly():
    model = Case(packed=False)
    model.packed.weight = nn.Parameter(model.raw * 2, requires_grad=False)
    renewal = model.renewal()
    hashed(renewal)
    with pytest.raises(LayoutUnsupported, match=r"packed\.weight was made by post-processing"):
        hashed(renewal, directly=True)


def test_what_nobody_tells_of_may_have_changed(model):
    with pytest.raises(LayoutUnsupported, match=r"packed\.weight was made by post-processing"):
        hashed(model.renewal(watched=False))


def test_memory_that_the_model_has_given_up_is_not_hashed(model):
    renewal = model.renewal()
    model.plain.weight = nn.Parameter(torch.rand(4, 3))
    with pytest.raises(LayoutUnsupported, match=r"plain\.weight is no longer where it was"):
        hashed(renewal)


def test_layers_that_have_got_other_names_are_the_same_layers(model):
    renewal = model.renewal()
    model.module["plain"] = nn.ModuleDict({"base_layer": model.plain})
    assert hashed(renewal).digests == model.store.digests


def test_attributes_of_raw_weights_that_have_changed_are_refused(model):
    renewal = model.renewal()
    hashed(renewal)  # it was 1.0 before post-processing and is 1.5 since
    model.plain.scale = 2.0
    with pytest.raises(LayoutUnsupported, match=r"attribute plain\.scale has changed"):
        hashed(renewal)


def test_attributes_of_processed_weights_are_what_they_are_now():
    model = Case(packed=False)
    tensors = {"plain.weight": model.plain.weight, "packed.weight": model.packed.weight}
    model.store = store_of(tensors, attributes={"plain.scale": 1.5}, layout=PROCESSED)
    renewal = model.renewal()
    model.plain.scale = 2.0
    now = hashed(renewal)
    assert now.manifest.attributes == {"plain.scale": 2.0}
    assert now.digests.weights != model.store.digests.weights
    del model.plain.scale
    with pytest.raises(LayoutUnsupported, match=r"attribute plain\.scale has changed"):
        hashed(renewal)
    assert model.store.manifest.layout != RAW


def test_processed_weights_that_post_processing_has_made_anew_are_hashed_where_they_are_now():
    model = Case(packed=False)
    model.packed.made = torch.ones(5)
    names = ["plain.weight", "packed.weight", "packed.made"]
    tensors = dict(zip(names, (*model.module.parameters(), model.packed.made), strict=True))
    model.store = store_of(tensors, layout=PROCESSED)
    renewal = model.renewal()
    model.packed.made = torch.full((5,), 2.0)
    now = hashed(renewal)
    assert now.manifest == model.store.manifest
    assert now.digests.weights != model.store.digests.weights
    assert now.tensors[2].data_ptr() == model.packed.made.data_ptr()
    model.packed.made = torch.ones(6)
    with pytest.raises(
        LayoutUnsupported, match=r"packed\.made is no longer where .* is float32\[6\]"
    ):
        hashed(renewal)


def test_hashing_ends_when_the_weights_are_about_to_change_again(model):
    stop = threading.Event()
    stop.set()
    with pytest.raises(Withdrawn):
        model.renewal().hashed(directly=False, stop=stop)
