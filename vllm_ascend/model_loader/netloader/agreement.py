"""One instance, one set of weights: its ranks compare what they have loaded, and decide together.

Each rank loads for itself, from a source or from disk. Whether the weights of two ranks belong
together shows in a list of an instance that has both: rank -> weights digest. A source hands its
list to whoever joins. The protocol, for a target, for a draft, and again for each reload:

1. Each rank loads as it is configured. Then it reports what it has, from where, and the lists of
   its sources. A rank that has failed reports that, too. Reports go through the store in which
   torch's process group was formed: unlike a collective call, waiting there may take as long as a
   slow disk does, and a rank that never comes breaks nothing.
2. Each rank waits for the reports of all, and takes the same decision from them (`decide`):

   - All have what one list says, or all have read the disk, which has one checkpoint, or all have
     read the view of one instance: done. The digests of all ranks are the list that this instance
     hands out.
   - Else the ranks that differ from a list load again, from sources with these very weights. If
     several lists are known, the one that most ranks agree with comes first. A rank that has read
     the disk is compared as well, so it hashes what it has read, if SOURCE names sources at all.
   - If that fails for all lists, all ranks that have something else than the disk's weights read
     the disk. FALLBACK false forbids it.
   - Else loading fails, on all ranks, with what each of them has. So it does where a rank's first
     load has failed: it has tried everything.

3. After each decision to load again all ranks report again; who keeps what it has, the same.

In a reload nobody knows the digest of what a disk has before inference uses it. There "disk" means
that a rank would read it: the ranks agree before the first of them changes anything, on a list or
on the disk. An instance of one rank reports nothing and waits for nobody.

Weights also change later on, by calls that reach all ranks. Each rank then publishes what it has,
once it knows, and the list that a source hands out is what its ranks have published last. In the
same way each rank tells where it listens, so that any of them can name the endpoints of all.
"""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import msgspec
from torch.distributed import Store

from .errors import LoadFailed
from .interaction.api import Endpoint
from .interaction.cold_start import Choice
from .utils import logger, one_line, shortened

DISK = "disk"

# Loads that lists of sources may cost: a source that tells another list each time ends with these.
_MOST_LISTS = 4
# Seconds to wait for the slowest rank, and between two lines in the log about it. A rank that has
# died ends the instance before, and one that reads a slow disk is to be waited for.
_DEADLINE, _NEWS = 4 * 3600.0, 60.0
_NOTHING = "-"  # in the place of a digest
_ENDPOINT, _HOST, _CHOICE, _READS = "/endpoint", "/host", "/choice", "/reads"

RankWeights = Mapping[int, str]
T = TypeVar("T")


