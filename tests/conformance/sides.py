"""Sources and clients of real loads, whatever the way.

A source is in this process, so that a test can see into it. A client is in this process where that
is possible, and else in one of its own. Whoever is to be killed is in one of its own as well.
"""

import contextlib
import dataclasses
import functools
import gc
import logging
import multiprocessing
import os
import signal
import threading
import time
import traceback
from multiprocessing import forkserver
from pathlib import Path

import torch

from tests.identity import identity as identity_of_all
from vllm_ascend.model_loader.netloader.config import NetLoaderConfig
from vllm_ascend.model_loader.netloader.errors import LoadFailed
from vllm_ascend.model_loader.netloader.executor.store import BlockStore, make_store
from vllm_ascend.model_loader.netloader.interaction.discovery import NOBODY
from vllm_ascend.model_loader.netloader.load import elastic_load
from vllm_ascend.model_loader.netloader.serve import Offer, WeightServer
from vllm_ascend.model_loader.netloader.utils import Address, logger

from . import ways
from .models import Maker, rows

HOST = "127.0.0.1"
# How long anything may take that is to happen; only a defect takes this long.
PATIENCE = 30.0
CLIENT_INDEX = 1  # of the device that clients have in their process


def identity(way, **changes):
    return identity_of_all(**{"layout": way.device().layout} | changes)


def settings(way, **changes):
    soon = 10.0 if way.on_npu else 5.0  # where many processes share few cores, groups take seconds
    usual = {
        "source": {},
        "listen_host": HOST,
        "transport": way.transport,
        "chunk_mib": 1,
        "source_wait": 0.0,
        "connect_timeout": soon,
        "handshake_timeout": soon,
        "progress_timeout": soon,
    }
    return NetLoaderConfig(**usual | changes)


def until(condition, patience=PATIENCE):
    """Wait for a condition and return after how many seconds it held."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < patience, "it did not happen"
        time.sleep(0.005)
    return time.monotonic() - started


# Tensors


def make(way, model, seed, index=None):
    return model(Maker(way, seed, index))


@functools.cache
def expected(way, model, seed, index=None):
    """The same, for those who do not change it."""
    return make(way, model, seed, index)


@functools.cache
def store_of(way, model, seed=0):
    """A model as a source offers it, on this process's device."""
    device = way.device()
    return make_store(expected(way, model, seed), device.layout, {}, device)


def plain_bytes(way, tensor):
    """The bytes of a tensor's elements in row-major order, on the host."""
    device = way.device(tensor.device.index) if tensor.device.type == "npu" else None
    tensor = (device.to_nd(tensor) if device else tensor).detach().cpu().contiguous()
    # a contiguous tensor of one element may have any stride
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def _kind(way, tensor):
    # of those without elements, strides say nothing
    stride = None if tensor.numel() < 2 else tensor.stride()
    device = way.device(tensor.device.index) if tensor.device.type == "npu" else None
    form = device.formats({"": tensor}) if device else None
    return tensor.dtype, tensor.shape, stride, tensor.device, form


def differing(way, got, wanted):
    """Names of the tensors that are not the same in kind or bytes."""
    assert got.keys() == wanted.keys(), got.keys() ^ wanted.keys()
    return [
        name
        for name in got
        if _kind(way, got[name]) != _kind(way, wanted[name])
        or not torch.equal(plain_bytes(way, got[name]), plain_bytes(way, wanted[name]))
    ]


# Sources


@dataclasses.dataclass
class Source:
    address: Address
    server: WeightServer
    store: BlockStore | None

    @property
    def sessions(self):
        return self.server._server.sessions

    @property
    def status(self):
        return self.server.status(self.sessions)

    def offer(self, way, store):
        self.server.offer(Offer(identity(way), store))


@contextlib.contextmanager
def source(way, store=rows, seed=0, *, who=None, reason="", port=0, **config):
    """A running source of a model or of a `BlockStore`; None: it cannot be one, for a reason."""
    if callable(store):
        store = fresh(store_of(way, store, seed))
    server = WeightServer(settings(way, **config), 0, HOST)
    address = server.start(port)
    try:
        server.offer(Offer(who or identity(way), store, reason))
        yield Source(address, server, store)
    finally:
        server.stop()


def fresh(store):
    """The same weights, which can be withdrawn without those of other tests being."""
    return store.with_tensors(store.tensors)


