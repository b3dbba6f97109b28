"""What reads the tensors of a checkpoint from the ranks of an instance.

They go into memory of their own, ahead of who takes them, or straight into a model's parameters.
"""

import contextlib
import random
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from .. import metrics
from ..config import NetLoaderConfig
from ..errors import LoadFailed, SourceBusy, SourceError, SourceLost, SourceRefused
from ..executor.chunks.digests import of_instance
from ..executor.memory import host_view
from ..executor.view.boxes import box_of
from ..executor.view.fetch import Fetch, Part, Request, pieces, requests
from ..executor.view.places import InPlace, Place, put, values_of
from ..executor.view.records import Records, Seen, dtype_of, nbytes_of
from ..identity import ModelIdentity
from ..interaction import api
from ..interaction.api import Code, Done, Join, Region
from ..interaction.client import ElasticClient
from ..utils import Address, Buffer, logger, one_line, rate, shortened, size
from .sessions import connect

_ANSWER = 8 << 20  # bytes of one answer
_AT_ONCE = 1 << 20  # bytes of it that are read, hashed and put in their places one after the other
_AHEAD = 64 << 20  # bytes that come before they are read
_ASKED = 2  # answers that a connection waits for, so that the source makes one while one is read
_SHORT = 256  # parts of a request that a source need not read while it sends an answer
_OVERDUE = 3  # times PROGRESS_TIMEOUT for one answer to come, whatever comes now and then
_LOST = 3  # connections in a row that may be lost without that anything came
_LEAST_RATE = 1_000_000  # bytes per second of a connection, over a minute of waiting for answers
_PACE_SECONDS = 60.0
PAUSE = 0.5, 1.0  # seconds until a source that is busy is asked again

Weights: TypeAlias = Iterator[tuple[str, torch.Tensor]]


@dataclass(frozen=True)
class Rank:
    """One rank of an instance.

    Attributes:
        address: where it listens.
        weights: digest of what it has.
        records: what of the checkpoint that is.
    """

    address: Address
    weights: str
    records: Records


@contextlib.contextmanager
def connected(
    address: Address, identity: ModelIdentity, config: NetLoaderConfig, weights: str, instance: str
) -> Iterator[ElasticClient]:
    """Join a rank for its view of a checkpoint.

    Args:
        address: where the rank listens.
        identity: of the rank that loads.
        config: deadlines, credentials.
        weights: digest of what it has to have.
        instance: digest of what all ranks have to have.

    Raises:
        SourceError: it gives none, or none of these weights.
    """
    with connect(address, config) as client:
        now = client.join(Join(identity, view=True))
        if now.weights != weights:
            raise SourceRefused(f"{address}: its weights are {now.weights} now, and not {weights}")
        _compare(address, now.ranks, instance)
        yield client


def _compare(address: Address, ranks: Mapping[int, str], instance: str) -> None:
    """Refuse ranks of which some have the weights of before a change and some those of after."""
    if (now := of_instance(ranks)) != instance:
        raise SourceRefused(f"{address}: its instance has {now} now, and not {instance}")


def confirm(
    ranks: Sequence[Rank], identity: ModelIdentity, config: NetLoaderConfig, instance: str
) -> None:
    """Ask each rank once more whether all of them still have the same weights as before.

    Raises:
        SourceError: they have not, or one does not answer.
    """
    for rank in ranks:
        with connect(rank.address, config) as client:
            models = client.status().models
        now = [model.ranks for model in models if model.identity.group == identity.group]
        _compare(rank.address, now[0] if now else {}, instance)


class _Pace:
    """How fast answers come over one connection."""

    def __init__(self) -> None:
        self._nbytes, self._seconds = 0, 0.0

    def came(self, address: Address, nbytes: int, seconds: float) -> None:
        """Count an answer.

        Raises:
            SourceRefused: for a long time they have come so slowly that others may be faster.
        """
        self._nbytes += nbytes
        self._seconds += seconds
        if self._seconds < _PACE_SECONDS:
            return
        if self._nbytes < _LEAST_RATE * self._seconds:
            came = rate(self._nbytes, self._seconds)
            least = rate(_LEAST_RATE, 1)
            raise SourceRefused(f"{address}: too slow: {came} over a minute; at least {least}")
        self._nbytes, self._seconds = 0, 0.0


