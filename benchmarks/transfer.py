"""The data plane beside what it is measured against: two processes, one core each, one run.

Every rate is the median of several rounds, in GB/s (1e9 bytes per second) on loopback. A round has
all rows one after the other, raw TCP just before NetLoader. What part of raw TCP's rate a row
reaches is the median of the parts that it reached in each round: a machine which changes its speed
between rounds changes both rates, and not their ratio.
"""

import ctypes
import gc
import multiprocessing
import os
import secrets
import socket
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import torch
import xxhash
from torch.distributed import ProcessGroup, ProcessGroupGloo, TCPStore

from tests.identity import IDENTITY
from vllm_ascend.model_loader.netloader.config import NetLoaderConfig
from vllm_ascend.model_loader.netloader.executor.chunks.blocks import Blocks
from vllm_ascend.model_loader.netloader.executor.chunks.manifest import RAW
from vllm_ascend.model_loader.netloader.executor.devices.cpu import CpuDevice
from vllm_ascend.model_loader.netloader.executor.memory import Part, host_view
from vllm_ascend.model_loader.netloader.executor.store import make_store
from vllm_ascend.model_loader.netloader.interaction.elastic import ElasticClient
from vllm_ascend.model_loader.netloader.load import elastic_load
from vllm_ascend.model_loader.netloader.serve import Offer, WeightServer
from vllm_ascend.model_loader.netloader.utils import Address

from . import ceiling

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


def ten_thousand() -> Shapes:
    """As many tensors, and hardly any bytes, to see how long it takes until the first one comes."""
    return {f"layers.{i // 100}.{i % 100}": (torch.float32, (256,)) for i in range(10_000)}


def link() -> Shapes:
    """One message, to see what gloo can do."""
    return {"all": (torch.uint8, (1 << 30,))}


SETS: dict[str, Callable[[], Shapes]] = {
    "link": link,
    "dense": dense,
    "many_small": many_small,
    "ten_thousand": ten_thousand,
}


ROWS = {
    "raw_gloo": "raw gloo, one 1 GiB message",
    "per_tensor": "gloo, one message per tensor, wait after each",
    "raw_tcp": "raw TCP, one connection, runs of 4 MiB",
    "raw_tcp_hashed": "the same, and XXH3 of what has come",
    "netloader": "NetLoader, digests checked",
    "netloader_no_digest": "NetLoader, digests not checked",
    "netloader_two_connections": "NetLoader, CONNECTIONS 2",
    "netloader_tls": "NetLoader inside TLS",
    "netloader_tls_two_connections": "NetLoader inside TLS, CONNECTIONS 2",
}
# Further rows of the dense set only.
DENSE_ONLY = {"netloader_two_connections", "netloader_tls", "netloader_tls_two_connections"}
_HANDSHAKES = 200

SIDES = ("client", "source")

# What a client asks the source process for: to serve a set with NetLoader, or to send, without
# NetLoader, the tensors of the set being served over TCP, over gloo, or the link's message.
SERVE, SEND_RAW, SEND_LINK, SEND_TENSORS = "serve", "send raw", "send link", "send tensors"

_RUN = 4 << 20  # bytes that are sent and received at once over raw TCP
_IOV_MAX = 1024  # buffers that one system call takes


@dataclass(frozen=True)
class Sample:
    """One row of one round.

    Attributes:
        rate: GB/s.
        cpu: CPU seconds per GB of client and source.
    """

    rate: float
    cpu: Sequence[float]


class TimedDevice(CpuDevice):
    """Notes when the first run of blocks has come."""

    first_run = 0.0

    def digests(self, parts: Sequence[Part]) -> bytes:
        """See `devices.Device`."""
        self.first_run = self.first_run or time.perf_counter()
        return super().digests(parts)


def measure(rounds: int) -> dict[str, Any]:
    """Run both processes and return the figures that the JSON object has."""
    context = multiprocessing.get_context("spawn")
    near, far = context.Pipe()
    result, results = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(prefix="netloader-bench-") as folder:
        secret = Path(folder) / "secret"
        secret.touch(0o600)
        secret.write_text(secrets.token_hex(32))
        feeding = context.Process(target=source, args=(far, str(secret)), daemon=True)
        feeding.start()
        assert feeding.pid is not None
        given = near, feeding.pid, results, rounds, str(secret)
        loading = context.Process(target=client, args=given, daemon=True)
        loading.start()
        results.close()  # so that a client that fails is noticed
        figures: dict[str, Any] = result.recv()
        loading.join()
        feeding.join()
    return figures


