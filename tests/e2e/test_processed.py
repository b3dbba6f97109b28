"""The processed layout inside vLLM, with a CPU in the place of an accelerator.

vLLM packs a CPU's linear weights into handles; here they stay tensors, as on an accelerator, and
are laid out in another way than before, with something computed from them beside.
"""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm.model_executor.layers import utils as layer_utils
from vllm.model_executor.model_loader import base_loader

from vllm_ascend.model_loader.netloader import netloader, registry
from vllm_ascend.model_loader.netloader.errors import LoadFailed
from vllm_ascend.model_loader.netloader.executor.chunks.manifest import PROCESSED
from vllm_ascend.model_loader.netloader.executor.devices.cpu import CpuDevice
from vllm_ascend.model_loader.netloader.executor.elastic_load import P2PSend
from vllm_ascend.model_loader.netloader.executor.model.processed import processed_tensors

from ..conformance.faults import Tapped, flipped
from ..ut.model_loader.netloader.support import differing
from .loading import assert_same, load, make_config
from .test_loader import Seed, on_disk, registrations


class Accelerator(CpuDevice):
    layout = PROCESSED


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    # vLLM configures its loggers with the first engine's configuration, and takes handlers away.
    make_config(on_disk(folder, "llama"), load_format="auto")
    return folder


@pytest.fixture(autouse=True)
def accelerator(monkeypatch):
    device, servers = Accelerator(), []
    monkeypatch.setattr(netloader, "device_of", lambda *_: device)
    monkeypatch.setattr(registry, "_servers", servers)
    monkeypatch.setattr(layer_utils, "dispatch_cpu_unquantized_gemm", process)
    yield
    for server in servers:
        server.stop()


def process(layer, remove_weight):
    """Post-process a layer as vLLM and vLLM Ascend do on accelerators."""
    if layer.weight.is_meta or layer.weight.ndim != 2:
        return
    if remove_weight:  # a linear layer's: turned in memory
        layer.weight.data = layer.weight.data.t().contiguous().t()
        layer.row_sums = [layer.weight.data.float().sum(1)]
    layer.cpu_linear = torch.nn.functional.linear


def assert_all_same(one, other):
    assert_same(one, other)
    ours, theirs = processed_tensors(one), processed_tensors(other)
    assert any("row_sums[0]" in name for name in ours)
    assert differing(ours, theirs) == []
    assert {name: tensor.stride() for name, tensor in ours.items()} == {
        name: tensor.stride() for name, tensor in theirs.items()
    }


@pytest.mark.parametrize("arch", ["llama", "qwen3-tied"])
def test_a_client_gets_the_processed_model_of_its_source(arch, models, tmp_path):
    seed = Seed(on_disk(models, arch), tmp_path / "rank_")
    client = load(seed.client(models / f"{arch}-bare"))
    assert_all_same(seed.model, client)


def test_a_client_is_a_source_of_the_processed_model_too(models, tmp_path):
    seed = Seed(on_disk(models, "llama"), tmp_path / "rank_")
    config = seed.client(models / "llama-bare")
    config.load_config.model_loader_extra_config |= {"OUTPUT_PREFIX": str(tmp_path / "client_")}
    del config.load_config.model_loader_extra_config["LISTEN_PORT"]
    client = load(config)
    address = (tmp_path / "client_0.txt").read_text()
    assert address != seed.address
    source = [{"device_id": 0, "sources": [address]}]
    third = load(make_config(models / "llama-bare", MODEL="m", SOURCE=source, LISTEN_PORT=1))
    assert_all_same(client, third)
    assert_all_same(seed.model, third)


def test_a_raw_client_is_refused(models, tmp_path):
    seed = Seed(on_disk(models, "llama"), tmp_path / "rank_")
    config = seed.client(models / "llama-bare", INT8_CACHE="dram")
    with pytest.raises(LoadFailed, match="layout is 'raw' here and 'processed' there"):
        load(config)


# When something goes wrong


@pytest.fixture
def why_from_disk(models, log):
    """Why a model was loaded from disk; nothing if it was not."""
    start = "NetLoader rank 0: trying the disk, as no source gave the weights: "
    return lambda: [line.removeprefix(start) for line in log if line.startswith(start)]


@pytest.fixture
def sending(monkeypatch):
    """Have every source's tensors pass by a function before they are sent."""

    def send(tap):
        made = P2PSend.__init__

        def make(self, store, sender, *others):
            store.readable = Tapped(store.tensors, lambda i, n: tap(i, n, store))
            made(self, store, sender, *others)

        monkeypatch.setattr(P2PSend, "__init__", make)

    return send


def dies(index, count, store):
    if count > 2:
        raise RuntimeError("the source dies here")


