"""Addresses, ports, rates, deadlines, lines of text, plain values and the logger."""

import contextlib
import ipaddress
import logging
import re
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from ctypes import Array, c_ubyte
from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias, TypeVar

import msgspec

# A child of vLLM's own logger: its handlers, format and level apply without importing vLLM.
logger = logging.getLogger("vllm.netloader")

LOAD_FORMAT = "netloader"
MIN_PORT, MAX_PORT = 1024, 65535
_LOOK = 0.05  # seconds between two looks at whether to go on waiting
_BETWEEN_LINES = 10.0  # seconds from one line in the log to the next of the same kind
_MOST_KINDS = 1000  # of lines that are told apart at once
T = TypeVar("T")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
Plain: TypeAlias = bool | int | float | str | None
Buffer: TypeAlias = memoryview | Array[c_ubyte]  # bytes in host memory
_HOST_NAME = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)(\.(?!-)[A-Za-z0-9_-]{1,63}(?<!-))*\.?")


@dataclass(frozen=True, order=True)
class Address:
    """Where a server listens.

    Attributes:
        host: an IPv4 address, an IPv6 address without brackets, or a host name.
        port: 1 to 65535.
    """

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str) -> Address:
    """Parse `IP:port`, `[IPv6]:port` or `host:port`.

    Args:
        text: the address as an operator writes it; surrounding blanks are ignored.

    Raises:
        ValueError: says what is wrong with `text`.
    """
    address = text.strip()
    if scheme := _SCHEME.match(address):
        raise ValueError(f"{text!r}: give IP:port, [IPv6]:port or host:port without {scheme[0]}")
    host, colon, port_text = address.rpartition(":")
    if not colon or address.endswith("]"):
        raise ValueError(f"{text!r}: no port, give IP:port, [IPv6]:port or host:port")
    bracketed = host.startswith("[") and host.endswith("]")
    if ":" in host and not bracketed:
        raise ValueError(
            f"{text!r}: more than one colon, give an IPv6 address in brackets, as in [::1]:8000"
        )
    # int() alone takes other scripts' digits, blanks, signs and underscores
    if not re.fullmatch("[0-9]{1,5}", port_text) or not 1 <= int(port_text) <= MAX_PORT:
        raise ValueError(f"{text!r}: port {port_text!r} is not a number from 1 to {MAX_PORT}")
    if bracketed:
        host = host[1:-1]
        bare, _, zone = host.partition("%")
        try:
            ipaddress.IPv6Address(bare)
        except ValueError:
            raise ValueError(f"{text!r}: {host!r} is not an IPv6 address") from None
        if "%" in host and not re.fullmatch(r"[A-Za-z0-9_.-]+", zone):
            raise ValueError(f"{text!r}: {zone!r} is not the name of a network interface")
    elif re.fullmatch(r"[0-9.]+", host):
        try:
            ipaddress.IPv4Address(host)
        except ValueError:
            raise ValueError(f"{text!r}: {host!r} is not an IPv4 address") from None
    elif len(host) > 253 or not _HOST_NAME.fullmatch(host):
        raise ValueError(f"{text!r}: {host!r} is neither an IP address nor a host name")
    return Address(host, int(port_text))


class Lookup(Enum):
    """How a name in SOURCE is looked up: the value is what the name begins with."""

    INSTANCE = ""
    DNS = "dns+"
    SRV = "dnssrv+"
    FILES = "file+"


@dataclass(frozen=True)
class Name:
    """What stands for any number of instances, the same for all their ranks.

    Attributes:
        lookup: how these are found.
        text: a host, a DNS name, or the path that files begin with.
        port: where any rank of an instance listens; 0: the look-up says.
    """

    lookup: Lookup
    text: str
    port: int = 0

    def __str__(self) -> str:
        text = str(Address(self.text, self.port)) if self.port else self.text
        return f"{self.lookup.value}{text}"


def parse_name(text: str) -> Name:
    """Parse `HOST:PORT`, `dns+NAME:PORT`, `dnssrv+NAME` or `file+PREFIX`.

    Args:
        text: the name as an operator writes it; surrounding blanks are ignored.

    Raises:
        ValueError: says what is wrong with `text`.
    """
    name = text.strip()
    begin = re.match(r"(dns|dnssrv|file)\+", name)
    lookup = Lookup(begin[0] if begin else "")
    rest = name.removeprefix(lookup.value)
    if lookup is Lookup.FILES:
        if not rest.startswith("/"):
            raise ValueError(f"{text!r}: {rest!r} is not an absolute path")
        return Name(lookup, rest)
    if lookup is Lookup.SRV:
        if len(rest) > 253 or not _HOST_NAME.fullmatch(rest):
            raise ValueError(f"{text!r}: {rest!r} is not a DNS name")
        return Name(lookup, rest)
    try:
        address = parse_address(rest)
    except ValueError as error:
        raise ValueError(str(error).replace(repr(rest), repr(text), 1)) from None
    return Name(lookup, address.host, address.port)


