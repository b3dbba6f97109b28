"""One side is killed or stopped at any step of a load; the other one goes on.

A client loads from the next source, a source serves the next client. On NPUs both infer meanwhile,
and HCCL and the device are at rest afterwards.
"""

import contextlib
import functools
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time

import pytest
import torch

from vllm_ascend.model_loader.netloader import served
from vllm_ascend.model_loader.netloader.executor.devices.streams import StreamDevice
from vllm_ascend.model_loader.netloader.executor.store import BlockStore
from vllm_ascend.model_loader.netloader.executor.transport.rendezvous import PeerStore
from vllm_ascend.model_loader.netloader.interaction.client import ElasticClient
from vllm_ascend.model_loader.netloader.interaction.wire import Wire
from vllm_ascend.model_loader.netloader.loading import sessions
from vllm_ascend.model_loader.netloader.serve import WeightServer
from vllm_ascend.model_loader.netloader.utils import parse_address

from .fleet import PATIENT, load_and_relay
from .models import COUNT, ROW, many_rows, rows
from .sides import PATIENCE, load_here, serve, source, until, wait_for_no_sessions
from .ways import Way

KILL, STOP = signal.SIGKILL, signal.SIGSTOP
# On simulated NPUs a group may take seconds to form, where many processes share few cores.
HANDSHAKE, STALLED = (9.0, 6.0) if hasattr(torch, "npu") else (3.0, 2.0)
# A handshake, then a transfer that stalls, then the end of what was under way.
LONGEST = HANDSHAKE + STALLED + 5.0 + 2.0
QUICK = {"max_sources": 1, "handshake_timeout": HANDSHAKE, "progress_timeout": STALLED}
# Deadlines that no case lives to see: the end of a process is noticed, not waited for.
NOTICED = {"handshake_timeout": 3 * PATIENCE, "progress_timeout": 3 * PATIENCE}


def at_call(owner, name, action, nth=1, after=False):
    function, lock, calls = getattr(owner, name), threading.Lock(), [0]

    @functools.wraps(function)
    def wrapped(*arguments, **options):
        with lock:
            calls[0] += 1
            now = calls[0] == nth
        if now and not after:
            action()
        result = function(*arguments, **options)
        if now and after:
            action()
        return result

    setattr(owner, name, wrapped)


