"""A source's front door that kills the source in the middle of a transfer."""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def killing_proxy(source: str, kill: Callable[[], None], after: int) -> Iterator[str]:
    """Relays a control connection until the client has asked for chunks `after` times.

    The bytes of the tensors do not pass here: the source tells only the port to meet at, and the
    client takes the address that it has reached.

    Yields:
        The address to use as a source.
    """
    host, _, port = source.rpartition(":")
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def relay() -> None:
            client, _ = listener.accept()
            with client, socket.create_connection((host, int(port))) as upstream:
                answers = threading.Thread(target=_copy, args=(upstream, client), daemon=True)
                answers.start()
                asked = 0
                for line in client.makefile("rb"):
                    # The first FETCH asks for nothing: it accepts the offer.
                    asked += b'"FETCH"' in line and b'"chunks":[]' not in line
                    if asked > after:
                        kill()
                        break
                    upstream.sendall(line)
                answers.join(10)

        thread = threading.Thread(target=relay, daemon=True)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def _copy(one: socket.socket, other: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := one.recv(1 << 16):
            other.sendall(data)
