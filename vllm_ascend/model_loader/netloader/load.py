"""The client's story: from a list of sources to a store filled with verified blocks."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from .config import MIB, NetLoaderConfig
from .errors import ChosenToRead, LoadFailed
from .executor.chunks.manifest import NO_MEANING, Manifest, Sample, Scalar
from .executor.devices import Device
from .executor.store import BlockStore
from .identity import ModelIdentity
from .interaction.discovery import NOBODY, Discovery, Own
from .interaction.source_queue import SourceQueue
from .loading.search import Search
from .loading.sessions import Sessions, status_of
from .loading.target import ColdStart, Relay, Target, in_groups
from .utils import Address, Name, logger, one_line, rate, size

# Sources pulled from at once through groups, unless SOURCE lists more of them: each group takes
# memory of the device and seconds to form.
_PARENTS = 2
# Bytes, after the first one, that count as progress: one that sends a run now and then is to keep
# no load from the disk.
_ENOUGH = 64 * MIB
# Seconds for which a session that is cut may take to end.
_END = 1.0


@dataclass(frozen=True)
class Loaded:
    """What a load has come to.

    Attributes:
        store: the complete store.
        sources: those that gave it, and how much if they are several.
        lists: the weights digests of the ranks of instances that have these weights.
        givers: those of the sources that SOURCE names, the one that gave most first.
    """

    store: BlockStore
    sources: str
    lists: Sequence[Mapping[int, str]] = ()
    givers: Sequence[Address] = ()


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
    check: Callable[[Mapping[str, Scalar]], object] = lambda attributes: None,
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
        check: raises `LayoutUnsupported` if a source's attributes cannot be set here, so that the
            next source is asked.

    Raises:
        ChosenToRead: no instance has the weights, and this one is to read them from disk.
        LoadFailed: no source gave the whole model; the tensors' contents are undefined.
    """
    started = time.monotonic()
    addresses = [source for source in sources if isinstance(source, Address)]
    names = [source for source in sources if isinstance(source, Name)]
    limit = config.max_sources
    if in_groups(device, config):
        limit = min(limit, max(_PARENTS, len(addresses)))
    # One that only others have named, and that is slow, is not to keep a source waiting.
    queue = SourceQueue(addresses, config.source_wait, most_hearsay=max(1, limit - 1))
    if not config.verify:
        relay = None
    target = Target(
        tensors, required, identity, config, device, meaning, made, relay, cold, place, check
    )
    sessions = Sessions(queue, target, identity, config, device, worker, wanted, relay)
    threads = [
        threading.Thread(target=sessions.work, name=f"netloader-load-{index}", daemon=True)
        for index in range(limit if names or relay is not None else min(limit, len(sources)))
    ]
    discovery = None
    if names:
        discovery = Discovery(
            names,
            identity,
            own,
            config.connect_timeout,
            partial(status_of, config=config),
            electing=cold is not None and cold.told is None,
        )
        search = Search(discovery, sessions, target, queue, cold, own.process, worker)
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
    enough = 1
    with _ProgressBar(started) if show_progress else contextlib.nullcontext() as bar:
        while not queue.over.wait(0.1) and any(thread.is_alive() for thread in threads):
            if (received := sessions.bytes_received()) >= enough:
                enough = received + _ENOUGH
                queue.progressed()
            sessions.cut_overdue()
            if config.fallback and relay is not None and sessions.orphaned():
                logger.warning(
                    "NetLoader rank %d: no source has all blocks any more, and those that load "
                    "themselves get none",
                    worker,
                )
                break
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
    if store is None:
        # What they hold is memory that the next attempt needs.
        sessions.end()
        for thread in threads:
            if thread.ident is not None:
                thread.join(_END)
    others = [*queue.others(), *(discovery.seen.others if discovery is not None else ())]
    if store is None and target.chosen:
        chosen = "this instance was chosen to read the disk, as no other has the weights"
        raise ChosenToRead(chosen, others)
    if store is None:
        raise LoadFailed(
            "; ".join(queue.reasons()) or "there are no sources", others, queue.known()
        )
    loaded = Loaded(store, sessions.shares(), target.lists, sessions.givers())
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
