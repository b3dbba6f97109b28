"""Each fault on demand has its effect on ProcessGroupHCCL, and what it leaves is accounted for.

Both ranks are threads of one process, one per device.
"""

import contextlib
import ctypes
import functools
import os
import signal
import threading
import time

import torch
import torch.distributed as dist
import torch_npu
from cases import case, run_cases_apart
from npusim_vllm import counts, fault
from torch_npu._C._distributed_c10d import ProcessGroupHCCL

SIZE = 1_000_000
MEGABYTE = 1 << 20
SENDER, RECEIVER = 0, 1
HCCL_E_INTERNAL, HCCL_E_REMOTE = 4, 21

_store = dist.HashStore()
_pairs = 0


def on_device(rank, function):
    """Runs a function in a thread on the rank's device; returns the thread and its results."""
    results = []

    def run():
        torch.npu.set_device(rank)
        try:
            results.append(function())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, results


def on_both(*functions):
    """Runs a function per rank, at the same time, and returns what each returned or raised."""
    started = [on_device(rank, function) for rank, function in enumerate(functions)]
    for thread, _ in started:
        thread.join(15)
        assert not thread.is_alive(), "a rank hangs"
    return [results[0] for _, results in started]


def make_group(rank, store, buffer_megabytes=None):
    options = ProcessGroupHCCL.Options()
    if buffer_megabytes is not None:
        options.hccl_config = {"hccl_buffer_size": buffer_megabytes}
    return ProcessGroupHCCL(store, rank, 2, options)


def make_pair(buffer_megabytes=None):
    global _pairs
    _pairs += 1
    store = dist.PrefixStore(str(_pairs), _store)
    return on_both(*(lambda rank=r: make_group(rank, store, buffer_megabytes) for r in (0, 1)))


def make_tensors(size=SIZE):
    """Returns what is sent, what it is received into, and a copy of the former on the host."""
    host = torch.arange(size, dtype=torch.int64).to(torch.uint8)
    sent = on_both(lambda: host.to("npu:0"), lambda: torch.zeros_like(host).to("npu:1"))
    torch.npu.synchronize(0)
    torch.npu.synchronize(1)
    return *sent, host


def start(pair, sent, received):
    """Queues a transfer."""
    failed = on_both(
        lambda: pair[SENDER].send([sent], RECEIVER, 0) and None,
        lambda: pair[RECEIVER].recv([received], SENDER, 0) and None,
    )
    assert failed == [None, None], failed


def finish():
    """Waits for both devices and returns the error of each, if any."""
    return on_both(lambda: torch.npu.synchronize(0), lambda: torch.npu.synchronize(1))


def transfer(pair, sent, received):
    started = time.monotonic()
    start(pair, sent, received)
    errors = finish()
    return errors, time.monotonic() - started


def connected_pair():
    """Returns a pair that has transferred once, which makes the communicators."""
    pair = make_pair()
    sent, received, _ = make_tensors(16)
    assert transfer(pair, sent, received)[0] == [None, None]
    return pair


def wait_until(true, timeout=5.0):
    """Returns after how many seconds a condition held."""
    started = time.monotonic()
    while not true():
        assert time.monotonic() < started + timeout, counts()
        time.sleep(0.002)
    return time.monotonic() - started


def raises(function):
    try:
        function()
    except (RuntimeError, ValueError) as error:
        return str(error)
    raise AssertionError("it raised nothing")


def destroy(*groups):
    """Destroys the communicators; without a reason given, torch_npu's "abort" does nothing."""
    for group in groups:
        group.abort_hccl_comm("test")


@case
def without_faults_the_bytes_arrive():
    pair = make_pair()
    sent, received, host = make_tensors()
    assert transfer(pair, sent, received)[0] == [None, None]
    assert torch.equal(received.cpu(), host)
    assert counts()["p2p"] == 2


@case
def a_bad_fault_is_refused():
    for spec in ("p2p", "p2p:nonsense", "disk:stall", "p2p:delay", "p2p:stall@0", "p2p:stall@x"):
        raises(lambda spec=spec: fault(spec))
    connected_pair()


@case
def the_environment_asks_for_faults_too():
    os.environ["NPU_SIM_FAULTS"] = "recv:flip=5@1"
    sent, received, host = make_tensors(16)
    transfer(make_pair(), sent, received)
    assert received.cpu().ne(host).nonzero().flatten().tolist() == [5]


@case
def delay_of_one():
    pair = connected_pair()
    sent, received, host = make_tensors()
    fault("send:delay=1500@2")
    assert transfer(pair, sent, received)[1] < 1.5
    assert transfer(pair, sent, received)[1] >= 1.5
    assert transfer(pair, sent, received)[1] < 1.5
    assert torch.equal(received.cpu(), host)


