"""Weights as inference uses them: found, described, sent and received wherever they are."""

import collections
import dataclasses
import math
import types

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from vllm_ascend.model_loader.netloader.errors import LayoutUnsupported
from vllm_ascend.model_loader.netloader.executor.chunks.blocks import Span
from vllm_ascend.model_loader.netloader.executor.chunks.manifest import PROCESSED
from vllm_ascend.model_loader.netloader.executor.memory import write
from vllm_ascend.model_loader.netloader.executor.model.match import describe, match
from vllm_ascend.model_loader.netloader.executor.model.processed import (
    changed_scalars,
    defined_memory,
    processed_tensors,
)
from vllm_ascend.model_loader.netloader.executor.model.raw import apply_attributes, scalars
from vllm_ascend.model_loader.netloader.executor.store import make_store

from .support import DEVICE, DTYPES, blank_like, bytes_of, differing

# Models as vLLM Ascend leaves them


class Impl:
    """An attention's: no module, and it holds what MLA has made of `kv_b_proj`."""

    def __init__(self, generator):
        kv_b = torch.randn(16, 4, 24, generator=generator)
        w_uk, w_uv = kv_b.split([16, 8], dim=-1)
        self.W_UV = w_uv.transpose(0, 1).contiguous()
        self.W_UK_T = w_uk.permute(1, 2, 0).contiguous().permute(0, 2, 1)  # a view that is turned
        self.scale = 0.5
        self.num_heads = 4


class QuantMethod:
    """The outer one of a quantized layer, with the scheme's own inside."""

    def __init__(self, inner):
        self.quant_method = inner


class Scheme:
    def __init__(self, generator):
        self.table = torch.randn(7, generator=generator)
        self.transpose_weight = True


class VllmConfig:
    """Of the instance; holds a tensor that is none of the model's."""

    __module__ = "vllm.config"

    def __init__(self):
        self.secret = torch.ones(2)


class Attention(nn.Module):
    def __init__(self, generator):
        super().__init__()
        self.q_proj = nn.Linear(16, 16, bias=False)
        self.impl = Impl(generator)
        self.kv_cache = torch.zeros(4, 4)
        self.vllm_config = VllmConfig()
        self.register_buffer("cos", torch.randn(5, generator=generator), persistent=False)
        self._k_scale = torch.randn((), generator=generator)
        self.impl.layer = self  # a cycle
        self.impl.itself = self.impl


class Experts(nn.Module):
    def __init__(self, generator):
        super().__init__()
        int8 = torch.randint(-128, 128, (2, 3, 8, 16), generator=generator, dtype=torch.int8)
        self.w13_weight = nn.Parameter(int8[0], requires_grad=False)
        self.w2_weight = nn.Parameter(int8[1].transpose(1, 2), requires_grad=False)
        self.w13_weight_scale_fp32_list = list(torch.randn(3, 8, generator=generator))
        self.scales = {"w2": torch.randn(3, generator=generator), 1: (torch.ones(2),)}
        self.quant_method = QuantMethod(Scheme(generator))
        self.expert_load_view = torch.zeros(3)
        self.moe_load = torch.zeros(3)
        self.log2phy = None


class Layer(nn.Module):
    def __init__(self, generator):
        super().__init__()
        self.attn = Attention(generator)
        self.experts = Experts(generator)


