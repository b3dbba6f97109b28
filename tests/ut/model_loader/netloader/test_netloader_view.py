"""Checkpoints seen through parameters, with loads that are cut in any two ways."""

import itertools
from collections import Counter
from dataclasses import dataclass
from math import prod

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import nn

from tests.checkpoints import rebuild
from vllm_ascend.model_loader.netloader.errors import ProtocolError
from vllm_ascend.model_loader.netloader.executor.model.trace import Trace
from vllm_ascend.model_loader.netloader.executor.view import boxes as boxes_module
from vllm_ascend.model_loader.netloader.executor.view import records as records_module
from vllm_ascend.model_loader.netloader.executor.view.boxes import (
    Box,
    Unmapped,
    boxes,
    gaps,
    reach,
)
from vllm_ascend.model_loader.netloader.executor.view.casts import gives, keeps, shortest
from vllm_ascend.model_loader.netloader.executor.view.fetch import find
from vllm_ascend.model_loader.netloader.executor.view.records import (
    Copy,
    Fill,
    Kept,
    Parameter,
    Records,
    Seen,
    check,
    decode,
    dtype_of,
    encode,
    parameter_of,
)

from .support import bytes_of


def indices(size):
    return itertools.product(*map(range, size))


def steps(index, stride):
    return sum(i * step for i, step in zip(index, stride, strict=True))


def elements(box):
    return {
        tuple(a + i for a, i in zip(box.start, index, strict=True)) for index in indices(box.size)
    }


@st.composite
def regions(draw):
    """A shape, and strided elements of it with their places on another side."""
    shape = tuple(draw(st.lists(st.integers(1, 6), max_size=4)))
    room = prod(shape) - 1
    dims = []
    offset = draw(st.integers(0, room))
    for _ in range(draw(st.integers(0, 4))):
        n = draw(st.integers(1, 6))
        most = (room - offset - sum((m - 1) * a for m, a, _ in dims)) // max(n - 1, 1)
        dims.append((n, draw(st.integers(0, most)), draw(st.integers(0, 40))))
    return shape, offset, dims


@example(((6,), 0, [(2, 1, 5), (3, 1, 7)]))
@given(regions())
def test_boxes_have_the_elements_of_a_strided_region_each_in_its_place(region):
    shape, offset, dims = region
    sizes, here, there = zip(*dims, strict=True) if dims else ((), (), ())
    expected = Counter(
        (offset + steps(index, here), steps(index, there)) for index in indices(sizes)
    )
    whole = torch.empty(shape).stride()
    found = Counter()
    for piece in boxes(shape, offset, dims):
        assert all(a + n <= m for a, n, m in zip(*piece.box, shape, strict=True))
        for index in indices(piece.box.size):
            at = steps(piece.box.start, whole) + steps(index, whole)
            found[at, piece.offset + steps(index, piece.stride)] += 1
    assert found == expected


@pytest.mark.parametrize(
    ("shape", "offset", "dims", "pieces"),
    [
        ((6, 4), 0, [(6, 4, 8), (4, 1, 1)], 1),
        ((6, 4), 8, [(2, 4, 1), (4, 1, 2)], 1),
        ((6, 4), 0, [(24, 1, 1)], 1),
        ((6, 4), 2, [(8, 1, 1)], 3),
        ((6, 4), 0, [(6, 4, 2), (2, 2, 1)], 2),
        ((1, 1), 0, [(5, 0, 1)], 5),
        ((3, 0), 0, [(3, 0, 0), (0, 1, 1)], 0),
    ],
)
def test_a_region_takes_few_boxes(shape, offset, dims, pieces):
    assert len(boxes(shape, offset, dims)) == pieces


@pytest.mark.parametrize("dims", [[(25, 1, 1)], [(7, 4, 4), (4, 1, 1)], [(5000, 0, 1)]])
def test_a_region_that_is_not_of_the_tensor_or_repeats_it_too_often_is_refused(dims):
    with pytest.raises(Unmapped):
        boxes((6, 4), 0, dims)


