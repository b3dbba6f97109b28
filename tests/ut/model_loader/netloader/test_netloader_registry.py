"""Models in use in a process, and the servers that others pull them from."""

import contextlib
import dataclasses
import gc
import os
import socket
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.distributed import HashStore

from tests.identity import identity
from vllm_ascend.model_loader.netloader import metrics, registry
from vllm_ascend.model_loader.netloader.agreement import Ranks
from vllm_ascend.model_loader.netloader.changes import After, Change
from vllm_ascend.model_loader.netloader.config import parse_config
from vllm_ascend.model_loader.netloader.errors import (
    Gone,
    LayoutUnsupported,
    LoadFailed,
    SourceBusy,
)
from vllm_ascend.model_loader.netloader.executor.chunks.blocks import Run
from vllm_ascend.model_loader.netloader.executor.model.renewal import Renewal
from vllm_ascend.model_loader.netloader.executor.model.trace import Trace
from vllm_ascend.model_loader.netloader.executor.view.offered import Viewed, viewed
from vllm_ascend.model_loader.netloader.executor.view.records import decode
from vllm_ascend.model_loader.netloader.identity import Revision
from vllm_ascend.model_loader.netloader.interaction.api import Code, Join
from vllm_ascend.model_loader.netloader.interaction.client import ElasticClient
from vllm_ascend.model_loader.netloader.registry import Member
from vllm_ascend.model_loader.netloader.serve import Offer
from vllm_ascend.model_loader.netloader.utils import parse_address

from .support import HOST, bytes_of, dial, load, settings, source, store_of

TARGET, DRAFT = "netloader", "netloader_draft"
WEIGHTS = {"a": torch.ones(1)}


@pytest.fixture(autouse=True)
def servers(monkeypatch):
    """The servers of this process, and none of them left afterwards."""
    known = []
    monkeypatch.setattr(registry, "_servers", known)
    yield known
    registry.wait_until_retired()
    for server in known:
        server.stop()


@pytest.fixture
def config(tmp_path):
    def config(**keys):
        return parse_config({"OUTPUT_PREFIX": f"{tmp_path}/rank_", "LISTEN_HOST": HOST, **keys})

    return config


def offer(rank=0, group=TARGET, tensors=WEIGHTS, declined=""):
    """A small model, or none with a reason."""
    store = None if declined else store_of(tensors)
    return Offer(identity(rank=rank, group=group), store, declined)


def put_in_use(config, offered=None, host=HOST, to_come=(), worker=None, instance=None):
    """Load a model; it is in use for as long as what is returned is there."""
    model = nn.Linear(1, 1)
    offered = offered or offer()
    worker = offered.identity.rank if worker is None else worker
    member = Member(config, host, to_come, worker, instance)
    registry.put_in_use(model, "path", member, offered)
    return model


def collect():
    """Return when all that is not used any more is gone, and the servers know."""
    gc.collect()
    registry.wait_until_retired()


def server_of(model):
    return registry.in_use(model).server


def address_of(tmp_path, rank=0):
    return parse_address((tmp_path / f"rank_{rank}.txt").read_text())


def groups(server):
    return [model.identity.group for model in server.status(0).models]


def is_served(address, group=TARGET, tensors=WEIGHTS):
    into = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    load([address], into, who=identity(group=group))
    return all(torch.equal(into[name], tensor) for name, tensor in tensors.items())


def is_refused(address, group, reason):
    with pytest.raises(LoadFailed, match=reason):
        load([address], {"a": torch.zeros(1)}, who=identity(group=group))
    return True


# What is known of a model


def test_a_model_in_use_is_known_with_all_that_a_reload_needs(config):
    model = nn.Linear(1, 1)
    registry.put_in_use(model, "path", Member(config(), HOST), offer())
    known = registry.in_use(model)
    assert known.identity == identity()
    assert known.path == "path"
    assert known.server.listening


def test_a_model_that_nobody_loaded_here_is_not_known():
    assert registry.in_use(nn.Linear(1, 1)) is None


# Sharing a server


