"""Sources to fuzz, each in a process of its own, which is measured and listened to."""

import contextlib
import ctypes
import dataclasses
import gc
import logging
import multiprocessing
import os
import socket
import ssl
import tempfile
import threading
import time
from pathlib import Path

from tests.certificates import SECRET, Authority, secret_file

from .mutations import Late

HOST = "127.0.0.1"
SECONDS = 10.0  # for any answer; the source's own deadlines are later, so that none hides a stall
PLAIN, WITH_SECRET, WITH_CERTIFICATES = "plain", "secret", "certificates"
FILE = b'{"hidden_size": 4}\n'
# Sizes of the tensors, each of which is one block.
SIZES = [0, 1, 7, *range(300, 2700, 60)]
_MOST_GROWTH = 24  # MiB, of a process that does the same again and again
_PATIENCE = 60.0


def content():
    """The bytes of each block."""
    return [bytes((i * 31 + at * 7) % 251 for at in range(size)) for i, size in enumerate(SIZES)]


@dataclasses.dataclass(frozen=True)
class Target:
    """Where a source listens, and which weights it has."""

    kind: str
    port: int
    weights: str
    folder: str  # of secrets and certificates


@dataclasses.dataclass(frozen=True)
class Usage:
    threads: int
    descriptors: int
    megabytes: float


class SourceProcess:
    """A source; ends with the process."""

    def __init__(self, kind, folder):
        context = multiprocessing.get_context("spawn")
        self._orders, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, kind, folder), daemon=True)
        self._process.start()
        theirs.close()
        self.kind = kind
        self.target = Target(kind, *self._orders.recv(), folder)

    @property
    def alive(self):
        return self._process.is_alive()

    def usage(self):
        """What the process takes, less what its allocator keeps although nothing uses it."""
        self._orders.send("tidy up")
        self._orders.recv()
        pid = self._process.pid
        status = Path(f"/proc/{pid}/status").read_text()
        said = dict(line.split(":", 1) for line in status.splitlines())
        descriptors = len(os.listdir(f"/proc/{pid}/fd"))
        return Usage(int(said["Threads"]), descriptors, int(said["VmRSS"].split()[0]) / 1024)

    def faults_since(self, before):
        """What a source has got wrong that all clients have left; ends it."""
        if not self.alive:
            return [f"the source ({self.kind}) has ended, with {self._process.exitcode}"]
        deadline = time.monotonic() + _PATIENCE
        while True:
            now = self.usage()
            kept = now.threads > before.threads or now.descriptors > before.descriptors
            if not kept or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        faults = []
        if kept or now.megabytes > before.megabytes + _MOST_GROWTH:
            faults.append(f"the source ({self.kind}) has grown from {before} to {now}")
        self._orders.send("end")
        faults += [f"the source ({self.kind}) said: {line}" for line in self._orders.recv()]
        self._process.join(_PATIENCE)
        return faults

    def close(self):
        self._process.kill()
        self._process.join()


class _Errors(logging.Handler):
    def __init__(self):
        super().__init__(logging.ERROR)
        self.lines = []

    def emit(self, record):
        if len(self.lines) < 20:
            self.lines.append(self.format(record))


def files(kind, folder):
    """What the configuration of a source or a peer says about who gets in."""
    folder = Path(folder)
    if kind == WITH_SECRET:
        return {"secret_file": secret_file(folder, SECRET)}
    if kind == PLAIN:
        return {}
    authority = Authority(folder)
    authority.files(who="expired", days=-1)
    return authority.files(who="source")


def dial(port):
    """A connection to a source."""
    deadline = time.monotonic() + SECONDS
    while True:
        try:
            return socket.create_connection((HOST, port), timeout=SECONDS)
        except OSError as error:
            # Of connections in a row, the system keeps the ports of the last ones for a while.
            if time.monotonic() > deadline:
                raise Late(f"cannot connect: {error}") from None
            time.sleep(0.05)


def tls_client(given=None, key=None):
    """TLS by somebody with these files, or with what belongs to a secret, who checks nobody."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if isinstance(given, str):
        context.load_cert_chain(given, key)
    elif given is not None:
        with tempfile.NamedTemporaryFile() as file:
            file.write(given.key + given.certificate)
            file.flush()
            context.load_cert_chain(file.name)
    return context


def _serve(orders, kind, folder):
    import torch

    from tests.conformance import sides
    from tests.conformance.ways import Way
    from vllm_ascend.model_loader.netloader import served
    from vllm_ascend.model_loader.netloader.executor.store import make_store
    from vllm_ascend.model_loader.netloader.interaction import api
    from vllm_ascend.model_loader.netloader.serve import Offer, WeightServer
    from vllm_ascend.model_loader.netloader.utils import logger

    def no_group(group):
        group._formed.set_exception(RuntimeError("no groups are formed here"))

    torch.set_num_threads(1)
    served.ServedGroup._form = no_group  # all else of a group is as it is
    api.MAX_EXCHANGE_SECONDS = 0.005
    errors = _Errors()
    logger.addHandler(errors)
    threading.excepthook = lambda said: errors.lines.append(f"a thread ended: {said.exc_value!r}")
    made = [torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else
            torch.empty(0, dtype=torch.uint8) for data in content()]  # fmt: skip
    tensors = {f"t{i:03}": tensor for i, tensor in enumerate(made)}
    device = Way.STREAM.device()
    store = make_store(tensors, device.layout, {}, device)
    model = Path(folder) / f"model of {kind}"
    model.mkdir()
    (model / "config.json").write_bytes(FILE)
    deadlines = {"handshake_timeout": 6 * SECONDS, "progress_timeout": 6 * SECONDS}
    config = sides.settings(Way.STREAM, max_sessions=64, **deadlines, **files(kind, folder))
    server = WeightServer(config, 0, HOST)
    port = server.start(0).port
    server.offer(Offer(sides.identity(Way.STREAM), store, folder=model))
    orders.send((port, store.digests.weights))
    with contextlib.suppress(EOFError):
        while orders.recv() != "end":
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)
            orders.send("tidy")
        orders.send(errors.lines)
    server.stop()