def test_a_row_that_goes_on_in_the_next_one_is_two_boxes():
    assert len(boxes((2, 3), 1, [(1, 3, 9), (3, 1, 1)])) == 2


def test_a_tensor_of_one_number_has_no_second_one():
    with pytest.raises(Unmapped, match="beyond the shape"):
        boxes((), 1, [])


def test_a_region_of_too_many_boxes_is_refused(monkeypatch):
    monkeypatch.setattr(boxes_module, "_MOST_BOXES", 9)
    with pytest.raises(Unmapped, match="more than 9 boxes"):
        boxes((40,), 0, [(10, 2, 1)])


_some_boxes = st.integers(0, 3).flatmap(
    lambda dims: st.lists(
        st.builds(
            Box,
            st.tuples(*[st.integers(0, 3)] * dims),
            st.tuples(*[st.integers(1, 3)] * dims),
        ),
        min_size=1,
        max_size=4,
    ).map(lambda found: ((6,) * dims, found))
)


@given(_some_boxes)
def test_gaps_are_what_no_box_covers(case):
    shape, covered = case
    left = gaps(shape, covered)
    counted = Counter(index for box in left for index in elements(box))
    assert set(counted.values()) <= {1}
    everything = set(indices(shape))
    assert counted.keys() == everything - set().union(*map(elements, covered))


@given(_some_boxes)
def test_two_boxes_have_in_common_what_both_have(case):
    one, *others = case[1]
    for other in others:
        common = one.meet(other)
        assert (elements(common) if common else set()) == elements(one) & elements(other)


@dataclass(frozen=True)
class Cut:
    """How a box of a checkpoint tensor comes into a parameter of its own.

    Attributes:
        name: the checkpoint tensor.
        box: the box of it.
        dtype: the parameter's.
        order: the parameter's dimensions, as dimensions of the box.
        step: every which element of the parameter's last dimension is of the box.
        padding: rows of the parameter before and after those of the box.
        way: what is done to the box on its way.
    """

    name: str
    box: Box
    dtype: torch.dtype
    order: tuple[int, ...]
    step: int
    padding: tuple[int, int]
    way: str


WAYS = {
    "as it is": lambda tensor: tensor,
    "cloned": lambda tensor: tensor.clone(),
    "made contiguous": lambda tensor: tensor.contiguous(),
    "flat and back": lambda tensor: tensor.reshape(-1).view(tensor.shape),
    "in other integers": lambda tensor: tensor.view(torch.int16).clone().view(tensor.dtype),
    "with a wider dtype": lambda tensor: tensor.to(torch.float32),
}


class Rank(nn.Module):
    """A rank that loads some boxes, each into a parameter."""

    def __init__(self, cuts, device="cpu"):
        super().__init__()
        self.cuts = cuts
        for number, cut in enumerate(cuts):
            shape = [cut.box.size[axis] for axis in cut.order] or [1]
            shape[-1] *= cut.step
            shape[0] += sum(cut.padding)
            weight = torch.full(shape, -1.0, dtype=cut.dtype, device=device)
            self.register_parameter(f"p{number}", nn.Parameter(weight, requires_grad=False))

    def load_weights(self, weights):
        for name, tensor in weights:
            for number, cut in enumerate(self.cuts):
                if cut.name == name:
                    weight = self.get_parameter(f"p{number}").data
                    before, after = cut.padding
                    place = weight[before : weight.shape[0] - after][..., :: cut.step]
                    if not cut.order:
                        place = place[0]
                    source = WAYS[cut.way](tensor[slices(cut.box)])
                    place.copy_(source.permute(cut.order))


def slices(box):
    return tuple(slice(start, start + n) for start, n in zip(*box, strict=True))


def pretend(checkpoint):
    return {name: tensor.to("meta") for name, tensor in checkpoint.items()}


def load(rank, checkpoint):
    trace = Trace()
    with trace:
        # Copies, so that what nobody keeps is gone when loading is over.
        rank.load_weights(trace.watch((name, checkpoint[name].clone()) for name in checkpoint))
    records = decode(encode(trace.records(rank)))
    return records, dict(rank.named_parameters())


