"""What can be wrong with a source, a client, and what they say to each other."""

import contextlib
import dataclasses
import json
import socket
import threading
from collections.abc import Sequence

import torch

from vllm_ascend.model_loader.netloader.utils import Address

from .sides import HOST, PATIENCE, fresh, store_of


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


def tapped(way, model, tap=lambda index, count: None, seed=0):
    """A store for `source` whose every read is noted in `.readable.read` and passes by `tap`."""
    store = fresh(store_of(way, model, seed)) if callable(model) else model
    store.readable = Tapped(store.device.readable(store.tensors), tap)
    return store


def failing_after(reads, error="injected failure"):
    def tap(index, count):
        if count >= reads:
            raise RuntimeError(error)

    return tap


def flipped(tensor):
    """A copy of a tensor with one bit wrong."""
    copy = tensor.contiguous().clone()
    copy.view(-1).view(torch.uint8)[-1:].bitwise_xor_(1)
    return copy


def corrupting(way, model, times, wrong=7, seed=0):
    """A store that sends tensor `wrong` with a bit flipped, the first `times` times."""
    left = [times]
    tensors = store_of(way, model, seed).readable

    def tap(index, count):
        if index == wrong and left[0]:
            left[0] -= 1
            return flipped(tensors[index])
        return None

    return tapped(way, model, tap, seed)


# Between a client and a source


@dataclasses.dataclass
class Said:
    """A request or an answer; `of` is what kind of request it is or belongs to."""

    of: str
    line: str
    headers: dict[str, str]
    body: bytes

    def __bytes__(self):
        headers = self.headers | {"Content-Length": str(len(self.body))}
        lines = [self.line, *(f"{name}: {value}" for name, value in headers.items()), "", ""]
        return "\r\n".join(lines).encode("latin-1") + self.body

    @property
    def json(self):
        return json.loads(self.body)

    def put(self, **fields):
        """With fields of the JSON set; a function is called with what was there."""
        content = self.json
        for name, value in fields.items():
            content[name] = value(content.get(name)) if callable(value) else value
        return dataclasses.replace(self, body=json.dumps(content).encode())


class Last(bytes):
    """For a `Proxy`: bytes after which the connection is cut."""


def as_it_is(said):
    return said


class Proxy:
    """Stands between clients and a source, and hands every request and answer to a function.

    `to_source` and `to_client` get each as `Said` and return what goes on instead: another one, raw
    bytes (`Last` ones perhaps), or None to cut the connection. They may also block.
    """

    def __init__(self, address, to_client=as_it_is, to_source=as_it_is):
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
            last = ["?"]  # kind of the last request
            self._go(self._pump, behind, client, self._ways[0], last)
            self._go(self._pump, client, behind, self._ways[1], last)

    def _pump(self, read, write, change, last):
        try:
            with read.makefile("rb") as stream:
                while (said := _read(stream, last)) is not None:
                    changed = change(said)
                    if changed is None:
                        break
                    write.sendall(changed if isinstance(changed, bytes) else bytes(changed))
                    if isinstance(changed, Last):
                        break
        except (OSError, ValueError):
            pass  # one end has gone
        finally:
            _cut(read)
            _cut(write)


def _read(stream, last):
    line = stream.readline().decode("latin-1").rstrip("\r\n")
    if not line:
        return None
    headers = {}
    while header := stream.readline().decode("latin-1").strip():
        name, _, value = header.partition(":")
        headers[name.title()] = value.strip()
    body = stream.read(int(headers.get("Content-Length", "0")))
    if not line.startswith("HTTP/"):
        path = line.split()[1]
        last[0] = "blocks" if "/blocks/" in path else path.rpartition("/")[2]
    return Said(last[0], line, headers, body)


def _cut(sock):
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()


def on(of, number, fault):
    """For a `Proxy`: a fault in what comes as the `number`th of its kind."""
    seen = 0

    def way(said):
        nonlocal seen
        if said.of != of:
            return said
        seen += 1
        return fault(said) if seen == number + 1 else said

    return way


def cut_at(count):
    """For a `Proxy`: cut the connection once so many bytes have gone this way."""
    left = count

    def way(said):
        nonlocal left
        data = bytes(said)
        part, left = data[: max(left, 0)], left - len(data)
        return data if left > 0 else Last(part)

    return way


def closed_port():
    """An address of this machine at which nobody listens."""
    with socket.create_server((HOST, 0)) as listener:
        return Address(HOST, listener.getsockname()[1])


# At a server


def with_groups(server, change):
    """Change each `TransferGroup` through which a server sends."""
    open_group = server.open_group

    def changed(session, weights):
        group = open_group(session, weights)
        group._formed.add_done_callback(lambda formed: change(formed.result()))
        return group

    server.open_group = changed


@contextlib.contextmanager
def holding_back(server, count):
    """Let a server send so many runs, and the others at the end."""
    pieces, sent, go_on = server._pieces, iter(range(count)), threading.Event()

    def hold():
        if next(sent, None) is None:
            go_on.wait(PATIENCE)

    def held(served, run):
        hold()
        yield from pieces(served, run)

    def hold_messages(group):
        send = group.send

        def held(message):
            hold()
            send(message)

        group.send = held

    server._pieces = held
    with_groups(server, hold_messages)
    try:
        yield
    finally:
        go_on.set()


_WRONG = bytes(byte ^ 1 for byte in range(256))


def lie(replica, is_true=lambda: False):
    """Send wrong bytes, whatever is asked for."""
    pieces = replica.server._pieces

    def wrong(served, run):
        for views in pieces(served, run):
            if is_true():
                yield views
            else:
                yield [memoryview(bytes(view).translate(_WRONG)) for view in views]

    def spoil(group):
        send = group.send
        group.send = lambda message: send(message if is_true() else message ^ 1)

    replica.server._pieces = wrong
    with_groups(replica.server, spoil)


def lie_at_times(replica):
    count = iter(range(10**9))
    lie(replica, lambda: next(count) % 3 != 0)
