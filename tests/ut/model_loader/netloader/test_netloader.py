"""The only tests here that import vLLM, which takes seconds; those with an engine are elsewhere."""

import dataclasses
import gc
import os

import pytest
import torch
from torch import nn
from vllm.config import CompilationConfig, LoadConfig
from vllm.model_executor import model_loader as vllm_loaders
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader
from vllm.platforms import current_platform

import vllm_ascend
from vllm_ascend.model_loader.netloader import netloader, register_netloader
from vllm_ascend.model_loader.netloader.compat import remember_registrations
from vllm_ascend.model_loader.netloader.config import KEYS, parse_config
from vllm_ascend.model_loader.netloader.errors import (
    ConfigError,
    LayoutUnsupported,
    LoadFailed,
)
from vllm_ascend.model_loader.netloader.executor.devices import amx, device_of
from vllm_ascend.model_loader.netloader.netloader import ModelNetLoaderElastic
from vllm_ascend.model_loader.netloader.serve import Offer
from vllm_ascend.model_loader.netloader.utils import Address, parse_address

from .support import (
    DEVICE,
    HOST,
    closed_port,
    dial,
    identity,
    load,
    python,
    source,
    weights_of,
)

# Registration


def run(program, *arguments):
    """The output lines of a program in a fresh process, without what vLLM logs."""
    process = python("-c", f"import logging; logging.disable()\n{program}", *arguments)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 0
    return output.splitlines()


_LAZY = """
import importlib.util, sys
import vllm_ascend
name = "vllm.model_executor.model_loader"
vllm_ascend.register_model_loader()
vllm_ascend.register_model_loader()
print("torch" in sys.modules, name in sys.modules)
importlib.util.find_spec(name)  # looking for a module is not importing it
import vllm.model_executor.model_loader as loaders
registered = loaders._LOAD_FORMAT_TO_MODEL_LOADER.get("netloader")
print(registered.__name__)
print(loaders.__spec__.loader is loaders.__loader__, type(loaders.__loader__).__name__)
vllm_ascend.register_model_loader()
print(loaders._LOAD_FORMAT_TO_MODEL_LOADER["netloader"] is registered)
print([finder for finder in sys.meta_path if "vllm_ascend" in type(finder).__module__])
"""


def test_registration_waits_until_vllm_imports_its_loaders():
    lines = run(_LAZY)
    assert lines == [
        "False False",
        "ModelNetLoaderElastic",
        "True SourceFileLoader",
        "True",
        "[]",
    ]


# Each order in a child of a process that has imported what takes long, and that they share.
_ORDERS = """
import os, sys
import torch, vllm.model_executor.layers.attention
import vllm_ascend.model_loader.netloader as netloader
from vllm.plugins import load_general_plugins as plugins
package, name = "vllm.model_executor.model_loader", "vllm_ascend.model_loader.netloader.netloader"
assert package not in sys.modules and name not in sys.modules
errors = []
netloader.logger.error = lambda *line: errors.append(line)
def loaders():
    import vllm.model_executor.model_loader
def base():
    import vllm.model_executor.model_loader.base_loader
def hook():
    import vllm_ascend
    vllm_ascend.register_model_loader()
def face():
    from vllm_ascend.model_loader.netloader.netloader import ModelNetLoaderElastic
def lost():
    sys.modules[name] = None
for order in sys.argv[1:]:
    if os.fork() == 0:
        for step in order.split():
            globals()[step]()
        formats = sys.modules[package]._LOAD_FORMAT_TO_MODEL_LOADER
        registered = formats.get("netloader")
        theirs = getattr(sys.modules[name], "ModelNetLoaderElastic", None)
        finders = [one for one in sys.meta_path if "vllm_ascend" in type(one).__module__]
        there = registered is theirs is not None
        print(order, there, len(errors), "auto" in formats, finders, flush=True)
        os._exit(0)
    os.wait()
"""


