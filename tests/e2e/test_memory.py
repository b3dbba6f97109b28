"""The guide's table of memory, measured: what an instance keeps beside what vLLM itself takes.

The sizes and words are those on the page, so that a page that says something else fails here.
"""

import ctypes
import gc
import re
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers import rotary_embedding
from vllm.model_executor.layers.linear import LinearBase

from tests.e2e.loading import load, make_config, reload_from, store_of, worker
from tools.make_model import copy_without_weights, make_model
from vllm_ascend.model_loader.netloader import netloader, registry
from vllm_ascend.model_loader.netloader.checkpoint import identity_of
from vllm_ascend.model_loader.netloader.config import parse_config
from vllm_ascend.model_loader.netloader.copies import holding_checkpoint
from vllm_ascend.model_loader.netloader.executor.model.processed import processed_tensors
from vllm_ascend.model_loader.netloader.executor.model.raw import _SMALL
from vllm_ascend.model_loader.netloader.interaction.api import TARGET_GROUP
from vllm_ascend.model_loader.netloader.loading import view_reader

PAGE = Path(__file__).parents[2] / "docs/source/user_guide/feature_guide/netloader_operations.md"
SECTION = PAGE.read_text().partition("\n## Memory\n")[2].partition("\n## ")[0]
ROWS = {
    what: (where, how_much)
    for what, where, how_much in re.findall(r"^\| (.+?) \| (.+?) \| (.+?) \|$", SECTION, re.M)
}
UNITS = {"bytes": 1, "KiB": 1 << 10}
NO_SERVER = {"LISTEN_PORT": 1}


def row(begin: str) -> tuple[str, str]:
    """The only row of the table that begins so: what it is about, and how much it says that is."""
    [(what, (_, how_much))] = [item for item in ROWS.items() if item[0].startswith(begin)]
    return what, how_much


def sizes(text: str) -> list[int]:
    return [int(n) * UNITS[unit] for n, unit in re.findall(r"(\d+) (bytes|KiB)", text)]


def live() -> int:
    """The bytes of all tensors that were made since the first test here and are in use."""
    rotary_embedding._ROPE_DICT.clear()
    gc.collect()
    registry.wait_until_retired()  # a server has the weights of a model until then
    found: dict[int, int] = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu":
            try:
                memory = thing.untyped_storage()
            except (NotImplementedError, ValueError):  # it has none
                continue
            found[memory.data_ptr()] = memory.nbytes()
    return sum(found.values())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_model(folder / "llama-1", "llama", "tiny", 1)
    for arch in ("llama", "w8a8-static", "moe"):
        make_model(folder / f"{arch}-0", arch, "tiny", 0)
        copy_without_weights(folder / f"{arch}-0", folder / f"{arch}-bare")
        # What a first load leaves behind for later ones.
        load(make_config(folder / f"{arch}-0", load_format="auto"))
    return folder


def plain(folder: Path, arch: str) -> tuple[nn.Module, int]:
    """A model that vLLM's default loader has loaded, and the bytes of its tensors."""
    before = live()
    model = load(make_config(folder / f"{arch}-0", load_format="auto"))
    return model, live() - before


def serving(prefix: Path, path: Path, *sources: str, **extra: Any) -> tuple[nn.Module, VllmConfig]:
    """A model that is a source, from disk or from sources."""
    if sources:
        extra |= {"SOURCE": [{"device_id": 0, "sources": [*sources]}], "FALLBACK": False}
    config = make_config(path, MODEL="m", OUTPUT_PREFIX=str(prefix), **extra)
    return load(config), config


def address(prefix: Path) -> str:
    return Path(f"{prefix}0.txt").read_text()


def beside(model: nn.Module) -> dict[str, torch.Tensor]:
    """What a source offers and inference does not use."""
    store = store_of(model)
    used = {one.untyped_storage().data_ptr() for one in processed_tensors(model).values()}
    names = zip(store.manifest.names, store.tensors, strict=True)
    return {name: one for name, one in names if one.untyped_storage().data_ptr() not in used}


def total(tensors: dict[str, torch.Tensor]) -> int:
    return sum({one.data_ptr(): one.nbytes for one in tensors.values()}.values())


