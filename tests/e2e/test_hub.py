"""Models given by their name on a hub, or by a folder that stands for it."""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.e2e.hub import Hub, HubModel, cached_files, serving
from tools.netloader_view import source_list

from .forking import forking
from .support import Model, running

NAME = "tests/llama"
OLD, NEW = "1" * 40, "2" * 40  # commits; NEW is main, OLD has the tag v1
NO_SERVER = {"LISTEN_PORT": 1}
Models = Callable[..., Model]

pytestmark = pytest.mark.timeout(600)


@dataclass(frozen=True)
class Loaded:
    """What a process says of a model that it has loaded."""

    model: str
    lines: list[str]
    embeddings: str

    def came_from(self, address: str) -> bool:
        loaded = [line for line in self.lines if ": loaded " in line and f" from {address}" in line]
        return bool(loaded) and not self.refused()

    def refused(self) -> str:
        return "".join(line for line in self.lines if "trying the disk" in line)


class Process:
    """Loads models and keeps them, with a Hub cache of its own."""

    def __init__(self, hub: Hub, home: Path, *, offline: bool = False) -> None:
        self.home = home
        home.mkdir(exist_ok=True)
        self._log = (home / "log.txt").open("w")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.e2e.hub_process"],
            env=os.environ | hub.environment(home, offline=offline),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def load(self, model: Path | str, **arguments: Any) -> Loaded:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"path": str(model)} | arguments) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, (self.home / "log.txt").read_text()[-5000:]
        return Loaded(**json.loads(answer))

    def serve(self, model: Path | str, **arguments: Any) -> str:
        """Loads a model and returns where it is served."""
        prefix = self.home / f"rank-{len(list(self.home.iterdir()))}-"
        self.load(model, OUTPUT_PREFIX=str(prefix), **arguments)
        return Path(f"{prefix}0.txt").read_text()

    def load_from(self, address: str, model: Path | str, **arguments: Any) -> Loaded:
        return self.load(model, SOURCE=source_list({0: [address]}), **NO_SERVER, **arguments)

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()


@dataclass(frozen=True)
class Place:
    """What all tests here use: a hub, and processes with a cache each."""

    hub: Hub
    folders: dict[str, Model]
    start: Callable[..., Process]
    path: Path

    def weights(self, commit: str) -> str:
        """What the embeddings are in a commit."""
        tensors = load_file(self.folders[commit].full / "model.safetensors")
        content = tensors["model.embed_tokens.weight"].view(torch.uint8).numpy().tobytes()
        return hashlib.sha256(content).hexdigest()


