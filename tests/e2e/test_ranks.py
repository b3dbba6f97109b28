"""What becomes of an instance whose ranks get weights of different checkpoints.

The loader inside vLLM, in two processes that are the ranks of all instances, without an engine.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tools.make_model import copy_without_weights, make_model
from tools.netloader_view import source_list
from vllm_ascend.model_loader.netloader.interaction.elastic import ElasticClient
from vllm_ascend.model_loader.netloader.utils import Address

from .killing_proxy import killing_proxy

pytestmark = [pytest.mark.core, pytest.mark.timeout(300)]

WAYS = {"tp": {"tp": 2}, "pp": {"pp": 2}}
# What pipeline stages would show no better.
tp_only = pytest.mark.parametrize("way", ["tp"], indirect=True, scope="module")


class Pair:
    """Two processes: the ranks of every instance here."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names = iter(range(10**6))
        self.ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.e2e.ranks_process", str(rank), str(folder / "meet")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=(folder / f"log{rank}.txt").open("w"),
                # Different ones, so that vLLM's ranks share no memory that outlives them.
                env=os.environ | {"VLLM_DIST_IDENT": str(rank)},
                text=True,
            )
            for rank in (0, 1)
        ]

    def do(self, order: dict[str, Any], only_first: dict[str, Any] | None = None) -> "Outcome":
        """Let both ranks do the same, but for what is another thing at the first."""
        for rank, changes in zip(self.ranks, (only_first or {}, {}), strict=True):
            assert rank.stdin is not None
            rank.stdin.write(json.dumps(order | changes) + "\n")
            rank.stdin.flush()
        answers = []
        for rank in self.ranks:
            assert rank.stdout is not None
            line = rank.stdout.readline()
            assert line, "a rank has died: see its log"
            answers.append(json.loads(line))
        return Outcome(order["name"], answers, self.folder / order["name"])

    def load(self, path: Path, only_first: dict[str, Any] | None = None, **extra: Any) -> "Outcome":
        name = f"i{next(self.names)}"
        given = {"name": name, "path": str(path), "MODEL": "m"}
        prefix = {"OUTPUT_PREFIX": str(self.folder / name)}
        return self.do(given | prefix | extra, only_first)

    def reload(self, loaded: "Outcome", **extra: Any) -> "Outcome":
        return self.do({"name": loaded.name, "reload": True} | extra)


class Outcome:
    """What both ranks have said."""

    def __init__(self, name: str, answers: list[dict[str, Any]], prefix: Path) -> None:
        self.name = name
        self.errors = [answer["error"] for answer in answers]
        self.lines = [line for answer in answers for line in answer["lines"]]
        self.has = [answer.get("has") for answer in answers]
        self.prefix = prefix

    def address(self, rank: int) -> str:
        return Path(f"{self.prefix}{rank}.txt").read_text()

    def said(self, pattern: str) -> list[str]:
        return [found[0] for line in self.lines if (found := re.search(pattern, line))]

    def status(self, rank: int) -> Any:
        host, _, port = self.address(rank).rpartition(":")
        deadlines = {"connect": 5.0, "handshake": 5.0, "progress": 5.0}
        with ElasticClient.connect(Address(host, int(port)), **deadlines) as client:
            return client.status().models[0]


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
    for rank in running.ranks:
        assert rank.stdin is not None
        rank.stdin.close()
    for rank in running.ranks:
        with contextlib.suppress(subprocess.TimeoutExpired):
            rank.wait(30)
        rank.kill()
        rank.wait()


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
