"""The client's story: from a list of sources to a model filled with verified weights."""

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import msgspec
import torch
from tqdm import tqdm

from .config import NetLoaderConfig
from .errors import (
    ChunksRefused,
    LayoutUnsupported,
    LoadFailed,
    ProtocolError,
    SourceError,
    SourceLost,
    SourceRefused,
    TransferCorrupt,
)
from .executor.devices import Device
from .executor.digest import Digests, combine
from .executor.elastic_load import P2PLoad, Target
from .executor.ledger import Ledger
from .executor.manifest import Manifest, match
from .executor.pieces import size_of
from .executor.plan import Plan, make_plan
from .executor.process_group import CLIENT, form_group
from .identity import ModelIdentity
from .interaction.elastic import ElasticClient
from .interaction.protocol import PROTOCOL, Abort, Done, Join, JoinAck, shortened
from .utils import Address, gigabytes_per_second, logger, one_line


@dataclass(frozen=True)
class Loaded:
    """A model that has been filled.

    Attributes:
        manifest: what the sources offered.
        tensors: this side's tensors of the manifest's entries, without aliases, in order.
        plan: the chunks they travelled in.
        digests: checksums of every chunk as verified on arrival; None if they were not checked.
    """

    manifest: Manifest
    tensors: Sequence[torch.Tensor]
    plan: Plan
    digests: Digests | None


def elastic_load(
    tensors: Mapping[str, torch.Tensor],
    required: Collection[str],
    sources: Sequence[Address],
    identity: ModelIdentity,
    config: NetLoaderConfig,
    device: Device,
    *,
    show_progress: bool = False,
) -> Loaded:
    """Fill a model from the first sources that have it.

    Up to `config.max_sources` sources are pulled from at once. When one is lost, the next in order
    takes its place, and only the chunks that were on their way are fetched again.

    Args:
        tensors: name -> tensor of the model; their memory is written, and replaced where it has a
            format of its own.
        required: names among them that a source must have.
        sources: where to look, in order of preference.
        identity: what the sources must be.
        config: chunk size, deadlines, verification.
        device: where the tensors are.
        show_progress: whether to draw a progress bar.

    Raises:
        LoadFailed: no source gave the whole model; the tensors' contents are undefined.
    """
    load = _Load(tensors, required, sources, identity, config, device)
    count = min(config.max_sources, len(sources))
    threads = [
        threading.Thread(target=load.work, name=f"netloader-load-{index}", daemon=True)
        for index in range(count)
    ]
    for thread in threads:
        with contextlib.suppress(RuntimeError):  # no more threads: those that are there do
            thread.start()
    bar: tqdm[None] | None = None
    while not load.over.wait(0.1) and any(thread.is_alive() for thread in threads):
        bar = _show(load, bar) if show_progress else None
    if show_progress and (bar := _show(load, bar)) is not None:
        bar.close()
    # A thread that still waits for a slow source ends by that source's deadline. It writes to no
    # tensor any more: it takes chunks from the ledger first, and there are none.
    loaded = load.result()
    try:
        load.restore_formats()
        device.synchronize()
        device.empty_cache()
    except RuntimeError as error:
        raise LoadFailed(f"after all weights had come: {one_line(error)}") from None
    seconds = time.monotonic() - load.started
    logger.info(
        "NetLoader rank %d: loaded %d tensors, %.1f MB in %.2f s (%.2f GB/s) from %s, digest %s",
        identity.rank,
        len(loaded.tensors),
        loaded.plan.nbytes / 1e6,
        seconds,
        gigabytes_per_second(loaded.plan.nbytes, seconds),
        load.shares(),
        loaded.digests.model if loaded.digests else "not checked",
    )
    return loaded


