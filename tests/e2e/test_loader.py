"""The loader inside vLLM, on every kind of model, without the cost of starting an instance."""

import contextlib
import dataclasses
import gc
import json
import logging
import re
import shutil
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm
from packaging.version import Version
from safetensors.torch import load_file, save_file
from torch import nn
from vllm.config import ModelConfig, VllmConfig, WeightTransferConfig
from vllm.lora.layers import RowParallelLinearWithLoRA
from vllm.model_executor.model_loader import default_loader, weight_utils
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)
from vllm.v1.attention import selector

from tests.certificates import OTHER_SECRET, SECRET, Authority, secret_file
from tests.e2e.loading import (
    assert_same,
    load,
    make_config,
    reload_from,
    worker,
)
from tests.e2e.views import not_seen_through
from tests.proof.models import OTHERS, add_dense, make_other
from tools.make_model import CONFIGS, copy_without_weights, make_model
from vllm_ascend.model_loader.netloader import netloader, registry
from vllm_ascend.model_loader.netloader.checkpoint import identity_of
from vllm_ascend.model_loader.netloader.config import parse_config
from vllm_ascend.model_loader.netloader.copies import holding_checkpoint
from vllm_ascend.model_loader.netloader.errors import ConfigError, LayoutUnsupported, LoadFailed
from vllm_ascend.model_loader.netloader.executor.chunks.blocks import Run
from vllm_ascend.model_loader.netloader.executor.elastic_load import P2PSend
from vllm_ascend.model_loader.netloader.executor.model.processed import processed_tensors
from vllm_ascend.model_loader.netloader.interaction.api import TARGET_GROUP

pytestmark = pytest.mark.core
# The proof shows how older ones refuse it.
LORA_LOADS = pytest.mark.skipif(
    not hasattr(RowParallelLinearWithLoRA, "load_weights"),
    reason="this vLLM cannot load layers with LoRA from a checkpoint",
)

NO_SERVER = {"LISTEN_PORT": 1}


MLA = pytest.param(
    "deepseek-v2",
    marks=pytest.mark.skipif(
        Version(vllm.__version__) < Version("0.28"), reason="this vLLM has no MLA for CPUs"
    ),
)
ARCHITECTURES = [*(name for name in (*CONFIGS, *OTHERS) if name != "deepseek-v2"), MLA]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    # vLLM configures its loggers with the first engine's configuration, and takes handlers away.
    make_config(on_disk(folder, "llama"), load_format="auto")
    return folder


def on_disk(models: Path, arch: str, seed: int = 0) -> Path:
    path = models / f"{arch}-{seed}"
    if not path.exists():
        if arch in CONFIGS:
            make_model(path, arch, "tiny", seed)
        else:
            make_other(path, OTHERS[arch], seed)
        copy_without_weights(path, models / f"{arch}-bare")
    return path


class Seed:
    """An instance that has loaded, from disk if nothing else is said, and is a source."""

    def __init__(self, path: Path, prefix: Path, **extra: Any) -> None:
        self.config = make_config(path, MODEL="m", OUTPUT_PREFIX=str(prefix), **extra)
        self.model = load(self.config)
        self.address = Path(f"{prefix}0.txt").read_text()

    def client(self, path: Path, *others: str, **extra: Any) -> VllmConfig:
        source = [{"device_id": 0, "sources": [*others, self.address]}]
        return make_config(path, MODEL="m", SOURCE=source, **NO_SERVER, **extra)


# What vLLM reads and then overwrites: where it makes one layer of two, the scale of the last stays.
NOT_SEEN = {
    "w8a8-static": {
        "model.layers.N.self_attn.q_proj.input_scale",
        "model.layers.N.self_attn.k_proj.input_scale",
        "model.layers.N.mlp.gate_proj.input_scale",
    }
}


