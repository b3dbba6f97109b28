"""The only tests here that import vLLM, which takes seconds; those with an engine are elsewhere."""

import contextlib
import dataclasses
import functools
import re
import threading
import types

import pytest
import torch
from torch.distributed import HashStore
from vllm.config import LoadConfig
from vllm.model_executor import model_loader as vllm_loaders
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

from tests.checkpoints import rebuild
from tests.identity import identity
from vllm_ascend.model_loader.netloader import metrics, netloader, register_netloader, registry
from vllm_ascend.model_loader.netloader.agreement import AS_CONFIGURED, Order, Ranks
from vllm_ascend.model_loader.netloader.changes import After, Change
from vllm_ascend.model_loader.netloader.compat import load_watched
from vllm_ascend.model_loader.netloader.config import KEYS
from vllm_ascend.model_loader.netloader.errors import (
    ChosenToRead,
    ConfigError,
    LayoutUnsupported,
    LoadFailed,
)
from vllm_ascend.model_loader.netloader.executor.chunks.digests import of_instance
from vllm_ascend.model_loader.netloader.executor.chunks.manifest import PROCESSED, RAW
from vllm_ascend.model_loader.netloader.executor.devices.choose import device_of
from vllm_ascend.model_loader.netloader.executor.model import trace
from vllm_ascend.model_loader.netloader.executor.view.records import decode
from vllm_ascend.model_loader.netloader.interaction.cold_start import Choice, Phase
from vllm_ascend.model_loader.netloader.load import Loaded
from vllm_ascend.model_loader.netloader.loading.view import Instance
from vllm_ascend.model_loader.netloader.netloader import ModelNetLoaderElastic
from vllm_ascend.model_loader.netloader.serve import Offer
from vllm_ascend.model_loader.netloader.utils import Address, Lookup, Name

from .support import DEVICE, HOST, closed_port, settings, source, store_of

ALONE = Ranks(0, [0], "target")

# Registration


def test_what_prevents_registration_is_logged(monkeypatch, log):
    monkeypatch.setattr(vllm_loaders, "_LOAD_FORMAT_TO_MODEL_LOADER", {})

    def fail(load_format):
        raise RuntimeError("not\ntoday")

    monkeypatch.setattr(vllm_loaders, "register_model_loader", fail)
    register_netloader()
    assert log[-1].endswith("registering load format netloader failed: RuntimeError: not today")


def test_registration_is_immediate_once_the_loaders_are_imported(monkeypatch):
    monkeypatch.setattr(vllm_loaders, "_LOAD_FORMAT_TO_MODEL_LOADER", {})
    register_netloader()
    formats = vllm_loaders._LOAD_FORMAT_TO_MODEL_LOADER
    assert formats == {"netloader": ModelNetLoaderElastic}


def test_registering_again_changes_nothing(monkeypatch):
    monkeypatch.setattr(vllm_loaders, "_LOAD_FORMAT_TO_MODEL_LOADER", {})
    register_netloader()
    monkeypatch.setattr(vllm_loaders, "register_model_loader", None)  # would warn of a duplicate
    register_netloader()


def test_vllm_makes_the_loader_from_the_load_format():
    register_netloader()
    loader = vllm_loaders.get_model_loader(LoadConfig(load_format="netloader"))
    assert isinstance(loader, ModelNetLoaderElastic)


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
        make(num_threads=3, modell="m")
    assert "'modell', 'num_threads' for vLLM's default loader" in str(error.value)
    assert "{'modell'}" in str(error.value)  # vLLM's own words, of the unknown one alone
    assert all(key in str(error.value) for key in KEYS)


def sources(*texts, rank=0):
    return [{"device_id": rank, "sources": [*texts]}]


def test_a_malformed_address_is_one_warning_at_the_rank_whose_it_is(log):
    loader = make(SOURCE=[*sources("tcp://a:1", "b:2"), *sources("c", rank=1)])
    assert log == []
    assert loader._sources(0, 0) == (Address("b", 2),)
    [line] = log
    assert line.startswith("NetLoader rank 0: malformed source 'tcp://a:1': ")


def test_without_a_good_address_the_reasons_for_going_to_disk_are_the_malformed_ones(log):
    loader = make(SOURCE=sources("a", "b:0"))
    with pytest.raises(LoadFailed) as failed:
        loader._sources(0, 0)
    assert str(failed.value) == "; ".join(line.partition("rank 0: ")[2] for line in log)
    assert len(log) == 2


def test_what_is_wrong_with_malformed_addresses_is_among_the_reasons_of_a_failed_load():
    address = closed_port()
    loader = make(SOURCE=sources("a", str(address)), LISTEN_PORT=1, SOURCE_WAIT=0)
    load = netloader._Load(identity(), DEVICE, ALONE, serving=False)
    with pytest.raises(LoadFailed) as failed:
        loader._pull(load, None, {}, (), [address], {})
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
    make(SOURCE=given)._sources(0, 2)
    assert log == ([] if why is None else [f"NetLoader rank 2: loading from disk, as {why}"])


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


# From sources, from disk, and what is offered then


