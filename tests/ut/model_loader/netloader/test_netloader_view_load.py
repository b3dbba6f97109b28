"""Loads through a view: ranks that are cut in one way fill those that are cut in another one."""

import contextlib
import dataclasses
import gc
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor

import msgspec
import psutil
import pytest
import torch
from torch import nn

from tests.identity import identity
from vllm_ascend.model_loader.netloader import copies, serve
from vllm_ascend.model_loader.netloader.errors import LayoutUnsupported, LoadFailed, SourceLost
from vllm_ascend.model_loader.netloader.executor.chunks.digests import of_instance
from vllm_ascend.model_loader.netloader.executor.model.raw import viewed_through
from vllm_ascend.model_loader.netloader.executor.model.trace import Trace
from vllm_ascend.model_loader.netloader.executor.view.boxes import Unmapped, box_of, row_major
from vllm_ascend.model_loader.netloader.executor.view.fetch import (
    catalog,
    find,
    is_copied,
    same_reading,
)
from vllm_ascend.model_loader.netloader.executor.view.offered import Viewed, viewed
from vllm_ascend.model_loader.netloader.executor.view.places import InPlace, put
from vllm_ascend.model_loader.netloader.executor.view.records import (
    Copy,
    Records,
    Seen,
    decode,
    encode,
    name_of,
    parameter_of,
)
from vllm_ascend.model_loader.netloader.executor.view.reread import Reread
from vllm_ascend.model_loader.netloader.identity import CHECKPOINT as LAYOUT_OF_FOLDER
from vllm_ascend.model_loader.netloader.identity import OF_EACH_TENSOR
from vllm_ascend.model_loader.netloader.interaction import api
from vllm_ascend.model_loader.netloader.interaction.api import DRAFT_GROUP, Code, Endpoint
from vllm_ascend.model_loader.netloader.interaction.elastic import ElasticClient
from vllm_ascend.model_loader.netloader.load import elastic_load
from vllm_ascend.model_loader.netloader.loading import view as view_module
from vllm_ascend.model_loader.netloader.loading import view_reader
from vllm_ascend.model_loader.netloader.loading.sessions import Sessions
from vllm_ascend.model_loader.netloader.loading.view import (
    find_instance,
    load_through_view,
    needs_of,
    records_by_name,
)
from vllm_ascend.model_loader.netloader.serve import Offer, WeightServer
from vllm_ascend.model_loader.netloader.utils import Address, parse_name

from .support import DEVICE, HOST, bytes_of, random_tensor, settings, store_of, until

LAYERS = 3
CHECKPOINT = {
    "embed": random_tensor(1, torch.bfloat16, 10, 8),
    **{
        f"layers.{i}.{name}": random_tensor(10 * i + number, torch.bfloat16, *shape)
        for i in range(LAYERS)
        for number, (name, shape) in enumerate(
            {"norm": (8,), "up": (16, 8), "gate": (16, 8), "down": (8, 16), "scale": ()}.items()
        )
    },
    "unused": random_tensor(99, torch.bfloat16, 4, 4),
}