def kinds_of(names: list[str]) -> set[str]:
    """Names of tensors without the numbers of layers."""
    return {re.sub(r"\d+", "N", name) for name in names}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_client_gets_the_model_of_its_source_and_sees_the_checkpoint_through_it(
    arch: str, models: Path, tmp_path: Path, log: list[str]
) -> None:
    seed = Seed(on_disk(models, arch), tmp_path / "rank_")
    source = [{"device_id": 0, "sources": [seed.address]}]
    client = Seed(models / f"{arch}-bare", tmp_path / "client_", SOURCE=source)
    assert_same(seed.model, client.model)
    # Both say how much they have loaded, and from where.
    lines = [re.search(r"loaded (.+?) in .+ from (\S+)", line) for line in log]
    (much, disk), (as_much, source) = (line.groups() for line in lines if line)
    assert (much, disk, source.rstrip(",")) == (as_much, "disk", seed.address)
    for one in (seed, client):
        gaps = not_seen_through(one.address, models / f"{arch}-0")
        assert kinds_of(gaps) == NOT_SEEN.get(arch, set())


@contextlib.contextmanager
def held(path: Path) -> Iterator[str]:
    """Where the checkpoint of a folder is to be had that is held."""
    config = parse_config({"MODEL": "m"})
    who = identity_of(path, config.model, TARGET_GROUP)
    with holding_checkpoint(path, who, config, "127.0.0.1", lambda *_: None) as (address, *_):
        yield str(address)


@pytest.mark.parametrize("arch", ["llama", "mixtral", "w8a8-dynamic"])
def test_a_client_without_weight_files_loads_from_a_folder_that_is_held_elsewhere(
    arch: str, models: Path
) -> None:
    path = on_disk(models, arch)
    with held(path) as address:
        source = [{"device_id": 0, "sources": [address]}]
        extra = {"MODEL": "m", "SOURCE": source, "FALLBACK": False}
        client = load(make_config(models / f"{arch}-bare", **extra, **NO_SERVER))
    assert_same(load(make_config(path, load_format="auto")), client)


