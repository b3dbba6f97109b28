"""The client's story: from a list of sources to a store filled with verified blocks."""

import contextlib
import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from . import metrics
from .config import MIB, NetLoaderConfig, Transport
from .errors import (
    ChosenToRead,
    LayoutUnsupported,
    LoadFailed,
    MakesRoom,
    ProtocolError,
    SourceBusy,
    SourceError,
    SourceLost,
    SourceRefused,
    SourceUnreachable,
    TransferCorrupt,
    Withdrawn,
)
from .executor.chunks.blocks import Blocks, Run
from .executor.chunks.digests import combine, is_one_of, of_instance
from .executor.chunks.manifest import NO_MEANING, Manifest, Sample
from .executor.devices import Accelerator, Device
from .executor.elastic_load import P2PLoad, Receiver
from .executor.model.match import match
from .executor.scheduler import Peer, Scheduler
from .executor.store import BlockStore
from .executor.transport.group import CLIENT, GroupReceiver, TransferGroup, form_group
from .executor.transport.http import HttpReceiver
from .identity import ModelIdentity, Revision
from .interaction import api
from .interaction.api import Code, Done, Join, Joined
from .interaction.cold_start import Choice, Election, Phase, Seen
from .interaction.discovery import NOBODY, Discovery, Own
from .interaction.elastic import ElasticClient, GroupControl
from .interaction.source_queue import SourceQueue
from .utils import Address, Name, logger, one_line, parse_address, rate, shortened, size

# Sizes of a chunk where CHUNK_MIB says nothing. An operation of HCCL or NCCL costs as much as some
# hundred KiB of their links' time. Over HTTP a request costs each end 0.1 to 0.2 ms, and a run is
# checked while the cache still has it.
_CHUNK_MIB, _CHUNK_MIB_GROUP = 8, 16
# Seconds between two questions for others that get the same weights: at first, and at most.
_FIRST_QUESTION, _LAST_QUESTION = 1.0, 10.0
# Seconds between two look-ups of names: at first, and at most.
_FIRST_LOOK_UP, _LAST_LOOK_UP = 0.5, 10.0
# At most, while others may decide who reads the disk, or somebody does.
_COLD_LOOK_UP = 1.0
# Connections for news that are made anew in a session, as they hold no place at the source.
_NEWS_AGAIN = 2
# Sources pulled from at once through groups, unless SOURCE lists more of them: each group takes
# memory of the device and seconds to form.
_PARENTS = 2
# Seconds, at least and at most, after which an incomplete source is asked to form a group again.
_FORM_AGAIN = 0.02, 0.1
# Seconds without news in a group after which another source is asked, with which one has to form.
_TRY_ANOTHER = 3.0
# Seconds to wait for a group that this rank forms with another one.
_TURN = 2.0
# Times PROGRESS_TIMEOUT for a run to come from a source that may send a byte now and then.
_OVERDUE = 3
_ITSELF = "this is the instance itself"
# What a failure without a code is called among the metrics; the first that fits.
_KINDS = {
    SourceUnreachable: "unreachable",
    SourceLost: "lost",
    MakesRoom: "left",
    SourceBusy: "later",
    ProtocolError: "protocol_error",
    TransferCorrupt: "wrong_bytes",
}


@dataclass(frozen=True)
class Loaded:
    """What a load has come to.

    Attributes:
        store: the complete store.
        sources: those that gave it, and how much if they are several.
        lists: the weights digests of the ranks of instances that have these weights.
    """

    store: BlockStore
    sources: str
    lists: Sequence[Mapping[int, str]] = ()


class Relay(Protocol):
    """What a load passes on while it goes on; see `serve.Relay`."""

    @property
    def peer(self) -> api.Peer:
        """This rank as others know it."""

    def begin(
        self,
        store: BlockStore,
        met: Callable[[str, api.Peer], object],
        ranks: Callable[[], Mapping[int, str]],
        feeds: Callable[[], list[api.Feed]],
    ) -> None:
        """Pass on what comes to a store, and tell of those who get the same weights."""

    def know(self, weights: str, address: Address, instance: str, *, complete: bool) -> None:
        """Name a source to others; `complete`: it has every block."""

    def end(self, *, complete: bool) -> None:
        """Pass nothing on any more."""

    @property
    def connecting(self) -> threading.Lock:
        """Held while this rank forms a group as a client: none with its own clients then."""

    @property
    def bytes_sent(self) -> int:
        """Bytes of blocks that were passed on."""


@dataclass(frozen=True)
class ColdStart:
    """How a load takes part where none of the instances that names stand for has the weights.

    Attributes:
        can_read: whether this instance would read its disk for all.
        announce: says how far the load is to whoever asks for the status.
        tell: tells the instance's other ranks what this one has chosen.
        told: returns what the rank that chooses has told; None: this one chooses.
    """

    can_read: bool
    announce: Callable[[Phase], object]
    tell: Callable[[Choice], object] = lambda choice: None
    told: Callable[[], Choice | None] | None = None


