"""The two ends of a session: `P2PLoad` receives, `P2PSend` sends."""

from collections import deque
from collections.abc import Sequence
from typing import Protocol

from ..errors import TransferCorrupt
from .chunks.blocks import Run
from .rate_limiter import RateLimiter
from .scheduler import Scheduler
from .store import BlockStore


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

    def receive(self) -> None:
        """Return once the oldest run that was asked for is in the store's memory.

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

    Attributes:
        bytes_sent: bytes of the runs that were sent.
    """

    def __init__(self, store: BlockStore, sender: Sender, limiter: RateLimiter) -> None:
        self._store = store
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
        self._limiter.wait(nbytes, self._store.withdrawn)
        self._store.check(run)
        self._sender.send(run)
        self.bytes_sent += nbytes


class P2PLoad:
    """Pulls what a store still lacks from one source, verified run by run.

    Args:
        receiver: the way from the source.
        store: what is filled, by this session and others.
        scheduler: which runs are wanted.
        verify: whether digests are checked.
        keep_alive: seconds after which a session with nothing to fetch says that it is there.

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
    ) -> None:
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
            TransferCorrupt: a run came with wrong bytes for the second time.
            Exception: see `Receiver.receive`.
        """
        with self._scheduler.session():
            while not self._scheduler.finished:
                self._request()
                if not self._requested:
                    self._idle()
                    continue
                self._receiver.receive()
                self._checking = self._requested.popleft()
                self._request()  # so that the next one is on its way while this one is checked
                self._check(self._checking)
                self._checking = None

    def _request(self) -> None:
        receiver, held = self._receiver, len(self._requested)
        if held <= receiver.ahead - receiver.batch and (
            runs := self._scheduler.take(receiver.batch, held, receiver.max_bytes)
        ):
            self._requested.extend(runs)
            receiver.request(runs)

    def _check(self, run: Run) -> None:
        wrong = self._store.wrong(run) if self._verify else []
        if not wrong:
            self._store.add(run)
            self.bytes_received += self._store.blocks.size_of(run)
            self._scheduler.done()
            return
        if run in self._wrong_before:
            names = self._store.names(wrong)
            error = TransferCorrupt(f"wrong bytes twice in blocks {run} ({_first_few(names)})")
            error.block = wrong[0]
            raise error
        self._wrong_before.add(run)
        self._scheduler.give_back([run])

    def _idle(self) -> None:
        self._scheduler.wait(self._keep_alive)
        if not self._scheduler.finished:
            self._receiver.request([])


def _first_few(names: Sequence[str], limit: int = 3) -> str:
    more = len(names) - limit
    return ", ".join(names if more <= 0 else [*names[:limit], f"and {more} more"])