ON_CPU = types.SimpleNamespace(
    device_config=types.SimpleNamespace(device="cpu"),
    parallel_config=types.SimpleNamespace(
        tensor_parallel_size=1, pipeline_parallel_size=1, data_parallel_index=0
    ),
)


class Steps:
    """A loader whose steps towards vLLM are noted and not taken."""

    def __init__(self, monkeypatch, **extra_config):
        self.taken, self.offered = [], []
        self.loader = make(**{"LISTEN_PORT": 1} | extra_config)
        self.failure = LoadFailed("192.0.2.7:1: gone")
        restore = functools.partial(self.taken.append, "restore")
        monkeypatch.setattr(netloader, "remember_state", lambda *configs: restore)
        monkeypatch.setattr(netloader, "get_ip", lambda: "192.0.2.1")
        monkeypatch.setattr(netloader, "groups_to_come", lambda config, identity: [])
        monkeypatch.setattr(netloader, "instance_of", lambda config: "instance")
        monkeypatch.setattr(netloader, "watch", lambda *_: [])
        monkeypatch.setattr(netloader.registry, "in_use", lambda _: None)
        monkeypatch.setattr(netloader.registry, "put_in_use", self._put_in_use)
        monkeypatch.setattr(self.loader, "_identify", lambda config: identity())
        monkeypatch.setattr(self.loader, "_load_from_sources", self._fail)
        monkeypatch.setattr(self.loader, "_follow_vllm", self._follow)

    def load(self):
        return self.loader.load_model(ON_CPU, types.SimpleNamespace(model="m", revision=None))

    def _fail(self, load, *_):
        self.taken.append("sources")
        raise self.failure

    def _follow(self, load, *_):
        self.taken.append(f"disk {load.from_disk}")
        if isinstance(self.model, Exception):
            raise self.model
        return self.model

    model = "model"

    def _put_in_use(self, model, path, member, offer, *_):
        self.offered.append(offer)


def fallbacks(reason):
    return metrics.FALLBACKS.labels(reason)._value.get()


def test_the_disk_is_tried_when_no_source_gave_the_weights(monkeypatch, log):
    steps, before = Steps(monkeypatch), fallbacks("no_source")
    assert steps.load() == "model"
    assert steps.taken == ["sources", "restore", "disk True"]
    assert log == [
        "NetLoader rank 0: trying the disk, as no source gave the weights: 192.0.2.7:1: gone"
    ]
    [offer] = steps.offered
    assert (offer.loaded_from, offer.ranks()) == ("disk", {})
    assert fallbacks("no_source") == before + 1


@pytest.mark.parametrize("fallback", [True, False])
def test_a_load_that_fails_leaves_the_default_dtype_as_it_was(monkeypatch, fallback):
    steps, seen = Steps(monkeypatch, FALLBACK=fallback), []

    def fail(*_):
        torch.set_default_dtype(torch.float16)  # as vLLM up to 0.27 leaves it behind
        raise steps.failure

    def follow(load, *_):
        seen.append(torch.get_default_dtype())
        torch.set_default_dtype(torch.float16)
        raise OSError("no weights on disk")

    monkeypatch.setattr(steps.loader, "_load_from_sources", fail)
    monkeypatch.setattr(steps.loader, "_follow_vllm", follow)
    try:
        with pytest.raises(LoadFailed):
            steps.load()
        assert torch.get_default_dtype() is torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
    assert seen == ([torch.float32] if fallback else [])


def test_without_fallback_the_start_ends_with_all_reasons_and_the_disk_is_not_tried(monkeypatch):
    steps = Steps(monkeypatch, FALLBACK=False)
    with pytest.raises(LoadFailed, match=r"192\.0\.2\.7:1: gone"):
        steps.load()
    assert steps.taken == ["sources"]
    assert steps.offered == []


def test_a_rank_that_has_to_load_again_begins_as_if_nothing_had_been_loaded(monkeypatch, log):
    steps = Steps(monkeypatch)
    monkeypatch.setattr(steps.loader, "_load_from_sources", steps._follow)
    other = Order({0: "xxh3_128:1"})

    def again(ranks, attempt, **options):
        assert attempt(AS_CONFIGURED).result[1] == "model"
        assert attempt(other).result[0].wanted == "xxh3_128:1"
        steps.taken.append("then")
        return attempt(Order(disk=True)).result, {0: "xxh3_128:2", 1: "xxh3_128:3"}

    monkeypatch.setattr(netloader, "load_together", again)
    steps.load()
    assert steps.taken == ["disk False", "restore", "disk False", "then", "restore", "disk True"]
    [offer] = steps.offered
    assert offer.ranks() == {0: "xxh3_128:2", 1: "xxh3_128:3"}
    [line] = [line for line in log if "instance digest" in line]
    assert line == (
        f"NetLoader rank 0: instance digest {of_instance(offer.ranks())}, from the weights digests "
        "of 2 of 1 ranks"
    )


def test_a_rank_that_is_to_have_the_weights_of_the_others_does_not_try_the_disk(monkeypatch):
    steps = Steps(monkeypatch)

    def again(ranks, attempt, **options):
        return attempt(Order({0: "xxh3_128:1"})).result, {}

    monkeypatch.setattr(netloader, "load_together", again)
    with pytest.raises(LoadFailed, match=r"192\.0\.2\.7:1: gone"):
        steps.load()
    assert steps.taken == ["restore", "sources"]


