"""What ``make bench-fleet`` runs: fleets whose links are real, and only the engines are not.

Each node is a process in a network namespace of its own. A link of the same rate each way connects
it to a bridge; token buckets (tc tbf) in both directions make the rate. A node loads with
`elastic_load` and passes on what has come with its `WeightServer`, with the default configuration.
Its memory is in use before it starts, and there is no post-processing. The weights are 64 tensors
of 4 MiB, so a request is for 4 MiB, as in `fleet_simulation`.

All nodes share the cores of this machine, where each would have its own. So the rate of the links
is chosen by what a load costs the processors: the largest fleet needs about half of their time.
The last column says what part of the cores' time the fleet took, and what part anybody took. Where
the latter is near 100 %, times are those of a busy machine.
"""

import argparse
import contextlib
import ctypes
import functools
import itertools
import json
import logging
import math
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import psutil
import torch

from tests.identity import IDENTITY
from vllm_ascend.model_loader.netloader.config import NetLoaderConfig
from vllm_ascend.model_loader.netloader.errors import ChosenToRead, LoadFailed
from vllm_ascend.model_loader.netloader.executor.chunks.manifest import RAW
from vllm_ascend.model_loader.netloader.executor.devices.cpu import CpuDevice
from vllm_ascend.model_loader.netloader.executor.store import BlockStore, make_store
from vllm_ascend.model_loader.netloader.interaction import api
from vllm_ascend.model_loader.netloader.interaction.api import Code
from vllm_ascend.model_loader.netloader.interaction.cold_start import Phase
from vllm_ascend.model_loader.netloader.interaction.discovery import Own
from vllm_ascend.model_loader.netloader.load import elastic_load
from vllm_ascend.model_loader.netloader.loading.target import ColdStart
from vllm_ascend.model_loader.netloader.serve import Offer, Relay, WeightServer
from vllm_ascend.model_loader.netloader.utils import Address, Lookup, Name, logger

MIB = 1 << 20
TENSORS, TENSOR_BYTES = 64, 4 * MIB
NBYTES = TENSORS * TENSOR_BYTES
MOST_MBIT, STEP_MBIT = 1000, 50
# That the largest fleet is to need by what one load costs; it needs about twice as much, as many
# connections cost more than one.
SHARE_OF_CORES = 0.25
WITHIN = 0.05  # seconds in which all start
PORT = 28000
STORAGE_MB_PER_S = 200
SEED = 0  # the node that has the weights
SIZES = (2, 4, 8, 16)
TARGETS = {1: 1.0, 2: 1.10, 4: 1.12, 8: 1.15, 16: 1.25}
_ports = itertools.count()  # of the bridge; the system takes its time to remove one
_CLONE_NEWNET, _PR_SET_PDEATHSIG = 0x40000000, 1

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """One fleet.

    Attributes:
        clients: that load from the seed and from each other.
        killed: number of them that are killed when they have half of the weights.
        slow: number of them whose link is ten times slower.
        late: seconds after which the last of them starts; 0: with the others.
        lies: what the first of them does to what it passes on; see `LIES`.
        seed_dies: when the seed has sent so many copies; 0: never.
        cold: whether there is no seed, so that one of the clients reads the storage for all.
    """

    clients: int
    killed: int = 0
    slow: int = 0
    late: float = 0.0
    lies: str = ""
    seed_dies: float = 0.0
    cold: bool = False

    def special(self, client: int) -> bool:
        """Return whether a client's own time does not count."""
        return client <= max(self.killed, self.slow, bool(self.lies))


@dataclass
class Result:
    """What has become of a fleet.

    Attributes:
        seconds: for each client, from the first join to the end of its load.
        reasons: for each client that did not load the weights, why.
        wrong: clients whose bytes are not the seed's.
        seed_copies: that the seed has sent; None: it was killed.
        storage_copies: that were read from storage.
        cpu: seconds of processor time that the nodes have taken that live.
        used: part of the cores' time that they took.
        busy: part of the cores' time that anybody took.
    """

    seconds: dict[int, float] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    wrong: int = 0
    seed_copies: float | None = None
    storage_copies: float = 0.0
    cpu: float = 0.0
    used: float = 0.0
    busy: float = 0.0


class NotPermitted(Exception):
    """This machine lets nobody make network namespaces or limit links."""


# Network


def move_out() -> None:
    """Give this process a network of its own, which goes with its last process.

    Raises:
        NotPermitted: that is not possible.
    """
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET):
        reason = os.strerror(ctypes.get_errno())
        raise NotPermitted(f"no network namespaces: {reason} (try as root, or with unshare -rn)")


