"""Clients that load from one source at the same time and pass on what they get."""

import contextlib
import dataclasses
import os
import socket
import threading
from unittest import mock

from vllm_ascend.model_loader.netloader import load
from vllm_ascend.model_loader.netloader.config import NetLoaderConfig
from vllm_ascend.model_loader.netloader.errors import ChosenToRead, LoadFailed
from vllm_ascend.model_loader.netloader.executor.store import BlockStore
from vllm_ascend.model_loader.netloader.interaction.api import Code
from vllm_ascend.model_loader.netloader.interaction.cold_start import Phase
from vllm_ascend.model_loader.netloader.interaction.discovery import Own
from vllm_ascend.model_loader.netloader.load import elastic_load
from vllm_ascend.model_loader.netloader.loading.sessions import Sessions
from vllm_ascend.model_loader.netloader.loading.target import ColdStart
from vllm_ascend.model_loader.netloader.serve import Offer, Relay, WeightServer
from vllm_ascend.model_loader.netloader.utils import Address, parse_address

from .models import many_rows
from .sides import (
    HOST,
    PATIENCE,
    addresses_of,
    differing,
    expected,
    fresh,
    here,
    identity,
    make,
    settings,
    store_of,
)

# Nobody is lost because the machine is busy.
_PATIENCE = 4 * PATIENCE  # more than any of its deadlines together
PATIENT = {"connect_timeout": 20.0, "handshake_timeout": 20.0, "progress_timeout": 20.0}


@dataclasses.dataclass(eq=False)
class Replica:
    """One that loads, then serves what it has."""

    way: object
    name: str
    model: object
    config: NetLoaderConfig
    server: WeightServer
    store: BlockStore | None = None
    filling: BlockStore | None = None
    gave: str = ""
    lists: tuple = ()
    reasons: str = ""
    cold: bool = False
    can_read: bool = True
    told: object = None
    sessions: object = None
    has_read: bool = False
    others: tuple = ()
    dead: bool = False
    hold: bool = False
    said: list = dataclasses.field(default_factory=list)
    holding: threading.Event = dataclasses.field(default_factory=threading.Event)
    go_on: threading.Event = dataclasses.field(default_factory=threading.Event)

    @property
    def address(self) -> Address:
        return parse_address(self.server.endpoint.address)

    def start(self, sources):
        self.thread = threading.Thread(target=self._load, args=(sources,), daemon=True)
        self.thread.start()

    def _load(self, sources):
        way, model = self.way, self.model
        way.use_device()
        self.tensors = make(way, model, 1000)
        who = identity(way)
        offer = Offer(
            who,
            None,
            "the weights are being loaded",
            code=Code.LOADING,
            phase=Phase.WAITING if self.cold else Phase.LOADING,
            can_read=lambda: self.cold and self.can_read,
        )
        self.server.announce(offer)
        relay = _Watched(self, offer)
        if self.dead:
            self.reasons = "dead"
            return
        try:
            loaded = elastic_load(
                self.tensors,
                set(self.tensors),
                addresses_of(sources),
                who,
                self.config,
                way.device(),
                own=Own(self.server.process),
                relay=relay,
                cold=ColdStart(lambda: self.can_read, relay.announce, self.said.append, self.told)
                if self.cold
                else None,
            )
        except ChosenToRead as error:
            self.others = error.others
            self._read()
            return
        except LoadFailed as error:
            self.reasons = str(error) or "no reason"
            return
        self.store, self.gave, self.lists = loaded.store, loaded.sources, loaded.lists
        if self.hold:
            self.holding.set()
            self.go_on.wait(PATIENCE)
        self.server.offer(Offer(who, self.store))

    def _read(self):
        """Do as if reading the disk, which has the weights with the seed 0."""
        self.has_read = True
        self.holding.set()
        if self.hold:
            self.go_on.wait(PATIENCE)
        if self.dead:
            self.reasons = "dead"
            return
        self.tensors = make(self.way, self.model, 0)
        self.store = fresh(store_of(self.way, self.model))
        self.server.offer(Offer(identity(self.way), self.store))

    def check(self):
        """All weights are right."""
        self.thread.join(_PATIENCE)
        assert not self.thread.is_alive(), "the load goes on after its deadlines"
        assert self.reasons == "", self.reasons
        assert differing(self.way, self.tensors, expected(self.way, self.model, 0)) == []

    def check_right_or_failed(self):
        """There is no third."""
        self.thread.join(_PATIENCE)
        assert not self.thread.is_alive(), "the load goes on after its deadlines"
        if not self.reasons:
            self.check()

    def die(self):
        """Let others see no more than the end of their connections, and load nothing any more."""
        self.dead = True
        if self.sessions is not None:
            self.sessions.die()
        cut_off(self.server)


def cut_off(server):
    """End a server and all its connections at once, as if its process had been killed."""
    http = server._server
    http._stopping.set()
    with contextlib.suppress(OSError):
        http._listener.shutdown(socket.SHUT_RDWR)
    for wire in [*http._placed, *http._waiting]:
        wire.cut()
    server.stop()


class _Mortal(Sessions):
    """Those of a load that may die: no connection says goodbye, and none is made any more."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self._clients, self._dead = [], False
        if isinstance(self._relay, _Watched):
            self._relay.replica.sessions = self

    def _connect(self, address):
        client = super()._connect(address)
        self._clients.append(client)
        if self._dead:
            client.cut()
        return client

    def die(self):
        self._dead = True
        for client in [*self._clients]:
            client.cut()
        self._queue.succeeded()


class _Watched(Relay):
    def __init__(self, replica, offer):
        super().__init__(replica.server, offer)
        self.replica = replica

    def begin(self, store, *rest):
        super().begin(store, *rest)
        self.replica.filling = store


@contextlib.contextmanager
def fleet(way, count, model=many_rows, name="replica", **config):
    """Replicas whose servers listen and that have not begun to load."""
    usual = {"source_wait": 20.0, "max_sessions": 8, **PATIENT}
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(load, "Sessions", _Mortal))
        replicas = []
        for number in range(count):
            its = settings(way, **usual | config)
            server = WeightServer(its, 0, HOST)
            server.process = f"{name} {number}"
            stack.callback(server.stop)
            server.start(0)
            replicas.append(Replica(way, server.process, model, its, server))
        yield replicas


def load_and_relay(way, sources, *arguments, **config):
    """In a process of its own: be one of a fleet, also when the load is over.

    Returns where the weights came from, and what was passed on until then.
    """
    stack = contextlib.ExitStack()
    name = f"process {os.getpid()}"
    [replica] = stack.enter_context(fleet(way, 1, *arguments, name=name, **config))
    here["relay"] = stack
    replica.start(sources)
    replica.check()
    return replica.gave, replica.server.bytes_sent