def unmapped(host: str) -> str:
    """Return `host` with an IPv4 address that a dual-stack socket shows as IPv6 made IPv4 again."""
    try:
        mapped = ipaddress.IPv6Address(host.partition("%")[0]).ipv4_mapped
    except ValueError:
        return host
    return str(mapped) if mapped else host


def own_host() -> str:
    """Return the address of this machine that the way to others begins at."""
    for family, other in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.connect((other, 9))  # sends nothing
            return str(sock.getsockname()[0])
    return "127.0.0.1"


class FewLines:
    """Lets the log have one line of each kind in ten seconds, and counts those left out."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kinds: dict[object, tuple[float, int]] = {}  # when the next one is due; left out

    def more(self, kind: object) -> str | None:
        """Return what a line of a kind is to end with; None: leave it out."""
        now = time.monotonic()
        with self._lock:
            due, left_out = self._kinds.get(kind, (now, 0))
            if now < due:
                self._kinds[kind] = due, left_out + 1
                return None
            if len(self._kinds) >= _MOST_KINDS:  # peers may have any number of addresses
                self._kinds.clear()
            self._kinds[kind] = now + _BETWEEN_LINES, 0
        return f" ({left_out} more since the last line like this)" if left_out else ""


def words_of(error: BaseException) -> str:
    """Return what an error says. The number and the path of a system error are left out."""
    words: str = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return words


def one_line(text: object) -> str:
    """Return a text, such as what an error says, on one line, as in logs and messages to peers."""
    return " ".join(str(text).split())


def shortened(text: str, limit: int = 2000) -> str:
    """Return a peer's text made fit for a log: one line, printable, bounded."""
    printable = "".join(char if char.isprintable() else " " for char in text[: limit + 1])
    return printable if len(printable) <= limit else f"{printable[:limit]}..."


def plain(name: str, value: object) -> Plain:
    """Return a value as a type that messages can carry.

    What vLLM and models give may be an enum, or a subclass of `str` or `int` that msgspec rejects.

    Args:
        name: what the value is, for the error.
        value: anything.

    Raises:
        ValueError: no message can carry it; names it and its type.
    """
    made = value.value if isinstance(value, Enum) else value
    if isinstance(made, str):
        made = str.__str__(made)
    elif isinstance(made, int | float) and not isinstance(made, bool):
        made = int(made) if isinstance(made, int) else float(made)
    if made is None or isinstance(made, bool | int | float | str):
        with contextlib.suppress(UnicodeEncodeError):
            msgspec.json.encode(made)
            return made
    raise ValueError(
        f"{name} is {value!r} ({type(value).__name__}); allowed: text in Unicode, a "
        f"number, true, false or None"
    )


def size(nbytes: float) -> str:
    """Return a number of bytes for people, in MB or GB (1e6 and 1e9 bytes)."""
    return f"{nbytes / 1e6:.1f} MB" if nbytes < 1e9 else f"{nbytes / 1e9:.2f} GB"


def rate(nbytes: int, seconds: float) -> str:
    """Return a rate for people, in MB/s or GB/s."""
    return f"{size(nbytes / max(seconds, 1e-9))}/s"


class Patience:
    """How long to go on waiting for a peer: no longer than `grace` once it has hung up.

    Args:
        seconds: until the time is up.
        gone: whether the peer has hung up.
        grace: seconds for what it had done before.
    """

    def __init__(self, seconds: float, gone: Callable[[], bool], grace: float) -> None:
        self._deadline = time.monotonic() + seconds
        self._gone = gone
        self._grace = grace
        self.hung_up = False

    def over(self) -> bool:
        """Return whether the time is up; ask it now and then."""
        now = time.monotonic()
        if not self.hung_up and self._gone():
            self.hung_up, self._deadline = True, min(self._deadline, now + self._grace)
        return now > self._deadline


def within(patience: Patience, call: Callable[[], T], undo: Callable[[T], object]) -> T:
    """Call what may block for ever, in a thread that is left behind when it takes too long.

    Args:
        patience: how long it may take.
        call: what to call; its exceptions are passed on.
        undo: called in the thread with a result that has come too late.

    Raises:
        TimeoutError: the patience is over.
    """
    future: Future[T] = Future()

    def run(future: Future[T]) -> None:
        try:
            result = call()
        except BaseException as error:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)
        else:
            if future.set_running_or_notify_cancel():
                future.set_result(result)
            else:
                undo(result)

    threading.Thread(target=run, args=(future,), name="netloader-within", daemon=True).start()
    try:
        while not future.done() and not patience.over():
            wait((future,), _LOOK)
        if future.cancel():
            raise TimeoutError("nothing in time")
        return future.result()
    finally:
        del future  # else the traceback of its exception refers to it, and it to that
