"""What a trace notes of what loaders do with checkpoint tensors."""

import contextlib
import gc

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from tests.checkpoints import rebuild
from vllm_ascend.model_loader.netloader.executor.model import trace as trace_module
from vllm_ascend.model_loader.netloader.executor.model.trace import Trace
from vllm_ascend.model_loader.netloader.executor.view import boxes as boxes_module
from vllm_ascend.model_loader.netloader.executor.view.boxes import Unmapped
from vllm_ascend.model_loader.netloader.executor.view.fetch import find
from vllm_ascend.model_loader.netloader.executor.view.records import (
    Copy,
    Fill,
    Kept,
    decode,
    encode,
)

from .support import bytes_of

RAMP = torch.arange(24.0).reshape(6, 4)


class Model(nn.Module):
    """A model with some tensors, and with a function that loads each checkpoint tensor."""

    def __init__(self, load, device="cpu", **tensors):
        super().__init__()
        self.load = load
        for name, tensor in tensors.items():
            parameter = nn.Parameter(tensor.to(device), requires_grad=False)
            self.register_parameter(name, parameter)

    def load_weights(self, weights):
        for name, tensor in weights:
            self.load(self, name, tensor)


def traced(load, checkpoint, device="cpu", **tensors):
    model = Model(load, device, **tensors)
    return records_of(model, checkpoint), model


def records_of(model, checkpoint):
    trace = Trace()
    with trace:
        model.load_weights(trace.watch((name, checkpoint.pop(name)) for name in [*checkpoint]))
    return decode(encode(trace.records(model)))


def seen(records, name="w"):
    (found,) = [one for one in records.tensors if one.name == name]
    return found


def rebuilt(records, model, name="w"):
    """A checkpoint tensor, if all of it is known."""
    whole, known = rebuild(name, [(records, dict(model.named_parameters()))])
    return whole if known.all() else None


def test_a_copy_is_one_box():
    def load(model, name, tensor):
        model.p[1:].copy_(tensor)

    records, _ = traced(load, {"w": RAMP}, p=torch.zeros(7, 4))
    assert seen(records).copies == (Copy((0, 0), (6, 4), 0, 4, (4, 1)),)
    assert not records.fills and not records.computed


def test_columns_that_are_taken_apart_are_a_box_each():
    def load(model, name, tensor):
        model.p[:, :2].copy_(tensor[:, ::2])
        model.p[:, 2:].copy_(tensor[:, 1::2])

    records, model = traced(load, {"w": RAMP}, p=torch.zeros(6, 4))
    assert len(seen(records).copies) == 4
    assert torch.equal(rebuilt(records, model), RAMP)


def test_tied_parameters_are_noted_once_under_the_first_name():
    model = Model(lambda model, name, tensor: model.b.copy_(tensor), a=RAMP * 0)
    model.b = model.a
    records = records_of(model, {"w": RAMP})
    assert [parameter.name for parameter in records.parameters] == ["a"]
    assert torch.equal(rebuilt(records, model), RAMP)


def test_parameters_that_are_parts_of_one_memory_are_noted_each_under_its_name():
    memory = torch.zeros(12, 4)
    model = Model(lambda model, name, tensor: model.get_parameter(name).copy_(tensor))
    for name, part in zip("ab", memory.split(6), strict=True):
        model.register_parameter(name, nn.Parameter(part, requires_grad=False))
    records = records_of(model, {"a": RAMP, "b": -RAMP})
    assert [parameter.name for parameter in records.parameters] == ["a", "b"]
    assert torch.equal(rebuilt(records, model, "b"), -RAMP)


def test_memory_that_a_checkpoint_tensor_brings_along_is_noted():
    def load(model, name, tensor):
        model.p.data = tensor[1:]

    records, _ = traced(load, {"w": RAMP.clone()}, p=torch.zeros(5, 4))
    assert seen(records).copies == (Copy((1, 0), (5, 4), 0, 0, (4, 1)),)


def test_padding_that_is_filled_is_noted_as_filled():
    def load(model, name, tensor):
        model.p[:6].copy_(tensor)
        model.p[6:].fill_(0.5)

    records, model = traced(load, {"w": RAMP}, p=torch.zeros(8, 4))
    assert records.fills == (Fill(0, 24, (2, 4), (4, 1), 0.5),)
    assert torch.equal(rebuilt(records, model), RAMP)


def test_what_is_filled_before_it_is_copied_over_stays_noted():
    def load(model, name, tensor):
        model.p.zero_()
        model.p[:6].copy_(tensor)

    records, model = traced(load, {"w": RAMP}, p=torch.ones(8, 4))
    assert records.fills == (Fill(0, 0, (8, 4), (4, 1), 0),)
    assert torch.equal(rebuilt(records, model), RAMP) and not records.computed


