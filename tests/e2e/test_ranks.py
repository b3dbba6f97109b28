"""What becomes of an instance whose ranks get weights of different checkpoints.

The loader inside vLLM, in two processes that are the ranks of all instances, without an engine.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import made_of
from tools.make_model import copy_without_weights, make_model
from tools.netloader_view import read_address, source_list
from vllm_ascend.model_loader.netloader import registry
from vllm_ascend.model_loader.netloader.executor.view.boxes import box_of
from vllm_ascend.model_loader.netloader.executor.view.fetch import find
from vllm_ascend.model_loader.netloader.executor.view.records import chain_of, dtype_of

from .killing_proxy import killing_proxy
from .loading import assert_same, load, make_config
from .ranks import Outcome, Pair

pytestmark = [pytest.mark.core, pytest.mark.timeout(300)]

WAYS = {"tp": {"tp": 2}, "pp": {"pp": 2}}
# What pipeline stages would show no better.
tp_only = pytest.mark.parametrize("way", ["tp"], indirect=True, scope="module")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two checkpoints of one architecture, and a folder without weights."""
    folder = tmp_path_factory.mktemp("ranks")
    for seed, name in enumerate("ab"):
        make_model(folder / name, "llama", "tiny", seed)
    copy_without_weights(folder / "a", folder / "bare")
    return {name: folder / name for name in ("a", "b", "bare")}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    running = Pair(tmp_path_factory.mktemp("pair"))
    yield running
    running.close()


@pytest.fixture(scope="module", params=WAYS)
def way(request: pytest.FixtureRequest) -> dict[str, int]:
    return WAYS[request.param]


@pytest.fixture(scope="module")
def sources(pair: Pair, folders: dict[str, Path], way: dict[str, int]) -> dict[str, Outcome]:
    """An instance of each checkpoint, from disk."""
    running = {name: pair.load(folders[name], **way) for name in "ab"}
    for each in running.values():
        assert each.errors == ["", ""]
    assert not set(running["a"].has) & set(running["b"].has)
    return running


def from_both(a: Outcome, b: Outcome) -> list[dict[str, Any]]:
    return source_list({0: [a.address(0)], 1: [b.address(1)]})


def test_an_instance_says_what_all_its_ranks_have(
    pair: Pair, folders: dict[str, Path], way: dict[str, int], sources: dict[str, Outcome]
) -> None:
    a = sources["a"]
    same = source_list({rank: [a.address(rank)] for rank in (0, 1)})
    client = pair.load(folders["bare"], SOURCE=same, **way)
    assert (client.errors, client.has) == (["", ""], a.has)
    there = [each.status(rank) for each in (a, client) for rank in (0, 1)]
    [digest] = {status.instance_digest for status in there}
    ranks = {rank: status.weights for rank, status in enumerate(there[:2])}
    assert all(status.ranks == ranks for status in there)
    for each in (a, client):
        assert each.said("instance digest .*") == [
            f"instance digest {digest}, from the weights digests of 2 of 2 ranks"
        ]
    assert sources["b"].status(0).instance_digest != digest


def test_ranks_with_sources_of_two_checkpoints_end_with_one(
    pair: Pair, folders: dict[str, Path], way: dict[str, int], sources: dict[str, Outcome]
) -> None:
    a, b = sources["a"], sources["b"]
    mixed = source_list({0: [a.address(0)], 1: [b.address(1), a.address(1)]})
    client = pair.load(folders["bare"], SOURCE=mixed, MAX_SOURCES=1, **way)
    assert (client.errors, client.has) == (["", ""], a.has)
    [line] = client.said("rank 1: the ranks of this instance have different weights: .*")
    assert f"{b.address(1)}; this rank loads again from sources" in line
    assert client.status(1).ranks == a.status(0).ranks


def test_a_source_lost_in_mid_load_and_another_checkpoint_on_disk_end_with_the_disks(
    pair: Pair, folders: dict[str, Path], way: dict[str, int], sources: dict[str, Outcome]
) -> None:
    a, b = sources["a"], sources["b"]
    with killing_proxy(a.address(1), lambda: None, after=1 << 20) as lost:
        broken = source_list({0: [a.address(0)], 1: [lost]})
        # Without a port they are compared all the same.
        client = pair.load(folders["b"], SOURCE=broken, CHUNK_MIB=1, LISTEN_PORT=1, **way)
    assert (client.errors, client.has) == (["", ""], b.has)
    assert len(client.said("rank 1: trying the disk")) == 1
    assert len(client.said("rank 0: .* different weights: .* loads again from disk")) == 1


