"""What is fetched of a checkpoint, and in which requests, for loads cut in any two ways."""

import time

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.checkpoints import made_of
from vllm_ascend.model_loader.netloader.errors import LoadFailed, ProtocolError
from vllm_ascend.model_loader.netloader.executor.view import fetch as fetch_module
from vllm_ascend.model_loader.netloader.executor.view.boxes import Box, box_of
from vllm_ascend.model_loader.netloader.executor.view.fetch import (
    Part,
    catalog,
    find,
    is_copied,
    requests,
    same_reading,
)
from vllm_ascend.model_loader.netloader.executor.view.places import InPlace, put
from vllm_ascend.model_loader.netloader.executor.view.records import (
    Copy,
    Kept,
    Parameter,
    Records,
    Seen,
)

from .test_netloader_view import Rank, checkpoints, cuttings, load, pretend, same


@given(st.data())
def test_a_load_of_what_was_fetched_is_a_load_of_the_checkpoint(data):
    checkpoint = data.draw(checkpoints())
    ranks = [load(Rank(cuts), checkpoint) for cuts in data.draw(cuttings(checkpoint))]
    there = [records for records, _ in ranks]
    dtypes = (torch.bfloat16, torch.float32, torch.float16)
    for cuts in data.draw(cuttings(checkpoint, dtypes)):
        needs, _ = load(Rank(cuts), pretend(checkpoint))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fetch_module, "_FEW", data.draw(st.sampled_from([0, 8])))
            fetch, missing = find(needs, there, data.draw(st.integers(0, 5)))
        assert not missing
        most_bytes, most_parts = data.draw(st.integers(4, 60)), data.draw(st.integers(1, 3))
        asked = requests(fetch, most_bytes, most_parts)
        for request in (one for of_rank in asked for one in of_rank):
            assert request.nbytes <= most_bytes and len(request.parts) <= most_parts
        parts = [(one.rank, part) for each in asked for one in each for part in one.parts]
        made, count = made_of(fetch, parts, ranks)
        read = {cut.name: torch.zeros(checkpoint[cut.name].shape) for cut in cuts}
        for cut in cuts:
            box_of(read[cut.name], cut.box).fill_(1)
        assert count == sum(int(one.sum()) for one in read.values())
        into, expected = Rank(cuts), Rank(cuts)
        records, here = load(into, {one.name: made[i] for i, one in enumerate(fetch.tensors)})
        assert same_reading(records, needs)
        expected.load_weights(checkpoint.items())
        assert is_copied(needs)
        straight = Rank(cuts)
        places = InPlace(needs, straight)
        for _, part in parts:
            values = box_of(made[part.tensor], part.box).clone()
            put(places.places(fetch.tensors[part.tensor], part.box), part.box, values)
        for name, weight in expected.named_parameters():
            assert same(here[name], weight), name
            assert same(straight.get_parameter(name), weight), name


def rank_of(*tensors, dtype="float32"):
    return Records(tensors, (Parameter("p", dtype, (64,), (1,)),))


def seen(name, copies=(), kept=(), shape=(4, 4), dtype="float32"):
    return Seen(name, dtype, shape, tuple(copies), tuple(kept))


WHOLE = Copy((0, 0), (4, 4), 0, 0, (4, 1))
HALF = Copy((0, 0), (2, 4), 0, 0, (4, 1))
ROUNDED = Copy((0, 0), (4, 4), 0, 0, (4, 1), ("float32", "float16"))


def test_what_no_rank_has_is_named():
    _, (missing,) = find(rank_of(seen("t", [WHOLE])), [rank_of(seen("t", [HALF]))], 0)
    assert str(missing) == "t[2:4, 0:4]: no rank of the source has it"


def test_what_was_rounded_stands_only_for_what_is_rounded_in_the_same_way():
    there = [rank_of(seen("t", [ROUNDED]), dtype="float16")]
    fetch, missing = find(rank_of(seen("t", [ROUNDED]), dtype="float16"), there, 0)
    assert not missing and fetch.nbytes == 32
    _, (missing,) = find(rank_of(seen("t", [WHOLE])), there, 0)
    assert missing.why == "the source has it as float32 -> float16"
    read = Kept((0, 0), (4, 4))
    assert find(rank_of(seen("t", [ROUNDED], [read]), dtype="float16"), there, 0)[1]
    other = Copy((0, 0), (4, 4), 0, 16, (4, 1), ("float32", "bfloat16"))
    both = rank_of(seen("t", [ROUNDED, other]), dtype="float16")
    assert find(both, there, 0)[1] and find(both, [rank_of(seen("t", [other]))], 0)[1]