# Clients


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a load went.

    `reasons` is empty if it brought the weights, `wrong` are the tensors that are not as expected,
    `tied` names tensors that share their memory.
    """

    reasons: str
    wrong: list[str]
    seconds: float
    digest: str = ""
    gave: str = ""
    attributes: dict = dataclasses.field(default_factory=dict)
    log: tuple[str, ...] = ()

    def check(self):
        """All weights are right."""
        assert self.reasons == "", self.reasons
        assert self.wrong == [], self.wrong
        return self

    def check_failed(self, *words):
        assert self.reasons, "it loaded"
        assert self.reasons.isprintable(), self.reasons
        for word in words:
            assert word in self.reasons, self.reasons
        return self

    def check_right_or_failed(self):
        """There is no third."""
        return self.check_failed() if self.reasons else self.check()

    def said(self, words):
        return any(words in line for line in self.log)


class _Lines(logging.Handler):
    def __init__(self):
        super().__init__(logging.DEBUG)
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


@contextlib.contextmanager
def log_lines():
    handler, level = _Lines(), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield handler.lines
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)


def addresses_of(sources):
    """Of sources, proxies, and addresses."""
    return [getattr(one, "address", one) for one in sources]


def load_here(
    way,
    sources,
    model=rows,
    seed=0,
    *,
    into=None,
    required=None,
    who=None,
    device=None,
    own=NOBODY,
    **config,
):
    """Load in this process into tensors that have other values, and compare them."""
    tensors, wanted = make(way, into or model, seed + 1000), expected(way, model, seed)
    names = set(tensors) if required is None else required
    loaded, reasons = None, ""
    with log_lines() as lines:
        started = time.monotonic()
        try:
            loaded = elastic_load(
                tensors,
                names,
                addresses_of(sources),
                who or identity(way),
                settings(way, **config),
                device or way.device(),
                own=own,
            )
        except LoadFailed as error:
            reasons = str(error) or "no reason"
        seconds = time.monotonic() - started
    outcome = Outcome(
        reasons,
        differing(way, tensors, wanted) if tensors.keys() == wanted.keys() else ["all"],
        seconds,
        log=tuple(lines),
    )
    if loaded is None:
        return outcome
    return dataclasses.replace(
        outcome,
        digest=loaded.store.digests.weights,
        gave=loaded.sources,
        attributes=loaded.store.manifest.attributes,
    )


def load(way, sources, *arguments, **options):
    """Load in this process if that is possible, else in another one."""
    if not way.on_npu:
        return load_here(way, sources, *arguments, **options)
    return client_process(way).call(load_here, way, addresses_of(sources), *arguments, **options)


@contextlib.contextmanager
def loading(way, sources, *arguments, **options):
    """Load while the test does something else; yields what returns the outcome."""
    addresses = addresses_of(sources)
    if way.on_npu:
        client = client_process(way)
        client.start(load_here, way, addresses, *arguments, **options)
        yield client.result
        return
    ended = []
    thread = threading.Thread(
        target=lambda: ended.append(load_here(way, addresses, *arguments, **options)), daemon=True
    )
    thread.start()

    def result(patience=PATIENCE):
        thread.join(patience)
        assert ended, "the load goes on after its deadlines"
        return ended[0]

    yield result
    thread.join(PATIENCE)


# Processes


class Process:
    """A process with a device, which calls functions of modules, one after the other."""

    _context = multiprocessing.get_context("forkserver")

    def __init__(self, index=0, **environment):
        forkserver.set_forkserver_preload([__name__])
        self._orders, theirs = self._context.Pipe()
        self.index = index
        self.process = self._context.Process(
            target=_obey, args=(theirs, index, environment), daemon=True
        )
        self.process.start()
        theirs.close()
        self.pid = self.process.pid
        self.busy = False

    def start(self, function, *arguments, **options):
        assert not self.busy
        self.busy = True
        self._orders.send((function, arguments, options))

    def ready(self, patience):
        return self._orders.poll(patience)

    def result(self, patience=PATIENCE):
        assert self.ready(patience), f"process {self.pid} does not answer"
        error, value = self._orders.recv()
        self.busy = False
        assert error is None, error
        return value

    def call(self, function, *arguments, **options):
        self.start(function, *arguments, **options)
        return self.result()

    def signal(self, number):
        os.kill(self.pid, number)

    def wait_until(self, number):
        """Wait until a signal has killed or stopped the process."""
        if number == signal.SIGKILL:
            self.process.join(PATIENCE)
            assert self.process.exitcode == -number
        else:
            stat = Path(f"/proc/{self.pid}/stat")
            until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T")

    @property
    def alive(self):
        return self.process.is_alive()

    def end(self):
        self.process.kill()
        self.process.join(PATIENCE)
        self._orders.close()


def _obey(orders, index, environment):
    gc.freeze()  # what was imported stays, and is much to look through for garbage each time
    os.environ.update(environment)
    torch.set_num_threads(1)
    ways.INDEX = index
    from . import models

    models.INDEX = index
    while True:
        try:
            function, arguments, options = orders.recv()
        except EOFError:
            return
        try:
            answer = None, function(*arguments, **options)
        except BaseException:
            answer = traceback.format_exc(), None
        orders.send(answer)


_clients: list[Process] = []


def client_process(way):
    """A process for a client: one that has nothing to do, or a new one."""
    for process in [*_clients]:
        if not process.alive:
            _clients.remove(process)
    for process in _clients:
        if not process.busy:
            return process
    _clients.append(Process(CLIENT_INDEX))
    return _clients[-1]


def end_clients():
    while _clients:
        _clients.pop().end()


# What a process has: its source.
here: dict[str, Source] = {}


def serve(way, model=rows, seed=0, **config):
    """Be a source in this process from now on; returns its address."""
    running = contextlib.ExitStack()
    here["source"] = running.enter_context(source(way, model, seed, **config))
    here["stop"] = running
    return here["source"].address


def wait_for_no_sessions(patience=PATIENCE):
    """Return after how many seconds the last client of this process's source had left."""
    return until(lambda: here["source"].sessions == 0, patience)