@case
def delay_of_each():
    pair = connected_pair()
    sent, received, _ = make_tensors()
    fault("recv:delay=1000")
    for _ in range(2):
        assert transfer(pair, sent, received)[1] >= 1
    fault("clear")
    assert transfer(pair, sent, received)[1] < 1


@case
def a_stalled_operation_ends_with_its_communicator():
    sent, received, _ = make_tensors()
    seconds = []
    for _ in range(4):
        fault("clear;send:stall@1")
        pair = make_pair()
        start(pair, sent, received)
        wait_until(lambda: counts()["p2p_pending"] == 2)
        time.sleep(0.1)
        assert counts()["p2p_pending"] == 2
        destroy(pair[SENDER])
        seconds.append(wait_until(lambda: counts()["p2p_pending"] == 0))
    # Not the slowest, as the machine may be busy with something else.
    assert sorted(seconds)[1] < 0.05, seconds
    assert all(isinstance(error, RuntimeError) for error in finish())


@case
def a_stalled_operation_ends_when_the_peer_goes():
    fault("send:stall@1")
    pair = make_pair()
    sent, received, _ = make_tensors()
    start(pair, sent, received)
    time.sleep(0.1)
    destroy(pair[RECEIVER])
    assert wait_until(lambda: counts()["p2p_pending"] == 0) < 2


@case
def a_stall_within_the_payload():
    fault("send:stall=1000@1")
    sent, received, host = make_tensors()
    pair = make_pair()
    start(pair, sent, received)
    time.sleep(0.3)
    assert counts()["p2p_pending"] == 2
    seen = ctypes.string_at(received.data_ptr(), SIZE)
    assert seen[:1000] == host[:1000].numpy().tobytes()
    assert not any(seen[1000:])


@case
def a_stall_times_out():
    os.environ["HCCL_EXEC_TIMEOUT"] = "1"
    fault("recv:stall@1")
    sent, received, _ = make_tensors()
    errors, seconds = transfer(make_pair(), sent, received)
    assert seconds >= 1 and all(isinstance(error, RuntimeError) for error in errors)


@case
def a_flipped_bit_at_the_receiver():
    pair = connected_pair()
    sent, received, host = make_tensors()
    fault("recv:flip=70@2")
    transfer(pair, sent, received)
    assert torch.equal(received.cpu(), host)
    transfer(pair, sent, received)
    assert received.cpu().ne(host).nonzero().flatten().tolist() == [70]


@case
def a_flipped_bit_on_the_way():
    sent, received, host = make_tensors()
    fault("send:flip=-1")
    transfer(make_pair(), sent, received)
    assert received.cpu().ne(host).nonzero().flatten().tolist() == [SIZE - 1]
    assert torch.equal(sent.cpu(), host)


def launched_here(function):
    """Runs a function on a stream without torch_npu's queue, which tells of errors late or not."""
    with torch.npu.stream(torch.npu.SyncLaunchStream()):
        return function()


@case
def an_operation_that_is_refused():
    pair = make_pair()
    sent, received, _ = make_tensors()
    send = functools.partial(pair[SENDER].send, [sent], RECEIVER, 0)
    receive = functools.partial(pair[RECEIVER].recv, [received], SENDER, 0)
    works = on_both(lambda: launched_here(send), lambda: launched_here(receive))
    wait_until(lambda: all(work.is_completed() for work in works))
    fault(f"send:error={HCCL_E_INTERNAL}@1")
    error = on_both(lambda: launched_here(send), lambda: None)[SENDER]
    assert isinstance(error, RuntimeError), error
    assert counts()["p2p_pending"] == 0


@case
def an_operation_that_fails_later():
    hccl = ctypes.CDLL(os.path.join(os.environ["NPUSIM_LIB"], "libhccl.so"))
    root = ctypes.create_string_buffer(5000)  # more than an HcclRootInfo
    assert hccl.HcclGetRootInfo(root) == 0
    tensors = make_tensors()
    fault(f"recv:async_error={HCCL_E_REMOTE}@1")

    def transfer_without_torch(rank):
        communicator = ctypes.c_void_p()
        assert hccl.HcclCommInitRootInfo(2, root, rank, ctypes.byref(communicator)) == 0
        stream = ctypes.c_void_p(torch.npu.current_stream().npu_stream)
        buffer = ctypes.c_void_p(tensors[rank].data_ptr())
        count, int8, peer = ctypes.c_uint64(SIZE), 0, 1 - rank
        operation = hccl.HcclSend if rank == SENDER else hccl.HcclRecv
        assert operation(buffer, count, int8, peer, communicator, stream) == 0
        error = ctypes.c_int()

        def failed():
            assert hccl.HcclGetCommAsyncError(communicator, ctypes.byref(error)) == 0
            return error.value

        if rank == RECEIVER:
            wait_until(failed)
        assert hccl.HcclCommDestroy(communicator) == 0
        raises(torch.npu.synchronize)
        return error.value

    errors = on_both(*(lambda rank=r: transfer_without_torch(rank) for r in (0, 1)))
    assert errors == [0, HCCL_E_REMOTE], errors


