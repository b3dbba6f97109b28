import math
import re
import types
import weakref

import pytest
import torch
from torch import nn

from vllm_ascend.model_loader.netloader.config import Int8Cache
from vllm_ascend.model_loader.netloader.errors import LayoutUnsupported
from vllm_ascend.model_loader.netloader.executor.model.match import match
from vllm_ascend.model_loader.netloader.executor.model.raw import (
    after_processing,
    apply_attributes,
    before_loading,
    capture_loaded,
    copy_int8,
    raw_tensors,
    samples_of,
    weights_outside,
    without_doubles,
)

from .support import DEVICE, bytes_of

# Larger and smaller than what is copied whatever INT8_CACHE says.
LARGE, SMALL = (200, 200), (10,)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(LARGE))
        self.scale = nn.Parameter(torch.zeros(SMALL))
        self.qweight = nn.Parameter(torch.zeros(LARGE, dtype=torch.int8), requires_grad=False)
        self.register_buffer("kept", torch.zeros(SMALL))
        self.register_buffer("derived", torch.ones(SMALL), persistent=False)
        self.register_parameter("bias", None)
        self.flag = False
        self.limit = None

    @property
    def width(self):
        return 200


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = Layer()
        self.second = Layer()
        self.head = nn.Linear(4, 4)
        self.count = 1


def fill(model, seed=0):
    """What loading a checkpoint does."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dtype == torch.int8:
            drawn = torch.randint(-128, 128, parameter.shape, generator=generator)
        else:
            drawn = torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(drawn)
    for name, buffer in model.named_buffers():
        if name.endswith("kept"):
            buffer.copy_(torch.randn(buffer.shape, generator=generator))


def captured(model, load=fill):
    before = before_loading(model, DEVICE)
    load(model)
    return capture_loaded(model, before, DEVICE)


def processed(process, cache=Int8Cache.NO, parts=None):
    """A model's raw weights after post-processing, and as they were before."""
    model = Model()
    raw = captured(model)
    as_loaded = [tensor.clone() for tensor in raw.tensors]
    copies = copy_int8(raw, cache, parts)
    process(model)
    return after_processing(raw, copies, {}), as_loaded


def same(weights, as_loaded):
    return all(
        torch.equal(bytes_of(one), bytes_of(other))
        for one, other in zip(weights.tensors, as_loaded, strict=True)
    )


def refusal(process, cache=Int8Cache.NO, parts=None):
    with pytest.raises(LayoutUnsupported) as error:
        processed(process, cache, parts)
    return str(error.value)


# What is captured


def test_parameters_and_persistent_buffers_are_captured_under_their_names():
    model = Model()
    raw = captured(model)
    assert set(raw.manifest.names) == set(model.state_dict())
    assert raw.manifest.attributes == {}


def test_tied_parameters_are_captured_once_under_all_names():
    model = Model()
    model.second.weight = model.first.weight
    raw = captured(model)
    aliases = {entry.name: entry.alias_of for entry in raw.manifest.tensors if entry.alias_of}
    assert aliases == {"second.weight": "first.weight"}
    assert len(raw.tensors) == len(raw.manifest.names) == len(model.state_dict()) - 1


def test_a_module_used_twice_is_captured_under_both_names():
    model = Model()
    model.second = model.first
    raw = captured(model)
    entries = {entry.name: entry.alias_of for entry in raw.manifest.tensors}
    assert entries["second.weight"] == "first.weight"
    assert entries["second.kept"] == "first.kept"


def test_the_digests_are_those_of_the_captured_bytes():
    one, same_again = captured(Model()), captured(Model())
    other = captured(Model(), lambda model: fill(model, seed=1))
    assert one.digests == same_again.digests
    assert one.digests.weights != other.digests.weights


# What post-processing may do


def data_replaced(model):
    model.first.weight.data = model.first.weight.data.t().contiguous()
    model.second.weight.data = torch.empty(0)


def deleted(model):
    del model.first.weight
    del model.second


def shape_changed_in_place(model):
    with torch.no_grad():
        model.first.weight.as_strided_((10, 20), (1, 10))
        model.first.qweight.resize_(5)
        model.second.weight.t_()


def small_memory_given_up(model):
    model.first.scale.untyped_storage().resize_(0)


