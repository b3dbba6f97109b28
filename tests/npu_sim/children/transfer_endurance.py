"""Loads in a row leave nothing behind on either side, whether they fail or not."""

import faulthandler
import time

import torch
from npusim_vllm import fault
from transfer_support import (
    Process,
    case,
    load,
    maker,
    nz,
    serve,
    used,
    wait_for_no_sessions,
)

WARM_UP, TIMES = 10, 50
# Sessions that overlap for a moment have a stream more, for which memory is kept.
A_FEW_STREAMS = 48 << 20


def mixed(seed):
    """A small model with all that needs memory: a format, gaps, a packed chunk, a large tensor."""
    make = maker(seed)
    return {
        "nz": nz(make(torch.int8, 1024, 1024)),
        "large": make(torch.uint8, 3 << 20),
        "strided": make(torch.float32, 300, 400)[:, 3:390],
        **{f"small.{i}": make(torch.int32, 10_000 + i) for i in range(10)},
    }


def settled(process):
    """What a process uses once nothing ends any more."""
    now, earlier = process.call(used), None
    while now != earlier:
        time.sleep(2.5)
        now, earlier = process.call(used), now
    return now


def check_nothing_has_grown(process, before):
    """Fails if it uses more than before; what HCCL still does has a deadline of its own."""

    def grown():
        now = process.call(used)
        return {
            name: (before[name], now[name])
            for name in now
            if now[name] > before[name] + (A_FEW_STREAMS if name == "device_memory" else 0)
        }

    deadline = time.monotonic() + 10
    while more := grown():
        if time.monotonic() > deadline:
            process.call(faulthandler.dump_traceback, all_threads=True)
            raise AssertionError(more)
        time.sleep(0.1)


def series(times, prepare, expected, **changes):
    """Loads in a row, and compares what both sides use after a warm-up with the end."""
    source, client = Process(0), Process(1)
    address = source.call(serve, mixed, **changes)
    before = []
    for number in range(WARM_UP + times):
        if number == WARM_UP:
            before = [settled(source), settled(client)]
        prepare(number, source, client)
        expected(client.call(load, [address], mixed, **changes))
        source.call(wait_for_no_sessions)
    for process, then in zip((source, client), before, strict=True):
        assert then["communicators"] == then["pending"] == 0, then
        check_nothing_has_grown(process, then)


@case
def fifty_loads_leave_nothing_behind():
    def prepare(number, source, client):
        if number % 2:  # every other one has to fetch a chunk again
            client.call(fault, "clear;recv:flip=3@3")

    series(TIMES, prepare, lambda outcome: outcome.check())


@case
def failing_loads_leave_nothing_behind():
    faults = (
        ("source", "send:stall@2"),
        ("client", "recv:stall=1000@4"),
        ("source", "send:stall@1"),
    )

    def prepare(number, source, client):
        source.call(fault, "clear")
        client.call(fault, "clear")
        side, spec = faults[number % len(faults)]
        (source if side == "source" else client).call(fault, spec)

    series(
        12,
        prepare,
        lambda outcome: outcome.check_failed(),
        progress_timeout=0.3,
        handshake_timeout=1.0,
    )