@pytest.fixture(params=["of this processor", "of AMX"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have vLLM pick the kernels for this processor, or those that it picks where there is AMX.

    Their weights can be packed without AMX, and a layer with few rows of input runs without it.
    """
    if request.param == "of AMX":
        if torch.cpu._is_amx_tile_supported():
            pytest.skip("they are those of this processor")
        if not torch.cpu._is_avx512_bf16_supported():
            pytest.skip("they need AVX-512 with bf16 at least")
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    # vLLM chooses a kind of attention once for each process.
    selector._cached_get_attn_backend.cache_clear()
    yield
    selector._cached_get_attn_backend.cache_clear()


EACH_KIND_OF_LAYER = ["moe", "w8a8-static", MLA]


@pytest.mark.parametrize("kernels", ["of AMX"], indirect=True)
@pytest.mark.parametrize("arch", EACH_KIND_OF_LAYER)
def test_a_client_gets_the_model_of_its_source_with_other_kernels(
    arch: str, models: Path, tmp_path: Path, kernels: None
) -> None:
    seed = Seed(on_disk(models, arch), tmp_path / "rank_")
    assert_same(seed.model, load(seed.client(models / f"{arch}-bare")))
    if arch == "deepseek-v2":  # else these are not the kernels of AMX
        assert not seed.model.model.layers[0].self_attn.kv_b_proj.weight.numel()


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("arch", EACH_KIND_OF_LAYER)
def test_the_comparison_of_models_notices_every_tensor_of_a_checkpoint(
    arch: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gc, "collect", lambda: 0)  # nearly all the time of a small model's load
    path, other = on_disk(models, arch), tmp_path / "other"
    model = load(make_config(path, load_format="auto"))
    assert_same(model, load(make_config(path, load_format="auto")))
    copy_without_weights(path, other)
    weights = load_file(path / "model.safetensors")
    overlooked = []
    # The last one of each kind: layers differ by their number only.
    for name in {re.sub(r"\d+", "N", name): name for name in weights}.values():
        if name.endswith("input_scale"):
            continue  # where vLLM makes one layer of two, it keeps the scale of one
        changed = weights | {name: weights[name] + 1}
        save_file(changed, other / "model.safetensors", metadata={"format": "pt"})
        try:
            assert_same(model, load(make_config(other, load_format="auto")))
        except AssertionError:
            continue
        overlooked.append(name)
    assert overlooked == []


@pytest.mark.parametrize("mode", ["no", "DRAM", "hbm"])
@pytest.mark.parametrize("arch", ["w8a8-dynamic", "w8a8-static"])
def test_int8_models_in_every_cache_mode(
    arch: str, mode: str, models: Path, tmp_path: Path
) -> None:
    seed = Seed(on_disk(models, arch), tmp_path / "rank_", INT8_CACHE=mode)
    assert_same(seed.model, load(seed.client(models / f"{arch}-bare", INT8_CACHE=mode)))
    assert kinds_of(not_seen_through(seed.address, models / f"{arch}-0")) == NOT_SEEN.get(
        arch, set()
    )


def test_with_another_secret_the_next_source_is_taken_and_without_one_the_disk(
    models: Path, tmp_path: Path, log: list[str]
) -> None:
    path, bare = on_disk(models, "llama"), models / "llama-bare"
    ours = {"SECRET_FILE": secret_file(tmp_path, SECRET)}
    theirs = {"SECRET_FILE": secret_file(tmp_path, OTHER_SECRET, name="other")}
    foreign = Seed(path, tmp_path / "foreign_", **theirs)
    seed = Seed(path, tmp_path / "rank_", **ours)
    assert_same(seed.model, load(seed.client(bare, foreign.address, **ours)))
    wrong = "its certificate does not belong to a secret in SECRET_FILE here"
    assert [line for line in log if f"source {foreign.address}: {wrong}" in line]
    del log[:]
    assert_same(seed.model, load(foreign.client(path, **ours)))
    [line] = [line for line in log if "trying the disk" in line]
    assert wrong in line


def test_a_client_gets_the_model_of_a_source_with_certificates(
    models: Path, tmp_path: Path
) -> None:
    authority = Authority(tmp_path)
    theirs, ours = (
        {key.upper(): path for key, path in authority.files(who=who).items()}
        for who in ("source", "client")
    )
    seed = Seed(on_disk(models, "llama"), tmp_path / "rank_", **theirs)
    assert_same(seed.model, load(seed.client(models / "llama-bare", **ours)))


@pytest.fixture
def dies_after_two_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    send, sent = P2PSend.send, []

    def send_two(self: P2PSend, run: Run) -> None:
        sent.append(run)
        if len(sent) > 2:
            raise RuntimeError("the source dies here")
        send(self, run)

    monkeypatch.setattr(P2PSend, "send", send_two)


@pytest.mark.usefixtures("dies_after_two_chunks")
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_half_a_transfer_then_disk_is_as_if_nothing_had_been_tried(
    arch: str, models: Path, tmp_path: Path
) -> None:
    path = on_disk(models, arch)
    seed = Seed(path, tmp_path / "rank_")
    # Other weights than the source's, so that bytes of the first attempt would be noticed.
    other = on_disk(models, arch, seed=1)
    plain_config = make_config(other, load_format="auto")
    plain = load(plain_config)
    config = seed.client(other, CHUNK_MIB=1)
    kinds = {type(plain)}
    before = alive(kinds)
    model = load(config)
    assert_same(plain, model)
    assert alive(kinds) == before + 1  # the half-filled model is gone
    assert registrations(config) == registrations(plain_config)
    layers = set(map(id, model.modules()))
    for layer in config.compilation_config.static_forward_context.values():
        assert not isinstance(layer, nn.Module) or id(layer) in layers


def alive(kinds: set[type]) -> int:
    gc.collect()
    return sum(type(thing) in kinds for thing in gc.get_objects())


def registrations(config: VllmConfig) -> dict[str, object]:
    compilation = config.compilation_config
    return {
        name: list(value) if isinstance(value, dict | list) else value
        for name, value in vars(compilation).items()
        if isinstance(value, dict | list | set)
    }


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("127.0.0.1:1", "127.0.0.1:1: cannot connect"),
        ("127.0.0.1", "malformed source '127.0.0.1': no port"),
    ],
)
def test_without_source_and_without_weights_one_error_says_both(
    address: str, reason: str, models: Path
) -> None:
    on_disk(models, "llama")
    source = [{"device_id": 0, "sources": [address]}]
    with pytest.raises(LoadFailed) as failed:
        load(make_config(models / "llama-bare", MODEL="m", SOURCE=source, **NO_SERVER))
    assert f"no source gave the weights ({reason}" in str(failed.value)
    assert "Cannot find any model weights" in str(failed.value)


def test_a_malformed_address_costs_one_warning_and_not_the_load(
    models: Path, tmp_path: Path, log: list[str]
) -> None:
    seed = Seed(on_disk(models, "llama"), tmp_path / "rank_")
    client = load(seed.client(models / "llama-bare", "tcp://127.0.0.1:1"))
    assert_same(seed.model, client)
    [line] = [line for line in log if "malformed" in line]
    assert line.startswith("NetLoader rank 0: malformed source 'tcp://127.0.0.1:1': ")


def test_keys_of_vllms_default_loader_count_for_the_disk(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = on_disk(models, "llama")
    asked = []

    def read(*arguments: Any, **options: Any) -> Any:
        asked.append(options["max_workers"])
        return weight_utils.multi_thread_safetensors_weights_iterator(*arguments, **options)

    monkeypatch.setattr(default_loader, "multi_thread_safetensors_weights_iterator", read)
    keys = {"enable_multithread_load": True, "num_threads": 3}
    assert_same(
        load(make_config(path, load_format="auto")), load(make_config(path, **NO_SERVER, **keys))
    )
    assert asked == [3]


def test_a_source_with_another_config_is_refused_with_both_values(
    models: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    seed = Seed(on_disk(models, "llama"), tmp_path / "rank_")
    logging.getLogger("vllm").propagate = True
    config = seed.client(on_disk(models, "llama-tied"))
    load(config)
    [line] = {r.getMessage() for r in caplog.records if "trying the disk" in r.getMessage()}
    differ = "config.tie_word_embeddings is True here and False there"
    assert f"{seed.address}: other_model: the models differ: {differ}" in line


@pytest.mark.skipif(
    not hasattr(ModelConfig, "maybe_untie_word_embeddings"),
    reason="this vLLM believes the configuration, whatever the checkpoint has",
)
@pytest.mark.parametrize("equal", [True, False], ids=["equal", "other"])
def test_a_head_that_only_the_files_of_the_source_have_is_asked_for_with_an_override(
    models: Path, tmp_path: Path, equal: bool
) -> None:
    path = tmp_path / "with-head"
    shutil.copytree(on_disk(models, "llama-tied"), path)
    weights = load_file(path / "model.safetensors")
    head = weights["model.embed_tokens.weight"]
    weights["lm_head.weight"] = head.clone() if equal else head.flip(0).contiguous()
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    copy_without_weights(path, tmp_path / "bare")
    seed = Seed(path, tmp_path / "rank_")
    with pytest.raises(LoadFailed, match="tie_word_embeddings is True here and False there"):
        load(seed.client(tmp_path / "bare", FALLBACK=False))
    untied = {"hf_overrides": {"tie_word_embeddings": False}}
    client = load(seed.client(tmp_path / "bare", FALLBACK=False, engine=untied))
    assert_same(seed.model, client)
    assert torch.equal(client.lm_head.weight.flip(0), client.model.embed_tokens.weight) != equal
    assert torch.equal(client.lm_head.weight, client.model.embed_tokens.weight) == equal


def test_reload_in_place_takes_the_new_weights_of_the_source(models: Path, tmp_path: Path) -> None:
    old = Seed(on_disk(models, "llama"), tmp_path / "old_")
    renewed = Seed(on_disk(models, "llama", seed=1), tmp_path / "new_")
    config = old.client(models / "llama-bare")
    model = load(config)
    assert_same(old.model, model)
    reload_from(config, model, renewed.address)
    assert_same(renewed.model, model)


def test_a_reload_makes_a_source_of_an_instance_that_could_not_be_one_before(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed = Seed(on_disk(models, "llama"), tmp_path / "seed_")
    source = [{"device_id": 0, "sources": [seed.address]}]
    prefix = tmp_path / "rank_"
    bare = models / "llama-bare"
    config = make_config(bare, MODEL="m", SOURCE=source, OUTPUT_PREFIX=str(prefix))

    def refuse(*_: object) -> None:
        raise LayoutUnsupported("no copy was kept")

    with monkeypatch.context() as patched:
        patched.setattr(netloader, "after_processing", refuse)
        model = load(config)
    port_file = Path(f"{prefix}0.txt")
    source = [{"device_id": 0, "sources": [port_file.read_text()]}]
    with pytest.raises(LoadFailed, match="cannot_serve: no copy was kept"):
        load(make_config(bare, MODEL="m", SOURCE=source, FALLBACK=False, **NO_SERVER))
    with worker(config) as loader:
        loader.load_weights(model, config.model_config)
    registry.wait_for_renewal()
    assert_same(seed.model, load(make_config(bare, MODEL="m", SOURCE=source, **NO_SERVER)))


@pytest.mark.parametrize("arch", ["llama", "llama-tied", "gemma2", "opt"])
def test_vllms_own_reload_takes_the_new_weights_of_the_source(
    arch: str, models: Path, tmp_path: Path
) -> None:
    old = Seed(on_disk(models, arch), tmp_path / "old_")
    renewed = Seed(on_disk(models, arch, seed=1), tmp_path / "new_")
    config = old.client(models / f"{arch}-bare")
    model = load(config)
    config.load_config.model_loader_extra_config["SOURCE"][0]["sources"] = [renewed.address]
    with worker(config) as loader:
        weights = loader.get_all_weights(config.model_config, model)
        initialize_layerwise_reload(model)
        model.load_weights(weights)
        finalize_layerwise_reload(model, config.model_config)
    assert_same(renewed.model, model)


@pytest.mark.parametrize("arch", ["w8a8-dynamic", "w8a8-static", "moe"])
def test_what_vllm_reloads_wrongly_is_refused_and_left_as_it_is(
    arch: str, models: Path, tmp_path: Path
) -> None:
    seed = Seed(on_disk(models, arch), tmp_path / "rank_")
    config = seed.client(models / f"{arch}-bare")
    model = load(config)
    with worker(config) as loader, pytest.raises(LayoutUnsupported, match="cannot reload model"):
        loader.load_weights(model, config.model_config)
    assert_same(seed.model, model)


def test_reload_in_place_without_sources_reads_the_disk(models: Path, tmp_path: Path) -> None:
    path = on_disk(models, "llama")
    seed = Seed(path, tmp_path / "rank_")
    plain = load(make_config(path, load_format="auto"))
    seed.model.model.embed_tokens.weight.data.zero_()
    with worker(seed.config) as loader:
        loader.load_weights(seed.model, seed.config.model_config)
    assert_same(plain, seed.model)
    registry.wait_for_renewal()
    assert_same(plain, load(seed.client(models / "llama-bare")))


# What a constructor reads from the folder


POOLING = {"runner": "pooling"}


def with_dense(models: Path, folder: Path, seed: int = 0) -> tuple[Path, Path]:
    """A model folder with a Sentence-Transformers Dense module, and its copy without weights."""
    path, bare = folder / f"dense-{seed}", folder / f"dense-{seed}-bare"
    shutil.copytree(on_disk(models, "llama"), path)
    add_dense(path, seed)
    copy_without_weights(path, bare)
    return path, bare


def projector(model: nn.Module) -> nn.Module:
    return model.pooler.poolers_by_task["embed"].head.projector


@pytest.mark.parametrize("files", ["none", "others"])
def test_a_client_projects_with_its_sources_dense_module(
    files: str, models: Path, tmp_path: Path
) -> None:
    path, bare = with_dense(models, tmp_path)
    others, _ = with_dense(models, tmp_path, seed=1)
    seed = Seed(path, tmp_path / "rank_", engine=POOLING)
    client = load(seed.client(bare if files == "none" else others, engine=POOLING, FALLBACK=False))
    assert_same(seed.model, client)
    given = torch.randn(3, 256)
    there = projector(seed.model)(given)
    assert there.shape == (3, 64)
    assert torch.equal(projector(client)(given), there)
    assert not torch.equal(
        projector(load(make_config(others, "auto", engine=POOLING)))(given), there
    )


def test_a_module_that_a_client_cannot_make_is_refused_by_name(
    models: Path, tmp_path: Path
) -> None:
    path, _ = with_dense(models, tmp_path)
    seed = Seed(path, tmp_path / "rank_", engine=POOLING)
    config = seed.client(models / "llama-bare", engine=POOLING, FALLBACK=False)
    name = r"pooler\.poolers_by_task\['embed'\]\.head\.projector\.0\.weight is only there"
    with pytest.raises(LoadFailed, match=name):
        load(config)


# Reloads that are refused before anything has changed, and those of models of others


def test_a_reload_takes_the_new_dense_module_of_the_source(models: Path, tmp_path: Path) -> None:
    (one, bare), (two, _) = with_dense(models, tmp_path), with_dense(models, tmp_path, seed=1)
    old = Seed(one, tmp_path / "old_", engine=POOLING)
    renewed = Seed(two, tmp_path / "new_", engine=POOLING)
    config = old.client(bare, engine=POOLING)
    model = load(config)
    assert_same(old.model, model)
    reload_from(config, model, renewed.address)
    assert_same(renewed.model, model)


@LORA_LOADS
def test_a_model_with_lora_layers_is_reloaded_with_the_checkpoint_of_the_source(
    models: Path, tmp_path: Path, log: list[str]
) -> None:
    seed = Seed(on_disk(models, "llama"), tmp_path / "old_")
    renewed = Seed(on_disk(models, "llama", seed=1), tmp_path / "new_")
    config = seed.client(models / "llama-bare", FALLBACK=False)
    model = load(config)
    # Where LoRA is enabled vLLM puts such layers in the place of a model's own.
    attention = model.model.layers[1].self_attn
    attention.o_proj = RowParallelLinearWithLoRA(attention.o_proj)
    # One name for all ranks, as the guide recommends.
    config.load_config.model_loader_extra_config["SOURCE"] = renewed.address
    with worker(config) as loader:
        loader.load_weights(model, config.model_config)
    attention.o_proj = attention.o_proj.base_layer
    assert_same(renewed.model, model)
    assert [line for line in log if "got the checkpoint for a reload, " in line]


@pytest.mark.parametrize("arch", ["llama", "llama-tied"])
def test_a_reload_takes_the_checkpoint_of_a_folder_that_is_held(
    arch: str, models: Path, tmp_path: Path
) -> None:
    seed = Seed(on_disk(models, arch), tmp_path / "old_")
    config = seed.client(models / f"{arch}-bare", FALLBACK=False)
    model = load(config)
    path = on_disk(models, arch, seed=1)
    with held(path) as address:
        reload_from(config, model, address)
    assert_same(load(make_config(path, load_format="auto")), model)


@LORA_LOADS
def test_a_reload_with_lora_layers_from_a_source_without_a_view_says_why_and_changes_nothing(
    models: Path, tmp_path: Path
) -> None:
    seed = Seed(on_disk(models, "llama"), tmp_path / "old_")
    renewed = Seed(on_disk(models, "llama", seed=1), tmp_path / "new_")
    config = seed.client(models / "llama-bare", FALLBACK=False)
    model = load(config)
    attention = model.model.layers[1].self_attn
    attention.o_proj = RowParallelLinearWithLoRA(attention.o_proj)
    without_view(renewed)
    with pytest.raises(LoadFailed) as failed:
        reload_from(config, model, renewed.address)
    assert "model.layers.1.self_attn.o_proj.weight is only there" in str(failed.value)
    assert "there are no records of these weights" in str(failed.value)
    attention.o_proj = attention.o_proj.base_layer
    assert_same(seed.model, model)


def without_view(seed: Seed) -> None:
    """Let a source forget how its weights came from a checkpoint."""
    known = registry.in_use(seed.model)
    assert known is not None
    assert known.server is not None
    offers = known.server._offers
    for group, offer in offers.items():
        offers[group] = dataclasses.replace(offer, view=None)


def test_as_vllms_weight_transfer_engine_it_pulls_from_the_sources_that_an_update_names(
    models: Path, tmp_path: Path
) -> None:
    seed = Seed(on_disk(models, "llama"), tmp_path / "old_")
    renewed = Seed(on_disk(models, "llama", seed=1), tmp_path / "new_")
    config = seed.client(models / "llama-bare")
    model = load(config)
    factory = pytest.importorskip("vllm.distributed.weight_transfer").WeightTransferEngineFactory
    transfer = WeightTransferConfig(backend="netloader")
    device = torch.device("cpu")
    with worker(config):
        engine = factory.create_engine(transfer, config, device, model)
        engine.init_transfer_engine(engine.parse_init_info({}))
        engine.start_weight_update()
        with pytest.raises(ConfigError, match="names no instance"):
            engine.update_weights({"source": []})
        with pytest.raises(LoadFailed, match=r"127\.0\.0\.1:1: cannot connect"):
            engine.update_weights({"source": ["127.0.0.1:1"]})
        assert_same(seed.model, model)
        engine.update_weights({"source": [renewed.address]})
        engine.finish_weight_update()
        assert_same(renewed.model, model)
        with pytest.raises(LoadFailed, match="no instance is named for this rank"):
            engine.update_weights({"source": [{"device_id": 1, "sources": [seed.address]}]})
        assert_same(renewed.model, model)
        # As vLLM's `reload_weights` from another folder leaves it.
        config.model_config.model = str(on_disk(models, "llama", seed=1))
        engine.update_weights({"source": [{"device_id": 0, "sources": [seed.address]}]})
        engine.shutdown()
    assert_same(seed.model, model)


def test_a_reload_without_weights_anywhere_changes_nothing_and_says_both_reasons(
    models: Path, tmp_path: Path
) -> None:
    seed = Seed(on_disk(models, "llama"), tmp_path / "old_")
    config = seed.client(models / "llama-bare")
    model = load(config)
    with pytest.raises(LoadFailed) as failed:
        reload_from(config, model, "127.0.0.1:1")
    assert "no source gave the weights (127.0.0.1:1: cannot connect" in str(failed.value)
    assert "Cannot find any model weights" in str(failed.value)
    assert_same(seed.model, model)


def test_a_model_of_another_loader_is_loaded_from_its_sources_and_is_a_source(
    models: Path, tmp_path: Path
) -> None:
    seed = Seed(on_disk(models, "llama-tied"), tmp_path / "old_")
    bare = models / "llama-tied-bare"
    model = load(make_config(bare, "dummy"))
    # What vLLM's `update_config` makes of the instance's configuration.
    prefix = tmp_path / "rank_"
    source = [{"device_id": 0, "sources": [seed.address]}]
    config = make_config(bare, MODEL="m", SOURCE=source, OUTPUT_PREFIX=str(prefix), FALLBACK=False)
    with worker(config) as loader:
        weights = loader.get_all_weights(config.model_config, model)
        initialize_layerwise_reload(model)
        model.load_weights(weights)
        finalize_layerwise_reload(model, config.model_config)
    assert_same(seed.model, model)
    source = [{"device_id": 0, "sources": [Path(f"{prefix}0.txt").read_text()]}]
    third = make_config(bare, MODEL="m", SOURCE=source, FALLBACK=False, **NO_SERVER)
    assert_same(seed.model, load(third))


def test_a_reload_from_a_source_takes_no_more_memory_than_the_load(
    models: Path, tmp_path: Path
) -> None:
    seed = Seed(on_disk(models, "llama"), tmp_path / "old_")
    renewed = Seed(on_disk(models, "llama", seed=1), tmp_path / "new_")
    config = seed.client(models / "llama-bare")
    config.load_config.model_loader_extra_config |= {"OUTPUT_PREFIX": str(tmp_path / "rank_")}
    del config.load_config.model_loader_extra_config["LISTEN_PORT"]
    model = load(config)
    before = served_beside(model)
    reload_from(config, model, renewed.address)
    assert_same(renewed.model, model)
    assert served_beside(model) == before


def served_beside(model: nn.Module) -> set[str]:
    """The names of what an instance keeps for others in memory beside its model's.

    Those of single numbers are left out: attention's scales are set last, after all else.
    """
    known = registry.in_use(model)
    assert known is not None
    assert known.server is not None
    store = known.server._offers["netloader"].store
    assert store is not None
    own = {tensor.data_ptr() for tensor in processed_tensors(model).values()}
    names = store.manifest.names
    kept = zip(names, store.tensors, strict=True)
    return {name for name, one in kept if one.numel() > 1 and one.data_ptr() not in own}


def test_download_model_without_sources_looks_for_the_checkpoint(models: Path) -> None:
    on_disk(models, "llama")
    config = make_config(models / "llama-bare", **NO_SERVER)
    with worker(config) as loader, pytest.raises(RuntimeError, match="Cannot find any model"):
        loader.download_model(config.model_config)


def test_a_busy_port_leaves_a_working_instance_and_one_error_line(
    models: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = on_disk(models, "llama")
    seed = Seed(path, tmp_path / "rank_")
    port = int(seed.address.rpartition(":")[2])
    logging.getLogger("vllm").propagate = True
    model = load(make_config(path, MODEL="m", LISTEN_PORT=port))
    assert_same(seed.model, model)
    [line] = {r.getMessage() for r in caplog.records if r.levelno == logging.ERROR}
    assert f"cannot listen on port {port}" in line


@pytest.mark.parametrize("step", ["capture_loaded", "copy_int8", "after_processing"])
def test_an_instance_without_memory_to_be_a_source_starts_all_the_same(
    step: str,
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = on_disk(models, "w8a8-dynamic")
    plain = load(make_config(path, load_format="auto"))

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate\n2.00 GiB")

    monkeypatch.setattr(netloader, step, fail)
    logging.getLogger("vllm").propagate = True
    prefix = tmp_path / "rank_"
    model = load(make_config(path, MODEL="m", OUTPUT_PREFIX=str(prefix), INT8_CACHE="hbm"))
    assert_same(plain, model)
    why = "preparing it failed: OutOfMemoryError: tried to allocate 2.00 GiB"
    [line] = {r.getMessage() for r in caplog.records if "cannot be a source" in r.getMessage()}
    assert line.endswith(f"cannot be a source: {why}")
    address = Path(f"{prefix}0.txt").read_text()
    with urllib.request.urlopen(f"http://{address}/status", timeout=10) as answer:
        [offered] = json.load(answer)["models"]
    assert (offered["state"], offered["reason"], offered["weights"]) == ("cannot_serve", why, None)


def test_a_wrong_configuration_is_an_error_at_start(models: Path) -> None:
    path = on_disk(models, "llama")
    with pytest.raises(ConfigError, match="INT8_CACHE is 'maybe'; allowed: 'hbm', 'dram' or 'no'"):
        load(make_config(path, INT8_CACHE="maybe"))


def test_a_model_name_that_no_message_can_carry_is_an_error_at_start(models: Path) -> None:
    with pytest.raises(ConfigError, match="MODEL is"):
        load(make_config(on_disk(models, "llama"), MODEL="m" * 513))


def test_on_a_device_that_netloader_does_not_know_it_loads_from_disk(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = on_disk(models, "llama")
    plain = load(make_config(path, load_format="auto"))

    def unknown(device: torch.device, hccl_buffer_mb: int) -> None:
        raise LayoutUnsupported(f"no device of kind {device.type!r}")

    monkeypatch.setattr(netloader, "device_of", unknown)
    source = [{"device_id": 0, "sources": ["127.0.0.1:1"]}]
    config = make_config(path, MODEL="m", SOURCE=source)
    assert_same(plain, load(config))
    with worker(config) as loader:
        assert next(iter(loader.get_all_weights(config.model_config, plain)))