class Model(nn.Module):
    """What one of several ranks has of a checkpoint."""

    def __init__(self, rank=0, tp=1, dtype=torch.bfloat16):
        super().__init__()
        self.rank, self.tp = rank, tp
        half = 16 // tp
        shapes = {"embed": (12 // tp, 8)}
        for i in range(LAYERS):
            shapes |= {
                f"norm{i}": (8,),
                f"gate_up{i}": (2 * half, 8),
                f"down{i}": (8, half),
                f"scale{i}": (1,),
            }
        for name, shape in shapes.items():
            weight = torch.full(shape, 7.0, dtype=dtype)
            self.register_parameter(name, nn.Parameter(weight, requires_grad=False))

    def load_weights(self, weights):
        half = 16 // self.tp
        first = self.rank * half
        for name, tensor in weights:
            if name == "embed":
                mine = tensor[self.rank * len(self.embed) :][: len(self.embed)]
                self.embed.data[: len(mine)].copy_(mine)
                self.embed.data[len(mine) :].fill_(0)
                continue
            if name == "unused":
                continue
            _, number, kind = name.split(".")
            if kind == "scale":
                own = self.get_parameter(f"scale{number}").data
                own.copy_(-torch.exp(tensor).reshape(1))
            elif kind == "norm":
                self.get_parameter(f"norm{number}").data.copy_(tensor)
            elif kind == "down":
                own = self.get_parameter(f"down{number}").data
                own.copy_(tensor[:, first : first + half])
            else:
                own = self.get_parameter(f"gate_up{number}").data
                own = own[:half] if kind == "gate" else own[half:]
                own.copy_(tensor[first : first + half])


class Copying(Model):
    """One that computes nothing, and has a tensor twice."""

    def __init__(self, rank=0, tp=1, dtype=torch.bfloat16):
        super().__init__(rank, tp, dtype)
        self.tied = nn.Parameter(torch.full((16, 12), 7.0, dtype=dtype), requires_grad=False)
        self.passes = 0

    def load_weights(self, weights):
        self.passes += 1
        for name, tensor in weights:
            if name.endswith("scale"):
                self.get_parameter(f"scale{name[7]}").data.copy_(tensor.reshape(1))
                continue
            if name == "layers.1.up":  # every element between two others
                self.tied.data[:, :4].copy_(tensor[:, ::2])
                self.tied.data[:, 4:].copy_(tensor)
            super().load_weights([(name, tensor)])


def reading(through):
    """A model that loads what comes through this function of its weights."""

    class Reading(Model):
        def load_weights(self, weights):
            super().load_weights(through(weights))

    return Reading()


def loaded(of=Model, **cut):
    model, trace = of(**cut), Trace()
    with trace:
        # What nobody reads is gone when loading is over, as if it had come from files.
        model.load_weights(trace.watch((name, CHECKPOINT[name].clone()) for name in CHECKPOINT))
    return model, trace.records(model)


def tensors_of(model):
    return {name: one.detach() for name, one in model.named_parameters()}


@dataclasses.dataclass
class Sources:
    servers: list
    addresses: list
    offers: list


@contextlib.contextmanager
def sources(tp, change=lambda view: view, models=None, **options):
    """An instance whose ranks offer a view."""
    with contextlib.ExitStack() as stack:
        servers, addresses, offers, ends, digests = [], [], [], {}, {}
        for rank in range(tp):
            server = WeightServer(settings(**options), rank, HOST)
            stack.callback(server.stop)
            addresses.append(server.start(0))
            servers.append(server)
            ends[rank] = Endpoint(str(addresses[-1]), server.process)
        for rank, server in enumerate(servers):
            model, records = loaded(rank=rank, tp=tp)
            store = store_of(tensors_of(model))
            digests[rank] = store.digests.weights
            view = change(viewed(records, tensors_of(model)))
            who = identity(rank=rank, tp=tp)
            offers.append(
                Offer(who, store, view=view, ranks=lambda: digests, endpoints=lambda: ends)
            )
            server.offer(offers[-1])
        yield Sources(servers, addresses, offers)


def take(addresses, model, tried=(), instance=None, in_place=True, **options):
    """Load through the first instance's view."""
    config = settings(**{"source_wait": 0.0} | options)
    who = identity(rank=model.rank, tp=model.tp)
    instance = instance or find_instance(addresses, who, config, 0, tried)
    load = model.load_weights
    load_through_view(instance, model, load, who, config, 0, in_place=in_place)
    return instance


def is_as_from_disk(model):
    of = Copying if isinstance(model, Copying) else Model
    expected = tensors_of(loaded(of, rank=model.rank, tp=model.tp, dtype=model.embed.dtype)[0])
    return all(
        torch.equal(bytes_of(one), bytes_of(expected[name]))
        for name, one in tensors_of(model).items()
    )


@pytest.mark.parametrize("connections", [1, 2])
@pytest.mark.parametrize(("there", "here"), [(2, 1), (1, 2), (4, 2), (2, 4), (1, 1)])
def test_a_rank_gets_from_those_of_any_other_size_what_the_disk_gives(there, here, connections):
    with sources(there) as source:
        for rank in range(here):
            model = Model(rank, here)
            take(source.addresses[-1:], model, connections=connections)
            assert is_as_from_disk(model)


@pytest.mark.parametrize("most_bytes", [20, 8 << 20])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("there", "here"), [(2, 1), (1, 2), (4, 2), (2, 4), (1, 1)])
def test_what_is_only_copied_goes_straight_where_it_belongs(
    monkeypatch, there, here, dtype, most_bytes
):
    monkeypatch.setattr(view_reader, "_ANSWER", most_bytes)
    with sources(there) as source:
        for rank in range(here):
            model = Copying(rank, here, dtype)
            take(source.addresses[-1:], model)
            assert is_as_from_disk(model) and model.passes == 1
            elsewhere = Copying(rank, here, dtype)
            take(source.addresses[-1:], elsewhere, in_place=False)
            assert is_as_from_disk(elsewhere) and elsewhere.passes == 2


def test_only_what_is_read_is_fetched():
    with sources(1) as source:
        model = Model(0, 2)
        take(source.addresses, model)
        needed = sum(one.nbytes for one in model.parameters()) - 3 * 2  # scales came with records
        assert source.servers[0].bytes_sent == needed


@pytest.mark.parametrize("ahead", [1, 100, 300])
def test_no_more_comes_than_is_allowed_ahead_of_what_is_read(monkeypatch, ahead):
    monkeypatch.setattr(view_reader, "_ANSWER", 40)
    monkeypatch.setattr(view_reader, "_AHEAD", ahead)
    most, held = 0, set()
    made_of = view_reader._Memory.tensor

    def counted(memory, seen):
        nonlocal most
        made = made_of(memory, seen)
        held.add(seen.name)
        most = max(most, sum(CHECKPOINT[name].nbytes for name in held))
        return made

    monkeypatch.setattr(view_reader._Memory, "tensor", counted)

    def slow(weights):
        for name, tensor in weights:
            if not tensor.is_meta:
                time.sleep(0.01)
            yield name, tensor
            held.discard(name)

    with sources(2) as source:
        model = reading(slow)
        take(source.addresses, model)
    assert is_as_from_disk(model)
    # What is read, what may come ahead, and the tensor that the last answer begins with.
    assert most <= 2 * 256 + ahead + 256


def test_memory_is_used_again_once_nobody_has_anything_that_was_made_of_it(monkeypatch):
    monkeypatch.setattr(view_reader, "_AHEAD", 1000)
    memory = view_reader._Memory()

    def made(rows, dtype="float32"):
        return memory.tensor(Seen("any", dtype, (rows, 5)))

    first = made(10)
    at, part = first.data_ptr(), first[3:, ::2]
    del first
    assert made(10).data_ptr() != at
    part.fill_(3.0)
    kept = made(10)
    assert kept.data_ptr() != at
    del part
    assert made(4).data_ptr() != at, "more than half of it would be for nothing"
    again = made(12, "bfloat16")
    assert (again.data_ptr(), again.shape, again.dtype) == (at, (12, 5), torch.bfloat16)
    large = made(60)  # more than is kept
    at = large.data_ptr()
    del large
    assert not [one for one in memory._free.values() if one.ctypes.data == at]
    memory.close()
    del again
    assert not memory._free


def test_a_tensor_of_which_nothing_is_read_takes_no_memory(monkeypatch):
    made = []
    zeros = view_reader._zeros

    def counted(seen):
        before = psutil.Process().memory_info().rss
        made.append(zeros(msgspec.structs.replace(seen, shape=(1 << 28,))))  # 512 MiB
        assert psutil.Process().memory_info().rss - before < 64 << 20
        return zeros(seen)

    monkeypatch.setattr(view_reader, "_zeros", counted)
    with sources(2) as source:
        take(source.addresses, Model())
    assert made


@pytest.mark.parametrize("model", [Model, Copying])
def test_bytes_that_are_not_what_their_digest_says_are_noticed(monkeypatch, model):
    wrong = types.SimpleNamespace(update=lambda elements: None, digest=lambda: bytes(16))
    monkeypatch.setattr(serve, "xxhash", types.SimpleNamespace(xxh3_128=lambda: wrong))
    with sources(2) as source, pytest.raises(LoadFailed, match="regions came with wrong bytes"):
        take(source.addresses, model())


def test_a_rank_that_is_lost_ends_the_load_and_another_instance_gives_the_weights(monkeypatch):
    monkeypatch.setattr(view_reader, "PAUSE", (0.0, 0.0))
    monkeypatch.setattr(view_reader, "_ANSWER", 40)
    with sources(2) as lost, sources(2) as other:
        addresses = [*lost.addresses, *other.addresses]
        model = Model()

        def losing_one(weights):
            for name, tensor in weights:
                if not tensor.is_meta and name.startswith("layers.1"):
                    lost.servers[1].stop()
                yield name, tensor

        monkeypatch.setattr(view_reader, "_AHEAD", 1)
        who, config = identity(), settings(source_wait=0.0)
        instance = find_instance(addresses, who, config, 0)
        with pytest.raises(LoadFailed, match=str(lost.addresses[1])):
            take((), reading(losing_one), instance=instance)
        again = take(addresses, model, [instance])
        assert is_as_from_disk(model)
        assert [rank.address for rank in again.ranks] == other.addresses


def test_what_goes_wrong_in_the_model_is_the_reason_and_nothing_else(monkeypatch):
    monkeypatch.setattr(view_reader, "_ANSWER", 40)
    slow = threading.Event()

    class Failing(Model):
        def load_weights(self, weights):
            for name, tensor in weights:
                if not tensor.is_meta and name == "layers.0.norm":
                    raise KeyError("norm")
                super().load_weights([(name, tensor)])

    def stall(view):
        class Stalling(Viewed):
            def elements(self, *what):
                slow.wait(0.05)
                return super().elements(*what)

        return Stalling(view.records, view.parameters)

    with sources(2, stall) as source, pytest.raises(LoadFailed, match=r": KeyError: 'norm'$"):
        take(source.addresses, Failing())


def test_weights_that_change_on_the_way_end_the_load(monkeypatch):
    monkeypatch.setattr(view_reader, "_ANSWER", 40)
    monkeypatch.setattr(view_reader, "_AHEAD", 1)
    with sources(2) as source:

        def changing(weights):
            for name, tensor in weights:
                if not tensor.is_meta and name.startswith("layers.1"):
                    source.servers[0].withdraw("netloader", Code.CHANGING, "they change")
                yield name, tensor

        with pytest.raises(LoadFailed, match="changed: they change"):
            take(source.addresses, reading(changing))


def test_a_source_that_is_silent_ends_the_load_in_time(monkeypatch):
    monkeypatch.setattr(view_reader, "PAUSE", (0.0, 0.0))
    stalled = threading.Event()

    def stall(view):
        class Stalling(Viewed):
            def elements(self, *what):
                stalled.wait(20)
                return []

        return Stalling(view.records, view.parameters)

    with sources(2, stall) as source:
        started = time.monotonic()
        try:
            with pytest.raises(LoadFailed, match=r"0\.3 s"):
                take(source.addresses, Model(), progress_timeout=0.3)
        finally:
            stalled.set()
        assert time.monotonic() - started < 10


def places_taken(address):
    with view_reader.connect(address, settings()) as client:
        return client.status().places_taken


def test_an_instance_without_room_is_waited_for():
    with sources(1, max_sessions=1) as source, contextlib.ExitStack() as stack:
        config = settings()
        instance = find_instance(source.addresses, identity(tp=2), config, 0)
        (rank,) = instance.ranks
        assert until(lambda: not places_taken(rank.address))  # by what has just found it
        held = view_reader.connected(
            rank.address, identity(), config, rank.weights, instance.digest
        )
        stack.enter_context(held)
        timer = threading.Timer(0.5, stack.close)
        timer.start()
        model = Model(0, 2)
        take(source.addresses, model, source_wait=30.0)
        timer.join()
        assert is_as_from_disk(model)


def test_ranks_that_a_small_source_has_no_room_for_at_once_all_get_their_weights(monkeypatch):
    monkeypatch.setattr(view_reader, "PAUSE", (0.01, 0.02))
    with sources(2, max_sessions=1) as source:
        models = [Model(rank, 4) for rank in range(4)]
        threads = [
            threading.Thread(target=take, args=(source.addresses, one), kwargs={"source_wait": 30})
            for one in models
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert all(map(is_as_from_disk, models))


def whole(addresses, ranks_here):
    who, config = identity(), settings(source_wait=0.0)
    instance = find_instance(addresses, who, config, 0)
    return view_module.whole_checkpoint(instance, who, config, 0, ranks_here)


def memory_of(monkeypatch, available):
    memory = types.SimpleNamespace(available=available)
    monkeypatch.setattr(view_module.psutil, "virtual_memory", lambda: memory)


READ = {name: tensor for name, tensor in CHECKPOINT.items() if name != "unused"}
READ_BYTES = sum(tensor.nbytes for tensor in READ.values())


def test_whatever_goes_wrong_with_a_view_is_a_reason_to_read_the_disk(monkeypatch):
    def fail(*_):
        raise MemoryError("no more")

    monkeypatch.setattr(view_module, "confirm", fail)
    with sources(1) as source, pytest.raises(LoadFailed, match="MemoryError: no more"):
        whole(source.addresses, 1)


def test_a_reload_gets_the_checkpoint_where_all_ranks_have_memory_for_it(monkeypatch):
    memory_of(monkeypatch, 2 * READ_BYTES)
    with sources(2) as source:
        came = dict(whole(source.addresses, 2))
    assert came.keys() == READ.keys()
    assert all(torch.equal(bytes_of(came[name]), bytes_of(READ[name])) for name in READ)


def test_a_reload_that_memory_has_no_room_for_fetches_nothing(monkeypatch):
    memory_of(monkeypatch, 2 * READ_BYTES - 1)
    with sources(2) as source:
        with pytest.raises(LoadFailed, match=r"takes .* for each of 2 ranks, and .* are available"):
            whole(source.addresses, 2)
        assert sum(server.bytes_sent for server in source.servers) == 0


def test_a_load_by_name_tells_which_sources_are_cut_otherwise():
    with sources(2) as source, sources(1) as other:
        names = [Address(HOST, 1), *source.addresses, *other.addresses]
        for server in other.servers:
            server.offer(Offer(identity(model="another", tp=2), None, "none"))
        with pytest.raises(LoadFailed) as failure:
            elastic_load({}, (), names, identity(), settings(), DEVICE)
    assert sorted(failure.value.others) == sorted(map(str, source.addresses))


def test_a_load_by_name_tells_where_the_sources_are_that_a_name_stands_for():
    with sources(1) as source:
        [address] = map(str, source.addresses)
        with pytest.raises(LoadFailed, match="tensors differ") as failure:
            elastic_load({}, (), [parse_name(address)], identity(), settings(), DEVICE)
    assert failure.value.known == [address]


def losing(monkeypatch, times):
    """Have so many answers of regions in a row be lost; the number of those asked for."""
    asked = []
    regions = ElasticClient.receive_regions

    def lost(client, *rest):
        asked.append(client.address)
        if len(asked) <= times:
            client.cut()
            raise SourceLost(f"{client.address}: reset")
        regions(client, *rest)

    monkeypatch.setattr(view_reader, "PAUSE", (0.0, 0.0))
    monkeypatch.setattr(ElasticClient, "receive_regions", lost)
    return asked


@pytest.mark.parametrize("most_bytes", [64, 8 << 20])
def test_a_connection_that_is_lost_is_made_again(monkeypatch, most_bytes):
    monkeypatch.setattr(view_reader, "_ANSWER", most_bytes)  # few bytes: more is asked for
    losing(monkeypatch, 3)
    with sources(1) as source:
        model = Model(0, 2)
        take(source.addresses, model)
        assert is_as_from_disk(model)


@pytest.mark.parametrize(("short", "ahead"), [(view_reader._SHORT, 2), (0, 1)])
def test_more_is_asked_for_while_an_answer_comes_if_the_request_is_short(monkeypatch, short, ahead):
    monkeypatch.setattr(view_reader, "_ANSWER", 64)
    monkeypatch.setattr(view_reader, "_SHORT", short)
    ask, receive = ElasticClient.ask_regions, ElasticClient.receive_regions
    asked, most = [0], [0]

    def asking(client, *rest):
        asked[0] += 1
        ask(client, *rest)

    def receiving(client, *rest):
        most[0] = max(most[0], asked[0])
        receive(client, *rest)
        asked[0] -= 1

    monkeypatch.setattr(ElasticClient, "ask_regions", asking)
    monkeypatch.setattr(ElasticClient, "receive_regions", receiving)
    with sources(1) as source:
        model = Model(0, 2)
        take(source.addresses, model, connections=1)
        assert is_as_from_disk(model)
    assert most == [ahead]


def test_what_a_further_connection_has_asked_for_comes_though_it_is_lost_and_the_first_one_over(
    monkeypatch,
):
    monkeypatch.setattr(view_reader, "_ANSWER", 64)
    monkeypatch.setattr(view_reader, "PAUSE", (0.0, 0.0))
    ask, took = ElasticClient.ask_regions, threading.Event()

    def asking(client, *rest):
        first = next((t for t in threading.enumerate() if t.name == "netloader-view-0-0"), None)
        if threading.current_thread() is first:
            assert took.wait(30)
        elif not took.is_set():
            took.set()
            first.join()
            raise SourceLost(f"{client.address}: reset")
        ask(client, *rest)

    monkeypatch.setattr(ElasticClient, "ask_regions", asking)
    with sources(1) as source:
        model = Model(0, 2)
        take(source.addresses, model, connections=2)
        assert is_as_from_disk(model)
    assert took.is_set()


def test_a_rank_that_loses_every_connection_ends_the_load(monkeypatch):
    asked = losing(monkeypatch, 1000)
    with sources(1) as source, pytest.raises(LoadFailed, match="reset"):
        take(source.addresses, Model(0, 2), connections=1)
    assert len(asked) == 4


def test_a_source_that_is_slow_for_long_ends_the_load(monkeypatch):
    monkeypatch.setattr(view_reader, "_PACE_SECONDS", 0.0)
    monkeypatch.setattr(view_reader, "_LEAST_RATE", 1 << 50)
    with sources(1) as source, pytest.raises(LoadFailed, match=r"too slow: .* at least"):
        take(source.addresses, Model(0, 2))


def test_ranks_of_which_some_have_changed_are_refused():
    with sources(2) as source:
        other = {0: "xxh3:" + "0" * 32, 1: source.offers[1].ranks()[1]}
        source.servers[1].offer(dataclasses.replace(source.offers[1], ranks=lambda: other))
        with pytest.raises(LoadFailed, match=r"its instance has instance:.* now, and not instance"):
            take(source.addresses[:1], Model())


def test_ranks_that_change_before_all_has_come_end_the_load():
    with sources(2) as source:

        def changing(weights):
            for name, tensor in weights:
                yield name, tensor
            if not tensor.is_meta:
                source.offers[0].ranks().update({0: "xxh3:" + "0" * 32})

        with pytest.raises(LoadFailed, match=r"its instance has instance:.* now, and not instance"):
            take(source.addresses, reading(changing))


# Weights that came by name


@contextlib.contextmanager
def by_name(addresses, model):
    """An instance that gets its weights by name, and offers what their source says of them."""
    tensors, who, config = tensors_of(model), identity(rank=model.rank, tp=model.tp), settings()
    got = elastic_load(tensors, tensors.keys(), addresses, who, config, DEVICE)
    weights = got.store.digests.weights
    view = viewed_through(got.store, records_by_name(got.givers, config, weights))
    server = WeightServer(config, 0, HOST)
    address = server.start(0)
    ends, ranks = {0: Endpoint(str(address), server.process)}, {0: weights}
    server.offer(Offer(who, got.store, view=view, ranks=lambda: ranks, endpoints=lambda: ends))
    try:
        yield address
    finally:
        server.stop()


def test_those_that_loaded_by_name_feed_any_size_once_the_seed_is_gone():
    with contextlib.ExitStack() as stack:
        seed = stack.enter_context(sources(1))
        first = stack.enter_context(by_name(seed.addresses, Model()))
        seed.servers[0].stop()
        second = stack.enter_context(by_name([first], Model()))
        for rank, address in enumerate([first, second]):
            model = Model(rank, 2)
            take([address], model)
            assert is_as_from_disk(model)


@pytest.mark.parametrize("seen", [True, False])
def test_what_is_held_of_an_instance_feeds_other_sizes_if_that_had_a_view(seen):
    config, held = settings(), []
    with sources(2, lambda view: view if seen else None) as source:
        for address, offer in zip(source.addresses, source.offers, strict=True):
            with copies.connect(address, config) as client:
                what = copies.describe(client, offer.identity)
            store = copies.pull([address], what, None, config)
            held.append((what, store, copies.view_of(store, [address], config), "an instance"))
    model = Model()
    with copies.holding(held, config, HOST) as addresses:
        if not seen:
            with pytest.raises(LoadFailed, match="no_view: "):
                take(addresses, model)
            return
        take(addresses, model)
        assert is_as_from_disk(model)


def test_what_is_held_is_served_without_a_view_if_something_goes_wrong_with_that(
    monkeypatch, caplog
):
    def fails(*args):
        raise RuntimeError("strange records")

    config = settings()
    with sources(1) as source:
        with copies.connect(source.addresses[0], config) as client:
            what = copies.describe(client, source.offers[0].identity)
        store = copies.pull(source.addresses, what, None, config)
        monkeypatch.setattr(copies, "viewed_through", fails)
        assert copies.view_of(store, source.addresses, config) is None
    assert "no view of what is held: RuntimeError: strange records" in caplog.text


def test_a_parameter_that_is_laid_out_otherwise_than_at_the_source_is_refused_by_name():
    class Turned(Model):
        def __init__(self):
            super().__init__()
            self.down1 = nn.Parameter(self.down1.t().contiguous().t(), requires_grad=False)

    with sources(1) as seed, by_name(seed.addresses, turned := Turned()) as address:
        assert is_as_from_disk(turned) and not turned.down1.is_contiguous()
        with pytest.raises(LoadFailed, match=r"layers\.1\.down\[0:8, 0:8\]: no rank of the source"):
            take([address], Model(0, 2))


def records_of(addresses):
    weights = store_of(tensors_of(loaded()[0])).digests.weights
    return records_by_name(addresses, settings(), weights)


def test_the_records_are_those_of_the_first_source_that_has_them():
    with sources(1, lambda view: None) as none, sources(1) as one:
        expected = decode(one.offers[0].view.records)
        assert records_of([*none.addresses, *one.addresses]) == expected
        with pytest.raises(LoadFailed, match=f"{none.addresses[0]}: no_view: "):
            records_of(none.addresses)
    with pytest.raises(LoadFailed, match="none of the sources in SOURCE gave weights"):
        records_of([])


def test_records_of_other_weights_are_not_taken():
    with sources(1) as source, pytest.raises(LoadFailed, match="changed: "):
        records_by_name(source.addresses, settings(), "xxh3:" + "0" * 32)


def test_records_of_more_entries_than_one_rank_has_are_not_taken(monkeypatch):
    monkeypatch.setattr(view_module, "_MOST_BY_NAME", 3)
    with (
        sources(1) as source,
        pytest.raises(LoadFailed, match=r"records of \d+ entries; allowed: 3"),
    ):
        records_of(source.addresses)


def test_records_take_no_place_at_a_source():
    with sources(1, max_sessions=1) as source:
        (weights,) = source.offers[0].ranks().values()
        with view_reader.connected(
            source.addresses[0], identity(), settings(), weights, of_instance({0: weights})
        ):
            assert records_of(source.addresses) == decode(source.offers[0].view.records)


def test_sources_that_are_slow_to_say_what_they_have_cost_the_view_only(monkeypatch):
    stalled = threading.Event()
    monkeypatch.setattr(WeightServer, "records", lambda *_: stalled.wait(20))
    monkeypatch.setattr(view_module, "_RECORDS_BY_NAME", 0.2)
    with sources(1) as one, sources(1) as other:
        started = time.monotonic()
        try:
            with pytest.raises(
                LoadFailed, match=f"^{one.addresses[0]}: (?!.*{other.addresses[0]})"
            ):
                records_of([*one.addresses, *other.addresses])
        finally:
            stalled.set()
        assert time.monotonic() - started < 10


def test_records_are_asked_of_those_that_gave_most_and_of_none_that_only_others_have_named():
    seed, other, heard, idle = (Address(HOST, port) for port in range(1, 5))
    loading = types.SimpleNamespace(
        _shares=lambda: {seed: 5, idle: 0, heard: 9, other: 7},
        _queue=types.SimpleNamespace(is_hearsay=lambda address: address == heard),
    )
    assert Sessions.givers(loading) == [other, seed]


# Weights that are read again


def read_again(checkpoint):
    model, records = loaded(rank=1, tp=2)
    again = Reread(records)
    model.load_weights(again.watch(checkpoint.items()))
    return again


def test_the_records_of_another_checkpoint_are_those_that_reading_it_at_first_gives(monkeypatch):
    other = {
        name: random_tensor(number, tensor.dtype, *tensor.shape)
        for number, (name, tensor) in enumerate(CHECKPOINT.items(), 500)
    }
    again = read_again(other)
    before = loaded(rank=1, tp=2)[1]
    monkeypatch.setattr(f"{__name__}.CHECKPOINT", other)
    assert again.records() == loaded(rank=1, tp=2)[1] != before


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"layers.1.up": None}, "this reload did not include layers.1.up, so instances of"),
        ({"layers.1.scale": None}, "did not include layers.1.scale"),
        ({"unused": torch.ones(4, 5)}, r"had unused \(float32 \(4, 5\)\), which was not in"),
        ({"layers.1.norm": torch.ones(8)}, r"layers.1.norm \(float32 \(8,\)\), which"),
        ({"layers.7.norm": torch.ones(8)}, "layers.7.norm .* was not in the checkpoint before"),
    ],
)
def test_nothing_is_known_of_weights_from_a_checkpoint_of_other_tensors(change, why):
    def known(weights):
        return (one for one in weights if one[0] != "layers.7.norm")

    checkpoint = {name: one for name, one in (CHECKPOINT | change).items() if one is not None}
    again = Reread(loaded()[1])
    reading(known).load_weights(again.watch(checkpoint.items()))
    with pytest.raises(Unmapped, match=why):
        again.records()


