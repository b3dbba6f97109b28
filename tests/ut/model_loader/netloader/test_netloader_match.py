"""Whether two sides mean the same tensors."""

import enum
import math
import tracemalloc

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_ascend.model_loader.netloader.errors import LayoutUnsupported, ProtocolError
from vllm_ascend.model_loader.netloader.executor.chunks.manifest import (
    PROCESSED,
    RAW,
    Manifest,
    TensorEntry,
    decode,
)
from vllm_ascend.model_loader.netloader.executor.model.match import (
    MAX_NAMED,
    describe,
    match,
    sample_of,
)
from vllm_ascend.model_loader.netloader.executor.store import make_store

from .support import DEVICE, any_model, assorted, blank_like

# Manifests


def _travelled(manifest):
    return decode(msgspec.json.encode(manifest), len(manifest.tensors))


def test_a_manifest_survives_the_journey():
    manifest, *_ = describe(assorted(), RAW, {"a.b": True, "c": 1.5, "d": None, "e": "x"}, {})
    assert _travelled(manifest) == manifest


def test_a_tensor_in_another_format_that_is_turned_is_refused_on_both_sides():
    turned = {"a": torch.zeros(3, 2).t()}
    with pytest.raises(LayoutUnsupported, match=r"a is FRACTAL_NZ and strided \[1, 2\]"):
        describe(turned, PROCESSED, {}, {"a": "FRACTAL_NZ"})
    manifest, *_ = describe({"a": torch.zeros(2, 3)}, PROCESSED, {}, {"a": "FRACTAL_NZ"})
    with pytest.raises(LayoutUnsupported, match=r"a is FRACTAL_NZ and strided \[1, 2\]"):
        match(manifest, turned, ["a"], {"a": "FRACTAL_NZ"})


def test_a_manifest_of_as_many_tensors_as_any_model_has_is_taken():
    kind = "torch.bfloat16", (4096, 1024, 64), None, (1024, 1, 4096), "FRACTAL_NZ"
    count = 200_000
    tensors = [TensorEntry(f"layers.{i}.experts.weight", *kind) for i in range(count)]
    attributes = {f"layers.{i}.alpha": 0.5 for i in range(count)}
    manifest = Manifest(PROCESSED, tensors, attributes, {"experts": "1," * 100_000})
    assert len(_travelled(manifest).tensors) == count
    assert len(decode(msgspec.json.encode(manifest), None).tensors) == count


MANY = 300_000
TINY = {
    "tensors": b"[" + b",".join([b'["a","b",[]]'] * MANY) + b"]",
    "shape": b'[["a","b",[' + b",".join([b"1000"] * MANY) + b"]]]",
    "attributes": b"{" + b",".join(b'"%x":0' % i for i in range(MANY)) + b"}",
    "made": b"{" + b",".join(b'"%x":[1.5]' % i for i in range(MANY)) + b"}",
    "digits": b'[["a","b",[' + b",".join([b"9" * 4000] * 1000) + b"]]]",
}


@pytest.mark.parametrize("field", TINY)
def test_what_no_model_can_need_is_refused_in_little_memory(field):
    tensors = TINY[field] if field in ("tensors", "shape", "digits") else b"[]"
    attributes = TINY[field] if field == "attributes" else b"{}"
    made = TINY[field] if field == "made" else b"{}"
    raw = b'{"layout":"raw","tensors":%b,"attributes":%b,"made":%b}' % (tensors, attributes, made)
    many = f"manifest has {raw.count(b',')} values; allowed: up to 271744 for a model of 300 tensor"
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError, match="not a valid m" if field == "digits" else many):
            decode(raw, 300, [])
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_without_a_model_the_number_of_values_has_a_limit_as_well():
    with pytest.raises(ProtocolError, match=r"has 5000000 values; allowed: up to 4194304$"):
        decode(b"," * 5_000_000, None)


def test_a_model_matches_one_like_it():
    model = assorted()
    manifest, distinct, _ = describe(model, RAW, {}, {})
    blanks = blank_like(model)
    matched = match(_travelled(manifest), blanks, blanks.keys(), {})
    assert len(matched) == len(distinct) == len(model) - 1  # one is tied
    assert [tensor.shape for tensor in matched] == [tensor.shape for tensor in distinct]