@st.composite
def checkpoints(draw):
    shapes = draw(st.lists(st.lists(st.integers(1, 5), max_size=3), min_size=1, max_size=3))
    return {
        f"t{number}": torch.randn(shape, generator=torch.Generator().manual_seed(number)).bfloat16()
        for number, shape in enumerate(shapes)
    }


@st.composite
def cuttings(draw, checkpoint, dtypes=(torch.bfloat16, torch.float32), replicated=True):
    """The boxes of some ranks, which together have every element of a checkpoint."""
    ranks = [[] for _ in range(draw(st.integers(1, 3)))]
    numbers = range(len(ranks))
    for name, tensor in checkpoint.items():
        todo = [Box((0,) * tensor.dim(), tuple(tensor.shape))]
        for _ in range(draw(st.integers(0, 3))):
            box = todo.pop(draw(st.integers(0, len(todo) - 1)))
            axes = [axis for axis, n in enumerate(box.size) if n > 1]
            if not axes:
                todo.append(box)
                continue
            axis = draw(st.sampled_from(axes))
            size = list(box.size)
            size[axis] = draw(st.integers(1, size[axis] - 1))
            half = Box(box.start, tuple(size))
            todo += [half, *box.minus(half)]
        for box in todo:
            has = st.lists(
                st.sampled_from(numbers),
                min_size=1,
                max_size=len(ranks) if replicated else 1,
                unique=True,
            )
            for rank in draw(has):
                cut = Cut(
                    name,
                    box,
                    draw(st.sampled_from(dtypes)),
                    tuple(draw(st.permutations(range(tensor.dim())))),
                    draw(st.integers(1, 3)),
                    draw(st.tuples(st.integers(0, 2), st.integers(0, 2))),
                    draw(st.sampled_from(sorted(WAYS))),
                )
                ranks[rank].append(cut)
    return ranks


def same(one, other):
    return torch.equal(bytes_of(one), bytes_of(other))


@given(st.data())
def test_what_ranks_of_any_cutting_have_is_the_checkpoint(data):
    checkpoint = data.draw(checkpoints())
    ranks = [load(Rank(cuts), checkpoint) for cuts in data.draw(cuttings(checkpoint))]
    for name, tensor in checkpoint.items():
        whole, known = rebuild(name, ranks)
        assert known.all() and whole.dtype == tensor.dtype
        assert same(whole, tensor)


@given(st.data())
def test_a_rank_that_has_what_is_needed_is_the_only_one_that_is_asked(data):
    checkpoint = data.draw(checkpoints())
    cuts, *_ = data.draw(cuttings(checkpoint))
    assume(cuts)
    ranks = [load(Rank(cuts), checkpoint)[0] for _ in range(3)]
    prefer = data.draw(st.integers(0, 2))
    fetch, _ = find(ranks[0], ranks, prefer)
    assert [rank for rank, parts in enumerate(fetch.parts) if parts] == [prefer]


def numbered(checkpoint):
    """A checkpoint of these shapes in which no two elements are equal."""
    first, found = 0, {}
    for name, tensor in checkpoint.items():
        count = torch.arange(first, first + tensor.numel(), dtype=torch.int16)
        found[name] = count.reshape(tensor.shape)
        first += tensor.numel()
    return found


@given(st.data())
def test_a_record_that_is_off_by_one_is_noticed(data):
    checkpoint = numbered(data.draw(checkpoints()))
    only = (torch.int16,)
    cutting = data.draw(cuttings(checkpoint, only, replicated=False))
    ranks = [load(Rank([as_it_is(cut) for cut in cuts]), checkpoint) for cuts in cutting]
    assert all(is_right(ranks, checkpoint, name) for name in checkpoint)
    rank = data.draw(
        st.sampled_from([i for i, (records, _) in enumerate(ranks) if copied(records)])
    )
    records, parameters = ranks[rank]
    seen, copy = data.draw(st.sampled_from(copied(records)))
    axis = data.draw(st.integers(0, len(copy.size) - 1)) if copy.size else None
    fields = ["offset", "parameter"]
    if axis is not None:
        fields += ["start", "size"] + (["stride"] if copy.size[axis] > 1 else [])
    field = data.draw(st.sampled_from(fields))
    by = data.draw(st.sampled_from([-1, 1]))
    value = getattr(copy, field)
    if isinstance(value, tuple):
        off = (*value[:axis], value[axis] + by, *value[axis + 1 :])
    else:
        off = value + by
    wrong = Copy(**{name: getattr(copy, name) for name in copy.__struct_fields__} | {field: off})
    tensors = tuple(
        Seen(one.name, one.dtype, one.shape, tuple(wrong if c is copy else c for c in one.copies))
        for one in records.tensors
    )
    try:
        ranks[rank] = decode(encode(Records(tensors, records.parameters))), parameters
    except ProtocolError:
        return
    assert not is_right(ranks, checkpoint, seen.name)