def test_one_scale_for_many_rows_is_in_each_of_them():
    def load(model, name, tensor):
        model.p.copy_(tensor)

    records, model = traced(load, {"w": torch.tensor([2.5])}, p=torch.zeros(3))
    copies = seen(records).copies
    assert copies == tuple(Copy((0,), (1,), 0, at, (0,)) for at in range(3))
    assert rebuilt(records, model) == 2.5


def test_a_copy_of_a_copy_is_found_in_the_checkpoint():
    def load(model, name, tensor):
        columns = tensor.t()[1:3].contiguous()
        model.p.copy_(columns.to(torch.float64).clone()[1])

    records, _ = traced(load, {"w": RAMP}, p=torch.zeros(6))
    assert seen(records).copies == (Copy((0, 2), (6, 1), 0, 0, (1, 0)),)


def test_a_cast_is_noted_with_both_dtypes():
    def load(model, name, tensor):
        model.p.copy_(tensor)

    records, _ = traced(load, {"w": RAMP.bfloat16()}, p=torch.zeros(6, 4))
    assert seen(records).copies[0].through == ("bfloat16", "float32")


def test_a_rounding_on_the_way_is_noted():
    def load(model, name, tensor):
        model.p.copy_(tensor.half())

    records, model = traced(load, {"w": RAMP / 3}, p=torch.zeros(6, 4))
    assert seen(records).copies[0].through == ("float32", "float16", "float32")
    assert rebuilt(records, model) is None


def test_a_later_copy_replaces_an_earlier_one():
    def load(model, name, tensor):
        model.p.copy_(tensor)

    records, _ = traced(load, {"v": RAMP, "w": RAMP}, p=torch.zeros(6, 4))
    assert not seen(records, "v").copies and seen(records, "w").copies
    assert not records.computed


def test_a_copy_over_a_part_of_another_one_is_told_by_name():
    def load(model, name, tensor):
        model.p[: len(tensor)].copy_(tensor)

    records, _ = traced(load, {"v": RAMP, "w": RAMP[:2].clone()}, p=torch.zeros(6, 4))
    assert records.computed == {"p": "w is over a part of v"}
    assert not seen(records, "v").copies


def test_copies_between_the_columns_of_others_stay_apart():
    def load(model, name, tensor):
        model.p[:, "vw".index(name) :: 2].copy_(tensor)

    records, model = traced(load, {"v": RAMP, "w": -RAMP}, p=torch.zeros(6, 8))
    assert torch.equal(rebuilt(records, model, "v"), RAMP)
    assert torch.equal(rebuilt(records, model, "w"), -RAMP)


def test_what_is_computed_is_told_by_name_and_what_it_was_made_of_is_kept():
    def load(model, name, tensor):
        model.p.copy_(-torch.exp(tensor))

    records, model = traced(load, {"w": RAMP}, p=torch.zeros(6, 4))
    assert records.computed == {"p": "aten.copy_.default"}
    assert torch.equal(rebuilt(records, model), RAMP)


def test_a_number_that_was_read_from_a_checkpoint_tensor_is_no_constant():
    def load(model, name, tensor):
        model.p.fill_(tensor.item())

    records, model = traced(load, {"w": torch.tensor(0.125)}, p=torch.zeros(4))
    assert records.computed == {"p": "aten.fill_.Scalar"} and not records.fills
    assert rebuilt(records, model) == 0.125


def test_what_is_joined_with_others_is_computed():
    def load(model, name, tensor):
        model.p.copy_(torch.cat([tensor, tensor]))

    records, _ = traced(load, {"w": RAMP}, p=torch.zeros(12, 4))
    assert records.computed == {"p": "aten.copy_.default"}


SHORTS, BF16 = torch.zeros(6, 8).short(), RAMP.bfloat16()


@pytest.mark.parametrize(
    ("load", "w", "p", "why"),
    [
        (lambda p, w: p.copy_(w.view(torch.int16)), RAMP, SHORTS, "aten.copy_.default"),
        (lambda p, w: p.view(w.dtype).copy_(w), RAMP, SHORTS, "written as torch.float32 (6, 4)"),
        (
            lambda p, w: p.copy_(w.half().view(torch.bfloat16)),
            *(BF16, BF16),
            "copy of w: (torch.bfloat16, torch.float16) seen as torch.bfloat16",
        ),
    ],
)
def test_what_is_seen_as_another_dtype_is_computed(load, w, p, why):
    records, _ = traced(lambda model, name, tensor: load(model.p, tensor), {"w": w}, p=p.clone())
    assert records.computed == {"p": why} and not seen(records).copies


