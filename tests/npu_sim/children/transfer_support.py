"""Sources and clients of NetLoader in processes of their own, and cases made of them.

Importing torch_npu and NetLoader takes seconds, so it happens once, here, and every process is
forked from the one that did it. That works as long as that one touches no device.
"""

import ctypes
import dataclasses
import functools
import gc
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
import types

import torch
import torch.distributed as dist
import torch_npu
from npusim_vllm import counts

from vllm_ascend.model_loader.netloader import load as load_module
from vllm_ascend.model_loader.netloader import serve as serve_module
from vllm_ascend.model_loader.netloader.config import NetLoaderConfig
from vllm_ascend.model_loader.netloader.errors import LoadFailed
from vllm_ascend.model_loader.netloader.executor.devices import device_of
from vllm_ascend.model_loader.netloader.executor.devices.npu import NpuDevice
from vllm_ascend.model_loader.netloader.executor.digest import digest_model
from vllm_ascend.model_loader.netloader.executor.elastic_load import P2PSend
from vllm_ascend.model_loader.netloader.executor.manifest import PROCESSED, describe
from vllm_ascend.model_loader.netloader.executor.plan import make_plan
from vllm_ascend.model_loader.netloader.executor.store import PeerStore
from vllm_ascend.model_loader.netloader.executor.weights import Weights
from vllm_ascend.model_loader.netloader.identity import ModelIdentity, Revision

HOST = "127.0.0.1"
MIB = 1 << 20
FRACTAL_NZ = 29
# How long anything may take that is to happen; only a defect takes this long.
PATIENCE = 30.0
# Cases at a time. Most of them wait, for deadlines.
JOBS = 4
CASE_SECONDS = 60.0
_PR_SET_PDEATHSIG = 1

IDENTITY = ModelIdentity(
    group="netloader",
    model="small",
    revision=Revision(),
    rank=0,
    tp=1,
    pp=1,
    dp=1,
    ep=False,
    dtype="torch.bfloat16",
    quantization="ascend",
    quantization_config="0123456789abcdef",
    config="fedcba9876543210",
    layout=PROCESSED,
    vllm_version=None,
)

# What a process has: its device, its source, its inference.
here = types.SimpleNamespace(rounds=0, stopping=False, broken=None, kept=[])


def settings(**changes):
    """Deadlines that make failures short, but not so short that a busy machine causes some."""
    usual = {
        "source": {},
        "listen_host": HOST,
        "chunk_mib": 1,
        "max_sources": 1,
        "connect_timeout": 5.0,
        "handshake_timeout": 5.0,
        "progress_timeout": 3.0,
    }
    return NetLoaderConfig(**usual | changes)


# ------------------------------------------------------------------------------------ cases

_cases = []


def case(function):
    """Marks a case."""
    _cases.append(function)
    return function


def run_cases(names):
    """Runs cases, each in a process of its own, and prints what Result.check_case reads."""
    waiting = [function for function in _cases if not names or function.__name__ in names]
    running = []
    with tempfile.TemporaryDirectory() as folder:
        while waiting or running:
            while waiting and len(running) < JOBS:
                running.append(_Running(waiting.pop(0), folder))
            running = [one for one in running if not one.has_ended()]
            time.sleep(0.01)


class _Running:
    """A case in its process."""

    def __init__(self, function, folder):
        self._name = function.__name__
        self._output = os.path.join(folder, self._name)
        self._started = time.monotonic()
        self._pid = _fork(functools.partial(_run_case, function, self._output))

    def has_ended(self):
        ended, status = os.waitpid(self._pid, os.WNOHANG)
        seconds = time.monotonic() - self._started
        if not ended:
            if seconds < CASE_SECONDS:
                return False
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
        with open(self._output, errors="replace") as output:
            error = output.read()[-20000:] if not ended or status else None
        report = {"case": self._name, "error": error, "seconds": round(seconds, 1)}
        print(json.dumps(report), flush=True)
        return True