def as_it_is(cut):
    return Cut(cut.name, cut.box, cut.dtype, cut.order, cut.step, cut.padding, "as it is")


def copied(records):
    return [(seen, copy) for seen in records.tensors for copy in seen.copies]


def is_right(ranks, checkpoint, name):
    """Whether what each copy alone gives is the checkpoint's, and nothing is missing."""
    covered = []
    for records, parameters in ranks:
        for seen, copy in copied(records):
            if seen.name == name:
                alone = Records((Seen(name, seen.dtype, seen.shape, (copy,)),), records.parameters)
                whole, known = rebuild(name, [(alone, parameters)])
                covered.append(copy.box)
                if not torch.equal(whole[known], checkpoint[name][known]):
                    return False
    return not gaps(checkpoint[name].shape, covered)


FLOATS = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
]
NARROW = [dtype for dtype in FLOATS if dtype.itemsize <= 2]


@pytest.mark.parametrize(("narrow", "wide"), [*itertools.product(NARROW, FLOATS)], ids=str)
def test_a_dtype_keeps_another_one_exactly_if_every_number_survives(narrow, wide):
    bits = {1: torch.uint8, 2: torch.int16}[narrow.itemsize]
    info = torch.iinfo(bits)
    numbers = torch.arange(info.min, info.max + 1).to(bits).view(narrow)
    real = ~torch.isnan(numbers.double())
    back = numbers.to(wide).to(narrow)
    survive = torch.equal(back.view(bits)[real], numbers.view(bits)[real])
    assert keeps(narrow, wide) == (survive and (narrow == wide or narrow.itemsize < wide.itemsize))


@pytest.mark.parametrize(
    ("chain", "fewest"),
    [
        ("float32", "float32"),
        ("bfloat16 float32 bfloat16", "bfloat16"),
        ("bfloat16 float32 float16", "bfloat16 float16"),
        ("float8_e5m2 bfloat16 float32 float16", "float8_e5m2 float16"),
        ("float32 bfloat16 float32", "float32 bfloat16 float32"),
        ("float32 bfloat16 float32 float16", "float32 bfloat16 float16"),
    ],
)
def test_steps_that_lose_nothing_are_left_out(chain, fewest):
    steps = [dtype_of(name) for name in chain.split()]
    assert shortest(steps) == [dtype_of(name) for name in fewest.split()]


def test_what_was_rounded_stands_only_for_what_is_rounded_in_the_same_way():
    assert gives(("float32", "bfloat16"), ("float32", "bfloat16"))
    assert not gives(("float32", "bfloat16"), ("float32",))
    assert not gives(("float32", "bfloat16"), ("float32", "float16"))
    assert not gives(("float32", "bfloat16", "float32"), ("float32",))
    assert gives(("bfloat16", "float32"), ("bfloat16", "float16"))


def test_what_was_rounded_twice_stands_for_nothing():
    twice = "float32", "float16", "bfloat16"
    there = torch.tensor(65500.0).half().bfloat16()
    assert there.float().half().bfloat16() != there
    assert not gives(twice, twice)
    assert gives(("float32", "float16", "float32"), ("float32", "float16", "float32"))