def test_a_parameter_that_is_seen_as_another_dtype_of_its_size_holds_copies():
    def load(model, name, tensor):
        model.p.view(torch.float32).copy_(tensor)

    records, model = traced(load, {"w": RAMP}, p=torch.zeros(6, 4).int())
    assert torch.equal(rebuilt(records, model), RAMP) and not records.computed


def test_a_checkpoint_tensor_that_loading_changes_is_kept_as_it_was():
    def load(model, name, tensor):
        tensor[2:].zero_()
        model.p.copy_(tensor)

    records, model = traced(load, {"w": RAMP.clone()}, p=torch.zeros(6, 4))
    assert records.computed == {"p": "aten.copy_.default"}
    assert not model.p[2:].any()
    assert torch.equal(rebuilt(records, model), RAMP)


def test_a_checkpoint_tensor_that_loading_copies_into_is_kept_as_it_was():
    def load(model, name, tensor):
        tensor[:3].copy_(tensor[3:].clone())
        model.p.copy_(tensor)

    records, model = traced(load, {"w": RAMP.clone()}, p=torch.zeros(6, 4))
    assert torch.equal(rebuilt(records, model), RAMP)


def test_a_parameter_that_is_computed_with_is_kept_as_the_checkpoint_had_it():
    def load(model, name, tensor):
        model.p.copy_(tensor)
        model.p[1:3].mul_(2)

    records, _ = traced(load, {"w": RAMP.half()}, p=torch.zeros(6, 4))
    kept, rest = seen(records).kept
    assert kept == Kept((1, 0), (2, 4), bytes_of(RAMP[1:3].half()).numpy().tobytes())
    assert rest == Kept((0, 0), (6, 4))
    assert records.computed == {"p": "aten.mul_.Tensor"}


def test_what_was_replaced_before_something_is_computed_is_not_kept():
    def load(model, name, tensor):
        if name == "a":
            model.p.copy_(tensor)
            model.p.zero_()
        else:
            model.p.copy_(tensor * 2)

    records, _ = traced(load, {"a": RAMP + 1, "b": RAMP}, p=torch.zeros(6, 4))
    assert seen(records, "a").kept == ()
    assert seen(records, "b").kept[0].values == RAMP.numpy().tobytes()


def test_what_was_written_over_in_part_is_fetched_rather_than_kept():
    def load(model, name, tensor):
        for to in (model.p, model.q):
            to.copy_(tensor)
        model.p[0].fill_(7.0)
        model.p.mul_(3)

    there, model = traced(load, {"w": RAMP}, p=torch.zeros(6, 4), q=torch.zeros(6, 4))
    assert [kept.values for kept in seen(there).kept] == [None]
    assert torch.equal(rebuilt(there, model), RAMP)
    needs, _ = traced(load, {"w": RAMP.to("meta")}, p=torch.zeros(6, 4), q=torch.zeros(6, 4))
    fetch, missing = find(needs, [there], 0)
    assert not missing and fetch.parts and not fetch.kept


def test_of_columns_that_were_written_apart_those_that_are_read_are_kept():
    def load(model, name, tensor):
        for columns in (slice(0, 2), slice(2, 4)):
            model.p[:, columns].copy_(tensor[:, columns])
        model.p.mul_(3)

    records, _ = traced(load, {"w": RAMP}, p=torch.zeros(6, 4))
    values = {kept.values for kept in seen(records).kept} - {None}
    assert values == {RAMP[:, :2].numpy().tobytes(), RAMP[:, 2:].numpy().tobytes()}


def test_what_was_written_over_with_elements_of_another_size_is_not_kept():
    def load(model, name, tensor):
        scratch = torch.empty(4)
        scratch.copy_(tensor)
        scratch.view(torch.float16)[:4].zero_()
        model.p.copy_(scratch * 3)

    records, _ = traced(load, {"w": torch.ones(4)}, p=torch.zeros(4))
    assert seen(records).kept == (Kept((0,), (4,)),)


def test_what_is_about_to_be_written_is_not_kept_yet(monkeypatch):
    monkeypatch.setattr(boxes_module, "_MOST_BOXES", 1)

    def load(model, name, tensor):
        if name == "a":
            model.columns = tensor[:, ::2].clone()
        else:
            model.columns.copy_(tensor)

    checkpoint = {"a": RAMP.clone(), "b": RAMP[:, :2] + 1}
    records, _ = traced(load, checkpoint, p=torch.zeros(6, 4))
    assert [kept.values for kept in seen(records, "a").kept] == [None]
    assert [kept.values for kept in seen(records, "b").kept] == [None]