def test_target_and_draft_share_one_server(config, servers, tmp_path):
    target = put_in_use(config(), to_come=[DRAFT])
    draft = put_in_use(config(), offer(group=DRAFT, tensors={"d": torch.ones(2)}))
    assert server_of(target) is server_of(draft)
    assert groups(server_of(target)) == [TARGET, DRAFT]
    assert len(servers) == 1
    assert is_served(address_of(tmp_path))
    assert is_served(address_of(tmp_path), DRAFT, {"d": torch.ones(2)})


@pytest.mark.parametrize(
    "other",
    [
        {"LISTEN_HOST": "127.0.0.2"},
        {"MAX_SESSIONS": 9},
        {"MAX_SEND_RATE": "1GB/s"},
        {"TRANSPORT": "http"},
        {"HANDSHAKE_TIMEOUT": 3},
        {"PROGRESS_TIMEOUT": 3},
    ],
)
def test_a_model_with_other_settings_of_its_server_has_a_server_of_its_own(config, other, servers):
    first = put_in_use(config())
    second = put_in_use(config(**other), offer(group=DRAFT))
    assert server_of(first) is not server_of(second)
    assert all(server.listening for server in servers)
    assert groups(server_of(first)) == [TARGET]


@pytest.mark.parametrize(
    "other", [{"VERIFY": False}, {"CHUNK_MIB": 2}, {"SOURCE": []}, {"MODEL": "m"}]
)
def test_what_only_matters_to_a_client_does_not_keep_models_from_sharing(config, other):
    first = put_in_use(config())
    second = put_in_use(config(**other), offer(group=DRAFT))
    assert server_of(first) is server_of(second)


def test_a_second_model_of_a_group_has_a_server_of_its_own_and_the_first_is_still_served(servers):
    first = put_in_use(settings())
    second = put_in_use(settings(), offer(tensors={"b": torch.ones(2)}))
    assert server_of(first) is not server_of(second)
    for model, tensors in ((first, WEIGHTS), (second, {"b": torch.ones(2)})):
        [status] = server_of(model).status(0).models
        assert status.weights == store_of(tensors).digests.weights
    assert len(servers) == 2


def test_a_model_that_is_gone_leaves_its_place_to_the_next(config, servers, tmp_path):
    first = put_in_use(config())
    del first
    collect()
    second = put_in_use(config())
    assert [server_of(second)] == servers
    assert is_served(address_of(tmp_path))


def test_a_draft_is_not_offered_beside_the_target_of_another_instance(servers):
    first = put_in_use(settings(), instance="one")
    second = put_in_use(settings(), instance="two")
    draft = put_in_use(settings(), offer(group=DRAFT), instance="two")
    assert server_of(draft) is server_of(second) is not server_of(first)
    assert groups(server_of(first)) == [TARGET]
    assert len(servers) == 2


@pytest.mark.parametrize("key", ["LISTEN_PORT", "OUTPUT_PREFIX"])
def test_a_second_instance_with_the_address_of_the_first_is_no_source_and_is_told_the_key(
    config, servers, tmp_path, log, key
):
    with contextlib.closing(socket.create_server((HOST, 0))) as held:
        port = held.getsockname()[1]
    value = port if key == "LISTEN_PORT" else f"{tmp_path}/same_"
    first = put_in_use(config(**{key: value}), instance="one")
    log.clear()
    other = {"OUTPUT_PREFIX": f"{tmp_path}/other_"} | {key: value}
    second = put_in_use(config(**other), offer(tensors={"b": torch.ones(2)}), instance="two")
    assert log == [
        "NetLoader rank 0: this instance is no source, as another one in this process has "
        f"{key} {value}; give each its own"
    ]
    assert server_of(second) is None
    assert servers == [server_of(first)]
    del first
    collect()
    gone = [put_in_use(config(**other), instance="three")]
    gone.append(gone)  # only a garbage collector finds that it is gone
    del gone
    assert server_of(put_in_use(config(**other), instance="four")).listening


