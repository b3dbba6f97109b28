"""First bytes and handshakes of those who are no peers: none may get anything that is for peers."""

import contextlib
import json
import re
import socket
import ssl
import tempfile
from pathlib import Path

from tests.certificates import OTHER_SECRET, SECRET, Authority, forged
from vllm_ascend.model_loader.netloader.credentials import derived_from
from vllm_ascend.model_loader.netloader.interaction import api

from .mutations import Fault, Late, damaged_bytes
from .sources import WITH_SECRET, dial, tls_client

_SHIPPED = {
    "label": "JOIN",
    "content": {
        "device_id": 0,
        "model_path": "small",
        "tp": 1,
        "pp": 1,
        "port": 29500,
        "group_name": "netloader",
        "int8_cache": "no",
    },
}
_ALERT = 0x15


class Door:
    """Knocks; every case is a connection of its own."""

    def __init__(self, target):
        self._target = target
        blocks = api.BLOCKS.format(digest=target.weights, first=0, last=3)
        peers = api.PEERS.format(digest=target.weights)
        files = api.FILES.format(group="netloader")
        asked = (blocks, peers, files, api.STATUS, api.METRICS, api.PAGE)
        self._asked = [f"GET {path} HTTP/1.1\r\nHost: h\r\n\r\n".encode() for path in asked]
        join = api.JOIN.format(group="netloader")
        self._asked.append(f"POST {join} HTTP/1.1\r\nContent-Length: 2\r\n\r\n{{}}".encode())
        self._strangers = {
            "no certificate": tls_client(),
            "another secret": tls_client(derived_from(OTHER_SECRET)),
        }
        folder = Path(tempfile.mkdtemp(dir=target.folder))
        if target.kind == WITH_SECRET:
            self._peer = tls_client(derived_from(SECRET))
            foreign = folder / "foreign.pem"
            foreign.write_bytes(forged(derived_from(SECRET).certificate))
            self._strangers["a foreign key under the same name"] = tls_client(str(foreign))
        else:
            self._peer = tls_client(f"{target.folder}/source.crt", f"{target.folder}/source.key")
            other = Authority(folder).files(who="other")
            self._strangers["another authority"] = tls_client(other["tls_cert"], other["tls_key"])
            paths = (f"{target.folder}/expired.crt", f"{target.folder}/expired.key")
            self._strangers["expired"] = tls_client(*paths)

    def close(self):
        pass

    def try_one(self, chance):
        """Knock once; returns whether something was let in."""
        kind = chance.randrange(10)
        if kind < 5:
            return self._first_bytes(chance)
        if kind < 8:
            who = chance.choice([*self._strangers])
            return self._handshake(chance, self._strangers[who], who)
        if kind == 8:
            return self._handshake(chance, self._older(chance), "an older TLS")
        # A peer whose handshake is damaged on the way.
        return self._handshake(chance, self._peer, "damaged", damaged=True)

    def _older(self, chance):
        context = tls_client() if chance.random() < 0.5 else tls_client(derived_from(SECRET))
        context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
        context.maximum_version = chance.choice(
            [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_1, ssl.TLSVersion.TLSv1]
        )
        context.set_ciphers("ALL:@SECLEVEL=0")
        return context

    def _hello(self):
        return _Tls(self._peer).said()

    def _first_bytes(self, chance):
        """Say something that is no whole handshake; only an alert of TLS may come back."""
        kind = chance.randrange(6)
        if kind == 0:
            said = chance.randbytes(chance.choice([0, 1, 5, 100, 5000]))
        elif kind == 1:
            said = chance.choice(self._asked)
        elif kind == 2:
            said = json.dumps(_SHIPPED).encode()
        elif kind == 3:
            said = damaged_bytes(chance, json.dumps(_SHIPPED).encode() + chance.choice(self._asked))
        elif kind == 4:
            said = b"\x16\x03\x01" + chance.randbytes(chance.choice([1, 2, 50, 600]))
        else:
            said = damaged_bytes(chance, self._hello()) + chance.choice([b"", *self._asked])
        with dial(self._target.port) as sock:
            with contextlib.suppress(ConnectionError):  # it may have answered before
                sock.sendall(said)
            answered = _rest(sock, f"first bytes {said[:200]!r}")
        # A hello whose damage does no harm is answered; nothing has been asked inside TLS.
        for kind, content in _records(answered):
            if kind == _ALERT or (said[:1] == b"\x16" and kind in (0x16, 0x14, 0x17)):
                continue
            raise Fault(f"first bytes {said[:200]!r} got {kind} {content[:100]!r}")
        return False

    def _handshake(self, chance, context, who, damaged=False):
        """Agree with the source as far as it goes, and ask what is for peers."""
        tls, asked = _Tls(context), chance.choice(self._asked)
        with dial(self._target.port) as sock:
            # Which flight; where the last one is, what was asked is damaged and not the handshake.
            at = chance.choice([0, 1]) if damaged else -1
            came, number = b"", 0
            try:
                while True:
                    done = tls.step()
                    if done:
                        tls.tls.write(asked)
                    out = tls.said()
                    if number == at:
                        out, was = damaged_bytes(chance, out), out
                        if out.startswith(was):
                            return False
                    number += 1
                    if out:
                        sock.sendall(out)
                    if number > at >= 0:  # or it would wait for the rest
                        sock.shutdown(socket.SHUT_WR)
                    if done:
                        break
                    if not (data := sock.recv(1 << 16)):
                        break
                    tls.incoming.write(data)
            except TimeoutError:
                raise Late(f"neither a handshake nor an end: {who}") from None
            except OSError:  # of TLS, too
                pass
            if tls.tls.version() is not None:
                with contextlib.suppress(OSError):
                    tls.incoming.write(_rest(sock, who))
                with contextlib.suppress(ssl.SSLError):
                    while data := tls.tls.read(1 << 16):
                        came += data
        if came and (damaged or not re.match(rb"HTTP/1\.1 401 ", came)):
            raise Fault(f"{who} asked {asked[:100]!r} and got {came[:200]!r}")
        if came and who != "no certificate" and who != "an older TLS":
            raise Fault(f"{who} got {came[:200]!r}")
        return False


class _Tls:
    """A client's end of TLS, in memory."""

    def __init__(self, context):
        self.incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self._outgoing)
        with contextlib.suppress(ssl.SSLError):
            self.step()

    def step(self):
        try:
            self.tls.do_handshake()
        except ssl.SSLWantReadError:
            return False
        return True

    def said(self):
        return self._outgoing.read()


def _rest(sock, who):
    """Say no more, and return all that still comes."""
    came = b""
    try:
        sock.shutdown(socket.SHUT_WR)
        while data := sock.recv(1 << 16):
            came += data
    except TimeoutError:
        raise Late(f"neither an answer nor an end: {who}") from None
    except OSError:
        pass
    return came


def _records(data):
    """TLS's records, or what is none."""
    while data:
        length = int.from_bytes(data[3:5], "big")
        if data[0] not in (0x14, 0x15, 0x16, 0x17) or data[1:2] != b"\x03":
            yield data[0], data
            return
        yield data[0], data[5 : 5 + length]
        data = data[5 + length :]