@tp_only
def test_ranks_take_the_weights_of_the_instance_that_is_pinned_and_no_others(
    pair: Pair, folders: dict[str, Path], way: dict[str, int], sources: dict[str, Outcome]
) -> None:
    a, b = sources["a"], sources["b"]
    status = a.status(0)
    refused = "its weights are .* of instance:.* and WEIGHTS_DIGEST is "
    either = source_list({rank: [b.address(rank), a.address(rank)] for rank in (0, 1)})
    for pinned in (status.instance_digest, [*status.ranks.values()]):
        config = {"SOURCE": either, "MAX_SOURCES": 1, "FALLBACK": False, "WEIGHTS_DIGEST": pinned}
        client = pair.load(folders["bare"], **config, **way)
        assert (client.errors, client.has) == (["", ""], a.has)
        assert len(client.said(refused)) == 2
    others = pair.load(folders["b"], LISTEN_PORT=1, WEIGHTS_DIGEST=status.instance_digest, **way)
    assert len(others.said("the weights from disk are .* and WEIGHTS_DIGEST is ")) == 2
    same = pair.load(folders["a"], LISTEN_PORT=1, WEIGHTS_DIGEST=status.instance_digest, **way)
    assert not same.said("WEIGHTS_DIGEST")


@tp_only
def test_the_same_checkpoint_on_disk_is_not_loaded_twice(
    pair: Pair, folders: dict[str, Path], way: dict[str, int], sources: dict[str, Outcome]
) -> None:
    a = sources["a"]
    only_one = source_list({0: [a.address(0)]})
    client = pair.load(folders["a"], SOURCE=only_one, LISTEN_PORT=1, **way)
    assert (client.errors, client.has) == (["", ""], a.has)
    assert len(client.said(r"rank \d: loaded .*")) == 2
    assert not client.said("different weights")


@tp_only
@pytest.mark.parametrize(
    ("folder", "fallback", "why"),
    [
        ("b", False, "; FALLBACK is false"),
        ("bare", True, "cannot be loaded from disk either"),
    ],
)
def test_a_mixture_that_nothing_can_mend_ends_the_start_of_both_ranks(
    pair: Pair,
    folders: dict[str, Path],
    way: dict[str, int],
    sources: dict[str, Outcome],
    folder: str,
    fallback: bool,
    why: str,
) -> None:
    mixed = from_both(sources["a"], sources["b"])
    client = pair.load(folders[folder], SOURCE=mixed, FALLBACK=fallback, **way)
    assert all(error.startswith("LoadFailed: ") for error in client.errors)
    assert all(why in error for error in client.errors)
    assert client.has == [None, None]


@tp_only
def test_one_rank_that_fails_ends_the_start_of_both(
    pair: Pair, folders: dict[str, Path], way: dict[str, int], sources: dict[str, Outcome]
) -> None:
    only_one = source_list({0: [sources["a"].address(0)]})
    client = pair.load(folders["bare"], SOURCE=only_one, **way)
    assert "LoadFailed: the ranks of this instance cannot get weights" in client.errors[0]
    assert "rank 1 has none (RuntimeError: Cannot find any model weights" in client.errors[0]
    assert client.errors[1].startswith("RuntimeError: Cannot find any model weights")


@tp_only
def test_a_reload_takes_weights_that_belong_together_or_none(
    pair: Pair, folders: dict[str, Path], way: dict[str, int], sources: dict[str, Outcome]
) -> None:
    a, b = sources["a"], sources["b"]
    all_of_a = source_list({rank: [a.address(rank)] for rank in (0, 1)})
    client = pair.load(folders["bare"], SOURCE=all_of_a, FALLBACK=False, **way)
    before = client.status(0)
    mixed = pair.reload(client, SOURCE=from_both(b, a))
    assert all("cannot get weights that belong together" in error for error in mixed.errors)
    assert mixed.has == a.has
    assert client.status(0) == before
    either = {0: [b.address(0), a.address(0)], 1: [a.address(1), b.address(1)]}
    renewed = pair.reload(client, SOURCE=source_list(either), MAX_SOURCES=1)
    assert (renewed.errors, renewed.has) == (["", ""], b.has)
    assert client.status(1).ranks == b.status(1).ranks


