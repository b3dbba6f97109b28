"""From names in SOURCE to the endpoints of one rank in the instances that they stand for."""

import glob
import hashlib
import ipaddress
import math
import socket
import threading
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import psutil

from ..errors import (
    OtherPlacement,
    SourceBusy,
    SourceError,
    SourceLost,
    SourceRefused,
    SourceSilent,
    SourceUnreachable,
)
from ..identity import PLACEMENT, ModelIdentity
from ..utils import Address, Lookup, Name, one_line, parse_address, shortened, unmapped, words_of
from . import api
from .api import Code, ModelStatus, Status
from .cold_start import Phase, Replica, Seen, has_weights

MAX_ASKED = 32  # instances that are asked for their status in one look-up
_OTHERS = 0.5  # seconds to wait for further answers once one has come
_MAX_FILE = 512  # bytes of a file with an address
_OF_RANK = ("rank", "dp_rank", "ep_rank")  # fields that ranks of one instance differ in

T = TypeVar("T")


@dataclass(frozen=True)
class Own:
    """What is not asked, as it belongs to the instance that asks.

    Attributes:
        process: names this process.
        ports: where the ranks of this instance listen, or will.
        hosts: returns where these ranks are, as far as it is known; this host is not needed.
    """

    process: str = ""
    ports: Container[int] = ()
    hosts: Callable[[], Iterable[str]] = tuple


NOBODY = Own()


class _Record(NamedTuple):
    """An address that a name stands for, with priority and weight as RFC 2782 has them."""

    address: Address
    priority: int = 0  # the least comes first
    weight: int = 1


class _Place(NamedTuple):
    """How an address is preferred before it is asked; the order is that of preference."""

    priority: int
    elsewhere: bool  # on another host
    turn: float


class _Found(NamedTuple):
    """An endpoint; the order is that of preference."""

    priority: int
    elsewhere: bool  # on another host
    later: bool  # not serving yet
    load: float
    turn: float
    address: Address
    instance: str


