"""Instances of the released vLLM Ascend, with this NetLoader in it, on simulated NPUs."""

import contextlib
import functools
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.vllm_server import Completion, VllmServer, launch

from ..e2e.forking import forking
from ..e2e.support import Instance
from .cann.build import SITE_PACKAGES
from .simulator import CACHE, CHILDREN, HERE, environment

# Of a machine that others use as well; alone it takes 12 s.
START_SECONDS = 300.0
DEVICES = 64
MOST_RANKS = 4
TOKENS = 32
TP2 = ("--tensor-parallel-size=2",)

ENVIRONMENT = {
    "NPU_SIM_DEVICES": str(DEVICES),
    "NPU_SIM_HBM_MB": "4096",
    # CANN's own: only NetLoader's deadlines may end a transfer.
    "HCCL_CONNECT_TIMEOUT": "120",
    "HCCL_EXEC_TIMEOUT": "1836",
    # A peer that is gone is not noticed by HCCL, as over RDMA.
    "NPU_SIM_PEER_GONE": "wait",
    # vLLM runs modules with "python -m", which would put the current folder first, and in that of
    # the repository is a vllm_ascend.
    "PYTHONPATH": "",
    "PYTHONSAFEPATH": "1",
    # What vLLM finds out about a model's class is good for one version of it.
    "VLLM_CACHE_ROOT": str(CACHE / "vllm"),
    # Half the imports of `vllm serve`'s own choice, spawn.
    "VLLM_WORKER_MULTIPROC_METHOD": "fork",
}


@functools.cache
def npu_environment() -> dict[str, str]:
    """Returns the environment of `vllm serve` and of whatever else runs in its place."""
    return environment(ENVIRONMENT)


@dataclass(frozen=True)
class NpuModel:
    """A model folder, a copy of it without weight files, and what a CPU says to its prompts."""

    full: Path
    bare: Path
    prompts: tuple[tuple[int, ...], ...]
    reference: tuple[tuple[str, ...], ...]
    arguments: tuple[str, ...] = ()


def make_models(folder: Path) -> dict[str, NpuModel]:
    """Makes what models.py makes, by the names of its folders."""
    run([sys.executable, str(HERE / "models.py"), str(folder)])
    return {path.name: _model(path) for path in sorted(folder.iterdir())}


def make_llama(path: Path, seed: int) -> NpuModel:
    """Makes a Llama of several chunks, of which there is no reference."""
    command = [sys.executable, "-m", "tools.make_model", str(path), "--size=tiny", f"--seed={seed}"]
    # vllm_ascend is not imported, so it does not matter which one is found in that folder.
    run(command, cwd=HERE.parents[1], env={"PYTHONSAFEPATH": ""})
    return _model(path)