@case
def collectives_are_spared():
    fault("p2p:error;send:stall;recv:async_error")
    pair = make_pair()
    x = on_both(lambda: torch.ones(5, device="npu:0"), lambda: torch.ones(5, device="npu:1"))
    failed = on_both(*(lambda rank=r: pair[rank].allreduce([x[rank]]) and None for r in (0, 1)))
    assert failed == [None, None] and finish() == [None, None]
    assert x[0].cpu().tolist() == [2.0] * 5
    assert counts()["p2p"] == 0


@case
def a_peer_that_never_comes():
    os.environ["HCCL_CONNECT_TIMEOUT"] = "1"
    fault("init:hang")
    pair = make_pair()
    sent, received, _ = make_tensors()
    started = time.monotonic()
    errors = on_both(
        lambda: pair[SENDER].send([sent], RECEIVER, 0),
        lambda: pair[RECEIVER].recv([received], SENDER, 0),
    )
    assert all("HCCL" in str(error) for error in errors), errors
    assert time.monotonic() - started >= 1
    assert counts()["communicators"] == 0


@case
def a_communicator_that_cannot_be_made():
    fault("init:error")
    pair = make_pair()
    sent, received, _ = make_tensors()
    errors = on_both(
        lambda: pair[SENDER].send([sent], RECEIVER, 0),
        lambda: pair[RECEIVER].recv([received], SENDER, 0),
    )
    assert all("HCCL" in str(error) for error in errors), errors


@case
def the_sender_dies_half_way():
    folder = os.environ["TMPDIR"]
    sender = os.fork()
    store = dist.FileStore(os.path.join(folder, "store"), 2)
    if sender == 0:
        fault("send:die@1")
        torch.npu.set_device(SENDER)
        sent = torch.ones(SIZE, dtype=torch.uint8, device="npu:0")
        group = make_group(SENDER, store)
        group.send([sent], RECEIVER, 0)
        torch.npu.synchronize()
        os._exit(1)
    torch.npu.set_device(RECEIVER)
    received = torch.zeros(SIZE, dtype=torch.uint8, device="npu:1")
    torch.npu.synchronize()
    group = make_group(RECEIVER, store)
    group.recv([received], SENDER, 0)
    raises(torch.npu.synchronize)
    assert os.WTERMSIG(os.waitpid(sender, 0)[1]) == signal.SIGKILL
    assert sum(ctypes.string_at(received.data_ptr(), SIZE)) == SIZE // 2


@case
def an_allocation_that_fails():
    torch.npu.set_device(0)
    kept = torch.ones(1, device="npu:0")
    fault("alloc:fail@1+")
    try:
        torch.empty(100 * MEGABYTE, dtype=torch.uint8, device="npu:0")
    except torch.OutOfMemoryError:
        fault("clear")
    else:
        raise AssertionError
    torch.empty(100 * MEGABYTE, dtype=torch.uint8, device="npu:0")
    assert kept.item() == 1


@case
def big_allocations_that_fail():
    torch.npu.set_device(0)
    fault(f"alloc:fail={50 * MEGABYTE}")
    torch.empty(40 * MEGABYTE, dtype=torch.uint8, device="npu:0")
    with contextlib.suppress(torch.OutOfMemoryError):
        torch.empty(60 * MEGABYTE, dtype=torch.uint8, device="npu:0")
        raise AssertionError