@given(any_model(), st.sampled_from([RAW, PROCESSED]))
def test_any_model_matches_its_copy_whether_its_entries_are_read_or_only_compared(model, layout):
    manifest, distinct, sizes = describe(model, layout, {"a": 1}, {}, {"b": "c"})
    blanks = blank_like(model)
    own = describe(blanks, layout, {}, {}, {"b": "other"})
    raw = msgspec.json.encode(manifest)
    read, compared = decode(raw, len(model)), decode(raw, len(model), own.manifest.tensors)
    assert compared == read == manifest
    assert compared.tensors is own.manifest.tensors
    assert read.tensors is not own.manifest.tensors
    found = [match(one, blanks, blanks.keys(), {}, {"b": "c"}, own=own) for one in (read, compared)]
    assert len(found[0]) == len(found[1]) == len(distinct)
    assert sizes == [tensor.nbytes for tensor in distinct]
    for one, other in zip(*found, strict=True):
        assert one is other or (one.data_ptr(), one.stride()) == (other.data_ptr(), other.stride())


@pytest.mark.parametrize("change", ["name", "dtype", "shape", "tie", "order", "fewer"])
def test_entries_that_are_not_those_of_the_model_are_read_and_refused(change):
    one = torch.zeros(2, 3)
    there = {"a": one, "b": torch.zeros(2, 3)}
    here = {
        "name": {"a": one, "c": torch.zeros(2, 3)},
        "dtype": {"a": one, "b": torch.zeros(2, 3, dtype=torch.int32)},
        "shape": {"a": one, "b": torch.zeros(3, 2)},
        "tie": {"a": one, "b": one},
        "order": {"b": there["b"], "a": one},
        "fewer": {"a": one},
    }[change]
    own = describe(here, RAW, {}, {})
    manifest = decode(
        msgspec.json.encode(describe(there, RAW, {}, {}).manifest), 2, own.manifest.tensors
    )
    assert [entry.name for entry in manifest.tensors] == ["a", "b"]
    if change == "order":
        matched = match(manifest, here, here.keys(), {}, own=own)
        assert [matched[0] is one, matched[1] is there["b"]] == [True, True]
        return
    with pytest.raises(LayoutUnsupported, match="tensors differ: "):
        match(manifest, here, here.keys(), {}, own=own)


def test_of_a_manifest_that_is_none_it_is_said_what_is_wrong_whatever_the_model():
    own = describe({"a": torch.zeros(1)}, RAW, {}, {}).manifest.tensors
    deep = b'{"layout":"raw","tensors":' + b"[" * 5000
    for raw in (deep, b'{"layout":1,"tensors":[["a","torch.float32",[1]]],"attributes":{}}'):
        with pytest.raises(ProtocolError, match="Expected `str`, got"):
            decode(raw, 1, own)


def test_what_is_made_and_meant_is_compared_where_entries_are_the_same():
    model = {"a": torch.zeros(1)}
    own = describe(model, RAW, {}, {})
    manifest = msgspec.structs.replace(own.manifest, meaning={"b": "c"}, made={"d": [1.0, 2.0]})
    with pytest.raises(LayoutUnsupported, match="b is nothing here and c there"):
        match(manifest, model, {"a"}, {}, own=own)
    with pytest.raises(LayoutUnsupported, match="d is only there"):
        match(manifest, model, {"a"}, {}, {"b": "c"}, {"e": [1.0, 2.0]}, own)


def test_only_whole_regions_are_ties():
    whole = torch.arange(20.0)
    tensors = {"whole": whole, "half": whole[:10], "view": whole.view(4, 5), "same": whole[:20]}
    manifest, distinct, _ = describe(tensors, RAW, {}, {})
    assert [entry.alias_of for entry in manifest.tensors] == [None, None, None, "whole"]
    assert len(distinct) == 3


def test_empty_tensors_are_never_ties():
    empty = torch.empty(0)
    manifest, *_ = describe({"a": empty, "b": empty}, RAW, {}, {})
    assert [entry.alias_of for entry in manifest.tensors] == [None, None]


def _refusal(there, here, required=None):
    manifest, *_ = describe(there, RAW, {}, {})
    with pytest.raises(LayoutUnsupported) as error:
        match(manifest, here, here.keys() if required is None else required, {})
    return str(error.value)


def _two():
    return {"a": torch.zeros(2, 3), "b": torch.zeros(2, 3)}


def _tied():
    tensor = torch.zeros(2, 3)
    return {"a": tensor, "b": tensor}


def test_tied_here_but_not_there_is_refused_by_name():
    message = _refusal(there=_two(), here=_tied())
    assert message == "tensors differ: b shares the memory of a here and of no other there"


def test_tied_there_but_not_here_is_refused_by_name():
    message = _refusal(there=_tied(), here=_two())
    assert message == "tensors differ: b shares the memory of no other here and of a there"


def test_tied_to_another_tensor_is_refused_by_name():
    one, other = torch.zeros(3), torch.zeros(3)
    message = _refusal({"a": one, "b": other, "c": one}, {"a": one, "b": other, "c": other})
    assert "c shares the memory of b here and of a there" in message