class Model(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embed = nn.Embedding(10, 16)
        self.head = nn.Linear(16, 10, bias=False)
        self.layers = nn.ModuleList(Layer(generator) for _ in range(2))
        for parameter in self.parameters():
            if parameter.is_floating_point():
                parameter.data = torch.randn(parameter.shape, generator=generator)
        self.head.weight = self.embed.weight
        self.flag = False


LAYER = {
    "attn.q_proj.weight",
    "attn.cos",
    "attn._k_scale",
    "attn.impl.W_UV",
    "attn.impl.W_UK_T",
    "experts.w13_weight",
    "experts.w2_weight",
    "experts.w13_weight_scale_fp32_list[0]",
    "experts.w13_weight_scale_fp32_list[1]",
    "experts.w13_weight_scale_fp32_list[2]",
    "experts.scales['w2']",
    "experts.scales[1][0]",
    "experts.quant_method.quant_method.table",
}
NAMES = {"embed.weight", "head.weight"} | {f"layers.{i}.{name}" for i in (0, 1) for name in LAYER}


# What is found


def test_every_tensor_that_inference_uses_is_found_under_a_name_of_its_own():
    model = Model()
    tensors = processed_tensors(model)
    assert set(tensors) == NAMES
    assert tensors["layers.1.attn.impl.W_UV"] is model.layers[1].attn.impl.W_UV
    assert tensors["head.weight"] is tensors["embed.weight"] is model.embed.weight
    assert len({id(tensor) for tensor in tensors.values()}) == len(NAMES) - 1


def test_names_are_the_same_in_the_same_order_each_time():
    assert list(processed_tensors(Model(0))) == list(processed_tensors(Model(1)))


def found(**attributes):
    """The names found on a module with these attributes."""
    model = nn.Module()
    for name, value in attributes.items():
        setattr(model, name, value)
    return set(processed_tensors(model))


T = torch.ones(2)


def test_tensors_on_the_root_module_have_names_without_a_path():
    assert found(a=T, b=[T]) == {"a", "b[0]"}


@pytest.mark.parametrize(
    "value",
    [
        torch.ones(2, device="meta"),
        VllmConfig(),
        types.SimpleNamespace(config=VllmConfig()),
        [VllmConfig()],
        nn.Linear,
        math,
        np.ones(2),
        "text",
        None,
    ],
)
def test_what_belongs_to_no_model_is_not_found(value):
    assert found(a=value) == set()


def test_tensors_without_memory_are_left_out_of_parameters_too():
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    model.bias = nn.Parameter(torch.ones(2))
    assert set(processed_tensors(model)) == {"bias"}


def class_of(module, name="Thing"):
    """A class of that name, whose objects have a tensor."""
    return type(name, (), {"__module__": module, "__init__": lambda self: vars(self).update(a=T)})


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("vllm.distributed.parallel_state", "GroupCoordinator"),
        ("logging", "Logger"),
        ("vllm.config.model", "ModelConfig"),
        ("transformers.configuration_utils", "PretrainedConfig"),
        ("vllm.model_executor.layers.quantization.base_config", "QuantizationConfig"),
    ],
)
def test_objects_of_the_instance_are_not_looked_into(module, name):
    base = class_of(module, name)

    class Derived(base):  # as in the code that a model brings along
        pass

    assert found(one=base(), other=[Derived()]) == set()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("vllm.model_executor.layers.quantization.base_config", "QuantizeMethodBase"),
        ("vllm.model_executor.layers.fused_moe.config", "FusedMoEQuantConfig"),  # has scales
        ("triton_kernels.matmul_ogs", "PrecisionConfig"),  # the same, with gpt-oss
    ],
)
def test_objects_of_layers_are_looked_into_whatever_they_are_called(module, name):
    assert found(method=class_of(module, name)()) == {"method.a"}


def test_objects_are_looked_into_as_deep_as_vllm_nests_them():
    value = T
    path = "kernel.fused_experts.moe_quant_config._w1.scale.weight_scale.storage.data"
    for name in reversed(path.split(".")):
        value = types.SimpleNamespace(**{name: value})
    assert found(quant_method=value) == {f"quant_method.{path}"}


def test_what_inference_writes_is_left_out_wherever_it_is():
    impl = types.SimpleNamespace(kv_cache=T, weight=T, moe_load=T)
    assert found(impl=impl, kv_cache=T, expert_load_view=T) == {"impl.weight"}
    adapters = types.SimpleNamespace(weights={"lora": T})
    assert found(lora_manager=adapters, punica_wrapper=adapters, lora_a_stacked=(T,)) == set()


def test_a_cache_of_several_tensors_is_left_out_too():
    """Mamba layers have a tuple of them, vLLM Ascend's attention a list."""
    assert found(kv_cache=(T, T)) == set()
    assert found(impl=types.SimpleNamespace(kv_cache=[T], key_cache=T, value_cache=T)) == set()


def test_cycles_end_and_each_object_is_looked_into_once():
    first, second = types.SimpleNamespace(a=T), types.SimpleNamespace(b=T)
    first.other, second.other = second, first
    assert found(one=first, two=second) == {"one.a", "one.other.b"}