def _show(load: "_Load", bar: "tqdm[None] | None") -> "tqdm[None] | None":
    """Bring the progress bar up to date; there is none before the size is known."""
    received, total = load.progress()
    if bar is None and total:
        bar = tqdm(total=total, desc="Loading weights from peers", unit="B", unit_scale=True)
        bar.start_t = time.time() - (time.monotonic() - load.started)
    if bar is not None:
        bar.update(received - bar.n)
    return bar


class _AskAgain(Exception):
    """A source is to be asked once more, knowing more by now."""


class _Load:
    """What the threads of one load share: the sources left, the offer agreed on, the reasons."""

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        required: Collection[str],
        sources: Sequence[Address],
        identity: ModelIdentity,
        config: NetLoaderConfig,
        device: Device,
    ) -> None:
        self.started = time.monotonic()
        self.over = threading.Event()
        self._tensors = tensors
        self._required = required
        self._identity = identity
        self._config = config
        self._device = device
        self._sources = deque(sources)
        self._put_off: deque[Address] = deque()
        self._lock = threading.Lock()
        self._working = min(config.max_sources, len(sources))
        if not sources:
            self.over.set()
        self._reasons: list[str] = []
        self._offer: JoinAck | None = None
        self._manifest: Manifest | None = None
        self._target: Target | None = None
        self._loaded: Loaded | None = None
        self._pulls: dict[Address, P2PLoad] = {}
        self._open: set[Address] = set()
        self._preparing: threading.Thread | None = None
        # As they are when in use; while they are filled they have none.
        self._formats = {
            name: form
            for name, tensor in tensors.items()
            if (form := device.format_of(tensor)) is not None
        }
        self._restore: Callable[[], None] | None = None

    def work(self) -> None:
        """Pull from one source after the other until the model is complete or none is left."""
        with self._device.attached():
            while (turn := self._next_turn()) is not None:
                self._try(*turn)

    def _next_turn(self) -> tuple[Address, bool] | None:
        """Return the next source and whether it is the last resort; None ends the thread."""
        with self._lock:
            if not self.over.is_set():
                if self._sources:
                    return self._sources.popleft(), False
                if self._put_off and self._working == 1:
                    return self._put_off.popleft(), True
            self._working -= 1
            if self._working == 0:
                self.over.set()
            return None

    def progress(self) -> tuple[int, int]:
        """Return the bytes received and the bytes to receive, 0 while that is not known."""
        with self._lock:
            received = sum(pull.bytes_received for pull in self._pulls.values())
            return received, self._target.plan.nbytes if self._target else 0

    def result(self) -> Loaded:
        """Return the filled model, once the load is over.

        Raises:
            LoadFailed: it is not complete.
        """
        if self._preparing is not None:
            self._preparing.join()  # the memory may go when this returns
        if self._loaded is None:
            raise LoadFailed("; ".join(self._reasons) or "there are no sources")
        return self._loaded

    def restore_formats(self) -> None:
        """Give the filled tensors the formats that inference uses."""
        if self._restore is not None:
            self._restore()

    def shares(self) -> str:
        """Return the sources with what each gave, for the log."""
        with self._lock:
            gave = {a: pull.bytes_received for a, pull in self._pulls.items()}
        gave = {address: nbytes for address, nbytes in gave.items() if nbytes}
        if len(gave) == 1:
            return str(*gave)
        return ", ".join(f"{address} ({nbytes / 1e6:.1f} MB)" for address, nbytes in gave.items())

    def _try(self, address: Address, last_resort: bool) -> None:
        try:
            self._pull(address, last_resort)
            # Only now, with the session closed: a process may end right after its load.
            self.over.set()
        except _AskAgain as error:
            logger.info("NetLoader rank %d: source %s", self._identity.rank, error)
        except SourceError as error:
            self._note(str(error))
        except Exception as error:
            # Whatever goes wrong with a source must not cost the start: there is the next one.
            logger.debug("NetLoader: %s", address, exc_info=True)
            self._note(f"{address}: {type(error).__name__}: {error}")

    def _note(self, reason: str) -> None:
        if self._loaded is not None:
            return  # nobody waits for this source any more
        line = one_line(reason)
        logger.warning("NetLoader rank %d: source %s", self._identity.rank, line)
        with self._lock:
            self._reasons.append(line)

    def _pull(self, address: Address, last_resort: bool) -> None:
        config = self._config
        with ElasticClient.connect(
            address,
            connect=config.connect_timeout,
            handshake=config.handshake_timeout,
            progress=config.progress_timeout,
        ) as client:
            # A last resort may cut the model as it likes, at the price of beginning anew.
            join = self._join(0 if last_resort else self._chunk_bytes())
            try:
                offer = client.join(join, self._identity)
                self._compare_revisions(address, offer)
            except ChunksRefused as error:
                if not join.chunk_bytes:
                    raise
                with self._lock:
                    self._put_off.append(address)
                raise _AskAgain(f"{error}; asked again when the others have failed") from None
            try:
                target = self._agree(address, join, offer)
                try:
                    self._transfer(address, client, offer, target)
                finally:
                    with self._lock:
                        self._open.discard(address)
            except BaseException as error:
                client.finish(Abort(str(error)))
                if isinstance(error, _AskAgain):
                    client.last_words()  # until the source has closed, and has room again
                raise

    def _compare_revisions(self, address: Address, offer: JoinAck) -> None:
        here, there = self._identity.revision, offer.revision
        if here.is_other(there):
            logger.warning(
                "NetLoader rank %d: source %s has commit %s of the model, which is commit %s here; "
                "without --revision the source's is taken",
                self._identity.rank,
                address,
                shortened(str(there.name)),
                here.name,
            )

    def _chunk_bytes(self) -> int:
        with self._lock:
            return 0 if self._offer is None else self._offer.chunk_bytes

    def _join(self, chunk_bytes: int) -> Join:
        identity = self._identity
        return Join(
            device_id=identity.rank,
            model_path=identity.model,
            tp=identity.tp,
            pp=identity.pp,
            group_name=identity.group,
            int8_cache=self._config.int8_cache.value,
            protocol=PROTOCOL,
            identity=identity.digest(),
            revision=identity.revision,
            layouts=[identity.layout],
            chunk_bytes=chunk_bytes,
        )

    def _agree(self, address: Address, join: Join, offer: JoinAck) -> Target:
        """Take the first offer as this load's, and any later one only if it is the same."""
        algorithm = self._device.digest_algorithm
        if self._config.verify and offer.digest_algorithm != algorithm:
            raise SourceRefused(
                f"{address}: digests are {algorithm} here and {offer.digest_algorithm} there"
            )
        with self._lock:
            if self._loaded is not None:
                # The model belongs to the caller again: nothing may be written to it any more.
                raise SourceRefused(f"{address}: answered after the model was complete")
            agreed, target = self._offer, self._target
            if (
                agreed is not None
                and self._open
                and join.chunk_bytes != agreed.chunk_bytes != offer.chunk_bytes
            ):
                self._sources.appendleft(address)  # the next JOIN says which size it has to be
                raise _AskAgain(f"{address}: asked again for chunks of {agreed.chunk_bytes} bytes")
            if agreed is None or target is None or not _same(agreed, offer):
                if self._open:
                    self._put_off.append(address)  # for when those have failed
                    raise SourceRefused(
                        f"{address}: its weights (digest {offer.model_digest}) are not those that "
                        f"are being loaded from other sources"
                    )
                # Nobody is left who has the weights begun with, if any: start over with these.
                target = self._new_target(address, offer)
            self._open.add(address)
            return target

    def _new_target(self, address: Address, offer: JoinAck) -> Target:
        try:
            manifest = msgspec.json.decode(offer.manifest, type=Manifest)
        except msgspec.MsgspecError as error:
            raise SourceRefused(f"{address}: not a valid manifest: {error}") from None
        here, there = self._identity.layout, manifest.layout
        if here != there:
            raise SourceRefused(f"{address}: layout is {here!r} here and {there!r} there")
        try:
            tensors = match(manifest, self._tensors, self._required, self._formats)
            if self._restore is None:
                self._restore = self._device.writable(tensors)
        except LayoutUnsupported as error:
            raise SourceRefused(f"{address}: {error}") from None
        if self._preparing is None:
            thread = threading.Thread(
                target=self._prepare, args=(tensors,), name="netloader-prepare", daemon=True
            )
            with contextlib.suppress(RuntimeError):  # no more threads: only speed is lost
                thread.start()
                self._preparing = thread
        plan = make_plan([size_of(tensor) for tensor in tensors], offer.chunk_bytes)
        names = [entry.name for entry in manifest.tensors if entry.alias_of is None]
        ledger = Ledger(len(plan.chunks))
        self._offer, self._manifest = offer, manifest
        self._target = Target(names, tensors, plan, ledger, self._config.verify)
        self._pulls.clear()
        return self._target

    def _prepare(self, tensors: Sequence[torch.Tensor]) -> None:
        try:
            self._device.prepare(tensors, self.over)
        except Exception:  # only speed is lost
            logger.debug("NetLoader: cannot prepare memory", exc_info=True)

    def _transfer(
        self, address: Address, client: ElasticClient, offer: JoinAck, target: Target
    ) -> None:
        config = self._config
        pull: P2PLoad | None = None
        # Tells the source that its offer is taken; only then does it come to the process group.
        client.request([])
        try:
            with (
                _blaming(client),
                form_group(
                    self._device,
                    client.tell,
                    client.hear,
                    CLIENT,
                    client.local_host,
                    handshake=config.handshake_timeout,
                    progress=config.progress_timeout,
                    gone=client.hung_up,
                ) as group,
            ):
                pull = P2PLoad(
                    client, group, target, self._device, keep_alive=config.progress_timeout / 3
                )
                with self._lock:
                    self._pulls[address] = pull
                client.sending()
                pull.run()
                self._conclude(offer, target)
                # Before anybody goes on to post-process, which would hold this thread up.
                client.finish(Done(complete=True, model_digest=offer.model_digest))
        finally:
            # Only now, with the group closed, can nothing of this session reach the tensors.
            if pull is not None:
                target.ledger.give_back(pull.outstanding)

    def _conclude(self, offer: JoinAck, target: Target) -> None:
        manifest = self._manifest
        assert manifest is not None
        digests = combine(manifest, target.ledger.hashes()) if self._config.verify else None
        with self._lock:
            if digests is not None and digests.model != offer.model_digest:
                # Each chunk is what its source said, and the whole is not: believe none of it.
                self._target = None
                raise TransferCorrupt(
                    f"the model's digest is {digests.model} and was announced as "
                    f"{offer.model_digest}"
                )
            self._loaded = Loaded(manifest, target.tensors, target.plan, digests)


def _same(one: JoinAck, other: JoinAck) -> bool:
    return (
        one.chunk_bytes == other.chunk_bytes
        and one.model_digest == other.model_digest
        and bytes(one.manifest) == bytes(other.manifest)
    )


@contextlib.contextmanager
def _blaming(client: ElasticClient) -> Iterator[None]:
    """Put a source's address, and its own words if there are any, on what goes wrong with it."""
    try:
        yield
    except TransferCorrupt as error:
        raise TransferCorrupt(f"{client.address}: {error}") from None
    except ProtocolError as error:
        raise SourceLost(f"{client.address}: transfer failed: {error}") from None
    except RuntimeError as error:  # torch's and gloo's
        if words := client.last_words():
            raise SourceLost(f"{client.address}: gave up: {words}") from None
        raise SourceLost(f"{client.address}: transfer failed: {error}") from None
