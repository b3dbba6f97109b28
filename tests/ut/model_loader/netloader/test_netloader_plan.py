import enum
import math

import msgspec
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from vllm_ascend.model_loader.netloader.errors import LayoutUnsupported
from vllm_ascend.model_loader.netloader.executor.ledger import Ledger
from vllm_ascend.model_loader.netloader.executor.manifest import (
    MAX_NAMED,
    RAW,
    Manifest,
    allocate,
    describe,
    match,
)
from vllm_ascend.model_loader.netloader.executor.pieces import (
    in_place,
    pack,
    read,
    size_of,
    unpack,
)
from vllm_ascend.model_loader.netloader.executor.plan import make_plan

from .support import DEVICE, assorted, blank_like, bytes_of, differing, random_tensor

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.uint16,
    torch.int16,
    torch.uint32,
    torch.int32,
    torch.uint64,
    torch.int64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
]
_shapes = st.lists(st.integers(0, 9), max_size=3)


@st.composite
def _tensors(draw):
    """A tensor of any dtype and shape: contiguous, transposed, cut out or spread out."""
    dtype, shape = draw(st.sampled_from(DTYPES)), draw(_shapes)
    seed = draw(st.integers(0, 1000))
    kind = draw(st.sampled_from(["contiguous", "transposed", "sliced", "shifted", "reversed"]))
    if kind == "sliced":
        whole = random_tensor(seed, dtype, *(2 * size + 1 for size in shape))
        return whole[tuple(slice(1, 2 * size + 1, 2) for size in shape)]
    if kind == "shifted":
        whole = random_tensor(seed, dtype, math.prod(shape) + 1)
        return whole[1:].view(shape)
    tensor = random_tensor(seed, dtype, *shape)
    if kind == "transposed" and len(shape) > 1:
        return tensor.transpose(0, -1)
    if kind == "reversed" and len(shape) == 3:
        return tensor.permute(2, 0, 1)
    return tensor


@st.composite
def _models(draw):
    """Named tensors, some of them under two names."""
    tensors = draw(st.lists(_tensors(), max_size=8))
    model = {f"t{index}": tensor for index, tensor in enumerate(tensors)}
    for index, tensor in enumerate(tensors):
        if draw(st.integers(0, 4)) == 0:
            model[f"tied{index}"] = tensor
    return model


_chunk_sizes = st.integers(16, 300)


# The plan


def _covered(plan):
    """(tensor, byte) of each byte in the order of the plan."""
    return [
        (piece.tensor, byte)
        for chunk in plan.chunks
        for piece in chunk.pieces
        for byte in range(piece.offset, piece.offset + piece.nbytes)
    ]


@given(st.lists(st.integers(0, 2000), max_size=20), _chunk_sizes)
@example([1] * 50, 16)
@example([16, 17, 15, 0, 33], 16)
@example([31], 31)
@example([300, 299, 301, 600], 300)
def test_the_plan_has_every_byte_of_every_tensor_once(sizes, chunk_bytes):
    plan = make_plan(sizes, chunk_bytes)
    every = {(tensor, byte) for tensor, size in enumerate(sizes) for byte in range(size)}
    covered = _covered(plan)
    assert len(covered) == len(every)
    assert set(covered) == every
    assert plan.nbytes == sum(sizes)


@given(st.lists(st.integers(0, 2000), max_size=20), _chunk_sizes)
def test_no_chunk_is_empty_over_its_size_or_tears_an_element(sizes, chunk_bytes):
    plan = make_plan(sizes, chunk_bytes)
    assert plan.chunk_bytes == chunk_bytes
    for chunk in plan.chunks:
        assert chunk.nbytes == sum(piece.nbytes for piece in chunk.pieces)
        assert 0 < chunk.nbytes <= chunk_bytes
        for piece in chunk.pieces:
            assert piece.offset % 16 == 0
            assert piece.nbytes % 16 == 0 or piece.offset + piece.nbytes == sizes[piece.tensor]