def test_workers_of_the_same_rank_in_two_replicas_have_ports_and_files_of_their_own(
    config, tmp_path, log
):
    first, second = put_in_use(config()), put_in_use(config(), worker=2)
    assert [server_of(model).rank for model in (first, second)] == [0, 2]
    assert address_of(tmp_path, 0) != address_of(tmp_path, 2)
    log.clear()
    taken = address_of(tmp_path, 0).port
    put_in_use(config(LISTEN_PORT=taken - 2), worker=2)
    [line] = log
    assert line.startswith(f"NetLoader rank 2: cannot listen on port {taken}, ")


# Listening or not


def test_without_a_model_to_give_there_is_no_port_and_no_port_file(config, tmp_path, log):
    target = put_in_use(config(), offer(declined="no copy"), to_come=[DRAFT])
    draft = put_in_use(config(), offer(group=DRAFT, declined="none either"))
    assert server_of(target) is server_of(draft)
    assert not server_of(target).listening
    assert os.listdir(tmp_path) == []
    assert log == []


def test_a_draft_opens_the_port_and_its_target_is_refused_with_the_reason(config, tmp_path):
    target = put_in_use(config(), offer(declined="no copy"), to_come=[DRAFT])
    draft = put_in_use(config(), offer(group=DRAFT))
    assert server_of(target) is server_of(draft)
    assert is_refused(address_of(tmp_path), TARGET, "cannot_serve: no copy")
    assert is_served(address_of(tmp_path), DRAFT)


def test_a_draft_that_is_still_to_come_is_loading_and_then_refused_with_the_reason(
    config, tmp_path
):
    target = put_in_use(config(), to_come=[DRAFT])
    assert is_refused(address_of(tmp_path), DRAFT, "loading: the weights are being loaded")
    draft = put_in_use(config(), offer(group=DRAFT, declined="no copy"))
    assert server_of(target) is server_of(draft)
    assert is_refused(address_of(tmp_path), DRAFT, "cannot_serve: no copy")


def test_the_host_that_others_reach_is_the_one_published(config, tmp_path):
    model = put_in_use(config(), host="192.0.2.1")
    assert address_of(tmp_path).host == "192.0.2.1"
    assert server_of(model).listening


@pytest.mark.parametrize("port", [0, 1023, 65536])
def test_a_port_out_of_range_is_no_server_and_no_error(config, servers, port, log):
    model = put_in_use(config(LISTEN_PORT=port))
    assert server_of(model) is None
    assert servers == []
    [line] = log
    assert line == f"NetLoader rank 0: this instance is no source, as LISTEN_PORT is {port}"


def test_a_port_that_is_taken_is_no_server_and_one_error(config, servers, log):
    with source(WEIGHTS) as other:
        del log[:]
        model = put_in_use(config(LISTEN_PORT=other.address.port))
        assert b'netloader_weights_bytes{model="netloader"} 0.0' in metrics.exposition()
    assert server_of(model) is None
    assert servers == []
    assert f"cannot listen on port {other.address.port}, so this instance is no source: " in log[0]
    assert f"LISTEN_PORT is {other.address.port}, and port" in log[0]


# The end of a model


def test_a_model_that_is_gone_is_served_no_more(config, servers, tmp_path):
    target = put_in_use(config())
    draft = put_in_use(config(), offer(group=DRAFT))
    server, address = server_of(target), address_of(tmp_path)
    del draft
    collect()
    assert groups(server) == [TARGET]
    assert is_served(address)
    del target
    collect()
    assert os.listdir(tmp_path) == []
    assert servers == []
    with pytest.raises(OSError):
        dial(address, 1)


def test_the_last_model_that_goes_ends_its_sessions_as_a_source_that_is_shutting_down(config):
    made = offer()
    model = put_in_use(config(), made)
    del model
    collect()
    with pytest.raises(Gone, match="the source is shutting down"):
        made.store.check(Run(0, 0))


def test_a_model_may_go_in_a_thread_that_must_not_wait_for_a_server(config, servers):
    """It may hold the lock of the log, in which whoever holds the server's writes a line."""
    model = put_in_use(config())
    server, gone = server_of(model), threading.Event()
    weakref.finalize(model, gone.set)
    models = [model]
    del model

    def drop():
        models.clear()
        gc.collect()

    with server._lock:
        dropping = threading.Thread(target=drop, daemon=True)
        dropping.start()
        dropping.join(10)
        assert gone.is_set() and not dropping.is_alive()
        assert servers == [server]
    registry.wait_until_retired()
    assert servers == []