def elastic_load(
    tensors: Mapping[str, torch.Tensor],
    required: Collection[str],
    sources: Sequence[Address | Name],
    identity: ModelIdentity,
    config: NetLoaderConfig,
    device: Device,
    *,
    worker: int = 0,
    wanted: str | None = None,
    meaning: Mapping[str, str] = NO_MEANING,
    made: Mapping[str, Sample] | None = None,
    own: Own = NOBODY,
    relay: Relay | None = None,
    cold: ColdStart | None = None,
    show_progress: bool = False,
    place: Callable[[Manifest], Sequence[torch.Tensor]] | None = None,
) -> Loaded:
    """Fill a model from the first sources that have it.

    Up to `config.max_sources` sources are pulled from at once. When one is lost, the next in order
    takes its place, and only the runs of blocks that were on their way are fetched again.

    Args:
        tensors: name -> tensor of the model; their memory is written, and replaced where it has a
            format of its own.
        required: names among them that a source must have.
        sources: where to look, in order of preference. What names stand for comes after addresses
            and is looked up again while there is nobody left to ask.
        identity: what the sources must be.
        config: chunk size, deadlines, verification.
        device: where the tensors are.
        worker: number of this process among all workers of the instance, for the log.
        wanted: the weights that go with those of the instance's other ranks; None: not known.
        meaning: what decided what the tensors are; see `Manifest`.
        made: samples of what the model has made itself; None: they are not compared.
        own: what names may stand for and is not asked.
        relay: lets others have what has come while the rest is on its way. It is used where digests
            are checked.
        cold: lets instances that start together choose one that reads the disk; None: this one
            takes no part.
        show_progress: whether to draw a progress bar.
        place: returns memory for a manifest's tensors, in the place of a model's; what is right
            already in it is not fetched. None: they go to `tensors`.

    Raises:
        ChosenToRead: no instance has the weights, and this one is to read them from disk.
        LoadFailed: no source gave the whole model; the tensors' contents are undefined.
    """
    started = time.monotonic()
    addresses = [source for source in sources if isinstance(source, Address)]
    names = [source for source in sources if isinstance(source, Name)]
    limit = config.max_sources
    if _in_groups(device, config):
        limit = min(limit, max(_PARENTS, len(addresses)))
    # One that only others have named, and that is slow, is not to keep a source waiting.
    queue = SourceQueue(addresses, config.source_wait, most_hearsay=max(1, limit - 1))
    if not config.verify:
        relay = None
    target = _Target(tensors, required, identity, config, device, meaning, made, relay, cold, place)
    sessions = _Sessions(queue, target, identity, config, device, worker, wanted, relay)
    threads = [
        threading.Thread(target=sessions.work, name=f"netloader-load-{index}", daemon=True)
        for index in range(limit if names or relay is not None else min(limit, len(sources)))
    ]
    if names:
        discovery = Discovery(
            names,
            identity,
            own,
            config.connect_timeout,
            config.handshake_timeout,
            config.credentials,
            electing=cold is not None and cold.told is None,
        )
        search = _Search(discovery, sessions, target, queue, cold, own.process, worker)
        search.look_up()
        looking = threading.Thread(
            target=search.keep_looking, name="netloader-look-up", daemon=True
        )
        with contextlib.suppress(RuntimeError):  # no more threads: what was found has to do
            looking.start()
    if relay is not None:
        asking = threading.Thread(
            target=sessions.keep_asking, name="netloader-load-peers", daemon=True
        )
        with contextlib.suppress(RuntimeError):  # no more threads: the answers to joins have to do
            asking.start()
    for thread in threads:
        with contextlib.suppress(RuntimeError):  # no more threads: those that are there do
            thread.start()
    received = 0
    with _ProgressBar(started) if show_progress else contextlib.nullcontext() as bar:
        while not queue.over.wait(0.1) and any(thread.is_alive() for thread in threads):
            if (came := sessions.bytes_received()) > received:
                received = came
                queue.progressed()
            sessions.cut_overdue()
            if bar is not None:
                bar.show(received, target.nbytes, sessions.peers())
        if bar is not None:
            bar.show(sessions.bytes_received(), target.nbytes, sessions.peers())
    # A thread that still waits for a slow source ends by that source's deadline. It writes to no
    # tensor any more: it takes runs from the scheduler first, and there are none.
    queue.succeeded()
    try:
        store = target.complete()
    except RuntimeError as error:
        raise LoadFailed(f"after all weights had come: {one_line(error)}") from None
    if store is None and target.chosen:
        raise ChosenToRead("this instance was chosen to read the disk, as no other has the weights")
    if store is None:
        raise LoadFailed("; ".join(queue.reasons()) or "there are no sources")
    loaded = Loaded(store, sessions.shares(), target.lists)
    seconds = time.monotonic() - started
    logger.info(
        "NetLoader rank %d: loaded %d tensors, %s in %.2f s (%s) from %s, weights digest %s%s",
        worker,
        len(store.tensors),
        size(store.blocks.nbytes),
        seconds,
        rate(store.blocks.nbytes, seconds),
        loaded.sources,
        store.digests.weights + ("" if config.verify else " (not checked)"),
        sessions.relayed(),
    )
    return loaded


