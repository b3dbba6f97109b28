"""NetLoader beside vLLM's own loaders: real vLLM workers that load a real model, one core each.

What is measured starts on one core, again and again, each loader in turn, so that a machine which
changes its speed changes it for all of them. NetLoader's source is an instance on another core.
The files are read before: the other loaders get them from the page cache, not from a disk.
"""

import contextlib
import importlib.util
import json
import mmap
import os
import re
import statistics
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tools.make_model import copy_without_weights, make_model
from tools.netloader_view import find_loads, read_address, source_list
from tools.vllm_server import ServerError, VllmServer

SIZE = "large"  # 1.85 GB
SEED_CORE, MEASURED_CORE = 0, 1
# What JSON calls a loader -> vLLM's load format, and what people call it.
LOADERS = {
    "default_loader": ("auto", "vLLM's default loader"),
    "netloader": ("netloader", "NetLoader, to be a source as well"),
    "netloader_no_source": ("netloader", "NetLoader, LISTEN_PORT 0"),
    "runai_streamer": ("runai_streamer", "Run:ai Model Streamer"),
}
# vLLM's own logs tell whole seconds.
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"stamped": {"format": "%(created).3f %(message)s"}},
    "handlers": {"out": {"class": "logging.StreamHandler", "formatter": "stamped"}},
    "loggers": {"vllm": {"handlers": ["out"], "level": "INFO", "propagate": False}},
}
_HELD = 8 << 30  # bytes in use until a load begins: more than it takes
# The last line before a worker makes its model, and the first one after the model is complete.
BEGIN, END = "Starting to load model", "KV cache size"


@dataclass(frozen=True)
class Start:
    """One load in one worker.

    Attributes:
        weights: seconds that it took to fill the model's tensors, by the loader's own account.
        total: seconds from before the model was made until it was ready to compute: `weights`, and
            vLLM's post-processing, which is the same for every loader.
    """

    weights: float
    total: float


def measure(rounds: int, folder: Path) -> dict[str, Any]:
    """Start instances and return the figures that the JSON object has.

    Args:
        rounds: starts of each loader, of which the median counts.
        folder: an empty folder for the model (1.85 GB) and the logs.

    Returns:
        Seconds for each loader, as `NAME_s` (its own account) and `NAME_total_s` (with what vLLM
        does before and after); None for a loader that is not installed.

    Raises:
        ServerError: an instance did not load the model.
    """
    full, bare = folder / "model", folder / "model-without-weights"
    make_model(full, size=SIZE)
    copy_without_weights(full, bare)
    gigabytes = sum(file.stat().st_size for file in full.glob("*.safetensors")) / 1e9
    (folder / "logging.json").write_text(json.dumps(LOGGING))

    starts: dict[str, list[Start]] = defaultdict(list)
    config = {"MODEL": "bench", "OUTPUT_PREFIX": str(folder / "seed-rank")}
    seed = VllmServer(full, folder / "seed.log", extra_config=config)
    with running_on(SEED_CORE, seed):
        seed.wait_until_ready()  # from now on it is idle
        source = source_list({0: [read_address(folder / "seed-rank")]})
        for _ in range(rounds):
            _warm(full)
            starts["default_loader"].append(_start("default_loader", full, folder))
            client = {"MODEL": "bench", "SOURCE": source}
            starts["netloader"].append(_start("netloader", bare, folder, client))
            starts["netloader_no_source"].append(
                _start("netloader_no_source", bare, folder, client | {"LISTEN_PORT": 0})
            )
            if importlib.util.find_spec("runai_model_streamer"):
                starts["runai_streamer"].append(_start("runai_streamer", full, folder))

    figures: dict[str, Any] = {"model_gb": gigabytes}
    for loader in LOADERS:
        each = starts[loader]
        weights = statistics.median(start.weights for start in each) if each else None
        figures[f"{loader}_s"] = weights
        figures[f"{loader}_gb_per_s"] = gigabytes / weights if weights else None
        figures[f"{loader}_total_s"] = (
            statistics.median(start.total for start in each) if each else None
        )
    return figures