def test_when_the_disk_has_no_weights_either_one_error_says_both(monkeypatch):
    steps = Steps(monkeypatch)
    steps.model = RuntimeError("no safetensors")
    with pytest.raises(LoadFailed) as failed:
        steps.load()
    assert str(failed.value) == (
        "no source gave the weights (192.0.2.7:1: gone), and they cannot be loaded from disk "
        "either (RuntimeError: no safetensors)"
    )


class Views:
    """Instances that are cut otherwise; `failures` says what becomes of the loads through them."""

    def __init__(self, monkeypatch, steps, *failures):
        self.failures = [*failures]
        self.tried = []
        steps.failure = LoadFailed("192.0.2.7:1: tp is 1 here and 2 there", ["192.0.2.7:1"])
        follow = steps.loader._follow_vllm

        def read(load, *rest):
            if load.instance is not None and (failure := self.failures.pop(0)):
                steps.taken.append(f"view {load.instance.digest}")
                raise failure
            return follow(load, *rest)

        monkeypatch.setattr(netloader, "find_instance", self._find)
        monkeypatch.setattr(steps.loader, "_follow_vllm", read)

    def _find(self, addresses, identity, config, worker, tried, began):
        assert addresses == [Address("192.0.2.7", 1)]
        if len(tried) == 2:
            raise LoadFailed("192.0.2.7:1: nothing further")
        return Instance(f"instance:{len(tried)}", identity, (), frozenset())


@pytest.mark.parametrize("fallback", [True, False])
def test_a_view_is_read_before_the_disk_with_and_without_fallback(monkeypatch, log, fallback):
    steps = Steps(monkeypatch, FALLBACK=fallback)
    Views(monkeypatch, steps, LoadFailed("192.0.2.7:1: lost"), None)
    before = fallbacks("no_source")
    assert steps.load() == "model"
    assert steps.taken == ["sources", "restore", "view instance:0", "restore", "disk True"]
    assert log == ["NetLoader rank 0: loading through a view failed: 192.0.2.7:1: lost"]
    assert fallbacks("no_source") == before


def test_when_no_view_has_all_the_disk_is_read_as_ever(monkeypatch, log):
    steps = Steps(monkeypatch)
    Views(monkeypatch, steps, LoadFailed("192.0.2.7:1: lost"), ValueError("odd"))
    assert steps.load() == "model"
    assert steps.taken[-3:] == ["view instance:1", "restore", "disk True"]
    assert log[-1] == (
        "NetLoader rank 0: trying the disk, as no source gave the weights: 192.0.2.7:1: tp is 1 "
        "here and 2 there; 192.0.2.7:1: lost; ValueError: odd; 192.0.2.7:1: nothing further"
    )


def test_without_fallback_the_error_says_what_is_wrong_with_each_view(monkeypatch):
    steps = Steps(monkeypatch, FALLBACK=False)
    Views(monkeypatch, steps, LoadFailed("192.0.2.7:1: lost"), LoadFailed("192.0.2.8:1: gone"))
    with pytest.raises(LoadFailed, match=r"2 there; .*7:1: lost; .*8:1: gone; .*nothing further"):
        steps.load()
    assert "disk True" not in steps.taken


@pytest.mark.parametrize("fallback", [True, False])
def test_what_is_wrong_with_vllm_is_no_reason_to_go_to_disk(monkeypatch, fallback):
    steps = Steps(monkeypatch, FALLBACK=fallback)
    steps.failure = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        steps.load()
    assert steps.taken == ["sources"]


STORE = store_of({"a": torch.ones(3)})
OTHER = f"xxh3_128:{'0' * 32}"


def offered(monkeypatch, load, **extra_config):
    """What comes of a load that has got so far."""
    steps = Steps(monkeypatch, **extra_config)
    steps.loader._vllm_config = ON_CPU
    steps.loader._finish(load, "model")
    steps.loader._offer(load, "model", types.SimpleNamespace(model="m", revision=None), {})
    [offer] = steps.offered
    return offer


def in_progress(**changes):
    return netloader._Load(identity(), DEVICE, ALONE, serving=True, store=STORE, **changes)


OF_STORE = {0: STORE.digests.weights, 1: "xxh3_128:01"}


@pytest.mark.parametrize(
    ("pinned", "warns"),
    [
        ([STORE.digests.weights], False),
        ([of_instance(OF_STORE)], False),
        ([OTHER, STORE.digests.weights], False),
        ([OTHER], True),
        ([of_instance({0: STORE.digests.weights})], True),
    ],
)
def test_other_weights_than_those_pinned_are_a_warning_when_they_come_from_disk(
    monkeypatch, log, pinned, warns
):
    steps = Steps(monkeypatch, WEIGHTS_DIGEST=pinned)
    steps.loader._compare_with_pin(in_progress(weights=STORE.digests.weights), OF_STORE)
    found = f"{STORE.digests.weights} of {of_instance(OF_STORE)}"
    warning = f"the weights from disk are {found} and WEIGHTS_DIGEST is {', '.join(pinned)}"
    assert log == ([f"NetLoader rank 0: {warning}"] if warns else [])