@given(st.lists(st.integers(0, 2000), max_size=20), _chunk_sizes)
def test_the_plan_is_the_same_on_both_sides(sizes, chunk_bytes):
    assert make_plan(list(sizes), chunk_bytes) == make_plan(tuple(sizes), chunk_bytes)


def test_small_tensors_share_a_chunk_and_large_ones_are_cut_evenly():
    plan = make_plan([100] * 50 + [10_000], 4096)
    packed = [chunk for chunk in plan.chunks if len(chunk.pieces) > 1]
    alone = [chunk for chunk in plan.chunks if len(chunk.pieces) == 1]
    assert [len(chunk.pieces) for chunk in packed] == [40, 10]
    assert [chunk.nbytes for chunk in alone] == [3344, 3344, 3312]


def test_thousands_of_tiny_tensors_travel_in_few_chunks():
    assert len(make_plan([4] * 10_000, 1 << 20).chunks) == 1


def test_nothing_makes_an_empty_plan():
    assert make_plan([], 4096).chunks == ()
    assert make_plan([0, 0], 4096).chunks == ()


def test_a_chunk_smaller_than_an_element_is_refused():
    with pytest.raises(ValueError, match="chunk_bytes is 15"):
        make_plan([1], 15)


# Bytes in and out of tensors


@given(_models(), _chunk_sizes)
def test_packing_and_unpacking_is_the_identity_on_bits(model, chunk_bytes):
    manifest, tensors = describe(model, RAW, {}, DEVICE.format_of)
    blanks = blank_like(model)
    received = match(manifest, blanks, blanks.keys(), {})
    plan = make_plan([size_of(tensor) for tensor in tensors], chunk_bytes)
    staging = torch.empty(chunk_bytes, dtype=torch.uint8)
    for chunk in plan.chunks:
        message = pack(chunk, tensors, staging, DEVICE)
        assert message.shape == (chunk.nbytes,)
        unpack(chunk, received, message.clone(), DEVICE)
    assert differing(model, blanks) == []


