"""The data plane beside what it is measured against: two processes, one core each, one run.

``make bench`` runs this; ``python -m benchmarks.transfer --json FILE`` also writes the figures.
Every rate is the median of ``--repeat`` runs in GB/s (1e9 bytes per second), on loopback.
"""

import argparse
import ctypes
import gc
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.distributed import ProcessGroup, ProcessGroupGloo, TCPStore

from vllm_ascend.model_loader.netloader.config import NetLoaderConfig
from vllm_ascend.model_loader.netloader.executor.devices import device_of
from vllm_ascend.model_loader.netloader.executor.digest import digest_model
from vllm_ascend.model_loader.netloader.executor.manifest import RAW, describe
from vllm_ascend.model_loader.netloader.executor.pieces import size_of
from vllm_ascend.model_loader.netloader.executor.plan import make_plan
from vllm_ascend.model_loader.netloader.executor.weight_cache import RawWeights
from vllm_ascend.model_loader.netloader.identity import ModelIdentity
from vllm_ascend.model_loader.netloader.load import elastic_load
from vllm_ascend.model_loader.netloader.serve import Offer, WeightServer
from vllm_ascend.model_loader.netloader.utils import Address

HOST = "127.0.0.1"
Shapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def dense() -> Shapes:
    """Llama-shaped, about 2 GB in bf16."""
    hidden, intermediate, layers, vocab = 2048, 8192, 14, 32000
    shapes: Shapes = {"embed": (torch.bfloat16, (vocab, hidden))}
    for layer in range(layers):
        for name, shape in {
            "qkv": (hidden + 1024, hidden),
            "o": (hidden, hidden),
            "gate_up": (2 * intermediate, hidden),
            "down": (hidden, intermediate),
            "norm1": (hidden,),
            "norm2": (hidden,),
        }.items():
            shapes[f"layers.{layer}.{name}"] = (torch.bfloat16, shape)
    shapes["lm_head"] = (torch.bfloat16, (vocab, hidden))
    return shapes


def many_small() -> Shapes:
    """W8A8-MoE-shaped, about 1 GB in over 10,000 tensors, most of them under 64 KiB."""
    shapes: Shapes = {"embed": (torch.bfloat16, (16000, 1024))}
    for layer in range(24):
        for expert in range(96):
            at = f"layers.{layer}.experts.{expert}"
            for name, rows, columns in (("up", 320, 448), ("down", 448, 320)):
                shapes[f"{at}.{name}.weight"] = (torch.int8, (rows, columns))
                shapes[f"{at}.{name}.scale"] = (torch.float32, (rows, 1))
                shapes[f"{at}.{name}.offset"] = (torch.float32, (rows, 1))
            shapes[f"{at}.input_scale"] = (torch.float32, ())
    for layer in range(24):
        shapes[f"layers.{layer}.qkv"] = (torch.bfloat16, (3072, 1024))
        shapes[f"layers.{layer}.o"] = (torch.bfloat16, (1024, 1024))
    return shapes


def link() -> Shapes:
    """One message, to see what the link can do."""
    return {"all": (torch.uint8, (1 << 30,))}


SETS: dict[str, Callable[[], Shapes]] = {"link": link, "dense": dense, "many_small": many_small}


@dataclass(frozen=True)
class Pull:
    """Asks the source to send a set, tensor by tensor, to a store's other visitor."""

    name: str
    port: int
    repeat: int


@dataclass(frozen=True)
class Serve:
    """Asks the source to serve a set with NetLoader until the next word."""

    name: str
    chunk_mib: int


def identity() -> ModelIdentity:
    """Return an identity that both processes share."""
    return ModelIdentity(
        "netloader", "bench", None, 0, 1, 1, 1, False, "bf16", None, "", "", RAW, None
    )


def make(shapes: Shapes, *, touched: bool) -> dict[str, torch.Tensor]:
    """Allocate tensors; `touched` ones have had all their pages written before."""
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (dtype, shape) in shapes.items()}
    if touched:
        for tensor in tensors.values():
            tensor.zero_()
    return tensors


def source(core: int, pipe: Connection) -> None:
    """Send raw messages and serve models, as the client asks for it."""
    settle_on(core)
    device = device_of("cpu")
    while (task := pipe.recv()) is not None:
        if isinstance(task, Pull):
            tensors = [
                torch.ones(shape, dtype=dtype) for dtype, shape in SETS[task.name]().values()
            ]
            group = gloo_group(task.port, 1)
            for _ in range(task.repeat):
                for tensor in tensors:
                    group.send([tensor], 0, 0).wait()
            continue
        torch.manual_seed(0)
        named = make(SETS[task.name](), touched=True)
        for tensor in named.values():
            tensor.view(-1).view(torch.uint8).random_()
        manifest, distinct = describe(named, RAW, {})
        config = NetLoaderConfig(source={}, model="bench", chunk_mib=task.chunk_mib)
        plan = make_plan([size_of(tensor) for tensor in distinct], config.chunk_bytes)
        weights = RawWeights(manifest, distinct, plan, digest_model(plan, distinct, device))
        before = memory()
        server = WeightServer(config, 0, HOST)
        server.offer(Offer(identity(), weights, device))
        pipe.send(server.start(0).port)
        pipe.recv()
        pipe.send(memory() - before)
        server.stop()


