"""Small models, their stores and the like: what the tests of NetLoader are made of."""

import contextlib
import dataclasses
import math
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import ClassVar

import torch
from hypothesis import strategies as st

import vllm_ascend
from tests.identity import IDENTITY
from vllm_ascend.model_loader.netloader.config import NetLoaderConfig
from vllm_ascend.model_loader.netloader.executor.chunks.manifest import RAW
from vllm_ascend.model_loader.netloader.executor.devices.cpu import CpuDevice
from vllm_ascend.model_loader.netloader.executor.devices.streams import StreamDevice
from vllm_ascend.model_loader.netloader.executor.store import BlockStore, make_store
from vllm_ascend.model_loader.netloader.executor.transport.group import CLIENT
from vllm_ascend.model_loader.netloader.load import elastic_load
from vllm_ascend.model_loader.netloader.serve import Offer, WeightServer
from vllm_ascend.model_loader.netloader.utils import Address

MIB = 1 << 20
HOST = "127.0.0.1"
DEVICE = CpuDevice()
# How long a test waits for what has to happen; nothing takes this long unless something is wrong.
PATIENCE = 20.0


def settings(**changes):
    usual = {
        "source": {},
        "listen_host": HOST,
        "chunk_mib": 1,
        "source_wait": 0.0,
        "connect_timeout": 2.0,
        "handshake_timeout": 5.0,
        "progress_timeout": 5.0,
    }
    return NetLoaderConfig(**usual | changes)


# Tensors

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.uint16,
    torch.int16,
    torch.uint32,
    torch.int32,
    torch.uint64,
    torch.int64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
]


def random_tensor(seed, dtype, *shape):
    """A contiguous tensor of random bytes, so that every bit pattern of a dtype comes up."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel()
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    size = torch.empty(0, dtype=dtype).element_size()
    data = torch.randint(0, 256, (count * size,), dtype=torch.uint8, generator=generator)
    return data.view(dtype).reshape(shape)


def assorted(seed=0):
    """One of every kind of tensor, small and large: 8 MiB or so, tied ones included."""
    embedding = random_tensor(seed, torch.bfloat16, 1024, 700)
    return {
        "embed.weight": embedding,
        "norm.weight": random_tensor(seed + 1, torch.float32, 64),
        "scale": random_tensor(seed + 2, torch.float32),
        "empty": torch.empty(0, 4),
        "large": random_tensor(seed + 3, torch.float32, 3 * MIB // 4 + 5),
        "int8.weight": random_tensor(seed + 4, torch.int8, 300, 1000),
        "transposed": random_tensor(seed + 5, torch.float16, 30, 50).t(),
        "large_transposed": random_tensor(seed + 6, torch.float32, 500, 700).t(),
        "strided": random_tensor(seed + 7, torch.int32, 20, 30)[::2, 1::3],
        "flags": random_tensor(seed + 8, torch.bool, 33),
        "complex": random_tensor(seed + 9, torch.complex64, 7),
        "float8": random_tensor(seed + 10, torch.float8_e4m3fn, 11),
        "odd": random_tensor(seed + 11, torch.uint8, 2 * MIB + 3),
        "lm_head.weight": embedding,
    }


@st.composite
def any_tensor(draw):
    """A tensor of any dtype and shape: contiguous, transposed, cut out or spread out."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 9), max_size=3))
    seed = draw(st.integers(0, 1000))
    kind = draw(st.sampled_from(["contiguous", "transposed", "sliced", "shifted", "reversed"]))
    if kind == "sliced":
        whole = random_tensor(seed, dtype, *(2 * size + 1 for size in shape))
        return whole[tuple(slice(1, 2 * size + 1, 2) for size in shape)]
    if kind == "shifted":
        whole = random_tensor(seed, dtype, math.prod(shape) + 1)
        return whole[1:].view(shape)
    tensor = random_tensor(seed, dtype, *shape)
    if kind == "transposed" and len(shape) > 1:
        return tensor.transpose(0, -1)
    if kind == "reversed" and len(shape) == 3:
        return tensor.permute(2, 0, 1)
    return tensor