class Discovery:
    """Looks names up and asks the instances that it finds where the same rank listens there.

    Args:
        names: what to look up.
        identity: of the rank that loads.
        own: what is left out.
        seconds: for each name.
        ask: returns the status of the instance at an address; may be called in several threads.
        electing: whether to ask some instances each time, the same ones as all others that elect.

    Attributes:
        seen: what the last look-up has shown of all instances of the model.
    """

    def __init__(
        self,
        names: Sequence[Name],
        identity: ModelIdentity,
        own: Own,
        seconds: float,
        ask: Callable[[Address], Status],
        *,
        electing: bool = False,
    ) -> None:
        self._names = names
        self._identity = identity
        self._own = own
        self._seconds = seconds
        self._ask = ask
        self._asked: Counter[Address] = Counter()
        self._electing = electing
        self._listed = False
        self._own_addresses: set[Address] = set()
        self.seen = Seen()

    def look_up(self) -> tuple[list[tuple[Address, str]], dict[str, SourceError]]:
        """Look everything up anew.

        Returns:
            The endpoints of this rank with what names the process there, in order of preference:
            the priority of SRV records, then those on the same host, then those with most free
            places. Between equal ones a hash decides that differs from client to client, with the
            weight of SRV records. And what went wrong, by name or address.
        """
        problems: dict[str, SourceError] = {}
        found: dict[Address, _Place] = {}
        whole = True
        self._own_addresses.clear()
        # In threads, as nothing else bounds the time that finding a name or reading files takes.
        looking = {name: _in_thread(self._addresses, name) for name in self._names}
        wait(looking.values(), self._seconds)
        for name, future in looking.items():
            try:
                found |= future.result(0)
            except TimeoutError:
                whole = False
                problems[str(name)] = SourceUnreachable(f"{name}: nothing in time")
            except Exception as error:
                whole = False
                problems[str(name)] = SourceUnreachable(f"{name}: {_reason(error)}")
        # Of many, those first that were not asked before.
        candidates = sorted(found, key=lambda address: (self._asked[address], found[address]))
        electors = _electors({*found, *self._own_addresses})
        self._others: list[str] = []
        self._listed = not electors.isdisjoint(self._own_addresses)
        if self._electing:
            candidates.sort(key=lambda address: address not in electors)
        candidates = candidates[:MAX_ASKED]
        self._asked.update(candidates)
        endpoints: dict[object, _Found] = {}
        replicas: dict[str, Replica] = {}
        via_target: set[str] = set()
        for address, status in self._answers(candidates).items():
            try:
                self._note_replica(address, status.result(0), replicas, address in electors)
                endpoint = self._endpoint(address, found[address], status.result(0))
            except TimeoutError:
                problems[str(address)] = SourceSilent(f"{address}: no status yet")
            except SourceError as error:
                problems[str(address)] = error
            except Exception as error:  # nothing that others say is to cost the load
                problems[str(address)] = SourceRefused(f"{address}: {_reason(error)}")
            else:
                # A process may be found at several addresses, and several may say that they are
                # at one.
                if endpoint.instance != self._own.process:
                    groups = {model.identity.group for model in status.result(0).models}
                    elsewhere = endpoint.instance != status.result(0).instance
                    if self._identity.group not in groups and elsewhere:
                        via_target.add(str(address))
                    endpoints.setdefault((endpoint.instance, endpoint.address.port), endpoint)
        distinct: dict[Address, str] = {}
        for one in sorted(endpoints.values()):
            distinct.setdefault(one.address, one.instance)
        # Who serves the target need not be a rank that loads the draft: of a pipeline only those of
        # the last stage do. One of these that has nothing of it yet looks here before it reads it.
        known = {replica.address for replica in replicas.values()}
        silent = {
            str(address)
            for address in candidates
            if address in electors
            and (_is_silent(problems.get(str(address))) or str(address) in via_target - known)
        }
        self.seen = Seen(replicas, self._listed, silent, whole, tuple(self._others))
        return [*distinct.items()], problems

    def _addresses(self, name: Name) -> Mapping[Address, _Place]:
        """Return the addresses that a name stands for, but for those of this instance."""
        own = {ip for host in {*self._own.hosts()} for ip in _ips(host)}
        found: dict[Address, _Place] = {}
        for address, priority, weight in _LOOKUPS[name.lookup](name, self._seconds):
            local = _is_local(address.host)
            # Nobody listens there yet, so only the address tells that it is this instance's own.
            if address.port in self._own.ports and (local or own & _ips(address.host)):
                self._own_addresses.add(address)
                continue
            found[address] = _Place(priority, not local, self._turn(address, weight))
        return found

    def _answers(self, addresses: Iterable[Address]) -> Mapping[Address, "Future[Status]"]:
        """Ask instances for their status; one that takes longer than others is not waited for."""
        asked = {address: _in_thread(self._ask, address) for address in addresses}
        left = {*asked.values()}
        seconds = None
        while left:
            done, left = wait(left, seconds, FIRST_COMPLETED)
            if not done:
                break
            if any(future.exception() is None for future in done):
                seconds = _OTHERS
        return asked

    def _note_replica(
        self, asked: Address, status: Status, replicas: dict[str, Replica], elector: bool
    ) -> None:
        """Take note of what an instance says of the model that is being loaded, if it has it.

        One that is not asked by all cannot be chosen, and counts only for what it is doing.
        """
        model = next((m for m in status.models if m.identity.group == self._identity.group), None)
        if model is not None and model.state == "serving" and self._is_cut_otherwise(model):
            self._others.append(str(asked))
        there = model.endpoints.get(self._identity.rank) if model is not None else None
        if model is None or there is None or self._differences(model):
            return
        if there.instance == self._own.process:
            self._listed |= elector
        elif not elector and model.state == Phase.WAITING.value:
            return
        # Of an instance's ranks it is this one that knows first.
        elif model.state != Code.CANNOT_SERVE.text and (
            there.instance not in replicas or there.instance == status.instance
        ):
            replicas[there.instance] = Replica(model.state, model.can_read, str(asked))

    def _differences(self, model: ModelStatus) -> list[str]:
        return [
            str(one)
            for one in api.differences(self._identity, model.identity)
            if one.field not in _OF_RANK
        ]

    def _is_cut_otherwise(self, model: ModelStatus) -> bool:
        fields = {one.field for one in api.differences(self._identity, model.identity)}
        # In the processed layout, of one version, there is nothing to be seen of a checkpoint.
        raw = self._identity.vllm_version is None
        return raw and fields <= PLACEMENT and not fields <= {*_OF_RANK}

    def _endpoint(self, asked: Address, place: _Place, status: Status) -> _Found:
        """Return where this rank listens in the instance that has answered.

        Raises:
            SourceBusy: it does not say so yet, or has no weights yet.
            SourceRefused: it has no such rank.
        """
        identity = self._identity
        models = {model.identity.group: model for model in status.models}
        # A rank's models are all at its port, but not every rank has a draft.
        model = models.get(identity.group) or models.get(api.TARGET_GROUP)
        if model is None:
            raise SourceBusy(f"{asked}: has no model of group {identity.group!r} yet")
        there = model.endpoints.get(identity.rank)
        same_group = model.identity.group == identity.group
        if there is None:
            differ = self._differences(model)
            if differ and same_group:
                kind = OtherPlacement if self._is_cut_otherwise(model) else SourceRefused
                raise kind(f"{asked}: the models differ: {'; '.join(differ)}")
            raise SourceBusy(f"{asked}: does not know yet where its rank {identity.rank} listens")
        other = there.instance != self._own.process
        if same_group and other and not has_weights(model.state) and not self._differences(model):
            reading = model.state == Phase.READING.value
            does = "reads the weights from disk" if reading else "has no weights either"
            raise SourceBusy(f"{asked}: {does}")
        address = reached_at(asked, status, model, identity.rank)
        elsewhere = place.elsewhere if address.host == asked.host else not _is_local(address.host)
        load = status.places_taken / max(1, status.places)
        later = model.state != "serving"
        return _Found(place.priority, elsewhere, later, load, place.turn, address, there.instance)

    def _turn(self, address: Address, weight: int) -> float:
        """Return a number by which the least is the first as often as its weight says.

        It is as if drawn from an exponential distribution, and the same for each look-up.
        """
        drawn = _hash(f"{self._own.process} {address}") / 2**64
        # A weight of 0 is to have a very small chance.
        return -math.log1p(-drawn) / (weight or 0.001)


