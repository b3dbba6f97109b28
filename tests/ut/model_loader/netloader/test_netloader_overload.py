"""Readers that are killed, and connections that are held: whoever comes next gets in."""

import contextlib
import functools
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time

import msgspec
import psutil
import pytest

from tests.certificates import SECRET, secret_file
from vllm_ascend.model_loader.netloader.credentials import Credentials, Files
from vllm_ascend.model_loader.netloader.errors import SourceBusy, SourceError
from vllm_ascend.model_loader.netloader.interaction import server
from vllm_ascend.model_loader.netloader.interaction.api import Join

from .support import end, python
from .test_netloader_api import IDENTITY
from .test_netloader_http import BLOCK, CONTENT, DIGEST, HOST, read, running, until
from .test_netloader_tls import dial

READERS, SILENT = 100, 1000

# Forks a process for each line, which begins to read and says who it is.
_READ = """
import os, signal, sys
import msgspec
from vllm_ascend.model_loader.netloader.credentials import Credentials, Files
from vllm_ascend.model_loader.netloader.errors import SourceBusy
from vllm_ascend.model_loader.netloader.interaction.api import Join
from vllm_ascend.model_loader.netloader.interaction.client import ElasticClient
from vllm_ascend.model_loader.netloader.utils import Address
port, secret, join, weights = sys.argv[1:]
address, join = Address("127.0.0.1", int(port)), msgspec.json.decode(join, type=Join)
seconds = dict.fromkeys(("connect", "handshake", "progress"), 20)
credentials = Credentials(Files(secret_file=secret)) if secret else None
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for _ in sys.stdin:
    if os.fork():
        continue
    signal.alarm(60)
    client = ElasticClient.connect(address, credentials=credentials, **seconds)
    while True:
        try:
            client.join(join)
            break
        except SourceBusy:
            pass
    client.ask_blocks(weights, 0, 4999)
    assert client._wire._sock.recv(1 << 16)
    print(os.getpid(), flush=True)
    signal.pause()
"""


@pytest.fixture(params=["plain", "tls"])
def secret(request, tmp_path):
    return secret_file(tmp_path, SECRET) if request.param == "tls" else ""


@pytest.fixture
def credentials(secret):
    return Credentials(Files(secret_file=secret)) if secret else None


@contextlib.contextmanager
def readers(port, secret):
    """Gives what starts a process that has begun to read, and returns its number."""
    join = msgspec.json.encode(Join(IDENTITY)).decode()
    process = python("-c", _READ, port, secret, join, DIGEST, stdin=subprocess.PIPE)

    def start():
        process.stdin.write("\n")
        process.stdin.flush()
        return int(process.stdout.readline())

    try:
        yield start
    finally:
        process.stdin.close()
        end(process)


def joined_in_turn(client):
    """Join as soon as there is a place; returns after how many seconds."""
    began = time.monotonic()
    while True:
        try:
            client.join(Join(IDENTITY))
            return time.monotonic() - began
        except SourceBusy:
            assert time.monotonic() - began < 20


def test_after_readers_that_are_killed_the_next_one_joins_at_once(secret, credentials):
    me = psutil.Process()
    with (
        running(credentials=credentials, max_sessions=1) as source,
        readers(source.port, secret) as start,
    ):
        os.kill(start(), signal.SIGKILL)
        assert until(lambda: not source.server.sessions)
        before = threading.active_count(), me.num_fds()
        seconds = []
        for _ in range(READERS):
            with dial(source, credentials) as client:
                os.kill(start(), signal.SIGKILL)
                seconds.append(joined_in_turn(client))
        assert until(lambda: not source.server._waiting and not source.server.sessions)
        assert until(lambda: threading.active_count() <= before[0] and me.num_fds() <= before[1]), (
            before,
            threading.active_count(),
            me.num_fds(),
        )
    assert statistics.median(seconds) < 0.05, sorted(seconds)  # one may be late on a busy machine


# Holds connections that say nothing, and dials again where one is cut.
_HOLD = """
import resource, selectors, socket, sys, time
port, count = map(int, sys.argv[1:])
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
held = selectors.DefaultSelector()
def dial():
    held.register(socket.create_connection(("127.0.0.1", port)), selectors.EVENT_READ)
for number in range(count):
    dial()
    time.sleep(0.001)  # of more than 128 at once the kernel drops some, for seconds
print("held", flush=True)
while True:
    for key, _ in held.select():
        held.unregister(key.fileobj)
        key.fileobj.close()
        dial()
"""


@contextlib.contextmanager
def silent(port):
    """A process that holds SILENT connections, whatever happens to them."""
    command = [sys.executable, "-c", _HOLD, str(port), str(SILENT)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline() == b"held\n"
            yield
        finally:
            process.kill()


def gets_in(source, credentials):
    """Whether a client gets what it asks for; one that is cut before it asked is not the end."""
    try:
        with dial(source, credentials) as client:
            client.join(Join(IDENTITY))
            return read(client, 3, 5) == CONTENT[3 * BLOCK : 6 * BLOCK]
    except SourceError:
        return False


def test_a_thousand_silent_connections_keep_nobody_out(credentials, monkeypatch):
    connect = socket.create_connection
    with running(credentials=credentials) as source, silent(source.port):
        before = threading.active_count()
        for host in (HOST, "127.0.0.2"):  # theirs, and another one
            dialled = functools.partial(connect, source_address=(host, 0))
            monkeypatch.setattr(socket, "create_connection", dialled)
            for _ in range(3):
                assert until(lambda: gets_in(source, credentials))
        assert len(source.server._waiting) <= server.MAX_CONNECTIONS
        assert threading.active_count() <= before + server.MAX_CONNECTIONS
    assert until(lambda: not source.server._waiting)