class _Memory:
    """Memory for tensors: what nobody has any more is used again, as to find pages takes long."""

    def __init__(self) -> None:
        # By `id`. What gives memory back may run within anything, so no lock is held for this.
        self._free: dict[int, NDArray[np.uint8]] = {}
        self._most = _AHEAD

    def tensor(self, seen: Seen) -> torch.Tensor:
        """Return a tensor of any values: what is not fetched of it is not read.

        One thread at a time may ask.
        """
        nbytes = nbytes_of(seen.shape, seen.dtype)
        fit = [one for one in [*self._free.values()] if nbytes <= one.nbytes <= 2 * nbytes]
        # numpy takes large pages for large ones.
        whole = self._free.pop(id(min(fit, key=len))) if fit else np.empty(nbytes, dtype=np.uint8)
        mine = whole[:nbytes]
        # Whatever is made of it keeps it alive.
        weakref.finalize(mine, self._give_back, whole).atexit = False
        return _tensor_of(mine, seen)

    def _give_back(self, whole: NDArray[np.uint8]) -> None:
        if sum(one.nbytes for one in [*self._free.values()]) + whole.nbytes <= self._most:
            self._free[id(whole)] = whole

    def close(self) -> None:
        """Keep nothing for tensors to come."""
        self._most = 0
        self._free.clear()


