"""Models in use in a process, and the servers that others pull them from."""

import gc
import os

import pytest
import torch
from torch import nn

from vllm_ascend.model_loader.netloader import registry
from vllm_ascend.model_loader.netloader.config import parse_config
from vllm_ascend.model_loader.netloader.errors import LoadFailed
from vllm_ascend.model_loader.netloader.serve import Offer
from vllm_ascend.model_loader.netloader.utils import parse_address

from .support import HOST, dial, identity, load, settings, source, store_of

TARGET, DRAFT = "netloader", "netloader_draft"
WEIGHTS = {"a": torch.ones(1)}


@pytest.fixture(autouse=True)
def servers(monkeypatch):
    """The servers of this process, and none of them left afterwards."""
    known = []
    monkeypatch.setattr(registry, "_servers", known)
    yield known
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


def put_in_use(config, offered=None, host=HOST, to_come=()):
    """Load a model; it is in use for as long as what is returned is there."""
    model = nn.Linear(1, 1)
    registry.put_in_use(model, "path", config, host, offered or offer(), to_come)
    return model


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
    registry.put_in_use(model, "path", config(), HOST, offer(), ())
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
    gc.collect()
    second = put_in_use(config())
    assert [server_of(second)] == servers
    assert is_served(address_of(tmp_path))


def test_ranks_have_servers_of_their_own(config, tmp_path):
    first, second = put_in_use(config()), put_in_use(config(), offer(rank=1))
    assert server_of(first) is not server_of(second)
    assert address_of(tmp_path, 0) != address_of(tmp_path, 1)


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
    assert server_of(model) is None
    assert servers == []
    assert f"cannot listen on port {other.address.port}, so this instance is no source" in log[0]


# The end of a model


def test_a_model_that_is_gone_is_served_no_more(config, servers, tmp_path):
    target = put_in_use(config())
    draft = put_in_use(config(), offer(group=DRAFT))
    server, address = server_of(target), address_of(tmp_path)
    del draft
    gc.collect()
    assert groups(server) == [TARGET]
    assert is_served(address)
    del target
    gc.collect()
    assert os.listdir(tmp_path) == []
    assert servers == []
    with pytest.raises(OSError):
        dial(address, 1)


# Reloads


def test_a_model_that_was_reloaded_is_offered_again(config, tmp_path):
    model = put_in_use(config())
    known, address = registry.in_use(model), address_of(tmp_path)
    known.server.withdraw(TARGET)
    assert is_refused(address, TARGET, "changing: the weights are being replaced")
    new = {"a": torch.full((1,), 7.0)}
    registry.offer_again(known, offer(tensors=new))
    assert is_served(address, tensors=new)
    assert known.server.status(0).models[0].epoch == 2


def test_a_reload_opens_the_port_of_a_model_that_had_nothing_to_give(config, tmp_path):
    model = put_in_use(config(), offer(declined="no copy"))
    assert os.listdir(tmp_path) == []
    registry.offer_again(registry.in_use(model), offer())
    assert is_served(address_of(tmp_path))


def test_where_there_is_no_server_a_reload_opens_none(servers):
    model = put_in_use(settings(listen_port=1))
    registry.offer_again(registry.in_use(model), offer())
    assert servers == []
    with source(WEIGHTS, config=settings()) as other:  # the port is taken meanwhile
        port = other.address.port
        model = put_in_use(settings(listen_port=port))
        registry.offer_again(registry.in_use(model), offer())
    assert servers == []