def test_containers_of_every_kind_are_looked_into():
    Pair = collections.namedtuple("Pair", ("x", "y"))

    @dataclasses.dataclass
    class Holder:
        held: torch.Tensor

    ordered = collections.OrderedDict(k=[T])
    assert found(a=Pair(T, 1), b=Holder(T), c=ordered, d={"e": {0: T}}) == {
        "a[0]",
        "b.held",
        "c['k'][0]",
        "d['e'][0]",
    }


def test_modules_outside_of_the_tree_are_looked_into_and_those_inside_are_not():
    layer = nn.Linear(2, 2)
    layer.table = [T]
    layer.register_buffer("cache", T, persistent=False)
    outer = nn.Sequential(layer)
    outer.itself = [outer]
    assert found(poolers={"embed": outer}) == {
        f"poolers['embed'].{name}" for name in ("0.weight", "0.bias", "0.cache", "0.table[0]")
    }
    inside = nn.Linear(2, 2)
    assert found(child=inside, others=[inside]) == {"child.weight", "child.bias"}


@pytest.mark.parametrize("value", [{T}, frozenset({nn.Linear(1, 1)})])
def test_a_set_with_tensors_has_no_order_and_is_refused(value):
    with pytest.raises(LayoutUnsupported, match="a is a set with tensors"):
        found(a=value)
    assert found(a={1, "text"}) == set()


def test_a_tensor_that_has_several_names_is_found_under_all():
    model = Model()
    shared = model.layers[0].attn.impl.W_UV
    model.layers[1].attn.impl.W_UV = shared
    tensors = processed_tensors(model)
    assert set(tensors) == NAMES
    manifest, *_ = describe(tensors, PROCESSED, {}, {})
    aliases = {entry.name: entry.alias_of for entry in manifest.tensors if entry.alias_of}
    assert aliases == {
        "head.weight": "embed.weight",
        "layers.1.attn.impl.W_UV": "layers.0.attn.impl.W_UV",
    }


# What travels


def captured(model, before=None):
    attributes = changed_scalars(before, scalars(model)) if before is not None else {}
    return make_store(processed_tensors(model), PROCESSED, attributes, DEVICE)


def pull(store, into):
    """Bring a store's bytes to other tensors, as transports do."""
    received = match(store.manifest, into, into.keys(), {})
    for there, here in zip(store.tensors, received, strict=True):
        write(Span(0, 0, there.nbytes), [here], bytes_of(there).clone())


def test_a_model_is_filled_with_what_another_one_uses_and_is_a_source_of_the_same():
    there, here = Model(0), Model(1)
    before = scalars(there)
    there.flag, there.layers[1].limit = True, 7.5
    tensors = processed_tensors(here)
    strides = {name: tensor.stride() for name, tensor in tensors.items()}
    addresses = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    assert differing(tensors, processed_tensors(there))
    store = captured(there, before)
    pull(store, tensors)
    unfilled = scalars(here)
    apply_attributes(here, store.manifest.attributes)
    assert differing(processed_tensors(here), processed_tensors(there)) == []
    assert {name: tensor.stride() for name, tensor in tensors.items()} == strides
    assert {name: tensor.data_ptr() for name, tensor in tensors.items()} == addresses
    assert (here.flag, here.layers[1].limit) == (True, 7.5)
    again = captured(here, unfilled)
    assert again.digests == store.digests
    assert again.manifest == store.manifest


def turned(dtype=torch.float32, count=24):
    return torch.arange(count).to(dtype).view(2, 3, 4).permute(2, 0, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8, torch.float32, torch.int64])
def test_a_permuted_tensor_travels_as_its_memory(dtype):
    tensor = turned(dtype)
    manifest, [sent], _ = describe({"t": tensor}, PROCESSED, {}, {})
    assert sent.is_contiguous()
    assert sent.data_ptr() == tensor.data_ptr()
    assert sent.tolist() == list(range(24))
    assert manifest.tensors[0].stride == tensor.stride()
    here = blank_like({"t": tensor})
    [received] = match(manifest, here, {"t"}, {})
    received.copy_(sent)
    assert torch.equal(here["t"], tensor)


