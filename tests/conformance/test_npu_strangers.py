"""Strangers at the ports that HCCL opens while a group is formed.

HCCL is simulated: this shows what torch_npu and NetLoader make of its failures, nothing of CANN.
"""

import contextlib
import os
import random
import socket
import struct
import threading
import urllib.request

import psutil
import pytest

from vllm_ascend.model_loader.netloader.loading import sessions

from .models import rows
from .sides import HOST, PATIENCE, load_here, serve, wait_for_no_sessions
from .test_npu import QUICK, rest
from .ways import Way

WAY = Way.HCCL
pytestmark = pytest.mark.ways(WAY)
# Shorter than HCCL_CONNECT_TIMEOUT, 20 s here.
LONGEST = QUICK["handshake_timeout"] + QUICK["progress_timeout"] + 8.0


def random_bytes(sock, chance, server):
    sock.sendall(chance.randbytes(chance.choice([1, 4, 12, 13, 100_000])))
    sock.close()


def truncated(sock, chance, server):
    sock.sendall(_endpoint(chance.randrange(3), chance.randrange(1 << 16))[: chance.randrange(12)])
    sock.close()


def half_open(sock, chance, server):
    sock.sendall(chance.randbytes(chance.randrange(4)))
    sock.shutdown(socket.SHUT_WR)


def silent(sock, chance, server):
    pass


def reset(sock, chance, server):
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def impostor(sock, chance, server):
    """Be the source for HCCL, which knows nobody by more than a number, and then send anything."""

    def play():
        with contextlib.suppress(OSError, struct.error):
            sock.sendall(_endpoint(1, server.getsockname()[1]))
            _, _, port = struct.unpack("<I4sH2x", sock.recv(24, socket.MSG_WAITALL)[:12])
            with socket.create_connection((HOST, port), PATIENCE) as link:
                link.sendall(struct.pack("<I", 1) + chance.randbytes(1 << 16))
                server.accept()[0].close()

    threading.Thread(target=play, daemon=True).start()


KINDS = [random_bytes, truncated, half_open, silent, reset, impostor]


def _endpoint(rank, port):
    """What a rank of the simulated HCCL tells the others of itself."""
    return struct.pack("<I4sH2x", rank, socket.inet_aton(HOST), port)


class Strangers:
    """Connect to each port that a process opens from now on; `hit` has those of each process."""

    def __init__(self, first, seed, *pids):
        self._chance = random.Random(seed)
        self._first = first
        self._processes = [psutil.Process(pid) for pid in pids]
        self._lock = threading.Lock()
        self._server = socket.create_server((HOST, 0))
        self._server.settimeout(PATIENCE)
        self._known = self._listening()
        self._sockets = [self._server]
        self._over = threading.Event()
        self.hit = [0 for _ in pids]

    def __enter__(self):
        threading.Thread(target=self._look, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._over.set()
        with self._lock:
            for sock in self._sockets:
                sock.close()

    def visit(self):
        """Connect to all ports that are new, several times."""
        with self._lock:
            new = self._listening() - self._known
            self._known |= new
            for process, port in new:
                self.hit[process] += 1
                for kind in [self._first, *self._chance.choices(KINDS, k=4)]:
                    with contextlib.suppress(OSError):  # nobody listens any more
                        sock = socket.create_connection((HOST, port), 1.0)
                        self._sockets.append(sock)
                        kind(sock, self._chance, self._server)

    def _listening(self):
        return {
            (number, connection.laddr.port)
            for number, process in enumerate(self._processes)
            for connection in process.net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN
        }

    def _look(self):
        while not self._over.wait(0.001):
            self.visit()


def load_among_strangers(address, source_pid, first, seed):
    """Load while they come; the first one before the source knows where HCCL listens here."""
    form_group = sessions.form_group
    with Strangers(first, seed, os.getpid(), source_pid) as strangers:

        def form(accelerator, tell, *others, **options):
            def told(key, value):
                strangers.visit()
                return tell(key, value)

            return form_group(accelerator, told, *others, **options)

        sessions.form_group = form
        try:
            outcome = load_here(WAY, [address], rows, **QUICK)
        finally:
            sessions.form_group = form_group
    return outcome, strangers.hit


def test_strangers_at_hccls_ports_end_no_process_and_spoil_no_byte(way, started):
    source, client = started(0), started(1)
    address = source.call(serve, WAY)
    at_source = 0
    for seed, first in enumerate(KINDS):
        outcome, (here, there) = client.call(load_among_strangers, address, source.pid, first, seed)
        outcome.check_right_or_failed()
        assert outcome.seconds < LONGEST, first.__name__
        assert here, f"{first.__name__}: no port of HCCL was found"
        at_source += there
        health = urllib.request.urlopen(f"http://{address}/healthz", timeout=PATIENCE)
        assert health.read() == b"ok\n"
    assert at_source
    patient = {"handshake_timeout": 12.0, "progress_timeout": 12.0}
    outcome = client.call(load_here, WAY, [address], rows, **patient).check()
    assert not outcome.said("over HTTP"), outcome.log
    source.call(wait_for_no_sessions)
    for process in (source, client):
        process.call(rest, 0)