def test_a_missing_tensor_is_named():
    assert _refusal({"a": torch.zeros(1)}, _two() | {"a": torch.zeros(1)}) == (
        "tensors differ: b is only here"
    )


def test_a_tensor_that_is_not_required_may_be_missing():
    manifest, *_ = describe({"a": torch.zeros(1)}, RAW, {}, {})
    assert len(match(manifest, {"a": torch.zeros(1), "b": torch.zeros(1)}, {"a"}, {})) == 1


def test_a_second_name_that_only_the_client_has_comes_with_the_first():
    manifest, *_ = describe({"a": torch.zeros(2, 3)}, RAW, {}, {})
    here = _tied()
    assert match(manifest, here, here.keys(), {})[0] is here["a"]
    one = torch.zeros(2, 3)
    within = here | {"row": here["a"][0], "c": one, "d": one}
    with pytest.raises(LayoutUnsupported, match="c is only here; row is only here"):
        match(manifest, within, within.keys(), {})


def test_an_extra_tensor_is_named():
    assert _refusal(_two(), {"a": torch.zeros(2, 3)}) == "tensors differ: b is only there"


@pytest.mark.parametrize(
    ("tensor", "shown"),
    [
        (torch.zeros(2, 3, dtype=torch.int8), "int8[2, 3]"),
        (torch.zeros(3, 2), "float32[3, 2]"),
        (torch.zeros(6), "float32[6]"),
        (torch.tensor(0.0), "float32[]"),
    ],
)
def test_another_dtype_or_shape_is_named_with_both(tensor, shown):
    message = _refusal(_two(), _two() | {"b": tensor})
    assert message == f"tensors differ: b is {shown} here and float32[2, 3] there"


def test_many_differences_are_named_in_part_and_counted():
    message = _refusal({f"t{i}": torch.zeros(1) for i in range(12)}, {})
    assert message.count("is only there") == MAX_NAMED
    assert message.endswith("and 7 more")


def test_names_that_a_source_has_chosen_are_shown_bounded_and_printable():
    name = "\x1b[2J\n\u202e" * 1_000_000
    message = _refusal({f"{name}{i}": torch.zeros(1) for i in range(3)}, {})
    assert message.isprintable()
    assert len(message) < 3 * 500
    assert _refusal({"x": torch.zeros([1] * 500)}, {"x": torch.zeros(1)}).count("1") < 250


def test_a_name_that_is_there_twice_is_refused():
    manifest, *_ = describe({"a": torch.zeros(1)}, RAW, {}, {})
    twice = msgspec.structs.replace(manifest, tensors=manifest.tensors * 2)
    with pytest.raises(LayoutUnsupported, match="a name is there twice"):
        match(twice, {"a": torch.zeros(1)}, {"a"}, {})


def test_a_manifest_has_the_names_of_those_that_have_bytes():
    manifest, *_ = describe(assorted(), RAW, {}, {})
    assert manifest.names == [name for name in assorted() if name != "lm_head.weight"]


@pytest.mark.parametrize(
    "tensor",
    [torch.empty(3, device="meta"), torch.nn.parameter.UninitializedParameter()],
    ids=["meta", "uninitialized"],
)
def test_a_source_has_no_tensors_without_memory(tensor):
    with pytest.raises(LayoutUnsupported, match="b has no memory"):
        describe({"a": torch.zeros(1), "b": tensor}, RAW, {}, {})


class Text(str):
    pass


def test_attributes_travel_as_plain_values_whatever_their_type():
    given = {"d": 1.5, "a": Text("x"), "b": enum.IntEnum("Two", {"TWO": 2}).TWO, "c": True}
    manifest, *_ = describe({"a": torch.zeros(1)}, RAW, given, {})
    assert _travelled(manifest) == manifest
    assert list(manifest.attributes.items()) == [("a", "x"), ("b", 2), ("c", True), ("d", 1.5)]


def test_a_source_has_no_attribute_that_no_message_can_carry():
    with pytest.raises(LayoutUnsupported, match=r"attribute layer\.name is "):
        describe({"a": torch.zeros(1)}, RAW, {"layer.name": "\ud800"}, {})


def test_a_client_has_no_tensors_without_memory():
    manifest, *_ = describe({"b": torch.zeros(3)}, RAW, {}, {})
    with pytest.raises(LayoutUnsupported, match="b has no memory"):
        match(manifest, {"b": torch.empty(3, device="meta")}, {"b"}, {})


# What decides the meaning of tensors


