"""Requests to a source, damaged in all their parts: over one connection as long as it lasts."""

import contextlib
import json
import re
import socket
import ssl

import msgspec

from tests.certificates import SECRET
from tests.identity import IDENTITY
from vllm_ascend.model_loader.netloader.credentials import derived_from
from vllm_ascend.model_loader.netloader.interaction import api

from .mutations import Fault, Late, body, damaged_bytes
from .sources import FILE, PLAIN, SECONDS, content, dial, tls_client

BYTES = "application/octet-stream"
_RUN = re.compile(rb"/blocks/([0-9]{1,20})-([0-9]{1,20})(?![0-9/])")
_SEND = re.compile(rb"^POST \S*/groups/[0-9]+/send")
_STATUSES = {(code.text, code.status) for code in api.Code}
_CONTENT = content()
_METHODS = ["GET", "POST", "HEAD", "PUT", "get", "X" * 20]
_LENGTH = "Content-Length: 2"
_HEADERS = [
    "Accept: */*",
    "Host: h:1",
    "Authorization: Bearer x",
    "Authorization: Basic \xff",
    "Connection: close",
    "Connection: keep-alive",
    "Connection: upgrade, close",
    _LENGTH,
    "Content-Length: -1",
    "Content-Length: 99999999999999999999",
    "Transfer-Encoding: chunked",
    "Transfer-Encoding: identity",
    "Expect: 100-continue",
    "Expect: 200-ok",
    "Upgrade: h2c",
    "Range: bytes=0-1",
    "nothing",
    ": nothing",
    " folded: 1",
    "A\x00: b",
    "Cookie: " + "c" * 3000,
    "X: " + "y" * 70_000,
]


def encoded(struct):
    """The JSON value of a struct."""
    return msgspec.to_builtins(struct)