def test_values_that_came_with_the_records_are_not_fetched():
    kept = Kept((0, 0), (2, 4), b"1234" * 8)
    there = rank_of(seen("t", [WHOLE], [kept, Kept((2, 0), (1, 4))]))
    fetch, missing = find(rank_of(seen("t", kept=[Kept((0, 0), (3, 4))])), [there], 0)
    assert not missing and fetch.kept == {0: {kept.box: kept}}
    assert [part.box for (parts) in fetch.parts for part in parts] == [Box((2, 0), (1, 4))]


def test_values_that_came_with_the_records_are_not_fetched_for_one_copy_either():
    kept = Kept((0, 0), (2, 4), b"1234" * 8)
    there = [rank_of(seen("t", [WHOLE])), rank_of(seen("t", kept=[kept]))]
    fetch, missing = find(rank_of(seen("t", [WHOLE])), there, 0)
    assert not missing and fetch.kept == {0: {kept.box: kept}} and fetch.nbytes == 32


def test_what_is_inside_of_one_copy_of_the_preferred_rank_is_not_searched_for(monkeypatch):
    monkeypatch.setattr(fetch_module, "_find_one", None)
    columns = Copy((0, 1), (4, 2), 0, 0, (2, 1))
    there = [rank_of(seen("t", [Copy((0, 0), (4, 4), 0, 8, (4, 1))])), rank_of(seen("t"))]
    fetch, missing = find(rank_of(seen("t", [columns])), there, 0)
    assert not missing
    assert fetch.parts == [[Part(0, columns.box, 0, 9, (4, 1), ("float32",))], []]


def test_a_tensor_that_is_read_twice_is_fetched_once():
    twice = seen("t", [WHOLE, Copy((0, 0), (4, 4), 0, 16, (4, 1))], [Kept((1, 1), (2, 2))])
    fetch, _ = find(rank_of(twice), [rank_of(seen("t", [WHOLE]))], 0)
    assert fetch.nbytes == 64


def test_what_several_ranks_have_comes_from_the_preferred_one():
    ranks = [rank_of(seen("t", [WHOLE])) for _ in range(3)]
    assert [len(parts) for parts in find(ranks[0], ranks, 4)[0].parts] == [0, 1, 0]


def test_a_tensor_that_is_read_in_very_many_boxes_is_fetched_as_the_one_around_them(monkeypatch):
    monkeypatch.setattr(fetch_module, "_MOST_BOXES", 2)
    needs = rank_of(seen("t", [Copy((0, i), (4, 1), 0, i, (4, 1)) for i in (0, 1, 3)]))
    fetch, missing = find(needs, [rank_of(seen("t", [WHOLE]))], 0)
    assert not missing
    assert [part.box for part in fetch.parts[0]] == [Box((0, 0), (4, 4))]


def test_tensors_keep_the_order_in_which_the_source_has_loaded_them():
    ranks = [rank_of(seen("b"), seen("a")), rank_of(seen("c"), seen("a"))]
    assert [one.name for one in catalog(ranks)] == ["b", "a", "c"]


def test_ranks_that_differ_in_what_a_tensor_is_are_refused():
    with pytest.raises(ProtocolError, match=r"t is float32 \(4, 4\) at one rank .* int8 \(2,\)"):
        catalog([rank_of(seen("t")), rank_of(Seen("t", "int8", (2,)))])


def test_a_request_says_what_has_to_come_before_it():
    there = rank_of(seen("a", [WHOLE]), seen("b", [WHOLE]))
    fetch, _ = find(there, [there], 0)
    assert [one.start for one in requests(fetch, 64, 9)[0]] == [0, 64]
    assert [one.start for one in requests(fetch, 16, 9)[0]] == [0] * 4 + [64] * 4