def one_tensor(copies=(), kept=(), dtype="float32", shape=(4, 4), parameters=None):
    parameters = parameters or (Parameter("p", "float32", (16,), (1,)),)
    return Records((Seen("t", dtype, shape, tuple(copies), tuple(kept)),), parameters)


GOOD = Copy((0, 0), (4, 4), 0, 0, (4, 1))


@pytest.mark.parametrize(
    "records",
    [
        one_tensor([Copy((1, 0), (4, 4), 0, 0, (4, 1))]),
        one_tensor([Copy((-1, 0), (4, 4), 0, 0, (4, 1))]),
        one_tensor([Copy((0, 0), (0, 4), 0, 0, (4, 1))]),
        one_tensor([Copy((0,), (4,), 0, 0, (1,))]),
        one_tensor([Copy((0, 0), (4, 4), 0, 1, (4, 1))]),
        one_tensor([Copy((0, 0), (4, 4), 0, -1, (4, 1))]),
        one_tensor([Copy((0, 0), (4, 4), 0, 0, (-4, 1))]),
        one_tensor([Copy((0, 0), (4, 4), 0, 0, (5, 1))]),
        one_tensor([Copy((0, 0), (4, 4), 0, 0, (4,))]),
        one_tensor([Copy((0, 0), (4, 4), 1, 0, (4, 1))]),
        one_tensor([Copy((0, 0), (4, 4), -1, 0, (4, 1))]),
        one_tensor([Copy((0, 0), (4, 4), 0, 0, (4, 1), ("float32", "float16"))]),
        one_tensor([Copy((0, 0), (4, 4), 0, 0, (4, 1), ("bfloat16", "float32"))]),
        one_tensor([Copy((0, 0), (4, 4), 0, 0, (4, 1), ("Tensor",))]),
        one_tensor([GOOD], dtype="float33"),
        one_tensor(dtype="bits1x8"),
        one_tensor(shape=(4, -4)),
        one_tensor(shape=(1,) * 17),
        one_tensor([GOOD], parameters=(Parameter("p", "nn", (16,), (1,)),)),
        one_tensor([GOOD], parameters=(Parameter("p", "float32", (4, 4), (1,)),)),
        one_tensor([GOOD], parameters=(Parameter("p", "float32", (-4, -4), (4, 1)),)),
        one_tensor([GOOD], parameters=(Parameter("p", "float32", (4, 4), (4, -1)),)),
        one_tensor([GOOD], parameters=(Parameter("p", "float32", (4,) * 17, (1,) * 17),)),
        one_tensor(kept=[Kept((0, 0), (1, 1), b"123")]),
        one_tensor(kept=[Kept((4, 0), (1, 1))]),
        Records((), (Parameter("p", "int8", (4,), (1,)),), (Fill(0, 1, (4,), (1,), 0),)),
    ],
)
def test_records_that_go_beyond_what_there_is_are_refused(records):
    check(one_tensor([GOOD]))
    with pytest.raises(ProtocolError):
        decode(encode(records))


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "unsupported version"),
        (b"\x02" + encode(one_tensor())[1:], r"unsupported version 02 of records \(supported: 01"),
        (b"\x01nonsense", "not records"),
        (encode(one_tensor())[:-5], "cut short"),
        (b"\x01" + records_module.zlib.compress(b"\x93"), "not records"),
        (b"\x01" + records_module.zlib.compress(b"\x81\xa1\xff"), "not records"),
        (
            encode(one_tensor([Copy((0, 0), (4, 4), 0, 0, (4, 1), ("float32",) * 17)])),
            "not records: Expected `array` of length <= 16",
        ),
    ],
)
def test_what_is_no_records_is_refused(data, why):
    with pytest.raises(ProtocolError, match=why):
        decode(data)


def test_records_that_unpack_to_more_than_is_allowed_are_refused(monkeypatch):
    data = encode(one_tensor([GOOD] * 1000))
    monkeypatch.setattr(records_module, "_MOST_BYTES", 1000)
    with pytest.raises(ProtocolError, match="more than 1000 bytes"):
        decode(data)