@st.composite
def any_model(draw):
    """Named tensors, some of them under two names."""
    tensors = draw(st.lists(any_tensor(), max_size=8))
    model = {f"t{index}": tensor for index, tensor in enumerate(tensors)}
    for index, tensor in enumerate(tensors):
        if draw(st.integers(0, 4)) == 0:
            model[f"tied{index}"] = tensor
    return model


def blank_like(tensors):
    """Tensors of the same dtypes, shapes, strides and ties, filled with something else."""
    blanks = {}
    made = {}
    for name, tensor in tensors.items():
        if id(tensor) not in made:
            extent = 1 + sum(
                (size - 1) * stride
                for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
            )
            nbytes = max(extent, 1) * tensor.element_size()
            memory = torch.full((nbytes,), 0xA5, dtype=torch.uint8)
            made[id(tensor)] = memory.view(tensor.dtype).as_strided(tensor.shape, tensor.stride())
        blanks[name] = made[id(tensor)]
    return blanks


def bytes_of(tensor):
    # a contiguous tensor of one element may have any stride
    return tensor.detach().contiguous().as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def differing(one, other):
    """Names of the tensors whose bytes differ."""
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(bytes_of(one[name]), bytes_of(other[name]))]


# Stores, sources and clients


def store_of(tensors, device=DEVICE, attributes=None, layout=RAW):
    """Tensors as a source has them."""
    return make_store(tensors, layout, attributes or {}, device)


def incomplete(store, tensors, device=None):
    """What a client makes of a source's store, over its own tensors without aliases."""
    device = device or store.device
    return BlockStore(store.manifest, store.blocks, tensors, store.digests, device, complete=False)


@dataclasses.dataclass
class Source:
    address: Address
    server: WeightServer


@contextlib.contextmanager
def source(tensors, *, who=IDENTITY, config=None, reason="", device=DEVICE):
    """A running source of `tensors`: a dict of them, a store, or None with a reason."""
    store = store_of(tensors, device) if isinstance(tensors, dict) else tensors
    server = WeightServer(config or settings(), who.rank, HOST)
    address = server.start(0)
    server.offer(Offer(who, store, reason))
    try:
        yield Source(address, server)
    finally:
        server.stop()


def load(sources, into, *, required=None, who=IDENTITY, config=None, device=DEVICE):
    """Run a client's whole load into the tensors of `into`; return the store."""
    addresses = [one.address if isinstance(one, Source) else one for one in sources]
    required = set(into) if required is None else required
    return elastic_load(into, required, addresses, who, config or settings(), device).store


# An accelerator in host memory


class Api:
    """In the place of `torch.npu`."""

    class Stream:
        def __init__(self, device):
            self.device = device

    def __init__(self):
        self.here = threading.local()
        self.synchronized = []
        self.emptied = 0

    def set_device(self, device):
        self.here.device = device

    @contextlib.contextmanager
    def stream(self, stream):
        self.here.stream = stream
        try:
            yield
        finally:
            self.here.stream = None

    def synchronize(self, device):
        self.synchronized.append(device)

    def empty_cache(self):
        self.emptied += 1


class _Operation:
    """One end of a message in a `_Link`."""

    def __init__(self, message):
        self.message = message
        self.ended = threading.Event()
        self.right = False

    def is_completed(self):
        return self.ended.is_set()

    def is_success(self):
        return self.right

    def end(self, right):
        self.right = right
        self.ended.set()