def poisons(index, count, store):
    return flipped(store.tensors[index]) if index == 1 else None


def poisons_a_table(index, count, store):
    of_rotary = store.manifest.names[index].endswith("rotary_emb.cos_sin_cache")
    return flipped(store.tensors[index]) if of_rotary else None


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        (dies, "the source dies here"),
        (poisons, "the source's weights have changed since"),
        (poisons_a_table, "the source's weights have changed since"),
    ],
    ids=["lost", "wrong", "wrong table"],
)
def test_half_a_transfer_then_disk_is_as_if_nothing_had_been_tried(
    fault, why, models, tmp_path, sending, why_from_disk
):
    seed = Seed(on_disk(models, "llama"), tmp_path / "rank_")
    # Other weights than the source's, so that bytes of the first attempt would be noticed.
    other = on_disk(models, "llama", seed=1)
    plain_config = make_config(other, load_format="auto")
    plain = load(plain_config)
    sending(fault)
    config = seed.client(other, CHUNK_MIB=1)
    model = load(config)
    assert_all_same(plain, model)
    [reason] = why_from_disk()
    assert reason.startswith(f"{seed.address}: ")
    assert why in reason
    assert registrations(config) == registrations(plain_config)
    layers = set(map(id, model.modules()))
    for layer in config.compilation_config.static_forward_context.values():
        assert not isinstance(layer, torch.nn.Module) or id(layer) in layers


@pytest.fixture
def particular(monkeypatch):
    """Post-processing that does not take just any weights."""

    def process_some(layer, remove_weight):
        if (layer.weight == layer.weight.flatten()[0]).all():
            raise ZeroDivisionError("all weights are the same")
        process(layer, remove_weight)

    monkeypatch.setattr(layer_utils, "dispatch_cpu_unquantized_gemm", process_some)


@pytest.mark.usefixtures("particular")
def test_a_model_that_cannot_be_post_processed_when_empty_is_loaded_from_disk(
    models, tmp_path, why_from_disk
):
    path = on_disk(models, "llama")
    seed = Seed(path, tmp_path / "rank_")
    config = seed.client(path)
    client = load(config)
    assert_all_same(seed.model, client)
    assert registrations(config) == registrations(seed.config)
    assert why_from_disk() == [
        "an empty model cannot be post-processed: ZeroDivisionError: all weights are the same"
    ]


def test_a_failure_where_nothing_was_to_be_filled_is_passed_on(models, monkeypatch):
    class Broken(Exception):
        pass

    def break_down(layer, remove_weight):
        raise Broken

    monkeypatch.setattr(layer_utils, "dispatch_cpu_unquantized_gemm", break_down)
    with pytest.raises(Broken):
        load(make_config(on_disk(models, "llama"), MODEL="m", LISTEN_PORT=1))


def test_a_failure_on_the_way_to_an_empty_model_is_passed_on(models, tmp_path, monkeypatch):
    """What makes no model would make none from disk either."""
    path = on_disk(models, "llama")
    seed = Seed(path, tmp_path / "rank_")

    class Broken(Exception):
        pass

    def break_down(**_):
        raise Broken

    monkeypatch.setattr(base_loader, "initialize_model", break_down)
    with pytest.raises(Broken):
        load(seed.client(path))


# Post-processing that looks at the weights


def test_what_post_processing_says_of_the_weights_is_what_it_said_at_the_source(
    models, tmp_path, monkeypatch
):
    def process_and_note(layer, remove_weight):
        process(layer, remove_weight)
        layer.is_uniform = bool((layer.weight == layer.weight.flatten()[0]).all())

    monkeypatch.setattr(layer_utils, "dispatch_cpu_unquantized_gemm", process_and_note)
    seed = Seed(on_disk(models, "llama"), tmp_path / "rank_")
    client = load(seed.client(models / "llama-bare"))
    noted = {
        name: module.is_uniform
        for name, module in client.named_modules()
        if hasattr(module, "is_uniform")
    }
    assert noted
    assert not any(noted.values())


def own_head(models):
    """A checkpoint with a head of its own whose configuration says that it has none."""
    tied = on_disk(models, "llama-tied")
    path = models / "own-head"
    if not path.exists():
        shutil.copytree(tied, path)
        file = path / "model.safetensors"
        weights = load_file(file)
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].flip(0).contiguous()
        save_file(weights, file, metadata={"format": "pt"})
    return path


def test_a_head_that_only_the_checkpoint_unties_comes_from_the_source(
    models, tmp_path, why_from_disk
):
    """vLLM 0.32 ties the two again where they are equal, as they are in an empty model."""
    path = own_head(models)
    seed = Seed(path, tmp_path / "rank_")
    client = load(seed.client(path))
    assert_all_same(seed.model, client)
    assert why_from_disk() == []