def connect(address: Address, config: NetLoaderConfig) -> ElasticClient:
    """Connect as a client with this configuration does.

    Raises:
        SourceUnreachable: it cannot be reached.
    """
    return ElasticClient.connect(
        address,
        connect=config.connect_timeout,
        handshake=config.handshake_timeout,
        progress=config.progress_timeout,
        credentials=config.credentials,
    )


class _ProgressBar:
    """A progress bar, from when the size is known; log lines meanwhile get lines of their own."""

    def __init__(self, started: float) -> None:
        self._started = started
        self._bar: tqdm[None] | None = None
        self._lines = logging_redirect_tqdm([logging.getLogger("vllm")])

    def __enter__(self) -> "_ProgressBar":
        self._lines.__enter__()
        return self

    def __exit__(self, *failure: Any) -> None:
        if self._bar is not None:
            self._bar.close()
        self._lines.__exit__(*failure)

    def show(self, received: int, total: int, peers: int) -> None:
        """Bring the bar up to date."""
        if self._bar is None and total:
            self._bar = tqdm(
                total=total, desc="Loading weights from peers", unit="B", unit_scale=True
            )
            self._bar.start_t = time.time() - (time.monotonic() - self._started)
        if self._bar is not None:
            self._bar.set_postfix(peers=peers, refresh=False)
            self._bar.update(received - self._bar.n)


class _Postponed(Exception):
    """A source has other weights than those that come from other sources just now."""


class _Target:
    """The store that all sessions of a load fill, once the first source has said what it is."""

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        required: Collection[str],
        identity: ModelIdentity,
        config: NetLoaderConfig,
        device: Device,
        meaning: Mapping[str, str],
        made: Mapping[str, Sample] | None,
        relay: Relay | None,
        cold: ColdStart | None,
        place: Callable[[Manifest], Sequence[torch.Tensor]] | None,
    ) -> None:
        self._tensors = tensors
        self._place = place
        self._relay = relay
        self._cold = cold
        self.chosen = False
        self.met: Callable[[str, api.Peer], object] = lambda weights, peer: None
        self.feeds: Callable[[], list[api.Feed]] = list
        self._required = required
        self._meaning = meaning
        self._made = made
        self._identity = identity
        self._config = config
        self._device = device
        self._lock = threading.Lock()
        self._store: BlockStore | None = None
        self._scheduler: Scheduler | None = None
        self._sessions = 0
        self.lists: list[Mapping[int, str]] = []
        self._over = threading.Event()
        self._prefaulting: threading.Thread | None = None
        # As they are when in use; while they are filled they have none.
        self._formats = {
            name: form
            for name, tensor in tensors.items()
            if (form := device.format_of(tensor)) is not None
        }
        self._restore: Callable[[], None] | None = None

    @property
    def nbytes(self) -> int:
        """Number of bytes to receive, 0 while that is not known."""
        return self._store.blocks.nbytes if self._store else 0

    @property
    def weights(self) -> str | None:
        """Digest of the weights that are being loaded, None before the first source has told."""
        return self._store.digests.weights if self._store else None

    def announce(self, phase: Phase) -> bool:
        """Say how far a load is to which nothing has come; return whether that is so.

        If it reads the disk, nothing is to come any more.
        """
        with self._lock:
            if self._store is not None or self._cold is None:
                return False
            self._cold.announce(phase)
            if phase is Phase.READING:
                self.chosen = True
                self._over.set()
            return True

    @contextlib.contextmanager
    def agreed(self, address: Address, joined: Joined) -> Iterator[tuple[BlockStore, Scheduler]]:
        """Take the first source's weights as this load's, and any later one's if they are the same.

        Raises:
            SourceRefused: the weights do not fit this model.
            _Postponed: other weights are coming from other sources.
        """
        with self._lock:
            if self._over.is_set():
                # The model belongs to the caller again: nothing may be written to it any more.
                raise SourceRefused(f"{address}: answered after the model was complete")
            if joined.weights != self.weights:
                if self._sessions:
                    raise _Postponed(
                        f"{address}: its weights ({joined.weights}) are not those that are being "
                        "loaded from other sources"
                    )
                # Nobody is left who has the weights begun with, if any: start over with these.
                self._begin(address, joined)
            store, scheduler = self._store, self._scheduler
            assert store is not None
            assert scheduler is not None
            self._sessions += 1
            if joined.ranks not in self.lists:
                self.lists.append(joined.ranks)
        try:
            yield store, scheduler
        finally:
            with self._lock:
                self._sessions -= 1

    def complete(self) -> BlockStore | None:
        """Give the tensors the formats that inference uses, once every block is here.

        Returns:
            The store, which is complete, or None if a block is missing.

        Raises:
            RuntimeError: the device failed.
        """
        with self._lock:
            self._over.set()
        # No circle is left, so that what a load takes of a device goes with it.
        self.met, self.feeds = (lambda weights, peer: None), list
        if self._prefaulting is not None:
            self._prefaulting.join()  # the memory may go when this returns
        store = self._store
        complete = store is not None and store.complete
        if self._relay is not None:
            self._relay.end(complete=complete)
        if store is None or not complete:
            return None
        if self._restore is not None:
            store.withdraw(Withdrawn("its formats are changing"))
            self._restore()
        self._device.synchronize()
        self._device.empty_cache()
        return store.with_tensors(store.tensors)

    def _begin(self, address: Address, joined: Joined) -> None:
        if joined.manifest is msgspec.UNSET or joined.blocks is msgspec.UNSET:
            raise SourceRefused(f"{address}: sent no manifest")
        try:
            manifest = msgspec.json.decode(joined.manifest, type=Manifest)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise SourceRefused(f"{address}: not a valid manifest: {one_line(error)}") from None
        here, there = self._identity.layout, manifest.layout
        if here != there:
            raise SourceRefused(f"{address}: layout is {here!r} here and {there!r} there")
        try:
            tensors = (self._place or self._match)(manifest)
            blocks = Blocks([tensor.nbytes for tensor in tensors])
            algorithm = joined.weights.partition(":")[0]
            digests = combine(algorithm, manifest, blocks, joined.blocks)
            if self._restore is None:
                self._restore = self._device.writable(tensors)
        except (LayoutUnsupported, ProtocolError) as error:
            raise SourceRefused(f"{address}: {error}") from None
        if digests.weights != joined.weights:
            raise TransferCorrupt(
                f"{address}: manifest and block digests make {digests.weights}, and the source "
                f"says {joined.weights}"
            )
        self._prefault(tensors)
        if self._cold is not None:
            self._cold.announce(Phase.LOADING)
        self._store = BlockStore(manifest, blocks, tensors, digests, self._device, complete=False)
        self.lists = []
        groups = _in_groups(self._device, self._config)
        chunk_mib = self._config.chunk_mib or (_CHUNK_MIB_GROUP if groups else _CHUNK_MIB)
        shuffle = random.shuffle if self._relay is not None else None
        self._scheduler = Scheduler(blocks, chunk_mib * MIB, shuffle)
        for run in self._scheduler.wanted if self._place is not None else ():
            if not self._store.wrong(run):
                self._store.add(run)
                self._scheduler.skip(run)
        if self._relay is not None:
            self._relay.begin(self._store, self.met, self._list, self.feeds)

    def _match(self, manifest: Manifest) -> Sequence[torch.Tensor]:
        return match(
            manifest, self._tensors, self._required, self._formats, self._meaning, self._made
        )

    def _list(self) -> Mapping[int, str]:
        """Return what the first source that knows has said of its instance's ranks."""
        return next(filter(None, [*self.lists]), {})

    def _prefault(self, tensors: Sequence[torch.Tensor]) -> None:
        if self._prefaulting is not None:
            return

        def prefault() -> None:
            try:
                self._device.prefault(tensors, self._over)
            except Exception:  # only speed is lost
                logger.debug("NetLoader: cannot prefault memory", exc_info=True)

        thread = threading.Thread(target=prefault, name="netloader-prefault", daemon=True)
        with contextlib.suppress(RuntimeError):  # no more threads: only speed is lost
            thread.start()
            self._prefaulting = thread


