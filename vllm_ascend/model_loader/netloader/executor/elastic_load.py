"""The two ends of a session: `P2PLoad` receives, `P2PSend` sends."""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from .. import metrics
from ..errors import AskOthers, MakesRoom, SourceBusy, TransferCorrupt
from .chunks.blocks import Run
from .rate_limiter import RateLimiter
from .scheduler import STARVED, Peer, Scheduler
from .store import BlockStore

# Waits to keep a session alive, in a row, for news from an incomplete source.
_IDLE = 3
# Seconds without such news after which another source is asked instead, if there is one.
_TRY_ANOTHER = 1.0


class Sender(Protocol):
    """A transport's end at the source."""

    def send(self, run: Run) -> None:
        """Send a run, or start to.

        Raises:
            OSError: the client is gone.
            RuntimeError: this or an earlier run could not be sent.
        """


class Receiver(Protocol):
    """A transport's end at the client.

    Attributes:
        batch: runs that are asked for at once.
        ahead: runs that may have been asked for and not have come.
        max_bytes: size of a run that is not to be exceeded.
    """

    batch: int
    ahead: int
    max_bytes: int

    def request(self, runs: Sequence[Run]) -> None:
        """Ask for runs, in order; for none: say that this client is still there."""

    def receive(self) -> Callable[[], list[int]]:
        """Return once the oldest run that was asked for is in the store's memory.

        Returns:
            What returns its blocks that are not what their digests say.

        Raises:
            SourceError: the source refused it or is lost.
            RuntimeError: the transfer failed.
            ProtocolError: the source sends something else.
        """


class P2PSend:
    """Sends runs of a store in the order asked for.

    Args:
        store: the weights.
        sender: how they travel.
        limiter: at which rate.
        gone: whether the client has gone.

    Attributes:
        bytes_sent: bytes of the runs that were sent.
    """

    def __init__(
        self,
        store: BlockStore,
        sender: Sender,
        limiter: RateLimiter,
        gone: Callable[[], bool] = lambda: False,
    ) -> None:
        self._store = store
        self._gone = gone
        self._sender = sender
        self._limiter = limiter
        self.bytes_sent = 0

    def send(self, run: Run) -> None:
        """Send a run, once the rate limiter lets it go.

        Raises:
            Withdrawn: the weights are not to be had any more.
            Exception: see `Sender.send`.
        """
        nbytes = self._store.blocks.size_of(run)
        self._limiter.wait(nbytes, self._store.withdrawn, self._gone)
        self._store.check(run)
        self._sender.send(run)
        self.bytes_sent += nbytes
        state = "serving" if self._store.complete else "loading"
        metrics.count(metrics.SENT_BYTES, state, by=nbytes)