class Requests:
    """Asks a source; each case is one or more requests."""

    def __init__(self, target):
        self._target = target
        self._context = None if target.kind == PLAIN else tls_client(derived_from(SECRET))
        self._sock = self._stream = None
        weights, last = target.weights, len(_CONTENT) - 1
        self._join = encoded(api.Join(self._identity(), None, api.Peer("10.0.0.7:1", "p")))
        self._runs = [f"0-{last}", "0-0", "3-9", "7-7", f"{last}-{last}", "5-3", f"0-{last + 1}"]
        self._weights = [weights] * 12 + [weights[:-1] + "0", "xxh3_128:" + "0" * 32, "x", ""]
        self._bodies = {
            api.JOIN: self._join,
            api.CHECK: {},
            api.GROUPS: encoded(api.OpenGroup(weights)),
            api.STORE: {"set": [["key", "dmFsdWU="]]},
            api.SEND: encoded(api.SendRuns([(0, 3), (9, 9)])),
            api.DONE: encoded(api.Done(False, "tired")),
        }
        # Blocks are what must not be mixed up.
        self._paths = [*api.METHODS] + [api.BLOCKS] * 8 + [api.JOIN] * 4 + [api.STORE, api.SEND] * 2

    def _identity(self):
        return msgspec.structs.replace(IDENTITY, layout="processed")

    def try_one(self, chance):
        """Ask once; returns whether something was answered with 200."""
        if chance.random() < 0.12:
            return self._raw(chance)
        method, path, data = self._request(chance)
        head = [f"{method} {path} HTTP/1.1"]
        plain = not data and method == "GET" and chance.random() < 0.5
        if plain:
            head.append("Host: h:1")
        else:
            head += chance.choices(_HEADERS, k=chance.choice([0, 0, 1, 1, 2, 5]))
            if data or method == "POST" or _LENGTH in head:
                head.insert(chance.randrange(1, len(head) + 1), f"Content-Length: {len(data)}")
        said = "\r\n".join([*head, "", ""]).encode("utf-8", "surrogatepass") + data
        return self._ask(method, said)

    def close(self):
        if self._sock is not None:
            self._stream.close()
            self._sock.close()
            self._sock = None

    def _request(self, chance):
        template = chance.choice(self._paths)
        path = template.format(
            group=chance.choice(["netloader"] * 8 + ["netloader_draft", "x" * 64]),
            digest=chance.choice(self._weights),
            first="{run}",
            last="",
            id=chance.choice([0, 0, 0, 1, 3, 77, 10**19]),
            name=chance.choice(["config.json"] * 3 + ["..", "model.safetensors", "a" * 128]),
            since=chance.choice([0, 1, 39, 10**19]),
            wait=chance.choice([0] * 50 + [1, 9999]),
        ).replace("{run}-", self._run(chance))
        if chance.random() < 0.15:
            path = damaged_bytes(chance, path.encode()).decode("latin-1")
            path = re.sub(r"[\r\n]", "", path)
        elif chance.random() < 0.05:
            path = chance.choice(["http://h", "//", "?x=", "/..", "/" * 5000, "\u0661"]) + path
        method = api.METHODS[template]
        if chance.random() < 0.05:
            method = chance.choice(_METHODS)
        data = b""
        if template in self._bodies:
            data = body(chance, self._bodies[template])
        elif chance.random() < 0.03:
            data = chance.randbytes(chance.choice([1, 100, 60_000, 70_000]))
        return method, path, data

    def _run(self, chance):
        if chance.random() < 0.7:
            return chance.choice(self._runs)
        first = chance.choice([0, 1, 5, chance.randrange(60), 2**63, 10**19])
        return f"{first}-{max(0, first + chance.choice([0, 0, 1, 8, -1]))}"

    def _raw(self, chance):
        """Send bytes that may be any number of requests, on a connection of their own."""
        said = b""
        for _ in range(chance.choice([1, 1, 2, 3])):
            method, path, data = self._request(chance)
            head = [f"{method} {path} HTTP/1.1", *chance.choices(_HEADERS[:8], k=2)]
            if method == "POST":
                head.append(f"Content-Length: {len(data)}")
            said += "\r\n".join([*head, "", ""]).encode("utf-8", "surrogatepass") + data
        said = damaged_bytes(chance, said) if chance.random() < 0.9 else chance.randbytes(200)
        with self._connected() as sock, sock.makefile("rb") as stream:
            try:
                sock.sendall(said)
                with contextlib.suppress(OSError):  # the source may have closed it already
                    socket.socket.shutdown(sock, socket.SHUT_WR)  # of TLS, without its farewell
                return self._answers(stream, said)
            except (ConnectionError, ssl.SSLError):  # it may end before all was sent
                return False
            except TimeoutError:
                raise Late(f"neither an answer nor an end: {said[:300]!r}") from None

    def _answers(self, stream, said):
        if b"HEAD " in said or b"head " in said:  # whose answers have no body
            return len(stream.read()) < 0
        good = False
        while line := stream.readline(1000):
            if line.startswith(b"{"):  # what the NetLoader in vLLM Ascend is told
                stream.read()
                return good
            status, _ = self._answer(stream, line, "", said)
            good |= status == 200
        return good

    def _ask(self, method, said):
        """Say something that is one request; it gets one answer."""
        try:
            return self._asked(method, said)
        except Exception:
            self.close()  # what is left of the answer is no answer to the next request
            raise

    def _asked(self, method, said):
        for again in (True, False):
            fresh = self._sock is None
            if fresh:
                self._sock = self._connected()
                self._stream = self._sock.makefile("rb")
            line = b""
            with contextlib.suppress(ConnectionError, ssl.SSLError):  # it may have answered before
                self._sock.sendall(said)
            try:
                line = self._stream.readline(1000)
                if line:
                    status, keep = self._answer(self._stream, line, method, said)
                    if not keep:
                        self._ends(said)
                    return status == 200
            except TimeoutError:
                raise Late(f"no answer within {SECONDS:g} s: {said[:300]!r}") from None
            except (ConnectionError, ssl.SSLError):
                pass
            self.close()
            # It may have been idle for too long, or what came before has ended it.
            if fresh or not again:
                break
        # One that a busy machine leaves silent for long is ended, too.
        raise Late(f"the connection ended without an answer: {said[:300]!r}")

    def _ends(self, said):
        """The source closes the connection, as it has announced."""
        with contextlib.suppress(OSError):  # it may be closed already
            socket.socket.shutdown(self._sock, socket.SHUT_WR)
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            line = self._stream.readline(1000)
            if line and _SEND.search(said):  # sending through the group has failed since
                status, keep = self._answer(self._stream, line, "", said)
                if status == 200 or keep:
                    raise Fault(f"a second answer that is not a last one: {said[:300]!r}")
                line = self._stream.readline(1000)
            # Where the first line is refused, HEAD is nothing that the source has read.
            if line and not said.startswith(b"HEAD"):
                raise Fault(f"something came after the last answer: {said[:300]!r}")
        self.close()

    def _answer(self, stream, line, method, said):
        """Read one answer; returns its status, and whether the connection goes on."""
        where = f": {said[:300]!r}"
        match = re.fullmatch(rb"HTTP/1\.1 ([0-9]{3}) [A-Za-z -]+\r\n", line)
        if match is None:
            raise Fault(f"the answer begins with {line[:100]!r}{where}")
        status, headers = int(match[1]), {}
        while (line := stream.readline(1000)) not in (b"\r\n", b""):
            name, _, text = line.decode("latin-1").rstrip("\r\n").partition(": ")
            headers[name] = text
        if status == 100:
            return self._answer(stream, stream.readline(1000), method, said)
        if headers.get("Server") != "NetLoader":
            raise Fault(f"the answer has the headers {headers}{where}")
        length, kind = int(headers["Content-Length"]), headers["Content-Type"]
        data = b"" if method == "HEAD" else stream.read(length)
        if method != "HEAD" and len(data) < length:
            raise Fault(f"the answer has {len(data)} of {length} bytes{where}")
        if kind == BYTES and not self._named(data, said):
            raise Fault(f"{length} bytes that nobody named{where}")
        if kind == "application/json" and method != "HEAD":
            answer = json.loads(data)
            if status != 200 and (answer["code"], status) not in _STATUSES:
                raise Fault(f"{status} with {answer['code']}{where}")
            if status == 500 and answer["code"] == "internal":
                raise Fault(f"the source failed{where}")
        elif status != 200 and method != "HEAD":
            raise Fault(f"{status} with {kind}{where}")
        return status, headers.get("Connection") != "close"

    def _named(self, data, said):
        """Whether these are the bytes of blocks, or of a file, that the request named."""
        if data == FILE and b"/files/config.json" in said:
            return True
        return any(
            data == b"".join(_CONTENT[int(first) : int(last) + 1])
            for first, last in _RUN.findall(said)
            if int(first) <= int(last) < len(_CONTENT)
        )

    def _connected(self):
        sock = dial(self._target.port)
        if self._context is None:
            return sock
        try:
            return self._context.wrap_socket(sock)
        except OSError as error:
            sock.close()
            raise Late(f"no TLS: {error}") from None