def _run_case(function, path):
    output = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, sys.stdout.fileno())
    os.dup2(output, sys.stderr.fileno())
    try:
        function()
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _fork(function):
    """Runs a function in a new process that ends with this one, and returns its number."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        function()
        os._exit(0)
    return pid


# ------------------------------------------------------------------------------------ processes


class Process:
    """A process with an NPU, which calls functions of modules, one after the other."""

    def __init__(self, index=0, **environment):
        self._orders, theirs = multiprocessing.Pipe()
        self.pid = _fork(functools.partial(_obey, theirs, index, environment))
        theirs.close()

    def start(self, function, *arguments, **options):
        self._orders.send((function, arguments, options))

    def result(self, patience=PATIENCE):
        assert self._orders.poll(patience), f"process {self.pid} does not answer"
        error, value = self._orders.recv()
        assert error is None, error
        return value

    def call(self, function, *arguments, **options):
        self.start(function, *arguments, **options)
        return self.result()

    def kill(self, number):
        os.kill(self.pid, number)

    def wait_until_gone(self, number):
        """Waits until a signal has killed or stopped the process."""

        def gone():
            pid, status = os.waitpid(self.pid, os.WNOHANG | os.WUNTRACED)
            if not pid:
                return False
            how = os.WSTOPSIG(status) if os.WIFSTOPPED(status) else os.WTERMSIG(status)
            assert how == number, how
            return True

        until(gone)

    def check_alive(self):
        assert os.waitpid(self.pid, os.WNOHANG) == (0, 0), f"process {self.pid} has ended"


def _obey(orders, index, environment):
    os.environ.update(environment)
    torch.npu.set_device(index)
    torch.npu.config.allow_internal_format = True
    here.index = index
    here.device = device_of(f"npu:{index}", NetLoaderConfig(source={}).hccl_buffer_size)
    while True:
        function, arguments, options = orders.recv()
        try:
            answer = None, function(*arguments, **options)
        except BaseException:
            answer = traceback.format_exc(), None
        orders.send(answer)


def call_all(processes, function, *arguments, **options):
    """Calls a function in several processes at the same time."""
    for process in processes:
        process.start(function, *arguments, **options)
    return [process.result() for process in processes]


def until(condition, patience=PATIENCE):
    """Waits for a condition and returns after how many seconds it held."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < patience, "it did not happen"
        time.sleep(0.005)
    return time.monotonic() - started


# ------------------------------------------------------------------------------------ tensors


def random_tensor(seed, dtype, *shape):
    """A tensor of the host of random bytes, so that every bit pattern of a dtype comes up."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel()
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    data = torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return data.view(dtype).reshape(shape)


def maker(seed):
    """Returns a function that makes another random tensor of this process's device each time."""
    seeds = iter(range(seed * 100_000, (seed + 1) * 100_000))
    return lambda dtype, *shape: random_tensor(next(seeds), dtype, *shape).npu()


def nz(tensor):
    return torch_npu.npu_format_cast(tensor, FRACTAL_NZ)


COUNT = 24


def rows(seed, count=COUNT):
    """Tensors of one chunk each; the first has a format of its own."""
    make = maker(seed)
    return {
        "row.0": nz(make(torch.int8, 1024, 1024)),
        **{f"row.{i}": make(torch.uint8, MIB) for i in range(1, count)},
    }


def few(seed):
    """A model that takes little time: one tensor by itself, and some that share a chunk."""
    make = maker(seed)
    return {
        "nz": nz(make(torch.bfloat16, 64, 64)),
        "large": make(torch.uint8, MIB),
        "transposed": make(torch.float32, 30, 20).t(),
        **{f"small.{i}": make(torch.int32, 10 + i) for i in range(10)},
    }