# Reloads


def test_a_model_that_was_reloaded_is_offered_again(config, tmp_path):
    model = put_in_use(config())
    known, address = registry.in_use(model), address_of(tmp_path)
    reason = "the weights are being replaced"
    known.server.withdraw(TARGET, Code.CHANGING, reason)
    assert is_refused(address, TARGET, "changing: the weights are being replaced")
    new = {"a": torch.full((1,), 7.0)}
    registry.offer_again(model, offer(tensors=new))
    assert is_served(address, tensors=new)
    assert known.server.status(0).models[0].epoch == 2


def test_a_reload_opens_the_port_of_a_model_that_had_nothing_to_give(config, tmp_path):
    model = put_in_use(config(), offer(declined="no copy"))
    assert os.listdir(tmp_path) == []
    registry.offer_again(model, offer())
    assert is_served(address_of(tmp_path))


def test_where_there_is_no_server_a_reload_opens_none(servers):
    model = put_in_use(settings(listen_port=1))
    registry.offer_again(model, offer())
    assert servers == []
    with source(WEIGHTS, config=settings()) as other:  # the port is taken meanwhile
        port = other.address.port
        model = put_in_use(settings(listen_port=port))
        registry.offer_again(model, offer())
    assert servers == []
    assert not registry._pending  # their weights are not kept for nobody


# Changes of weights

RELOAD = Change("reload_weights", After.WHOLE)