@pytest.mark.parametrize(
    ("arch", "source"),
    [("llama", "disk"), ("llama", "source"), ("w8a8-static", "source"), ("moe", "disk")],
)
def test_a_source_keeps_what_post_processing_replaces_and_no_other_tensor(
    arch: str, source: str, folder: Path, tmp_path: Path
) -> None:
    assert row("raw tensors that post-processing replaces")[1].startswith("their size, for as long")
    assert row("raw tensors that post-processing leaves alone")[1].startswith("nothing")
    as_vllm, without = plain(folder, arch)
    _seed, _ = serving(tmp_path / "seed", folder / f"{arch}-0")
    before = live()
    if source == "disk":
        one, _ = serving(tmp_path / "one", folder / f"{arch}-0")
    else:
        one, _ = serving(tmp_path / "one", folder / f"{arch}-bare", address(tmp_path / "seed"))
    kept = live() - before - without
    assert kept == total(beside(one))
    if arch == "llama":
        taken = [one for one in as_vllm.modules() if isinstance(one, LinearBase)]
        taken = [layer for layer in taken if not layer.weight.numel()]
        assert kept == sum(layer.input_size * layer.output_size * 2 for layer in taken)


@pytest.mark.parametrize("source", ["disk", "source"])
def test_an_instance_that_is_no_source_keeps_nothing(
    source: str, folder: Path, tmp_path: Path
) -> None:
    assert '`"LISTEN_PORT": 0` avoids it' in SECTION
    _, without = plain(folder, "llama")
    _seed, _ = serving(tmp_path / "seed", folder / "llama-1")
    before = live()
    extra: dict[str, Any] = {"MODEL": "m", "LISTEN_PORT": 0}
    if source == "source":
        extra["SOURCE"] = [{"device_id": 0, "sources": [address(tmp_path / "seed")]}]
        extra["FALLBACK"] = False
    config = make_config(folder / "llama-0", **extra)
    model = load(config)
    assert live() - before == without
    if source == "source":
        reload_from(config, model, address(tmp_path / "seed"))
    else:
        with worker(config) as loader:
            loader.load_weights(model, config.model_config)
    assert live() - before == without


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, bool]]:
    """Of what copies were made before post-processing, by name, and which of them stay."""
    seen = []
    after_processing = netloader.after_processing

    def look(raw: Any, made: dict[int, torch.Tensor], used: Any) -> Any:
        names = raw.manifest.names
        kept = after_processing(raw, made, used)
        for index, copy in made.items():
            changed = not torch.equal(copy, raw.tensors[index])
            assert (kept.tensors[index] is copy) is changed, names[index]
        seen.append({names[index]: kept.tensors[index] is made[index] for index in made})
        return kept

    monkeypatch.setattr(netloader, "after_processing", look)
    return seen


@pytest.mark.parametrize("mode", ["no", "hbm", "dram"])
def test_small_tensors_and_int8_are_copied_and_the_copies_of_those_that_change_stay(
    mode: str, folder: Path, tmp_path: Path, copies: list[dict[str, bool]]
) -> None:
    small, how_much = row("tensors below")
    assert how_much == row("int8 tensors, with `INT8_CACHE`")[1]
    assert how_much == "a copy before post-processing; afterwards only of those that it changed"
    [limit] = sizes(small)
    assert limit == _SMALL
    assert "that are not int8" in small
    model, _ = serving(tmp_path / "one", folder / "w8a8-static-0", INT8_CACHE=mode)
    store = store_of(model)
    named = dict(zip(store.manifest.names, store.tensors, strict=True))
    int8 = {name for name, tensor in named.items() if tensor.dtype == torch.int8}
    below = {name for name, tensor in named.items() if tensor.nbytes < limit} - int8
    assert int8
    assert below
    assert named.keys() - int8 - below
    [made] = copies
    assert made.keys() == (below if mode == "no" else below | int8)


def test_digests_take_what_the_table_says(folder: Path, tmp_path: Path) -> None:
    [of_block] = sizes(row("digests")[1])
    [share] = re.findall(r"1/([\d,]+) of the weights", row("digests")[1])
    model, _ = serving(tmp_path / "one", folder / "llama-0")
    store = store_of(model)
    taken = len(store.digests.blocks)
    assert taken == of_block * store.blocks.count
    assert taken >= store.blocks.nbytes / int(share.replace(",", ""))


