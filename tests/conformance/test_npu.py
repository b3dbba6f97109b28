"""What only NPUs have: FRACTAL_NZ, HCCL's buffers, its faults, and a device that must not stop."""

import contextlib
import ctypes
import hashlib
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import numpy
import pytest
import torch
import xxhash

from vllm_ascend.model_loader.netloader.executor import memory
from vllm_ascend.model_loader.netloader.executor.chunks.blocks import Span
from vllm_ascend.model_loader.netloader.executor.devices import rowsums
from vllm_ascend.model_loader.netloader.executor.devices.choose import device_of
from vllm_ascend.model_loader.netloader.loading import sessions, target

from . import models, ways
from .counted import grown, used
from .faults import tapped
from .models import COUNT, DTYPES, MIB, ROW, Maker, rows
from .sides import (
    PATIENCE,
    expected,
    here,
    load_here,
    serve,
    source,
    wait_for_no_sessions,
)
from .test_peers import at_call, inferring, signal_self
from .ways import Way

WAY = Way.HCCL
pytestmark = pytest.mark.ways(WAY)

# torch_npu's watchdog looks for errors once a second, and ends the process that has one.
WATCHDOG = 2.5
QUICK = {"max_sources": 1, "handshake_timeout": 8.0, "progress_timeout": 6.0}
LONGEST = 8.0 + 6.0 + 5.0 + 2.0


@pytest.fixture
def two(started):
    """A source and a client in processes of their own, with the environment asked for."""
    return lambda **environment: (started(0, **environment), started(1, **environment))


def loads(client, address, model=rows, **changes):
    return client.call(load_here, WAY, [address], model, **QUICK | changes)


# Sessions, each with a stream of its own


