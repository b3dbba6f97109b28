"""Every kind of tensor arrives bit by bit, and what has arrived can be offered on."""

import pytest
import torch

from vllm_ascend.model_loader.netloader.executor.store import make_store

from . import models
from .models import rows
from .sides import expected, load, load_here, loading, source


@pytest.mark.parametrize("changes", [{}, {"chunk_mib": 4}, {"connections": 3}], ids=str)
def test_every_kind_of_tensor_arrives(way, changes):
    with source(way, models.assorted) as running:
        outcome = load(way, [running], models.assorted, **changes)
    assert outcome.check().digest == running.store.digests.weights


@pytest.mark.parametrize(
    "model",
    [
        models.nothing,
        models.only_empty,
        models.one_scalar,
        models.packed,
        models.thousands,
        models.parameters,
    ],
)
def test_every_kind_of_model_arrives(way, model):
    with source(way, model) as running:
        outcome = load(way, [running], model)
    assert outcome.check().digest == running.store.digests.weights


def test_unverified_bytes_arrive_too(way):
    with source(way) as running:
        load(way, [running], verify=False).check()


def test_attributes_travel_with_the_tensors(way):
    attributes = {"flag": True, "scale": 1.5, "layer.name": "x", "none": None, "count": 3}
    device = way.device()
    tensors = expected(way, models.small, 0)
    with source(way, make_store(tensors, device.layout, attributes, device)) as running:
        outcome = load(way, [running], models.small)
    assert outcome.check().attributes == attributes


def test_tensors_made_under_inference_mode_arrive(way):
    # vLLM reloads weights under inference mode, while the transfer runs in threads without it.
    with torch.inference_mode(), source(way, models.assorted) as running:
        load(way, [running], models.assorted).check()


def test_tensors_that_no_source_has_stay_as_they_are(way):
    with source(way) as running:
        outcome = load_here(
            way, [running], into=models.more_rows, required=set(expected(way, rows, 0))
        )
    assert outcome.reasons == ""


def test_several_clients_at_once_are_all_served_right(way):
    with (
        source(way) as running,
        loading(way, [running]) as one,
        loading(way, [running]) as another,
        loading(way, [running]) as third,
    ):
        for result in (one, another, third):
            result().check()