def client(core: int, pipe: Connection, upstream: Connection, repeat: int, chunk_mib: int) -> None:
    """Measure every row and send the figures to the parent process."""
    settle_on(core)
    figures: dict[str, Any] = {"extra_rss_mb": {"source": 0.0, "client": 0.0}}
    for name in ("dense", "many_small"):
        row: dict[str, float] = {}
        for fresh in (False, True):
            suffix = "_fresh" if fresh else ""
            row["raw_gloo" + suffix] = pulled(upstream, "link", repeat, fresh=fresh)
            row["per_tensor" + suffix] = pulled(upstream, name, repeat, fresh=fresh)
        upstream.send(Serve(name, chunk_mib))
        address = Address(HOST, upstream.recv())
        for fresh in (False, True):
            suffix = "_fresh" if fresh else ""
            for key, verify in (("netloader", True), ("netloader_no_digest", False)):
                rate, extra = loaded(address, name, repeat, fresh=fresh, verify=verify)
                row[key + suffix] = rate
                if not fresh:
                    more = max(figures["extra_rss_mb"]["client"], extra)
                    figures["extra_rss_mb"]["client"] = more
        upstream.send(None)
        more = max(figures["extra_rss_mb"]["source"], upstream.recv())
        figures["extra_rss_mb"]["source"] = more
        figures[name] = row
    pipe.send(figures)
    upstream.send(None)


def loaded(
    address: Address, name: str, repeat: int, *, fresh: bool, verify: bool
) -> tuple[float, float]:
    """Return the rate of NetLoader in GB/s, and the memory in MB that it took for itself."""
    shapes = SETS[name]()
    config = NetLoaderConfig(source={}, verify=verify, progress_timeout=60.0)
    kept = {} if fresh else make(shapes, touched=True)
    before = memory()
    rates = []
    for _ in range(repeat):
        tensors = kept or make(shapes, touched=False)
        started = time.perf_counter()
        loaded = elastic_load(
            tensors, tensors.keys(), [address], identity(), config, device_of("cpu")
        )
        rates.append(loaded.plan.nbytes / (time.perf_counter() - started) / 1e9)
        extra = memory() - before
        del tensors, loaded
        release()
    return statistics.median(rates), extra


def pulled(upstream: Connection, name: str, repeat: int, *, fresh: bool) -> float:
    """Return the rate in GB/s of ordered receives, one message per tensor, a wait after each."""
    shapes = SETS[name]()
    store = TCPStore(HOST, 0, 2, is_master=True, wait_for_workers=False)
    upstream.send(Pull(name, store.port, repeat))
    group = gloo_group(store.port, 0, store)
    kept = {} if fresh else make(shapes, touched=True)
    rates = []
    for _ in range(repeat):
        tensors = kept or make(shapes, touched=False)
        started = time.perf_counter()
        for tensor in tensors.values():
            group.recv([tensor], 1, 0).wait()
        seconds = time.perf_counter() - started
        rates.append(sum(map(size_of, tensors.values())) / seconds / 1e9)
        del tensors
        release()
    return statistics.median(rates)


def gloo_group(port: int, rank: int, store: TCPStore | None = None) -> ProcessGroup:
    """Form a two-rank group, with a store that is there already or at a port."""
    options = ProcessGroupGloo._Options()
    options._timeout = timedelta(seconds=60)
    options._devices = [ProcessGroupGloo.create_device(hostname=HOST)]
    store = store or TCPStore(HOST, port, 2, is_master=False, wait_for_workers=False)
    return ProcessGroupGloo(store, rank, 2, options)


def settle_on(core: int) -> None:
    """Use one core only."""
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)


def memory() -> float:
    """Return this process's resident memory in MB."""
    return psutil.Process().memory_info().rss / 1e6


def release() -> None:
    """Give freed memory back, so that what is allocated next is fresh."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def show(figures: dict[str, Any]) -> None:
    """Print what was measured side by side."""
    rows = {
        "raw_gloo": "raw gloo, one 1 GiB message",
        "per_tensor": "one message per tensor, wait after each",
        "netloader": "NetLoader, digests checked",
        "netloader_no_digest": "NetLoader, digests not checked",
    }
    print(f"{'GB/s':42} {'dense':>15} {'many small':>15}")
    for fresh, memory_is in (("", "touched before"), ("_fresh", "fresh")):
        print(f"destination memory {memory_is}:")
        for key, text in rows.items():
            cells = []
            for name in ("dense", "many_small"):
                rate, raw = figures[name][key + fresh], figures[name]["raw_gloo" + fresh]
                cells.append(f"{rate:8.2f} ({rate / raw:4.2f})")
            print(f"  {text:40} {cells[0]:>15} {cells[1]:>15}")
    extra = figures["extra_rss_mb"]
    print(f"extra memory: source {extra['source']:.0f} MB, client {extra['client']:.0f} MB")


def main() -> None:
    """Run the two processes, print the table and write the JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--chunk-mib", type=int, default=NetLoaderConfig(source={}).chunk_mib)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    near, far = context.Pipe()
    up, down = context.Pipe()
    feeding = context.Process(target=source, args=(0, down), daemon=True)
    loading = context.Process(
        target=client, args=(1, far, up, arguments.repeat, arguments.chunk_mib), daemon=True
    )
    feeding.start()
    loading.start()
    far.close()
    figures = near.recv()
    loading.join()
    feeding.join()
    show(figures)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