def _model(path: Path) -> NpuModel:
    bare = path.with_name(f"{path.name}-bare")
    shutil.copytree(path, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    file = path / "reference.json"
    said: dict[str, Any] = {"prompts": [range(10, 20), (7, 5, 3)], "tokens": []}
    if file.exists():
        said = json.loads(file.read_text())
    return NpuModel(
        path,
        bare,
        tuple(map(tuple, said["prompts"])),
        tuple(tuple(map(_text, tokens)) for tokens in said["tokens"]),
        ("--quantization=ascend",) if (path / "quant_model_description.json").exists() else (),
    )


def _text(token: int) -> str:
    """Returns how the tokenizer of models.py writes a token."""
    special = ("<unk>", "<s>", "</s>")
    return special[token] if token < len(special) else f"t{token}"


def run(
    command: Sequence[str], cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> str:
    """Runs a program that may import torch_npu to its end and returns what it printed."""
    done = subprocess.run(
        command, cwd=cwd, env=npu_environment() | dict(env or {}), capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


@dataclass(frozen=True)
class NpuInstance(Instance):
    """A `vllm serve` on NPUs of its own."""

    model: NpuModel
    ranks: int

    def wait(self) -> "NpuInstance":
        """Waits until it answers requests."""
        self.server.wait_until_ready(START_SECONDS)
        return self

    def wait_for_log(self, pattern: str) -> re.Match[str]:
        return self.server.wait_for_log(pattern, START_SECONDS)

    def wait_until_pulling(self) -> None:
        """Waits until some of the weights are here; one has to see to it that others are not."""
        self.wait_for_log(r"Loading weights from peers: +[1-9]\d?%")

    def say(self) -> list[Completion]:
        return [self.server.complete(prompt, TOKENS) for prompt in self.model.prompts]

    def accepted(self) -> float:
        """Returns how many of its draft's tokens an instance has said."""
        return self.server.count("vllm:spec_decode_num_accepted_tokens_total")

    def say_little(self, replica: int = 0) -> list[Completion]:
        """What the engine of a data-parallel rank says, where each token takes several ranks."""
        return [self.server.complete(prompt, 12, replica) for prompt in self.model.prompts]

    def status(self, rank: int) -> dict[str, Any]:
        """What NetLoader's port of a worker says of itself."""
        with urllib.request.urlopen(f"http://{self.address(rank)}/status", timeout=60) as answer:
            status: dict[str, Any] = json.load(answer)
        return status

    def not_seen_through(self) -> list[str]:
        """Returns the tensors of the checkpoint that the first rank cannot give whole."""
        command = [sys.executable, str(CHILDREN / "gaps.py"), self.address(), str(self.model.full)]
        gaps: list[str] = json.loads(run(command, env={"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}))
        return gaps

    def addresses(self) -> dict[int, list[str]]:
        return {rank: [self.address(rank)] for rank in range(self.ranks)}

    def assert_loaded_from(self, source: "NpuInstance", models: int = 1) -> None:
        """Both logs tell of the same bytes, rank by rank, for each of an instance's models."""
        loads = self.loads()
        assert [load.rank for load in loads] == sorted([*range(self.ranks)] * models)
        for load in loads:
            assert source.address(load.rank) in load.sources
            assert load.megabytes > 0
        digests = {load.digest for load in loads}
        assert len(digests) == self.ranks * models
        assert digests <= source.digests_sent()
        assert not self.why_from_disk()


def assert_as_on_cpu(said: Sequence[Completion], model: NpuModel, count: int | None = None) -> None:
    """What was said begins with what the CPU said, and is varied enough for an error to show.

    Args:
        said: after the model's prompts.
        model: the model.
        count: how many tokens are compared; None: all that the CPU said.
    """
    assert model.reference
    for completion, reference in zip(said, model.reference, strict=True):
        expected = reference[:count]
        assert completion.tokens[: len(expected)] == expected
        assert len(set(completion.tokens)) >= len(completion.tokens) // 4


def released_vllm_ascend(folder: Path) -> Path:
    """Makes a vllm_ascend with the NetLoader that it was released with, for PYTHONPATH."""
    installed, made = SITE_PACKAGES / "vllm_ascend", folder / "vllm_ascend"
    loaders = made / "model_loader"
    loaders.mkdir(parents=True)
    for there, here in ((installed, made), (installed / "model_loader", loaders)):
        for path in there.iterdir():
            if path.name not in ("__pycache__", "model_loader", "netloader"):
                (here / path.name).symlink_to(path)
    (loaders / "netloader").symlink_to(Path(sys.prefix) / "released" / "netloader")
    return folder


def _visible(first: int) -> str:
    return ",".join(str(first + rank) for rank in range(MOST_RANKS))


# vLLM's import fixes the number of devices, so that it is the same for each instance.
fork = forking(
    "vllm.entrypoints.cli.serve",
    "vllm_ascend.worker.worker",
    environment=lambda: npu_environment() | {"ASCEND_RT_VISIBLE_DEVICES": _visible(0)},
)


class Fleet:
    """Starts instances, each in a folder and on devices of its own, and ends them all."""

    _devices = itertools.cycle(range(0, DEVICES, MOST_RANKS))

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._exit = contextlib.ExitStack()

    def start(
        self,
        name: str,
        model: NpuModel,
        config: Mapping[str, Any] | None = None,
        *,
        bare: bool = False,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> NpuInstance:
        """Starts an instance and does not wait for it.

        Args:
            name: of its folder.
            model: to serve.
            config: NetLoader's.
            bare: whether it has no weight file.
            arguments: of `vllm serve`.
            environment: changes of it. Without any, the instance is forked from a process that has
                imported vLLM, which saves most of its start.
        """
        folder = self._folder / name
        folder.mkdir()
        sizes = re.findall(r"(?:tensor|pipeline|data)-parallel-size=(\d+)", " ".join(arguments))
        ranks = math.prod(map(int, sizes))
        prefix = folder / "rank"
        server = VllmServer(
            model.bare if bare else model.full,
            folder / "log.txt",
            extra_config={"MODEL": "m", "OUTPUT_PREFIX": str(prefix), "SOURCE_WAIT": 0}
            | dict(config or {}),
            arguments=(*model.arguments, *arguments),
            environment=npu_environment()
            | {"ASCEND_RT_VISIBLE_DEVICES": _visible(next(self._devices))}
            | dict(environment or {}),
            launch=launch if environment else fork,
        )
        self._exit.callback(server.kill)
        server.start()
        return NpuInstance(server, prefix, model, ranks)

    def __enter__(self) -> "Fleet":
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()