class Living(nn.Module):
    """A model of one weight that is served from where it is."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3, bias=False)


@contextlib.contextmanager
def living(config, instance, group=TARGET, ranks=None):
    """A model in use of an instance of its own, and its status."""
    model = Living()
    made = offer(group=group, tensors={"layer.weight": model.layer.weight.detach()})
    member = Member(config, HOST, instance=instance, ranks=ranks)
    registry.put_in_use(model, "path", member, made)

    def status():
        models = server_of(model).status(0).models
        return next(one for one in models if one.identity.group == group)

    try:
        yield model, status
    finally:
        registry.wait_for_renewal()


def test_weights_that_change_are_withdrawn_before_and_offered_anew_after(config, log):
    with living(config(), "one") as (model, status):
        before = status()
        with registry.changing("one", RELOAD):
            assert (status().state, status().reason) == (
                "changing",
                "the weights are being changed (reload_weights)",
            )
            model.layer.weight.data.add_(1)
            registry.loaded_from(model, "192.0.2.1:7")
        registry.wait_for_renewal()
        after = status()
        assert (after.state, after.epoch, after.loaded_from) == ("serving", 2, "192.0.2.1:7")
        assert after.weights != before.weights
        assert log[-1] == (
            f"NetLoader rank 0: a source of the weights {after.weights} since reload_weights, "
            "epoch 2"
        )
        tensors = {"layer.weight": model.layer.weight.detach()}
        assert after.weights == store_of(tensors).digests.weights


def test_the_status_says_where_weights_come_from_or_what_has_changed_them(config):
    with living(config(), "one") as (model, status):
        for source, change, expected in (
            ("", 0, "disk"),
            ("", 1, "reload_weights"),
            ("192.0.2.1:7", 1, "192.0.2.1:7"),
            ("", 0, "192.0.2.1:7"),
            ("", 1, "reload_weights"),
        ):
            with registry.changing("one", RELOAD):
                model.layer.weight.data.add_(change)
                if source:
                    registry.loaded_from(model, source)
            registry.wait_for_renewal()
            assert status().loaded_from == expected


def test_other_weights_are_no_longer_the_revision_that_was_loaded(config):
    model, revision = Living(), Revision("0" * 40, True)
    made = offer(tensors={"layer.weight": model.layer.weight.detach()})
    made = dataclasses.replace(made, identity=identity(revision=revision))
    registry.put_in_use(model, "path", Member(config(), HOST, instance="one"), made)
    for change, expected in ((0, revision), (1, Revision())):
        with registry.changing("one", RELOAD):
            model.layer.weight.data.add_(change)
        registry.wait_for_renewal()
        [status] = server_of(model).status(0).models
        assert status.identity.revision == expected


def test_a_checkpoint_is_seen_through_weights_until_they_change(config):
    model = Living()
    weight = model.layer.weight.detach()
    made = offer(tensors={"layer.weight": weight})
    made = dataclasses.replace(made, view=Viewed(b"", [weight]))
    registry.put_in_use(model, "path", Member(config(), HOST, instance="one"), made)
    for change, view in ((0, made.view), (1, None), (-1, None)):
        with registry.changing("one", RELOAD):
            assert server_of(model)._offers[TARGET].view is None
            model.layer.weight.data.add_(change)
        registry.wait_for_renewal()
        now = server_of(model)._offers[TARGET]
        assert now.view is view
    assert now.why_no_view == "the weights are others since reload_weights"


def other_weights():
    return {"w": torch.rand(3, 3), "b": torch.rand(3)}


def records_of(model):
    """How a load fills a model that reads something which it does not keep as it is."""
    seen = Trace()
    with seen:
        for name, tensor in seen.watch(other_weights().items()):
            model.layer.weight.data.copy_(tensor) if name == "w" else tensor.exp()
    return seen.records(model)


def seen_through(config, view=True):
    """A model in use of the instance `one`, and its weight."""
    model = Living()
    weight, records = model.layer.weight.detach(), records_of(model)
    tensors = {"layer.weight": weight}
    made = dataclasses.replace(
        offer(tensors=tensors), view=viewed(records, tensors) if view else None
    )
    registry.put_in_use(model, "path", Member(config(), HOST, instance="one"), made)
    return model, weight


def read(model, weight, weights):
    for name, tensor in registry.reading(model, weights.items()):
        weight.copy_(tensor) if name == "w" else tensor.exp()


def test_a_checkpoint_is_seen_through_weights_that_it_was_read_into_again(config):
    model, weight = seen_through(config)

    def changed(*steps):
        with registry.changing("one", RELOAD):
            for weights in steps:
                read(model, weight, weights)
        registry.wait_for_renewal()
        return server_of(model)._offers[TARGET]

    for steps in ([other_weights()], [{name: one} for name, one in other_weights().items()]):
        now = changed(*steps)
        assert [one.data_ptr() for one in now.view.parameters] == [weight.data_ptr()]
        [w, b] = decode(now.view.records).tensors
        assert w.copies and b.kept[0].values == bytes_of(steps[-1]["b"]).numpy().tobytes()
    now = changed({"w": torch.rand(3, 3)})
    why = "this reload did not include b, so instances of other sizes cannot load from here"
    assert (now.view, now.why_no_view) == (None, why)
    assert changed(other_weights()).view is not None


@pytest.mark.parametrize(
    "first",
    [
        Change("load_weights", After.UNKNOWN),
        Change("update_weights", After.MORE, goes_on=True),
    ],
    ids=lambda first: first.name,
)
@pytest.mark.parametrize(
    ("between", "last"),
    [
        (Change("EPLB", After.MOVED), Change("apply_model", After.WHOLE, perhaps=True)),
        (Change("reset_weights", After.MORE), Change("finish_weight_update", After.WHOLE)),
        (None, RELOAD),
    ],
    ids=["EPLB", "reset", "kernel format"],
)
def test_what_was_read_says_nothing_of_weights_that_were_changed_in_other_ways_since(
    config, first, between, last
):
    model, weight = seen_through(config)
    with registry.changing(model, first):
        read(model, weight, other_weights())
    if between is not None:
        with registry.changing("one", between):
            weight.copy_(weight.flip(0).clone())
    with registry.changing("one", last):
        weight.copy_(weight.flip(1).clone())
    registry.wait_for_renewal()
    now = server_of(model)._offers[TARGET]
    assert now.view is None and now.store is not None


def test_an_update_of_several_calls_is_seen_as_one_unless_something_else_comes_between(config):
    model, weight = seen_through(config)
    update = Change("update_weights", After.MORE, goes_on=True)
    for between, is_seen in ((None, True), (Change("reset_weights", After.MORE), False)):
        with registry.changing("one", Change("start_weight_update", After.MORE)):
            pass
        for name, tensor in other_weights().items():
            with registry.changing("one", update):
                read(model, weight, {name: tensor})
            if between is not None and name == "w":
                with registry.changing("one", between):
                    pass
        with registry.changing("one", Change("finish_weight_update", After.WHOLE, goes_on=True)):
            pass
        registry.wait_for_renewal()
        assert (server_of(model)._offers[TARGET].view is not None) is is_seen


def test_values_that_are_kept_aside_are_new_even_if_all_other_weights_are_the_same(config):
    model, weight = seen_through(config)
    weights = other_weights() | {"w": weight.clone()}
    with registry.changing("one", RELOAD):
        read(model, weight, weights)
    registry.wait_for_renewal()
    _, b = decode(server_of(model)._offers[TARGET].view.records).tensors
    assert b.kept[0].values == bytes_of(weights["b"]).numpy().tobytes()


def test_weights_that_cannot_be_followed_are_read_all_the_same(config, monkeypatch):
    model, _ = seen_through(config)
    monkeypatch.delattr(registry, "decode")
    weights = iter(())
    assert registry.reading(model, weights) is weights


def test_weights_of_which_nobody_said_that_they_are_complete_are_not_seen_through(config):
    model, weight = seen_through(config)
    with registry.changing(model, Change("load_weights", After.UNKNOWN)):
        read(model, weight, other_weights())
    assert registry._offered[model].seen is None
    with registry.changing("one", Change("finish_weight_update", After.WHOLE, goes_on=True)):
        pass
    registry.wait_for_renewal()
    assert server_of(model)._offers[TARGET].view is None


def test_where_experts_have_moved_a_reload_says_nothing_of_what_is_where(config):
    model, weight = seen_through(config)
    with registry.changing("one", Change("EPLB", After.MOVED)):
        pass
    with registry.changing("one", RELOAD):
        read(model, weight, other_weights())
    registry.wait_for_renewal()
    assert server_of(model)._offers[TARGET].view is None


def test_weights_that_come_with_their_records_have_a_view_and_the_next_ones_have_none(config):
    model, weight = seen_through(config, view=False)
    for records, is_seen in ((records_of(model), True), (None, False)):
        with registry.changing("one", RELOAD):
            weight.add_(1)
            if records is not None:
                registry.came_with(model, records)
        registry.wait_for_renewal()
        assert (server_of(model)._offers[TARGET].view is not None) is is_seen


def test_what_was_read_in_a_reload_that_failed_says_nothing_of_the_next_weights(config):
    model, weight = seen_through(config)
    with pytest.raises(ZeroDivisionError), registry.changing("one", RELOAD):
        for _ in registry.reading(model, other_weights().items()):
            weight.add_(1)
        raise ZeroDivisionError
    registry.wait_for_renewal()
    with registry.changing("one", RELOAD):
        weight.add_(1)
    registry.wait_for_renewal()
    assert server_of(model)._offers[TARGET].view is None


def test_a_reload_that_failed_before_it_wrote_anything_leaves_the_view_as_it_was(config):
    model, _ = seen_through(config)
    before = server_of(model)._offers[TARGET].view
    with pytest.raises(ZeroDivisionError), registry.changing("one", RELOAD):
        for _ in registry.reading(model, other_weights().items()):
            pass
        raise ZeroDivisionError
    registry.wait_for_renewal()
    assert server_of(model)._offers[TARGET].view is before


def test_two_instances_of_a_process_change_one_by_one(config):
    with living(config(), "one") as (model, one), living(settings(), "two") as (_, two):
        with registry.changing(model, RELOAD):
            assert (one().state, two().state) == ("changing", "serving")
        with registry.changing("two", Change("sleep", After.MORE, sleep=1)):
            pass
        registry.wait_for_renewal()
        assert (one().state, two().state) == ("serving", "asleep")


def test_target_and_draft_of_an_instance_change_together(config):
    with (
        living(config(), "one") as (_, target),
        living(config(), "one", DRAFT) as (draft_model, draft),
    ):
        with registry.changing(draft_model, RELOAD):
            assert (target().state, draft().state) == ("changing", "changing")
        registry.wait_for_renewal()
        assert (target().state, draft().state) == ("serving", "serving")


def test_weights_that_are_not_what_they_were_after_a_failed_change_are_not_offered(config, log):
    with living(config(), "one") as (model, status):
        with pytest.raises(ZeroDivisionError), registry.changing("one", RELOAD):
            model.layer.weight.data.add_(1)
            raise ZeroDivisionError
        registry.wait_for_renewal()
        reason = "the weights are not those of before reload_weights"
        assert (status().state, status().reason) == ("cannot_serve", reason)
        assert log[-1] == f"NetLoader rank 0: no longer a source since reload_weights: {reason}"
        with registry.changing("one", RELOAD):
            pass
        registry.wait_for_renewal()
        assert status().state == "serving"


def test_weights_found_changed_are_offered_anew(config):
    with living(config(), "one") as (model, status):
        before, server = status(), server_of(model)
        model.layer.weight.data.add_(1)
        server.renew(TARGET)
        registry.wait_for_renewal()
        assert (status().state, status().epoch) == ("serving", 2)
        assert status().weights != before.weights


@pytest.mark.parametrize("kind", [LayoutUnsupported, ValueError])
def test_what_a_rank_had_is_not_what_it_has_once_it_was_found_changed(config, monkeypatch, kind):
    def fail(self, **how):
        raise kind("odd")

    monkeypatch.setattr(Renewal, "hashed", fail)
    store = HashStore()
    one, other = (Ranks(rank, range(2), TARGET, store) for rank in (0, 1))
    with living(config(), "one", ranks=one) as (model, status):
        one.publish(status().weights)
        server_of(model).renew(TARGET)
        registry.wait_for_renewal()
        assert status().state == "cannot_serve"
        assert other.present({0: "of the load"}) == {}


def test_a_model_that_is_no_source_is_not_one_after_its_weights_have_changed(config):
    model = Living()
    made = offer(declined="no copy")
    registry.put_in_use(model, "path", Member(config(), HOST, instance="one"), made)
    assert not registry.is_renewable(model)
    with registry.changing("one", RELOAD):
        pass
    registry.wait_for_renewal()
    [status] = server_of(model).status(0).models
    assert (status.state, status.reason) == ("cannot_serve", "no copy")


def test_what_nobody_knows_changes_without_notice():
    with registry.changing("nobody", RELOAD), registry.changing(Living(), RELOAD):
        pass


def test_raw_tensors_are_copied_only_when_nobody_can_have_them(config):
    model = Living()
    raw = model.layer.weight.detach()
    made = offer(tensors={"layer.weight": raw})
    model.layer.weight = nn.Parameter(torch.empty(0), requires_grad=False)
    registry.put_in_use(model, "path", Member(config(), HOST, instance="one"), made, [model.layer])
    new = torch.rand(3, 3)
    with registry.changing("one", Change("reload_weights", After.WHOLE, at_once=False)):
        model.layer.weight = nn.Parameter(new, requires_grad=False)
        registry.processing(model.layer)
        assert made.store.withdrawn.is_set() and torch.equal(raw, new)
        model.layer.weight = nn.Parameter(torch.empty(0), requires_grad=False)
    registry.wait_for_renewal()
    [status] = server_of(model).status(0).models
    assert status.weights == store_of({"layer.weight": new}).digests.weights
    registry.processing(nn.Linear(1, 1))


def test_an_instance_whose_models_are_gone_is_forgotten(config):
    with living(config(), "one") as (model, _):
        assert "one" in registry._instances
        del model, _
    collect()
    assert "one" not in registry._instances


# Ranks that tell where they listen


def test_where_a_rank_listens_is_told_to_the_others_and_to_whoever_asks(config):
    store = HashStore()
    one, other = (Ranks(rank, range(2), TARGET, store) for rank in (0, 1))
    models = []
    for ranks in (one, other):
        made = dataclasses.replace(offer(rank=ranks.rank), endpoints=ranks.endpoints)
        models.append(nn.Linear(1, 1))
        member = Member(config(), HOST, worker=ranks.rank, ranks=ranks)
        registry.put_in_use(models[-1], "path", member, made)
    servers = [server_of(model) for model in models]
    endpoints = {rank: server.endpoint for rank, server in enumerate(servers)}
    for server in servers:
        [status] = server.status(0).models
        assert status.endpoints == endpoints
    assert registry.in_use(models[0]).ranks.endpoints() == endpoints


def test_a_rank_that_listens_only_after_a_reload_tells_where(config):
    ranks = Ranks(0, range(2), TARGET, HashStore())
    model = nn.Linear(1, 1)
    nothing = offer(declined="no copy")
    registry.put_in_use(model, "path", Member(config(), HOST, ranks=ranks), nothing)
    assert ranks.endpoints() == {}
    registry.offer_again(model, offer())
    assert ranks.endpoints() == {0: server_of(model).endpoint}


def test_a_rank_that_is_no_source_tells_nothing(config):
    store = HashStore()
    ranks = Ranks(0, range(2), TARGET, store)
    model = nn.Linear(1, 1)
    member = Member(config(LISTEN_PORT=1), HOST, ranks=ranks)
    registry.put_in_use(model, "path", member, offer())
    assert ranks.endpoints() == {}


# Loads in progress


def loading(rank=0, group=TARGET):
    return Offer(identity(rank=rank, group=group), None, "being loaded", code=Code.LOADING)


def states(server):
    return [(model.state, model.epoch) for model in server.status(0).models]


def test_a_server_listens_while_its_model_is_being_loaded_and_then_serves_it(
    config, servers, tmp_path
):
    ranks = Ranks(0, range(2), TARGET, HashStore())
    relay = registry.begin_load(Member(config(), HOST, [DRAFT], ranks=ranks), loading())
    [server] = servers
    address = address_of(tmp_path)
    assert str(address) == relay.peer.address == ranks.endpoints()[0].address
    assert states(server) == [("loading", 0)]
    with ElasticClient.connect(address, connect=5.0, handshake=5.0, progress=5.0) as client:
        for group in (TARGET, DRAFT):
            with pytest.raises(SourceBusy, match="loading"):
                client.join(Join(identity(group=group)))
    model = put_in_use(config())
    assert server_of(model) is server
    assert address_of(tmp_path) == address
    assert states(server) == [("serving", 1)]
    assert is_served(address)


def test_a_draft_is_loaded_beside_its_target_on_the_same_port(config, servers):
    target = put_in_use(config(), to_come=[DRAFT])
    registry.begin_load(Member(config(), HOST), loading(group=DRAFT))
    assert len(servers) == 1
    assert states(server_of(target)) == [("serving", 1), ("loading", 0)]


def test_a_load_that_is_given_up_leaves_no_port_open(config, servers, tmp_path):
    relay = registry.begin_load(Member(config(), HOST), loading())
    registry.give_up_load(relay)
    assert servers == [] and [*tmp_path.iterdir()] == []


def test_a_draft_that_is_given_up_leaves_its_target_served(config, servers, tmp_path):
    target = put_in_use(config())
    relay = registry.begin_load(Member(config(), HOST), loading(group=DRAFT))
    registry.give_up_load(relay)
    assert states(server_of(target)) == [("serving", 1)]
    assert is_served(address_of(tmp_path))


def test_without_a_port_nobody_hears_of_a_load(config, servers):
    assert registry.begin_load(Member(config(LISTEN_PORT=1), HOST), loading()) is None
    assert servers == []


def test_a_load_whose_port_is_taken_goes_on_alone(config, servers, log, caplog):
    with source(WEIGHTS) as other:
        port = other.address.port
        del log[:]
        assert registry.begin_load(Member(config(LISTEN_PORT=port), HOST), loading()) is None
    assert servers == []
    assert any("cannot listen" in line for line in log)
    assert "ERROR" not in {
        record.levelname for record in caplog.records
    }  # it may be free in the end