def test_rows_that_are_looked_up_in_a_parameter_are_kept_alone():
    def load(model, name, tensor):
        model.p.copy_(tensor)
        model.q.copy_(model.p.data[torch.tensor([4, 1])].sum(0))

    records, _ = traced(load, {"w": RAMP.clone()}, p=torch.zeros(6, 4), q=torch.zeros(4))
    assert [kept.box.start for kept in seen(records).kept] == [(1, 0), (4, 0)]
    assert records.computed == {"q": "aten.copy_.default"}


def test_values_are_kept_up_to_a_limit(monkeypatch):
    monkeypatch.setattr(trace_module, "_KEPT_OF_ALL", RAMP.nbytes)

    def load(model, name, tensor):
        model.p.copy_(tensor + 1)

    records, _ = traced(load, {"v": RAMP, "w": RAMP}, p=torch.zeros(6, 4))
    assert [kept.values is None for kept in seen(records, "v").kept] == [False]
    assert [kept.values is None for kept in seen(records, "w").kept] == [True]


def test_a_tensor_without_values_keeps_none():
    def load(model, name, tensor):
        model.p.copy_(tensor + 1)

    checkpoint = {"w": RAMP.to("meta")}
    records, _ = traced(load, checkpoint, device="meta", p=torch.zeros(6, 4))
    assert seen(records).kept == (Kept((0, 0), (6, 4)),)
    assert records.computed == {"p": "aten.copy_.default"}


def test_a_load_of_tensors_without_values_tells_what_a_real_one_would_copy():
    def load(model, name, tensor):
        model.p[:6].copy_(tensor)
        model.p[6:].fill_(0.5)
        model.q.copy_(tensor.sum(0))

    def records(checkpoint):
        return traced(load, checkpoint, p=torch.ones(7, 4), q=torch.ones(4))

    (there, _), (here, model) = records({"w": RAMP}), records({"w": RAMP.to("meta")})
    assert seen(here).copies == seen(there).copies
    assert (here.fills, here.computed) == (there.fills, there.computed)
    assert model.p[:6].eq(1).all() and model.p[6:].eq(0.5).all() and model.q.eq(1).all()


def test_a_tensor_that_nobody_reads_has_no_copies():
    records, model = traced(lambda *_: None, {"w": RAMP}, p=torch.zeros(6, 4))
    assert not seen(records).copies and not records.parameters
    assert rebuilt(records, model) is None


@pytest.mark.parametrize("fails", [False, True])
def test_how_a_checkpoint_tensor_is_made_is_not_noted(monkeypatch, fails):
    noted = []
    monkeypatch.setattr(Trace, "_note", lambda *_: noted.append(1))

    def weights():
        made = torch.zeros(6, 4)
        yield "v", made.copy_(RAMP)
        assert not fails, "no more"
        yield "w", made.clone().mul_(2)

    model, trace = Model(lambda model, name, tensor: model.p.copy_(tensor), p=RAMP * 0), Trace()
    ends = pytest.raises(AssertionError, match="no more") if fails else contextlib.nullcontext()
    with ends, trace:
        model.load_weights(trace.watch(weights()))
    assert len(noted) == 1 + (not fails)
    assert _get_current_dispatch_mode() is None


def test_a_tensor_that_only_garbage_refers_to_is_read_by_nobody():
    def load(model, name, tensor):
        garbage = [tensor]
        garbage.append(garbage)

    gc.disable()
    try:
        records, _ = traced(load, {"w": RAMP.clone()}, p=torch.zeros(6, 4))
    finally:
        gc.enable()
    assert not seen(records).kept


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tensors_of_several_dtypes_in_one_memory_are_told_apart(device):
    def load(model, name, tensor):
        model.get_parameter(name).copy_(tensor)

    file = torch.zeros(96 + 48 + 12, dtype=torch.uint8, device=device)
    checkpoint = {
        "a": file[:96].view(torch.float32).view(6, 4),
        "b": file[96:144].view(torch.float16).view(6, 4),
        "c": file[144:].view(torch.int32),
    }
    targets = {name: torch.zeros_like(tensor) for name, tensor in checkpoint.items()}
    records, _ = traced(load, checkpoint, device, **targets)
    for number, (name, tensor) in enumerate(checkpoint.items()):
        start = (0,) * tensor.dim()
        copy = Copy(start, tuple(tensor.shape), number, 0, tuple(tensor.stride()))
        assert seen(records, name).copies == (copy,)
    assert not records.computed