def plain_bytes(tensor):
    """The bytes of a tensor's elements in row-major order, on the host."""
    host = here.device.to_nd(tensor).cpu().contiguous()
    return host.as_strided((host.numel(),), (1,)).view(torch.uint8)


def memory_of(tensor):
    """The bytes as they lie on the device: it is simulated in the memory of the host."""
    torch.npu.synchronize()
    storage = tensor.untyped_storage()
    return ctypes.string_at(storage.data_ptr(), storage.nbytes())


def kind_of(tensor):
    return (
        tensor.dtype,
        tensor.shape,
        # of these, strides say nothing
        None if tensor.numel() < 2 else tensor.stride(),
        tensor.device,
        here.device.format_of(tensor),
    )


def differing(got, expected):
    """Names of the tensors that are not the same in kind or bytes."""
    assert got.keys() == expected.keys(), got.keys() ^ expected.keys()
    return [
        name
        for name in got
        if kind_of(got[name]) != kind_of(expected[name])
        or not torch.equal(plain_bytes(got[name]), plain_bytes(expected[name]))
    ]


# ------------------------------------------------------------------------------------ both sides


def weights_of(tensors):
    manifest, distinct = describe(tensors, PROCESSED, {}, here.device.format_of)
    plan = make_plan([tensor.nbytes for tensor in distinct], MIB)
    digests = digest_model(manifest, plan, distinct, here.device)
    return Weights(manifest, distinct, plan, digests)


def serve(make, seed=0, *, who=IDENTITY, **changes):
    """Starts a source and returns its address."""
    here.tensors = make(seed)
    return serve_weights(weights_of(here.tensors), who=who, **changes)


def serve_weights(weights, *, who=IDENTITY, **changes):
    here.weights = weights
    here.server = serve_module.WeightServer(settings(**changes), who.rank, HOST)
    here.server.offer(serve_module.Offer(who, weights, here.device))
    return here.server.start(0)


def sessions():
    return here.server._server.sessions


def sent_bytes():
    return here.server._bytes_sent


def wait_for_no_sessions():
    """Returns after how many seconds the last client had left."""
    return until(lambda: sessions() == 0)


@dataclasses.dataclass
class Outcome:
    """How a load went: why it failed, or what is wrong with the result."""

    failure: str | None
    wrong: list[str]
    seconds: float
    digest: str | None = None

    def check(self):
        assert self.failure is None and self.wrong == [], self

    def check_failed(self, *words):
        assert self.failure is not None, self
        assert all(word in self.failure for word in words), self.failure
        assert "\n" not in self.failure


def load_into(tensors, sources, *, who=IDENTITY, device=None, **changes):
    device = device or here.device
    return load_module.elastic_load(
        tensors, set(tensors), sources, who, settings(**changes), device
    )


def load(sources, make, seed=0, **changes):
    """Fills tensors that have other values, and compares them with those that were expected."""
    tensors, expected = make(seed + 1), make(seed)
    started = time.monotonic()
    try:
        loaded = load_into(tensors, sources, **changes)
    except LoadFailed as error:
        return Outcome(str(error), [], time.monotonic() - started)
    seconds = time.monotonic() - started
    return Outcome(None, differing(tensors, expected), seconds, loaded.digests.model)


def load_often(times, sources, make, **changes):
    """Loads again and again; returns what was wrong with each."""
    return [load(sources, make, **changes) for _ in range(times)]


# ------------------------------------------------------------------------------------ inference


def join_ranks(rank, path):
    """Makes the default group, as tensor parallelism has one, and starts to infer with it."""
    dist.init_process_group("hccl", store=dist.FileStore(path, 2), rank=rank, world_size=2)
    here.thread = threading.Thread(target=_infer, args=(rank,), daemon=True)
    here.thread.start()


