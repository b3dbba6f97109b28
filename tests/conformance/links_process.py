"""Loads over links of limited rate, in a network of their own; see `test_links`.

The client runs in a new network namespace and each source in another one. Nothing of the machine's
own network is touched, and what was set up is gone with the last process of a namespace.
"""

import contextlib
import itertools
import json
import re
import subprocess
import sys

import torch

from vllm_ascend.model_loader.netloader.executor.devices.cpu import CpuDevice
from vllm_ascend.model_loader.netloader.utils import Address

from .models import ROW
from .sides import load_here, source
from .ways import Way

WAY = Way.HTTP
CHUNKS = 256
NBYTES = CHUNKS * ROW


def model(make):
    """Many chunks, as a real model has: the fewer, the more the sources' last ones count."""
    return {f"row.{i}": make(torch.uint8, ROW) for i in range(CHUNKS)}


def run(command):
    subprocess.run(command.split(), check=True)


class Link:
    """A source, and the link to it."""

    def __init__(self, number, process):
        self.process = process
        # From here on the process is in the namespace that the other end of its link goes to.
        port = process.stdout.readline()
        assert port, "the source ended before it listened"
        self.address = Address(f"10.77.{number}.1", int(port))
        pid, near = process.pid, f"link{number}"
        # The namespace outlives a source that is killed, so that the client hears of it.
        self._namespace = open(f"/proc/{pid}/ns/net")  # noqa: SIM115
        self._inside = f"nsenter --target {pid} --net"
        # Large frames, because the limit counts their headers as well.
        run(f"ip link add {near} mtu 9000 type veth peer name uplink mtu 9000 netns {pid}")
        run(f"ip address add 10.77.{number}.2/24 dev {near}")
        run(f"ip link set {near} up")
        run(f"{self._inside} ip address add {self.address.host}/24 dev uplink")
        run(f"{self._inside} ip link set uplink up")

    def limit(self, rate):
        """Let the source send that many bytes per second."""
        tbf = f"tbf rate {8 * rate:.0f}bit burst 256kb latency 50ms"
        run(f"{self._inside} tc qdisc replace dev uplink root {tbf}")


@contextlib.contextmanager
def links(count):
    with contextlib.ExitStack() as stack:
        processes = []
        for _ in range(count):
            process = subprocess.Popen(
                ["unshare", "--net", sys.executable, "-m", __spec__.name, "source"],
                stdin=subprocess.PIPE,  # whose end it waits for, however this process ends
                stdout=subprocess.PIPE,
                text=True,
            )
            stack.callback(process.communicate)
            stack.callback(process.kill)
            processes.append(process)
        yield [Link(number, process) for number, process in enumerate(processes, 1)]


def serve():
    # Not at the link's address, which it has only later.
    with source(WAY, model, listen_host="0.0.0.0") as running:
        print(running.address.port, flush=True)
        sys.stdin.read()


class Halfway(CpuDevice):
    """Does something when half of the chunks have come."""

    def __init__(self, action):
        self._action = action
        self._hashed = itertools.count(1)

    def digests(self, parts):
        if next(self._hashed) == CHUNKS // 2:
            self._action()
        return super().digests(parts)


def measured(*addresses, device=None):
    outcome = load_here(WAY, addresses, model, device=device)
    shares = (re.search(rf"{re.escape(str(one))} \((.*?) MB\)", outcome.gave) for one in addresses)
    return {
        "nbytes": NBYTES,
        "seconds": outcome.seconds,
        "brought": [float(share[1]) * 1e6 if share else 0.0 for share in shares],
        "wrong": outcome.reasons or outcome.wrong,
    }


def fastest(*addresses, links):
    """The first of a few loads that is as fast as its links, or the fastest.

    The machine may have other things to do meanwhile, which can only make a load slower.
    """
    loads = []
    for _ in range(5):
        loads.append(measured(*addresses))
        if loads[-1]["seconds"] <= NBYTES / (0.95 * links):
            break
    return min(loads, key=lambda one: one["seconds"])


def measure(rate):
    loads = {}
    with links(2) as (one, other):
        one.limit(rate)
        other.limit(rate)
        loads["one"] = measured(one.address)
        loads["other"] = measured(other.address)
        loads["both"] = fastest(one.address, other.address, links=2 * rate)
        other.limit(rate / 3)
        loads["uneven"] = fastest(one.address, other.address, links=rate + rate / 3)
        other.limit(rate)
        killing = Halfway(other.process.kill)
        loads["killed"] = measured(one.address, other.address, device=killing)
    return loads


if __name__ == "__main__":
    if sys.argv[1] == "source":
        serve()
    else:
        print(json.dumps(measure(float(sys.argv[2]))))