class Reader:
    """Reads the tensors of a checkpoint from ranks, while it is used as a context.

    Args:
        fetch: what of the tensors is read.
        ranks: those that have it, as they are numbered there.
        instance: digest of what they have.
        identity: of the rank that loads.
        config: deadlines, connections.
        model: where everything goes; None: into memory that is made for it.

    Attributes:
        failure: why nothing more comes; empty: there is no failure.
    """

    def __init__(
        self,
        fetch: Fetch,
        ranks: Sequence[Rank],
        instance: str,
        identity: ModelIdentity,
        config: NetLoaderConfig,
        model: InPlace | None = None,
    ) -> None:
        self.failure = ""
        self._model = model
        self._fetch = fetch
        self._ranks = ranks
        self._instance = instance
        self._identity = identity
        self._config = config
        self._changed = threading.Condition()
        self._over = False
        self._asked: list[list[Request]] = [
            one[::-1] for one in requests(fetch, _ANSWER, api.MAX_REGIONS)
        ]
        self._left, self._needed = Counter[int](), Counter[int]()  # parts, bytes of each tensor
        for part in (part for parts in fetch.parts for part in parts):
            self._needed[part.tensor] += part.nbytes
        for request in (request for asked in self._asked for request in asked):
            self._left.update(part.tensor for part in request.parts)
        # The tensor that is taken next; all are wanted at once where nobody takes any.
        self._at = 0 if model is None else len(fetch.tensors)
        self._read = 0  # bytes that the tensors before it needed
        self._tensors: dict[int, torch.Tensor] = {}  # those of which something has come
        self._memory = _Memory()
        self._clients: set[ElasticClient] = set()
        self._gave: Counter[Address] = Counter()
        self._progress = time.monotonic()
        self._threads = [
            threading.Thread(
                target=self._work,
                args=(number, index > 0),
                name=f"netloader-view-{number}-{index}",
                daemon=True,
            )
            for number, asked in enumerate(self._asked)
            for index in range(min(config.connections, len(asked)))
        ]

    def __enter__(self) -> "Reader":
        for thread in self._threads:
            try:
                thread.start()
            except RuntimeError as error:  # no more threads
                self._fail(one_line(error))
                break
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._over = True
            self._changed.notify_all()
            for client in self._clients:
                client.cut()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()
        self._memory.close()

    def shares(self) -> str:
        """Return the ranks with what each gave, for the log."""
        if len(self._gave) == 1:
            return str(*self._gave)
        return ", ".join(f"{address} ({size(gave)})" for address, gave in self._gave.items())

    def finish(self) -> None:
        """Return once everything is where the model has it.

        Raises:
            LoadFailed: nothing more comes.
        """
        with self._changed:
            for number in self._left:
                self._changed.wait_for(partial(self._has, number))
            if self.failure:
                raise LoadFailed(self.failure)

    def tensors(self) -> Weights:
        """Yield all tensors in order, each once everything of it is here that is read.

        Raises:
            LoadFailed: nothing more comes.
        """
        for number, seen in enumerate(self._fetch.tensors):
            with self._changed:
                self._at = number
                self._changed.notify_all()
                self._changed.wait_for(partial(self._has, number))
                if self.failure:
                    raise LoadFailed(self.failure)
                tensor = self._tensors.pop(number, None)
                self._read += self._needed[number]
            if tensor is None:
                tensor = _zeros(seen)
            for box, kept in self._fetch.kept.get(number, {}).items():
                box_of(tensor, box).copy_(values_of(kept, tensor.dtype))
            yield seen.name, tensor

    def _has(self, number: int) -> bool:
        return not self._left[number] or bool(self.failure)

    def _work(self, number: int, further: bool) -> None:
        """Fetch what one rank has to give; `further`: others do, if this one cannot connect."""
        rank = self._ranks[number]
        staging = torch.empty(_AT_ONCE, dtype=torch.uint8)
        pace = _Pace()
        lost = 0  # connections in a row over which nothing came
        try:
            while self._waits(number, None):
                try:
                    with self._connected(rank) as client, self._outstanding(number) as asked:
                        further = False  # what it asks for, others may not be there to ask for
                        while self._ask(client, number, asked):
                            self._bring(client, rank, asked, staging, pace)
                            lost = 0
                        complete = not self._asked[number]
                        client.done(Done(complete, "" if complete else "waits for the model"))
                except SourceBusy as error:
                    if further or error.code != Code.BUSY.text or not self._may_wait():
                        raise
                    time.sleep(random.uniform(*PAUSE))
                except SourceLost as error:
                    lost += 1
                    if further or error.code or lost > _LOST:
                        raise
                    logger.debug("NetLoader: connecting again: %s", said_of(rank.address, error))
                    time.sleep(random.uniform(*PAUSE))
        except Exception as error:
            if not further or not isinstance(error, SourceError):
                self._fail(said_of(rank.address, error))

    @contextlib.contextmanager
    def _connected(self, rank: Rank) -> Iterator[ElasticClient]:
        joined = connected(rank.address, self._identity, self._config, rank.weights, self._instance)
        with joined as client:
            with self._changed:
                self._clients.add(client)
                if self._over:
                    client.cut()
            try:
                yield client
            finally:
                with self._changed:
                    self._clients.discard(client)

    def _may_wait(self) -> bool:
        """Return whether a rank may be waited for that has no place free."""
        return time.monotonic() < self._progress + self._config.source_wait

    def _waits(self, number: int, seconds: float | None) -> bool:
        """Wait until something of a rank is to be fetched; return whether there is anything."""

        def ready() -> bool:
            asked = self._asked[number]
            if self._over or self.failure or not asked:
                return True
            first = asked[-1]
            return first.parts[0].tensor <= self._at or first.start < self._read + _AHEAD

        with self._changed:
            found = self._changed.wait_for(ready, seconds)
            return found and not self._over and not self.failure and bool(self._asked[number])

    def _next(self, number: int, seconds: float) -> Request | None:
        """Return what is asked for next; None: nothing for so long."""
        while self._waits(number, seconds):
            with self._changed:
                if self._asked[number]:  # no other thread was faster
                    return self._asked[number].pop()
        return None

    @contextlib.contextmanager
    def _outstanding(self, number: int) -> Iterator[deque[Request]]:
        """Yield what is asked for over a connection; what does not come is for another one."""
        asked: deque[Request] = deque()
        try:
            yield asked
        finally:
            with self._changed:
                self._asked[number] += reversed(asked)
                self._changed.notify_all()

    def _ask(self, client: ElasticClient, number: int, asked: deque[Request]) -> bool:
        """Ask for what comes next; return False if a place is to be given free for now."""
        patience = self._config.progress_timeout / 3
        while len(asked) < _ASKED:
            if (request := self._next(number, 0.0 if asked else patience)) is None:
                break
            if asked and len(request.parts) > _SHORT:
                with self._changed:
                    self._asked[number].append(request)
                break
            asked.append(request)
            regions = [
                Region(part.parameter, part.offset, [*part.box.size], [*part.stride])
                for part in request.parts
            ]
            client.ask_regions(self._ranks[number].weights, regions)
        return bool(asked)

    def _bring(
        self,
        client: ElasticClient,
        rank: Rank,
        asked: deque[Request],
        staging: torch.Tensor,
        pace: "_Pace",
    ) -> None:
        """Receive what was asked for first, and put it where it belongs."""
        request = asked[0]
        nbytes = request.nbytes
        started = time.monotonic()
        with client.ended_after(_OVERDUE * self._config.progress_timeout):
            client.receive_regions(nbytes, self._places(request, staging))
        asked.popleft()
        pace.came(rank.address, nbytes, time.monotonic() - started)
        metrics.count(metrics.RECEIVED_BYTES, "serving", by=nbytes)
        with self._changed:
            self._gave[rank.address] += nbytes
            self._progress = time.monotonic()
            self._left.subtract(part.tensor for part in request.parts)
            self._changed.notify_all()

    def _places(self, request: Request, staging: torch.Tensor) -> Iterator[list[Buffer]]:
        """Yield where the elements of a request go, piece by piece.

        That is where they belong if they follow each other there, and else `staging`, from which
        they are copied once they have come.
        """
        for piece in pieces(request.parts, _AT_ONCE, api.MAX_REGIONS):
            views: list[Buffer] = []
            staged = []
            at = 0
            for part in piece:
                places = self._places_of(part)
                if (memory := _memory_for(part, places)) is None:
                    memory = staging[at : at + part.nbytes]
                    at += part.nbytes
                    staged.append((part, places, memory))
                views.append(host_view(memory))
            yield views
            for part, places, memory in staged:
                came = _elements(memory, part.through[-1]).reshape(part.box.size)
                put(places, part.box, came.to(dtype_of(part.through[0])))

    def _places_of(self, part: Part) -> list[Place]:
        """Return where what comes of a tensor goes."""
        seen = self._fetch.tensors[part.tensor]
        if self._model is not None:
            return self._model.places(seen, part.box)
        return [Place(part.box, box_of(self._target(part), part.box), (seen.dtype,))]

    def _target(self, part: Part) -> torch.Tensor:
        with self._changed:
            if (known := self._tensors.get(part.tensor)) is None:
                known = self._memory.tensor(self._fetch.tensors[part.tensor])
                self._tensors[part.tensor] = known
            return known

    def _fail(self, why: str) -> None:
        with self._changed:
            if not self._over:  # else it was cut on this side
                self.failure = self.failure or why
            self._changed.notify_all()