def half_of_a_body(action, sides=("send", "receive")):
    """Send or receive half of the third body of blocks before something happens."""
    bodies = []

    def halve(transfer):
        def half(wire, views):
            views = [memoryview(view).cast("B") for view in views if memoryview(view).nbytes]
            if views and views[-1].nbytes > 1 << 15:
                bodies.append(views)
                if len(bodies) == 3:
                    transfer(wire, [*views[:-1], views[-1][: views[-1].nbytes // 2]])
                    action()
            transfer(wire, views)

        return half

    for side in sides:
        setattr(Wire, side, halve(getattr(Wire, side)))


def connecting(action):
    """HCCL or gloo knows where to find the peer: the second value, after that of the meeting."""
    once = functools.cache(action)
    at_call(PeerStore, "set", once, 2, after=True)
    at_call(PeerStore, "get", once, 2, after=True)


def forming(action):
    at_call(sessions, "form_group", action)
    at_call(served, "form_group", action)


def waiting(nth):
    return lambda action: at_call(_device_class(), "wait", action, nth)


def _device_class():
    return next((one for one in StreamDevice.__subclasses__() if "wait" in vars(one)), StreamDevice)


# What happens at a step, for a client, for a source, and whether it is one of groups (None: both).
STEPS = {
    "before the join": (
        lambda action: at_call(ElasticClient, "join", action),
        lambda action: at_call(WeightServer, "join", action),
        None,
    ),
    "before the first block": (
        lambda action: at_call(ElasticClient, "ask_blocks", action),
        lambda action: at_call(WeightServer, "blocks", action),
        False,
    ),
    "within a body": (half_of_a_body, half_of_a_body, False),
    "between requests": (
        lambda action: at_call(BlockStore, "add", action, COUNT // 2),
        lambda action: at_call(WeightServer, "blocks", action, COUNT // 2),
        False,
    ),
    "before the group": (forming, forming, True),
    "while the group connects": (connecting, connecting, True),
    "before the first message": (waiting(1), waiting(1), True),
    "in the first message": (waiting(2), waiting(2), True),
    "in the transfer": (waiting(COUNT // 3), waiting(COUNT // 3), True),
    "at the end": (
        lambda action: at_call(ElasticClient, "done", action),
        lambda action: at_call(WeightServer, "done", action),
        None,
    ),
}

# Each costs a deadline, and gloo is not what is tested.
STOPPED_WITH_GLOO = {"before the join", "before the group", "in the transfer"}


def signal_self(step, side, number):
    STEPS[step][side](lambda: os.kill(os.getpid(), number))


@contextlib.contextmanager
def inferring(way, started, process, mate_index):
    """Let a process infer with another one, where there is something to infer with."""
    if not way.on_npu:
        yield
        return
    from .npus import check_inference, end_inference, join_ranks, wait_until_hccl_rests

    mate = started(mate_index)
    path = os.path.join(tempfile.mkdtemp(), "store")
    process.start(join_ranks, 0, path)
    mate.call(join_ranks, 1, path)
    process.result()
    yield
    process.call(wait_until_hccl_rests, 1)
    time.sleep(2.5)  # torch_npu's watchdog looks once a second, and ends a process with an error
    for one in (process, mate):
        assert one.alive
        one.call(check_inference)
    for one in (process, mate):
        one.start(end_inference)
    assert all(one.result() > 5 for one in (process, mate))


def cases():
    for step, (_, _, of_groups) in STEPS.items():
        for number in (KILL, STOP):
            for way in Way:
                if way is Way.STREAM and number == STOP and step not in STOPPED_WITH_GLOO:
                    continue
                if of_groups in (None, way.in_groups) and (way.on_npu <= way.in_groups):
                    yield pytest.param(way, step, number, id=f"{way.value}-{step}-{number.name}")
    for way in (Way.NPU_HTTP,):
        yield pytest.param(way, "within a body", KILL, id=f"{way.value}-within a body")


@pytest.mark.parametrize(("way", "step", "number"), [*cases()])
def test_a_client_goes(way, step, number, started):
    running, client, other = started(0), started(1), started(1)
    with inferring(way, started, running, 2):
        deadlines = QUICK | (NOTICED if number == KILL else {})
        address = running.call(serve, way, **deadlines)
        client.call(signal_self, step, 0, number)
        client.start(load_here, way, [address], **deadlines)
        client.wait_until(number)
        assert running.call(wait_for_no_sessions) < (1.5 if number == KILL else LONGEST)
        other.call(load_here, way, [address], **QUICK).check()
    if number == STOP:
        client.signal(signal.SIGCONT)
        outcome = client.result()
        assert outcome.reasons or not outcome.wrong, outcome
        client.call(load_here, way, [address], **QUICK).check()


@pytest.mark.parametrize(("way", "step", "number"), [*cases()])
def test_a_source_goes(way, step, number, started):
    client, running, other = started(1), started(0), started(0)
    with inferring(way, started, client, 3):
        addresses = [one.call(serve, way) for one in (running, other)]
        running.call(signal_self, step, 1, number)
        deadlines = QUICK | (NOTICED if number == KILL else {})
        outcome = client.call(load_here, way, addresses, **deadlines).check()
        assert outcome.seconds < LONGEST
        running.wait_until(number)
        client.call(load_here, way, addresses[1:], **QUICK).check()
    if number == STOP:
        running.signal(signal.SIGCONT)
        until(lambda: running.call(wait_for_no_sessions) < 1)
        other.call(wait_for_no_sessions)


# What happens at a step to one that is loading itself, and in which way.
RELAY_STEPS = {
    "before the join": (lambda action: at_call(WeightServer, "join", action), None),
    "before the news": (lambda action: at_call(WeightServer, "have", action), None),
    "between the news": (lambda action: at_call(WeightServer, "have", action, 3), None),
    "before the first block": (lambda action: at_call(WeightServer, "blocks", action), Way.HTTP),
    "within a body": (lambda action: half_of_a_body(action, ["send"]), Way.HTTP),
    "between requests": (lambda action: at_call(WeightServer, "blocks", action, 8), Way.HTTP),
    "before the group": (lambda action: at_call(served, "form_group", action), Way.STREAM),
    "in the transfer": (lambda action: at_call(served.ServedGroup, "send", action, 3), Way.STREAM),
    "when its load is complete": (lambda action: at_call(WeightServer, "linger", action), None),
}


def signal_relay(step, number):
    RELAY_STEPS[step][0](lambda: os.kill(os.getpid(), number))


def relay_cases():
    for step, (_, only) in RELAY_STEPS.items():
        for way in (Way.HTTP, Way.STREAM) if only is None else (only,):
            yield pytest.param(way, step, KILL, id=f"{way.value}-{step}-{KILL.name}")
        if only is not Way.STREAM:
            yield pytest.param(Way.HTTP, step, STOP, id=f"http-{step}-{STOP.name}")


@pytest.mark.parametrize(("way", "step", "number"), [*relay_cases()])
def test_a_relay_goes(way, step, number, started, tmp_path):
    relay, prefix = started(0), f"{tmp_path}/relay-"
    with (
        source(way, many_rows, max_send_rate=32 * ROW, **PATIENT) as seed,
        source(way, many_rows) as other,
    ):
        relay.call(signal_relay, step, number)
        relay.start(load_and_relay, way, [seed.address], output_prefix=prefix)
        until(lambda: seed.status.bytes_sent > 0)
        with open(f"{prefix}0.txt") as file:
            address = parse_address(file.read())
        deadlines = QUICK | {"source_wait": PATIENCE} | (NOTICED if number == KILL else {})
        outcome = load_here(way, [address, other.address], many_rows, **deadlines).check()
        relay.wait_until(number)
        assert outcome.seconds < LONGEST


@pytest.mark.parametrize("number", [KILL, STOP], ids=["killed", "stopped"])
@pytest.mark.ways(Way.HTTP, Way.STREAM)
def test_the_only_source_goes(way, number, started):
    client, running = started(1), started(0)
    address = running.call(serve, way)
    running.call(signal_self, "in the transfer" if way.in_groups else "within a body", 1, number)
    outcome = client.call(load_here, way, [address], rows, **QUICK).check_failed(str(address))
    assert outcome.seconds < LONGEST
    client.call(load_here, way, [started(0).call(serve, way)], **QUICK).check()


_LOAD = """
import sys
from tests.conformance.sides import HOST, Address, load_here
from tests.conformance.ways import Way
load_here(Way(sys.argv[1]), [Address(HOST, int(sys.argv[2]))]).check()
"""


@pytest.mark.ways(Way.HTTP)
def test_a_process_may_end_right_after_its_load(way):
    with source(way) as running:
        command = [sys.executable, "-c", _LOAD, way.value, str(running.address.port)]
        subprocess.run(command, check=True, timeout=3 * PATIENCE)