class _Sessions:
    """What the threads of one load do: ask one source after the other, and pull from it."""

    def __init__(
        self,
        queue: SourceQueue,
        target: _Target,
        identity: ModelIdentity,
        config: NetLoaderConfig,
        device: Device,
        worker: int,
        wanted: str | None,
        relay: Relay | None,
    ) -> None:
        self._queue = queue
        self._relay = relay
        self._peer = relay.peer if relay is not None else None
        target.met = self._met
        target.feeds = self.feeds
        self._target = target
        self._identity = identity
        self._config = config
        self._device = device
        self._worker = worker
        self._wanted = wanted
        self._lock = threading.Lock()
        # By source and weights digest: those that go on, and the bytes of those that are over.
        self._pulls: list[tuple[tuple[Address, str], P2PLoad]] = []
        self._gave: Counter[tuple[Address, str]] = Counter()
        self._untrusted: list[tuple[Address, _HttpSession, Scheduler]] = []
        self._relays: set[tuple[Address, str]] = set()  # those that were incomplete
        # What sources that SOURCE names have, and their lists of ranks. Those that others name may
        # have nothing else, and their own lists do not count.
        self._vouched: dict[str, Mapping[int, str]] = {}

    def work(self) -> None:
        """Pull from one source after the other until the store is complete or none is left."""
        with self._device.attached():
            while (address := self._queue.next()) is not None:
                self._try(address)

    def keep_asking(self) -> None:
        """Ask now and then who else gets the same weights, until the load is over."""
        pause = _FIRST_QUESTION
        while not self._queue.over.wait(pause):
            pause = min(2 * pause, _LAST_QUESTION)
            with self._lock:
                origins = [origin for origin, _ in self._pulls]
            if not origins:
                continue
            address, weights = random.choice(origins)
            try:
                with self._connect(address) as client:
                    peers = client.peers(weights)
            except (SourceError, RuntimeError) as error:  # RuntimeError: no more threads
                logger.debug("NetLoader: asking for peers: %s", one_line(error))
            else:
                for peer in peers:
                    self._met(weights, peer)

    def cut_overdue(self) -> None:
        """End sessions with sources that SOURCE does not name and whose blocks never come."""
        longest = _OVERDUE * self._config.progress_timeout
        with self._lock:
            untrusted = [*self._untrusted]
        for address, session, scheduler in untrusted:
            if scheduler.held_for(session.peer) > longest:
                session.cut(SourceLost(f"{address}: no blocks for {longest:g} s"))

    def peers(self) -> int:
        """Return the number of sources that are pulled from just now."""
        with self._lock:
            return len({address for (address, _), _ in self._pulls})

    def feeds(self) -> list[api.Feed]:
        """Return what each source has given so far."""
        return [api.Feed(str(address), nbytes) for address, nbytes in self._shares().items()]

    def relayed(self) -> str:
        """Return what came from those that were loading themselves and what they got, if any."""
        if self._relay is None:
            return ""
        with self._lock:
            relays = {address for address, weights in self._relays}
        came = sum(nbytes for address, nbytes in self._shares().items() if address in relays)
        passed_on = self._relay.bytes_sent
        if not came and not passed_on:
            return ""
        return f", relayed {size(came)} in and {size(passed_on)} out"

    def bytes_received(self) -> int:
        """Return the bytes that have come, at most what there is to come."""
        return min(sum(self._shares().values()), self._target.nbytes)

    def shares(self) -> str:
        """Return the sources with what each gave, for the log."""
        gave = {address: nbytes for address, nbytes in self._shares().items() if nbytes}
        if len(gave) == 1:
            return str(*gave)
        return ", ".join(f"{address} ({size(nbytes)})" for address, nbytes in gave.items())

    def _shares(self) -> dict[Address, int]:
        """Return what each source gave of the weights that are being loaded."""
        with self._lock:
            gave = self._gave.copy()
            for origin, pull in self._pulls:
                gave[origin] += pull.bytes_received
        wanted = self._target.weights
        return {address: nbytes for (address, weights), nbytes in gave.items() if weights == wanted}

    def _try(self, address: Address) -> None:
        before = self._brought(address)
        try:
            self._pull(address)
            # Only now, with the session closed: a process may end right after its load.
            self._queue.succeeded()
            metrics.count(metrics.SOURCE_ATTEMPTS, api.COMPLETE)
        except _Postponed as error:
            self._queue.postpone(address, str(error))
            logger.info("NetLoader rank %d: source %s", self._worker, error)
        except Exception as error:
            # Whatever goes wrong with a source must not cost the start: there is the next one.
            self._note(address, _blamed(address, error), self._brought(address) > before)

    def _brought(self, address: Address) -> int:
        """Return the bytes that have come from a source in sessions that are over."""
        with self._lock:
            return sum(nbytes for (origin, _), nbytes in self._gave.items() if origin == address)

    def _vouch(self, weights: str, ranks: Mapping[int, str]) -> None:
        self._vouched[weights] = ranks or self._vouched.get(weights, {})

    def _is_own(self, instance: str) -> bool:
        return self._relay is not None and self._relay.peer.instance == instance

    def _met(self, weights: str, peer: api.Peer) -> None:
        """Let another that gets or has these weights be asked as well."""
        if weights == self._target.weights:
            self._ask_too(peer.address, peer.instance)

    def _ask_too(self, address: str, instance: str) -> None:
        if self._relay is not None and self._relay.peer.instance != instance:
            with contextlib.suppress(ValueError):  # no address
                self._queue.heard(parse_address(address), instance)

    def _note(self, address: Address, error: SourceError, brought: bool) -> None:
        if self._queue.over.is_set():
            return  # nobody waits for this source any more
        if self._is_own(error.instance):
            error = SourceRefused(f"{address}: {_ITSELF}")
        if error.weights is not None and not self._queue.is_hearsay(address):
            self._vouch(error.weights, error.ranks)
        for other, instance in error.peers if error.weights in self._vouched else ():
            self._ask_too(other, instance)
        # What was ended on this side has no code. A source whose own load is complete prepares.
        soon = brought and error.code in ("", Code.PREPARING.text)
        metrics.count(metrics.SOURCE_ATTEMPTS, _kind(error))
        news = self._queue.failed(address, error, soon=soon)
        if news:
            self.warn(error, self._queue.waits(address))

    def warn(self, error: SourceError, again: bool) -> None:
        """Say what went wrong with a source; `again`: it is asked again."""
        wait = f"; asking again for up to SOURCE_WAIT {self._config.source_wait:g} s"
        logger.warning(
            "NetLoader rank %d: source %s%s",
            self._worker,
            one_line(error),
            wait if again and self._config.source_wait else "",
        )

    def _pull(self, address: Address) -> None:
        with self._connect(address) as client:
            joined = self._join(client)
            try:
                self._pull_from(address, client, joined)
            except BaseException as error:
                client.done(Done(complete=False, reason=one_line(error)))
                raise
            client.done(Done(complete=True))

    def _pull_from(self, address: Address, client: ElasticClient, joined: Joined) -> None:
        if self._is_own(joined.instance):
            raise SourceRefused(f"{address}: {_ITSELF}")
        if not self._queue.is_hearsay(address):
            self._vouch(joined.weights, joined.ranks)
        elif joined.weights not in self._vouched:
            raise SourceRefused(
                f"{address}: its weights are {joined.weights}, which no source in SOURCE has"
            )
        self._queue.joined(address, joined.instance)
        with self._target.agreed(address, joined) as (store, scheduler):
            if not joined.complete:
                with self._lock:
                    self._relays.add((address, joined.weights))
            if self._relay is not None:
                self._relay.know(joined.weights, address, joined.instance, complete=joined.complete)
                for peer in joined.peers:
                    self._met(joined.weights, peer)
            try:
                self._transfer(address, client, store, scheduler, joined.complete)
            except TransferCorrupt as error:
                self._report(address, store, error)
                raise

    def _report(self, address: Address, store: BlockStore, error: TransferCorrupt) -> None:
        """Ask the source whether its weights are still what it said, as they came wrong twice.

        Raises:
            SourceError: they are not.
        """
        if error.block is None:
            return
        try:
            # Answers to what was asked for before are still due on the session's own connection.
            with self._connect(address) as client:
                client.check(store.digests.weights, error.block, error.block)
        except SourceError as answer:
            if answer.code != Code.CHANGED.text:
                return
            changed = "the source's weights have changed since they were offered"
            raise SourceBusy(f"{address}: changed: {changed}", answer.code) from None

    def _connect(self, address: Address) -> ElasticClient:
        return connect(address, self._config)

    def _join(self, client: ElasticClient) -> Joined:
        """Ask for the weights that are being loaded; for any, if there are none yet."""
        identity, weights, peer = self._identity, self._target.weights, self._peer
        try:
            joined = client.join(Join(identity, weights, peer))
        except SourceRefused as error:
            if error.code != Code.OTHER_WEIGHTS.text:
                raise
            # Its weights count when nobody is left who has the others.
            joined = client.join(Join(identity, peer=peer))
        if self._queue.is_hearsay(client.address):
            vouched = dict(self._vouched.get(joined.weights, {}))
            joined = msgspec.structs.replace(joined, ranks=vouched)
        # What a list says of this rank is not to matter: its weights have to be those.
        pinned, ranks = self._config.weights_digest, {**joined.ranks, identity.rank: joined.weights}
        if not is_one_of(pinned, joined.weights, ranks):
            raise SourceRefused(
                f"{client.address}: its weights are {joined.weights} of {of_instance(ranks)} and "
                f"WEIGHTS_DIGEST is {', '.join(pinned or ())}"
            )
        if self._wanted not in (None, joined.weights):
            raise SourceRefused(
                f"{client.address}: its weights are {joined.weights}, and {self._wanted} go with "
                "those of the other ranks"
            )
        self._compare_revisions(client.address, joined.revision)
        algorithm, there = self._device.digest_algorithm, joined.weights.partition(":")[0]
        if self._config.verify and there != algorithm:
            raise SourceRefused(f"{client.address}: digests are {algorithm} here and {there} there")
        return joined

    def _compare_revisions(self, address: Address, there: Revision) -> None:
        here = self._identity.revision
        if here.is_other(there):
            logger.warning(
                "NetLoader rank %d: source %s has commit %s of the model, which is commit %s here; "
                "without --revision the source's is taken",
                self._worker,
                address,
                shortened(str(there.name)),
                here.name,
            )

    def _transfer(
        self,
        address: Address,
        client: ElasticClient,
        store: BlockStore,
        scheduler: Scheduler,
        complete: bool,
    ) -> None:
        accelerator = self._device.accelerator
        peer = Peer(complete=complete, trusted=complete and not self._queue.is_hearsay(address))
        if accelerator is not None and self._config.transport is Transport.AUTO:
            try:
                control, group = self._form_group(client, store, accelerator)
            except (RuntimeError, SourceBusy, SourceRefused) as error:
                if isinstance(error, SourceBusy) and not complete:
                    raise  # it was forming others all the time
                logger.warning(
                    "NetLoader rank %d: source %s: no process group, so the weights come over "
                    "HTTP: %s",
                    self._worker,
                    address,
                    one_line(error),
                )
            else:
                through = GroupReceiver(control, group, store, accelerator, control.max_bytes)
                with group, self._news_of(address, store, scheduler, peer):
                    try:
                        self._receive(address, through, store, scheduler, peer, group)
                    except RuntimeError as error:  # torch's, which says what failed and not why
                        raise client.last_words() or error from None
                return
        session = _HttpSession(peer, client)
        if not peer.trusted:
            with self._lock:
                self._untrusted.append((address, session, scheduler))
        peer.cut = lambda: session.cut(
            SourceBusy(f"{address}: slow: others bring what it had left")
        )
        try:
            with (
                self._news_of(address, store, scheduler, peer),
                self._more_connections(address, store, scheduler, session),
            ):
                receiver = HttpReceiver(client, store)
                try:
                    self._receive(address, receiver, store, scheduler, peer)
                except TransferCorrupt as error:
                    if not peer.trusted:
                        session.cut(error)  # its further connections bring nothing better
                    raise
        except SourceLost:
            if session.cut_by is not None:
                raise session.cut_by from None
            raise
        finally:
            if not peer.trusted:
                with self._lock:
                    self._untrusted.remove((address, session, scheduler))

    @contextlib.contextmanager
    def _news_of(
        self, address: Address, store: BlockStore, scheduler: Scheduler, peer: Peer
    ) -> Iterator[None]:
        """Learn which blocks come to an incomplete source, on a connection of its own."""
        if peer.complete:
            yield
            return
        with self._connect(address) as first:
            news = _HttpSession(peer, first)

            def learn() -> None:
                try:
                    self._learn(address, store, scheduler, news, first)
                except SourceError as error:
                    scheduler.lost(peer, error)
                except Exception as error:  # whatever a source says costs its own session
                    scheduler.lost(peer, ProtocolError(f"{address}: {one_line(error)}"))

            thread = threading.Thread(target=learn, name="netloader-load-news", daemon=True)
            thread.start()
            try:
                yield
            finally:
                news.cut(SourceLost(f"{address}: the session is over"))
                thread.join()

    def _learn(
        self,
        address: Address,
        store: BlockStore,
        scheduler: Scheduler,
        news: "_HttpSession",
        client: ElasticClient,
    ) -> None:
        since, weights, told, again = 0, store.digests.weights, 0, _NEWS_AGAIN
        wait = max(1, min(int(self._config.progress_timeout), api.MAX_WAIT_SECONDS))
        with contextlib.ExitStack() as connections:
            while not news.peer.complete:
                asked = time.monotonic()
                try:
                    have = client.have(weights, since, wait)
                except SourceLost:
                    if news.cut_by is not None or not again:
                        raise
                    again -= 1
                    client = connections.enter_context(self._connect(address))
                    news.add(client)
                    continue
                at_once = time.monotonic() - asked < wait / 2
                if at_once and not have.runs and not have.complete:
                    raise ProtocolError(f"{address}: has no news, and does not wait")
                told += len(have.runs)
                if told > store.blocks.count:
                    raise ProtocolError(f"{address}: has more news than there are blocks")
                since = have.version
                scheduler.heard(news.peer, map(Run._make, have.runs), complete=have.complete)

    @contextlib.contextmanager
    def _turn_to_connect(self) -> Iterator[None]:
        """Wait until this rank forms no other group, but not for long: its peer may never come."""
        turn = self._relay.connecting if self._relay is not None else None
        mine = turn is not None and turn.acquire(timeout=_TURN)
        try:
            yield
        finally:
            if turn is not None and mine:
                turn.release()

    def _form_group(
        self, client: ElasticClient, store: BlockStore, accelerator: Accelerator
    ) -> tuple[GroupControl, TransferGroup]:
        deadline = time.monotonic() + self._config.handshake_timeout
        while True:
            try:
                with self._turn_to_connect():
                    control = client.open_group(store.digests.weights)
                    group = form_group(
                        accelerator,
                        control.tell,
                        control.hear,
                        CLIENT,
                        client.local_host,
                        handshake=self._config.handshake_timeout,
                        progress=self._config.progress_timeout,
                        gone=client.hung_up,
                    )
                    return control, group
            except SourceBusy:
                # An incomplete source forms one at a time. Two that want one of each other must
                # not come back at the same moment.
                over = self._queue.over.wait(random.uniform(*_FORM_AGAIN))
                if over or time.monotonic() > deadline:
                    raise

    def _receive(
        self,
        address: Address,
        receiver: Receiver,
        store: BlockStore,
        scheduler: Scheduler,
        peer: Peer,
        group: TransferGroup | None = None,
    ) -> None:
        pull = P2PLoad(
            receiver,
            store,
            scheduler,
            verify=self._config.verify,
            keep_alive=self._config.progress_timeout / 3,
            peer=peer,
            others=self._queue.lacks_threads,
            patience=0.0 if group is None else _TRY_ANOTHER,
        )
        origin = address, store.digests.weights
        with self._lock:
            self._pulls.append((origin, pull))
        try:
            with group or contextlib.nullcontext():
                pull.run()
        finally:
            # Only now, with the group closed, can nothing of this session reach the tensors.
            scheduler.give_back(pull.outstanding)
            # Not kept any longer, as it has staging buffers of the device.
            with self._lock:
                self._pulls.remove((origin, pull))
                self._gave[origin] += pull.bytes_received

    @contextlib.contextmanager
    def _more_connections(
        self, address: Address, store: BlockStore, scheduler: Scheduler, session: "_HttpSession"
    ) -> Iterator[None]:
        """Let further connections to a source pull, too; what goes wrong with them is no news."""

        def pull() -> None:
            try:
                with self._device.attached(), self._connect(address) as client:
                    session.add(client)
                    client.join(Join(self._identity, store.digests.weights, self._peer))
                    through = HttpReceiver(client, store)
                    self._receive(address, through, store, scheduler, session.peer)
                    client.done(Done(complete=True))
            except Exception as error:
                logger.debug("NetLoader: a further connection: %s", one_line(error))
                if isinstance(error, TransferCorrupt) and not session.peer.trusted:
                    session.cut(error)

        threads = [
            threading.Thread(target=pull, name=f"netloader-load-more-{index}", daemon=True)
            for index in range(self._config.connections - 1)
        ]
        try:
            for thread in threads:
                with contextlib.suppress(RuntimeError):  # no more threads: only speed is lost
                    thread.start()
            yield
        finally:
            for thread in threads:
                if thread.ident is not None:
                    thread.join()