@pytest.mark.parametrize(
    "process",
    [lambda model: None, data_replaced, deleted, shape_changed_in_place, small_memory_given_up],
)
def test_weights_whose_memory_is_not_written_to_are_kept_as_loaded(process):
    weights, as_loaded = processed(process)
    assert same(weights, as_loaded)


def test_a_replaced_parameter_is_kept_by_reference():
    model = Model()
    raw = captured(model)
    memory = model.first.weight.data_ptr()
    copies = copy_int8(raw, Int8Cache.NO, None)
    model.first.weight = nn.Parameter(torch.empty(0))
    weights = after_processing(raw, copies, {})
    kept = weights.tensors[weights.manifest.names.index("first.weight")]
    assert kept.data_ptr() == memory
    assert kept.shape == LARGE


def several_changed(model):
    model.first.weight.data.add_(1)
    model.second.weight.data.add_(1)
    model.second.qweight.data.add_(1)


@pytest.mark.parametrize(
    ("process", "names"),
    [
        (lambda model: model.second.weight.data.add_(1), "second.weight, and no copy was kept"),
        (lambda model: model.second.weight.data[-1, -1].add_(1), "second.weight, and"),
        (several_changed, "first.weight and 2 more tensors"),
        (lambda model: model.first.weight.untyped_storage().resize_(0), "first.weight, and"),
    ],
)
def test_large_tensors_that_are_changed_or_given_up_are_refused_by_name(process, names):
    assert refusal(process).startswith(f"post-processing has changed {names}")


def test_a_large_tensor_changed_in_place_through_a_tie_is_refused():
    model = Model()
    model.second.weight = model.first.weight
    raw = captured(model)
    copies = copy_int8(raw, Int8Cache.NO, None)
    model.second.weight.data.mul_(2)
    with pytest.raises(LayoutUnsupported, match=r"first\.weight"):
        after_processing(raw, copies, {})


@pytest.mark.parametrize("cache", Int8Cache)
def test_small_tensors_changed_in_place_are_kept_whatever_the_cache(cache):
    def process(model):
        model.first.scale.data.mul_(2)
        model.second.kept.zero_()

    weights, as_loaded = processed(process, cache)
    assert same(weights, as_loaded)


def _shuffle_int8(model):
    for layer in (model.first, model.second):
        layer.qweight.data.copy_(layer.qweight.data.t().contiguous())


@pytest.mark.parametrize("cache", [Int8Cache.DRAM, Int8Cache.HBM])
def test_int8_changed_in_place_is_kept_where_there_is_a_cache(cache):
    weights, as_loaded = processed(_shuffle_int8, cache)
    assert same(weights, as_loaded)


def test_int8_changed_in_place_is_refused_without_a_cache():
    message = refusal(_shuffle_int8)
    assert "first.qweight and 1 more tensors" in message
    assert "INT8_CACHE" in message


def test_the_cache_takes_only_the_names_chosen():
    def process(model):
        model.first.qweight.data.zero_()

    weights, as_loaded = processed(process, Int8Cache.DRAM, ("other", "first.q"))
    assert same(weights, as_loaded)
    assert "first.qweight" in refusal(process, Int8Cache.DRAM, ("second",))
    assert "first.qweight" in refusal(process, Int8Cache.DRAM, ())


def test_the_cache_takes_int8_alone():
    assert "first.weight" in refusal(lambda model: model.first.weight.data.zero_(), Int8Cache.DRAM)


def test_copies_of_what_has_not_changed_are_dropped():
    model = Model()
    raw = captured(model)
    weights = after_processing(raw, copy_int8(raw, Int8Cache.DRAM, None), {})
    assert all(
        kept.data_ptr() == loaded.data_ptr()
        for kept, loaded in zip(weights.tensors, raw.tensors, strict=True)
    )


def test_part_of_a_memory_that_shrinks_is_refused_and_not_read():
    # The second half of one memory, which is cut to the size of a half.
    model = Model()
    memory = torch.zeros(2, *LARGE)
    model.first.weight = nn.Parameter(memory[1])
    raw = captured(model)
    copies = copy_int8(raw, Int8Cache.NO, None)
    memory.untyped_storage().resize_(memory[1].nbytes)
    with pytest.raises(LayoutUnsupported, match=r"first\.weight"):
        after_processing(raw, copies, {})


