"""Who reads the weights from disk when instances start together and none of them has any.

Each instance says in its status how far it is, and looks now and then at what the others say. All
decide alike from that, without a coordinator:

1. While one has the weights, gets them or reads them from disk, the others wait for it.
2. Else, once two looks in a row have shown the same instances, the one with the least id among
   those that have the weights on disk volunteers. It says so, and looks again before it reads.
3. Of two that volunteer at the same time the one with the lesser id goes on, once the other one has
   stepped back. So two that can see each other never both read: each speaks before it looks.

Where no disk has the weights, an instance whose ranks have other parts of them is read in its
place. All that see it volunteer at first.

One that is chosen and does nothing is passed over after a while. One that does not answer may read
the disk, so it is waited for, but not for longer than that either.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from enum import Enum, StrEnum

_PATIENCE = 30.0  # seconds to wait for one that does not answer, or that does not do its part


class Phase(StrEnum):
    """How far an instance is that cannot be loaded from yet, as it stands in its status."""

    WAITING = "waiting"
    VOLUNTEERING = "volunteering"
    READING = "reading"
    LOADING = "loading"


_WITHOUT_WEIGHTS = {Phase.WAITING.value, Phase.VOLUNTEERING.value, Phase.READING.value}


def has_weights(state: str) -> bool:
    """Return whether an instance has weights, or some of them, by the state in its status."""
    return state not in _WITHOUT_WEIGHTS


@dataclass(frozen=True)
class Replica:
    """Another instance of the same model.

    Attributes:
        state: see `api.ModelStatus`.
        can_read: whether it would read its disk for all.
        address: where it listens, for people.
    """

    state: str
    can_read: bool = False
    address: str = ""


@dataclass(frozen=True)
class Seen:
    """What one look has shown.

    Attributes:
        replicas: the others, by id of the instance.
        listed: whether the names stand for this instance, too, so that the others see it.
        silent: those of whom nobody knows whether they are there.
        whole: whether all names could be looked up.
        others: addresses of instances that serve the same weights, in other parts.
    """

    replicas: Mapping[str, Replica] = field(default_factory=dict)
    listed: bool = False
    silent: Set[str] = frozenset()
    whole: bool = True
    others: Sequence[str] = ()


class Choice(Enum):
    """What an instance does next.

    LEAVE: there is nothing to wait for beyond what sources say of themselves. WAIT: look again
    after a while. VOLUNTEER: say so, and look again at once. READ: read the disk.
    """

    LEAVE = "leave"
    WAIT = "wait"
    VOLUNTEER = "volunteer"
    READ = "read"


class Election:
    """The part that one instance takes.

    Args:
        instance: its id.
        can_read: whether it would read its disk for all.

    Attributes:
        phase: what it says of itself.
        reader: id of the instance that it waits for; empty: of none.
    """

    def __init__(self, instance: str, *, can_read: bool) -> None:
        self.phase = Phase.WAITING
        self.reader = ""
        self._instance = instance
        self._can_read = can_read
        self._before: Set[str] | None = None
        self._since: dict[str, float] = {}  # when those began that are waited for

    def choose(self, now: float, seen: Seen) -> Choice:
        """Decide by a new look.

        Args:
            now: seconds.
            seen: what it has shown.
        """
        states = {instance: replica.state for instance, replica in seen.replicas.items()}
        settled = self._before == states.keys()
        self._before = states.keys()
        self.reader = min(_in(states, Phase.READING), default="")
        if self.reader:
            return self._step_back(Choice.WAIT)
        candidates = [one for one, replica in seen.replicas.items() if replica.can_read]
        # Whose disk has the weights comes first: a view may lack something.
        if self._can_read or (seen.others and not candidates):
            candidates.append(self._instance)
        if any(map(has_weights, states.values())) or not candidates or not seen.listed:
            return self._step_back(Choice.LEAVE)
        present = states.keys() | seen.silent
        self._since = {one: since for one, since in self._since.items() if one in present}
        silent = self._left({*seen.silent}, now)
        rivals = self._left({*_in(states, Phase.VOLUNTEERING)}, now)
        if self.phase is Phase.VOLUNTEERING:
            if any(rival < self._instance for rival in rivals):
                self.reader = min(rivals)
                self.phase = Phase.WAITING
                return Choice.WAIT
            if rivals or silent or not seen.whole:
                return Choice.WAIT
            self.phase = Phase.READING
            return Choice.READ
        if silent or not settled or not seen.whole:
            return Choice.WAIT
        passed = {one for one in self._since if not self._left({one}, now)}
        chosen = min(rivals or {*candidates} - passed, default="")
        if chosen == self._instance:
            self.phase = Phase.VOLUNTEERING
            return Choice.VOLUNTEER
        self.reader = chosen
        self._left({chosen}, now)
        return Choice.WAIT

    def _step_back(self, choice: Choice) -> Choice:
        self.phase = Phase.WAITING
        self._since = {}
        return choice

    def _left(self, waited_for: set[str], now: float) -> set[str]:
        """Return those of whom it is not too long yet that they are waited for."""
        for one in waited_for:
            self._since.setdefault(one, now)
        return {one for one in waited_for if now - self._since[one] < _PATIENCE}


def _in(states: Mapping[str, str], phase: Phase) -> list[str]:
    return [instance for instance, state in states.items() if state == phase.value]
