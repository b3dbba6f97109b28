"""A DNS server on this host that knows the SRV records of one name."""

import contextlib
import socket
import threading
from collections.abc import Iterator

import dns.message
import dns.rcode
import dns.resolver
import dns.rrset

HOST = "127.0.0.1"


@contextlib.contextmanager
def name_server(name: str, *records: str) -> Iterator[int]:
    """Answer until the end of the block, on the port that comes out of it."""
    known = dns.rrset.from_text(f"{name}.", 60, "IN", "SRV", *records)

    def serve() -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                said, client = server.recvfrom(4096)
                answer = dns.message.make_response(dns.message.from_wire(said))
                if answer.question[0].name == known.name:
                    answer.answer.append(known)
                else:
                    answer.set_rcode(dns.rcode.NXDOMAIN)
                server.sendto(answer.to_wire(), client)

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind((HOST, 0))
        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]


def resolver_at(port: int) -> dns.resolver.Resolver:
    """Return a resolver that asks this server and no other."""
    resolver = dns.resolver.Resolver(configure=False)
    resolver.nameservers, resolver.port = [HOST], port
    return resolver
