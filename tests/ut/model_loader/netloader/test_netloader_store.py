"""The block store, complete and incomplete: one suite for both."""

import contextlib
import itertools
import threading
from ctypes import addressof

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.conformance.faults import Tapped, flipped
from vllm_ascend.model_loader.netloader.errors import (
    Gone,
    LayoutUnsupported,
    NotHere,
    Preparing,
    Withdrawn,
)
from vllm_ascend.model_loader.netloader.executor import store as module
from vllm_ascend.model_loader.netloader.executor.chunks.blocks import Run
from vllm_ascend.model_loader.netloader.executor.devices.cpu import CpuDevice
from vllm_ascend.model_loader.netloader.executor.memory import write
from vllm_ascend.model_loader.netloader.executor.model.match import match

from .support import (
    MIB,
    PATIENCE,
    any_model,
    assorted,
    blank_like,
    bytes_of,
    incomplete,
    random_tensor,
    store_of,
)


def client_of(store, tensors):
    """A client's empty store, over memory with something else in it."""
    blanks = blank_like(tensors)
    return incomplete(store, match(store.manifest, blanks, blanks.keys(), {}))


def fetch(there, here, run):
    """Bring a run to another store, as a transport does."""
    for span, part in zip(there.blocks.spans(run), there.parts(run), strict=True):
        write(span, here.tensors, bytes_of(part).clone())


def fill(there, here):
    for run in there.blocks.cut(MIB):
        fetch(there, here, run)
        assert here.wrong(run) == []
        here.add(run)


def whole(store):
    return Run(0, store.blocks.count - 1)


@pytest.fixture(params=["from the start", "once filled"])
def full(request):
    """A store that is complete, however it came to be."""
    tensors = assorted()
    store = store_of(tensors, attributes={"a.scale": 0.5})
    if request.param == "from the start":
        return store
    client = client_of(store, tensors)
    fill(store, client)
    return client


def test_the_memory_of_a_run_is_that_of_its_tensors_unless_one_has_gaps():
    tensors = {
        "large": random_tensor(0, torch.uint8, 2 * MIB + 5),
        "empty": torch.empty(0),
        "part": random_tensor(1, torch.int16, 100)[10:20],
        "gaps": random_tensor(2, torch.int16, 100)[::2],
    }
    store = store_of(tensors)
    for run in (Run(0, 0), Run(1, 2), Run(0, 4), Run(2, 4), Run(4, 4)):
        memory = store.memory(run)
        expected = [(part.data_ptr(), part.nbytes) for part in store.parts(run)]
        assert [(addressof(one) if len(one) else 0, len(one)) for one in memory] == expected
        assert store.wrong(run, memory) == []
    assert [store.memory(run) for run in (Run(5, 5), Run(4, 5), Run(2, 5))] == [None] * 3
    tensors["large"][MIB] ^= 1
    assert store.wrong(Run(0, 2), store.memory(Run(0, 2))) == [1]


# Complete stores, whichever way they came about


def test_a_complete_store_has_every_block(full):
    assert full.complete
    full.check(whole(full))
    for run in full.blocks.cut(4 * MIB):
        full.check(run)
        assert full.wrong(run) == []


def test_a_complete_store_is_the_same_whichever_way_it_came_about(full):
    model = store_of(assorted(), attributes={"a.scale": 0.5})
    assert full.digests == model.digests
    assert full.manifest == model.manifest
    parts = [torch.cat([bytes_of(part) for part in one.parts(whole(one))]) for one in (full, model)]
    assert torch.equal(*parts)


def test_hashing_a_store_anew_makes_the_same_of_it(full):
    again = full.hashed_anew()
    assert again.digests == full.digests
    assert again.complete
    assert again.tensors is full.tensors


def test_a_store_whose_memory_has_changed_is_another_one_when_hashed_anew(full):
    full.tensors[0].view(-1).view(torch.uint8)[0] ^= 1
    again = full.hashed_anew()
    assert again.digests.weights != full.digests.weights
    assert again.wrong(Run(0, 0)) == []
    assert full.wrong(Run(0, 0)) == [0]


def test_a_store_may_go_on_in_other_memory(full):
    elsewhere = [tensor.clone() for tensor in full.tensors]
    full.withdraw(Withdrawn("its memory changes"))
    moved = full.with_tensors(elsewhere)
    assert (moved.digests, moved.manifest, moved.complete) == (full.digests, full.manifest, True)
    moved.check(whole(moved))
    assert moved.wrong(whole(moved)) == []
    assert moved.parts(Run(0, 0))[0].data_ptr() == elsewhere[0].data_ptr()


