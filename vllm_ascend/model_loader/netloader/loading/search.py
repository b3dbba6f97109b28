"""Whom a load looks for by name, and how it chooses who reads the disk."""

import random
import time

from ..errors import SourceBusy, SourceUnreachable
from ..interaction.cold_start import Choice, Election, Phase, Seen
from ..interaction.discovery import Discovery
from ..interaction.source_queue import SourceQueue
from ..utils import logger
from .sessions import Sessions
from .target import ColdStart, Target

# Seconds between two look-ups of names: at first, and at most.
_FIRST_LOOK_UP, _LAST_LOOK_UP = 0.5, 10.0
# At most, while others may decide who reads the disk, or somebody does.
_COLD_LOOK_UP = 1.0


class Search:
    """Looks names up, and takes part in the choice of an instance that reads the disk."""

    def __init__(
        self,
        discovery: Discovery,
        sessions: Sessions,
        target: Target,
        queue: SourceQueue,
        cold: ColdStart | None,
        process: str,
        worker: int,
    ) -> None:
        self._discovery = discovery
        self._sessions = sessions
        self._target = target
        self._queue = queue
        self._cold = cold
        self._process = process
        self._election: Election | None = None  # until the ranks have told whether they can read
        self._worker = worker
        self._said = ""
        self._told: Choice | None = None
        self._waits = False

    def look_up(self) -> None:
        """Let the sources that names stand for now be asked as well, or decide to ask nobody."""
        endpoints, problems = self._discovery.look_up()
        while (choice := self._choose(self._discovery.seen)) is Choice.VOLUNTEER:
            endpoints, problems = self._discovery.look_up()
        if choice is Choice.READ:
            self._queue.succeeded()
            return
        self._waits = choice is Choice.WAIT
        self._queue.hold(self._waits)
        for problem in self._queue.found(endpoints, problems):
            busy = isinstance(problem, SourceBusy)
            if not self._queue.over.is_set() and not (busy and self._waits):
                self._sessions.warn(problem, busy or isinstance(problem, SourceUnreachable))

    def keep_looking(self) -> None:
        """Look names up again, while there is nobody to ask, until the load is over."""
        pause = _FIRST_LOOK_UP
        while not self._queue.over.wait(pause):
            if self._queue.idle:
                self.look_up()
                # All ask the same few instances, which are not to be kept busy by that.
                cold = max(_COLD_LOOK_UP, len(self._discovery.seen.replicas) / 32)
                longest = cold if self._waits else _LAST_LOOK_UP
                pause = random.uniform(0.75, 1.0) * min(2 * pause, longest)

    def _choose(self, seen: Seen) -> Choice:
        """Decide by what a look-up has shown, and tell of it."""
        cold, election = self._cold, self._election
        if cold is None or self._target.weights is not None:
            if cold is not None and cold.told is None and self._told is not Choice.LEAVE:
                self._told = Choice.LEAVE
                cold.tell(Choice.LEAVE)
            return Choice.LEAVE
        if cold.told is not None:
            choice = cold.told() or Choice.WAIT
            if choice is Choice.READ and not self._target.announce(Phase.READING):
                return Choice.LEAVE
            return choice
        if election is None:
            if (can_read := cold.can_read()) is None:
                return Choice.WAIT
            election = self._election = Election(self._process, can_read=can_read)
        before = election.phase
        choice = election.choose(time.monotonic(), seen)
        if election.phase is not before and not self._target.announce(election.phase):
            choice = Choice.LEAVE
        if choice is not self._told and choice is not Choice.VOLUNTEER:
            self._told = choice
            cold.tell(choice)
        reader = seen.replicas.get(election.reader)
        if choice is Choice.READ:
            logger.info(
                "NetLoader rank %d: chosen to read the weights from disk, as none of %d instances "
                "has them",
                self._worker,
                1 + len(seen.replicas),
            )
        elif reader is not None and reader.state == Phase.READING.value:
            if self._said != election.reader:
                logger.info(
                    "NetLoader rank %d: waiting for %s (instance %s), which reads the weights "
                    "from disk",
                    self._worker,
                    reader.address,
                    election.reader,
                )
            self._said = election.reader
        return choice
