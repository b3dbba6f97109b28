"""Where the two ranks of a session meet: a store whose values go over their control connection."""

import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta

from torch.distributed import Store

from ...errors import ProtocolError

# A backend sets one or two values; on NPUs each attempt sets these and three more.
_MOST_VALUES = 64

Tell = Callable[[str, bytes], object]
Hear = Callable[[float], tuple[str, bytes]]


class Mailbox:
    """Values on their way between a store here and a peer that asks for them now and then."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._in: list[tuple[str, bytes]] = []
        self._out: list[tuple[str, bytes]] = []
        self._closed = False

    def tell(self, key: str, value: bytes) -> None:
        """Have a value ready for the peer."""
        with self._changed:
            self._out.append((key, value))
            self._changed.notify_all()

    def hear(self, timeout: float) -> tuple[str, bytes]:
        """Return the value that the peer has set next.

        Raises:
            OSError: there was none in time, or there will be none.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._in or self._closed, timeout)
            if self._closed:
                raise ConnectionResetError("the peer is gone")
            if not self._in:
                raise TimeoutError(f"the peer set no value for {timeout:g} s")
            return self._in.pop(0)

    def exchange(
        self, values: Sequence[tuple[str, bytes]], timeout: float
    ) -> list[tuple[str, bytes]]:
        """Take what the peer has set, and return what is ready for it.

        A peer that has set nothing waits until there is any: one that has may have more to set.

        Raises:
            ProtocolError: the peer sets more than any backend does.
        """
        with self._changed:
            if len(self._in) + len(values) > _MOST_VALUES:
                raise ProtocolError(f"more than {_MOST_VALUES} values for a process group")
            self._in += values
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._out or self._closed or values, timeout)
            ready, self._out = self._out, []
            return ready

    def close(self) -> None:
        """Let nobody wait any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class PeerStore(Store):
    """A key-value store of two ranks, each of which sends the other whatever it sets.

    torch's `TCPStore` would be one more port for each session to reach. It also asks the DNS for
    the name of every client's address, which can take longer than a handshake may, and waits
    without a deadline for a server that is stopped.

    Args:
        tell: sends the peer a key and its value.
        hear: returns the key and the value that the peer has sent next, within so many seconds.
        timeout: seconds for all that has to be said.

    Attributes:
        failure: what `tell` or `hear` has raised. torch passes it on in words of its own.
    """

    def __init__(self, tell: Tell, hear: Hear, timeout: float) -> None:
        super().__init__()
        self._tell = tell
        self._hear = hear
        self._deadline = time.monotonic() + timeout
        self._values: dict[str, bytes] = {}
        self._closed = False
        self.failure: Exception | None = None

    @property
    def remaining(self) -> float:
        """Seconds until the deadline."""
        return max(0.0, self._deadline - time.monotonic())

    def meet(self, rank: int, where: str) -> None:
        """Return once the other of the ranks 0 and 1 has called this, too.

        Everything that it has set before has been heard by then.
        """
        self.set(f"{rank} {where}", b"")
        self.get(f"{1 - rank} {where}")

    def close(self) -> None:
        """Say and hear nothing more: the connection is for other messages now."""
        self._closed = True
        self.failure = None  # whose traceback has frames that refer to this

    # What torch calls

    def set(self, key: str, value: bytes) -> None:
        """Set a value, here and there."""
        try:
            if not self._closed:
                self._tell(key, bytes(value))
        except Exception as error:
            self.failure = error
            raise
        self._values[key] = bytes(value)

    def get(self, key: str) -> bytes:
        """Return a value once it has been set.

        Raises:
            OSError: the connection failed, or the time is up.
            ProtocolError: the peer sets more than any backend does.
            RuntimeError: it had not been set when the store was closed.
        """
        try:
            while key not in self._values:
                if self._closed:
                    raise RuntimeError(f"{key!r} was not set while the group was built")
                name, value = self._hear(self.remaining)
                if len(self._values) >= _MOST_VALUES:
                    raise ProtocolError(f"more than {_MOST_VALUES} values for a process group")
                self._values[name] = value
        except Exception as error:
            self.failure = error
            raise
        return self._values[key]

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Return once all have been set; this store's deadline is the one that counts."""
        for key in keys:
            self.get(key)

    def check(self, keys: list[str]) -> bool:
        """Return whether all have been set, as far as that is known here."""
        return all(key in self._values for key in keys)

    def has_extended_api(self) -> bool:
        """Appending and the like are not there."""
        return False