def test_the_load_format_is_there_in_whichever_order_things_are_imported():
    orders = [
        "plugins face",
        "hook hook face hook",
        "plugins loaders face",
        "plugins base face",
        "face plugins",
        "loaders plugins face",
        "face face plugins plugins",
    ]
    # VLLM_PLUGINS may keep the hook from being called; then importing registers nothing.
    without = ["loaders face", "face"]
    # Where it cannot be registered, the other load formats are there all the same.
    failing = ["lost hook loaders", "lost loaders hook"]
    assert run(_ORDERS, *orders, *without, *failing) == [
        *(f"{order} True 0 True []" for order in orders),
        *(f"{order} False 0 True []" for order in without),
        *(f"{order} False 1 True []" for order in failing),
    ]


def test_what_prevents_registration_is_logged(monkeypatch, log):
    monkeypatch.setattr(vllm_loaders, "_LOAD_FORMAT_TO_MODEL_LOADER", {})

    def fail(load_format):
        raise RuntimeError("not\ntoday")

    monkeypatch.setattr(vllm_loaders, "register_model_loader", fail)
    register_netloader()
    assert log[-1].endswith(
        "no load format netloader, as registering it failed: RuntimeError: not today"
    )


def test_registration_is_immediate_once_the_loaders_are_imported(monkeypatch):
    monkeypatch.setattr(vllm_loaders, "_LOAD_FORMAT_TO_MODEL_LOADER", {})
    register_netloader()
    formats = vllm_loaders._LOAD_FORMAT_TO_MODEL_LOADER
    assert formats == {"netloader": ModelNetLoaderElastic}


def test_registering_again_changes_nothing(monkeypatch):
    monkeypatch.setattr(vllm_loaders, "_LOAD_FORMAT_TO_MODEL_LOADER", {})
    register_netloader()
    monkeypatch.setattr(vllm_loaders, "register_model_loader", None)  # would warn of a duplicate
    vllm_ascend.register_model_loader()
    register_netloader()


@pytest.mark.parametrize("is_cpu", [True, False])
def test_registration_asks_for_amx_tiles_where_vllm_runs_on_the_cpu(is_cpu, monkeypatch):
    asked = []
    monkeypatch.setattr(amx, "request_amx_tiles", lambda: asked.append(True))
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda _: is_cpu)
    register_netloader()
    assert asked == [True] * is_cpu


def test_vllm_makes_the_loader_from_the_load_format():
    vllm_ascend.register_model_loader()
    loader = vllm_loaders.get_model_loader(LoadConfig(load_format="netloader"))
    assert isinstance(loader, ModelNetLoaderElastic)


def test_vllm_finds_the_plugin_by_its_entry_point():
    from importlib.metadata import entry_points

    [plugin] = entry_points(group="vllm.general_plugins", name="ascend_model_loader")
    assert plugin.load() is vllm_ascend.register_model_loader


# The loader


def make(**extra_config):
    return ModelNetLoaderElastic(
        LoadConfig(load_format="netloader", model_loader_extra_config=extra_config)
    )


def test_a_wrong_configuration_ends_the_start_before_anything_is_loaded():
    with pytest.raises(ConfigError, match="CHUNK_MIB is 0"):
        make(CHUNK_MIB=0)


def test_the_disk_is_read_as_if_netloader_had_not_been_asked():
    config = LoadConfig(
        load_format="netloader",
        download_dir="/somewhere",
        use_tqdm_on_load=False,
        model_loader_extra_config={"MODEL": "m"},
    )
    disk = ModelNetLoaderElastic(config)._disk.load_config
    assert disk.load_format == "auto"
    assert disk.model_loader_extra_config == {}
    assert (disk.download_dir, disk.use_tqdm_on_load) == ("/somewhere", False)
    assert config.load_format == "netloader"
    assert config.model_loader_extra_config == {"MODEL": "m"}


def test_keys_of_vllms_default_loader_are_passed_on_to_it():
    keys = {"enable_multithread_load": True, "num_threads": 3}
    assert make(MODEL="m", **keys)._disk.load_config.model_loader_extra_config == keys


def test_a_key_that_nobody_knows_is_refused_by_name_and_the_known_ones_are_listed():
    with pytest.raises(ConfigError) as error:
        make(num_threads=3, model="m")
    assert "'model', 'num_threads' for vLLM's default loader" in str(error.value)
    assert "{'model'}" in str(error.value)  # vLLM's own words, of the unknown one alone
    assert all(key in str(error.value) for key in KEYS)


