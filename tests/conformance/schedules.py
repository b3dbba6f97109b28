"""Random joins, deaths, stalls and lies among peers; a number always gives the same schedule."""

import contextlib
import random
from unittest import mock

from vllm_ascend.model_loader.netloader.interaction import source_queue

from .counted import grown, used
from .faults import holding_back, lie, lie_at_times
from .fleet import cut_off, fleet
from .models import ROW, rows
from .sides import source, until

# Where nobody can have everything any more, a load is to end soon, also if all that it knows are
# gone or bring nothing: it asks them again for as long as it may.
_SOON = {"source_wait": 5.0, "progress_timeout": 1.0}
_GRACE = 3.0


def play(way, number):
    """Let a fleet load by the schedule of a number; all that is not as it must be raises."""
    chance = random.Random(number)
    count, stalls, orphans = chance.randint(3, 8), chance.random() < 0.25, chance.random() < 0.15
    its = {
        "max_sources": chance.randint(2 if stalls else 1, 4),
        "connections": chance.randint(1, 2),
        "source_wait": 60.0,
    }
    before = used(way)
    with (
        source(way, rows, max_send_rate=64 * ROW, max_sessions=chance.randint(1, 4)) as seed,
        fleet(way, count, rows, **its | (_SOON if orphans else {})) as replicas,
        contextlib.ExitStack() as stack,
    ):
        if orphans:
            stack.enter_context(mock.patch.object(source_queue, "_GRACE", _GRACE))
        gone = set()
        if stalls:
            stack.enter_context(holding_back(chance.choice(replicas).server, chance.randint(0, 9)))
        for replica in chance.sample(replicas, chance.randint(0, count // 2)):
            chance.choice([lie, lie_at_times])(replica)
        for event in chance.sample(range(count), count):
            replicas[event].start([seed, *chance.sample(replicas, chance.randint(0, 2))])
            if chance.random() < 0.3:
                _wait_for_a_share(chance, seed)
                victim = chance.choice(replicas)
                victim.die()
                gone.add(victim)
        if orphans:
            _wait_for_a_share(chance, seed)
            cut_off(seed.server)
        for replica in replicas:
            replica.check_right_or_failed()
            assert orphans or replica in gone or replica.reasons == "", replica.reasons
    until(lambda: not grown(before, used(way)))


def _wait_for_a_share(chance, seed):
    share = chance.random() * seed.store.blocks.nbytes
    until(lambda: seed.status.bytes_sent > share)