class _Search:
    """Looks names up, and takes part in the choice of an instance that reads the disk."""

    def __init__(
        self,
        discovery: Discovery,
        sessions: _Sessions,
        target: _Target,
        queue: SourceQueue,
        cold: ColdStart | None,
        process: str,
        worker: int,
    ) -> None:
        self._discovery = discovery
        self._sessions = sessions
        self._target = target
        self._queue = queue
        self._cold = cold
        self._election = Election(process, can_read=cold is not None and cold.can_read)
        self._worker = worker
        self._said = ""
        self._told: Choice | None = None
        self._waits = False

    def look_up(self) -> None:
        """Let the sources that names stand for now be asked as well, or decide to ask nobody."""
        endpoints, problems = self._discovery.look_up()
        while (choice := self._choose(self._discovery.seen)) is Choice.VOLUNTEER:
            endpoints, problems = self._discovery.look_up()
        if choice is Choice.READ:
            self._queue.succeeded()
            return
        self._waits = choice is Choice.WAIT
        self._queue.hold(self._waits)
        for problem in self._queue.found(endpoints, problems):
            busy = isinstance(problem, SourceBusy)
            if not self._queue.over.is_set() and not (busy and self._waits):
                self._sessions.warn(problem, busy or isinstance(problem, SourceUnreachable))

    def keep_looking(self) -> None:
        """Look names up again, while there is nobody to ask, until the load is over."""
        pause = _FIRST_LOOK_UP
        while not self._queue.over.wait(pause):
            if self._queue.idle:
                self.look_up()
                # All ask the same few instances, which are not to be kept busy by that.
                cold = max(_COLD_LOOK_UP, len(self._discovery.seen.replicas) / 32)
                longest = cold if self._waits else _LAST_LOOK_UP
                pause = random.uniform(0.75, 1.0) * min(2 * pause, longest)

    def _choose(self, seen: Seen) -> Choice:
        """Decide by what a look-up has shown, and tell of it."""
        cold, election = self._cold, self._election
        if cold is None or self._target.weights is not None:
            if cold is not None and cold.told is None and self._told is not Choice.LEAVE:
                self._told = Choice.LEAVE
                cold.tell(Choice.LEAVE)
            return Choice.LEAVE
        if cold.told is not None:
            choice = cold.told() or Choice.WAIT
            if choice is Choice.READ and not self._target.announce(Phase.READING):
                return Choice.LEAVE
            return choice
        before = election.phase
        choice = election.choose(time.monotonic(), seen)
        if election.phase is not before and not self._target.announce(election.phase):
            choice = Choice.LEAVE
        if choice is not self._told and choice is not Choice.VOLUNTEER:
            self._told = choice
            cold.tell(choice)
        reader = seen.replicas.get(election.reader)
        if choice is Choice.READ:
            logger.info(
                "NetLoader rank %d: chosen to read the weights from disk, as none of %d instances "
                "has them",
                self._worker,
                1 + len(seen.replicas),
            )
        elif reader is not None and reader.state == Phase.READING.value:
            if self._said != election.reader:
                logger.info(
                    "NetLoader rank %d: waiting for %s (instance %s), which reads the weights "
                    "from disk",
                    self._worker,
                    reader.address,
                    election.reader,
                )
            self._said = election.reader
        return choice