@pytest.mark.parametrize("port", ["a source", "no source"])
def test_a_reload_takes_new_tensors_until_they_are_in_the_model(
    port: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how_much = row("new tensors in a [reload]")[1]
    assert how_much == (
        "the size of all raw tensors, until they are in the model; afterwards memory is as before"
    )
    new, _ = serving(tmp_path / "new", folder / "llama-1")
    extra = {} if port == "a source" else NO_SERVER
    addresses = [address(tmp_path / "new")]
    client, config = serving(tmp_path / "one", folder / "llama-bare", *addresses, **extra)
    during = []
    feed_reload = netloader.feed_reload

    def look(*arguments: Any) -> None:
        during.append(live())
        feed_reload(*arguments)

    monkeypatch.setattr(netloader, "feed_reload", look)
    before = live()
    reload_from(config, client, *addresses)
    registry.wait_for_renewal()
    store = store_of(new)
    # Nobody touches the room for buffers that do not travel.
    others = {n: one for n, one in client.named_buffers() if n not in store.manifest.names}
    assert [one - before for one in during] == [store.blocks.nbytes + total(others)]
    assert live() == before


def test_a_reload_through_a_view_takes_the_checkpoint_until_it_is_in_the_model(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how_much = row("the checkpoint in a reload through a view")[1]
    assert how_much == "the size of the whole checkpoint, at each rank, until it is in the model"
    _seed, _ = serving(tmp_path / "seed", folder / "llama-0")
    client, config = serving(tmp_path / "one", folder / "llama-bare", address(tmp_path / "seed"))
    whole_checkpoint, during = netloader.whole_checkpoint, []

    def look(*arguments: Any) -> Any:
        before = live()
        weights = whole_checkpoint(*arguments)
        during.append(live() - before)
        return weights

    monkeypatch.setattr(netloader, "whole_checkpoint", look)
    known = parse_config({"MODEL": "m"})
    path = folder / "llama-1"
    who = identity_of(path, known.model, TARGET_GROUP)
    with holding_checkpoint(path, who, known, "127.0.0.1", lambda *_: None) as (there, *_):
        before = live()
        reload_from(config, client, str(there))
        registry.wait_for_renewal()
        assert live() == before
    [file] = path.glob("*.safetensors")
    assert during == [sum(tensor.nbytes for tensor in load_file(file).values())]


def test_what_is_on_its_way_through_a_view_is_as_much_as_the_table_says() -> None:
    """That the reader keeps to it is shown without an engine."""
    assert row("tensors on their way through a view")[1].startswith(
        f"up to {view_reader._AHEAD >> 20} MiB"
    )


def test_a_reload_from_disk_leaves_memory_as_before(folder: Path, tmp_path: Path) -> None:
    one, config = serving(tmp_path / "one", folder / "llama-0")
    before = live()
    with worker(config) as loader:
        loader.load_weights(one, config.model_config)
    registry.wait_for_renewal()
    assert live() == before


def resident() -> int:
    """The bytes of this process in memory, without what is only kept for later allocations."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return psutil.Process().memory_info().rss


def test_for_linear_layers_a_source_takes_about_twice_the_memory_of_an_instance_that_is_none(
    folder: Path, tmp_path: Path
) -> None:
    assert "For linear layers on CPUs a source takes about twice the memory" in SECTION
    path = tmp_path / "small"
    make_model(path, "llama", "small")
    load(make_config(path, load_format="auto"))
    taken = []
    for extra in ({"LISTEN_PORT": 0}, {}):
        before = resident()
        model, _ = serving(tmp_path / "one", path, **extra)
        taken.append(resident() - before)
        linear = sum(
            layer.input_size * layer.output_size * 2
            for layer in model.modules()
            if isinstance(layer, LinearBase)
        )
        del model
    others = taken[0] - linear
    copies = 2 if torch.cpu._is_avx512_supported() else 1  # as the section says
    assert taken[1] - others == pytest.approx(copies * linear, rel=0.15)


def test_every_row_of_the_table_that_concerns_a_cpu_is_measured_here() -> None:
    begins = re.findall(r'row\("(.+?)"\)', Path(__file__).read_text())
    on_cpus = {what for what, (where, _) in ROWS.items() if where not in ("Where", "NPU, CUDA")}
    assert {row(begin)[0] for begin in begins} == on_cpus - {"---"}
