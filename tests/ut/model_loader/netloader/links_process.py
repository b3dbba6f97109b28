"""Loads over links of limited rate, in a network of their own; see `test_netloader_links`.

The client runs in a new network namespace and each source in another one. Nothing of the machine's
own network is touched, and what was set up is gone with the last process of a namespace.
"""

import contextlib
import itertools
import json
import logging
import re
import subprocess
import sys
import time

from support import (  # this file is run as a script
    DEVICE,
    blank_like,
    differing,
    end,
    load,
    rows,
    settings,
    source,
)

from vllm_ascend.model_loader.netloader.executor.devices.cpu import CpuDevice
from vllm_ascend.model_loader.netloader.utils import Address, logger

# Many chunks, as a real model has: the fewer, the more the sources' last ones count.
MODEL = rows(512)
NBYTES = sum(tensor.nbytes for tensor in MODEL.values())


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
        tbf = f"tbf rate {8 * rate:.0f}bit burst 128kb latency 50ms"
        run(f"{self._inside} tc qdisc replace dev uplink root {tbf}")


@contextlib.contextmanager
def links(count):
    with contextlib.ExitStack() as stack:
        processes = []
        for _ in range(count):
            process = subprocess.Popen(
                ["unshare", "--net", sys.executable, __file__, "source"],
                stdin=subprocess.PIPE,  # whose end it waits for, however this process ends
                stdout=subprocess.PIPE,
                text=True,
            )
            stack.callback(end, process)
            processes.append(process)
        yield [Link(number, process) for number, process in enumerate(processes, 1)]


def serve():
    # Not at the link's address, which it has only later.
    with source(MODEL, config=settings(listen_host="0.0.0.0")) as running:
        print(running.address.port, flush=True)
        sys.stdin.read()


class Lines(logging.Handler):
    def __init__(self):
        super().__init__()
        self.text = ""

    def emit(self, record):
        self.text += f"{record.getMessage()}\n"


class Halfway(CpuDevice):
    """Does something when half of the chunks have come."""

    def __init__(self, action):
        self._action = action
        self._hashed = itertools.count(1)

    def hash(self, tensor):
        if next(self._hashed) == len(MODEL) // 2:
            self._action()
        return super().hash(tensor)


def measured(lines, *addresses, device=DEVICE):
    lines.text = ""
    blanks = blank_like(MODEL)
    start = time.monotonic()
    load(addresses, blanks, device=device)
    seconds = time.monotonic() - start
    shares = (re.search(rf"{re.escape(str(one))} \((.*?) MB\)", lines.text) for one in addresses)
    return {
        "nbytes": NBYTES,
        "seconds": seconds,
        "brought": [float(share[1]) * 1e6 if share else 0.0 for share in shares],
        "wrong": differing(blanks, MODEL),
    }


def fastest(lines, *addresses, links):
    """The first of a few loads that is as fast as its links, or the fastest.

    The machine may have other things to do meanwhile, which can only make a load slower.
    """
    loads = []
    for _ in range(5):
        loads.append(measured(lines, *addresses))
        if loads[-1]["seconds"] <= NBYTES / (0.95 * links):
            break
    return min(loads, key=lambda one: one["seconds"])


def measure(rate):
    lines = Lines()
    logger.addHandler(lines)
    logger.setLevel(logging.INFO)
    loads = {}
    with links(2) as (one, other):
        one.limit(rate)
        other.limit(rate)
        loads["one"] = measured(lines, one.address)
        loads["other"] = measured(lines, other.address)
        loads["both"] = fastest(lines, one.address, other.address, links=2 * rate)
        other.limit(rate / 3)
        loads["uneven"] = fastest(lines, one.address, other.address, links=rate + rate / 3)
        other.limit(rate)
        killing = Halfway(other.process.kill)
        loads["killed"] = measured(lines, one.address, other.address, device=killing)
    return loads


if __name__ == "__main__":
    if sys.argv[1] == "source":
        serve()
    else:
        print(json.dumps(measure(float(sys.argv[2]))))