@pytest.mark.parametrize(
    ("records", "entries"),
    [
        (one_tensor([GOOD] * 70_000, [Kept((0, 0), (1, 1))] * 20), 70_022),
        (Records((Seen("t", "int8", ()),) * 70_000, ()), 70_000),
        (Records((), one_tensor().parameters * 70_000), 70_000),
        (Records((), one_tensor().parameters, (Fill(0, 0, (1,), (1,), 0),) * 70_000), 70_001),
        *(
            (Records((), (), computed={f"p{number}": "aten.mul" for number in range(count)}), count)
            for count in (10, 1000, 70_000)
        ),
    ],
)
def test_records_of_more_entries_than_are_allowed_are_refused_before_they_are_unpacked(
    records, entries, monkeypatch
):
    data = encode(records)
    assert decode(data, entries).entries == entries
    monkeypatch.setattr(records_module, "_RECORDS", None)
    with pytest.raises(
        ProtocolError, match=f"records of {entries} entries; allowed: {entries - 1}"
    ):
        decode(data, entries - 1)


@pytest.mark.parametrize(
    "records",
    [
        one_tensor([Copy((0,) * 999, (1,) * 999, 0, 0, (1,) * 999)]),
        one_tensor([Copy((0, 0), (1,) * 999, 0, 0, (1,) * 999)]),
        one_tensor(kept=[Kept((0,) * 999, (1,) * 999)]),
        Records((), one_tensor().parameters, (Fill(0, 0, (1,) * 999, (1,) * 999, 0),)),
        Records((), (Parameter("p", "int8", (1,) * 999, (1,) * 999),)),
        one_tensor(shape=(1,) * 999),
    ],
)
def test_nothing_stays_of_records_with_any_number_of_dimensions(records):
    cached = records_module._inside, boxes_module.reach
    for one in cached:
        one.cache_clear()
    with pytest.raises(ProtocolError) as refused:
        decode(encode(records))
    assert len(str(refused.value)) < 500
    small = reach((16,), (1,))  # the good parameter
    assert small == 16 and [one.cache_info().currsize for one in cached] == [0, 1]


@pytest.mark.parametrize("shape", [(-1, 4), (1,) * 17])
def test_records_of_a_tensor_that_cannot_be_are_refused(shape):
    with pytest.raises(ProtocolError, match="t cannot have the shape"):
        decode(encode(one_tensor(shape=shape)))


@pytest.mark.parametrize(
    ("tensor", "dense"),
    [
        (torch.empty(3, 4), True),
        (torch.empty(3, 4, 1, 5).permute(3, 0, 2, 1), True),
        (torch.empty(()), True),
        (torch.empty(3, 4)[:, :3], False),
        (torch.empty(3, 4)[::2], False),
        (torch.empty(1, 4).expand(3, 4), False),
        (torch.empty(5).as_strided((3, 2), (1, 2)), False),
    ],
)
def test_whether_a_parameter_has_gaps_is_told_from_how_it_is_laid_out(tensor, dense):
    parameter = parameter_of("p", tensor)
    assert parameter.is_dense is dense
    assert parameter.extent == reach(tensor.shape, tensor.stride())


def test_records_of_many_experts_are_small_and_planned_fast():
    experts = 2000
    names = tuple(Parameter(f"layers.{i}.experts", "bfloat16", (1 << 20,), (1,)) for i in range(10))

    def rank(first, count):
        return Records(
            tuple(
                Seen(f"layers.{i % 10}.{i}.up", "bfloat16", (64, 32), (copy,))
                for i in range(experts)
                for copy in [Copy((first, 0), (count, 32), i % 10, i // 10 * 2048, (32, 1))]
            ),
            names,
        )

    ranks = [rank(0, 32), rank(32, 32)]
    assert len(encode(ranks[0])) < 30 * experts
    fetch, missing = find(rank(16, 32), ranks, 1)
    assert not missing and sum(map(len, fetch.parts)) == 2 * experts


def test_names_of_dtypes_are_those_of_torch():
    assert dtype_of("bfloat16") is torch.bfloat16
    with pytest.raises(ProtocolError, match="unknown dtype 'nn'"):
        dtype_of("nn")