def configure(tool: str, *lines: str) -> None:
    """Let `ip` or `tc` run some commands.

    Raises:
        NotPermitted: one of them failed.
    """
    try:
        subprocess.run(
            [tool, "-batch", "-"],
            input="\n".join(lines),
            check=True,
            capture_output=True,
            text=True,
        )
    except FileNotFoundError:
        raise NotPermitted(f"there is no command {tool!r}") from None
    except subprocess.CalledProcessError as error:
        raise NotPermitted(f"{tool}: {error.stderr.strip()}") from None


def limit(device: str, mbit: float) -> str:
    """Return the command of `tc` that limits what goes out through a device."""
    if mbit == math.inf:
        return f"qdisc replace dev {device} root pfifo limit 1000"
    # Burst: of the largest packet that the system hands to a device, twice. Limit: 20 ms.
    queue = max(256_000, int(mbit * 1e6 / 8 * 0.02))
    return (
        f"qdisc replace dev {device} root tbf rate {int(mbit * 1000)}kbit burst 128kb limit {queue}"
    )


def host(node: int) -> str:
    """Return the address of a node."""
    return f"10.77.0.{node + 1}"


# Nodes


def flip(views: list[memoryview]) -> list[Any]:
    """Change one bit of what is passed on."""
    first, *others = views
    spoilt = bytearray(first)
    spoilt[len(spoilt) // 2] ^= 1
    return [spoilt, *others]


def stale(views: list[memoryview]) -> list[Any]:
    """Pass on what was there before."""
    return [bytes(view.nbytes) for view in views]


# What a lying relay does to bytes; with "bitfield" it says that it has every block.
LIES: dict[str, Callable[[list[memoryview]], list[Any]]] = {
    "flips": flip,
    "stale": stale,
    "bitfield": lambda views: views,
}


def lie(server: WeightServer, kind: str) -> None:
    """Make a liar of a relay."""
    pieces, have = server._pieces, server.have

    def wrong(*asked: Any) -> Iterator[list[Any]]:
        for views in pieces(*asked):
            yield LIES[kind]([memoryview(view).cast("B") for view in views])

    def false(session: Any, weights: str, since: int, wait: int) -> api.Have:
        have(session, weights, since, 0)
        return api.Have(1, [(0, NBYTES // MIB - 1)], complete=True)

    server._pieces = wrong  # type: ignore[method-assign, assignment]
    if kind == "bitfield":
        server.have = false  # type: ignore[method-assign]


def die() -> None:
    """End this process as the system ends one that takes too much memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_half(store: BlockStore) -> None:
    """Die when half of the blocks have come."""
    version = blocks = 0
    while blocks < store.blocks.count // 2:
        runs = store.came(version, 1.0)
        version += len(runs)
        blocks += sum(last - first + 1 for first, last in runs)
    die()


def die_after(server: WeightServer, copies: float) -> None:
    """Die when a server has sent so many copies."""
    while server.bytes_sent < copies * NBYTES:
        time.sleep(0.005)
    die()


class Watched(Relay):
    """A relay that dies at half of its load."""

    def begin(self, store: BlockStore, *arguments: Any) -> None:
        """Pass on what comes to a store."""
        super().begin(store, *arguments)
        threading.Thread(target=die_at_half, args=(store,), daemon=True).start()


class Storage:
    """A model of storage that all nodes share: a token bucket of so many bytes per second."""

    def __init__(self) -> None:
        self._lock = multiprocessing.Lock()
        self._free_at = multiprocessing.Value("d", 0.0, lock=False)
        self._read = multiprocessing.Value("q", 0, lock=False)

    @property
    def copies(self) -> float:
        """Copies of the weights that were read."""
        return float(self._read.value) / NBYTES

    def read(self, tensors: Tensors, weights: Tensors) -> None:
        """Fill tensors, one after the other."""
        for name, tensor in tensors.items():
            with self._lock:
                begin = max(time.monotonic(), self._free_at.value)
                self._free_at.value = end = begin + tensor.nbytes / (STORAGE_MB_PER_S * 1e6)
                self._read.value += tensor.nbytes
            time.sleep(max(0.0, end - time.monotonic()))
            tensor.copy_(weights[name])


def load(
    server: WeightServer, tensors: Tensors, case: Case, node: int, read: Callable[[], object]
) -> BlockStore:
    """Load from the seed and all that it names; where there is none, as all have agreed."""
    phase = Phase.WAITING if case.cold else Phase.LOADING
    reason = "the weights are being loaded"
    offer = Offer(
        IDENTITY, None, reason, code=Code.LOADING, phase=phase, can_read=lambda: case.cold
    )
    server.announce(offer)
    relay = (Watched if node <= case.killed else Relay)(server, offer)
    sources: list[Address | Name] = [Address(host(SEED), PORT)]
    if case.cold:
        sources = [Name(Lookup.INSTANCE, host(one), PORT) for one in range(1, case.clients + 1)]
    try:
        return elastic_load(
            tensors,
            tensors.keys(),
            sources,
            IDENTITY,
            server.config,
            CpuDevice(),
            own=Own(server.process),
            relay=relay,
            cold=ColdStart(can_read=lambda: True, announce=relay.announce) if case.cold else None,
        ).store
    except ChosenToRead:
        read()
        return make_store(tensors, RAW, {}, CpuDevice())


def same(found: Tensors, right: Tensors) -> bool:
    """Return whether all bytes are as they should be."""
    return all(torch.equal(found[name], right[name]) for name in right)


def be_node(
    pipe: Connection, node: int, case: Case, weights: Tensors, mbit: float, storage: Storage
) -> None:
    """Be one node of a fleet, in a process of its own, until it is killed."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    torch.set_num_threads(1)
    move_out()
    pipe.send(os.getpid())
    pipe.recv()  # the cable is plugged in
    configure("ip", f"address add {host(node)}/24 dev eth0", "link set eth0 up", "link set lo up")
    configure("tc", limit("eth0", mbit))
    server = WeightServer(NetLoaderConfig(source={}, listen_host=host(node)), 0, host(node))
    server.process = f"node {node}"
    server.start(PORT)
    tensors = weights  # as the seed has them
    if node == SEED and case.cold:
        server.stop()
    elif node == SEED:
        server.offer(Offer(IDENTITY, make_store(weights, RAW, {}, CpuDevice())))
        if case.seed_dies:
            threading.Thread(target=die_after, args=(server, case.seed_dies), daemon=True).start()
    else:
        tensors = {name: torch.ones_like(tensor) for name, tensor in weights.items()}
        if case.lies and case.special(node):
            lie(server, case.lies)
    pipe.send("ready")
    begin, cpu, reason = pipe.recv(), time.process_time(), ""
    if node != SEED:
        time.sleep(max(0.0, begin - time.monotonic()))
        try:
            read = functools.partial(storage.read, tensors, weights)
            server.offer(Offer(IDENTITY, load(server, tensors, case, node, read)))
        except LoadFailed as error:
            reason = str(error) or "no reason"
        pipe.send((time.monotonic(), reason))
    pipe.recv()  # all have ended
    cpu = time.process_time() - cpu
    pipe.send((same(tensors, weights), server.bytes_sent / NBYTES, cpu))
    pipe.recv()


def run(case: Case, mbit: float, weights: Tensors, patience: float = 300.0) -> Result:
    """Run a fleet, and return what has become of it.

    Raises:
        NotPermitted: there can be no such network here.
    """
    context, storage = multiprocessing.get_context("fork"), Storage()
    with contextlib.ExitStack() as stack:
        pipes: dict[int, Connection] = {}
        processes: dict[int, Any] = {}
        for node in range(case.clients + 1):
            rate = mbit / 10 if 0 < node <= case.slow else mbit
            pipes[node], far = context.Pipe()
            process = processes[node] = context.Process(
                target=be_node, args=(far, node, case, weights, rate, storage), daemon=True
            )
            process.start()
            stack.callback(process.join)
            stack.callback(process.kill)
            far.close()  # so that its end is noticed
            pid, port = hear(pipes[node]), f"port{next(_ports)}"
            configure(
                "ip",
                f"link add {port} type veth peer name eth0 netns {pid}",
                f"link set {port} master bridge0 up",
            )
            configure("tc", limit(port, rate))
            pipes[node].send("plugged in")
        for pipe in pipes.values():
            hear(pipe)
        result = watch(case, pipes, patience)
        result.storage_copies = storage.copies
        for node in range(case.clients + 1):
            if (code := processes[node].exitcode) is not None:
                result.reasons[node] = f"its process ended with exit code {code}"
        return result


def hear(pipe: Connection) -> Any:
    """Return what a node says.

    Raises:
        NotPermitted: it has ended.
    """
    try:
        return pipe.recv()
    except EOFError:
        raise NotPermitted("a node has failed") from None


def watch(case: Case, pipes: dict[int, Connection], patience: float) -> Result:
    """Let the nodes begin, wait until all have ended, and look at their bytes."""
    result, draw = Result(), random.Random(0)
    first = time.monotonic() + 0.1
    begins = {node: first + (node > 1) * draw.random() * WITHIN for node in pipes}
    if case.late:
        begins[case.clients] = first + case.late
    for node, pipe in pipes.items():
        pipe.send(begins[node])
    before = psutil.cpu_times()
    loading = {pipe: node for node, pipe in pipes.items() if node != SEED}
    while loading and (ready := wait([*loading], max(0.0, first + patience - time.monotonic()))):
        for pipe in [pipe for pipe in loading if pipe in ready]:
            node = loading.pop(pipe)
            try:
                ended, reason = pipe.recv()
            except EOFError:
                continue  # it was killed
            if reason:
                result.reasons[node] = reason
            else:
                result.seconds[node] = ended - (begins[node] if is_late(case, node) else first)
    after = psutil.cpu_times()
    total = sum(after) - sum(before)
    result.busy = 1 - (after.idle - before.idle) / total
    result.reasons |= dict.fromkeys(loading.values(), "has not ended")
    for node in (SEED, *result.seconds):
        with contextlib.suppress(EOFError, ConnectionError):  # the seed was killed
            pipes[node].send("all have ended")
            is_right, copies, cpu = pipes[node].recv()
            result.wrong += not is_right
            result.cpu += cpu
            if node == SEED:
                result.seed_copies = copies
    result.used = result.cpu / total
    return result


def is_late(case: Case, client: int) -> bool:
    """Return whether a client starts after the others."""
    return bool(case.late) and client == case.clients


# What is shown


def cases(solo: float) -> dict[str, tuple[str, float, Case]]:
    """Return what is run after one load that took so many seconds: text, target, fleet."""
    return {
        **{str(n): (f"N = {n}", TARGETS[n], Case(n)) for n in SIZES},
        "relays_killed": ("2 of 8 relays are killed at 50 %", 1.4, Case(8, killed=2)),
        "seed_killed_complete": (
            "the seed is killed after 1.1 copies",
            math.inf,
            Case(8, seed_dies=1.1),
        ),
        "late": ("one of 8 joins at 50 %", 1.1, Case(8, late=solo / 2)),
        "slow_link": ("one of 8 links is 10 x slower", 1.3, Case(8, slow=1)),
        "cold_copies": (
            "8 start cold (aim: 1.1 copies from storage)",
            math.inf,
            Case(8, cold=True),
        ),
        **{f"liar_{kind}": (f"one of 8 lies: {kind}", 1.3, Case(8, lies=kind)) for kind in LIES},
    }


def relative(case: Case, result: Result, solo: float) -> float | None:
    """Return the time of the last client that counts, in loads of one; None: one has failed."""
    counts = [client for client in range(1, case.clients + 1) if not case.special(client)]
    if case.late:
        counts = [case.clients]
    if not result.seconds.keys() >= {*counts}:
        return None
    return max(result.seconds[client] for client in counts) / solo


def copies_of(case: Case, result: Result) -> str:
    """Return how many copies came from the seed, or from storage, as a cell of the table."""
    if case.cold:
        return f"{result.storage_copies:.2f} from storage"
    return "killed" if result.seed_copies is None else f"{result.seed_copies:.2f}"


def summary(times: Mapping[str, float | None], results: Mapping[str, Result]) -> dict[str, Any]:
    """Return the JSON object."""
    lies = [each for kind in LIES if (each := times[f"liar_{kind}"]) is not None]
    return {
        "relative": {str(n): times[str(n)] for n in SIZES},
        "seed_copies": results["8"].seed_copies,
        "relays_killed": times["relays_killed"],
        "seed_killed_complete": times["seed_killed_complete"] is not None,
        "late": times["late"],
        "slow_link": times["slow_link"],
        "cold_copies": results["cold_copies"].storage_copies,
        "liar": max(lies) if len(lies) == len(LIES) else None,
        "wrong": sum(result.wrong for result in results.values()),
    }


def picture(times: Mapping[int, float], text: str) -> str:
    """Return the curve as SVG: measured times, targets, and what it would be without relays."""
    width, height, left, bottom, top = 560, 300, 50, 250, 20
    largest, most = max(times), 2.0

    def at(n: float, value: float) -> str:
        x = left + (width - left - 20) * math.log2(n) / math.log2(largest)
        return f"{x:.0f},{bottom - (bottom - top) * min(value, most) / most:.0f}"

    def line(values: Mapping[int, float], style: str) -> str:
        points = " ".join(at(n, value) for n, value in values.items())
        return f'<polyline points="{points}" fill="none" {style}/>'

    def label(point: str, words: str, more: str = "") -> str:
        x, y = point.split(",")
        return f'<text x="{x}" y="{y}" {more}>{words}</text>'

    grid = [line({1: v, largest: v}, 'stroke="#ddd"') for v in (0.0, 0.5, 1.0, 1.5, 2.0)]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            'font-family="sans-serif" font-size="12">',
            f'<rect width="{width}" height="{height}" fill="white"/>',
            *grid,
            *(label(at(1, v), f"{v:g}", 'dx="-8" dy="4" text-anchor="end"') for v in (0, 1, 2)),
            *(label(at(n, 0), f"{n}", 'dy="18" text-anchor="middle"') for n in times),
            line({1: 1.0, 2: 2.0}, 'stroke="#999" stroke-dasharray="2 4"'),
            label(at(2, 1.9), "without relays", 'dx="4" fill="#777"'),
            line(TARGETS, 'stroke="#999" stroke-dasharray="6 4"'),
            line(times, 'stroke="#06c" stroke-width="2"'),
            *(
                label(at(n, v), f"{v:.2f}", 'dy="-8" text-anchor="middle" fill="#06c"')
                for n, v in times.items()
            ),
            label(f"{left},{height - 12}", text),
            "</svg>\n",
        ]
    )


def choose_rate(weights: Tensors) -> tuple[int, float]:
    """Return a rate in Mbit/s, and the processor time in s that a GB costs both ends together."""
    result = run(Case(1), math.inf, weights)
    cost = result.cpu / NBYTES
    cores = len(os.sched_getaffinity(0)) * SHARE_OF_CORES
    most = cores / (max(SIZES) * cost) * 8 / 1e6
    return int(max(STEP_MBIT, min(MOST_MBIT, most // STEP_MBIT * STEP_MBIT))), cost * 1e9


def main() -> int:
    """Run all cases, print the table, write the JSON object and the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--svg", type=Path, help="write the curve as a picture")
    parser.add_argument("--mbit", type=int, help="rate of the links; default: what cores allow")
    parser.add_argument("--case", action="append", help="run only these, and write nothing")
    parser.add_argument("--verbose", action="store_true", help="show what the nodes log")
    options = parser.parse_args()
    logger.setLevel(logging.INFO if options.verbose else logging.CRITICAL)
    logging.basicConfig(format="%(created).3f node of process %(process)d: %(message)s")
    torch.manual_seed(0)
    weights = {
        f"layers.{i}": torch.empty(TENSOR_BYTES, dtype=torch.uint8).random_()
        for i in range(TENSORS)
    }
    try:
        move_out()
        configure("ip", "link add bridge0 type bridge", "link set bridge0 up", "link set lo up")
        mbit, cost = (options.mbit, 0.0) if options.mbit else choose_rate(weights)
        print(f"links of {mbit} Mbit/s each way, {NBYTES // MIB} MiB, all start within 50 ms")
        if 0 < mbit < MOST_MBIT and cost:
            print(f"(not {MOST_MBIT} Mbit/s: a GB takes {cost:.1f} s of the cores at both ends)")
        measure(options, mbit, weights)
    except NotPermitted as error:
        print(f"skipped: {error}")
    except KeyboardInterrupt:
        print("\ninterrupted; no process is left")
        return 130
    return 0


def measure(options: argparse.Namespace, mbit: int, weights: Tensors) -> None:
    """Run the cases, show them as they end, and write the files."""
    print("| case | last complete, s | relative | target | seed's copies | wrong | cores |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    results = {"1": run(Case(1), mbit, weights)}
    solo = results["1"].seconds[1]
    times: dict[str, float | None] = {"1": 1.0}
    rows = {"1": ("N = 1", 1.0, Case(1)), **cases(solo)}
    for name, (text, target, case) in rows.items():
        if options.case and name not in (*options.case, "1"):
            continue
        if name not in results:
            results[name] = run(case, mbit, weights)
        result, times[name] = results[name], relative(case, results[name], solo)
        shown = times[name]
        cells = [
            text,
            "failed" if shown is None else f"{shown * solo:.2f}",
            "-" if shown is None else f"{shown:.2f}",
            "-" if target == math.inf else f"{target:.2f}",
            copies_of(case, result),
            str(result.wrong),
            f"{result.used:.0%} of {result.busy:.0%}",
        ]
        print(f"| {' | '.join(cells)} |", flush=True)
        for node, reason in result.reasons.items():
            print(f"  node {node}: {reason}"[:300])
    if options.case:
        return
    curve = {n: each for n in (1, *SIZES) if (each := times[str(n)]) is not None}
    if options.svg:
        options.svg.write_text(picture(curve, "clients that start at once; time relative to one"))
    if options.json:
        options.json.write_text(json.dumps(summary(times, results), indent=1))


if __name__ == "__main__":
    sys.exit(main())
