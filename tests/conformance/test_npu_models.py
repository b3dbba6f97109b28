"""Modules whose weights were post-processed as vLLM Ascend does it, and INT8_CACHE."""

import functools
import gc

import pytest
import torch
from torch import nn

from vllm_ascend.model_loader.netloader.config import Int8Cache
from vllm_ascend.model_loader.netloader.executor.chunks.manifest import PROCESSED, RAW
from vllm_ascend.model_loader.netloader.executor.model.processed import (
    processed_tensors,
)
from vllm_ascend.model_loader.netloader.executor.model.raw import (
    after_processing,
    before_loading,
    capture_loaded,
    copy_int8,
    raw_tensors,
)
from vllm_ascend.model_loader.netloader.executor.store import make_store

from .models import FRACTAL_NZ, MIB, Maker
from .sides import differing, identity, load_here, serve
from .ways import Way

WAY = Way.HCCL
pytestmark = pytest.mark.ways(WAY)


def make_nz(tensor):
    import torch_npu

    return torch_npu.npu_format_cast(tensor, FRACTAL_NZ)


# What follows is shaped like vLLM Ascend's layers and what they do after loading.


class Linear(nn.Module):
    """W8A8 with scales of the activations."""

    def __init__(self, make):
        super().__init__()
        self.weight = parameter(make(torch.int8, 128, 256))
        self.weight_scale = parameter(make(torch.bfloat16, 128, 1))
        self.weight_offset = parameter(make(torch.bfloat16, 128, 1))
        self.input_scale = parameter(make(torch.int16, 1).bfloat16())
        self.input_offset = parameter(make(torch.int8, 1))
        self.deq_scale = parameter(make(torch.float32, 128))
        self.quant_bias = parameter(make(torch.int32, 128))

    def process(self):
        expanding = self.weight.data.shape[1]
        self.aclnn_input_scale = parameter(self.input_scale.data.repeat(expanding))
        self.aclnn_input_scale_reciprocal = 1 / parameter(self.input_scale.data.repeat(expanding))
        self.aclnn_input_offset = parameter(self.input_offset.data.repeat(expanding)).to(
            self.aclnn_input_scale.dtype
        )
        self.weight.data = make_nz(self.weight.data.transpose(0, 1).contiguous())
        self.weight_scale.data = torch.flatten(self.weight_scale.data)
        self.weight_offset.data = torch.flatten(self.weight_offset.data)


class MoE(nn.Module):
    """W8A8_DYNAMIC."""

    def __init__(self, make, lists=False):
        super().__init__()
        self.lists = lists
        self.w13_weight = parameter(make(torch.int8, 4, 128, 64))
        self.w2_weight = parameter(make(torch.int8, 4, 64, 64))
        self.w13_weight_scale = parameter(make(torch.bfloat16, 4, 128, 1))
        self.w2_weight_scale = parameter(make(torch.bfloat16, 4, 64, 1))

    def process(self):
        for weight in (self.w13_weight, self.w2_weight):
            weight.data = make_nz(weight.data.transpose(1, 2).contiguous())
        for scale in (self.w13_weight_scale, self.w2_weight_scale):
            scale.data = scale.data.view(scale.data.shape[0], -1)
        self.w13_weight_scale_fp32 = self.w13_weight_scale.data.to(torch.float32)
        self.fused_w1_scale = self.w13_weight_scale.data.to(torch.float32).view(torch.int32).long()
        if self.lists:  # for the load balancer of experts
            for name in ("w13_weight", "w2_weight", "w13_weight_scale_fp32", "w2_weight_scale"):
                whole = getattr(self, name)
                setattr(self, f"{name}_list", [part.clone() for part in whole.data.unbind(dim=0)])
                delattr(self, name)
            torch.npu.empty_cache()


class PackedMoE(nn.Module):
    """W4A8: int4 weights, packed."""

    def __init__(self, make):
        super().__init__()
        self.w13_weight = parameter(make(torch.int8, 2, 128, 64))
        self.w2_weight = parameter(make(torch.int8, 2, 64, 64))
        self.w13_weight_scale = parameter(make(torch.float32, 2, 1, 128))

    def process(self):
        for weight in (self.w13_weight, self.w2_weight):
            weight.data = make_nz(weight.data.transpose(1, 2).contiguous())
            weight.data = weight.data.view(torch.int32).contiguous()
        self.w13_weight_scale.data = self.w13_weight_scale.data.view(torch.int32).long()
        bias = self.w13_weight_scale.data.to(torch.float32).sum(1)
        self.register_parameter("w13_scale_bias", parameter(bias))


class Impl:
    """An attention's implementation, which is no module."""

    def process(self, weight, heads):
        keys, values = weight.view(64, heads, 2 * 32).split([32, 32], dim=-1)
        self.W_UV = values.transpose(0, 1).contiguous()
        self.W_UK_T = make_nz(keys.permute(1, 2, 0).contiguous())
        self.W_permuted = keys.contiguous().permute(1, 2, 0)


class MLA(nn.Module):
    """Latent attention: the weights of a linear layer, absorbed."""

    def __init__(self, make):
        super().__init__()
        self.kv_b_proj = parameter(make(torch.bfloat16, 256, 64))
        self.impl = Impl()

    def process(self):
        self.impl.process(self.kv_b_proj.data.T, 4)