def _infer(rank):
    try:
        torch.npu.set_device(here.index)
        x = torch.arange(64.0 * 64).view(64, 64).npu() / 4096
        expected = x.cpu() @ x.cpu()
        stopped = False
        while not stopped:
            state = torch.tensor([rank + 1.0, here.stopping]).npu()
            dist.all_reduce(state)
            y = x @ x
            torch.npu.current_stream().synchronize()
            total, stopped = state.cpu().tolist()
            assert total == 3, total
            torch.testing.assert_close(y.cpu(), expected)
            here.rounds += 1
            time.sleep(0.01)
    except BaseException:
        here.broken = traceback.format_exc()


def inferring(index, mate_index):
    """Returns two processes that infer together."""
    path = os.path.join(tempfile.mkdtemp(), "store")
    pair = Process(index), Process(mate_index)
    for rank, process in enumerate(pair):
        process.start(join_ranks, rank, path)
    for process in pair:
        process.result()
    return pair


def check_inference():
    """Fails unless inference goes on."""
    before = here.rounds
    until(lambda: here.broken or here.rounds > before + 5)
    assert here.broken is None, here.broken
    torch.npu.current_stream().synchronize()


def end_inference():
    here.stopping = True
    here.thread.join(PATIENCE)
    assert here.broken is None, here.broken
    assert not here.thread.is_alive()
    return here.rounds


# ------------------------------------------------------------------------------------ failures

# Where a session can be cut.
BEFORE_THE_GROUP = "before the group"
WHILE_HCCL_CONNECTS = "while HCCL looks for the peer"
BEFORE_THE_VOTE = "before the vote on a stream"
IN_THE_FIRST_MESSAGE = "in the first message"
IN_THE_TRANSFER = "in the transfer"
AFTER_THE_LAST = "after the last message"
BEFORE_THE_FORMATS = "before formats are restored"
_WAITS = {BEFORE_THE_VOTE: 1, IN_THE_FIRST_MESSAGE: 2, IN_THE_TRANSFER: COUNT // 3}


def do_at(point, action):
    """Lets this process, a source or a client, do something when its session gets to a point."""
    if point == BEFORE_THE_GROUP:
        _at(load_module, "form_group", action)
        _at(serve_module, "form_group", action)
    elif point == WHILE_HCCL_CONNECTS:
        # The client has set where HCCL finds it, or the source has got that: the second value for
        # either, after the one with which they meet.
        once = functools.cache(action)
        _at(PeerStore, "set", once, 2, after=True)
        _at(PeerStore, "get", once, 2, after=True)
    elif point == BEFORE_THE_FORMATS:
        _at(load_module._Load, "restore_formats", action)
    elif point == AFTER_THE_LAST:
        _at(load_module._Load, "_conclude", action)
        _at(P2PSend, "finish", action)
    else:
        _at(NpuDevice, "wait", action, _WAITS[point])


def _at(owner, name, action, nth=1, after=False):
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


def signal_self_at(point, number):
    do_at(point, lambda: os.kill(os.getpid(), number))


# ------------------------------------------------------------------------------------ counting


def used():
    """What this process uses, of all that a leak would make grow."""
    gc.collect()
    torch.npu.current_stream().synchronize()
    counted = counts()
    # The simulator has a thread and a file for each stream that was ever used, of those that
    # torch_npu hands out in turn.
    threads = len(os.listdir("/proc/self/task")) - counted["stream_threads"]
    files = len(os.listdir("/proc/self/fd")) - counted["stream_threads"]
    return {
        "device_memory": counted["device_memory"][here.index],
        "communicators": counted["communicators"],
        "pending": counted["p2p_pending"],
        "streams": counted["streams"],
        "allocated": torch.npu.memory_allocated(),
        "threads": threads,
        "files": files,
    }


def wait_until_hccl_rests(communicators=0):
    """Waits until this process has no other communicators, and HCCL nothing to do.

    A session gives its own back at its end, or shortly after it where a thread still connects.
    """

    def rests():
        counted = counts()
        return counted["communicators"] == communicators and counted["p2p_pending"] == 0

    until(rests)
