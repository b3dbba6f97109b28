"""What a load fills, and whom it tells of that."""

import contextlib
import random
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec
import torch

from ..config import MIB, NetLoaderConfig, Transport
from ..errors import LayoutUnsupported, ProtocolError, SourceRefused, TransferCorrupt, Withdrawn
from ..executor.chunks.blocks import BLOCK_BYTES, Blocks
from ..executor.chunks.digests import combine
from ..executor.chunks.manifest import Manifest, Sample, Scalar, decode
from ..executor.devices import Device, start_prefault
from ..executor.model.match import Described, describe, match
from ..executor.scheduler import Scheduler
from ..executor.store import BlockStore
from ..identity import ModelIdentity
from ..interaction import api
from ..interaction.api import Joined
from ..interaction.cold_start import Choice, Phase
from ..utils import Address

# Sizes of a chunk where CHUNK_MIB says nothing. An operation of HCCL or NCCL costs as much as some
# hundred KiB of their links' time. Over HTTP a request costs each end 0.1 to 0.2 ms, and a run is
# checked while the cache still has it.
_CHUNK_MIB, _CHUNK_MIB_GROUP = 8, 16
# Runs that weights are cut into at least to pass them on over HTTP, as a run can be passed on only
# once it is here as a whole: what a long chain of relays costs is as many runs.
_LEAST_RUNS = 512


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
        can_read: returns whether this instance would read its disk for all; None: its ranks have
            not all told yet.
        announce: says how far the load is to whoever asks for the status.
        tell: tells the instance's other ranks what this one has chosen.
        told: returns what the rank that chooses has told; None: this one chooses.
    """

    can_read: Callable[[], bool | None]
    announce: Callable[[Phase], object]
    tell: Callable[[Choice], object] = lambda choice: None
    told: Callable[[], Choice | None] | None = None


class Postponed(Exception):
    """A source has other weights than those that come from other sources just now."""


class Target:
    """The store that all sessions of a load fill, once the first source has said what it is.

    Attributes:
        chosen: whether this instance is the one of several that reads the disk.
        met: called with a weights digest and a client that wants these weights.
        feeds: returns which sources feed this load, for others to see.
        chunk_mib: size of a run at most; 0 before the first source.
        lists: what sources have said of the weights of their instances' ranks.
    """

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
        check: Callable[[Mapping[str, Scalar]], object],
    ) -> None:
        self._tensors = tensors
        self._check = check
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
        self.chunk_mib = 0
        self.lists: list[Mapping[int, str]] = []
        self._over = threading.Event()
        self._prefaulting: threading.Thread | None = None
        # As they are when in use; while they are filled they have none.
        self._formats = device.formats(tensors)
        self._restore: list[Callable[[], None]] = []

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
            if self._over.is_set() or self._store is not None or self._cold is None:
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
            ProtocolError: the manifest is none, or has more than would fit.
            Postponed: other weights are coming from other sources.
        """
        with self._lock:
            if self._over.is_set():
                # The model belongs to the caller again: nothing may be written to it any more.
                raise SourceRefused(f"{address}: answered after the model was complete")
            if joined.weights != self.weights:
                if self._sessions:
                    raise Postponed(
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
        if self._restore:
            store.withdraw(Withdrawn("its formats are changing"))
            for restore in self._restore:
                restore()
        self._device.synchronize()
        self._device.empty_cache()
        return store.with_tensors(store.tensors)

    def _begin(self, address: Address, joined: Joined) -> None:
        if joined.manifest is msgspec.UNSET or joined.blocks is msgspec.UNSET:
            raise SourceRefused(f"{address}: sent no manifest")
        here, own = self._identity.layout, None
        if self._place is None:
            # Then `match` says what is in the way.
            with contextlib.suppress(LayoutUnsupported, RuntimeError):
                own = describe(self._tensors, here, {}, self._formats)
        try:
            count = None if self._place else len(self._tensors)
            manifest = decode(bytes(joined.manifest), count, own.manifest.tensors if own else None)
        except ProtocolError as error:
            raise ProtocolError(f"{address}: {error}") from None
        if here != (there := manifest.layout):
            raise SourceRefused(f"{address}: layout is {here!r} here and {there!r} there")
        try:
            tensors = self._place(manifest) if self._place else self._match(manifest, own)
            self._check(manifest.attributes)
            if own is not None and tensors is own.tensors:
                blocks = Blocks(own.sizes)
            else:
                blocks = Blocks([tensor.nbytes for tensor in tensors])
            algorithm = joined.weights.partition(":")[0]
            digests = combine(algorithm, manifest, blocks, joined.blocks)
            self._restore.append(self._device.writable(tensors))
        except (LayoutUnsupported, ProtocolError) as error:
            raise SourceRefused(f"{address}: {error}") from None
        if digests.weights != joined.weights:
            raise TransferCorrupt(
                f"{address}: manifest and block digests make {digests.weights}, and the source "
                f"says {joined.weights}"
            )
        if self._prefaulting is None:
            # Small ones are found soon enough, and there may be a hundred thousand.
            sized = zip(tensors, blocks.sizes, strict=True)
            large = [tensor for tensor, nbytes in sized if nbytes > BLOCK_BYTES]
            self._prefaulting = start_prefault(self._device, large, self._over)
        if self._cold is not None:
            self._cold.announce(Phase.LOADING)
        self._store = BlockStore(manifest, blocks, tensors, digests, self._device, complete=False)
        self.lists = []
        groups, relays = in_groups(self._device, self._config), self._relay is not None
        self.chunk_mib = self._config.chunk_mib or chunk_mib_for(blocks.nbytes, groups, relays)
        runs = blocks.cut(self.chunk_mib * MIB, large_alone=groups)
        if relays:
            random.shuffle(runs)
        self._scheduler = Scheduler(blocks, runs)
        for run in self._scheduler.wanted if self._place is not None else ():
            if not self._store.wrong(run):
                self._store.add(run)
                self._scheduler.skip(run)
        if self._relay is not None:
            self._relay.begin(self._store, self.met, self._list, self.feeds)

    def _match(self, manifest: Manifest, own: Described | None) -> Sequence[torch.Tensor]:
        named, required, formats = self._tensors, self._required, self._formats
        return match(manifest, named, required, formats, self._meaning, self._made, own)

    def _list(self) -> Mapping[int, str]:
        """Return what the first source that knows has said of its instance's ranks."""
        return next(filter(None, [*self.lists]), {})


def chunk_mib_for(nbytes: int, groups: bool, relays: bool) -> int:
    """Return the size of a chunk in MiB where CHUNK_MIB says nothing.

    Args:
        nbytes: of the weights.
        groups: whether they come through groups.
        relays: whether they are passed on.
    """
    if groups:
        return _CHUNK_MIB_GROUP
    return max(1, min(_CHUNK_MIB, nbytes // (_LEAST_RUNS * MIB))) if relays else _CHUNK_MIB


def in_groups(device: Device, config: NetLoaderConfig) -> bool:
    """Return whether weights come through groups of the device rather than over HTTP."""
    return device.accelerator is not None and config.transport is Transport.AUTO
