"""A source's front door that kills the source in the middle of a transfer."""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def killing_proxy(source: str, kill: Callable[[], None], after: int) -> Iterator[str]:
    """Relays a connection until the source has sent more than `after` bytes, and kills it then.

    It takes one connection: others are refused.

    Yields:
        The address to use as a source.
    """
    host, _, port = source.rpartition(":")
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def relay() -> None:
            client, _ = listener.accept()
            listener.close()
            with client, socket.create_connection((host, int(port))) as upstream:
                asking = threading.Thread(target=_copy, args=(client, upstream), daemon=True)
                asking.start()
                sent = 0
                with contextlib.suppress(OSError):
                    while data := upstream.recv(1 << 16):
                        sent += len(data)
                        if sent > after:
                            kill()
                            break
                        client.sendall(data)
                _cut(client)
                asking.join(10)

        thread = threading.Thread(target=relay, daemon=True)
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        thread.start()
        yield address


def _copy(one: socket.socket, other: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := one.recv(1 << 16):
            other.sendall(data)


def _cut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
