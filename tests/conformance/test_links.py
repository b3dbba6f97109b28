"""Several sources over links of limited rate, in network namespaces that end with the test."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from .sides import PATIENCE, settings
from .ways import Way

pytestmark = pytest.mark.ways(Way.HTTP)

RATE = 100e6  # bytes per second: little enough that the links and not the CPUs are what limits
# Mapped to root in a user namespace of its own, anybody may set up a network where that is allowed.
UNSHARE = ["unshare", "--net", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"])]
# All that needs a permission, or a module of the kernel.
PROBE = (
    "unshare --net true"
    " && ip link add near type veth peer name far"
    " && tc qdisc add dev far root tbf rate 1mbit burst 256kb latency 50ms"
)


@pytest.fixture(scope="module")
def loads():
    """What `links_process` has measured."""
    for command in ("unshare", "nsenter", "ip", "tc"):
        if shutil.which(command) is None:
            pytest.skip(f"there is no command {command!r}")
    probe = subprocess.run([*UNSHARE, "sh", "-c", PROBE], capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"{' '.join(UNSHARE)} sh -c {PROBE!r}: {probe.stderr.strip()}")
    done = subprocess.run(
        [*UNSHARE, sys.executable, "-m", f"{__package__}.links_process", "measure", str(RATE)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
        timeout=4 * PATIENCE,
        check=True,
    )
    return json.loads(done.stdout)


def rate(load):
    return load["nbytes"] / load["seconds"]


def test_every_load_over_limited_links_brings_the_right_bytes(way, loads):
    assert {name: load["wrong"] for name, load in loads.items() if load["wrong"]} == {}


def test_two_sources_bring_nearly_twice_what_the_link_of_one_does(way, loads):
    single = max(rate(loads["one"]), rate(loads["other"]))
    assert single <= 1.05 * RATE  # the links do limit
    assert rate(loads["both"]) >= 1.8 * max(RATE, single)


def test_a_source_with_a_link_three_times_as_fast_brings_about_three_times_as_much(way, loads):
    fast, slow = loads["uneven"]["brought"]
    assert 2.0 <= fast / slow <= 4.5
    assert rate(loads["uneven"]) >= 0.9 * (RATE + RATE / 3)


def test_a_source_killed_during_a_load_costs_only_its_chunks_in_flight(way, loads):
    killed = loads["killed"]
    survivor, victim = killed["brought"]
    assert victim >= 0.05 * killed["nbytes"]
    # What the victim has brought is not fetched again.
    assert survivor + victim == pytest.approx(killed["nbytes"], rel=0.01)
    # Not after the progress deadline, but at once.
    assert killed["seconds"] <= 1.15 * survivor / RATE + settings(way).progress_timeout / 2