class _HttpSession:
    """The connections to one source over HTTP, which can be cut together.

    Attributes:
        peer: the source.
        cut_by: why they were cut; None: they were not.
    """

    def __init__(self, peer: Peer, client: ElasticClient) -> None:
        self.peer = peer
        self.cut_by: SourceError | None = None
        self._lock = threading.Lock()
        self._clients = [client]

    def add(self, client: ElasticClient) -> None:
        """Take note of a further connection."""
        with self._lock:
            self._clients.append(client)
            if self.cut_by is not None:
                client.cut()

    def cut(self, why: SourceError) -> None:
        """End all connections at once, also while something is received."""
        with self._lock:
            self.cut_by = self.cut_by or why
            for client in self._clients:
                client.cut()


def _in_groups(device: Device, config: NetLoaderConfig) -> bool:
    return device.accelerator is not None and config.transport is Transport.AUTO


def _kind(error: SourceError) -> str:
    """Return what a failure is called among the metrics."""
    kinds = (name for kind, name in _KINDS.items() if isinstance(error, kind))
    return error.code or next(kinds, "refused")


def _blamed(address: Address, error: Exception) -> SourceError:
    """Return what went wrong with a source as an error that begins with its address."""
    if isinstance(error, SourceError):
        return (
            error if str(error).startswith(f"{address}: ") else type(error)(f"{address}: {error}")
        )
    if isinstance(error, RuntimeError):  # torch raises them
        return SourceLost(f"{address}: transfer failed: {one_line(error)}")
    logger.debug("NetLoader: %s", address, exc_info=error)
    return SourceLost(f"{address}: {type(error).__name__}: {one_line(error)}")