def source(pipe: Connection, secret: str) -> None:
    """Send raw bytes and serve models, as the client asks for it."""
    settle_on(0)
    group = gloo_group(TCPStore(HOST, pipe.recv(), 2, False), 1)
    raw = socket.create_connection((HOST, pipe.recv()))
    message = list(make(link(), touched=True).values())
    named: dict[str, torch.Tensor] = {}
    runs: list[list[memoryview]] = []
    servers: list[WeightServer] = []
    while (task := pipe.recv()) is not None:
        if task == SERVE:
            for server in servers:
                server.stop()
            del named, runs, servers
            named = make(SETS[pipe.recv()](), touched=True)
            servers = serve(named, secret)
            runs = runs_of(named)
            pipe.send([server.start(0).port for server in servers])
        elif task == SEND_RAW:
            for run in runs:
                send_raw(raw, run)
        else:
            for tensor in message if task == SEND_LINK else named.values():
                group.send([tensor], 0, 0).wait()
    for server in servers:
        server.stop()


def serve(named: dict[str, torch.Tensor], secret: str) -> list[WeightServer]:
    """Fill tensors with random bytes, and make their servers: without TLS, and with it."""
    torch.manual_seed(0)
    for tensor in named.values():
        tensor.view(-1).view(torch.uint8).random_()
    offer = Offer(IDENTITY, make_store(named, RAW, {}, CpuDevice()))
    servers = [
        WeightServer(NetLoaderConfig({}, "bench", HOST, secret_file=file), 0, HOST)
        for file in (None, secret)
    ]
    for server in servers:
        server.offer(offer)
    return servers


def client(pipe: Connection, pid: int, results: Connection, rounds: int, secret: str) -> None:
    """Measure every row against the source process `pid` and pass the figures on."""
    settle_on(1)
    store = TCPStore(HOST, 0, 2, is_master=True, wait_for_workers=False)
    pipe.send(store.port)
    group = gloo_group(store, 0)
    with socket.create_server((HOST, 0)) as listener:
        pipe.send(listener.getsockname()[1])
        raw = listener.accept()[0]
    rows = Rows(pipe, pid, group, raw, secret)
    figures: dict[str, Any] = {name: rows.of(name, rounds) for name in ("dense", "many_small")}
    figures["join_to_first_byte_ms"] = rows.join_to_first_byte_ms(rounds)
    figures["handshake_cpu_ms"] = rows.handshake_cpu_ms()
    figures["extra_rss_mb"] = rows.extra_rss_mb
    figures["ceiling_gb_per_s"] = ceiling.gb_per_s(make(dense(), touched=False), 4 * rounds)
    pipe.send(None)
    results.send(figures)