def fill_in_parts(count):
    """Fills one strided tensor from several threads at once; returns what is wrong with it."""
    device = WAY.device()
    there = torch.arange(800 * 795, dtype=torch.int32).view(800, 795).npu()
    here = torch.zeros(800, 900, dtype=torch.int32).npu()[:, 5:800]
    data = memory.bytes_of(there)
    spans = [
        Span(0, at, min(MIB // 4, data.numel() - at)) for at in range(0, data.numel(), MIB // 4)
    ]
    torch.npu.synchronize()

    def fill(number):
        with device.attached(), torch.npu.stream(torch.npu.Stream()):
            for span in spans[number::count]:
                memory.write(span, [here], data[span.offset : span.offset + span.nbytes])
                torch.npu.current_stream().synchronize()

    with ThreadPoolExecutor(count) as threads:
        [*threads.map(fill, range(count))]
    return int((here.cpu() != there.cpu()).sum())


def test_sessions_that_fill_parts_of_one_strided_tensor_lose_nothing_of_each_other(way, started):
    client = started(1)
    assert [client.call(fill_in_parts, 3) for _ in range(5)] == [0] * 5


# FRACTAL_NZ


def every_nz(make):
    nz_bf16, nz_int8 = make.nz(make(torch.bfloat16, 512, 640)), make(torch.int8, 3, 64, 256)
    return {
        "bf16": nz_bf16,
        "fp16": make.nz(make(torch.float16, 64, 64)),
        "padded": make.nz(make(torch.bfloat16, 37, 70)),
        "large": make.nz(make(torch.bfloat16, 1024, 1600)),
        "int8": make.nz(make(torch.int8, 128, 256)),
        "experts": make.nz(nz_int8),
        "w4a8": make.nz(make(torch.int8, 2, 64, 256)).view(torch.int32),
        "large_w4a8": make.nz(make(torch.int8, 8, 512, 512)).view(torch.int32),
        "nd_between": make(torch.int8, 128, 256),
        "tied": nz_bf16,
    }


def memory_of(tensors):
    """The bytes as they lie on the device: it is simulated in the memory of the host."""
    torch.npu.synchronize()
    storages = {name: tensor.untyped_storage() for name, tensor in tensors.items()}
    return {
        name: ctypes.string_at(storage.data_ptr(), storage.nbytes())
        for name, storage in storages.items()
    }


def memory_of_loaded(address, model):
    made = []
    load_here(WAY, [address], model, into=lambda make: made.append(model(make)) or made[0]).check()
    return memory_of(made[0])


def memory_of_served(model):
    return memory_of(expected(WAY, model, 0))


def test_fractal_nz_is_the_same_byte_by_byte(way, two):
    source, client = two()
    there = client.call(memory_of_loaded, source.call(serve, WAY, every_nz), every_nz)
    assert there == source.call(memory_of_served, every_nz)


def aliased_nz(make):
    weight = make.nz(make(torch.bfloat16, 64, 64))
    return {"weight": weight, "alias": weight.detach()}


def overlapping_nz(make):
    weight = make.nz(make(torch.int8, 4, 64, 64))
    return {"weight": weight, "expert": weight[1]}


def without_nz(make):
    return rows(make) | {"row.0": make(torch.int8, 256, ROW // 256)}


@pytest.mark.parametrize(
    ("there", "into", "reason"),
    [
        (aliased_nz, aliased_nz, "shares memory in FRACTAL_NZ with weight"),
        (overlapping_nz, overlapping_nz, "shares memory with another"),
        (rows, without_nz, "row.0 is row-major here and FRACTAL_NZ there"),
    ],
)
def test_fractal_nz_that_cannot_be_filled_is_refused(way, two, there, into, reason):
    source, client = two()
    loads(client, source.call(serve, WAY, there), there, into=into).check_failed(reason)


def formats_of_what_has_no_memory():
    device = torch.device("npu")
    lazy = torch.nn.parameter.UninitializedParameter(device=device)
    made = {"lazy": lazy, "empty": torch.empty(0, device=device)}
    return WAY.device().formats(made)


def test_what_has_no_memory_yet_has_no_format(way, started):
    assert started(0).call(formats_of_what_has_no_memory) == {}


# Digests


def documented_digest(data):
    """The digest of bytes by the formula in rowsums.py, written another way."""
    noise = hashlib.shake_256(b"netloader").digest(4096 * 16)
    weights = (numpy.frombuffer(noise, numpy.int8) | 1).reshape(4096, 16).astype(numpy.int64)
    count = len(data) // 4096
    rows = numpy.frombuffer(data[: count * 4096], numpy.int8).reshape(count, 4096)
    sums = (rows.astype(numpy.int64) @ weights).astype(numpy.int32)
    rest = data[count * 4096 :]
    return xxhash.xxh3_128_digest(sums.tobytes() + rest + len(data).to_bytes(8, "little"))


def check_digests():
    device, maker = WAY.device(), Maker(WAY, 0)
    assert device.digest_algorithm == rowsums.ALGORITHM
    sizes = (0, 1, 4095, 4096, 4097, 8192, 100_001, MIB)
    hosts = [maker.host(torch.uint8, size) for size in sizes]
    hosts += [maker.host(dtype, 123, 77) for dtype in DTYPES]
    hosts += [torch.full((MIB,), value, dtype=torch.uint8) for value in (0, 0x7F, 0x80, 0xFF)]
    for host in hosts:
        data = host.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        assert device.digests([host.npu()]) == documented_digest(data)
        assert rowsums.digests([host]) == documented_digest(data)
    large = maker.host(torch.uint8, 2 * MIB + 77)
    blocks = [large[at : at + MIB].numpy().tobytes() for at in range(0, len(large), MIB)]
    assert device.digests([large.npu()]) == b"".join(map(documented_digest, blocks))
    # A copy of INT8_CACHE `dram` beside a tensor of the device. What torch_npu makes of the two is
    # on the CPU, which cannot read the memory of a real device.
    with mock.patch.object(device, "int8_product", wraps=device.int8_product) as product:
        assert device.digests([host, host.npu()]) == 2 * documented_digest(data)
    assert product.call_args.args[0].device == device.device


def test_digests_on_the_device_are_those_of_the_documented_formula(way, started):
    started(0).call(check_digests)


# Memory


def counted_memory():
    from npusim_vllm import counts

    torch.npu.current_stream().synchronize()
    return counts()["device_memory"][ways.INDEX] - torch.npu.memory_reserved()


def buffers_of_a_load(address, megabytes):
    """Returns how many MB are taken within a load and not by torch; there are none after it."""
    device = device_of(f"npu:{ways.INDEX}", megabytes)
    load_here(WAY, [address], device=device).check()  # the first one makes streams
    before, within = counted_memory(), []
    at_call(sessions.GroupReceiver, "receive", lambda: within.append(counted_memory()), COUNT // 2)
    load_here(WAY, [address], device=device).check()
    assert counted_memory() == before
    return (within[0] - before) / MIB


@pytest.mark.parametrize("environment", [{}, {"P2P_HCCL_BUFFSIZE": "0"}], ids=["", "none"])
def test_hccl_buffers_have_the_configured_size_and_are_given_back(way, two, environment):
    source, client = two(**environment)
    address = source.call(serve, WAY)
    for megabytes in (16, 1, 50):
        # One for each direction.
        assert client.call(buffers_of_a_load, address, megabytes) == 2 * megabytes


def many(make):
    return {f"tensor.{i}": make(torch.uint8, MIB // 4) for i in range(200)}


def kept_after_a_load(address):
    """How many MiB of the device a load leaves taken, beyond tensors that were there before."""
    from npusim_vllm import counts

    made = []
    expected(WAY, many, 0)

    def into(maker):
        made.append(many(maker))
        torch.npu.empty_cache()
        made.append(counts()["device_memory"][ways.INDEX])
        return made[0]

    load_here(WAY, [address], many, into=into, chunk_mib=16).check()
    torch.npu.current_stream().synchronize()
    return (counts()["device_memory"][ways.INDEX] - made[1]) / MIB


def test_memory_that_only_the_load_needed_is_the_devices_again(way, two):
    source, client = two()
    kept = client.call(kept_after_a_load, source.call(serve, WAY, many))
    assert kept <= 2, kept  # torch's least: what digests are computed with stays


def no_memory():
    torch.npu.empty_cache()
    set_fault("alloc:fail")


def set_fault(spec):
    from npusim_vllm import fault

    fault(spec)


def fail_with_no_memory(address):
    """Load into tensors that are there when memory runs out."""

    def into(maker):
        made = models.packed(maker)
        no_memory()
        return made

    return load_here(WAY, [address], models.packed, into=into, chunk_mib=32, **QUICK)


@pytest.mark.parametrize("side", ["source", "client"])
def test_a_side_without_memory_fails_a_session_and_lives_on(way, two, side):
    source, client = two()
    address = source.call(serve, WAY, models.packed)
    client.call(make_expected, models.packed)
    if side == "source":
        source.call(no_memory)
        loads(client, address, models.packed, chunk_mib=32).check_failed()
    else:
        client.call(fail_with_no_memory, address).check_failed("memory")
    check_next(source, client, address, models.packed)


def make_expected(model):
    expected(WAY, model, 0)


def large_nz(make):
    """More than what torch still has for the copy that a cast makes."""
    return {"nz": make.nz(make(torch.int8, 4096, 8192))}


def lose_memory_before_the_formats():
    at_call(target.Target, "complete", no_memory)


def test_a_client_without_memory_for_formats_fails_and_lives_on(way, two):
    source, client = two()
    address = source.call(serve, WAY, large_nz)
    client.call(make_expected, large_nz)
    client.call(lose_memory_before_the_formats)
    loads(client, address, large_nz).check_failed("after all weights had come", "memory")
    client.call(set_fault, "clear")
    loads(client, address, large_nz).check()


# HCCL's faults


def rest(communicators):
    from .npus import wait_until_hccl_rests

    wait_until_hccl_rests(communicators)


def check_next(source, client, address, model=rows, communicators=0):
    """Both sides live on and can do it again; the source's own communicators stay."""
    source.call(wait_for_no_sessions)
    time.sleep(WATCHDOG)
    assert source.alive
    assert client.alive
    source.call(set_fault, "clear")
    client.call(set_fault, "clear")
    loads(client, address, model).check()
    source.call(wait_for_no_sessions)
    source.call(rest, communicators)
    client.call(rest, 0)


def sent_chunks():
    wait_for_no_sessions()
    return here["source"].status.bytes_sent // ROW


# What HCCL itself lets fail on its stream stops the device where that is what failures do.
ONLY_THE_STREAM = {"NPU_SIM_ON_FAILURE": "stream"}
HTTP, FAILS = "over HTTP", "fails"
# name: (fault at the source, at the client, chunks sent or how it ends, environment)
FAULTS = {
    "delayed messages": ("send:delay=60", "clear", COUNT, {}),
    "a message long on its way": ("clear", "recv:delay=2000@9", COUNT, {}),
    "a source that stalls": ("send:stall@9", "clear", FAILS, {}),
    "a client that stalls": ("clear", "recv:stall=5000@9", FAILS, {}),
    "a bit that flips on the way": ("send:flip=70000@9", "clear", COUNT + 1, {}),
    "a bit that flips at the client": ("clear", "recv:flip=-1@4", COUNT + 1, {}),
    "bits that flip all the time": ("clear", "recv:flip=5@2+", "wrong bytes twice", {}),
    "an operation refused at the source": ("send:error@9", "clear", FAILS, {}),
    "an operation refused at the client": ("clear", "recv:error@9", FAILS, {}),
    "one that fails later at the source": ("send:async_error@9", "clear", FAILS, ONLY_THE_STREAM),
    "one that fails later at the client": ("clear", "recv:async_error@9", FAILS, ONLY_THE_STREAM),
    "no communicator at the source": ("init:error@1", "clear", HTTP, {}),
    "no communicator at the client": ("clear", "init:error@1", HTTP, {}),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_hccl_is_survived(way, two, started, name):
    at_source, at_client, end, environment = FAULTS[name]
    source, client = two(**environment)
    infers = at_source != "clear"
    with inferring(WAY, started, source, 2) if infers else contextlib.nullcontext():
        address = source.call(serve, WAY)
        source.call(set_fault, at_source)
        client.call(set_fault, at_client)
        outcome = loads(client, address)
        assert outcome.seconds < LONGEST
        sent = source.call(sent_chunks)
        if end == FAILS:
            outcome.check_failed(str(address))
        elif isinstance(end, str) and end != HTTP:
            outcome.check_failed(end)
        else:
            outcome.check()
            assert outcome.said("so the weights come over HTTP") == (end == HTTP)
            assert end == HTTP or sent == end
        check_next(source, client, address, communicators=int(infers))


def set_rank_table(path):
    os.environ["RANK_TABLE_FILE"] = path


def test_with_a_rank_table_at_either_side_the_weights_come_over_http(way, two):
    source, client = two()
    address = source.call(serve, WAY)
    for with_table, without in ((source, client), (client, source)):
        with_table.call(set_rank_table, __file__)
        without.call(set_rank_table, "")
        outcome = loads(client, address).check()
        assert outcome.said("so the weights come over HTTP")
        assert outcome.seconds < LONGEST
    assert outcome.said("RANK_TABLE_FILE is set")


def multiply():
    ones = torch.ones(8, 8, device="npu")
    return (ones @ ones).cpu().sum().item()


def test_a_send_that_fails_on_its_stream_ends_inference_where_that_stops_the_device(way, two):
    source, client = two(NPU_SIM_ON_FAILURE="device")
    address = source.call(serve, WAY)
    assert source.call(multiply) == 8 * 8 * 8
    source.call(set_fault, "send:async_error@9")
    loads(client, address).check_failed(str(address))
    with pytest.raises(AssertionError, match="process exits for this inner error"):
        source.call(multiply)
    assert client.call(multiply) == 8 * 8 * 8


HANGS = 20  # seconds that a communicator hangs: longer than any deadline of a handshake


@pytest.mark.parametrize("side", ["source", "client"])
def test_where_a_communicator_hangs_the_weights_come_over_http(way, two, side):
    source, client = two(HCCL_CONNECT_TIMEOUT=str(HANGS))
    address = source.call(serve, WAY)
    begun = time.monotonic()
    (source if side == "source" else client).call(set_fault, "init:hang@1")
    outcome = loads(client, address, handshake_timeout=4.0).check()
    assert outcome.said("so the weights come over HTTP")
    source.call(wait_for_no_sessions)
    assert time.monotonic() - begun < HANGS, "they waited for the communicator"
    # While the thread that hangs is still there, and again when HCCL has let it go.
    loads(client, address).check()
    time.sleep(max(0, begun + HANGS + 1 - time.monotonic()))
    check_next(source, client, address)


# The device


def synchronize_device():
    torch.npu.synchronize()


@pytest.mark.parametrize("killed", ["source", "client"])
def test_the_whole_device_synchronizes_after_the_other_side_was_killed(way, two, killed):
    source, client = two()
    address = source.call(serve, WAY, progress_timeout=3.0)
    victim, survivor = (source, client) if killed == "source" else (client, source)
    victim.call(signal_self, "in the transfer", killed == "source", signal.SIGKILL)
    client.start(load_here, WAY, [address], **QUICK)
    victim.wait_until(signal.SIGKILL)
    if killed == "source":
        client.result().check_failed()
    else:
        source.call(wait_for_no_sessions)
    survivor.call(synchronize_device)


_streams = []


def take_every_stream():
    """Makes streams as a model does, which are all that torch_npu has to give, and uses each."""
    _streams.extend(torch.npu.Stream() for _ in range(64))
    use_every_stream()


def use_every_stream():
    ones = torch.ones(8, device="npu")
    torch.npu.current_stream().synchronize()
    for stream in _streams:
        with torch.npu.stream(stream):
            ones + ones
    for stream in _streams:
        stream.synchronize()


def test_a_stopped_client_holds_up_no_stream_of_the_model(way, two):
    source, client = two()
    address = source.call(serve, WAY, progress_timeout=3 * PATIENCE)
    source.call(take_every_stream)
    client.call(signal_self, "in the transfer", 0, signal.SIGSTOP)
    client.start(load_here, WAY, [address])
    client.wait_until(signal.SIGSTOP)
    source.call(use_every_stream)


# Several at once


def watch_communicators():
    from npusim_vllm import counts

    most = here["most"] = [0]

    def watch():
        while True:
            most[0] = max(most[0], counts()["communicators"])
            time.sleep(0.001)

    threading.Thread(target=watch, daemon=True).start()


def most_communicators():
    return here["most"][0]


def test_one_client_pulls_from_three_sources_at_once(way, started):
    all_three = threading.Barrier(3)

    def meet(index, count):
        if count == 0:
            all_three.wait(20)

    stores, client = [tapped(WAY, rows, meet) for _ in range(3)], started(1)
    with contextlib.ExitStack() as stack:
        addresses = [stack.enter_context(source(WAY, store)).address for store in stores]
        client.call(watch_communicators)
        client.call(load_here, WAY, addresses).check()
        assert client.call(most_communicators) == 3
    read = [index for store in stores for index in store.readable.read]
    assert sorted(read) == list(range(COUNT))


def test_three_clients_at_once_while_the_source_infers(way, started):
    source, clients = started(0), [started(index) for index in (1, 2, 3)]
    with inferring(WAY, started, source, 3):
        address = source.call(serve, WAY)
        for client in clients:
            client.start(load_here, WAY, [address])
        for client in clients:
            client.result().check()
        source.call(wait_for_no_sessions)
    assert source.call(sent_chunks) == 3 * COUNT


def load_often(times, addresses):
    return [load_here(WAY, addresses) for _ in range(times)]


def test_a_process_loads_serves_and_infers_at_once(way, started):
    first, middle, last = started(0), started(1), started(2)
    with inferring(WAY, started, middle, 3):
        address, middle_address = first.call(serve, WAY), middle.call(serve, WAY)
        last.start(load_often, 4, [middle_address])
        for outcome in [*middle.call(load_often, 4, [address]), *last.result()]:
            outcome.check()


# Endurance

WARM_UP, TIMES = 10, 15


def settled(process):
    """What a process uses once nothing ends any more."""
    now, earlier = process.call(used, WAY), None
    while now != earlier:
        time.sleep(2.5)
        now, earlier = process.call(used, WAY), now
    return now


LEAK_FAULTS = [
    # some have to fetch a chunk again, some fail, and where no group is formed they come over HTTP
    [("clear", "clear"), ("clear", "recv:flip=3@3")],
    [("send:stall@2", "clear"), ("clear", "recv:stall=1000@4"), ("send:stall@1", "clear")],
]


@pytest.mark.parametrize("faults", LEAK_FAULTS, ids=["", "failing"])
def test_loads_in_a_row_leave_nothing_behind(way, two, faults):
    failing = len(faults) == 3
    deadlines = {"handshake_timeout": 2.0, "progress_timeout": 0.3} if failing else {}
    source, client = two()
    address = source.call(serve, WAY, models.packed, **deadlines)
    failed = []

    def load_often(times):
        for number in range(times):
            for process, spec in zip((source, client), faults[number % len(faults)], strict=True):
                process.call(set_fault, "clear")
                process.call(set_fault, spec)
            outcome = loads(client, address, models.packed, **deadlines)
            if not failing:
                outcome.check()
            elif outcome.said("so the weights come over HTTP"):
                outcome.check_right_or_failed()
            else:
                outcome.check_failed()
                failed.append(number)
            source.call(wait_for_no_sessions)
        return [settled(source), settled(client)]

    before = load_often(WARM_UP)
    # The sessions of two loads overlap for a moment on a busy machine, and memory is kept for each
    # stream. There are few, so it ends; a leak grows every time.
    for _ in range(3):
        now = load_often(TIMES)
        more = [grown(*pair) for pair in zip(before, now, strict=True)]
        if not any(more):
            break
        before = now
    assert not any(more), more
    for each in now:
        assert each["communicators"] == each["pending"] == 0, each
    assert failing == bool(failed)