def test_loads_that_differ_in_values_only_read_the_same():
    one = rank_of(seen("t", [WHOLE], [Kept((0, 0), (1, 1), b"1234")]))
    other = rank_of(seen("t", [WHOLE], [Kept((0, 0), (1, 1))]))
    assert same_reading(one, other)
    assert not same_reading(one, rank_of(seen("t", [HALF], [Kept((0, 0), (1, 1))])))


@pytest.mark.parametrize(
    "needs",
    [
        rank_of(seen("t", [WHOLE], [Kept((0, 0), (1, 1))])),
        msgspec.structs.replace(rank_of(seen("t", [WHOLE])), computed={"p": "aten.mul_"}),
        msgspec.structs.replace(rank_of(seen("t", [WHOLE])), overwritten=True),
    ],
)
def test_what_does_more_than_copying_is_no_mere_copy(needs):
    assert is_copied(rank_of(seen("t", [WHOLE, HALF])))
    assert not is_copied(needs)


def experts(rank, tp, step=64, order=lambda expert: expert):
    """What a rank has of 200 fused experts, each cut along its last dimension."""
    size = 16 // tp
    copies = [
        Copy((i, 0, rank * size), (1, 2, size), 0, order(i) * step, (0, size, 1))
        for i in range(200)
    ]
    return Records(
        (Seen("t", "float32", (200, 2, 16), tuple(copies)),),
        (Parameter("p", "float32", (1 << 20,), (1,)),),
    )


@pytest.fixture
def meets(monkeypatch):
    """How often boxes are compared."""
    calls = []
    meet = Box.meet

    def counted(one, other):
        calls.append(other)
        return meet(one, other)

    monkeypatch.setattr(Box, "meet", counted)
    return calls


def test_experts_that_follow_each_other_are_fetched_as_one_box(meets):
    fetch, missing = find(experts(0, 1), [experts(rank, 4) for rank in range(4)], 0)
    assert not missing and len(meets) < 20
    assert [len(parts) for parts in fetch.parts] == [1, 1, 1, 1]
    (part,) = fetch.parts[3]
    assert part.box == Box((0, 0, 12), (200, 2, 4)) and part.stride == (64, 4, 1)


def test_rows_with_gaps_between_them_in_memory_are_not_taken_for_one_box():
    copies = [Copy((2 * i, 0), (2, 4), 0, 12 * i, (4, 1)) for i in range(10)]
    there = Records((seen("t", copies, shape=(20, 4)),), (Parameter("p", "float32", (120,), (1,)),))
    fetch, missing = find(there, [there], 0)
    assert not missing and [part.offset for part in fetch.parts[0]] == [12 * i for i in range(10)]


def test_experts_in_any_order_are_compared_with_those_near_only(meets):
    def mixed(expert):
        return expert * 77 % 200

    there = [experts(rank, 4, order=mixed) for rank in range(4)]
    fetch, missing = find(experts(0, 1, order=mixed), there, 0)
    assert not missing and fetch.nbytes == 200 * 2 * 16 * 4
    assert len(meets) < 20 * 200 * 4


def test_copies_that_say_nothing_new_cost_nothing(meets):
    far = Copy((199, 0, 0), (1, 1, 1), 0, 0, (0, 0, 0))
    seen = Seen("t", "float32", (200, 2, 16), (far,) * 2000)
    _, missing = find(
        experts(0, 1), [Records((seen,), (Parameter("p", "float32", (1,), (1,)),))], 0
    )
    assert missing and len(meets) < 100


def test_what_takes_too_long_to_find_is_given_up():
    with pytest.raises(LoadFailed, match="what t is made of takes too long"):
        find(experts(0, 1), [experts(0, 1)], 0, seconds=-1.0)


def test_many_boxes_that_are_kept_take_no_longer():
    kept = tuple(Kept((2 * row, 2 * (row % 32)), (1, 1), b"\0\0") for row in range(2000))
    there = Records((Seen("w", "bfloat16", (4000, 64), (), kept),), ())
    whole = Copy((0, 0), (4000, 64), 0, 0, (64, 1))
    need = Records(
        (Seen("w", "bfloat16", (4000, 64), (whole,)),),
        (Parameter("w", "bfloat16", (4000, 64), (64, 1)),),
    )
    started = time.monotonic()
    with pytest.raises(LoadFailed, match="what w is made of takes too long"):
        find(need, [there], 0, seconds=0.1)
    assert time.monotonic() - started < 5  # it took a minute