def _warm(model: Path) -> None:
    """Read a model's files into the page cache, which may have dropped them since they were read.

    One buffer, used again: reading must not change how much memory the next instance finds free.
    """
    buffer = bytearray(8 << 20)
    for path in model.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


@contextlib.contextmanager
def _holding_memory(nbytes: int) -> Iterator[None]:
    """Use memory until the body is over, and let the system have it all at once then.

    A virtual machine gives its host back what it has not used for some seconds. The first to use it
    again pays for that, many times what a page costs else, and a source uses more than others.
    """
    with mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        memory[:: mmap.PAGESIZE] = bytes(len(range(0, nbytes, mmap.PAGESIZE)))
        yield


def _start(
    loader: str, model: Path, folder: Path, extra_config: dict[str, Any] | None = None
) -> Start:
    """Start an instance and end it as soon as it has its model."""
    server = VllmServer(
        model,
        folder / f"{loader}.log",
        load_format=LOADERS[loader][0],
        extra_config=extra_config,
        environment={"VLLM_LOGGING_CONFIG_PATH": str(folder / "logging.json")},
    )
    with running_on(MEASURED_CORE, server):
        with _holding_memory(min(_HELD, psutil.virtual_memory().available // 2)):
            server.wait_for_log(BEGIN)
        server.wait_for_log(END)
        log = server.read_log()
    begin, end = (re.search(rf"^([\d.]+) .*{text}", log, re.MULTILINE) for text in (BEGIN, END))
    weights = _weights_seconds(loader, log)
    if begin is None or end is None or weights is None:
        raise ServerError(f"the log of the {LOADERS[loader][1]} does not say how long it took")
    return Start(weights, float(end[1]) - float(begin[1]))


def _weights_seconds(loader: str, log: str) -> float | None:
    """Return how long it took to fill the tensors, as the loader says; None: it does not say."""
    if LOADERS[loader][0] == "netloader":
        loads = find_loads(log)
        return loads[0].seconds if loads else None
    if loader == "default_loader":
        took = re.search(r"Loading weights took ([\d.]+) seconds", log)
        return float(took[1]) if took else None
    # vLLM prints no time for it, only a progress bar, whose last line has the rate over all.
    bars = re.findall(r"Runai Model Streamer: 100% .* (\d+)/\1 \[.*, ([\d.]+)it/s\]", log)
    return int(bars[-1][0]) / float(bars[-1][1]) if bars else None


@contextlib.contextmanager
def running_on(core: int, server: VllmServer) -> Iterator[None]:
    """Start an instance on one core, without waiting until it is ready, and kill it at the end."""
    cores = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {core})  # a child inherits it
        server.start()
        os.sched_setaffinity(0, cores)
        yield
    finally:
        os.sched_setaffinity(0, cores)
        server.kill()


def show(figures: dict[str, Any]) -> None:
    """Print what was measured side by side."""
    print(
        f"\nseconds for {figures['model_gb']:.2f} GB in a vLLM worker on one core, page cache warm"
    )
    print("(in brackets: times as fast as vLLM's default loader)")
    print(f"{'':42} {'weights':>16} {'with all of vLLM':>16}")
    for loader, (_, text) in LOADERS.items():
        if figures[f"{loader}_s"] is None:
            print(f"  {text:40} {'not installed':>16}")
            continue
        cells = []
        for kind in ("s", "total_s"):
            seconds, default = figures[f"{loader}_{kind}"], figures[f"default_loader_{kind}"]
            cells.append(f"{seconds:5.2f} ({default / seconds:4.2f})")
        print(f"  {text:40} {cells[0]:>16} {cells[1]:>16}")
    print("weights: the loader's own account ('Loading weights took', 'loaded ... in', and for the")
    print(
        "streamer its progress bar); with all of vLLM: making the model and post-processing, too."
    )
    print("A source keeps the raw weights, so that post-processing has to find new memory.")