# Originals that only clients want


class OnDevice(torch.Tensor):
    """A tensor that says it is an accelerator's, as there is none here."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def device(self):
        return torch.device("cuda", 0)

    def clone(self):
        return super().clone().as_subclass(OnDevice)

    def to(self, place, *, copy):
        assert copy
        return self.clone() if place == self.device else super().clone()


def replaced(cache, *, in_use=()):
    """What is served once post-processing has replaced the int8 tensors by others.

    Returns:
        The weights, those as loaded, and a weak reference to each tensor on the device by its name.
    """
    raw = captured(Model())
    as_loaded = [tensor.clone() for tensor in raw.tensors]
    raw = raw.with_tensors([one.as_subclass(OnDevice) for one in raw.tensors])
    copies = copy_int8(raw, cache, None)
    on_device = dict(zip(raw.manifest.names, raw.tensors, strict=True))
    used = {name: on_device[name].view(-1) for name in in_use}
    weights = after_processing(raw, copies, used)
    return weights, as_loaded, {name: weakref.ref(one) for name, one in on_device.items()}


QWEIGHTS = {"first.qweight", "second.qweight"}


def test_int8_that_inference_does_not_use_is_served_from_host_memory():
    weights, as_loaded, on_device = replaced(Int8Cache.DRAM)
    assert same(weights, as_loaded)
    served = dict(zip(weights.manifest.names, weights.tensors, strict=True))
    assert {name for name, one in served.items() if one.device.type == "cpu"} == QWEIGHTS
    assert {name for name, one in on_device.items() if one() is None} == QWEIGHTS


def test_int8_that_inference_uses_stays_on_the_device():
    """Also where it uses another view of the same memory."""
    weights, as_loaded, on_device = replaced(Int8Cache.DRAM, in_use=["second.qweight"])
    assert same(weights, as_loaded)
    assert {name for name, one in on_device.items() if one() is None} == {"first.qweight"}


@pytest.mark.parametrize("cache", [Int8Cache.HBM, Int8Cache.NO])
def test_without_a_copy_in_host_memory_int8_stays_on_the_device(cache):
    weights, as_loaded, on_device = replaced(cache)
    assert same(weights, as_loaded)
    if cache is Int8Cache.NO:
        assert all(one() is not None for one in on_device.values())
    served = dict(zip(weights.manifest.names, weights.tensors, strict=True))
    assert served["first.qweight"] is on_device["first.qweight"]()


def test_on_a_cpu_no_copy_takes_the_place_of_what_has_not_changed():
    model = Model()
    raw = captured(model)
    copies = copy_int8(raw, Int8Cache.DRAM, None)
    served = after_processing(raw, copies, {}).tensors
    assert all(one is other for one, other in zip(served, raw.tensors, strict=True))


# What else loading leaves behind


def test_a_derived_buffer_travels_only_if_loading_has_changed_it():
    def loads_one(model):
        fill(model)
        model.second.derived.fill_(7)

    assert "first.derived" not in captured(Model()).manifest.names
    names = captured(Model(), loads_one).manifest.names
    assert "second.derived" in names
    assert "first.derived" not in names


def test_a_derived_buffer_of_any_strides_is_looked_at():
    model = Model()
    model.first.register_buffer("one", torch.ones(4)[::2][:1], persistent=False)
    model.first.register_buffer("turned", torch.ones(4, 5).t(), persistent=False)

    def load(model):
        fill(model)
        model.first.one.zero_()
        model.first.turned[4, 3] = 0

    assert {"first.one", "first.turned"} <= set(captured(model, load).manifest.names)


def test_a_derived_buffer_is_not_required_of_a_source():
    tensors, required = raw_tensors(Model())
    assert "first.derived" in tensors
    assert "first.derived" not in required
    assert {"first.weight", "first.kept"} <= required


def test_raw_tensors_outlive_a_change_of_their_parameter():
    model = Model()
    tensors, _ = raw_tensors(model)
    model.first.weight.data = torch.empty(0)
    assert tensors["first.weight"].shape == LARGE


def test_parameters_that_have_no_memory_yet_are_left_out():
    model = Model()
    model.head.bias = nn.parameter.UninitializedParameter()
    tensors, required = raw_tensors(model)
    assert "head.bias" not in tensors
    assert "head.bias" not in required


def _sets(path, **values):
    def load(model):
        fill(model)
        for name, value in values.items():
            setattr(model.get_submodule(path), name, value)

    return load


def test_attributes_that_loading_sets_travel():
    raw = captured(Model(), _sets("first", flag=True, limit=2.5, fresh="text"))
    expected = {"first.flag": True, "first.limit": 2.5, "first.fresh": "text"}
    assert raw.manifest.attributes == expected
    other = Model()
    apply_attributes(other, raw.manifest.attributes)
    assert (other.first.flag, other.first.limit, other.first.fresh) == (True, 2.5, "text")
    assert other.second.flag is False


def test_attributes_of_the_model_itself_travel():
    raw = captured(Model(), _sets("", count=3))
    assert raw.manifest.attributes == {"count": 3}
    other = Model()
    apply_attributes(other, raw.manifest.attributes)
    assert other.count == 3


def test_an_attribute_may_be_infinite_before_its_value_comes():
    model = Model()
    model.first.limit = math.inf
    apply_attributes(model, {"first.limit": 2.5})
    assert model.first.limit == 2.5


def test_an_attribute_that_becomes_none_travels():
    assert captured(Model(), _sets("", count=None)).manifest.attributes == {"count": None}


def test_attributes_that_stay_as_they_are_do_not_travel():
    assert captured(Model(), _sets("first", flag=False, limit=None)).manifest.attributes == {}


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("third.flag", "no such module"),
        ("first.flag.x", "no such module"),
        ("first..x", "no such module"),
        ("first.weight", "not a plain value"),
        ("first.forward", "not a plain value"),
        ("first._parameters", "not a plain value"),
        ("first", "not a plain value"),
        ("__doc__", "not a plain value"),
        ("first.__dict__", "not a plain value"),
        ("first.__class__", "not a plain value"),
        ("first.__fresh__", "not a plain value"),
        ("first.bias", "not a plain value"),
        ("first.width", "not a plain value"),
    ],
)
def test_an_attribute_that_is_no_plain_value_here_is_refused_by_name(name, why):
    model = Model()
    with pytest.raises(LayoutUnsupported) as error:
        apply_attributes(model, {"first.flag": True, name: 1})
    assert f"attribute {name} is 1 there" in str(error.value)
    assert why in str(error.value)
    assert model.first.flag is False


def test_a_plain_tensor_made_by_loading_is_refused_by_name():
    with pytest.raises(LayoutUnsupported, match=r"second\.table was created while loading"):
        captured(Model(), _sets("second", table=torch.ones(3)))


def test_a_plain_tensor_that_was_there_before_is_no_obstacle():
    model = Model()
    model.first.table = torch.ones(3)
    assert "first.table" not in captured(model).manifest.names


def test_a_plain_tensor_changed_in_place_by_loading_is_refused():
    model = Model()
    model.first.table = torch.ones(3)

    def load(model):
        fill(model)
        model.first.table.zero_()

    with pytest.raises(LayoutUnsupported, match=r"first\.table"):
        captured(model, load)


def test_a_plain_tensor_replaced_by_loading_is_refused_even_at_the_same_address():
    model = Model()
    model.first.table = torch.ones(3)

    def load(model):
        fill(model)
        for _ in range(100):  # sooner or later the new one gets the old one's place
            address = id(model.first.table)
            del model.first.table
            model.first.table = torch.zeros(3)
            if id(model.first.table) == address:
                break

    with pytest.raises(LayoutUnsupported, match=r"first\.table"):
        captured(model, load)


def test_a_view_of_a_weight_made_by_loading_is_refused_by_name():
    def load(model):
        fill(model)
        model.first.view = model.first.weight.data

    with pytest.raises(LayoutUnsupported, match=r"first\.view was created while loading"):
        captured(Model(), load)


def test_a_tensor_of_an_object_changed_by_loading_is_refused_by_name():
    model = Model()
    model.first.impl = types.SimpleNamespace(tables=[torch.ones(3)])

    def load(model):
        fill(model)
        model.first.impl.tables[0].zero_()

    with pytest.raises(LayoutUnsupported, match=r"first\.impl\.tables\[0\] was created"):
        captured(model, load)


def test_an_object_may_hold_what_loading_fills():
    model = Model()
    model.first.impl = types.SimpleNamespace(sinks=model.first.weight, part=model.first.weight[3:])
    assert set(captured(model).manifest.names) == set(Model().state_dict())


# Modules that torch passes over, and what a model makes itself


def with_projector(seed=0):
    """A model as vLLM makes that of a Sentence-Transformers folder."""
    model = Model()
    model.head.poolers = {"embed": types.SimpleNamespace(projector=nn.Sequential(Layer()))}
    fill(model.head.poolers["embed"].projector, seed)
    return model


PROJECTOR = "head.poolers['embed'].projector.0"


def test_weights_of_a_module_outside_of_the_tree_travel():
    there, here = with_projector(0), with_projector(1)
    names = set(captured(there).manifest.names)
    assert {f"{PROJECTOR}.{name}" for name in ("weight", "scale", "qweight", "kept")} <= names
    assert f"{PROJECTOR}.derived" not in names
    tensors, required = raw_tensors(here)
    assert f"{PROJECTOR}.weight" in required
    match(captured(there).manifest, tensors, required, {}, made=samples_of(here))
    weight = here.head.poolers["embed"].projector[0].weight
    assert weights_outside(here)[f"{PROJECTOR}.weight"].data_ptr() == weight.data_ptr()
    assert not weights_outside(Model())


@pytest.mark.parametrize("at_source", [True, False])
def test_a_module_that_one_side_lacks_is_refused_by_name(at_source):
    there, here = with_projector(), Model()
    if not at_source:
        there, here = here, there
    where = "there" if at_source else "here"
    with pytest.raises(LayoutUnsupported, match=rf"{re.escape(PROJECTOR)}\.\w+ is only {where}"):
        match(captured(there).manifest, *raw_tensors(here), {}, made=samples_of(here))


def test_what_both_sides_make_themselves_is_compared_and_does_not_travel():
    there, here = Model(), Model()
    made = captured(there).manifest.made
    assert made == {"first.derived": [1.0] * 10, "second.derived": [1.0] * 10}
    match(captured(there).manifest, *raw_tensors(here), {}, made=samples_of(here))
    here.second.derived[3] = 7
    with pytest.raises(LayoutUnsupported, match=r"second\.derived.* is 7\.0 here and 1\.0 there"):
        match(captured(there).manifest, *raw_tensors(here), {}, made=samples_of(here))


def test_what_loading_changes_travels_and_is_not_compared():
    def load(model):
        fill(model)
        model.first.derived.zero_()

    manifest = captured(Model(), load).manifest
    assert "first.derived" in manifest.names
    assert set(manifest.made) == {"second.derived"}


def test_the_weights_digest_is_not_that_of_what_both_sides_make():
    other = Model()
    other.first.derived.add_(1)
    one, two = captured(Model()), captured(other)
    assert one.manifest.made != two.manifest.made
    assert one.digests == two.digests


def test_raw_tensors_that_a_model_has_itself_are_not_kept_twice():
    model = with_projector()
    raw = captured(model)
    raw = raw.with_tensors([tensor.clone() for tensor in raw.tensors])
    model.first.weight.data = model.first.weight.data.t().contiguous().t()  # packed, so to speak
    model.first.scale.data.add_(1)
    kept = without_doubles(raw, model)
    assert same(kept, raw.tensors)
    own = {tensor.data_ptr() for tensor in raw_tensors(model)[0].values()}
    doubles = [
        name
        for name, tensor in zip(kept.manifest.names, kept.tensors, strict=True)
        if tensor.data_ptr() not in own
    ]
    assert doubles == ["first.weight", "first.scale"]


def test_a_model_on_the_meta_device_is_refused():
    with torch.device("meta"):
        model = Model()
    with pytest.raises(LayoutUnsupported, match=r"has no memory"):
        captured(model, lambda model: None)


def test_a_model_made_under_inference_mode_is_captured():
    with torch.inference_mode():
        model = Model()
        model.table = torch.ones(3)
        raw = captured(model)
        weights = after_processing(raw, copy_int8(raw, Int8Cache.DRAM, None), {})
    assert set(weights.manifest.names) == set(model.state_dict())