def travel(there, here, chunk_bytes=1024):
    """Bring tensors to the other side, chunk by chunk."""
    there, here = list(there.values()), list(here.values())
    plan = make_plan([size_of(tensor) for tensor in there], chunk_bytes)
    for chunk in plan.chunks:
        message = pack(chunk, there, torch.empty(chunk_bytes, dtype=torch.uint8), DEVICE)
        unpack(chunk, here, message, DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_transposed_tensor_of_any_dtype_is_read_and_written(dtype):
    model = {"t": random_tensor(1, dtype, 6, 7, 2).permute(2, 0, 1)}
    blanks = blank_like(model)
    travel(model, blanks, chunk_bytes=64)
    assert differing(model, blanks) == []


def test_a_single_element_may_have_any_stride():
    model = {"t": torch.arange(10.0)[3::2][:1]}
    blanks = blank_like(model)
    travel(model, blanks)
    assert blanks["t"] == 3.0


def test_a_strided_tensor_may_start_at_any_byte_of_a_message():
    model = {"odd": random_tensor(0, torch.uint8, 3), "t": random_tensor(1, torch.int64, 2, 3).t()}
    blanks = blank_like(model)
    travel(model, blanks)
    assert differing(model, blanks) == []


def test_strides_may_differ_between_the_two_sides():
    here, there = {"t": torch.zeros(7, 6)}, {"t": torch.arange(42.0).view(6, 7).t()}
    travel(there, here, chunk_bytes=64)
    assert torch.equal(here["t"], there["t"])


@pytest.mark.parametrize("rows", [slice(1, None, 2), slice(3, 7)])
@pytest.mark.parametrize("columns", [slice(2, None, 3), slice(None)])
def test_memory_around_a_tensor_stays_as_it_is(rows, columns):
    around = torch.zeros(10, 10)
    inside = around[rows, columns]
    travel({"t": torch.ones_like(inside).contiguous()}, {"t": inside}, chunk_bytes=32)
    assert (inside == 1).all()
    inside.zero_()
    assert (around == 0).all()


def test_parameters_that_want_gradients_are_read_and_written():
    tensors = {
        "a": torch.nn.Parameter(torch.ones(5)),
        "b": torch.nn.Parameter(torch.ones(6, 7)).t(),
    }
    travel({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, tensors)
    assert all((tensor == 0).all() for tensor in tensors.values())


def test_a_contiguous_tensor_is_sent_from_its_own_memory():
    tensor = torch.arange(100.0)
    plan = make_plan([size_of(tensor)], 64)
    piece = plan.chunks[1].pieces[0]
    view = in_place(piece, [tensor])
    assert view.data_ptr() == tensor.data_ptr() + piece.offset
    assert torch.equal(view, bytes_of(tensor)[piece.offset : piece.offset + piece.nbytes])
    assert read(piece, [tensor]).data_ptr() == view.data_ptr()


def test_a_strided_tensor_has_no_memory_to_be_sent_from():
    tensor = torch.arange(100.0)[::2]
    plan = make_plan([size_of(tensor)], 64)
    assert in_place(plan.chunks[0].pieces[0], [tensor]) is None


# Manifests


def _travelled(manifest):
    return msgspec.json.decode(msgspec.json.encode(manifest), type=Manifest)


def test_a_manifest_survives_the_journey():
    manifest, _ = describe(
        assorted(), RAW, {"a.b": True, "c": 1.5, "d": None, "e": "x"}, DEVICE.format_of
    )
    assert _travelled(manifest) == manifest


def test_a_model_matches_one_like_it():
    model = assorted()
    manifest, distinct = describe(model, RAW, {}, DEVICE.format_of)
    blanks = blank_like(model)
    matched = match(_travelled(manifest), blanks, blanks.keys(), {})
    assert len(matched) == len(distinct) == len(model) - 1  # one is tied
    assert [tensor.shape for tensor in matched] == [tensor.shape for tensor in distinct]


@given(_models())
def test_any_model_matches_its_copy(model):
    manifest, distinct = describe(model, RAW, {}, DEVICE.format_of)
    blanks = blank_like(model)
    matched = match(_travelled(manifest), blanks, blanks.keys(), {})
    assert len(matched) == len(distinct)


def test_only_whole_regions_are_ties():
    whole = torch.arange(20.0)
    tensors = {"whole": whole, "half": whole[:10], "view": whole.view(4, 5), "same": whole[:20]}
    manifest, distinct = describe(tensors, RAW, {}, DEVICE.format_of)
    assert [entry.alias_of for entry in manifest.tensors] == [None, None, None, "whole"]
    assert len(distinct) == 3


def test_empty_tensors_are_never_ties():
    empty = torch.empty(0)
    manifest, _ = describe({"a": empty, "b": empty}, RAW, {}, DEVICE.format_of)
    assert [entry.alias_of for entry in manifest.tensors] == [None, None]


def _refusal(there, here, required=None):
    manifest, _ = describe(there, RAW, {}, DEVICE.format_of)
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
    manifest, _ = describe({"a": torch.zeros(1)}, RAW, {}, DEVICE.format_of)
    assert len(match(manifest, {"a": torch.zeros(1), "b": torch.zeros(1)}, {"a"}, {})) == 1


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


@pytest.mark.parametrize(
    "tensor",
    [torch.empty(3, device="meta"), torch.nn.parameter.UninitializedParameter()],
    ids=["meta", "uninitialized"],
)
def test_a_source_has_no_tensors_without_memory(tensor):
    with pytest.raises(LayoutUnsupported, match="b has no memory"):
        describe({"a": torch.zeros(1), "b": tensor}, RAW, {}, DEVICE.format_of)


class Text(str):
    pass


def test_attributes_travel_as_plain_values_whatever_their_type():
    given = {"a": Text("x"), "b": enum.IntEnum("Two", {"TWO": 2}).TWO, "c": True, "d": 1.5}
    manifest, _ = describe({"a": torch.zeros(1)}, RAW, given, DEVICE.format_of)
    assert msgspec.json.decode(msgspec.json.encode(manifest), type=Manifest) == manifest
    assert manifest.attributes == {"a": "x", "b": 2, "c": True, "d": 1.5}


def test_a_source_has_no_attribute_that_no_message_can_carry():
    with pytest.raises(LayoutUnsupported, match=r"attribute layer\.name is "):
        describe({"a": torch.zeros(1)}, RAW, {"layer.name": "\ud800"}, DEVICE.format_of)


def test_a_client_has_no_tensors_without_memory():
    manifest, _ = describe({"b": torch.zeros(3)}, RAW, {}, DEVICE.format_of)
    with pytest.raises(LayoutUnsupported, match="b has no memory"):
        match(manifest, {"b": torch.empty(3, device="meta")}, {"b"}, {})


def test_memory_is_made_for_every_name_of_a_manifest():
    model = assorted()
    manifest, _ = describe(model, RAW, {}, DEVICE.format_of)
    made = allocate(_travelled(manifest))
    assert made.keys() == model.keys()
    assert made["embed.weight"] is made["lm_head.weight"]
    match(manifest, made, made.keys(), {})


# The ledger


def everything(ledger, limit=8):
    """All that the ledger hands out until it has nothing more, request by request."""
    return list(iter(lambda: ledger.take(limit), []))


def test_the_ledger_hands_every_chunk_out_once():
    ledger = Ledger(30)
    assert [chunk for chunks in everything(ledger) for chunk in chunks] == list(range(30))
    assert ledger.take(8) == []


def test_a_session_by_itself_gets_all_it_asks_for():
    ledger = Ledger(30)
    with ledger.session():
        assert [len(chunks) for chunks in everything(ledger)] == [8, 8, 8, 6]


def test_several_sessions_get_less_the_less_is_left():
    ledger = Ledger(30)
    with ledger.session(), ledger.session():
        assert [len(ledger.take(100)) for _ in range(3)] == [8, 6, 4]


def test_a_session_that_holds_its_share_gets_no_more_while_others_are_there():
    ledger = Ledger(30)
    with ledger.session(), ledger.session():
        assert len(ledger.take(100, held=5)) == 3
        assert len(ledger.take(100, held=7)) == 0
    with ledger.session():
        assert len(ledger.take(100, held=7)) == 27


def test_a_session_may_always_hold_two_chunks():
    ledger = Ledger(2)
    with ledger.session(), ledger.session():
        assert [ledger.take(8, held=0), ledger.take(8, held=0)] == [[0, 1], []]
    ledger = Ledger(2)
    with ledger.session(), ledger.session():
        assert [ledger.take(8, held=1), ledger.take(8, held=2), ledger.take(8, held=1)] == [
            [0],
            [],
            [1],
        ]


def test_chunks_given_back_come_before_the_others():
    ledger = Ledger(3)
    assert ledger.take(1) == [0]
    ledger.give_back([0])
    assert ledger.take(1) == [0]


def test_the_ledger_is_finished_when_every_chunk_is_done():
    ledger = Ledger(2)
    ledger.done(1, (b"one",))
    assert not ledger.finished
    ledger.done(1, (b"one",))
    assert not ledger.finished
    ledger.done(0, (b"zero",))
    assert ledger.finished
    assert ledger.hashes() == ((b"zero",), (b"one",))


def test_an_empty_ledger_is_finished():
    assert Ledger(0).finished
    assert Ledger(0).hashes() == ()


def test_waiting_ends_when_a_chunk_comes_back_or_all_are_done():
    ledger = Ledger(1)
    ledger.take(1)
    ledger.wait(0.01)  # nothing happens, and the time is up
    ledger.give_back([0])
    ledger.wait(60)
    ledger.take(1)
    ledger.done(0, ())
    ledger.wait(60)