@tp_only
def test_instances_of_other_sizes_and_without_weight_files_get_the_weights(
    pair: Pair,
    folders: dict[str, Path],
    way: dict[str, int],
    sources: dict[str, Outcome],
    tmp_path: Path,
) -> None:
    two, bare = sources["a"], folders["bare"]
    given = {"MODEL": "m", "FALLBACK": False, "OUTPUT_PREFIX": str(tmp_path / "one")}
    either = source_list({0: [two.address(1), two.address(0)]})
    one = load(make_config(bare, SOURCE=either, **given))
    assert_same(one, load(make_config(folders["a"], load_format="auto")))
    given |= {"SOURCE": [read_address(tmp_path / "one")], "OUTPUT_PREFIX": str(tmp_path / "like")}
    like = load(make_config(bare, **given))  # by name
    assert_same(one, like)
    known = registry.in_use(one)
    assert known is not None and known.server is not None
    known.server.stop()
    name = read_address(tmp_path / "like")
    again = pair.load(bare, SOURCE=[name], FALLBACK=False, **way)
    assert (again.errors, again.has) == (["", ""], two.has)
    assert again.status(1).ranks == two.status(0).ranks
    lines = again.said(r"loaded .* through their view of the checkpoint \(TP 1 there, TP 2 here\)")
    assert len(lines) == 2


CUTS: dict[str, dict[str, Any]] = {
    "whole": {},
    "tp": {"tp": 2},
    "pp": {"pp": 2},
    "ep": {"tp": 2, "engine": {"enable_expert_parallel": True}},
}


@pytest.mark.parametrize(
    ("kind", "cuts"),
    [
        ("llama", ["tp", "pp", "whole"]),
        ("moe", ["tp", "ep", "whole"]),
        ("w8a8-static", ["tp", "whole"]),
    ],
)
def test_ranks_that_are_cut_in_one_way_have_what_those_cut_in_another_need(
    pair: Pair, tmp_path: Path, kind: str, cuts: list[str]
) -> None:
    make_model(tmp_path, kind, "tiny", 0)
    views = {cut: pair.view(tmp_path, **CUTS[cut]) for cut in cuts}
    for source, client in itertools.product(cuts, cuts):
        there = [view.records for view in views[source]]
        ranks = [(view.records, view.parameters) for view in views[source]]
        for rank, view in enumerate(views[client]):
            assert not view.records.computed and not view.needs.computed
            fetch, missing = find(view.needs, there, rank)
            assert not missing, (source, client, rank)
            parts = [(number, part) for number, each in enumerate(fetch.parts) for part in each]
            made, _ = made_of(fetch, parts, ranks)
            whole = {seen.name: one for seen, one in zip(fetch.tensors, made, strict=True)}
            got = {name: torch.zeros_like(one) for name, one in view.parameters.items()}
            for fill in view.needs.fills:
                place = got[view.needs.parameters[fill.parameter].name]
                place.as_strided(fill.size, fill.stride, fill.offset).fill_(fill.value)
            for seen in view.needs.tensors:
                for copy in seen.copies:
                    place = got[view.needs.parameters[copy.parameter].name]
                    box = box_of(whole[seen.name], copy.box)
                    first, *others = chain_of(copy, seen)
                    box = box.view(dtype_of(first))
                    for dtype in others:
                        box = box.to(dtype_of(dtype))
                    place.as_strided(copy.size, copy.stride, copy.offset).copy_(box)
            for name, one in view.parameters.items():
                assert torch.equal(got[name], one), (source, client, rank, name)


@pytest.mark.parametrize(
    ("kind", "there", "here"),
    [
        ("llama", "pp", "tp"),
        ("moe", "tp", "ep"),
        ("moe", "ep", "pp"),
        ("w8a8-static", "tp", "pp"),
    ],
)
def test_an_instance_that_is_cut_in_one_way_fills_one_that_is_cut_in_another(
    pair: Pair, tmp_path: Path, kind: str, there: str, here: str
) -> None:
    make_model(tmp_path / "full", kind, "tiny", 0)
    copy_without_weights(tmp_path / "full", tmp_path / "bare")
    source = pair.load(tmp_path / "full", **CUTS[there])
    disk = pair.load(tmp_path / "full", **CUTS[here])
    name = [source.address(0)]
    client = pair.load(tmp_path / "bare", SOURCE=name, FALLBACK=False, **CUTS[here])
    assert client.errors == ["", ""] and client.has == disk.has
    assert len(client.said("loaded .* through their view of the checkpoint")) == 2