def used_by(use, *arguments):
    """Returns the megabytes per device that a pair takes for its buffers."""
    before = counts()["device_memory"]
    pair = make_pair(*arguments)
    use(pair)
    assert finish() == [None, None]
    assert counts()["communicators"] == 2
    during = counts()["device_memory"]
    destroy(*pair)
    after = counts()["device_memory"]
    assert counts()["communicators"] == 0
    # A barrier's own tensors stay with torch_npu.
    assert [x - y < 10 * MEGABYTE for x, y in zip(after, before, strict=True)] == [True, True]
    return [(x - y) // MEGABYTE for x, y in zip(during, after, strict=True)]


def barrier(pair):
    on_both(pair[0].barrier, pair[1].barrier)


def one_transfer(pair):
    sent, received, _ = make_tensors(16)
    start(pair, sent, received)


@case
def buffers_of_communicators_take_memory():
    assert used_by(barrier) == [2 * 200] * 2
    assert used_by(barrier, 1) == [2 * 1] * 2
    # torch_npu has a default of its own for point-to-point communicators, and ignores the option.
    assert used_by(one_transfer) == [2 * 20] * 2
    assert used_by(one_transfer, 1) == [2 * 20] * 2


@case
def buffers_by_environment():
    os.environ.update({"HCCL_BUFFSIZE": "30", "P2P_HCCL_BUFFSIZE": "3"})
    assert used_by(barrier) == [2 * 30] * 2
    assert used_by(one_transfer) == [2 * 3] * 2


@case
def buffers_of_point_to_point_by_option():
    os.environ["P2P_HCCL_BUFFSIZE"] = "0"
    assert used_by(one_transfer, 1) == [2 * 1] * 2


@case
def a_buffer_that_does_not_fit():
    os.environ["P2P_HCCL_BUFFSIZE"] = "0"
    pair = make_pair(5000)
    sent, received, _ = make_tensors()
    errors = on_both(
        lambda: pair[SENDER].send([sent], RECEIVER, 0),
        lambda: pair[RECEIVER].recv([received], SENDER, 0),
    )
    assert all("HCCL" in str(error) for error in errors), errors
    assert counts()["communicators"] == 0


@case
def nothing_grows():
    def once():
        pair = connected_pair()
        destroy(*pair)
        return counts()

    first = once()
    assert first["communicators"] == 0 and first["p2p_pending"] == 0
    for _ in range(3):
        again = once()
    # torch_npu takes one more stream of its pool for each group.
    assert again["stream_threads"] - first["stream_threads"] <= 2 * 3
    for name in ("p2p", "stream_threads"):
        del first[name], again[name]
    assert first == again


def fail_once():
    """Lets a transfer to device 1 fail; returns the groups, which should outlive what follows."""
    fault("recv:async_error@1")
    sent, received, _ = make_tensors()
    pair = make_pair()
    start(pair, sent, received)
    wait_until(lambda: counts()["p2p_pending"] <= 1)
    return pair


@case
def an_aborted_stream_is_as_good_as_new():
    os.environ["NPU_SIM_ON_FAILURE"] = "device"
    pair = connected_pair()
    sent, received, host = make_tensors()
    fault("send:stall@1")
    start(pair, sent, received)
    wait_until(lambda: counts()["p2p_pending"] == 2)
    started = time.monotonic()
    for rank in (SENDER, RECEIVER):
        abort_stream(pair[rank], rank)
    assert time.monotonic() - started < 10  # half of HCCL_EXEC_TIMEOUT
    assert counts()["p2p_pending"] == 0
    destroy(*pair)
    assert finish() == [None, None]
    assert transfer(make_pair(), sent, received)[0] == [None, None]
    assert torch.equal(received.cpu(), host)


def abort_stream(group, rank):
    def abort():
        stream = torch.npu.Stream(
            stream_id=group._get_stream_id(True, 1 - rank), device_index=rank, device_type=20
        )
        library = ctypes.CDLL("libascendcl.so")
        return library.aclrtStreamAbort(ctypes.c_void_p(stream.npu_stream))

    thread, results = on_device(rank, abort)
    thread.join(10)
    assert results == [0], results


@case
def a_stream_that_waits_for_an_aborted_one_waits_on():
    pair = connected_pair()
    sent, received, _ = make_tensors()
    fault("send:stall@1")
    works = on_both(
        lambda: pair[SENDER].send([sent], RECEIVER, 0),
        lambda: pair[RECEIVER].recv([received], SENDER, 0),
    )

    def wait():
        works[RECEIVER].wait()
        torch.npu.current_stream().synchronize()

    waiting = on_device(RECEIVER, wait)[0]
    time.sleep(0.2)
    abort_stream(pair[RECEIVER], RECEIVER)
    waiting.join(0.3)
    assert waiting.is_alive()


@case
def a_dead_peer_can_go_unnoticed():
    os.environ.update({"NPU_SIM_PEER_GONE": "wait", "HCCL_EXEC_TIMEOUT": "1"})
    fault("send:stall@1")
    pair = make_pair()
    sent, received, _ = make_tensors()
    start(pair, sent, received)
    wait_until(lambda: counts()["p2p_pending"] == 2)
    destroy(pair[SENDER])
    wait_until(lambda: counts()["p2p_pending"] == 1)
    assert wait_until(lambda: counts()["p2p_pending"] == 0) > 0.5
    assert isinstance(finish()[RECEIVER], RuntimeError)


@case
def a_failed_stream_leaves_the_others_alone():
    pair = fail_once()
    fine = on_both(lambda: None, lambda: torch.ones(3, device="npu:1").cpu().tolist())[1]
    assert pair
    assert fine == [1.0] * 3


@case
def a_failed_stream_can_stop_its_device():
    os.environ["NPU_SIM_ON_FAILURE"] = "device"
    pair = fail_once()
    broken = on_both(lambda: None, lambda: torch.ones(3, device="npu:1").cpu().tolist())[1]
    assert pair
    assert isinstance(broken, RuntimeError), broken


assert torch_npu
run_cases_apart()