def sources(*texts, rank=0):
    return [{"device_id": rank, "sources": [*texts]}]


def test_a_malformed_address_is_one_warning_at_the_rank_whose_it_is(log):
    loader = make(SOURCE=[*sources("tcp://a:1", "b:2"), *sources("c", rank=1)])
    assert log == []
    assert loader._sources(0) == (Address("b", 2),)
    [line] = log
    assert line.startswith("NetLoader rank 0: malformed source 'tcp://a:1': ")


def test_without_a_good_address_the_reasons_for_going_to_disk_are_the_malformed_ones(log):
    loader = make(SOURCE=sources("a", "b:0"))
    with pytest.raises(LoadFailed) as failed:
        loader._sources(0)
    assert str(failed.value) == "; ".join(line.partition("rank 0: ")[2] for line in log)
    assert len(log) == 2


def test_what_is_wrong_with_malformed_addresses_is_among_the_reasons_of_a_failed_load():
    address = closed_port()
    loader = make(SOURCE=sources("a", str(address)), LISTEN_PORT=1)
    with pytest.raises(LoadFailed) as failed:
        loader._pull({}, (), [address], identity(), DEVICE)
    assert str(failed.value).startswith("malformed source 'a': no port")
    assert f"; {address}: cannot connect: " in str(failed.value)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ([], None),
        (sources("a:1"), None),
        (sources(), "SOURCE has no sources for this rank"),
        ([{"device_id": 0}, *sources("a:1", rank=1)], "SOURCE has no sources for this rank"),
        (sources("a:1", rank=3), "SOURCE has entries for rank 3 only"),
    ],
)
def test_a_rank_for_which_source_names_nothing_says_so(given, why, log):
    make(SOURCE=given)._sources(0)
    assert log == ([] if why is None else [f"NetLoader rank 0: loading from disk, as {why}"])


class NoDisk(DummyModelLoader):
    def __init__(self):
        self.asked = []

    def download_model(self, model_config):
        self.asked.append(model_config)


@pytest.mark.parametrize(
    ("sources", "downloads"),
    [
        ([], True),
        ([{"device_id": 0, "sources": []}], True),
        ([{"device_id": 0, "sources": ["a"]}], True),
        ([{"device_id": 0, "sources": ["a:1"]}], False),
    ],
)
def test_nothing_is_downloaded_where_there_are_sources(sources, downloads):
    loader = make(SOURCE=sources)
    loader._disk = NoDisk()
    loader.download_model("model config")
    assert loader._disk.asked == (["model config"] if downloads else [])


def test_a_device_that_is_not_known_is_refused_by_name():
    with pytest.raises(LayoutUnsupported, match="'meta'"):
        device_of("meta", 16)


# Servers


@pytest.fixture
def servers(monkeypatch):
    """The servers of this process, and none of them left afterwards."""
    known = {}
    monkeypatch.setattr(netloader, "_servers", known)
    monkeypatch.setattr(netloader, "get_ip", lambda: HOST)
    yield known
    for server in known.values():
        server.stop()


WEIGHTS = {"a": torch.ones(1)}


def serve(config, rank=0, group="netloader", declined="", to_come=()):
    """Offer a small model, or none with a reason."""
    weights = None if declined else weights_of(WEIGHTS)
    offer = Offer(identity(rank=rank, group=group), weights, DEVICE, declined)
    return netloader._serve(config, offer, to_come)


def address_of(tmp_path, rank=0):
    return parse_address((tmp_path / f"rank_{rank}.txt").read_text())


def test_target_and_draft_share_one_server(servers, tmp_path):
    config = parse_config({"OUTPUT_PREFIX": f"{tmp_path}/rank_"})
    server = serve(config)
    assert serve(config, group="netloader_draft") is server
    groups = {one.group for one in server._status(0).identities}
    assert groups == {"netloader", "netloader_draft"}
    dial(address_of(tmp_path)).close()


def is_refused(address, group, reason):
    with pytest.raises(LoadFailed, match=f"refused: {reason}"):
        load([address], {"a": torch.zeros(1)}, who=identity(group=group))