@pytest.fixture(scope="module")
def place(model: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folders = {OLD: model("llama", 0), NEW: model("llama", 1)}
    commits = {commit: folder.full for commit, folder in folders.items()}
    path = tmp_path_factory.mktemp("hub")
    with (
        serving({NAME: HubModel(commits, {"main": NEW, "v1": OLD})}) as hub,
        contextlib.ExitStack() as ends,
    ):

        def start(name: str, *, offline: bool = False) -> Process:
            process = Process(hub, path / name, offline=offline)
            ends.callback(process.end)
            return process

        yield Place(hub, folders, start, path)


def at_home(hub: Hub, home: Path) -> dict[str, Any]:
    """How an instance is started that has a cache of its own, for whose place imports look."""
    environment = hub.environment(home)
    start = forking("vllm.entrypoints.cli.serve", environment=lambda: environment)
    return {"environment": environment, "start": start}


def test_vllm_serve_by_a_models_name(place: Place, tmp_path: Path) -> None:
    seed_home, client_home = tmp_path / "seed-home", tmp_path / "client-home"
    hub = place.hub
    with running(tmp_path / "seed", NAME, {}, **at_home(hub, seed_home)) as seed:
        sent = len(hub.weights_sent())
        config = {"SOURCE": source_list({0: [seed.address()]})}
        with running(tmp_path / "client", NAME, config, **at_home(hub, client_home)) as client:
            assert client.say() == seed.say()
            [load] = client.loads()
            assert seed.address() in load.sources
    assert len(hub.weights_sent()) == sent
    assert "model.safetensors" not in cached_files(client_home)


@pytest.fixture(scope="module")
def seed(place: Place) -> Process:
    """Has an empty cache at first and takes weights from the hub."""
    return place.start("seed")


@pytest.fixture(scope="module")
def client(place: Place, seed: Process) -> Process:
    """Has no weights in its cache; what it loads from the hub goes elsewhere."""
    return place.start("client")


@pytest.fixture(scope="module")
def source(seed: Process, place: Place) -> Callable[[str], str]:
    """Returns the address of a source that was started in one of several ways."""
    by_folder = place.folders[NEW].full
    ways: dict[str, tuple[Path | str, dict[str, Any]]] = {
        "main": (NAME, {}),
        "old": (NAME, {"revision": OLD}),
        "folder": (by_folder, {"MODEL": NAME}),
    }

    @cache
    def serve(way: str) -> str:
        model, arguments = ways[way]
        return seed.serve(model, **arguments)

    return serve


@dataclass(frozen=True)
class ByName:
    loaded: Loaded
    downloaded: list[tuple[str, str]]


@pytest.fixture(scope="module")
def by_name(place: Place, client: Process, source: Callable[[str], str]) -> ByName:
    """A load by the model's name alone, and what it has downloaded."""
    address = source("main")
    before = len(place.hub.sent)
    loaded = client.load_from(address, NAME)
    return ByName(loaded, place.hub.sent[before:])


@pytest.mark.core
def test_by_its_name_a_client_takes_the_weights_of_its_source_and_downloads_none(
    place: Place, client: Process, source: Callable[[str], str], by_name: ByName
) -> None:
    assert by_name.loaded.came_from(source("main"))
    assert by_name.loaded.embeddings == place.weights(NEW)
    assert (NEW, "config.json") in by_name.downloaded
    assert not [file for _, file in by_name.downloaded if file.endswith(".safetensors")]
    assert "config.json" in cached_files(client.home)
    assert "model.safetensors" not in cached_files(client.home)


@pytest.mark.core
@pytest.mark.parametrize("revision", [OLD, "v1"])
def test_equal_commits_go_together_however_they_were_asked_for(
    place: Place, client: Process, source: Callable[[str], str], revision: str
) -> None:
    loaded = client.load_from(source("old"), NAME, revision=revision)
    assert loaded.came_from(source("old"))
    assert loaded.embeddings == place.weights(OLD)


@pytest.mark.core
@pytest.mark.parametrize("revision", [NEW, None])
def test_another_commit_is_refused_by_name_and_the_hub_has_the_weights(
    place: Place,
    client: Process,
    source: Callable[[str], str],
    revision: str | None,
    tmp_path: Path,
) -> None:
    address = source("old")  # which was asked for
    sent = len(place.hub.weights_sent())
    loaded = client.load_from(address, NAME, revision=revision, download_dir=str(tmp_path))
    why = f"other_model: the models differ: revision is '{NEW}' here and '{OLD}' there"
    assert f"{address}: {why}" in loaded.refused()
    assert loaded.embeddings == place.weights(NEW)
    assert place.hub.weights_sent()[sent:] == [(NEW, "model.safetensors")]


@pytest.mark.core
def test_a_name_and_a_folder_go_together(
    place: Place, client: Process, source: Callable[[str], str]
) -> None:
    for revision in (None, "main", NEW):
        by_name = client.load_from(source("folder"), NAME, revision=revision)
        assert by_name.came_from(source("folder"))
        assert by_name.embeddings == place.weights(NEW)
    by_folder = client.load_from(source("main"), place.folders[NEW].bare, MODEL=NAME)
    assert by_folder.came_from(source("main"))
    assert by_folder.embeddings == place.weights(NEW)


@pytest.mark.core
@pytest.mark.usefixtures("by_name")
def test_without_a_hub_the_caches_need_not_be_in_the_same_place(
    place: Place, client: Process, seed: Process, source: Callable[[str], str]
) -> None:
    online = source("main")
    for home in (seed.home, client.home):
        shutil.copytree(home / "hub", place.path / f"offline-{home.name}" / "hub", symlinks=True)
    offline_seed = place.start("offline-seed", offline=True)
    offline_client = place.start("offline-client", offline=True)
    sent = len(place.hub.sent)
    for address in (offline_seed.serve(NAME), online):
        loaded = offline_client.load_from(address, NAME)
        assert loaded.came_from(address)
        assert loaded.embeddings == place.weights(NEW)
        assert loaded.model.startswith(str(offline_client.home))  # what vLLM makes of the name
    assert "model.safetensors" not in cached_files(offline_client.home)
    assert len(place.hub.sent) == sent