class Rows:
    """Measures the rows of a set.

    Args:
        pipe: the way to ask the source process.
        pid: the source process.
        group: the gloo group with it.
        raw: the raw connection to it.
        secret: path of the secret of its server with TLS.
    """

    def __init__(
        self, pipe: Connection, pid: int, group: ProcessGroup, raw: socket.socket, secret: str
    ) -> None:
        self._pipe = pipe
        self._secret = secret
        self._processes = [psutil.Process(), psutil.Process(pid)]
        self._group = group
        self._raw = raw
        self.extra_rss_mb = dict.fromkeys(SIDES, 0.0)

    def of(self, name: str, rounds: int) -> dict[str, float]:
        """Return the medians of each row, on touched and on fresh memory.

        They are its rate, what part of raw TCP's that is, and the CPU time of each side.
        """
        addresses = self._serve(name)
        touched = {"link": make(link(), touched=True), name: make(SETS[name](), touched=True)}
        samples: dict[str, list[Sample]] = defaultdict(list)
        for turn in range(rounds + 1):
            for fresh in ("", "_fresh"):
                for row in ROWS:
                    if row in DENSE_ONLY and name != "dense":
                        continue
                    what = "link" if row == "raw_gloo" else name
                    tensors = make(SETS[what](), touched=False) if fresh else touched[what]
                    memory = Memory(self._processes)
                    sample = self._sample(row, tensors, addresses)
                    if row == "netloader" and not fresh:
                        for side, extra in zip(SIDES, memory.extra(), strict=True):
                            self.extra_rss_mb[side] = max(self.extra_rss_mb[side], extra)
                    if turn > 0:  # the first round warms up
                        samples[row + fresh].append(sample)
                    del tensors
                    release()
        medians: dict[str, float] = {}
        for key, each in samples.items():
            raw = samples["raw_tcp_fresh" if key.endswith("_fresh") else "raw_tcp"]
            parts = [one.rate / other.rate for one, other in zip(each, raw, strict=True)]
            medians[key] = statistics.median(sample.rate for sample in each)
            medians[f"{key}_of_raw_tcp"] = statistics.median(parts)
            for number, side in enumerate(SIDES):
                medians[f"{key}_{side}_cpu"] = statistics.median(s.cpu[number] for s in each)
        return medians

    def join_to_first_byte_ms(self, rounds: int) -> float:
        """Return the median time from the start of a load to the end of its first message."""
        address, _ = self._serve("ten_thousand")
        tensors = make(ten_thousand(), touched=True)
        return statistics.median(self._load(tensors, address) for _ in range(rounds))

    def handshake_cpu_ms(self) -> dict[str, float]:
        """Return what a connection with TLS costs each side, in CPU time."""
        _, address = self._serve("ten_thousand")
        known = NetLoaderConfig({}, secret_file=self._secret).credentials
        before = self._cpu_seconds()
        for _ in range(_HANDSHAKES):
            with ElasticClient.connect(
                address, connect=5.0, handshake=5.0, progress=5.0, credentials=known
            ) as client:
                client.status()
        return {
            side: (end - start) / _HANDSHAKES * 1e3
            for side, start, end in zip(SIDES, before, self._cpu_seconds(), strict=True)
        }

    def _serve(self, name: str) -> list[Address]:
        """Return where the model is served without TLS, and with it."""
        self._pipe.send(SERVE)
        self._pipe.send(name)
        return [Address(HOST, port) for port in self._pipe.recv()]

    def _sample(
        self, row: str, tensors: dict[str, torch.Tensor], addresses: list[Address]
    ) -> Sample:
        runs = runs_of(tensors) if row.startswith("raw_tcp") else []
        before = self._cpu_seconds()
        started = time.perf_counter()
        if row.startswith("raw_tcp"):
            self._pipe.send(SEND_RAW)
            for run in runs:
                receive_raw(self._raw, run)
                if row == "raw_tcp_hashed":
                    for view in run:
                        xxhash.xxh3_128_digest(view)
        elif row == "raw_gloo":
            self._receive(SEND_LINK, tensors)
        elif row == "per_tensor":
            self._receive(SEND_TENSORS, tensors)
        else:
            inside_tls = row.startswith("netloader_tls")
            self._load(
                tensors,
                addresses[inside_tls],
                verify=row != "netloader_no_digest",
                connections=2 if row.endswith("two_connections") else 1,
                secret=self._secret if inside_tls else None,
            )
        seconds = time.perf_counter() - started
        after = self._cpu_seconds()
        gigabytes = sum(tensor.nbytes for tensor in tensors.values()) / 1e9
        cpu = [(end - start) / gigabytes for start, end in zip(before, after, strict=True)]
        return Sample(gigabytes / seconds, cpu)

    def _receive(self, task: str, tensors: dict[str, torch.Tensor]) -> None:
        self._pipe.send(task)
        for tensor in tensors.values():
            self._group.recv([tensor], 1, 0).wait()

    def _load(
        self,
        tensors: dict[str, torch.Tensor],
        address: Address,
        *,
        verify: bool = True,
        connections: int = 1,
        secret: str | None = None,
    ) -> float:
        """Load with NetLoader, and return the milliseconds until the first blocks were here."""
        config = NetLoaderConfig(
            source={}, verify=verify, connections=connections, secret_file=secret
        )
        device = TimedDevice()
        started = time.perf_counter()
        elastic_load(tensors, tensors.keys(), [address], IDENTITY, config, device)
        return (device.first_run - started) * 1e3

    def _cpu_seconds(self) -> list[float]:
        times = [process.cpu_times() for process in self._processes]
        return [time.user + time.system for time in times]