def test_a_change_of_one_tensor_leaves_the_others_of_its_file_alone():
    def load(model, name, tensor):
        if name == "v":
            tensor.zero_()
        model.get_parameter(name).copy_(tensor)

    file = torch.arange(48.0)
    checkpoint = {"v": file[:24].view(6, 4), "w": file[24:].view(6, 4)}
    records, model = traced(load, checkpoint, v=torch.zeros(6, 4), w=torch.zeros(6, 4))
    assert torch.equal(rebuilt(records, model, "w"), RAMP + 24)
    assert [*records.computed] == ["v"]


def test_a_load_that_is_watched_does_what_it_does_otherwise():
    def load(model, name, tensor):
        model.p[:, ::2].copy_(tensor[:, :2].half())
        model.p[:, 1::2] = torch.exp(tensor[:, 2:] / 24)

    _, watched = traced(load, {"w": RAMP}, p=torch.zeros(6, 4))
    alone = Model(load, p=torch.zeros(6, 4))
    alone.load_weights([("w", RAMP)])
    assert torch.equal(watched.p, alone.p)


def test_views_that_are_made_in_a_shorter_way_are_of_the_same_memory():
    def load(model, name, tensor):
        rows = zip(model.p.data.unbind(), tensor.unsqueeze(0)[0].unbind(0), strict=True)
        for row, other in rows:
            row.select(0, 0).copy_(other.detach()[0])

    records, model = traced(load, {"w": RAMP}, p=torch.zeros(6, 4))
    assert torch.equal(model.p[:, 0], RAMP[:, 0]) and not model.p[:, 1:].any()
    assert [copy.box.start for copy in seen(records).copies] == [(row, 0) for row in range(6)]


@pytest.mark.parametrize(
    ("step", "what"), [("_add", "w"), ("_copied", "aten.clone.default"), ("_note", "aten.copy_")]
)
def test_what_goes_wrong_while_taking_notes_leaves_the_load_alone(monkeypatch, step, what):
    def fail(*_):
        raise RuntimeError("no notes")

    monkeypatch.setattr(Trace, step, fail)
    model = Model(lambda model, name, tensor: model.p.copy_(tensor.clone()), p=RAMP * 0)
    with pytest.raises(Unmapped, match=rf"^{what}\S*: RuntimeError: no notes"):
        records_of(model, {"w": RAMP})
    assert torch.equal(model.p, RAMP)


def test_a_tensor_that_came_before_another_one_of_its_file_is_changed_can_still_be_copied():
    came = {}

    def load(model, name, tensor):
        came[name] = tensor
        if name == "v":
            tensor.zero_()
            model.p.copy_(came["w"])

    file = torch.arange(48.0)
    checkpoint = {"w": file[:24].view(6, 4), "v": file[24:].view(6, 4)}
    records, _ = traced(load, checkpoint, p=torch.zeros(6, 4))
    assert seen(records, "w").copies and not records.computed


def changed_bits(model, name, tensor):
    model.p.copy_(tensor)
    model.p.view(torch.uint8).bitwise_xor_(1)


def changed_with_its_neighbor(model, name, tensor):
    model.p.copy_(tensor)
    model.q.copy_(tensor)
    model.flat.mul_(2)


def copied_over_by_what_it_overlaps(model, name, tensor):
    model.p.copy_(tensor)
    model.both.copy_(-tensor.repeat(2, 1))


def copied_with_its_sign_changed(model, name, tensor):
    model.p.copy_(torch._neg_view(tensor))


def copied_into_a_view_that_changes_its_sign(model, name, tensor):
    torch._neg_view(model.p).copy_(tensor)


def copied_over_in_part(model, name, tensor):
    model.p.copy_(tensor)
    model.p[:3].copy_(tensor[3:])


@pytest.mark.parametrize(
    "load",
    [
        changed_bits,
        changed_with_its_neighbor,
        copied_over_by_what_it_overlaps,
        copied_with_its_sign_changed,
        copied_into_a_view_that_changes_its_sign,
        copied_over_in_part,
    ],
    ids=lambda load: load.__name__,
)
def test_what_parameters_are_said_to_have_is_what_the_checkpoint_has(monkeypatch, load):
    monkeypatch.setattr(trace_module, "_KEPT_OF_ALL", 0)
    flat = torch.zeros(12, 4)
    model = Model(load, p=flat[:6], q=flat[6:])
    if load is copied_over_by_what_it_overlaps:
        model.register_parameter("both", nn.Parameter(flat, requires_grad=False))
    model.flat = flat
    records = records_of(model, {"w": RAMP + 1})
    whole, known = rebuild("w", [(records, dict(model.named_parameters()))])
    assert torch.equal(whole[known], (RAMP + 1)[known])
