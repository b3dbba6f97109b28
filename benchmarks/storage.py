"""One and several starts at once: weights from storage that all share, beside those of one source.

A start is a process with fresh memory for the model. It reads a file as vLLM's default loader does:
one tensor after the other is copied out of the mapped file, which is in the page cache. What is
called storage is a model of a shared link to it: a token bucket of so many bytes per second, from
which all starts of a run take for each tensor before they copy it. It has no latency, no cache, and
costs no CPU time. Source and clients share the cores of this machine and its loopback, which on few
cores limits several clients before a real link would.
"""

import multiprocessing
import statistics
import tempfile
import time
from collections import defaultdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.identity import IDENTITY
from vllm_ascend.model_loader.netloader.config import NetLoaderConfig
from vllm_ascend.model_loader.netloader.executor.chunks.manifest import RAW
from vllm_ascend.model_loader.netloader.executor.devices.cpu import CpuDevice
from vllm_ascend.model_loader.netloader.executor.store import make_store
from vllm_ascend.model_loader.netloader.load import elastic_load
from vllm_ascend.model_loader.netloader.serve import Offer, WeightServer
from vllm_ascend.model_loader.netloader.utils import Address

from .transfer import HOST, Shapes, dense, make, release

SHAPES: Shapes = dict([*dense().items()][:17])  # half a GB
STARTS = (1, 4)  # at once
STORAGE_MB_PER_S, LINK_GBIT_PER_S = 500, 10
ROWS = {
    "page_cache": "files in the page cache",
    "storage": f"storage of {STORAGE_MB_PER_S} MB/s, shared by all starts",
    "netloader": "NetLoader, one source, loopback as fast as it goes",
    "netloader_link": f"NetLoader, one source, MAX_SEND_RATE of {LINK_GBIT_PER_S} Gbit/s",
}


class Link:
    """A token bucket that the processes of a context share; see the module."""

    def __init__(self, context: Any) -> None:
        self._free_at = context.Value("d", 0.0)

    def take(self, nbytes: int) -> None:
        """Return when so many bytes have come over the link."""
        with self._free_at.get_lock():
            begin = max(time.monotonic(), self._free_at.value)
            self._free_at.value = end = begin + nbytes / (STORAGE_MB_PER_S * 1e6)
        time.sleep(max(0.0, end - time.monotonic()))


def measure(rounds: int) -> dict[str, Any]:
    """Return the figures of the JSON object: median seconds until the last start has ended."""
    context = multiprocessing.get_context("spawn")
    link, named = Link(context), make(SHAPES, touched=True)
    torch.manual_seed(0)
    for tensor in named.values():
        tensor.view(-1).view(torch.uint8).random_()
    seconds: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="netloader-bench-") as folder:
        file = Path(folder) / "model.safetensors"
        save_file(named, file)
        servers = {"netloader": serve(named, None)}
        servers["netloader_link"] = serve(named, int(LINK_GBIT_PER_S * 1e9 / 8))
        places = {row: server.start(0) for row, server in servers.items()}
        pipes, processes = [], []
        for _ in range(max(STARTS)):
            near, far = context.Pipe()
            each = context.Process(target=starts, args=(far, link, file, places), daemon=True)
            each.start()
            far.close()  # so that one that fails is noticed
            pipes.append(near)
            processes.append(each)
        for turn in range(rounds + 1):
            for count in STARTS:
                for row in ROWS:
                    took = start_all(pipes[:count], row)
                    if turn > 0:  # the first round warms up
                        seconds[f"{row}_{count}_s"].append(took)
        for pipe in pipes:
            pipe.send(None)
        for each in processes:
            each.join()
        for server in servers.values():
            server.stop()
    figures: dict[str, Any] = {key: statistics.median(took) for key, took in seconds.items()}
    gigabytes = sum(tensor.nbytes for tensor in named.values()) / 1e9
    rates = {"storage_mb_per_s": STORAGE_MB_PER_S, "link_gbit_per_s": LINK_GBIT_PER_S}
    return figures | rates | {"model_gb": gigabytes}


def serve(named: dict[str, torch.Tensor], rate: int | None) -> WeightServer:
    """Make a source of tensors."""
    config = NetLoaderConfig(source={}, listen_host=HOST, max_send_rate=rate)
    server = WeightServer(config, 0, HOST)
    server.offer(Offer(IDENTITY, make_store(named, RAW, {}, CpuDevice())))
    return server


def start_all(pipes: list[Connection], row: str) -> float:
    """Have processes load at once, and return the seconds that the last one took."""
    for pipe in pipes:
        pipe.send(row)
    for pipe in pipes:
        pipe.recv()  # it has its memory
    begun = time.monotonic()
    for pipe in pipes:
        pipe.send(None)
    return max(pipe.recv() for pipe in pipes) - begun


def starts(pipe: Connection, link: Link, file: Path, places: dict[str, Address]) -> None:
    """Load as often as the pipe asks for it, and say at what time each load has ended."""
    torch.set_num_threads(1)
    while (row := pipe.recv()) is not None:
        tensors = make(SHAPES, touched=False)
        pipe.send(None)
        pipe.recv()
        if row in places:
            config = NetLoaderConfig(source={})
            elastic_load(tensors, tensors.keys(), [places[row]], IDENTITY, config, CpuDevice())
        else:
            with safe_open(file, "pt") as weights:
                for name, tensor in tensors.items():
                    if row == "storage":
                        link.take(tensor.nbytes)
                    tensor.copy_(weights.get_tensor(name))
        pipe.send(time.monotonic())
        del tensors
        release()


def show(figures: dict[str, Any]) -> None:
    """Print what was measured side by side."""
    gigabytes = figures["model_gb"]
    print(f"\nseconds until the last of N starts at once has its {gigabytes:.2f} GB")
    print("(in brackets: GB/s of all together)")
    print(f"{'':54}" + "".join(f"{f'N = {count}':>16}" for count in STARTS))
    for row, text in ROWS.items():
        took = [(count, figures[f"{row}_{count}_s"]) for count in STARTS]
        cells = [f"{each:6.2f} ({count * gigabytes / each:4.2f})" for count, each in took]
        print(f"  {text:52}" + "".join(f"{cell:>16}" for cell in cells))
    print("storage is modelled: a token bucket that all starts share, over files in the page cache")
