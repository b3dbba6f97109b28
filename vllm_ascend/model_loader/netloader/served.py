"""What one session of a source gets: blocks of a store, over HTTP or through a group."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future

from . import metrics
from .config import NetLoaderConfig
from .errors import Gone, NotHere, Preparing, ProtocolError, Withdrawn
from .executor.chunks.blocks import Run
from .executor.devices import Accelerator
from .executor.elastic_load import P2PSend
from .executor.memory import host_view
from .executor.rate_limiter import RateLimiter
from .executor.store import BlockStore
from .executor.transport.group import SOURCE, GroupSender, TransferGroup, form_group
from .executor.transport.http import HostStaging, HttpSender
from .executor.transport.rendezvous import Mailbox
from .executor.view.offered import Region, Viewed
from .interaction import api
from .interaction.api import Code, Peer, Refusal
from .interaction.elastic import Session
from .utils import Buffer, logger, one_line, rate, size


class Served:
    """What one session gets: the store it pulls, and how much of it was sent.

    Attributes:
        relay: where the client passes on what it gets; None: nowhere.
    """

    def __init__(self, session: Session, store: BlockStore, limiter: RateLimiter) -> None:
        self.store = store
        self.end = ""
        self.relay: Peer | None = None
        self.groups: list[ServedGroup] = []
        self._peer, self._gone = session.peer, session.gone
        self._started = time.monotonic()
        self._views: list[Buffer] = []
        self._http = P2PSend(store, HttpSender(store, self._views.extend), limiter, session.gone)
        self._group: P2PSend | None = None
        self._limiter = limiter
        self._gathered = 0
        self._staging = HostStaging()

    @property
    def bytes_sent(self) -> int:
        """Bytes of blocks and regions that were sent, by any transport."""
        sent = self._http.bytes_sent + self._gathered
        return sent + (self._group.bytes_sent if self._group else 0)

    def views(self, run: Run) -> list[Buffer]:
        """Return the memory of a run that goes out over HTTP."""
        self._views.clear()
        self._http.send(run)
        return [*self._views]

    @contextlib.contextmanager
    def gathered(self, view: Viewed, regions: Sequence[Region]) -> Iterator[list[Buffer]]:
        """Give the elements of regions as they go out over HTTP; they are read meanwhile.

        Raises:
            Withdrawn: the weights are not to be had any more.
        """
        store, accelerator = self.store, self.store.device.accelerator
        nbytes = view.nbytes_of(regions)
        self._limiter.wait(nbytes, store.withdrawn, self._gone)
        with store.device.attached(), store.reading(Run(0, store.blocks.count - 1)):
            host = self._staging.take(nbytes, accelerator)
            if accelerator is None:
                views = view.elements(regions, host, store.withdrawn)
            else:
                message = accelerator.empty(nbytes)
                view.gather(regions, message, store.withdrawn)
                host.copy_(message)
                views = [host_view(host)]
            self._gathered += nbytes
            metrics.count(metrics.SENT_BYTES, "serving", by=nbytes)
            yield views

    def through(self, sender: GroupSender, limiter: RateLimiter) -> P2PSend:
        """Return what sends through a group."""
        self._group = P2PSend(self.store, sender, limiter, self._gone)
        return self._group

    def status(self) -> api.SessionStatus:
        """Say how far it is."""
        seconds = time.monotonic() - self._started
        return api.SessionStatus(
            str(self._peer),
            self.store.digests.weights,
            self.bytes_sent,
            round(seconds, 3),
            self.relay.address if self.relay is not None else None,
        )

    def log(self, rank: int, more: str) -> None:
        """Write the session's one line, and `more`: a warning unless it ended as it should."""
        seconds = time.monotonic() - self._started
        # A client leaves one that is loading itself for another one whenever that brings more.
        usual = self.end in (api.COMPLETE, api.LOOKED) or not self.store.complete
        log = logger.info if usual else logger.warning
        log(
            "NetLoader rank %d: sent %s of %s (%d tensors) in %.2f s (%s) to %s, weights digest "
            "%s: %s%s",
            rank,
            size(self.bytes_sent),
            size(self.store.blocks.nbytes),
            len(self.store.tensors),
            seconds,
            rate(self.bytes_sent, seconds),
            self._peer,
            self.store.digests.weights,
            one_line(self.end) or "the client went away",
            more,
        )


