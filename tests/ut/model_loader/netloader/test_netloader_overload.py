"""Readers that are killed, and connections that are held: whoever comes next gets in."""

import contextlib
import functools
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time

import psutil
import pytest

from tests.certificates import SECRET, secret_file
from vllm_ascend.model_loader.netloader.credentials import Credentials, Files
from vllm_ascend.model_loader.netloader.errors import SourceBusy, SourceError
from vllm_ascend.model_loader.netloader.interaction import server
from vllm_ascend.model_loader.netloader.interaction.api import Join

from .test_netloader_api import IDENTITY
from .test_netloader_http import BLOCK, CONTENT, DIGEST, HOST, read, running, until
from .test_netloader_tls import dial

READERS, SILENT = 100, 1000
RESET = struct.pack("ii", 1, 0)  # closing sends what a killed process's machine sends


@pytest.fixture(params=["plain", "tls"])
def credentials(request, tmp_path):
    return Credentials(Files(secret_file=secret_file(tmp_path, SECRET))) if request.param == "tls" else None


def killed_reader(source, credentials):
    """Begin to read, and end as a process that is killed does."""
    client = dial(source, credentials)
    joined_in_turn(client)
    client.ask_blocks(DIGEST, 0, 4999)
    sock = client._wire._sock
    assert sock.recv(1 << 16)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    sock.close()


def joined_in_turn(client):
    """Join as soon as there is a place; returns after how many seconds."""
    began = time.monotonic()
    while True:
        try:
            client.join(Join(IDENTITY))
            return time.monotonic() - began
        except SourceBusy:
            assert time.monotonic() - began < 20


def test_after_readers_that_are_killed_the_next_one_joins_at_once(credentials):
    me = psutil.Process()
    with running(credentials=credentials, max_sessions=1) as source:
        killed_reader(source, credentials)
        assert until(lambda: not source.server.sessions)
        before = threading.active_count(), me.num_fds()
        seconds = []
        for _ in range(READERS):
            with dial(source, credentials) as client:
                killed_reader(source, credentials)
                seconds.append(joined_in_turn(client))
        assert until(lambda: not source.server._waiting and not source.server.sessions)
        assert until(lambda: threading.active_count() <= before[0] and me.num_fds() <= before[1]), (
            before,
            threading.active_count(),
            me.num_fds(),
        )
    assert min(seconds) < 0.05, sorted(seconds)[:5]
    assert statistics.median(seconds) < 1, seconds


# Holds connections that say nothing, and dials again where one is cut.
_HOLD = """
import resource, selectors, socket, sys
port, count = map(int, sys.argv[1:])
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
held = selectors.DefaultSelector()
def dial():
    held.register(socket.create_connection(("127.0.0.1", port)), selectors.EVENT_READ)
for number in range(count):
    dial()
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
