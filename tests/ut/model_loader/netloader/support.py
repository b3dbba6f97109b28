"""Real sources, real clients and small models: what the tests of NetLoader are made of."""

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import torch

import vllm_ascend
from vllm_ascend.model_loader.netloader.config import NetLoaderConfig
from vllm_ascend.model_loader.netloader.executor.devices.cpu import CpuDevice
from vllm_ascend.model_loader.netloader.executor.manifest import RAW
from vllm_ascend.model_loader.netloader.executor.weights import make_weights
from vllm_ascend.model_loader.netloader.identity import ModelIdentity, Revision
from vllm_ascend.model_loader.netloader.interaction.protocol import (
    PROTOCOL,
    Connection,
    Join,
    StoreSet,
)
from vllm_ascend.model_loader.netloader.load import elastic_load
from vllm_ascend.model_loader.netloader.serve import Offer, WeightServer
from vllm_ascend.model_loader.netloader.utils import Address

MIB = 1 << 20
HOST = "127.0.0.1"
DEVICE = CpuDevice()
# How long a test waits for what has to happen; nothing takes this long unless something is wrong.
PATIENCE = 20.0

_IDENTITY = ModelIdentity(
    group="netloader",
    model="small",
    revision=Revision(),
    rank=0,
    tp=1,
    pp=1,
    dp=1,
    ep=False,
    dtype="torch.bfloat16",
    quantization=None,
    quantization_config="0123456789abcdef",
    config="fedcba9876543210",
    layout=RAW,
    vllm_version=None,
)


def identity(**changes):
    return msgspec.structs.replace(_IDENTITY, **changes)


def settings(**changes):
    usual = {
        "source": {},
        "listen_host": HOST,
        "chunk_mib": 1,
        "connect_timeout": 2.0,
        "handshake_timeout": 5.0,
        "progress_timeout": 5.0,
    }
    return NetLoaderConfig(**usual | changes)


# Tensors


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


COUNT, ROW = 64, MIB // 8


def rows(count=COUNT, seed=0):
    """Tensors of one chunk each, so that a tensor's index is its chunk's number."""
    return {f"row.{i}": random_tensor(seed * 1000 + i, torch.uint8, ROW) for i in range(count)}


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


def weights_of(tensors, chunk_bytes=MIB, attributes=None):
    """Tensors as a source offers them."""
    return make_weights(tensors, RAW, attributes or {}, chunk_bytes, DEVICE)


# Sources and clients


@dataclasses.dataclass
class Source:
    address: Address
    server: WeightServer
    offer: Offer

    @property
    def sessions(self):
        return self.server._server.sessions


@contextlib.contextmanager
def source(tensors, *, who=_IDENTITY, config=None, reason="", device=DEVICE):
    """A running source of `tensors`: a dict of them, Weights, or None with a reason."""
    weights = weights_of(tensors) if isinstance(tensors, dict) else tensors
    server = WeightServer(config or settings(), who.rank, HOST)
    address = server.start(0)
    offer = Offer(who, weights, device, reason)
    server.offer(offer)
    try:
        yield Source(address, server, offer)
    finally:
        server.stop()


def load(sources, into, *, required=None, who=_IDENTITY, config=None, device=DEVICE):
    """Run a client's whole load into the tensors of `into`."""
    addresses = [one.address if isinstance(one, Source) else one for one in sources]
    required = set(into) if required is None else required
    return elastic_load(into, required, addresses, who, config or settings(), device)


def loads_right_bytes(one, tensors, **options):
    """Whether another client gets the right bytes from a source."""
    blanks = blank_like(tensors)
    load([one], blanks, **options)
    return differing(blanks, tensors) == []


def join_of(who=_IDENTITY, **changes):
    """The JOIN that a client of that identity sends."""
    fields = {
        "device_id": who.rank,
        "model_path": who.model,
        "tp": who.tp,
        "pp": who.pp,
        "group_name": who.group,
        "protocol": PROTOCOL,
        "identity": who.digest(),
        "revision": who.revision,
        "layouts": [who.layout],
    }
    return Join(**fields | changes)