def digest_of(weight):
    return store_of({"weight": weight}).digests.weights


NEW = digest_of(torch.arange(4.0))
OLD = digest_of(torch.zeros(4))


@pytest.mark.parametrize(
    ("pinned", "warns"),
    [
        (None, False),
        ([OTHER, NEW], False),
        ([of_instance({0: NEW})], False),
        ([OLD], True),
        ([of_instance({0: OLD})], True),
    ],
)
def test_other_weights_than_those_pinned_are_a_warning_when_a_reload_reads_them_from_disk(
    monkeypatch, log, pinned, warns
):
    monkeypatch.setattr(registry, "_servers", [])
    ranks, model = Ranks(0, [0], "netloader", None), Watched()
    store = store_of({"weight": model.weight.detach()})
    offer = Offer(identity(), store, ranks=functools.partial(ranks.present, {0: OLD}))
    member = registry.Member(settings(), HOST, instance="reloaded", ranks=ranks)
    registry.put_in_use(model, "m", member, offer)
    loader = make(**{"LISTEN_PORT": 1} | ({"WEIGHTS_DIGEST": pinned} if pinned else {}))
    loader._vllm_config, loader._disk = ON_CPU, WholeDisk()
    for weights in (CHECKPOINT, {"weight": torch.ones(4)}):  # the second time nothing is pinned
        with registry.changing("reloaded", Change("reload", After.WHOLE)):
            if weights is CHECKPOINT:
                weights = dict(loader.get_all_weights(types.SimpleNamespace(model="m"), model))
            model.load_weights(weights.items())
        registry.wait_for_renewal()
    registry.in_use(model).server.stop()
    assert [line for line in log if "from disk" in line] == [
        f"NetLoader rank 0: the weights from disk are {NEW} of {of_instance({0: NEW})} and "
        f"WEIGHTS_DIGEST is {', '.join(pinned or ())}"
    ] * warns


@pytest.mark.parametrize(
    ("now", "of_rank", "of_all"),
    [
        ({0: NEW, 1: NEW}, True, True),
        ({0: NEW, 1: OLD}, True, False),  # the other one may not have reloaded yet
        ({0: NEW}, True, False),  # it reloads
        ({0: OLD, 1: OLD}, True, True),
    ],
)
def test_the_last_rank_that_has_reloaded_compares_what_all_have(log, now, of_rank, of_all):
    had = {0: OLD, 1: OLD}
    for pin, warns in ((OTHER, of_rank), (of_instance({0: OTHER, 1: OTHER}), of_all)):
        netloader._compare_reloaded([pin], 0, [0, 1], had, now[0], now)
        assert len(log) == warns
        log.clear()


@pytest.mark.parametrize("layout", [RAW, PROCESSED])
@pytest.mark.parametrize(
    ("needed", "hashed"),
    [
        ({"serving": True}, True),
        ({"serving": False, "hashing": True}, True),
        ({"serving": False}, False),
    ],
)
def test_what_was_read_from_disk_is_named_in_one_line_where_it_is_hashed(
    log, layout, needed, hashed
):
    loader, model = make(LISTEN_PORT=1), Watched()
    loader._vllm_config, loader._disk = ON_CPU, WholeDisk()
    load = loader._load = netloader._Load(identity(layout=layout), DEVICE, ALONE, **needed)
    loader.load_weights(model, None)
    loader._finish(load, model)
    assert (load.weights is not None) == hashed
    lines = [line for line in log if "digest" in line]
    assert len(lines) == hashed
    said = f"the weights from disk have the weights digest {load.weights}, hashed in"
    assert all(re.fullmatch(f"NetLoader rank 0: {said} .* s", line) for line in lines)


def test_an_instance_that_cannot_be_a_source_says_why_and_offers_the_reason(monkeypatch, log):
    load = in_progress(unserved="post-processing has changed x")
    offer = offered(monkeypatch, load)
    assert (offer.store, offer.reason) == (None, "post-processing has changed x")
    [line] = log
    assert line.endswith("this model cannot be a source: post-processing has changed x")