def test_blocks_that_are_wrong_are_known_one_by_one(full):
    large = full.manifest.names.index("large")
    first, last = full.blocks.blocks_of(large)
    full.tensors[large].view(torch.uint8)[MIB + 5] ^= 1
    full.tensors[large].view(torch.uint8)[-1] ^= 1
    assert full.wrong(Run(first - 1, last + 1)) == [first + 1, last]
    assert full.wrong(Run(first, first)) == []
    assert full.names([last, first + 1]) == ["large"]


def test_a_flip_in_any_tensor_is_found(full):
    for index, tensor in enumerate(full.tensors):
        if tensor.numel():
            right, tensors = tensor, list(full.tensors)
            tensors[index] = flipped(right.contiguous())
            wrong = full.with_tensors(tensors)
            assert wrong.names(wrong.wrong(whole(wrong))) == [full.manifest.names[index]]


def test_names_are_in_the_order_of_the_manifest_each_once(full):
    assert full.names(range(full.blocks.count)) == full.manifest.names
    assert full.names([full.blocks.count - 1, 0, 0]) == [
        full.manifest.names[0],
        full.manifest.names[-1],
    ]
    assert full.names([]) == []


# Withdrawn ones


@pytest.mark.parametrize("filled", [True, False])
def test_nothing_can_be_read_from_a_store_that_is_withdrawn(filled):
    tensors = assorted()
    store = store_of(tensors)
    store = store if filled else client_of(store, tensors)
    assert not store.withdrawn.is_set()
    store.withdraw(Withdrawn("the weights are being replaced"))
    store.withdraw(Withdrawn("something else"))
    assert store.withdrawn.is_set()
    with pytest.raises(Withdrawn, match="the weights are being replaced"):
        store.check(Run(0, 0))


def test_what_has_been_begun_to_be_read_may_be_read_to_its_end_by_the_same_thread(full):
    seen = []

    def other():
        with contextlib.suppress(Withdrawn):
            full.check(Run(0, 0))
            seen.append("other")

    with full.reading(Run(0, 1)):
        full.withdraw(Withdrawn("why"))
        full.check(Run(1, 1))
        with full.reading(Run(1, 1)):
            pass
        full.check(Run(1, 1))
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert seen == []
    with pytest.raises(Withdrawn, match="why"), full.reading(Run(0, 0)):
        pass


def test_a_store_is_idle_when_the_last_reader_has_ended(full):
    order, begun, end = [], threading.Event(), threading.Event()

    def read():
        with full.reading(Run(0, 0)):
            begun.set()
            end.wait(20)
            order.append("read")

    assert full.idle(0)
    reader = threading.Thread(target=read)
    reader.start()
    assert begun.wait(20)
    assert not full.idle(0.01)
    with full.reading(Run(0, 0)):  # whoever waits may be reading itself
        threading.Timer(0.01, end.set).start()
        assert full.idle(20)
    order.append("idle")
    reader.join()
    assert order == ["read", "idle"]


def test_a_withdrawn_store_says_in_what_way(full):
    full.withdraw(Gone("it is shutting down"))
    with pytest.raises(Gone, match="it is shutting down"):
        full.check(Run(0, 0))


def test_whoever_is_told_that_a_store_is_withdrawn_finds_it_so():
    store = store_of({"t": torch.ones(2)})
    told = []

    class Told:
        def set(self):
            with pytest.raises(Withdrawn, match="why"):
                store.check(Run(0, 0))
            told.append(True)

    store.withdrawn = Told()
    store.withdraw(Withdrawn("why"))
    assert told


# Incomplete ones


def test_an_empty_store_has_no_block():
    tensors = assorted()
    client = client_of(store_of(tensors), tensors)
    assert not client.complete
    for block in range(client.blocks.count):
        with pytest.raises(NotHere, match=f"block {block} is not here"):
            client.check(Run(block, block))


def test_a_store_of_no_blocks_is_complete():
    store = store_of({})
    assert incomplete(store, []).complete


@given(any_model(), st.randoms())
def test_a_store_is_filled_in_any_order_and_can_be_read_meanwhile(model, random):
    store = store_of(model)
    client = client_of(store, model)
    runs = store.blocks.cut(random.choice([1, MIB]))
    random.shuffle(runs)
    for run, later in itertools.zip_longest(runs, runs[1:]):
        assert not client.complete
        fetch(store, client, run)
        client.add(run)
        client.check(run)
        assert client.wrong(run) == []
        if later is not None:
            with pytest.raises(NotHere):
                client.check(later)
            with pytest.raises(NotHere):
                client.check(whole(client))
    assert client.complete