def reached_at(asked: Address, status: Status, model: ModelStatus, rank: int) -> Address:
    """Return where a rank of an instance is to be reached, one of which has answered.

    Args:
        asked: where it has answered.
        status: what it has answered.
        model: one of its models.
        rank: one of the model's endpoints.

    Raises:
        SourceRefused: it does not give an address.
    """
    there, own = model.endpoints[rank], model.endpoints.get(model.identity.rank)
    try:
        address = parse_address(there.address)
        if there.instance == status.instance:
            # It was reached as the name says; as it calls itself it need not be.
            return asked
        if own is not None and parse_address(own.address).host == address.host:
            return Address(asked.host, address.port)
        ipaddress.ip_address(address.host)  # no name that somebody else has chosen
    except ValueError as error:
        raise SourceRefused(f"{asked}: {shortened(str(error), 300)}") from None
    return address


def addresses_of(name: Name, seconds: float) -> list[Address]:
    """Return all addresses that a name stands for.

    Args:
        name: what to look up.
        seconds: for the look-up.

    Raises:
        SourceUnreachable: it stands for none.
    """
    try:
        return [record.address for record in _LOOKUPS[name.lookup](name, seconds)]
    except (OSError, ValueError) as error:
        raise SourceUnreachable(f"{name}: {_reason(error)}") from None