class Watched(torch.nn.Module):
    """Loads as a model does that copies what it is given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(4), requires_grad=False)

    def load_weights(self, weights):
        for name, tensor in weights:
            getattr(self, name).data.copy_(tensor)


CHECKPOINT = {"weight": torch.arange(4.0)}


def read_disk(traced=True):
    """What is known of a load of CHECKPOINT, and the model."""
    loader, load, model = make(MODEL="m"), in_progress(), Watched()
    loader._disk = types.SimpleNamespace(
        load_weights=lambda model, config: model.load_weights(iter(CHECKPOINT.items()))
    )
    loader._read_disk(load, model, None, trace=traced)
    assert torch.equal(model.weight, CHECKPOINT["weight"])
    assert "load_weights" not in vars(model)
    return load, model


@pytest.mark.parametrize("problem", [None, LoadFailed("none came")])
def test_memory_is_prefaulted_while_a_view_is_read_and_not_longer(monkeypatch, problem):
    begun, ended = threading.Event(), []

    class Slow(type(DEVICE)):
        def prefault(self, tensors, stop):
            assert [tensor.data_ptr() for tensor in tensors] == [model.weight.data_ptr()]
            begun.set()
            ended.append(stop.wait(20))

    def load_through_view(*_, in_place):
        assert in_place
        assert begun.wait(20)
        if problem:
            raise problem

    monkeypatch.setattr(netloader, "load_through_view", load_through_view)
    loader, model = make(MODEL="m"), Watched()
    loader._disk = None
    with pytest.raises(LoadFailed) if problem else contextlib.nullcontext():
        loader._read_view(dataclasses.replace(in_progress(), device=Slow()), "there", model, None)
    assert ended == [True]


def test_a_source_offers_a_view_of_the_checkpoint_that_it_has_read(monkeypatch):
    load, model = read_disk()
    load.store = store_of({"weight": model.weight.detach()})
    offer = offered(monkeypatch, load)
    assert [parameter.data_ptr() for parameter in offer.view.parameters] == [
        model.weight.data_ptr()
    ]
    made, known = rebuild("weight", [(decode(offer.view.records), {"weight": model.weight})])
    assert known.all() and torch.equal(made, CHECKPOINT["weight"])


def test_what_post_processing_has_changed_is_seen_through_the_copy(monkeypatch):
    load, model = read_disk()
    load.store = store_of({"weight": model.weight.detach()})
    load.copies = {0: model.weight.clone()}
    model.weight.add_(1)
    offer = offered(monkeypatch, load)
    [memory] = offer.view.parameters
    assert torch.equal(memory, CHECKPOINT["weight"])


def test_a_tensor_that_is_kept_in_another_form_is_not_seen(monkeypatch):
    load, model = read_disk()
    load.store = store_of({"weight": model.weight.detach()})
    monkeypatch.setattr(
        load.store,
        "device",
        types.SimpleNamespace(
            **{name: getattr(DEVICE, name) for name in dir(DEVICE) if not name.startswith("__")}
            | {"formats": lambda tensors: dict.fromkeys(tensors, "FRACTAL_NZ")}
        ),
    )
    assert offered(monkeypatch, load).view.parameters == []


@pytest.mark.parametrize("step", ["records", "watch", "viewed_through"])
def test_whatever_goes_wrong_in_noting_costs_the_view_and_not_the_load(monkeypatch, step):
    def fail(*_):
        raise ZeroDivisionError("no\nnotes")

    if step == "viewed_through":
        monkeypatch.setattr(netloader, step, fail)
    else:
        monkeypatch.setattr(trace.Trace, {"watch": "_add"}.get(step, step), fail)
    load, model = read_disk()
    load.store = store_of({"weight": model.weight.detach()})
    offer = offered(monkeypatch, load)
    assert (offer.store, offer.view) == (load.store, None)
    assert "ZeroDivisionError: no notes" in offer.why_no_view


def test_an_instance_that_is_no_source_takes_no_notes(monkeypatch):
    monkeypatch.setattr(netloader, "Trace", None)
    load, _ = read_disk(traced=False)
    assert load.records is None


def test_a_load_that_fails_is_watched_no_more():
    model, given = Watched(), []
    with pytest.raises(ZeroDivisionError), load_watched(model, contextlib.nullcontext(), list):
        model.load_weights = given.append
        raise ZeroDivisionError
    assert "load_weights" not in vars(model)


def test_what_a_model_has_in_the_place_of_its_load_weights_is_back_after_a_load():
    model, given = Watched(), []
    model.load_weights = own = given.append
    with load_watched(model, contextlib.nullcontext(), list):
        model.load_weights(iter([1]))
    assert model.load_weights is own and given == [[1]]


def test_a_model_whose_experts_move_takes_no_weights_from_sources_and_gives_none(monkeypatch, log):
    monkeypatch.setattr(netloader, "why_experts_move", lambda *_: "--enable-eplb moves experts")
    steps, before = Steps(monkeypatch), fallbacks("unsupported")
    monkeypatch.setattr(steps.loader, "_load_from_sources", pull_from(steps.loader))
    assert steps.load() == "model"
    assert fallbacks("unsupported") == before + 1
    [offer] = steps.offered
    assert (offer.store, offer.reason) == (None, "--enable-eplb moves experts")
    assert log == [
        "NetLoader rank 0: trying the disk, as no source gave the weights: "
        "--enable-eplb moves experts",
        "NetLoader rank 0: this model cannot be a source: --enable-eplb moves experts",
    ]


@pytest.fixture(params=["weights that move", "a device that is not known"])
def alone(monkeypatch, request):
    """Why an instance takes no part."""
    if request.param == "weights that move":
        reason = "layer_sharding lets weights move"
        monkeypatch.setattr(netloader, "why_weights_move", lambda _: reason)
        return reason
    device = types.SimpleNamespace(device="meta")
    monkeypatch.setattr(ON_CPU, "device_config", device)
    return "NetLoader moves no tensors between devices of kind 'meta'"


class WholeDisk:
    """In the place of vLLM's default loader, with its own steps."""

    made = 0

    def download_model(self, model_config):
        pass

    def load_model(self, vllm_config, model_config, prefix):
        self.made += 1
        model = Watched()
        self.load_weights(model, model_config)
        return model

    def load_weights(self, model, model_config):
        model.load_weights(iter(CHECKPOINT.items()))

    def get_all_weights(self, model_config, model):
        return CHECKPOINT.items()


