"""What being a source does to an instance's tokens, with and without a cap on what it sends.

The instance decodes a few streams at once while another process pulls the whole model from it again
and again. It runs on one core, which its engine, its HTTP server and the transfer's threads share.
"""

import argparse
import http.client
import json
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec
import torch

from tools.make_model import make_model
from tools.netloader_view import read_address
from tools.vllm_server import HOST, VllmServer, clean_up_when_interrupted
from vllm_ascend.model_loader.netloader.config import NetLoaderConfig
from vllm_ascend.model_loader.netloader.executor.chunks.manifest import Manifest
from vllm_ascend.model_loader.netloader.executor.devices.cpu import CpuDevice
from vllm_ascend.model_loader.netloader.identity import ModelIdentity
from vllm_ascend.model_loader.netloader.interaction.api import Done, Join
from vllm_ascend.model_loader.netloader.interaction.elastic import ElasticClient
from vllm_ascend.model_loader.netloader.load import elastic_load
from vllm_ascend.model_loader.netloader.utils import Address, parse_address

from .worker import running_on

SIZE = "medium"
SEED_CORE, OTHER_CORE = 0, 1
MAX_SEND_RATE = "200MB/s"
PROMPTS = ("baba", "bebe dodu", "fafe gage gigo", "gugo hahe hiho keki")  # one for each stream
TOKENS = 200  # of one request; the context that VllmServer gives has room for 256
ROWS = {
    "no_transfer": "no transfer",
    "uncapped": "pulled from, no cap",
    "capped": f"pulled from, MAX_SEND_RATE {MAX_SEND_RATE}",
}


@dataclass(frozen=True)
class Decoded:
    """What all streams received in `seconds`; gaps: seconds from a token to its request's next."""

    tokens: int
    seconds: float
    gaps: list[float]


@dataclass(frozen=True)
class Pull:
    """One load of the whole model; times are of the monotonic clock, which processes share."""

    started: float
    ended: float
    nbytes: int


def measure(seconds: float, folder: Path) -> dict[str, Any]:
    """Run both instances, one after the other, and return the figures that the JSON object has.

    Args:
        seconds: how long tokens are read in each phase.
        folder: an empty folder for the model (0.5 GB) and the logs.
    """
    make_model(folder / "model", size=SIZE)
    os.sched_setaffinity(0, {OTHER_CORE})  # for the puller, too, which inherits it
    idle: list[Decoded] = []
    figures: dict[str, Any] = {"max_send_rate": MAX_SEND_RATE, "streams": len(PROMPTS)}
    for row, cap in {"uncapped": {}, "capped": {"MAX_SEND_RATE": MAX_SEND_RATE}}.items():
        prefix = folder / f"{row}-rank"
        config = {"MODEL": "bench", "OUTPUT_PREFIX": str(prefix), **cap}
        server = VllmServer(folder / "model", folder / f"{row}.log", extra_config=config)
        with running_on(SEED_CORE, server):
            server.wait_until_ready()
            decode(server.port, 3.0)  # to warm up
            # Of both instances, so that the baseline is as old for the one as for the other.
            idle.append(decode(server.port, seconds))
            decoded, pulled = decode_while_pulled(server.port, seconds, read_address(prefix))
            figures[row] = _figures([decoded], pulled)
    figures["no_transfer"] = _figures(idle, 0.0)
    return figures


def _figures(decoded: Sequence[Decoded], pulled: float) -> dict[str, float]:
    gaps = [1e3 * gap for each in decoded for gap in each.gaps]
    seconds = sum(each.seconds for each in decoded)
    return {
        "tokens_per_s": sum(each.tokens for each in decoded) / seconds,
        "itl_median_ms": statistics.median(gaps),
        "itl_p99_ms": statistics.quantiles(gaps, n=100, method="inclusive")[-1],
        "pulled_gb_per_s": pulled,
    }


def decode(port: int, seconds: float) -> Decoded:
    """Read several streams at once, each of them request after request."""
    stop = threading.Event()
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        started = time.monotonic()
        streams = [pool.submit(_read, port, prompt, stop) for prompt in PROMPTS]
        try:
            wait(streams, seconds, FIRST_EXCEPTION)
        finally:
            stop.set()
            passed = time.monotonic() - started
    tokens = sum(stream.result()[0] for stream in streams)
    gaps = [gap for stream in streams for gap in stream.result()[1]]
    return Decoded(tokens, passed, gaps)


