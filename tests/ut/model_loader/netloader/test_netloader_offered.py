"""What a source gives of a checkpoint that is seen through its parameters, over a socket."""

import contextlib
import ctypes
import threading
from concurrent.futures import ThreadPoolExecutor
from math import prod

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.checkpoints import read_regions, rebuild
from tests.identity import identity
from vllm_ascend.model_loader.netloader import serve
from vllm_ascend.model_loader.netloader.errors import (
    ProtocolError,
    SourceBusy,
    SourceLost,
    SourceRefused,
    Withdrawn,
)
from vllm_ascend.model_loader.netloader.executor.memory import host_view
from vllm_ascend.model_loader.netloader.executor.model.trace import Trace
from vllm_ascend.model_loader.netloader.executor.view.offered import Viewed, viewed
from vllm_ascend.model_loader.netloader.executor.view.records import decode
from vllm_ascend.model_loader.netloader.interaction import api
from vllm_ascend.model_loader.netloader.interaction.api import Code, Join, Region
from vllm_ascend.model_loader.netloader.interaction.elastic import ElasticClient
from vllm_ascend.model_loader.netloader.serve import Offer, WeightServer

from .support import (
    DEVICE,
    HOST,
    PATIENCE,
    LinkDevice,
    bytes_of,
    incomplete,
    random_tensor,
    settings,
    store_of,
)

WHO = identity()
ELSEWHERE = identity(rank=1, tp=4, pp=2, ep=4, ep_rank=1, dp=2, dp_rank=1, dtype="torch.float16")
DTYPES = [torch.uint8, torch.bfloat16, torch.float32, torch.int64, torch.float8_e4m3fn]


class Model(nn.Module):
    """Keeps one checkpoint tensor in each parameter, one of them as columns."""

    def __init__(self):
        super().__init__()
        self.plain = nn.Parameter(torch.zeros(6, 8), requires_grad=False)
        self.turned = nn.Parameter(torch.zeros(8, 6).t(), requires_grad=False)
        self.first = nn.Parameter(torch.zeros(4, 8, dtype=torch.bfloat16), requires_grad=False)
        self.small = nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)

    def load_weights(self, weights):
        for name, tensor in weights:
            own = getattr(self, name)
            own.data.copy_(tensor[: len(own)])


CHECKPOINT = {
    "plain": random_tensor(1, torch.float32, 6, 8),
    "turned": random_tensor(2, torch.float32, 6, 8),
    "first": random_tensor(3, torch.bfloat16, 4, 8),
    "small": random_tensor(4, torch.uint8, 3),
}


def loaded():
    model, trace = Model(), Trace()
    with trace:
        model.load_weights(trace.watch(CHECKPOINT.items()))
    tensors = {name: one.detach() for name, one in model.named_parameters()}
    return tensors, trace.records(model)


@contextlib.contextmanager
def serving(view, store, **options):
    server = WeightServer(settings(**options), 0, HOST)
    address = server.start(0)
    server.offer(Offer(WHO, store, view=view))
    try:
        yield server, address
    finally:
        server.stop()


def connect(address):
    deadlines = dict(connect=PATIENCE, handshake=PATIENCE, progress=PATIENCE)
    return ElasticClient.connect(address, **deadlines)


def fetch(client, weights, view, regions):
    into = torch.zeros(view.nbytes_of(regions), dtype=torch.uint8)
    read_regions(client, weights, regions, host_view(into))
    return into


def whole(parameters):
    return [Region(i, 0, [one.extent], [1]) for i, one in enumerate(parameters)]


def refetched(client, weights, view):
    """The parameters' memory as a client that has only the records makes it."""
    records = decode(client.records(weights))
    got = fetch(client, weights, view, whole(records.parameters))
    memory, at = {}, 0
    for one in records.parameters:
        dtype = getattr(torch, one.dtype)
        end = at + one.extent * dtype.itemsize
        memory[one.name] = got[at:end].clone().view(dtype)
        at = end
    return records, memory


def assert_is_the_checkpoint(records, memory):
    assert [seen.name for seen in records.tensors] == [*CHECKPOINT]
    for name, tensor in CHECKPOINT.items():
        made, known = rebuild(name, [(records, memory)])
        assert known.all() and torch.equal(bytes_of(made), bytes_of(tensor)), name


def error_of(call, kind):
    with pytest.raises(kind) as error:
        call()
    return str(error.value)


# Gathering