@pytest.mark.parametrize("keys", [{}, {"FALLBACK": False}, {"SOURCE": "fleet:1"}])
def test_who_takes_no_part_reads_the_disk_in_one_line_and_makes_the_model_once(
    monkeypatch, log, alone, keys
):
    steps, before = Steps(monkeypatch, **keys), fallbacks("unsupported")
    steps.loader._disk = WholeDisk()
    model = steps.load()
    assert torch.equal(model.weight, CHECKPOINT["weight"])
    assert (steps.taken, steps.offered) == ([], [])
    why, line = log
    assert why == f"NetLoader rank 0: loading from disk: {alone}"
    assert re.fullmatch(r"NetLoader rank 0: loaded 1 tensors, 0\.0 MB in .* from disk", line)
    assert fallbacks("unsupported") == before + ("SOURCE" in keys)


@pytest.mark.parametrize("source", ["fleet:1", sources("192.0.2.7:1"), sources("a")])
def test_who_takes_no_part_reads_nothing_in_the_place_of_sources_without_fallback(
    monkeypatch, log, alone, source
):
    steps = Steps(monkeypatch, SOURCE=source, FALLBACK=False)
    steps.loader._disk, model = None, Watched()
    ways = [
        steps.load,
        lambda: steps.loader.load_weights(model, None),
        lambda: steps.loader.get_all_weights(None, model),
    ]
    for way in ways:
        with pytest.raises(LayoutUnsupported) as error:
            way()
        assert str(error.value) == (
            f"no source is asked, as {alone}; and FALLBACK is false, so the disk is not read either"
        )
    assert (steps.taken, steps.offered, log) == ([], [], [])


def test_a_reload_of_who_takes_no_part_reads_the_disk(monkeypatch, log, alone):
    steps = Steps(monkeypatch)
    steps.loader._vllm_config, steps.loader._disk, model = ON_CPU, WholeDisk(), Watched()
    assert dict(steps.loader.get_all_weights(None, model)) == CHECKPOINT
    steps.loader.load_weights(model, None)
    assert torch.equal(model.weight, CHECKPOINT["weight"])
    assert len([line for line in log if line.endswith("from disk")]) == 1


def test_a_model_whose_experts_move_reads_nothing_in_the_place_of_sources_without_fallback(
    monkeypatch,
):
    monkeypatch.setattr(netloader, "why_experts_move", lambda *_: "--enable-eplb moves experts")
    steps = Steps(monkeypatch, FALLBACK=False)
    monkeypatch.setattr(steps.loader, "_load_from_sources", pull_from(steps.loader))
    with pytest.raises(LayoutUnsupported, match="--enable-eplb moves experts"):
        steps.load()
    assert (steps.taken, steps.offered) == ([], [])


def test_a_worker_of_a_replica_has_its_own_number_in_the_log_and_asks_as_its_rank(monkeypatch, log):
    address = closed_port()
    steps = Steps(monkeypatch, SOURCE=sources(str(address)), SOURCE_WAIT=0)
    replica = types.SimpleNamespace(**vars(ON_CPU.parallel_config) | {"data_parallel_index": 3})
    config = types.SimpleNamespace(**vars(ON_CPU) | {"parallel_config": replica})
    loader = steps.loader
    monkeypatch.setattr(
        loader,
        "_load_from_sources",
        lambda load, *_: loader._pull(load, None, {}, (), loader._sources(0, load.worker), {}),
    )
    loader.load_model(config, types.SimpleNamespace(model="m", revision=None))
    assert [line.partition(f"{address}: cannot connect")[0] for line in log] == [
        "NetLoader rank 3: source ",
        "NetLoader rank 3: trying the disk, as no source gave the weights: ",
    ]


def test_a_source_whose_attributes_do_not_fit_is_left_for_the_next_one(log):
    with (
        source(store_of(CHECKPOINT, attributes={"weight": 3})) as unfit,
        source(store_of(CHECKPOINT, attributes={"scale": 0.5})) as fit,
    ):
        keys = {"SOURCE": sources(str(unfit.address), str(fit.address)), "MAX_SOURCES": 1}
        loader, model = make(LISTEN_PORT=1, SOURCE_WAIT=0, **keys), Watched()
        loader._vllm_config = ON_CPU
        loader._load = netloader._Load(identity(), DEVICE, ALONE, serving=False)
        loader.load_weights(model, None)
    assert torch.equal(model.weight, CHECKPOINT["weight"]) and model.scale == 0.5
    assert any(f"from {fit.address}, weights digest" in line for line in log)
    [line] = [line for line in log if f"source {unfit.address}" in line]
    assert line == (
        f"NetLoader rank 0: source {unfit.address}: attribute weight is 3 there, and is not a "
        "plain value (None, a bool, a number or a string) but a Parameter here"
    )