@st.composite
def _strided(draw):
    """A tensor whose dimensions lie in memory in any order, with gaps or without."""
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    order = draw(st.permutations(range(len(shape))))
    dtype = draw(st.sampled_from([torch.int8, torch.bfloat16, torch.int64]))
    gaps = draw(st.booleans())
    made = torch.randint(-100, 100, [size + gaps for size in shape]).to(dtype)
    return made[tuple(slice(size) for size in shape)].permute(order)


@given(st.lists(_strided(), min_size=1, max_size=4))
def test_tensors_of_any_strides_arrive_as_they_are(made):
    tensors = {f"t{index}": tensor for index, tensor in enumerate(made)}
    manifest, sent, _ = describe(tensors, PROCESSED, {}, {})
    here = blank_like(tensors)
    received = match(manifest, here, here, {})
    for one, other in zip(sent, received, strict=True):
        assert one.stride() == other.stride()
        other.copy_(one)
    assert differing(tensors, here) == []


def test_memory_between_the_elements_of_a_tensor_is_left_alone():
    there, around = {"t": torch.ones(4, 4)[:, ::2]}, torch.zeros(4, 4)
    pull(captured_of(there), {"t": around[:, ::2]})
    assert (around[:, ::2] == 1).all()
    assert (around[:, 1::2] == 0).all()


def captured_of(tensors):
    module = nn.Module()
    for name, tensor in tensors.items():
        setattr(module, name, tensor)
    return captured(module)


# What is refused


def refusal(there, here, required=None, formats=None, here_formats=None):
    manifest, *_ = describe(there, PROCESSED, {}, formats or {})
    with pytest.raises(LayoutUnsupported) as error:
        match(manifest, here, here.keys() if required is None else required, here_formats or {})
    return str(error.value)


def test_other_strides_are_refused_by_name_with_both():
    message = refusal({"t": turned()}, {"t": turned().contiguous()})
    assert message == "tensors differ: t is row-major here and strided [1, 12, 4] there"
    message = refusal({"t": turned().contiguous()}, {"t": turned()})
    assert message == "tensors differ: t is strided [1, 12, 4] here and row-major there"


def test_other_formats_are_refused_by_name_with_both():
    model = {"t": torch.ones(32, 32)}
    message = refusal(model, model, formats={"t": "FRACTAL_NZ"})
    assert message == "tensors differ: t is row-major here and FRACTAL_NZ there"
    message = refusal(model, model, here_formats={"t": "FRACTAL_NZ"})
    assert message == "tensors differ: t is FRACTAL_NZ here and row-major there"


def test_the_same_formats_match():
    model = {"t": torch.ones(32, 32)}
    manifest, *_ = describe(model, PROCESSED, {}, {"t": "FRACTAL_NZ"})
    assert len(match(manifest, model, {"t"}, {"t": "FRACTAL_NZ"})) == 1


@pytest.mark.parametrize("side", ["here", "there"])
def test_a_tensor_that_only_one_side_has_is_refused_by_name(side):
    there, here = Model(0), Model(0)
    more = here if side == "here" else there
    more.layers[1].attn.impl.W_K = torch.ones(3)
    message = refusal(processed_tensors(there), processed_tensors(here))
    assert message == f"tensors differ: layers.1.attn.impl.W_K is only {side}"


def test_post_processing_that_turned_another_way_is_refused_by_name():
    there, here = Model(0), Model(1)
    impl = here.layers[0].attn.impl
    impl.W_UK_T = impl.W_UK_T.contiguous()
    message = refusal(processed_tensors(there), processed_tensors(here))
    assert "layers.0.attn.impl.W_UK_T is row-major here and strided" in message


def test_post_processed_tensors_of_a_subclass_without_memory_are_refused():
    model = nn.Module()
    model.late = nn.parameter.UninitializedParameter()
    with pytest.raises(LayoutUnsupported, match="late has no memory"):
        captured(model)


# Attributes


def test_only_what_loading_has_changed_travels():
    before = {"a": 1, "b": False, "c": "x", "e": 5}
    after = {"a": 1, "b": True, "c": "y", "d": None, "e": 5.5}
    assert changed_scalars(before, after) == {"b": True, "c": "y", "d": None, "e": 5.5}


@pytest.mark.parametrize("address", [1 << 31, -(1 << 31), 0x7F0011223344])
def test_addresses_do_not_travel(address):
    assert changed_scalars({}, {"ptr": address, "n": (1 << 31) - 1}) == {"n": (1 << 31) - 1}