def _read(port: int, prompt: str, stop: threading.Event) -> tuple[int, list[float]]:
    """Read one stream until told to stop; return its number of tokens and the gaps between them."""
    request = {
        "prompt": prompt,
        "max_tokens": TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        # A server that cannot keep up sends several tokens in one message, so let it count them.
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    total, gaps = 0, []
    while not stop.is_set():
        with closing(http.client.HTTPConnection(HOST, port, timeout=60)) as connection:
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/completions", json.dumps(request), headers)
            answer = connection.getresponse()
            if answer.status != http.HTTPStatus.OK:
                raise RuntimeError(f"/v1/completions: {answer.read().decode(errors='replace')}")
            before, last = 0, 0.0
            for line in answer:
                if stop.is_set():
                    break
                if not line.startswith(b"data: {"):
                    continue
                now = time.monotonic()
                count = json.loads(line.removeprefix(b"data: "))["usage"]["completion_tokens"]
                if count > before:  # the last message has no token
                    if before:
                        gaps.append(now - last)
                    total, before, last = total + count - before, count, now
    return total, gaps


def decode_while_pulled(port: int, seconds: float, address: str) -> tuple[Decoded, float]:
    """Read streams while a process keeps pulling; return also how fast it pulled, in GB/s."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=pull, args=(theirs, address), daemon=True)
    process.start()
    theirs.close()  # so that a puller that fails is noticed
    try:
        ours.recv()  # the first pull touches the memory
        decoded = decode(port, seconds)
        pulls: list[Pull] = []
        while ours.poll() or not pulls:
            pulls.append(ours.recv())
    finally:
        process.terminate()
        process.join()
    gigabytes = sum(each.nbytes for each in pulls) / 1e9
    return decoded, gigabytes / (pulls[-1].ended - pulls[0].started)


def allocate(manifest: Manifest) -> dict[str, torch.Tensor]:
    """Make uninitialized tensors for all of a manifest's names."""
    tensors: dict[str, torch.Tensor] = {}
    for entry in manifest.tensors:
        if entry.alias_of is not None:
            tensors[entry.name] = tensors[entry.alias_of]
        else:
            dtype = getattr(torch, entry.dtype.removeprefix("torch."))
            tensors[entry.name] = torch.empty(entry.shape, dtype=dtype)
    return tensors


def pull(pipe: Connection, address: str) -> None:
    """Pull the whole model again and again, until the other end of the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that has started this one ends it
    # It stands for another machine and must not delay the streams' reader on this core.
    os.nice(10)
    torch.set_num_threads(1)
    source = parse_address(address)
    identity, manifest = ask(source)
    tensors = allocate(manifest)
    config = NetLoaderConfig(source={})
    while not pipe.poll():
        started = time.monotonic()
        loaded = elastic_load(tensors, tensors.keys(), [source], identity, config, CpuDevice())
        pipe.send(Pull(started, time.monotonic(), loaded.store.blocks.nbytes))


def ask(source: Address) -> tuple[ModelIdentity, Manifest]:
    """Ask a source which model it has, and join to see its manifest, but take nothing."""
    with ElasticClient.connect(source, connect=5.0, handshake=10.0, progress=10.0) as client:
        identity = client.status().models[0].identity
        joined = client.join(Join(identity))
        client.done(Done(complete=False, reason="wanted no more than the manifest"))
    assert joined.manifest is not msgspec.UNSET
    return identity, msgspec.json.decode(joined.manifest, type=Manifest)


def show(figures: dict[str, Any]) -> None:
    """Print the phases side by side."""
    print(f"{'':40} {'tokens/s':>9} {'median ms':>10} {'p99 ms':>8} {'GB/s pulled':>12}")
    for row, text in ROWS.items():
        rate, median, p99, pulled = figures[row].values()
        print(f"{text:40} {rate:9.1f} {median:10.1f} {p99:8.1f} {pulled:12.2f}")
    print(f"{figures['streams']} streams; the times are those between one token and the next.")
    print(f"The instance, its sending threads too, is on core {SEED_CORE}; who pulls and who reads")
    print(f"are on core {OTHER_CORE}. With cores to spare for sending, a transfer costs less.")


def main() -> None:
    """Measure, print the table and write the JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=15.0, help="of each phase")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    clean_up_when_interrupted()
    with tempfile.TemporaryDirectory(prefix="netloader-bench-") as folder:
        figures = measure(arguments.seconds, Path(folder))
    show(figures)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\ninterrupted; no process is left")
        sys.exit(130)