def pull_from(loader):
    return lambda load, *_: loader._pull(load, None, {}, (), [Address("192.0.2.7", 1)], {})


def test_what_keeps_an_instance_from_being_a_source_does_not_end_its_start():
    load = in_progress()
    with load.preparing_to_serve():
        raise LayoutUnsupported("t was made by loading")
    assert load.unserved == "t was made by loading"
    with load.preparing_to_serve():
        raise RuntimeError("out of\nmemory")
    assert load.unserved == "preparing it failed: RuntimeError: out of memory"
    with pytest.raises(TypeError), load.preparing_to_serve():
        raise TypeError


@pytest.mark.parametrize(("verify", "serving"), [(True, True), (False, True), (False, False)])
def test_digests_that_were_not_checked_are_computed_before_they_are_passed_on(
    monkeypatch, verify, serving
):
    tensor = torch.ones(3)
    store = store_of({"a": tensor})
    tensor.zero_()  # as if a source had lied
    loaded = Loaded(store, "192.0.2.7:1")
    monkeypatch.setattr(netloader, "elastic_load", lambda *_, **options: loaded)
    load = netloader._Load(identity(), DEVICE, ALONE, serving=serving)
    got = make(VERIFY=verify)._pull(load, None, {}, (), [Address("192.0.2.7", 1)], {})
    assert load.loaded_from == "192.0.2.7:1"
    assert (got is store) == (verify or not serving)
    if got is not store:
        assert got.digests == store_of({"a": tensor}).digests


@pytest.mark.parametrize(
    ("change", "serving", "asked"),
    [({}, True, True), ({}, False, False), ({"layout": "processed"}, True, False)],
)
def test_who_serves_raw_weights_that_came_by_name_asks_their_sources_for_the_records(
    monkeypatch, change, serving, asked
):
    store, givers, calls = store_of({"a": torch.ones(3)}), [Address("192.0.2.7", 1)], []

    def ask(sources, config, weights):
        calls.append((sources, weights))
        raise LoadFailed("192.0.2.7:1: no_view: none")

    monkeypatch.setattr(
        netloader, "elastic_load", lambda *_, **options: Loaded(store, "a", givers=givers)
    )
    monkeypatch.setattr(netloader, "records_by_name", ask)
    load = netloader._Load(identity(**change), DEVICE, ALONE, serving=serving)
    assert make()._pull(load, None, {}, (), givers, {}) is store
    assert calls == ([(givers, store.digests.weights)] if asked else [])
    assert load.records is None and load.why_no_view == (
        "192.0.2.7:1: no_view: none" if asked else netloader.Offer.why_no_view
    )


@pytest.mark.parametrize(("ranks", "hashing"), [([0], False), ([0, 1], True)])
def test_what_comes_from_disk_is_hashed_where_another_rank_of_the_instance_compares_it(
    monkeypatch, ranks, hashing
):
    monkeypatch.setattr(netloader, "ranks_of", lambda *_: Ranks(0, ranks, "target"))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    for name in ("worker_of", "why_experts_move", "instance_of"):
        monkeypatch.setattr(netloader, name, lambda *_: 0)
    loader = make(SOURCE=sources("192.0.2.7:1"))
    loader._vllm_config = ON_CPU
    assert loader._new_load(identity(), None).hashing is hashing


@pytest.mark.parametrize(("port", "ports"), [(28000, [28002, 28003]), (None, []), (1, [])])
def test_a_name_is_for_all_ranks_and_leaves_this_instance_out(monkeypatch, port, ports):
    asked = {}

    def load_from(tensors, required, sources, *_, own, **options):
        asked.update(sources=sources, own=own)
        return Loaded(store_of({"a": torch.ones(3)}), "192.0.2.7:1")

    monkeypatch.setattr(netloader, "elastic_load", load_from)
    loader = make(SOURCE="dns+fleet:28000", LISTEN_PORT=port)
    loader._relay = types.SimpleNamespace(peer=types.SimpleNamespace(instance="its own"))
    # The second rank of the second data-parallel replica.
    ranks = Ranks(1, [0, 1], "target", worker=3, workers=[2, 3])
    monkeypatch.setattr(Ranks, "hosts", lambda _: ["10.0.0.1"])
    load = netloader._Load(identity(rank=1), DEVICE, ranks, False, worker=3)
    loader._pull(load, None, {}, (), loader._sources(1, 3), {})
    assert asked["own"].hosts() == ["10.0.0.1"]
    assert asked["own"].process == "its own"
    assert asked["sources"] == (Name(Lookup.DNS, "fleet", 28000),)
    assert asked["own"].ports == ports


# What listens while a model is being loaded


class Listening:
    """What a loader asks of the registry around a load, and what it says of itself."""

    peer = types.SimpleNamespace(instance="its own")

    def __init__(self, monkeypatch, steps):
        self.begun, self.given_up, self.seen = [], [], []
        monkeypatch.setattr(netloader.registry, "begin_load", self._begin)
        monkeypatch.setattr(netloader.registry, "give_up_load", self.given_up.append)
        monkeypatch.setattr(netloader, "has_checkpoint", lambda model_config: True)
        fail = steps.loader._load_from_sources

        def load(*arguments):
            self.seen.append((steps.loader._relay, steps.loader._cold))
            return fail(*arguments)

        monkeypatch.setattr(steps.loader, "_load_from_sources", load)

    def _begin(self, member, offer):
        self.begun.append((member.host, offer.code.text, offer.store, offer.can_read()))
        self.said = [offer.phase]
        return self

    def announce(self, phase):
        self.said.append(phase)