def _in_thread(call: Callable[..., T], *arguments: object) -> "Future[T]":
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call(*arguments))
        except BaseException as error:
            future.set_exception(error)

    try:
        threading.Thread(target=run, name="netloader-discover", daemon=True).start()
    except RuntimeError as error:  # no more threads
        future.set_exception(SourceSilent(one_line(error)))
    return future


def _electors(addresses: set[Address]) -> set[Address]:
    """Return those that are asked by all, in an order that is the same for all."""
    if len(addresses) <= MAX_ASKED:
        return addresses
    return {*sorted(addresses, key=lambda one: _hash(str(one)))[: MAX_ASKED // 2]}


def _is_silent(problem: SourceError | None) -> bool:
    """Return whether nobody knows if an instance is there."""
    return isinstance(problem, SourceSilent) or type(problem) is SourceLost


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def _reason(error: Exception) -> str:
    return shortened(words_of(error), 300)


def _ips(host: str) -> set[str]:
    """Return the IP addresses of a host, if any are known."""
    try:
        return {record.address.host for record in _of_host(host, 0)}
    except OSError:
        return set()


def _is_local(host: str) -> bool:
    """Return whether an IP address, or one that a name stands for, is one of this machine."""
    hosts = _ips(host)
    here = {own.address for each in psutil.net_if_addrs().values() for own in each}
    return not here.isdisjoint(hosts) or any(
        ipaddress.ip_address(host).is_loopback for host in hosts
    )


def _of_host(host: str, port: int, priority: int = 0, weight: int = 1) -> list[_Record]:
    """Return all IPv4 and IPv6 addresses of a host."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [
        _Record(Address(unmapped(str(where[0])), port), priority, weight) for *_, where in found
    ]


def _instance(name: Name, seconds: float) -> list[_Record]:
    # Whoever connects tries all addresses of the host.
    return [_Record(Address(name.text, name.port))]


def _dns(name: Name, seconds: float) -> list[_Record]:
    return _of_host(name.text, name.port)


def _srv(name: Name, seconds: float) -> list[_Record]:
    try:
        from dns.exception import DNSException
        from dns.resolver import resolve
    except ImportError:
        raise OSError("SRV records need dnspython: pip install dnspython") from None
    try:
        records = resolve(name.text, "SRV", lifetime=seconds, search=True)
    except DNSException as error:
        raise OSError(one_line(error)) from None
    return _all_of(
        partial(
            _of_host,
            record.target.to_text(omit_final_dot=True),
            record.port,
            record.priority,
            record.weight,
        )
        for record in records
    )


def _files(name: Name, seconds: float) -> list[_Record]:
    def read(path: str) -> list[_Record]:
        with Path(path).open("rb") as file:
            return [_Record(parse_address(file.read(_MAX_FILE).decode()))]

    paths = sorted(glob.glob(f"{glob.escape(name.text)}*.txt"))
    if not paths:
        raise OSError("there are no such files")
    return _all_of(partial(read, path) for path in paths)


def _all_of(parts: Iterable[Callable[[], list[_Record]]]) -> list[_Record]:
    """Return the records of all parts; one that fails costs no other.

    Raises:
        OSError: all failed.
        ValueError: all failed.
    """
    found: list[_Record] = []
    failure: OSError | ValueError | None = None
    for part in parts:
        try:
            found += part()
        except (OSError, ValueError) as error:
            failure = error
    if failure is not None and not found:
        raise failure
    return found


_LOOKUPS: Mapping[Lookup, Callable[[Name, float], list[_Record]]] = {
    Lookup.INSTANCE: _instance,
    Lookup.DNS: _dns,
    Lookup.SRV: _srv,
    Lookup.FILES: _files,
}
