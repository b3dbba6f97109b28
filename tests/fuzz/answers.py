"""What a hostile source may answer; the client gets what is right, or a `SourceError` in time."""

import contextlib
import resource
import socket
import tempfile
import threading
import time
from pathlib import Path

import msgspec

from tests.certificates import SECRET, secret_file
from tests.identity import IDENTITY
from vllm_ascend.model_loader.netloader.credentials import Credentials, Files
from vllm_ascend.model_loader.netloader.errors import SourceError
from vllm_ascend.model_loader.netloader.interaction import api
from vllm_ascend.model_loader.netloader.interaction.client import ElasticClient
from vllm_ascend.model_loader.netloader.utils import Address

from .mutations import Fault, Late, body, damaged_bytes
from .sources import HOST

DIGEST = "xxh3_128:" + "0" * 32
_BYTES = bytes(range(256)) * 3
_PEER = api.Peer("10.0.0.7:28000", "p")
_FILE = api.ModelFile("config.json", len(_BYTES), "0" * 64)
_RIGHT = {
    "join": api.Joined(
        DIGEST, 1, "i", peers=[_PEER], manifest=msgspec.Raw(b"{}"), blocks=bytes(32)
    ),
    "have": api.Have(7, [(0, 3), (9, 9)], False),
    "peers": api.Named([_PEER]),
    "status": api.Status("0.1.0", "i", 0, [], [], 4, 1, 7),
    "files": api.Files([_FILE]),
    "check": api.Noted(),
    "open": api.GroupOpened("0", 1 << 20),
    "tell": api.StoreValues([("key", b"value")]),
    "sizes": api.Sizes([4 << 20, None]),
}
_PROBLEMS = [api.Problem(code.text, "no", peers=[_PEER], weights=DIGEST) for code in api.Code]
_HEADS = [
    "Connection: close",
    "Transfer-Encoding: chunked",
    "Content-Length: 99999999999999999999",
    "Content-Length: 70000000",
    "Content-Length: -1",
    "Content-Length: x",
    "Content-Encoding: gzip",
    "Retry-After: 99999999999999999999",
    "Retry-After: x",
    "Server: \x1b[1m" + "s" * 3000,
    "X: " + "y" * 40_000,
    "nothing",
    " folded: 1",
]
_IN_TIME = 8.0  # seconds for what never stalls, on a machine that is busy
_DEADLINE = 0.2  # of a client whose source stalls
_MOST_MEMORY = 300  # MiB on top of what there was


class Answers:
    """A hostile source, and a client of it for every case."""

    def __init__(self, target):
        self._listener = socket.create_server((HOST, 0), backlog=128)
        self._address = Address(*self._listener.getsockname())
        secret = secret_file(Path(tempfile.mkdtemp(dir=target.folder)), SECRET)
        self._credentials = Credentials(Files(secret_file=secret))
        self._answers, self._stall = [], False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        self._before = _memory()

    def close(self):
        if not self._thread.is_alive():
            raise Fault("what answers has ended")
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        self._listener.close()
        if _memory() > self._before + _MOST_MEMORY:
            raise Fault(f"a client took {_memory() - self._before} MiB")

    def try_one(self, chance):
        """Ask something; returns whether the answer was taken."""
        asked = chance.choice([*_RIGHT, "file", "blocks", "words"])
        self._stall = chance.random() < 0.005
        self._over.clear()
        in_group = asked in ("tell", "sizes", "words")
        self._answers = [_answer(msgspec.json.encode(_RIGHT["open"]))] if in_group else []
        self._answers.append(self._made(chance, asked))
        seconds = _DEADLINE if self._stall else _IN_TIME / 2
        credentials = self._credentials if chance.random() < 0.1 else None
        started = time.monotonic()
        try:
            self._ask(asked, seconds, credentials)
            taken = True
        except SourceError as error:
            taken, said = False, str(error)
            if not said.startswith(f"{self._address}: ") or not said.isprintable():
                raise Fault(f"{asked}: {said[:500]!r} about {self._answers!r:.500}") from None
            if len(said) > 10_000:
                raise Fault(f"{asked}: {len(said)} characters") from None
        finally:
            self._over.set()
        if time.monotonic() - started > _IN_TIME:
            late = time.monotonic() - started
            raise Late(f"{asked}: {late:.1f} s for {self._answers!r:.500}")
        if taken and credentials is not None:
            raise Fault(f"{asked}: an answer without TLS was taken")
        return taken

    def _ask(self, asked, seconds, credentials):
        client = ElasticClient.connect(
            self._address,
            connect=_IN_TIME,
            handshake=seconds,
            progress=seconds,
            credentials=credentials,
        )
        with client:
            if asked == "join":
                client.join(api.Join(IDENTITY))
            elif asked == "have":
                client.have(DIGEST, 0, 0)
            elif asked == "peers":
                client.peers(DIGEST)
            elif asked == "status":
                client.status()
            elif asked == "files":
                client.files("netloader")
            elif asked == "check":
                client.check(DIGEST, 0, 1)
            elif asked == "file":
                client.file("netloader", _FILE)
            elif asked == "blocks":
                data = bytearray(len(_BYTES))
                client.ask_blocks(DIGEST, 0, 1)
                pieces = [[memoryview(data)[:100]], [memoryview(data)[100:]]]
                client.receive_blocks(len(data), pieces)
            else:
                group = client.open_group(DIGEST)
                if asked == "tell":
                    group.tell("key", b"value")
                    group.hear(0.5)
                elif asked == "sizes":
                    group.ask([(0, 3)])
                    group.answer()
                elif asked == "words":
                    group.ask([(0, 3)])
                    if (error := client.last_words()) is not None:
                        raise error

    def _made(self, chance, asked):
        """One answer, more or less."""
        kind = chance.randrange(12)
        if kind == 0:
            return chance.randbytes(chance.choice([0, 1, 100, 50_000]))
        status, right = 200, _BYTES
        if asked in _RIGHT:
            right = msgspec.to_builtins(msgspec.json.decode(msgspec.json.encode(_RIGHT[asked])))
        if kind < 4 or asked == "words":
            problem = chance.choice(_PROBLEMS)
            status = api.CODES[problem.code].status.value
            right = msgspec.to_builtins(problem)
        data = right if isinstance(right, bytes) else body(chance, right)
        if kind == 4:
            status = chance.choice([100, 101, 204, 206, 302, 304, 418, 503, 999])
        length = len(data) + (chance.choice([-1, 1, 10**6]) if chance.random() < 0.05 else 0)
        heads = chance.choices(_HEADS, k=chance.choice([0, 0, 0, 1, 3]))
        said = _answer(data, status, length, *heads)
        return damaged_bytes(chance, said) if kind > 9 else said

    def _serve(self):
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            with sock, contextlib.suppress(OSError):
                sock.settimeout(_IN_TIME)
                for answer in self._answers:
                    if not sock.recv(1 << 16):
                        break
                    if self._stall:
                        sock.sendall(answer[: len(answer) // 2])
                        self._over.wait(_IN_TIME)
                        break
                    sock.sendall(answer)


def _memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def _answer(data, status=200, length=None, *heads):
    lines = [f"HTTP/1.1 {status} X", "Server: NetLoader", "Content-Type: a/b"]
    lines += [f"Content-Length: {len(data) if length is None else length}", *heads, "", ""]
    return "\r\n".join(lines).encode("latin-1") + data