def test_the_mode_that_eval_sets_does_not_travel():
    assert changed_scalars({"training": True, "a.training": True}, {"training": False}) == {}
    model = Model()
    before = scalars(model)
    assert changed_scalars(before, scalars(model.eval())) == {}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_does_not_have_do_not_travel(value):
    model = Model()
    before = scalars(model)
    model.layers[0].limit = value
    assert captured(model, before).manifest.attributes == {}


# Defined memory


MAKERS = {
    "empty": lambda dtype: torch.empty(3, 4, dtype=dtype),
    "no elements": lambda dtype: torch.empty(0, 3, dtype=dtype),
    "empty_like": lambda dtype: torch.empty_like(torch.zeros(3, 4, dtype=dtype)),
    "new_empty": lambda dtype: torch.zeros(1, dtype=dtype).new_empty(5),
    "new": lambda dtype: torch.zeros(1, dtype=dtype).new(5),
    "Parameter": lambda dtype: nn.Parameter(torch.empty(3, dtype=dtype), requires_grad=False),
    "no dimensions": lambda dtype: torch.empty((), dtype=dtype),
    "empty_strided": lambda dtype: torch.empty_strided((3, 4), (1, 3), dtype=dtype),
    "new_empty_strided": lambda dtype: torch.zeros(1, dtype=dtype).new_empty_strided((2,), (2,)),
    "like a transposed one": lambda dtype: torch.empty_like(torch.zeros(3, 4, dtype=dtype).t()),
}
# Those of which a bit pattern is written; the others are filled with ones.
RARE = [
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex64,
    torch.complex128,
]


@pytest.fixture
def dirty_memory():
    """New memory is anything but ones and zeros."""
    # `torch.use_deterministic_algorithms` imports torch's compiler first, which takes seconds.
    torch._C._set_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch._C._set_deterministic_algorithms(False)


def assert_defined(make, dtype):
    with defined_memory():
        tensor = make(dtype)
    if dtype in RARE:
        assert (bytes_of(tensor) == 0).all()
    else:
        assert (tensor == 1).all()  # nothing divides by zero


@pytest.mark.usefixtures("dirty_memory")
@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_new_memory_is_defined(maker, dtype):
    assert_defined(MAKERS[maker], dtype)


@pytest.mark.usefixtures("dirty_memory")
def test_memory_of_permuted_dimensions_is_defined():
    assert_defined(lambda dtype: torch.empty_permuted((2, 3), (1, 0), dtype=dtype), torch.float32)


@pytest.mark.usefixtures("dirty_memory")
def test_memory_is_not_defined_without_the_context():
    """Else the tests above would show nothing."""
    assert not (torch.empty(3, 4) == 1).any()


def test_memory_made_by_the_default_device_is_defined():
    with defined_memory(), torch.device("cpu"):
        assert (torch.empty(5) == 1).all()
    with torch.device("cpu"), defined_memory():
        assert (torch.empty(5) == 1).all()


def test_memory_on_the_meta_device_has_no_contents_to_define():
    with defined_memory():
        assert torch.empty(5, device="meta").is_meta


def test_other_factories_do_what_they_always_do():
    def make():
        torch.manual_seed(0)
        return [
            torch.zeros(3),
            torch.full((2,), 7),
            torch.arange(4),
            torch.randn(3),
            torch.tensor([1, 2]),
            torch.ones(2, dtype=torch.bool),
            torch.zeros_like(torch.ones(2)),
            torch.ones(3).clone(),
            torch.ones(2, 3).t().contiguous(),
            torch.cat([torch.zeros(1), torch.ones(1)]),
            torch.arange(6.0).to(torch.bfloat16),
            torch.frombuffer(bytearray(b"abcd"), dtype=torch.uint8),
            nn.Linear(2, 2).weight.detach(),
        ]

    expected = make()
    with defined_memory():
        made = make()
    for one, other in zip(expected, made, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def test_nothing_is_left_behind_by_the_context_also_after_an_error():
    from torch.utils._python_dispatch import _get_current_dispatch_mode

    with defined_memory():
        assert _get_current_dispatch_mode() is not None
    with pytest.raises(RuntimeError), defined_memory():
        raise RuntimeError
    assert _get_current_dispatch_mode() is None