class _Link:
    """What two groups have in common: messages that wait for their other end."""

    def __init__(self):
        self._lock = threading.Lock()
        self._waiting = {}  # direction -> operations of one end only, in order
        self._over = False

    def start(self, sender, sends, message):
        mine = _Operation(message)
        with self._lock:
            if self._over:
                mine.end(False)
                return mine
            waiting = self._waiting.setdefault((sender, not sends), [])
            if not waiting:
                self._waiting.setdefault((sender, sends), []).append(mine)
                return mine
            theirs = waiting.pop(0)
            source, destination = (mine, theirs) if sends else (theirs, mine)
            right = source.message.numel() == destination.message.numel()
            if right:
                destination.message.copy_(source.message)
            for one in (mine, theirs):
                one.end(right)
        return mine

    def cut(self):
        with self._lock:
            self._over = True
            for operations in self._waiting.values():
                for one in operations:
                    one.end(False)


class LinkGroup:
    """In the place of a process group: its messages are copied as soon as both ends have begun."""

    def __init__(self, link, rank):
        self._link = link
        self._rank = rank
        self.started = []

    def send(self, messages, peer, tag):
        self.started.append(("send", messages[0]))
        return self._link.start(self._rank, True, messages[0])

    def recv(self, messages, peer, tag):
        self.started.append(("receive", messages[0]))
        return self._link.start(peer, False, messages[0])

    def abort(self):
        self._link.cut()


class LinkDevice(StreamDevice):
    """An accelerator whose memory is the host's, and whose groups reach no other process."""

    _links: ClassVar = {}

    def __init__(self):
        super().__init__(torch.device("cpu"), Api())
        self.groups = []
        self.closed = 0

    def create_group(self, store, rank, local_host, timeout, gone):
        if rank == CLIENT:
            name = str(len(self._links))
            self._links[name] = _Link()
            store.set("link", name)
        group = LinkGroup(self._links[store.get("link").decode()], rank)
        self.groups.append(group)
        return self.connect(timeout, gone, lambda: self.exchange(group, rank, timeout, gone))

    def close(self, group, unfinished):
        self.closed += 1
        super().close(group, unfinished)

    def empty_host(self, nbytes):
        return torch.empty(nbytes, dtype=torch.uint8)  # no accelerator, no pinned memory


class Channel:
    """One end of a way on which two stores tell each other what they set."""

    def __init__(self, out, into):
        self._out, self._in = out, into
        self._closed = False

    def tell(self, key, value):
        if self._closed:
            raise BrokenPipeError("Broken pipe")
        self._out.put((key, value))

    def hear(self, timeout):
        try:
            said = self._in.get(timeout=timeout)
        except queue.Empty:
            raise TimeoutError(f"nothing for {timeout:g} s") from None
        if said is None:
            self._in.put(None)
            raise ConnectionResetError("the peer closed the connection")
        return said

    def close(self):
        self._closed = True
        for way in (self._in, self._out):
            way.put(None)


def channels():
    """Both ends of a way between two stores."""
    one, other = queue.Queue(), queue.Queue()
    return Channel(one, other), Channel(other, one)


# Processes and sockets


def python(*arguments, **options):
    """Start a Python process that sees the same code as this one."""
    folders = [str(Path(vllm_ascend.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, folders))}
    # Its lines would go to stdout, if something has vLLM configure them.
    environment["VLLM_CONFIGURE_LOGGING"] = "0"
    environment |= options.pop("env", {})
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        **options,
    )


def end(process):
    process.kill()
    process.wait(PATIENCE)
    process.stdout.close()


def dial(address, timeout=PATIENCE):
    return socket.create_connection((address.host, address.port), timeout)


def closed_port():
    """An address of this machine at which nobody listens."""
    with socket.create_server((HOST, 0)) as listener:
        return Address(HOST, listener.getsockname()[1])


class Clock:
    """In the place of a module's `time`: it goes on only where somebody lets it.

    `at` has moments, in seconds from the beginning, and events that are set when they come.
    """

    def __init__(self):
        self.now = self.start = 1000.0
        self.at = []

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        for moment, event in self.at:
            if self.now >= self.start + moment:
                event.set()

    @property
    def passed(self):
        return self.now - self.start


def until(condition, patience=PATIENCE):
    """Wait until a condition holds; return whether it did in time."""
    deadline = time.monotonic() + patience
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True