# Faults


class Tapped(Sequence):
    """A source's tensors, with something that happens whenever one of them is about to be sent.

    `tap(index, count)` is called with the tensor's index and how many were read before; it may
    raise, block, end the process, or return a tensor to be sent instead.
    """

    def __init__(self, tensors, tap):
        self._tensors = tensors
        self._tap = tap
        self._lock = threading.Lock()
        self.read = []
        self._sent = []  # what was sent instead has to stay in memory

    def __len__(self):
        return len(self._tensors)

    def __getitem__(self, index):
        with self._lock:
            count = len(self.read)
            self.read.append(index)
        instead = self._tap(index, count)
        if instead is None:
            return self._tensors[index]
        self._sent.append(instead)
        return instead


def tapped(tensors, tap=lambda index, count: None):
    """Weights for `source` whose every read is noted in `.tensors.read` and passes by `tap`."""
    weights = weights_of(tensors) if isinstance(tensors, dict) else tensors
    return dataclasses.replace(weights, tensors=Tapped(weights.tensors, tap))


def flipped(tensor):
    """A copy of a tensor with one bit wrong."""
    copy = tensor.clone()
    copy.view(-1).view(torch.uint8)[-1] ^= 1
    return copy


def failing_after(reads, error="injected failure"):
    def tap(index, count):
        if count >= reads:
            raise RuntimeError(error)

    return tap


class FaultyDevice(CpuDevice):
    """A CPU on whose process groups every message passes by `fault` before gloo gets it.

    `fault(message)` gets a `Message` and returns what has to be waited for, usually
    `message.go()`. Groups that are formed while `fault` is None have nothing wrong with them.
    """

    def __init__(self, fault=None):
        self.fault = fault

    def create_group(self, *arguments):
        group = super().create_group(*arguments)
        return group if self.fault is None else _FaultyGroup(group, self.fault)


class Message:
    """One message that is about to be sent or received.

    `number` counts the session's messages from 0, and `before` is the memory of the one before.
    """

    def __init__(self, start, number, memory, before, more):
        self._start = start
        self._more = more
        self.number = number
        self.memory = memory
        self.before = before

    def go(self, memory=None):
        """Start it, perhaps with other memory than was meant."""
        return self._start([self.memory if memory is None else memory])

    def go_too(self):
        """Start it once more than is waited for."""
        self._more.append(self.go())


class _FaultyGroup:
    def __init__(self, group, fault):
        self._group = group
        self._fault = fault
        self._count = 0
        self._before = None
        self._more = []  # gloo fails an operation that nobody refers to

    def send(self, messages, peer, tag):
        return self._start(lambda memory: self._group.send(memory, peer, tag), messages[0])

    def recv(self, messages, peer, tag):
        return self._start(lambda memory: self._group.recv(memory, peer, tag), messages[0])

    def abort(self):
        self._more.clear()
        self._group.abort()

    def _start(self, start, memory):
        if len(memory) == 1:
            return start([memory])  # the trailer of a message, whose content says nothing
        message = Message(start, self._count, memory, self._before, self._more)
        self._count += 1
        self._before = memory
        return self._fault(message)


class Last(bytes):
    """For a `Proxy`: bytes after which the connection is cut."""


class Proxy:
    """Stands between a client and a source on the control connection, line by line.

    `to_client` and `to_source` get each line without its newline, parsed, and return what goes on
    instead: an object, raw bytes (`Last` ones perhaps), or None to cut the connection. They may
    also block.
    """

    def __init__(self, address, to_client=lambda m: m, to_source=lambda m: m):
        self._behind = address
        self._ways = to_client, to_source
        self._listener = socket.create_server((HOST, 0))
        self.address = Address(HOST, self._listener.getsockname()[1])
        self._sockets = [self._listener]
        self._threads = []

    def __enter__(self):
        self._go(self._accept)
        return self

    def __exit__(self, *_):
        # More sockets and threads may come while these are closed.
        for sock in self._sockets:
            _cut(sock)
        for thread in self._threads:
            thread.join(PATIENCE)

    def _go(self, work, *args):
        thread = threading.Thread(target=work, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self):
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._sockets.append(client)
            try:
                behind = socket.create_connection((self._behind.host, self._behind.port))
            except OSError:
                _cut(client)
                continue
            self._sockets.append(behind)
            self._go(self._pump, behind, client, self._ways[0])
            self._go(self._pump, client, behind, self._ways[1])

    def _pump(self, read, write, change):
        try:
            with read.makefile("rb") as lines:
                for line in lines:
                    message = change(json.loads(line))
                    if message is None:
                        break
                    if not isinstance(message, bytes):
                        message = line_of(message)
                    write.sendall(message)
                    if isinstance(message, Last):
                        break
        except (OSError, ValueError):
            pass  # one end has gone
        finally:
            _cut(read)
            _cut(write)