class Tied(nn.Module):
    """A model that puts tensors of two names into one parameter."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2), requires_grad=False)
        self.v = nn.Parameter(torch.zeros(2), requires_grad=False)

    def load_weights(self, weights):
        for name, tensor in weights:
            (self.v if name == "c" else self.w).copy_(tensor)


def read_in_order(first, then):
    model, seen = Tied(), Trace()
    with seen:
        model.load_weights(seen.watch((name, torch.ones(2)) for name in first))
    again = Reread(decode(viewed(seen.records(model), {"w": model.w}).records))
    for names in then:
        model.load_weights(again.watch((name, torch.rand(2)) for name in names))
    return again


@pytest.mark.parametrize(
    ("first", "then", "is_known"),
    [
        ("abc", ["abc"], True),
        ("abc", ["a", "b", "c"], True),
        ("abc", ["bac"], False),
        ("abc", ["abc", "a"], False),
        ("ac", ["ca"], True),
    ],
)
def test_where_a_tensor_is_written_over_another_one_the_order_is_that_of_before(
    first, then, is_known
):
    again = read_in_order(first, then)
    if is_known:
        assert any(seen.copies for seen in again.records().tensors)
    else:
        with pytest.raises(Unmapped, match="had tensors that share memory in another order"):
            again.records()


@pytest.mark.parametrize(
    "value",
    [3.0, CHECKPOINT["layers.1.scale"].to("meta")],
    ids=["a number", "meta"],
)
def test_what_cannot_be_noted_is_read_all_the_same(value):
    model, seen = Model(), Trace()
    with seen:
        model.load_weights(seen.watch(CHECKPOINT.items()))
    again = Reread(seen.records(model))
    assert [*again.watch(iter([("layers.1.scale", value)]))] == [("layers.1.scale", value)]
    with pytest.raises(Unmapped, match="this reload had tensors that cannot be noted"):
        again.records()


def test_a_model_may_go_through_its_weights_more_than_once():
    again = Reread(loaded()[1])
    watched = again.watch([*CHECKPOINT.items()])
    assert [name for name, _ in watched] == [name for name, _ in watched] == [*CHECKPOINT]


# Refusals


@pytest.mark.parametrize("unknown", ["ranks", "endpoints"])
def test_an_instance_of_which_a_rank_is_not_known_is_not_read(unknown):
    with sources(2) as source:
        del getattr(source.offers[0], unknown)()[1]
        with pytest.raises(LoadFailed, match="does not say yet what all of its ranks have"):
            take(source.addresses[:1], Model())


@pytest.mark.parametrize(
    ("change", "most", "ranks"),
    [
        ({"tp": 2, "pp": 2, "dp": 2}, 8, {0, 1, 2, 3, 4, 5, 6, 7}),
        ({"tp": 2, "pp": 2, "dp": 2, "group": DRAFT_GROUP}, 8, {2, 3, 6, 7}),
        ({"tp": 2, "pcp": 2, "ep": 4}, 9, {0, 1, 2, 3}),
        ({"tp": 1 << 40}, 8, set()),
    ],
)
def test_the_ranks_of_an_instance_are_those_of_its_sizes(change, most, ranks):
    assert api.world_of(identity(**change), most) == ranks


def test_ranks_that_do_not_tell_in_time_what_they_have_are_not_waited_for(monkeypatch):
    stalled = threading.Event()
    monkeypatch.setattr(view_module, "_RECORDS_COME", 0.1)
    monkeypatch.setattr(view_module, "_records_of", lambda *_: stalled.wait(60))
    with sources(2) as source:
        try:
            with pytest.raises(LoadFailed, match=r"not all records came within 0\.1 s"):
                take(source.addresses[:1], Model())
            assert not stalled.is_set()
        finally:
            stalled.set()


def test_no_further_rank_is_asked_once_one_has_failed(monkeypatch):
    asked, stalled = [], threading.Event()

    def fail(address, *_):
        asked.append(address)
        if len(asked) > 1:
            stalled.wait(60)
        raise SourceLost(f"{address}: reset")

    monkeypatch.setattr(view_module, "_RECORDS_AT_ONCE", 1)
    monkeypatch.setattr(view_module, "_records_of", fail)
    with sources(4) as source:
        try:
            with pytest.raises(LoadFailed, match="reset"):
                take(source.addresses[:1], Model())
        finally:
            stalled.set()
    assert len(asked) <= 2


def test_the_records_of_a_few_ranks_are_here_before_they_are_read(monkeypatch):
    asked, read = [], []

    class AtOnce(ThreadPoolExecutor):
        def submit(self, *arguments):
            asked.append(one := super().submit(*arguments))
            one.exception()
            return one

    def decoded(*arguments):
        read.append(len(asked))
        return decode(*arguments)

    monkeypatch.setattr(view_module, "_RECORDS_AT_ONCE", 2)
    monkeypatch.setattr(view_module, "ThreadPoolExecutor", AtOnce)
    monkeypatch.setattr(view_module, "decode", decoded)
    with sources(4) as source:
        take(source.addresses[:1], model := Model())
    assert is_as_from_disk(model)
    assert read == [2, 2, 4, 4]


def test_no_source_is_asked_for_its_view_for_ever(monkeypatch):
    monkeypatch.setattr(view_module, "_LOOKING", -1.0)
    with sources(1) as source, pytest.raises(LoadFailed, match="was not asked, as looking"):
        take(source.addresses, Model())


def changed_records(change):
    def changed(view):
        records = change(decode(view.records))
        return Viewed(encode(records), view.parameters)

    return changed


def without(name):
    def change(records):
        replace = msgspec.structs.replace
        tensors = tuple(
            replace(one, copies=(), kept=()) if one.name == name else one for one in records.tensors
        )
        return replace(records, tensors=tensors)

    return changed_records(change)


def test_what_no_rank_has_refuses_the_load_by_name():
    with sources(2, without("layers.1.up")) as source:
        with pytest.raises(LoadFailed, match=r"layers\.1\.up\[0:16, 0:8\]: no rank of the source"):
            take(source.addresses, Model())
        assert sum(server.bytes_sent for server in source.servers) == 0


def test_records_that_say_nothing_sensible_are_refused():
    wrong = sources(2, lambda view: Viewed(b"\1nonsense", view.parameters))
    with wrong as source, pytest.raises(LoadFailed, match="not records"):
        take(source.addresses, Model())


def test_regions_beyond_a_parameter_are_refused():
    def change(records):
        replace = msgspec.structs.replace
        parameters = tuple(
            replace(one, shape=(1 << 40,), stride=(1,)) for one in records.parameters
        )
        tensors = tuple(
            replace(one, copies=tuple(replace(c, offset=1 << 30) for c in one.copies))
            for one in records.tensors
        )
        return replace(records, parameters=parameters, tensors=tensors)

    wrong = sources(2, changed_records(change))
    with wrong as source, pytest.raises(LoadFailed, match="out_of_range"):
        take(source.addresses, Model())


def test_a_tensor_that_is_larger_than_any_memory_costs_no_more_than_this_source():
    def change(records):
        first, *others = records.tensors
        large = msgspec.structs.replace(first, name="zzz", shape=(1 << 60,), copies=(), kept=())
        return msgspec.structs.replace(records, tensors=(first, *others, large))

    def known(weights):
        return (one for one in weights if one[0] != "zzz")

    with sources(2, changed_records(change)) as source, pytest.raises(LoadFailed):
        take(source.addresses, reading(known))


def test_an_instance_whose_ranks_have_other_weights_than_it_says_is_refused():
    with sources(2) as source:
        source.offers[0].ranks().update({1: "xxh3:" + "0" * 32})
        with pytest.raises(LoadFailed, match=r"its weights are .* now, and not xxh3:0000"):
            take(source.addresses[:1], Model())


def test_only_pinned_weights_are_taken_and_the_log_says_what_was_compared(log):
    with sources(2) as source:
        with pytest.raises(LoadFailed, match="WEIGHTS_DIGEST is instance:00"):
            take(source.addresses, Model(), weights_digest=("instance:00",))
        digest = find_instance(source.addresses, identity(), settings(), 0).digest
        model = Model()
        take(source.addresses, model, weights_digest=(digest,))
        assert is_as_from_disk(model)
        said = f"say that they have, {digest}, and not with the bytes that came"
        assert said in log[-1] and "WEIGHTS_DIGEST" in log[-1]
        take(source.addresses, model)
        assert sum("WEIGHTS_DIGEST was" in line for line in log) == 1


FLOAT32 = {"dtype": "torch.float32"}
FOLDER = {"dtype": OF_EACH_TENSOR, "layout": LAYOUT_OF_FOLDER}


@pytest.mark.parametrize(
    ("there", "here", "said"),
    [
        ({}, {}, "TP 1 there, TP 1 here"),
        ({"tp": 2}, {}, "TP 2 there, TP 1 here"),
        ({"pp": 2}, {"tp": 2}, "TP 1 and PP 2 there, TP 2 and PP 1 here"),
        ({}, FLOAT32, "dtype bfloat16 there, dtype float32 here"),
        (FLOAT32, {"tp": 2}, "TP 1 and dtype float32 there, TP 2 and dtype bfloat16 here"),
        (FOLDER, {}, "the whole checkpoint there, TP 1 here"),
        (FOLDER, {"tp": 2, "pp": 2}, "the whole checkpoint there, TP 2 and PP 2 here"),
        ({"dtype": "a\n" * 30}, {}, f"dtype {'a ' * 20}... there, dtype bfloat16 here"),
    ],
)
def test_the_log_says_in_what_the_two_sides_are_cut_differently(log, there, here, said):
    with sources(1) as source:
        config = settings(source_wait=0.0)
        instance = find_instance(source.addresses, identity(), config, 0)
        instance = dataclasses.replace(instance, identity=identity(**there))
        model = Model()
        load = model.load_weights
        load_through_view(instance, model, load, identity(**here), config, 0, in_place=True)
    assert log[-1].endswith(f" through their view of the checkpoint ({said})")


def test_another_model_is_refused():
    with sources(2) as source:
        other = identity(config={"hidden_size": 5})
        with pytest.raises(LoadFailed, match=r"config\.hidden_size is 5 at the client and 4"):
            find_instance(source.addresses, other, settings(source_wait=0.0), 0)


def test_the_time_for_which_the_load_has_waited_already_counts():
    with sources(1) as source:
        source.servers[0].offer(dataclasses.replace(source.offers[0], ranks=dict))
        config, now = settings(source_wait=30.0), time.monotonic()
        with pytest.raises(LoadFailed, match="does not say yet what all of its ranks have"):
            find_instance(source.addresses, identity(), config, 0, began=now - 30)
        assert time.monotonic() - now < 15


def test_the_processed_layout_has_no_view():
    with pytest.raises(LoadFailed, match="not the processed one"):
        find_instance([Address(HOST, 1)], identity(layout="processed"), settings(), 0)


def test_what_a_source_has_rounded_is_refused_by_name(monkeypatch):
    monkeypatch.setitem(CHECKPOINT, "embed", CHECKPOINT["embed"].float() / 3)
    with sources(2) as source:
        with pytest.raises(LoadFailed, match=r"embed\[0:10, 0:8\]: .* float32 -> bfloat16"):
            take(source.addresses, Model(dtype=torch.float32))
        model = Model()
        take(source.addresses, model)
        assert is_as_from_disk(model)


def test_a_model_that_reads_other_weights_than_it_said_is_not_trusted():
    def fickle(weights):
        for name, tensor in weights:
            if tensor.is_meta or name != "layers.1.norm":
                yield name, tensor

    other = "loading reads other tensors the second time"
    with sources(2) as source, pytest.raises(LoadFailed, match=other):
        take(source.addresses, reading(fickle))


@pytest.mark.parametrize("kind", ["meta", "values"])
def test_a_model_of_which_nothing_can_be_told_before_loading_is_refused(kind):
    class Odd(Model):
        def load_weights(self, weights):
            super().load_weights(weights if kind == "meta" else self.looked_at(weights))

        def looked_at(self, weights):
            for name, tensor in weights:
                if tensor.any():
                    yield name, tensor

    model = Odd()
    if kind == "meta":
        model.embed = nn.Parameter(model.embed.to("meta"), requires_grad=False)
    with (
        sources(2) as source,
        pytest.raises(LoadFailed, match=r"made while loading|cannot be told"),
    ):
        take(source.addresses, model)


def flip(model, w):
    model.p.copy_(w)
    model.p.view(torch.int32).bitwise_xor_(1)


def overlay(model, w):
    model.p.copy_(w)
    model.p[:1].copy_(w[1:2])


def scale_rows(model, w):
    model.p.copy_(w)
    model.p[1:3].mul_(2)


def overlay_bytes(model, w):
    model.p.copy_(w)
    model.p.view(torch.uint8)[:2].fill_(1)


@pytest.mark.parametrize(
    ("dtype", "load"),
    [
        (torch.uint8, lambda model, w: model.p[:, :2].copy_(w.view(torch.float32))),
        (torch.uint8, lambda model, w: model.p.view(torch.uint8)[:, :8].copy_(w)),
        (torch.float32, lambda model, w: model.p.copy_(w.view(torch.uint8)[:, :8])),
        (torch.float32, lambda model, w: model.p.copy_(w.half().view(torch.int16)[:, :8])),
        (torch.float32, lambda model, w: model.p.copy_(w.half().view(torch.int16)[:, :8] ^ 1)),
        (torch.float32, lambda model, w: setattr(model, "aside", w)),
        (torch.float32, lambda model, w: model.aside.copy_(w)),
        (torch.float32, lambda model, w: model.outside.copy_(w)),
        (torch.float32, lambda model, w: model.p.copy_(w.to(model.p.device))),
        (torch.float32, lambda model, w: model.p.copy_(w.to(model.p.device, torch.float64) + 1)),
        (torch.float32, flip),
        (torch.float32, overlay),
        (torch.float32, scale_rows),
        (torch.float32, overlay_bytes),
    ],
)
def test_whatever_a_model_does_with_what_it_reads_is_fetched(dtype, load):
    """The source has the checkpoint as it is in files."""

    def fill(weights):
        for _, tensor in weights:
            load(model, tensor)

    def made():
        made = nn.Module()
        memory = torch.zeros(8, 8)
        made.p = nn.Parameter(memory[:4], requires_grad=False)
        made.outside, made.aside = memory[4:], torch.zeros(4, 8)
        return made

    checkpoint = torch.arange(1, 33).reshape(4, 8).to(dtype)
    disk = model = made()
    fill([("w", checkpoint.clone())])
    model = made()
    copy = Copy((0, 0), (4, 8), 0, 0, row_major((4, 8)))
    there = Records((Seen("w", name_of(dtype), (4, 8), (copy,)),), (parameter_of("w", checkpoint),))
    needs = needs_of(model, fill, catalog([there]))
    fetch, missing = find(needs, [there], 0)
    assert not missing
    came = torch.zeros_like(checkpoint)
    for part in fetch.parts[0]:
        box_of(came, part.box).copy_(box_of(checkpoint, part.box))
    if is_copied(needs):
        straight, own = made(), Seen("w", name_of(dtype), (4, 8))
        for part in fetch.parts[0]:
            values = box_of(came, part.box).clone()
            put(InPlace(needs, straight).places(own, part.box), part.box, values)
        assert torch.equal(bytes_of(straight.p), bytes_of(disk.p))
        assert straight.outside.eq(disk.outside).all() and straight.aside.eq(disk.aside).all()
    trace, weights = Trace(), [("w", came)]
    del came
    with trace:
        fill(trace.watch(weights.pop() for _ in range(1)))
    assert same_reading(needs, trace.records(model))
    for name in ("p", "outside", "aside"):
        assert torch.equal(bytes_of(getattr(model, name)), bytes_of(getattr(disk, name)))


@pytest.mark.parametrize("fails", [False, True])
def test_no_cycles_are_looked_for_while_a_load_is_pretended(fails):
    looks = []

    def pretend(weights):
        looks.append(gc.isenabled())
        assert not fails, "no load"

    with pytest.raises(LayoutUnsupported, match="no load") if fails else contextlib.nullcontext():
        needs_of(nn.Module(), pretend, [])
    assert looks == [False] and gc.isenabled()


def test_a_tensor_that_cannot_be_made_is_refused_with_what_torch_says():
    with pytest.raises(LayoutUnsupported, match="cannot be told: RuntimeError"):
        needs_of(nn.Module(), list, [Seen("w", "float32", (1 << 62, 8))])
    assert gc.isenabled()