SOURCES = {"LISTEN_PORT": None, "SOURCE": "10.0.0.1:28000"}


def test_a_load_from_sources_is_heard_of_before_it_begins(monkeypatch):
    steps = Steps(monkeypatch, **SOURCES)
    listening = Listening(monkeypatch, steps)
    steps.load()
    assert listening.begun == [("192.0.2.1", "loading", None, True)]
    assert listening.said == [Phase.WAITING, Phase.READING]
    [(relay, cold)] = listening.seen
    assert relay is listening and cold.can_read() and cold.told is None
    assert listening.given_up == [] and (steps.loader._relay, steps.loader._cold) == (None, None)


def listen(loader, ranks):
    loader._vllm_config = ON_CPU
    return loader._listening(identity(), types.SimpleNamespace(model="m", revision=None), ranks)


def test_an_instance_one_of_whose_ranks_cannot_read_reads_for_nobody(monkeypatch):
    steps = Steps(monkeypatch, **SOURCES)
    listening = Listening(monkeypatch, steps)
    store = HashStore()
    first, other = (Ranks(rank, [0, 1], "netloader", store) for rank in (0, 1))
    with listen(steps.loader, first):
        assert steps.loader._cold.can_read() is None
        other.publish_can_read(False)
        assert steps.loader._cold.can_read() is False
    assert listening.begun[0][-1] is None


def test_ranks_do_not_wait_for_the_choice_of_one_that_cannot_listen(monkeypatch):
    steps, store = Steps(monkeypatch, **SOURCES), HashStore()
    Listening(monkeypatch, steps)
    monkeypatch.setattr(netloader.registry, "begin_load", lambda *_: None)
    with listen(steps.loader, Ranks(0, [0, 1], "netloader", store)):
        assert Ranks(1, [0, 1], "netloader", store).choice() is Choice.LEAVE


def test_a_rank_that_cannot_listen_does_what_was_chosen_for_all(monkeypatch):
    steps, store = Steps(monkeypatch, **SOURCES), HashStore()
    Listening(monkeypatch, steps)
    monkeypatch.setattr(netloader.registry, "begin_load", lambda *_: None)
    with listen(steps.loader, Ranks(1, [0, 1], "netloader", store)):
        Ranks(0, [0, 1], "netloader", store).publish_choice(Choice.READ)
        assert steps.loader._cold.told() is Choice.READ
        steps.loader._cold.announce(Phase.READING)  # of which nobody hears


def test_a_load_that_fails_is_given_up(monkeypatch):
    steps = Steps(monkeypatch, FALLBACK=False, **SOURCES)
    listening = Listening(monkeypatch, steps)
    with pytest.raises(LoadFailed):
        steps.load()
    assert listening.given_up == [listening] and steps.loader._relay is None
    assert not listening.begun[0][-1]  # it does not read the disk, not even for all


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({}, [Phase.READING] * 2),
        (
            {"SOURCE": [{"device_id": 0, "sources": ["10.0.0.1:1"]}]},
            [Phase.LOADING, Phase.READING],
        ),
        ({"SOURCE": "10.0.0.1:28000", "VERIFY": False}, [Phase.WAITING, Phase.READING]),
    ],
)
def test_every_load_is_heard_of_and_only_those_by_name_choose_who_reads(monkeypatch, keys, said):
    steps = Steps(monkeypatch, LISTEN_PORT=None, **keys)
    device = types.SimpleNamespace(layout=RAW, accelerator="one")
    monkeypatch.setattr(steps.loader, "_device", lambda: device)
    listening = Listening(monkeypatch, steps)
    steps.load()
    assert listening.said == said
    [(relay, cold)] = listening.seen
    assert relay is listening and (cold is not None) == (Phase.WAITING in said)


def test_an_instance_that_is_no_source_is_not_heard_of(monkeypatch):
    steps = Steps(monkeypatch, **{**SOURCES, "LISTEN_PORT": 1})
    listening = Listening(monkeypatch, steps)
    steps.load()
    assert listening.begun == [] and listening.seen == [(None, None)]


def test_an_instance_that_is_chosen_reads_the_disk_and_warns_of_nothing(monkeypatch, log):
    steps = Steps(monkeypatch, **SOURCES)
    listening = Listening(monkeypatch, steps)

    def choose(*_, cold, **options):
        assert cold is steps.loader._cold is not None
        raise ChosenToRead("chosen")

    monkeypatch.setattr(netloader, "elastic_load", choose)
    monkeypatch.setattr(steps.loader, "_load_from_sources", pull_from(steps.loader))
    steps.load()
    assert listening.said == [Phase.WAITING, Phase.READING]
    assert steps.taken == ["restore", "disk True"] and log == []