class P2PLoad:
    """Pulls what a store still lacks from one source, verified run by run.

    Args:
        receiver: the way from the source.
        store: what is filled, by this session and others.
        scheduler: which runs are wanted.
        verify: whether digests are checked.
        keep_alive: seconds after which a session with nothing to fetch says that it is there.
        peer: the source, if it is not known to have every block.
        others: whether there is another source to ask and nobody else to ask it.
        patience: seconds without news after which it is asked at the earliest.

    Attributes:
        bytes_received: bytes of the runs that have come and are right.
    """

    def __init__(
        self,
        receiver: Receiver,
        store: BlockStore,
        scheduler: Scheduler,
        *,
        verify: bool,
        keep_alive: float,
        peer: Peer | None = None,
        others: Callable[[], bool] = lambda: False,
        patience: float = 0.0,
    ) -> None:
        self._patience = patience
        self._peer = peer or Peer()
        self._others = others
        self._receiver = receiver
        self._store = store
        self._scheduler = scheduler
        self._verify = verify
        self._keep_alive = keep_alive
        self._requested: deque[Run] = deque()
        self._checking: Run | None = None
        self._wrong_before: set[Run] = set()
        self.bytes_received = 0

    @property
    def outstanding(self) -> list[Run]:
        """Runs taken from the scheduler that are neither done nor given back."""
        return [*self._requested, *([self._checking] if self._checking else [])]

    def run(self) -> None:
        """Fetch until every block of the store is here, through this session or another.

        After an exception the `outstanding` runs can be given back to the scheduler, once nothing
        of this session can reach the store any more.

        Raises:
            TransferCorrupt: a run came with wrong bytes, from a trusted source twice.
            MakesRoom: another source may bring more.
            SourceBusy: an incomplete source has had nothing new for too long, or a source named
                others for all that was wanted.
            Exception: see `Receiver.receive`.
        """
        with self._scheduler.session(self._peer):
            while not self._scheduler.finished:
                self._request()
                if not self._requested:
                    self._idle()
                    continue
                try:
                    check = self._receiver.receive()
                except AskOthers:
                    self._scheduler.declined(self._peer, self._requested.popleft())
                    # A source that is right sends what is asked for by then.
                    longest = max(_IDLE * self._keep_alive, 3 * STARVED)
                    if self._scheduler.nothing_for(self._peer) >= longest:
                        sends_nothing = "sends nothing, and names others for all that is wanted"
                        raise SourceBusy(sends_nothing) from None
                    continue
                self._checking = self._requested.popleft()
                self._request()  # so that the next one is on its way while this one is checked
                self._check(self._checking, check)
                self._checking = None

    def _request(self) -> None:
        receiver, held, peer = self._receiver, len(self._requested), self._peer
        if held > receiver.ahead - receiver.batch:
            return
        if not peer.makes_room and self._scheduler.brings_least(peer):
            peer.makes_room = self._others()
        if not peer.makes_room and (
            runs := self._scheduler.take(peer, receiver.batch, held, receiver.max_bytes)
        ):
            self._requested.extend(runs)
            receiver.request(runs)

    def _check(self, run: Run, check: Callable[[], list[int]]) -> None:
        wrong = check() if self._verify else []
        if not wrong:
            self._store.add(run)
            nbytes = self._store.blocks.size_of(run)
            self.bytes_received += nbytes
            self._scheduler.done(run)
            source = "serving" if self._peer.complete else "loading"
            metrics.count(metrics.RECEIVED_BYTES, source, by=nbytes)
            result = "right" if self._verify else "unchecked"
            metrics.count(metrics.BLOCKS, result, by=run.last - run.first + 1)
            return
        metrics.count(metrics.BLOCKS, "wrong", by=len(wrong))
        if run in self._wrong_before or not self._peer.trusted:
            names = _first_few(self._store.names(wrong))
            error = TransferCorrupt(
                f"wrong bytes twice in blocks {run} ({names})"
                if self._peer.trusted
                else f"wrong bytes in blocks {run} ({names})"
            )
            error.block = wrong[0]
            raise error
        self._wrong_before.add(run)
        self._scheduler.give_back([run])

    def _idle(self) -> None:
        if self._peer.makes_room:
            raise MakesRoom("another source may bring more")
        # Clients that wait for each other's blocks must not keep each other from the source.
        patience = self._keep_alive if self._peer.complete else min(self._keep_alive, _TRY_ANOTHER)
        self._scheduler.wait(self._peer, patience)
        if self._peer.failure is not None:
            raise self._peer.failure
        if (cut := self._scheduler.slow(self._peer)) is not None:
            cut()
        longest = max(_TRY_ANOTHER, self._patience) if self._others() else _IDLE * self._keep_alive
        if self._scheduler.idle_for(self._peer) >= longest:
            raise SourceBusy("has no blocks just now that are wanted")
        if not self._scheduler.finished:
            self._receiver.request([])


def _first_few(names: Sequence[str], limit: int = 3) -> str:
    more = len(names) - limit
    return ", ".join(names if more <= 0 else [*names[:limit], f"and {more} more"])
