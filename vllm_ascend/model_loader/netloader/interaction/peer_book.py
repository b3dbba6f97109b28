"""Whom a source names to clients that can pull from others as well."""

import time
from collections.abc import Callable, Collection, Hashable
from heapq import nsmallest

import msgspec

from ..utils import parse_address
from . import api
from .api import Peer

_REMEMBERED = 120.0  # seconds for which a peer is named after it was last heard of
_MOST = 1024  # peers that are remembered
_CERTAIN = 2  # of those named at least, that have a session


class PeerBook:
    """The peers of one source, and which weights each gets or has; the caller has the lock.

    Args:
        clock: returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        # By address and instance, in the order in which they were last heard of.
        self._known: dict[tuple[str, str], _Known] = {}

    def know(
        self, weights: str, peer: Peer, session: Hashable = None, *, complete: bool = False
    ) -> None:
        """Name a peer from now on.

        Args:
            weights: digest of what it gets or has.
            peer: where it listens; what it says of itself beyond that is not passed on.
            session: in which it has said so, until `left`; None: in none.
            complete: whether it has every block.
        """
        try:
            parse_address(peer.address)
        except ValueError:
            return  # nobody could ask it
        key = peer.address, peer.instance
        known = self._known.pop(key, None) or _Known(Peer(*key))
        self._known[key] = known
        known.weights, known.heard = weights, self._clock()
        if session is not None:
            known.sessions.discard(None)  # now it can be seen when it goes
        known.sessions.add(session)
        if complete:
            self.complete(peer)
        if len(self._known) > _MOST:
            strangers = (key for key, known in self._known.items() if known.sessions <= {None})
            del self._known[next(strangers, next(iter(self._known)))]

    def left(self, peer: Peer, session: Hashable, *, complete: bool = False) -> bool:
        """Name a peer no more if this was the last that told of it, unless it is complete.

        Returns:
            Whether it is not named any more.
        """
        known = self._known.get((peer.address, peer.instance))
        if known is None:
            return True
        known.sessions.discard(session)
        if complete:
            known.sessions.add(None)
        elif not known.sessions:
            del self._known[peer.address, peer.instance]
            return True
        return False

    def complete(self, peer: Peer) -> None:
        """Say of a peer that it has every block."""
        if (known := self._known.get((peer.address, peer.instance))) is not None:
            known.peer = msgspec.structs.replace(known.peer, state="serving")

    def others(self, weights: str, client: str | None, there: Collection[str | None]) -> list[Peer]:
        """Return whom a client can ask, those that were named to fewest.

        Args:
            weights: what the client wants.
            client: its address; None: the answer is for information and does not count.
            there: addresses of peers that have a session here.
        """
        now = self._clock()
        for key, known in [*self._known.items()]:
            if now - known.heard > _REMEMBERED and known.peer.address not in there:
                del self._known[key]
        asked_for = [
            known
            for known in self._known.values()
            if known.weights == weights and known.peer.address != client
        ]
        # Whom nobody has let in may be nobody at all, so they are not all that is named.
        there_now = (known for known in asked_for if known.peer.address in there)
        others = [*nsmallest(_CERTAIN, there_now, key=_load)]
        others += nsmallest(api.MAX_PEERS, asked_for, key=_load)
        others = [*dict.fromkeys(others)][: api.MAX_PEERS]
        if client is not None:
            for one in others:
                one.peer = msgspec.structs.replace(one.peer, load=one.peer.load + 1)
        return [one.peer for one in others]


class _Known:
    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.weights = ""
        self.heard = 0.0
        self.sessions: set[Hashable] = set()


def _load(known: _Known) -> int:
    return known.peer.load