def test_what_tensors_were_made_for_travels_with_them_and_is_part_of_their_name():
    tensors, meaning = {"a": torch.zeros(1)}, {"layers.*.quant_method": "One", "b": "2"}
    manifest, *_ = describe(tensors, PROCESSED, {}, {}, meaning)
    assert _travelled(manifest).meaning == meaning
    assert len(match(manifest, tensors, {"a"}, {}, meaning)) == 1
    digests = {
        make_store(tensors, PROCESSED, {}, DEVICE, said).digests.weights for said in (meaning, {})
    }
    assert len(digests) == 2


@pytest.mark.parametrize(
    ("here", "there", "lines"),
    [
        ({"a.*.m": "One"}, {"a.*.m": "Other"}, ["a.*.m is One here and Other there"]),
        ({"a.*.m": "One"}, {}, ["a.*.m is One here and nothing there"]),
        ({}, {"a.*.m": "One"}, ["a.*.m is nothing here and One there"]),
        (
            {"x": "1", "y": "1", "z": "1"},
            {"x": "2", "y": "1", "z": "\x1b" * 999},
            ["x is 1 here and 2 there", f"z is 1 here and {' ' * 120}... there"],
        ),
        (
            {"x": f"{'0' * 999}1{'2' * 999}"},
            {"x": f"{'0' * 999}3"},
            [f"x is ...{'0' * 60}1{'2' * 59}... here and ...{'0' * 60}3 there"],
        ),
    ],
)
def test_tensors_that_were_made_for_something_else_are_refused_with_both_values(here, there, lines):
    tensors = {"a": torch.zeros(1)}
    manifest, *_ = describe(tensors, RAW, {}, {}, there)
    with pytest.raises(LayoutUnsupported) as refused:
        match(manifest, tensors, {"a"}, {}, here)
    assert str(refused.value) == f"tensors are not made in the same way: {'; '.join(lines)}"


# What both sides make themselves


def compared(there, here):
    """What differs between samples of these tensors."""
    manifest = Manifest(
        RAW, [], {}, made={name: sample_of(tensor) for name, tensor in there.items()}
    )
    try:
        match(
            _travelled(manifest),
            {},
            (),
            {},
            made={n: sample_of(tensor) for n, tensor in here.items()},
        )
    except LayoutUnsupported as error:
        return str(error).removeprefix("tensors differ: ")
    return ""


TABLE = torch.arange(60.0).reshape(6, 10)


def test_equal_tables_and_those_with_more_rows_are_the_same():
    assert compared({"t": TABLE}, {"t": TABLE.clone()}) == ""
    assert compared({"t": TABLE}, {"t": TABLE[:3]}) == ""
    assert compared({"t": TABLE[:3]}, {"t": TABLE, "only here": TABLE}) == ""


def test_rounding_and_numbers_that_are_none_make_no_difference():
    infinite = torch.tensor([math.inf, -math.inf, 1.0, math.nan])
    assert compared({"t": TABLE}, {"t": TABLE * 1.001}) == ""
    assert compared({"t": infinite}, {"t": infinite.clone()}) == ""
    assert "is inf here and 0.0 there" in compared({"t": TABLE}, {"t": TABLE + math.inf})


def test_another_table_is_refused_with_both_values_and_where():
    other = TABLE.clone()
    other[2, 7] = 5
    assert compared({"t": TABLE}, {"t": other}) == (
        "t, which both make themselves, is 5.0 here and 27.0 there at element 27"
    )


@pytest.mark.parametrize("rows", [64, 4096])
def test_a_rotary_table_is_another_one_when_its_lowest_frequencies_are(rows):
    frequencies = 10_000 ** (-torch.arange(32) / 32)
    scaled = torch.where(torch.arange(32) >= 24, frequencies / 8, frequencies)

    def table(of):
        angles = torch.arange(rows)[:, None] * of
        return torch.cat([angles.cos(), angles.sin()], dim=-1)

    assert compared({"t": table(frequencies)}, {"t": table(frequencies)}) == ""
    assert "at element " in compared({"t": table(frequencies)}, {"t": table(scaled)})


def test_integers_have_to_be_the_same_to_the_last():
    there = torch.arange(50)
    other = there.clone()
    other[-1] = 0
    assert compared({"t": there}, {"t": there.clone()}) == ""
    assert compared({"t": there}, {"t": other}) == (
        "t, which both make themselves, has other values here than there"
    )


def test_a_table_that_a_client_lacks_is_refused_and_a_single_number_is_not():
    assert compared({"t": TABLE}, {}) == "t is only there, and does not travel"
    assert compared({"t": torch.arange(3)}, {}) == "t is only there, and does not travel"
    assert compared({"t": torch.tensor(1.0)}, {}) == ""