def test_the_first_block_that_is_missing_from_a_run_is_named():
    store = store_of({"t": random_tensor(0, torch.uint8, 5 * MIB)})
    client = client_of(store, {"t": store.tensors[0]})
    client.add(Run(0, 1))
    client.add(Run(3, 3))
    client.check(Run(0, 1))
    with pytest.raises(NotHere, match="block 2 is not here"):
        client.check(Run(0, 4))
    with pytest.raises(NotHere, match="block 4 is not here"):
        client.check(Run(3, 4))


def test_a_run_that_comes_twice_or_in_part_again_is_counted_once():
    store = store_of({"t": random_tensor(0, torch.uint8, 4 * MIB)})
    client = client_of(store, {"t": store.tensors[0]})
    client.add(Run(0, 1))
    client.add(Run(0, 2))
    assert not client.complete
    client.add(Run(3, 3))
    assert client.complete


def test_several_sessions_fill_a_store_together():
    tensors = {f"{i}": torch.empty(100, dtype=torch.uint8) for i in range(400)}
    client = client_of(store_of(tensors), tensors)
    ready = threading.Barrier(4)

    def add(turn):
        ready.wait(PATIENCE)
        for block in range(turn, 400, 4):
            client.add(Run(block, block))

    threads = [threading.Thread(target=add, args=(turn,)) for turn in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert client.complete


def test_what_came_wrong_is_known_before_it_is_here():
    tensors = {"t": random_tensor(0, torch.uint8, 3 * MIB)}
    store = store_of(tensors)
    client = client_of(store, tensors)
    assert client.wrong(Run(0, 2)) == [0, 1, 2]
    fetch(store, client, Run(1, 1))
    assert client.wrong(Run(0, 2)) == [0, 2]
    with pytest.raises(NotHere):
        client.check(Run(1, 1))


# Making one


def test_a_tensor_without_memory_makes_no_store():
    with pytest.raises(LayoutUnsupported, match="late has no memory"):
        store_of({"late": torch.empty(3, device="meta")})


def test_a_store_is_hashed_once_its_device_has_come_to_rest(monkeypatch):
    happened = []

    class Noting(CpuDevice):
        def synchronize(self):
            happened.append("synchronize")

        def digests(self, parts):
            happened.append("digests")
            return super().digests(parts)

    store_of({"t": torch.ones(2)}, Noting())
    assert happened == ["synchronize", "digests"]


def test_a_model_is_hashed_in_parts_of_bounded_size(monkeypatch):
    monkeypatch.setattr(module, "_HASHED_AT_ONCE", 2 * MIB)
    at_once = []

    class Noting(CpuDevice):
        def digests(self, parts):
            at_once.append(sum(part.nbytes for part in parts))
            return super().digests(parts)

    store = store_of(assorted(), Noting())
    assert max(at_once) <= 2 * MIB
    assert sum(at_once) == store.blocks.nbytes


def test_what_is_read_is_what_the_device_makes_readable():
    """Copies without a format of their own: see `Device.readable`."""
    asked = []

    class Formatting(CpuDevice):
        def readable(self, tensors):
            return Tapped(tensors, lambda index, count: asked.append(index))

    tensors = {"a": torch.ones(2), "b": torch.ones(3)}
    store = store_of(tensors, Formatting())
    assert asked == [0, 1]
    store.parts(Run(1, 1))
    store.wrong(Run(0, 0))
    assert asked == [0, 1, 1, 0]
    assert store.readable is store.readable


# News of what has come


def test_what_has_come_is_told_in_order_and_once():
    there = store_of({f"t{i}": random_tensor(i, torch.uint8, 8) for i in range(4)})
    assert there.came(0, 0.0) == [Run(0, 3)]
    assert there.came(1, 0.0) == []
    here = incomplete(there, [torch.empty_like(tensor) for tensor in there.tensors])
    assert here.came(0, 0.0) == []
    here.add(Run(2, 3))
    here.add(Run(0, 0))
    assert here.came(0, 0.0) == [Run(2, 3), Run(0, 0)]
    assert here.came(1, 0.0) == [Run(0, 0)]


@pytest.mark.parametrize("happens", ["comes", "is withdrawn"])
def test_who_waits_for_news_is_told_at_once(happens):
    there = store_of({"t": random_tensor(0, torch.uint8, 8)})
    here, told = incomplete(there, [torch.empty(8, dtype=torch.uint8)]), []

    def wait():
        try:
            told.append(here.came(0, 10 * PATIENCE))
        except Preparing as error:
            told.append(str(error))

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    thread.join(0.05)
    assert told == []
    here.add(Run(0, 0)) if happens == "comes" else here.withdraw(Preparing("being made ready"))
    thread.join(PATIENCE)
    assert told == [[Run(0, 0)] if happens == "comes" else "being made ready"]