class Model(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.embed = parameter(make(torch.bfloat16, 500, 64))
        self.layers = nn.ModuleList(
            [Linear(make), MoE(make), MoE(make, lists=True), PackedMoE(make), MLA(make)]
        )
        self.lm_head = self.embed

    def process(self):
        for layer in self.layers:
            layer.process()


def parameter(tensor):
    return nn.Parameter(tensor, requires_grad=False)


# Processed


def processed(make, change=None):
    """The tensors of a model, which stays as long as they are used."""
    model = Model(make)
    model.process()
    if change is not None:
        change(model)
    _models.append(model)
    return processed_tensors(model)


_models = []


def serve_processed(change=None):
    processed(Maker(WAY, 0), change)
    return serve(WAY, make_store(processed_tensors(_models[-1]), PROCESSED, {}, WAY.device()))


def load_processed(address, change=None):
    outcome = load_here(WAY, [address], processed, into=functools.partial(processed, change=change))
    if not outcome.reasons:
        # The model's own tensors, found anew: the load may have replaced memory, not tensors.
        found = [processed_tensors(model) for model in _models[-2:]]
        assert differing(WAY, *found) == []
    return outcome


@pytest.fixture
def two(started):
    return started(0), started(1)


def test_every_tensor_of_a_processed_model_arrives(way, two):
    source, client = two
    client.call(load_processed, source.call(serve_processed)).check()


def names_and_formats():
    device = WAY.device()
    tensors = processed(Maker(WAY, 0))
    strided = {name: "" if one.is_contiguous() else "strided" for name, one in tensors.items()}
    return strided | device.formats(tensors)


def test_the_tensors_that_vllm_ascend_derives_are_found(way, started):
    found = started(0).call(names_and_formats)
    row_major = (
        "layers.0.aclnn_input_scale layers.0.aclnn_input_scale_reciprocal layers.0.deq_scale "
        "layers.0.aclnn_input_offset layers.0.quant_bias layers.1.w13_weight_scale_fp32 "
        "layers.1.fused_w1_scale layers.2.w2_weight_scale_list[3] layers.3.w13_scale_bias "
        "layers.4.impl.W_UV lm_head"
    )
    in_nz = "layers.0.weight layers.1.w13_weight layers.3.w2_weight layers.4.impl.W_UK_T"
    assert [found[name] for name in row_major.split()] == [""] * 11
    assert [found[name] for name in in_nz.split()] == ["FRACTAL_NZ"] * 4
    assert found["layers.4.impl.W_permuted"] == "strided"
    assert "layers.2.w13_weight_list[0]" in found


def add_derived(model):
    model.layers[4].impl.W_extra = torch.ones(5).npu()


def restride(model):
    impl = model.layers[4].impl
    impl.W_permuted = impl.W_permuted.contiguous()


@pytest.mark.parametrize(
    ("there", "here", "reason"),
    [
        (add_derived, None, "layers.4.impl.W_extra is only there"),
        (None, add_derived, "layers.4.impl.W_extra is only here"),
        (None, restride, "layers.4.impl.W_permuted is row-major here and strided"),
    ],
)
def test_what_one_side_has_derived_otherwise_is_refused_by_name(way, two, there, here, reason):
    source, client = two
    address = source.call(serve_processed, there)
    client.call(load_processed, address, here).check_failed(reason)


# INT8_CACHE


class Big(nn.Module):
    """Enough int8 to see it in the counters: 8 MiB."""

    def __init__(self, make):
        super().__init__()
        self.layers = nn.ModuleList([Linear(make), MoE(make)])
        self.big = nn.ModuleList([Linear(make) for _ in range(2)])
        for layer in self.big:
            layer.weight = parameter(make(torch.int8, 2048, 2048))

    def process(self):
        for layer in [*self.layers, *self.big]:
            layer.process()


def allocated():
    gc.collect()
    torch.npu.current_stream().synchronize()
    return torch.npu.memory_allocated() / MIB


def serve_raw(cache):
    """Loads, keeps, post-processes and offers a model as the loader does it.

    Returns the address, how many MB of the device it takes beyond those of the model, and where
    each tensor is kept.
    """
    device = WAY.device()
    checkpoint = raw_tensors(Big(Maker(WAY, 0)))[0]
    before = allocated()
    model = Big(Maker(WAY, 1))
    _models.append(model)
    nothing_loaded = before_loading(model, device)
    tensors = raw_tensors(model)[0]
    for name in tensors:
        tensors[name].copy_(checkpoint[name])
    store = capture_loaded(model, nothing_loaded, device)
    copies = copy_int8(store, cache, None)
    del tensors
    model.process()
    in_use = processed_tensors(model)
    store = after_processing(store, copies, in_use)
    del copies
    places = {
        name: (tensor.dtype, tensor.device.type)
        for name, tensor in zip(store.manifest.names, store.tensors, strict=True)
    }
    address = serve(WAY, store, who=identity(WAY, layout=RAW))
    size = sum(tensor.nbytes for tensor in in_use.values()) / MIB
    return address, allocated() - before - size, places


def raw(make):
    model = Big(make)
    _models.append(model)
    return raw_tensors(model)[0]


def load_raw(address):
    outcome = load_here(WAY, [address], raw, who=identity(WAY, layout=RAW)).check()
    for model in _models[-2:]:
        model.process()
    assert differing(WAY, *map(processed_tensors, _models[-2:])) == []
    return outcome


EVERY_INT8 = "layers.0.weight", "layers.1.w13_weight", "big.0.weight", "big.1.weight"


@pytest.mark.parametrize(
    ("cache", "place", "least", "most"),
    [(Int8Cache.HBM, "npu", 8, 10), (Int8Cache.DRAM, "cpu", -1, 2)],
)
def test_with_int8_cache_the_raw_weights_arrive(way, two, cache, place, least, most):
    source, client = two
    address, more, places = source.call(serve_raw, cache)
    client.call(load_raw, address)
    assert [places[name] for name in EVERY_INT8] == [(torch.int8, place)] * 4
    assert least <= more < most
