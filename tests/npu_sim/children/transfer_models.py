"""Modules whose weights were post-processed as vLLM Ascend does it, and INT8_CACHE."""

import gc

import msgspec
import torch
from torch import nn
from transfer_support import (
    IDENTITY,
    MIB,
    LoadFailed,
    Outcome,
    Process,
    case,
    differing,
    here,
    load_into,
    maker,
    nz,
    serve_weights,
)

from vllm_ascend.model_loader.netloader.config import Int8Cache
from vllm_ascend.model_loader.netloader.executor.manifest import RAW
from vllm_ascend.model_loader.netloader.executor.processed import (
    capture_processed,
    processed_tensors,
)
from vllm_ascend.model_loader.netloader.executor.weight_cache import (
    after_processing,
    before_loading,
    capture_loaded,
    copy_int8,
    raw_tensors,
)

# ------------------------------------------------------------------------------------ layers
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
        self.weight.data = nz(self.weight.data.transpose(0, 1).contiguous())
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
            weight.data = nz(weight.data.transpose(1, 2).contiguous())
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
            weight.data = nz(weight.data.transpose(1, 2).contiguous())
            weight.data = weight.data.view(torch.int32).contiguous()
        self.w13_weight_scale.data = self.w13_weight_scale.data.view(torch.int32).long()
        bias = self.w13_weight_scale.data.to(torch.float32).sum(1)
        self.register_parameter("w13_scale_bias", parameter(bias))


class Impl:
    """An attention's implementation, which is no module."""

    def process(self, weight, heads):
        keys, values = weight.view(64, heads, 2 * 32).split([32, 32], dim=-1)
        self.W_UV = values.transpose(0, 1).contiguous()
        self.W_UK_T = nz(keys.permute(1, 2, 0).contiguous())
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
    def __init__(self, seed):
        super().__init__()
        make = maker(seed)
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


# ------------------------------------------------------------------------------------ processed


def serve_model(seed=0, change=None):
    here.model = Model(seed)
    here.model.process()
    if change is not None:
        change(here.model)
    return serve_weights(capture_processed(here.model, {}, MIB, here.device))


def load_model(sources, change=None):
    model, expected = Model(1), Model(0)
    for one in (model, expected):
        one.process()
    if change is not None:
        change(model)
    tensors = processed_tensors(model)
    try:
        load_into(tensors, sources)
    except LoadFailed as error:
        return Outcome(str(error), [], 0)
    # The model's own tensors, found anew: the load may have replaced memory, not tensors.
    return Outcome(None, differing(processed_tensors(model), processed_tensors(expected)), 0)


@case
def every_tensor_of_a_processed_model_arrives():
    source, client = Process(0), Process(1)
    client.call(load_model, [source.call(serve_model)]).check()


def names_and_formats():
    model = Model(0)
    model.process()
    return {
        name: here.device.format_of(tensor) or ("" if tensor.is_contiguous() else "strided")
        for name, tensor in processed_tensors(model).items()
    }


@case
def the_tensors_that_vllm_ascend_derives_are_found():
    found = Process(0).call(names_and_formats)
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


@case
def what_only_the_source_has_derived_is_refused_by_name():
    source, client = Process(0), Process(1)
    outcome = client.call(load_model, [source.call(serve_model, change=add_derived)])
    outcome.check_failed("layers.4.impl.W_extra is only there")


@case
def what_only_the_client_has_derived_is_refused_by_name():
    source, client = Process(0), Process(1)
    outcome = client.call(load_model, [source.call(serve_model)], change=add_derived)
    outcome.check_failed("layers.4.impl.W_extra is only here")


@case
def what_has_other_strides_is_refused_by_name():
    source, client = Process(0), Process(1)
    outcome = client.call(load_model, [source.call(serve_model)], change=restride)
    outcome.check_failed("layers.4.impl.W_permuted is row-major here and strided")


# ------------------------------------------------------------------------------------ INT8_CACHE

RAW_IDENTITY = msgspec.structs.replace(IDENTITY, layout=RAW)


class Big(nn.Module):
    """Enough int8 to see it in the counters: 8 MiB."""

    def __init__(self, seed):
        super().__init__()
        make = maker(seed)
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

    Returns the address, and how many MB of the device it takes beyond those of the model.
    """
    checkpoint = raw_tensors(Big(0))[0]
    before = allocated()
    here.model = Big(1)
    nothing_loaded = before_loading(here.model, here.device)
    tensors = raw_tensors(here.model)[0]
    for name in tensors:
        tensors[name].copy_(checkpoint[name])
    weights = capture_loaded(here.model, nothing_loaded, MIB, here.device)
    copies = copy_int8(weights, cache, None)
    del tensors
    here.model.process()
    in_use = processed_tensors(here.model)
    weights = after_processing(weights, copies, here.device, in_use)
    del copies
    here.places = {
        name: (tensor.dtype, tensor.device.type)
        for name, tensor in zip(weights.names(), weights.tensors, strict=True)
    }
    address = serve_weights(weights, who=RAW_IDENTITY)
    model = sum(tensor.nbytes for tensor in in_use.values()) / MIB
    return address, allocated() - before - model


def places():
    return here.places


def load_raw(sources):
    model, expected = Big(5), Big(0)
    tensors, required = raw_tensors(model)
    load_into(tensors, sources, who=RAW_IDENTITY)
    raw = differing(raw_tensors(model)[0], raw_tensors(expected)[0])
    for one in (model, expected):
        one.process()
    return raw, differing(processed_tensors(model), processed_tensors(expected)), len(required)


def int8_cache(cache):
    source, client = Process(0), Process(1)
    address, more = source.call(serve_raw, cache)
    wrong, wrong_afterwards, count = client.call(load_raw, [address])
    assert wrong == wrong_afterwards == [] and count > 20
    return source.call(places), more


BIG_INT8 = 8
EVERY_INT8 = "layers.0.weight", "layers.1.w13_weight", "big.0.weight", "big.1.weight"


@case
def with_int8_cache_hbm_the_raw_weights_arrive_and_are_kept_on_the_device():
    kept_at, more = int8_cache(Int8Cache.HBM)
    assert [kept_at[name] for name in EVERY_INT8] == [(torch.int8, "npu")] * 4
    assert BIG_INT8 <= more < BIG_INT8 + 2, more


@case
def with_int8_cache_dram_the_raw_weights_arrive_and_leave_the_device():
    kept_at, more = int8_cache(Int8Cache.DRAM)
    assert [kept_at[name] for name in EVERY_INT8] == [(torch.int8, "cpu")] * 4
    assert more < 2, more