class Memory:
    """What processes take in addition from now on, at the highest point, in MB."""

    def __init__(self, processes: Sequence[psutil.Process]) -> None:
        self._before = {process: process.memory_info().rss for process in processes}
        for process in processes:
            Path(f"/proc/{process.pid}/clear_refs").write_text("5")  # resets VmHWM, see proc(5)

    def extra(self) -> list[float]:
        """Return it for each process."""
        peaks = {}
        for process in self._before:
            status = Path(f"/proc/{process.pid}/status").read_text()
            line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
            peaks[process] = int(line.split()[1]) * 1024
        return [(peaks[process] - rss) / 1e6 for process, rss in self._before.items()]


def runs_of(named: dict[str, torch.Tensor]) -> list[list[memoryview]]:
    """Cut tensors into the runs that go over raw TCP at once; made before the clock runs."""
    blocks = Blocks([tensor.nbytes for tensor in named.values()])
    tensors = [memoryview(host_view(tensor)).cast("B") for tensor in named.values()]
    return [
        [
            tensors[span.tensor][span.offset : span.offset + span.nbytes]
            for span in blocks.spans(run)
        ]
        for run in blocks.cut(_RUN)
    ]


def send_raw(raw: socket.socket, run: Iterable[memoryview]) -> None:
    """Send a run with as few calls as it takes."""
    left = [*run][::-1]
    while left:
        _drop(left, raw.sendmsg(left[-1 : -_IOV_MAX - 1 : -1]))


def receive_raw(raw: socket.socket, run: Iterable[memoryview]) -> None:
    """Receive a run with as few calls as it takes."""
    left = [*run][::-1]
    while left:
        batch = left[-1 : -_IOV_MAX - 1 : -1]
        _drop(left, raw.recvmsg_into(batch, 0, socket.MSG_WAITALL)[0])


def _drop(left: list[memoryview], nbytes: int) -> None:
    """Take the first bytes away from buffers whose order is reversed."""
    while nbytes:
        view = left.pop()
        if len(view) > nbytes:
            left.append(view[nbytes:])
            return
        nbytes -= len(view)


def make(shapes: Shapes, *, touched: bool) -> dict[str, torch.Tensor]:
    """Allocate tensors; `touched` ones have had all their pages written before."""
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (dtype, shape) in shapes.items()}
    if touched:
        for tensor in tensors.values():
            tensor.zero_()
    return tensors


def gloo_group(store: TCPStore, rank: int) -> ProcessGroup:
    """Form a two-rank group."""
    options = ProcessGroupGloo._Options()
    options._timeout = timedelta(seconds=300)
    options._devices = [ProcessGroupGloo.create_device(hostname=HOST)]
    return ProcessGroupGloo(store, rank, 2, options)


def settle_on(core: int) -> None:
    """Use one core only."""
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)


def release() -> None:
    """Give freed memory back, so that what is allocated next is fresh."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def show(figures: dict[str, Any]) -> None:
    """Print what was measured side by side."""
    print("GB/s (part of raw TCP), then CPU seconds per GB of client + source")
    print(f"{'':46} {'dense':>26} {'many small':>26}")
    for fresh, memory_is in (("", "touched before"), ("_fresh", "fresh")):
        print(f"destination memory {memory_is}:")
        for key, text in ROWS.items():
            cells = []
            for name in ("dense", "many_small"):
                row = figures[name]
                if key not in row:
                    cells.append("")
                    continue
                rate, part = row[key + fresh], row[f"{key}{fresh}_of_raw_tcp"]
                cpu = " + ".join(f"{row[f'{key}{fresh}_{side}_cpu']:4.2f}" for side in SIDES)
                cells.append(f"{rate:5.2f} ({part:4.2f})  {cpu}")
            print(f"  {text:44} {cells[0]:>26} {cells[1]:>26}")
    extra = figures["extra_rss_mb"]
    print(f"join to first byte: {figures['join_to_first_byte_ms']:.0f} ms, 10,000 tensors")
    handshake = " + ".join(f"{figures['handshake_cpu_ms'][side]:.1f}" for side in SIDES)
    print(f"TLS handshake and one status: {handshake} ms of CPU, client + source")
    print(f"chunks of 4 MiB that cost nothing: {figures['ceiling_gb_per_s']:.0f} GB/s")
    print(f"extra memory: source {extra['source']:.0f} MB, client {extra['client']:.0f} MB")