def _cut(sock):
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()


def line_of(message):
    return json.dumps(message).encode() + b"\n"


def cut_at(count):
    """For a `Proxy`: cut the connection once so many bytes have gone this way."""
    left = count

    def way(message):
        nonlocal left
        line = line_of(message)
        part, left = line[: max(left, 0)], left - len(line)
        return line if left > 0 else Last(part)

    return way


def changing(label, change):
    """For a `Proxy`: change the content of messages of one label, in place or by returning it."""

    def way(message):
        if message["label"] == label:
            changed = change(message["content"])
            if changed is not None:
                message["content"] = changed
        return message

    return way


# Processes


def python(*arguments, **options):
    """Start a Python process that sees the same code as this one."""
    folders = [str(Path(vllm_ascend.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, folders))}
    environment |= options.pop("env", {})
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        **options,
    )


@dataclasses.dataclass
class Peer:
    address: Address
    process: subprocess.Popen

    def send_signal(self, number):
        os.kill(self.process.pid, number)


@contextlib.contextmanager
def source_process(seed, *, signal_after=None, number=signal.SIGKILL):
    """A source of `rows(seed=seed)` in a process of its own.

    It sends itself signal `number` when it is about to send its `signal_after`th chunk.
    """
    script = Path(__file__).with_name("peer_process.py")
    after = -1 if signal_after is None else signal_after
    process = python(script, "source", seed, after, int(number))
    try:
        port = process.stdout.readline()
        assert port, "the process ended before it listened"
        yield Peer(Address(HOST, int(port)), process)
    finally:
        end(process)


@contextlib.contextmanager
def client_process(address):
    """A client in a process of its own that loads `rows()` from a source."""
    process = python(Path(__file__).with_name("peer_process.py"), "client", address.port)
    try:
        yield process
    finally:
        end(process)


def end(process):
    process.kill()
    process.wait(PATIENCE)
    process.stdout.close()


# Sockets


def dial(address, timeout=PATIENCE):
    return socket.create_connection((address.host, address.port), timeout)


def closed_port():
    """An address of this machine at which nobody listens."""
    with socket.create_server((HOST, 0)) as listener:
        return Address(HOST, listener.getsockname()[1])


@contextlib.contextmanager
def tcp_pair():
    """A `Connection` and the socket at its other end."""
    with socket.create_server((HOST, 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    connection = Connection(near)
    try:
        yield connection, far
    finally:
        connection.close()
        far.close()


class Channel:
    """One end of a control connection, for building a process group."""

    def __init__(self, sock):
        self._connection = Connection(sock)
        self.close = self._connection.close

    def tell(self, key, value):
        self._connection.send(StoreSet(key, value), PATIENCE)

    def hear(self, timeout):
        message = self._connection.receive_reply(timeout)
        return message.key, message.value


@contextlib.contextmanager
def channels():
    """Both ends of a control connection."""
    with socket.create_server((HOST, 0)) as listener:
        near = Channel(socket.create_connection(listener.getsockname()))
        far = Channel(listener.accept()[0])
    try:
        yield near, far
    finally:
        near.close()
        far.close()


def until(condition, patience=PATIENCE):
    """Wait until a condition holds; return whether it did in time."""
    deadline = time.monotonic() + patience
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True