def _memory_for(part: Part, places: Sequence[Place]) -> torch.Tensor | None:
    """Return the memory into which a part can come as it travels."""
    if len(part.through) > 1 or len(places) != 1:
        return None
    place = places[0]
    as_it_is = len(place.through) == 1 and place.box == part.box
    return place.memory if as_it_is and place.memory.is_contiguous() else None


def _zeros(seen: Seen) -> torch.Tensor:
    """Return a tensor of zeros in memory that is not touched, which torch would do."""
    return _tensor_of(np.zeros(nbytes_of(seen.shape, seen.dtype), dtype=np.uint8), seen)


def _tensor_of(memory: NDArray[np.uint8], seen: Seen) -> torch.Tensor:
    return torch.from_numpy(memory).view(dtype_of(seen.dtype)).reshape(seen.shape)


def _elements(memory: torch.Tensor, dtype: str) -> torch.Tensor:
    kind = dtype_of(dtype)
    if memory.storage_offset() % kind.itemsize:
        memory = memory.clone()
    return memory.view(kind)


def said_of(address: Address, error: Exception) -> str:
    """Return what went wrong with a source as a line that begins with its address."""
    if isinstance(error, SourceError):
        said = one_line(error)
        return said if said.startswith(f"{address}: ") else f"{address}: {said}"
    logger.debug("NetLoader: %s", address, exc_info=error)
    return f"{address}: {type(error).__name__}: {shortened(one_line(error))}"