class Report(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one rank tells the others.

    Attributes:
        rank: global rank.
        sources: whether it has sources to ask.
        fallback: whether it may read the disk in their place.
        origin: where its weights came from, `disk` or addresses.
        weights: their digest, if known.
        lists: those of the sources that have these weights: rank -> weights digest.
        failure: why it has no weights.
        view: digest of the instance whose view of the checkpoint gave the weights; empty: none did.
    """

    rank: int
    sources: bool
    fallback: bool
    origin: str = DISK
    weights: str | None = None
    lists: Sequence[dict[int, str]] = ()
    failure: str = ""
    view: str = ""

    def __str__(self) -> str:
        if self.failure:
            return f"rank {self.rank} has none ({self.failure})"
        return f"rank {self.rank} has {self.weights or 'weights without a digest'} of {self.origin}"


_REPORTS, _ENDPOINTS = msgspec.json.Decoder(Report), msgspec.json.Decoder(Endpoint)


@dataclass(frozen=True)
class Order:
    """How the ranks load: as they are configured, from sources of one list, or from disk.

    Attributes:
        weights: the list; only ranks that have something else load.
        disk: whether ranks whose weights are not from disk read it.
    """

    weights: RankWeights | None = None
    disk: bool = False

    @property
    def last_resort(self) -> bool:
        """Whether a rank that fails now has nothing else to try."""
        return self.weights is None

    def concerns(self, report: Report) -> bool:
        """Return whether a rank has to load again."""
        if self.weights is not None:
            return report.weights != self.weights[report.rank]
        return bool(report.failure) or report.origin != DISK

    def __str__(self) -> str:
        return "from disk" if self.disk else "from sources that have the weights of other ranks"


AS_CONFIGURED = Order()


@dataclass(frozen=True)
class Attempt(Generic[T]):
    """What a rank has loaded.

    Attributes:
        result: for the caller.
        origin: see `Report`.
        weights: see `Report`.
        lists: see `Report`.
        view: see `Report`.
    """

    result: T
    origin: str = DISK
    weights: str | None = None
    lists: Sequence[RankWeights] = ()
    view: str = ""


@dataclass(frozen=True)
class Ranks:
    """The ranks of an instance that load a model together.

    Attributes:
        rank: this one.
        all: all of them, this one included.
        group: names the model.
        store: where they tell each other; not used by one rank alone.
        instance: tells instances of the same processes apart, once they have loaded.
        worker: number of this process among all workers of the instance, for the log.
        workers: those of all ranks of the instance, of such without this model as well.
    """

    rank: int
    all: Sequence[int]
    group: str
    store: Store | None = None
    instance: int = 0
    worker: int = 0
    workers: Sequence[int] = ()

    @property
    def several(self) -> bool:
        """Whether there are others."""
        return len(self.all) > 1

    def tell(self, report: Report) -> int:
        """Publish this rank's next report and return its number, the same at all ranks."""
        assert self.store is not None
        number: int = self.store.add(f"netloader/{self.group}/{self.rank}", 1)
        self.store.set(self._key(number, self.rank), msgspec.json.encode(report))
        return number

    def exchange(self, report: Report) -> list[Report]:
        """Publish this rank's next report, and return those of all ranks, in order.

        Raises:
            LoadFailed: a rank does not report in time, or the store is gone.
        """
        assert self.store is not None
        try:
            number = self.tell(report)
            self._wait(number)
            reports = [self.store.get(self._key(number, rank)) for rank in self.all]
            # Whoever has told a report has read those before.
            self.store.delete_key(self._key(number - 1, self.rank))
        except RuntimeError as error:  # torch's, of the store: its process may have ended
            raise LoadFailed(
                f"the ranks of this instance cannot compare their weights: {one_line(error)}"
            ) from None
        return [_REPORTS.decode(report) for report in reports]

    def publish(self, weights: str | None) -> None:
        """Tell what this rank has from now on; None: its weights are changing, or not known."""
        self._tell("", (weights or _NOTHING).encode())

    def present(self, agreed: RankWeights) -> RankWeights:
        """Return what the ranks have now, as far as it is known.

        Args:
            agreed: what they had when they loaded.
        """
        told = {rank: weights.decode() for rank, weights in self._told("").items()}
        now = {**agreed, **told}
        return {rank: weights for rank, weights in now.items() if weights != _NOTHING}

    def publish_endpoint(self, endpoint: Endpoint) -> None:
        """Tell where this rank listens from now on."""
        self._tell(_ENDPOINT, msgspec.json.encode(endpoint))

    def endpoints(self) -> Mapping[int, Endpoint]:
        """Return where the ranks listen, as far as it is known."""
        said = self._told(_ENDPOINT)
        return {rank: _ENDPOINTS.decode(one) for rank, one in said.items()}

    def publish_host(self, host: str) -> None:
        """Tell on which host this rank is, before it listens there."""
        self._tell(_HOST, host.encode())

    def hosts(self) -> list[str]:
        """Return the hosts of the ranks, as far as they are known."""
        return [host.decode() for host in self._told(_HOST).values()]

    def publish_can_read(self, can_read: bool) -> None:
        """Tell whether this rank would read its disk for all instances."""
        self._tell(_READS, str(can_read).encode())

    def can_read(self, here: bool) -> bool | None:
        """Return whether all ranks would read their disks; None: not all of them have told.

        Args:
            here: what this one has told.
        """
        told = {rank: one == b"True" for rank, one in self._told(_READS).items()}
        told[self.rank] = here
        if not all(told.values()):
            return False
        return True if len(told) == len(self.all) else None

    @property
    def chooses(self) -> bool:
        """Whether this is the rank that chooses for all whether they read the disk."""
        return self.rank == self.all[0]

    def publish_choice(self, choice: Choice) -> None:
        """Tell what this rank has chosen for all."""
        self._tell(_CHOICE, choice.value.encode())

    def choice(self) -> Choice | None:
        """Return what was chosen for all ranks, None before that is known."""
        said = self._told(_CHOICE).get(self.all[0])
        return Choice(said.decode()) if said is not None else None

    def _tell(self, what: str, value: bytes) -> None:
        if self.store is not None:
            with contextlib.suppress(RuntimeError):  # of the store: its process may have ended
                self.store.set(self._lasting(what, self.rank), value)

    def _told(self, what: str) -> dict[int, bytes]:
        if self.store is None:
            return {}
        keys = {rank: self._lasting(what, rank) for rank in self.all}
        with contextlib.suppress(RuntimeError):
            if not self.store.check([*keys.values()]):  # not all of them have told
                keys = {rank: key for rank, key in keys.items() if self.store.check([key])}
            if keys:
                return dict(zip(keys, self.store.multi_get([*keys.values()]), strict=True))
        return {}

    def _lasting(self, what: str, rank: int) -> str:
        return f"netloader/{self.group}/instance {self.instance}/{rank}{what}"

    def _wait(self, number: int) -> None:
        assert self.store is not None
        started = said = time.monotonic()
        pause = 0.001
        missing = [*self.all]
        # Not the store's own wait: other threads could not use the store meanwhile.
        while missing := [r for r in missing if not self.store.check([self._key(number, r)])]:
            now = time.monotonic()
            if now - started > _DEADLINE:
                raise LoadFailed(f"rank {missing[0]} has not loaded within {_DEADLINE:g} s")
            if now - said > _NEWS:
                said = now
                logger.info(
                    "NetLoader rank %d: waiting for rank %s, to compare weights digests",
                    self.worker,
                    ", ".join(map(str, missing)),
                )
            time.sleep(pause)
            pause = min(pause * 2, 0.25)

    def _key(self, number: int, rank: int) -> str:
        return f"netloader/{self.group}/{number}/{rank}"


def load_together(
    ranks: Ranks,
    attempt: Callable[[Order], Attempt[T]],
    *,
    sources: bool,
    fallback: bool,
) -> tuple[T, RankWeights]:
    """Load until all ranks have weights that belong together.

    Args:
        ranks: who loads.
        attempt: loads, this rank only; what it has loaded before may be gone by then.
        sources: see `Report`.
        fallback: see `Report`.

    Returns:
        What this rank has loaded, and the weights digests of all ranks, as far as they are known.

    Raises:
        LoadFailed: the ranks cannot all get weights that belong together.
        Exception: of `attempt`, where that leaves this rank nothing else to try.
    """
    order: Order | None = AS_CONFIGURED
    lists: list[RankWeights] = []
    past: list[Order] = []
    mine: Attempt[T] | None = None
    report = Report(ranks.rank, sources, fallback, failure="nothing was tried")
    while order is not None:
        if not past or order.concerns(report):
            mine = None  # before there is another
            mine, report = _attempt(ranks, attempt, order, report)
        if not ranks.several:
            reports = [report]
            break
        past.append(order)
        reports = ranks.exchange(report)
        for told in (weights for each in reports for weights in each.lists):
            if told not in lists:
                lists.append(told)
        order = decide(reports, lists, past)
        if order is not None and order.concerns(report):
            logger.warning(
                "NetLoader rank %d: the ranks of this instance have different weights: %s; this "
                "rank loads again %s",
                ranks.worker,
                "; ".join(map(str, reports)),
                order,
            )
    assert mine is not None
    return mine.result, {each.rank: each.weights for each in reports if each.weights is not None}


def decide(
    reports: Sequence[Report], lists: Sequence[RankWeights], past: Sequence[Order]
) -> Order | None:
    """Return how the ranks load again; None: they have weights that belong together.

    Args:
        reports: of all ranks.
        lists: all that sources have told so far.
        past: what has been tried.

    Raises:
        LoadFailed: there is nothing left to try; says what each rank has.
    """
    held = {report.rank: report.weights for report in reports}
    failed = any(report.failure for report in reports)
    # One instance's view is one checkpoint.
    of_one = reports[0].view != "" and len({report.view for report in reports}) == 1
    from_disk = all(report.origin == DISK for report in reports)
    if not failed and (held in lists or from_disk or of_one):
        return None
    final = failed and past[-1].last_resort
    if not final:
        for order in _lists_to_try(held, lists, past):
            if all(report.sources for report in reports if order.concerns(report)):
                return order
        order = Order(disk=True)
        if all(report.fallback for report in reports if order.concerns(report)):
            return order
    raise LoadFailed(
        "the ranks of this instance cannot get weights that belong together: "
        + "; ".join(map(str, reports))
        + ("" if final else "; FALLBACK is false")
    )


def _lists_to_try(
    held: Mapping[int, str | None], lists: Sequence[RankWeights], past: Sequence[Order]
) -> list[Order]:
    """Return orders to load the weights of a list, that of most ranks first."""
    tried = [order.weights for order in past if order.weights is not None]
    if len(tried) >= _MOST_LISTS:
        return []
    fitting = [each for each in lists if each.keys() == held.keys() and each not in tried]
    agreeing = {id(each): sum(held[rank] == each[rank] for rank in held) for each in fitting}
    return [Order(each) for each in sorted(fitting, key=lambda each: -agreeing[id(each)])]


def _attempt(
    ranks: Ranks, attempt: Callable[[Order], Attempt[T]], order: Order, before: Report
) -> tuple[Attempt[T] | None, Report]:
    blank = Report(ranks.rank, before.sources, before.fallback)
    try:
        mine = attempt(order)
    except Exception as error:
        report = msgspec.structs.replace(
            blank, failure=shortened(one_line(f"{type(error).__name__}: {error}"))
        )
        if not order.last_resort:
            return None, report
        if ranks.several:
            with contextlib.suppress(RuntimeError):  # of the store: this error says more
                ranks.tell(report)  # nothing that others tell could change it
        raise
    lists = [dict(each) for each in mine.lists]
    return mine, msgspec.structs.replace(
        blank, origin=mine.origin, weights=mine.weights, lists=lists, view=mine.view
    )