def test_without_a_model_to_give_there_is_no_port_and_no_port_file(servers, tmp_path, log):
    config = parse_config({"OUTPUT_PREFIX": f"{tmp_path}/rank_"})
    server = serve(config, declined="no copy", to_come=["netloader_draft"])
    assert serve(config, group="netloader_draft", declined="none either") is server
    assert not server.listening
    assert os.listdir(tmp_path) == []
    assert log == []


def test_a_draft_opens_the_port_and_its_target_is_refused_with_the_reason(servers, tmp_path):
    config = parse_config({"OUTPUT_PREFIX": f"{tmp_path}/rank_"})
    server = serve(config, declined="no copy", to_come=["netloader_draft"])
    assert serve(config, group="netloader_draft") is server
    is_refused(address_of(tmp_path), "netloader", "no copy")
    load([address_of(tmp_path)], WEIGHTS, who=identity(group="netloader_draft"))


def test_a_draft_that_is_not_to_be_had_is_refused_with_the_reason(servers, tmp_path):
    config = parse_config({"OUTPUT_PREFIX": f"{tmp_path}/rank_"})
    serve(config, to_come=["netloader_draft"])
    serve(config, group="netloader_draft", declined="no copy")
    is_refused(address_of(tmp_path), "netloader_draft", "no copy")


def test_the_host_listened_on_is_the_one_published(servers, tmp_path, monkeypatch):
    monkeypatch.setattr(netloader, "get_ip", lambda: "192.0.2.1")
    config = parse_config({"OUTPUT_PREFIX": f"{tmp_path}/rank_", "LISTEN_HOST": HOST})
    serve(config)
    assert address_of(tmp_path).host == HOST


def test_ranks_have_servers_of_their_own(servers, tmp_path):
    config = parse_config({"OUTPUT_PREFIX": f"{tmp_path}/rank_"})
    assert serve(config, 0) is not serve(config, 1)
    assert address_of(tmp_path, 0) != address_of(tmp_path, 1)


@pytest.mark.parametrize("port", [0, 1023, 65536])
def test_a_port_out_of_range_is_no_server(servers, port, log):
    assert serve(parse_config({"LISTEN_PORT": port})) is None
    assert f"no server, as LISTEN_PORT {port} is outside 1024-65535" in log[-1]


def test_a_port_that_is_taken_is_no_server_and_one_error(servers, log):
    with source({"a": torch.ones(1)}) as other:
        config = parse_config({"LISTEN_PORT": other.address.port})
        assert serve(config) is None
    assert f"cannot listen on port {other.address.port}" in log[-1]
    assert servers == {}


def test_a_model_that_is_gone_is_served_no_more(servers, tmp_path):
    config = parse_config({"OUTPUT_PREFIX": f"{tmp_path}/rank_"})
    server = serve(config)
    address = address_of(tmp_path)
    target, draft = nn.Linear(1, 1), nn.Linear(1, 1)
    for model, group in ((target, "netloader"), (draft, "netloader_draft")):
        who = identity(group=group)
        server.offer(Offer(who, weights_of(dict(model.named_parameters())), DEVICE))
        netloader._in_use[model] = netloader._InUse(server, who, "path", None)
        netloader.weakref.finalize(model, netloader._retire, server, group)
    del draft, model
    gc.collect()
    assert [one.group for one in server._status(0).identities] == ["netloader"]
    del target
    gc.collect()
    assert os.listdir(tmp_path) == []
    assert servers == {}
    with pytest.raises(OSError):
        dial(address, 1)


# What making a model leaves in the configuration


@dataclasses.dataclass
class Config:
    compilation_config: CompilationConfig


def test_registrations_are_brought_back_as_they_were():
    config = Config(CompilationConfig())
    compilation = config.compilation_config
    compilation.static_forward_context["before"] = 1
    compilation.custom_ops.append("+before")
    contexts = compilation.static_forward_context
    restore = remember_registrations(config)
    contexts["made"] = 2
    del contexts["before"]
    compilation.custom_ops.append("+made")
    compilation.static_all_moe_layers.append("made")
    restore()
    assert compilation.static_forward_context is contexts  # others may hold it
    assert contexts == {"before": 1}
    assert compilation.custom_ops == ["+before"]
    assert compilation.static_all_moe_layers == []
    restore()
    assert contexts == {"before": 1}