@st.composite
def cases(draw):
    """Tensors, some with gaps or turned, and regions of them."""
    tensors, regions = [], []
    for seed in range(draw(st.integers(1, 3))):
        tensor = random_tensor(seed, draw(st.sampled_from(DTYPES)), 6, 7)
        tensors.append(draw(st.sampled_from([tensor, tensor.t(), tensor[1:, 2:5]])))
    for _ in range(draw(st.integers(1, 6))):
        parameter = draw(st.integers(0, len(tensors) - 1))
        shape, steps = tensors[parameter].shape, tensors[parameter].stride()
        room = sum((n - 1) * step for n, step in zip(shape, steps, strict=True))
        offset = draw(st.integers(0, room))
        room -= offset
        size, stride = [], []
        for _ in range(draw(st.integers(0, 3))):
            size.append(draw(st.integers(1, 4)))
            stride.append(draw(st.integers(0, room // max(1, size[-1] - 1))))
            room -= (size[-1] - 1) * stride[-1]
        regions.append(Region(parameter, offset, size, stride))
    return tensors, regions


@given(cases(), st.integers(0, 3))
def test_what_is_gathered_are_the_elements_one_after_the_other(case, skip):
    tensors, regions = case
    view = Viewed(b"", tensors)
    into = torch.zeros(skip + view.nbytes_of(regions), dtype=torch.uint8)[skip:]
    view.gather(regions, into)
    expected = b""
    for region in regions:
        memory = tensors[region.parameter]
        for number in range(prod(region.size)):
            at = memory.storage_offset() + region.offset
            for n, step in zip(region.size[::-1], region.stride[::-1], strict=True):
                number, index = divmod(number, n)
                at += index * step
            expected += bytes_of(memory.as_strided([1], [1], at)).numpy().tobytes()
    assert into.numpy().tobytes() == expected
    assert b"".join(map(bytes, view.elements(regions, into.zero_()))) == expected


def test_elements_that_follow_each_other_are_given_as_they_are_in_the_parameter():
    rows, columns = (random_tensor(seed, torch.float32, 6, 8) for seed in (1, 2))
    view = Viewed(b"", [rows, columns])
    regions = [Region(0, 8, [1, 2, 8], [0, 8, 1]), Region(1, 3, [6, 2], [8, 1])]
    staging = torch.zeros(view.nbytes_of(regions), dtype=torch.uint8)
    in_place, copied = view.elements(regions, staging)
    assert ctypes.addressof(in_place) == rows[1:].data_ptr()
    assert bytes(in_place) == rows[1:3].numpy().tobytes()
    assert ctypes.addressof(copied) == staging.data_ptr()
    assert bytes(copied) == columns[:, 3:5].contiguous().numpy().tobytes()


class Caller:
    """A session that goes on."""

    peer = HOST

    def on_close(self, call):
        pass

    def gone(self):
        return False


def test_weights_are_not_idle_as_long_as_their_memory_is_being_sent(monkeypatch):
    monkeypatch.setattr(serve, "_GATHERED_AT_ONCE", 96)
    tensors, records = loaded()
    store, view = store_of(tensors), viewed(records, tensors)
    with serving(view, store) as (server, _):
        sent = server.regions(Caller(), store.digests.weights, [Region(0, 0, [48], [1])]).chunks
        next(sent)
        with ThreadPoolExecutor(1) as threads:
            assert not threads.submit(store.idle, 0).result()
            store.withdraw(Withdrawn("they change"))
            with pytest.raises(api.Refusal, match="they change"):
                next(sent)
            assert threads.submit(store.idle, 0).result()


@given(cases(), st.integers(1, 100))
def test_pieces_of_regions_have_the_same_elements_in_the_same_order(case, nbytes):
    tensors, regions = case
    view = Viewed(b"", tensors)
    whole = torch.zeros(view.nbytes_of(regions), dtype=torch.uint8)
    view.gather(regions, whole)
    came = b""
    widest = max(tensors[region.parameter].element_size() for region in regions)
    for piece in view.pieces(regions, nbytes):
        part = torch.zeros(view.nbytes_of(piece), dtype=torch.uint8)
        assert part.numel() <= max(nbytes, widest)
        view.gather(piece, part)
        came += part.numpy().tobytes()
    assert came == whole.numpy().tobytes()


@pytest.mark.parametrize(
    "region",
    [
        Region(2, 0, [1], [1]),
        Region(-1, 0, [1], [1]),
        Region(0, -1, [1], [1]),
        Region(0, 48, [], []),
        Region(0, 0, [49], [1]),
        Region(0, 0, [6, 8], [8, 2]),
        Region(0, 40, [2], [-1]),
        Region(0, 0, [0], [1]),
        Region(0, 0, [2**40, 2**40], [2**40, 1]),
        Region(0, 0, [1, 1], [1]),
        Region(1, 10, [], []),
    ],
)
def test_nothing_is_read_beyond_a_parameter(region):
    gaps = random_tensor(1, torch.uint8, 4, 3)[:, :1]  # 10 elements from the first to the last one
    view = Viewed(b"", [random_tensor(0, torch.float32, 6, 8), gaps])
    assert view.nbytes_of([Region(0, 47, [], []), Region(1, 9, [], [])]) == 5
    into = torch.full((64,), 7, dtype=torch.uint8)
    for ask in (lambda: view.nbytes_of([region]), lambda: view.gather([region], into)):
        with pytest.raises(ProtocolError, match="parameter"):
            ask()
    with pytest.raises(ProtocolError, match="parameter"):
        view.gather([Region(0, 0, [1], [1]), region], into)
    assert into.eq(7).all()


# Which parameters are offered


def test_a_parameter_that_is_not_kept_as_it_was_loaded_is_in_no_record():
    tensors, records = loaded()
    plain = tensors["plain"]
    for other in (
        None,
        plain.double(),
        torch.ones(2),
        plain.view(8, 6),
        plain.t().contiguous().t(),
    ):
        change = {"plain": other}
        kept = {name: one for name, one in (tensors | change).items() if one is not None}
        view = viewed(records, kept)
        left = decode(view.records)
        assert [one.name for one in left.parameters] == ["turned", "first", "small"]
        assert left.computed == {"plain": "not kept as it was loaded"}
        copies = {seen.name: seen.copies for seen in left.tensors}
        assert copies.pop("plain") == () and all(copies.values())
        for name in copies:
            made, known = rebuild(name, [(left, kept)])
            assert known.all() and torch.equal(bytes_of(made), bytes_of(CHECKPOINT[name]))


def test_a_parameter_with_gaps_is_in_no_record_as_others_may_have_the_memory_between():
    model, trace = Model(), Trace()
    model.plain = nn.Parameter(torch.zeros(6, 9)[:, :8], requires_grad=False)
    with trace:
        model.load_weights(trace.watch(CHECKPOINT.items()))
    tensors = {name: one.detach() for name, one in model.named_parameters()}
    left = decode(viewed(trace.records(model), tensors).records)
    assert [one.name for one in left.parameters] == ["turned", "first", "small"]
    assert left.computed == {"plain": "other elements may be between its own"}


def test_a_parameter_that_is_computed_is_in_no_record():
    tensors, records = loaded()
    left = decode(
        viewed(msgspec.structs.replace(records, computed={"plain": "mul"}), tensors).records
    )
    assert [one.name for one in left.parameters] == ["turned", "first", "small"]
    assert left.computed == {"plain": "mul"}
    assert [seen.name for seen in left.tensors if not seen.copies] == ["plain"]


# Over a socket


@pytest.mark.parametrize("device", [DEVICE, LinkDevice()], ids=["host", "accelerator"])
def test_a_client_that_is_cut_in_another_way_gets_the_checkpoint(device):
    tensors, records = loaded()
    store, view = store_of(tensors, device), viewed(records, tensors)
    with serving(view, store) as (server, address), connect(address) as client:
        joined = client.join(Join(ELSEWHERE, view=True))
        assert joined.manifest is joined.blocks is api.msgspec.UNSET
        assert joined.weights == store.digests.weights
        assert_is_the_checkpoint(*refetched(client, joined.weights, view))
        sent = sum(one.nbytes for one in tensors.values())
        assert server.bytes_sent == sent
        [one] = client.status().sessions
        assert (one.weights, one.bytes_sent) == (joined.weights, sent)


def test_who_does_not_join_for_a_view_has_to_be_cut_in_the_same_way():
    tensors, records = loaded()
    store = store_of(tensors)
    with serving(viewed(records, tensors), store) as (_, address), connect(address) as client:
        refused = error_of(lambda: client.join(Join(ELSEWHERE)), SourceRefused)
    assert "other_model: " in refused and "tp is 4 here and 1 there" in refused


@pytest.mark.parametrize("field", ["model", "quantization", "config"])
def test_a_view_of_another_model_is_refused(field):
    tensors, records = loaded()
    value = {"hidden_size": 7} if field == "config" else "other"
    other = identity(**{field: value})
    view, store = viewed(records, tensors), store_of(tensors)
    with serving(view, store) as (_, address), connect(address) as client:
        refused = error_of(lambda: client.join(Join(other, view=True)), SourceRefused)
    assert "other_model: " in refused and field in refused


def test_a_source_without_records_says_why_it_has_no_view():
    tensors, _ = loaded()
    store = store_of(tensors)
    weights = store.digests.weights
    with serving(None, store) as (_, address), connect(address) as client:
        for ask in (
            lambda: client.join(Join(WHO, view=True)),
            lambda: client.records(weights),
            lambda: read_regions(client, weights, [Region(0, 0, [], [])], memoryview(bytearray(1))),
        ):
            refused = error_of(ask, SourceRefused)
            assert "no_view: " in refused and "did not come from a checkpoint here" in refused


def test_a_source_that_is_loading_is_to_be_asked_again():
    tensors, _ = loaded()
    store = store_of(tensors)
    loading = incomplete(store, [*tensors.values()])
    with serving(None, loading) as (_, address), connect(address) as client:
        refused = error_of(lambda: client.join(Join(WHO, view=True)), SourceBusy)
    assert "loading: " in refused


def test_regions_beyond_a_parameter_or_of_too_many_bytes_are_out_of_range():
    tensors, records = loaded()
    store, view = store_of(tensors), viewed(records, tensors)
    most = api.MAX_GATHERED // 4
    with serving(view, store) as (_, address), connect(address) as client:
        for region, why in (
            (Region(0, 0, [49], [1]), "not inside of parameter 0, which has 48 elements"),
            (Region(0, 0, [most + 1], [0]), f"have {4 * most + 4} bytes; allowed: 33554432"),
        ):
            with pytest.raises(SourceRefused, match=f"out_of_range: .*{why}"):
                read_regions(client, store.digests.weights, [region], memoryview(bytearray(1)))
        got = fetch(client, store.digests.weights, view, [Region(0, 0, [most], [0])])
        assert got.view(torch.float32).eq(tensors["plain"][0, 0]).all()


def test_weights_that_are_withdrawn_are_read_no_more():
    tensors, records = loaded()
    store, view = store_of(tensors), viewed(records, tensors)
    weights, one = store.digests.weights, [Region(0, 0, [], [])]
    with serving(view, store) as (server, address), connect(address) as client:
        fetch(client, weights, view, one)
        server.withdraw(WHO.group, Code.CHANGING, "the weights are being replaced")
        for ask in (
            lambda: client.records(weights),
            lambda: fetch(client, weights, view, one),
        ):
            with pytest.raises(SourceBusy, match="changed: the weights are being replaced"):
                ask()
        assert server._offers[WHO.group].view is None  # its memory can go


def test_weights_that_are_withdrawn_between_two_pieces_end_the_connection(monkeypatch):
    monkeypatch.setattr(serve, "_GATHERED_AT_ONCE", 96)
    tensors, records = loaded()
    store, view = store_of(tensors), viewed(records, tensors)
    with serving(view, store) as (server, address), connect(address) as client:
        assert_is_the_checkpoint(*refetched(client, store.digests.weights, view))
        pieces = iter([lambda: None, lambda: store.withdraw(Withdrawn("they change"))])
        server._limiter.wait = lambda nbytes, stop, gone: next(pieces)()
        with pytest.raises(SourceLost, match="the connection ended"):
            fetch(client, store.digests.weights, view, [Region(0, 0, [48], [1])])


def test_regions_that_are_being_gathered_end_once_the_weights_are_withdrawn():
    tensors, records = loaded()
    store, view = store_of(tensors), viewed(records, tensors)

    class Withdrawing(list):
        def __iter__(self):
            for number, region in enumerate(super().__iter__()):
                if number == 1 and here.is_set():
                    store.withdraw(Withdrawn("they change"))
                yield region

    here = threading.Event()
    regions = Withdrawing(Region(0, i, [1], [1]) for i in range(3))
    into = torch.zeros(view.nbytes_of(regions), dtype=torch.uint8)
    view.gather(regions, into, store.withdrawn)
    here.set()
    with pytest.raises(Withdrawn, match="while regions were copied"):
        view.gather(regions, into.zero_(), store.withdrawn)


def test_weights_that_are_withdrawn_while_the_rate_is_limited_are_not_gathered():
    tensors, records = loaded()
    store = store_of(tensors)

    class Watched(Viewed):
        def elements(self, *_):
            raise AssertionError("looked at")

    offered = viewed(records, tensors)
    view = Watched(offered.records, offered.parameters)
    with serving(view, store) as (server, address), connect(address) as client:
        server._limiter.wait = lambda nbytes, stop, gone: store.withdraw(Withdrawn("they change"))
        with pytest.raises(SourceBusy, match="changed: they change"):
            fetch(client, store.digests.weights, view, [Region(0, 0, [], [])])