class ServedGroup:
    """The source's end of a two-rank group; see `interaction.elastic.Group`."""

    def __init__(
        self,
        session: Session,
        served: Served,
        accelerator: Accelerator,
        config: NetLoaderConfig,
        limiter: RateLimiter,
        sends: Callable[[Served, Run], bool],
    ) -> None:
        self._sends = sends
        self.max_bytes = config.max_message_bytes
        self._session = session
        self._served = served
        self._accelerator = accelerator
        self._config = config
        self._limiter = limiter
        self._mailbox = Mailbox()
        self._formed: Future[TransferGroup] = Future()
        self._sender: GroupSender | None = None
        self._send: P2PSend | None = None
        self._sending = threading.Lock()

    def start(self) -> None:
        """Begin to form the group, in a thread of its own."""
        try:
            threading.Thread(target=self._form, name="netloader-group", daemon=True).start()
        except RuntimeError as error:  # no more threads
            self._formed.set_exception(error)
            raise

    @property
    def forming(self) -> bool:
        """Whether it is neither formed yet, nor known that it cannot be."""
        return not self._formed.done()

    def call_when_formed(self, call: Callable[[], object]) -> None:
        """Call something when the group is formed, or could not be."""
        self._formed.add_done_callback(lambda _: call())

    def exchange(self, values: list[api.Value]) -> list[api.Value]:
        """Pass values of the group's store on, both ways."""
        with as_refusals():
            return self._mailbox.exchange(values, api.MAX_EXCHANGE_SECONDS)

    def sizes(self, runs: list[api.Run]) -> list[int | None]:
        """Return the sizes of runs that can be sent; None: others are to be asked for one."""
        blocks = self._served.store.blocks
        sizes: list[int | None] = []
        for run in (Run(*run) for run in runs):
            if not blocks.contains(run) or blocks.size_of(run) > self.max_bytes:
                allowed = f"blocks 0-{blocks.count - 1}, {self.max_bytes} bytes of them at once"
                raise Refusal(Code.OUT_OF_RANGE, f"blocks {run} asked for; allowed: {allowed}")
            with as_refusals():
                self._served.store.check(run)
            sizes.append(blocks.size_of(run) if self._sends(self._served, run) else None)
        return sizes

    def send(self, runs: list[api.Run]) -> None:
        """Start to send runs, after waiting for room in the window."""
        with self._accelerator.attached(), as_refusals():
            send = self._ready()
            for run in (Run(*run) for run in runs):
                with self._sending:
                    send.send(run)

    def settle(self) -> None:
        """Return when all that was sent has arrived."""
        if self._sender is not None:
            with self._accelerator.attached(), as_refusals(), self._sending:
                self._sender.finish()

    def settle_last(self) -> None:
        """Wait until nothing of the weights, which were withdrawn, is `in_flight` any more."""
        with contextlib.suppress(Exception):  # then the session's own thread fails, too
            self.settle()

    @property
    def in_flight(self) -> bool:
        """Whether the device may still read what was sent."""
        return self._sender is not None and self._sender.in_flight > 0

    def close(self) -> None:
        """Leave the group, or stop forming it."""
        self._mailbox.close()
        with contextlib.suppress(Exception):  # it was not formed
            self._formed.result(self._config.handshake_timeout).close()

    def _form(self) -> None:
        config, mailbox = self._config, self._mailbox
        try:
            with self._accelerator.attached():
                group = form_group(
                    self._accelerator,
                    mailbox.tell,
                    mailbox.hear,
                    SOURCE,
                    self._session.local_host,
                    handshake=config.handshake_timeout,
                    progress=config.progress_timeout,
                    gone=self._session.gone,
                )
        except BaseException as error:
            self._formed.set_exception(error)
        else:
            self._formed.set_result(group)

    def _ready(self) -> P2PSend:
        """Return what sends through the group, once that is formed."""
        if self._send is None:
            handshake = self._config.handshake_timeout
            try:
                group = self._formed.result(handshake)
            except TimeoutError:
                raise RuntimeError(f"no process group within {handshake:g} s") from None
            self._sender = GroupSender(group, self._served.store, self._accelerator)
            self._send = self._served.through(self._sender, self._limiter)
        return self._send


@contextlib.contextmanager
def as_refusals() -> Iterator[None]:
    """Tell the client in a code what keeps the data plane from sending."""
    try:
        yield
    except Gone as error:
        raise Refusal(Code.GONE, str(error)) from None
    except Preparing as error:
        raise Refusal(Code.PREPARING, str(error)) from None
    except Withdrawn as error:
        raise Refusal(Code.CHANGED, str(error)) from None
    except NotHere as error:
        raise Refusal(Code.NOT_HERE, str(error)) from None
    except (RuntimeError, ProtocolError, TimeoutError) as error:  # torch raises RuntimeErrors
        raise Refusal(Code.TRANSFER_FAILED, one_line(error)) from None
