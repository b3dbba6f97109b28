"""Changes of weights in a living instance: what they are, and how its offers follow them."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum

from .interaction.api import Code

_UNNOTICED = "a change without notice"


class After(Enum):
    """What the weights are once a call that changes them has returned.

    WHOLE: complete. MORE: not yet, as another call will say that they are. AWAKE: what they were
    before the instance went to sleep. UNKNOWN: nobody says when they are complete. MOVED: complete,
    but in places of their own.
    """

    WHOLE = "whole"
    MORE = "more"
    AWAKE = "awake"
    UNKNOWN = "unknown"
    MOVED = "moved"


@dataclass(frozen=True)
class Change:
    """A call that changes weights.

    Attributes:
        name: what is called, for people.
        after: what the weights are when it has returned.
        at_once: whether they change from its beginning; else another change within it says when.
        directly: whether it may write to tensors without post-processing them.
        perhaps: whether it may as well change nothing.
        goes_on: whether it goes on with an update that calls before it have begun.
        sleep: the level at which the instance sleeps from now on.
    """

    name: str
    after: After
    at_once: bool = True
    directly: bool = False
    perhaps: bool = False
    goes_on: bool = False
    sleep: int = 0


class Instance:
    """The weights of one instance in this process, as far as their changes go.

    Args:
        withdraw: called with a code and a reason before the first byte changes; returns when
            nobody reads the weights any more.
        renew: called in a thread of its own once the weights are whole again, with what changed
            them, whether tensors may have been written to directly, whether they must be what they
            were, and an event that ends it early.
        remember: called before a change that may change nothing, so that `renew` can tell.
        forget: called when what was noted of the way in which weights came is no longer true of
            those in memory, with whether they have been moved.
    """

    def __init__(
        self,
        withdraw: Callable[[Code, str], object],
        renew: Callable[[str, bool, bool, threading.Event], object],
        remember: Callable[[], object] = lambda: None,
        forget: Callable[[bool], object] = lambda moved: None,
    ) -> None:
        self._withdraw = withdraw
        self._renew = renew
        self._remember = remember
        self._forget = forget
        self._lock = threading.RLock()
        self._depth = 0
        self._goes_on = False
        self._changed = False
        self._directly = False
        self._asleep = 0
        self._noticed = False
        self._renewing: threading.Thread | None = None
        self._stop = threading.Event()

    @contextlib.contextmanager
    def changing(self, change: Change) -> Iterator[None]:
        """Let nobody have the weights while they change, and offer them anew when they are whole.

        Within one change there may be others; what the weights are afterwards is the outer one's
        to say.
        """
        with self._lock:
            if not self._depth:
                self._goes_on = change.goes_on
            if change.at_once:
                self._begin(change)
            self._depth += 1
        failed = True
        try:
            yield
            failed = False
        finally:
            with self._lock:
                self._depth -= 1
                if not self._depth:
                    self._end(change, failed)

    def changed_without_notice(self) -> None:
        """Offer the weights anew: they have changed, and nobody has said so."""
        with self._lock:
            if self._depth or self._changed:  # it may change nothing, or have been hashed already
                self._noticed = True
            else:
                self._start_unnoticed()

    def stop(self) -> None:
        """Offer nothing any more."""
        self._stop.set()

    def wait(self) -> None:
        """Return when the weights are offered anew, if that is under way."""
        thread = self._renewing
        if thread is not None:
            thread.join()

    def _begin(self, change: Change) -> None:
        self._cancel()
        moved = change.after is After.MOVED
        if moved or not self._goes_on:
            self._forget(moved)
            self._goes_on = True
        first, self._changed = not self._changed, True
        self._directly |= change.directly
        if change.sleep:
            self._asleep = max(self._asleep, change.sleep)
            self._withdraw(Code.ASLEEP, f"the source sleeps ({change.name})")
        elif not self._asleep:
            self._withdraw(Code.CHANGING, f"the weights are being changed ({change.name})")
        if first and change.perhaps:
            self._remember()

    def _end(self, change: Change, failed: bool) -> None:
        slept = self._asleep
        if failed or change.after is After.UNKNOWN:
            self._cancel()
            self._forget(False)
        if change.sleep and failed:
            self._asleep = 0
            self._withdraw(
                Code.CANNOT_SERVE,
                f"{change.name} has failed, and which weights are in memory is not known",
            )
            return
        if change.after is After.AWAKE and not failed:
            self._asleep = 0
        if not self._changed and self._noticed:
            self._start_unnoticed()
            return
        if not self._changed or self._asleep:
            return
        if failed:
            # It may have failed before it changed anything.
            self._start(change.name, unchanged=True)
        elif change.after is After.AWAKE:
            if slept == 1:
                self._start(change.name, unchanged=True)
            elif slept:
                lost = f"sleep level {slept} has dropped the weights, and others have not come yet"
                self._withdraw(Code.CHANGING, lost)
        elif change.after is After.WHOLE:
            self._start(change.name, unchanged=False)
        elif change.after is After.MOVED:
            self._withdraw(Code.CANNOT_SERVE, f"{change.name} has moved experts")
        elif change.after is After.UNKNOWN:
            self._withdraw(
                Code.CANNOT_SERVE,
                f"{change.name} has changed weights, and nobody said that they are complete",
            )

    def _start_unnoticed(self) -> None:
        self._changed = self._directly = True
        self._start(_UNNOTICED, unchanged=False)

    def _start(self, name: str, *, unchanged: bool) -> None:
        self._cancel()
        self._noticed = False
        stop, directly = self._stop, self._directly

        def renew() -> None:
            self._renew(name, directly, unchanged, stop)
            while self._noticed and not stop.is_set():
                self._noticed = False
                self._renew(_UNNOTICED, True, False, stop)
            if not stop.is_set():  # else whoever has set it waits for this thread
                self._changed = self._directly = False

        self._renewing = threading.Thread(target=renew, name="netloader-renew", daemon=True)
        try:
            self._renewing.start()
        except RuntimeError:  # no more threads
            self._renewing = None
            self._withdraw(Code.CANNOT_SERVE, "there was no thread to hash the weights")

    def _cancel(self) -> None:
        self._stop.set()
        if self._renewing is not None and self._renewing is not threading.current_thread():
            self._renewing.join()
        self._renewing, self._stop = None, threading.Event()
