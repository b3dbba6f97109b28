"""Who reads the disk when instances start together and none of them has the weights."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.identity import identity
from vllm_ascend.model_loader.netloader.interaction.cold_start import (
    Choice,
    Election,
    Phase,
    Replica,
    Seen,
)
from vllm_ascend.model_loader.netloader.loading.target import ColdStart, Target

from .support import DEVICE
from .support import settings as netloader_settings

WAITS = Replica("waiting", can_read=True)
CANNOT = Replica("waiting")
LONG = 31.0


def seen(*, listed=True, silent=(), whole=True, others=(), **replicas):
    return Seen(replicas, listed, frozenset(silent), whole, others)


def choices(election, *looks, step=0.5):
    return [election.choose(step * number, look) for number, look in enumerate(looks)]


def volunteer(name="b", **others):
    election = Election(name, can_read=True)
    assert choices(election, *[seen(**others)] * 2)[-1] is Choice.VOLUNTEER
    return election


def test_one_that_is_alone_reads_after_two_looks_that_agree():
    alone = Election("a", can_read=True)
    assert choices(alone, *[seen()] * 3) == [Choice.WAIT, Choice.VOLUNTEER, Choice.READ]
    assert alone.phase is Phase.READING


def test_the_least_id_of_those_that_can_read_is_chosen():
    last = Election("c", can_read=True)
    look = seen(a=CANNOT, b=WAITS, d=WAITS)
    assert choices(last, look, look) == [Choice.WAIT] * 2
    assert last.reader == "b"
    assert volunteer("b", a=CANNOT, c=WAITS).reader == ""


def test_nothing_is_chosen_while_the_instances_change():
    first = Election("a", can_read=True)
    assert choices(first, seen(), seen(b=WAITS), seen(c=WAITS)) == [Choice.WAIT] * 3
    assert first.choose(2.0, seen(c=WAITS)) is Choice.VOLUNTEER


@pytest.mark.parametrize("state", ["serving", "loading", "preparing", "asleep"])
def test_nobody_reads_where_somebody_has_weights(state):
    look = seen(b=Replica(state), c=WAITS)
    assert choices(Election("a", can_read=True), *[look] * 9) == [Choice.LEAVE] * 9


def test_a_newcomer_with_a_lesser_id_waits_for_the_one_that_reads():
    newcomer = Election("a", can_read=True)
    look = seen(b=Replica("reading", can_read=True), c=WAITS)
    assert choices(newcomer, *[look] * 9) == [Choice.WAIT] * 9
    assert newcomer.reader == "b"


def test_when_the_one_that_reads_is_gone_the_next_one_takes_over():
    next_one = Election("b", can_read=True)
    reads = Replica("reading", can_read=True)
    assert choices(next_one, seen(a=reads, c=WAITS)) == [Choice.WAIT]
    assert choices(next_one, *[seen(c=WAITS)] * 3) == [
        Choice.WAIT,
        Choice.VOLUNTEER,
        Choice.READ,
    ]


def test_without_weights_on_its_disk_an_instance_never_volunteers():
    assert choices(Election("a", can_read=False), *[seen()] * 9) == [Choice.LEAVE] * 9
    waits = Election("a", can_read=False)
    assert choices(waits, *[seen(b=WAITS)] * 3) == [Choice.WAIT] * 3 and waits.reader == "b"


def test_whom_the_others_cannot_see_does_not_volunteer():
    look = seen(listed=False, b=WAITS)
    assert choices(Election("a", can_read=True), *[look] * 9) == [Choice.LEAVE] * 9


def test_a_name_that_is_not_known_decides_nothing():
    assert choices(Election("a", can_read=True), *[seen(whole=False)] * 99) == [Choice.WAIT] * 99


def test_one_that_volunteers_steps_back_for_a_lesser_id_and_waits_for_a_greater_one():
    rival = Replica("volunteering", can_read=True)
    steps_back = volunteer("b", a=CANNOT)
    assert steps_back.choose(2.0, seen(a=rival)) is Choice.WAIT
    assert steps_back.phase is Phase.WAITING and steps_back.reader == "a"
    goes_on = volunteer("b", c=WAITS)
    assert goes_on.choose(2.0, seen(c=rival)) is Choice.WAIT
    assert goes_on.choose(2.1, seen(c=WAITS)) is Choice.READ


def test_one_that_volunteers_steps_back_for_one_that_reads_or_has_weights():
    for state, choice in ("reading", Choice.WAIT), ("serving", Choice.LEAVE):
        election = volunteer("b", c=WAITS)
        assert election.choose(2.0, seen(c=Replica(state, True))) is choice
        assert election.phase is Phase.WAITING


def test_one_that_does_not_answer_is_waited_for_and_not_for_long():
    election = Election("a", can_read=True)
    look = seen(silent=["192.0.2.1:1"])
    assert choices(election, look, look, look) == [Choice.WAIT] * 3
    assert election.choose(LONG, look) is Choice.VOLUNTEER
    assert election.choose(LONG, look) is Choice.READ


def test_one_that_is_chosen_and_does_nothing_is_passed_over():
    election, look = Election("b", can_read=True), seen(a=WAITS, c=WAITS)
    assert choices(election, look, look) == [Choice.WAIT] * 2
    assert election.choose(LONG, look) is Choice.VOLUNTEER
    stuck = seen(a=Replica("volunteering", can_read=True), c=WAITS)
    election = Election("b", can_read=True)
    assert choices(election, stuck, stuck) == [Choice.WAIT] * 2
    assert election.choose(LONG, stuck) is Choice.VOLUNTEER
    assert election.choose(LONG, stuck) is Choice.READ


# Any number of them, in any order


class World:
    """Instances that start, look, say what follows from it, and die, in any order."""

    def __init__(self, can_read):
        self.now = 0.0
        self.can_read = can_read
        self.elections, self.states, self.looks, self.reads = {}, {}, {}, []

    def start(self, name):
        if name not in self.elections:
            self.elections[name] = Election(name, can_read=self.can_read[name])
            self.states[name] = "waiting"

    def die(self, name):
        self.states.pop(name, None)
        self.looks.pop(name, None)

    def look(self, name, apart=frozenset()):
        if self.states.get(name) in ("waiting", "volunteering"):
            others = {
                other: Replica(state, self.can_read[other])
                for other, state in self.states.items()
                if other != name and (other in apart) == (name in apart)
            }
            self.looks.setdefault(name, Seen(others, listed=True))

    def say(self, name):
        """Say what follows from the look, if there was one."""
        if (look := self.looks.pop(name, None)) is not None:
            choice = self.elections[name].choose(self.now, look)
            self.states[name] = self.elections[name].phase.value
            if choice is Choice.READ:
                self.reads.append(name)

    def look_and_say(self, name):
        self.look(name)
        self.say(name)

    def serve(self):
        """Those that read are done."""
        for name, state in self.states.items():
            self.states[name] = "serving" if state == "reading" else state

    def reading(self):
        return [name for name, state in self.states.items() if state == "reading"]


NAMES = "abcde"
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["start", "look", "look", "say", "say", "die"]), st.sampled_from(NAMES)
    ),
    max_size=100,
)
READERS = st.fixed_dictionaries({name: st.booleans() for name in NAMES})


def test_of_two_that_start_at_any_moment_one_reads_whatever_the_order_of_their_steps():
    able = dict.fromkeys("ab", True)
    for order in itertools.product("ab", repeat=13):
        world = World(able)
        for name in order:
            world.start(name)
            if name in world.looks:
                world.say(name)
            else:
                world.look(name)
        assert len(world.reads) <= 1, order


@given(READERS, STEPS)
@settings(deadline=None)
def test_no_two_read_at_the_same_time_whatever_the_order(can_read, steps):
    world = World(can_read)
    for step, name in steps:
        getattr(world, step)(name)
        world.now += 0.1
        assert len(world.reading()) <= 1
    assert all(can_read[name] for name in world.reads)


@given(READERS, STEPS, st.frozensets(st.sampled_from(NAMES)))
@settings(deadline=None)
def test_whatever_has_happened_one_reads_soon_if_any_can(can_read, steps, apart):
    world = World(can_read)
    for step, name in steps:
        if step == "look":
            world.look(name, apart)
        else:
            getattr(world, step)(name)
        world.now += 0.1
        assert len(world.reading()) <= 2  # one on each side
    for _ in range(8):
        for name in NAMES:
            world.look_and_say(name)
        world.now += 0.5
    able = [name for name in world.states if can_read[name]]
    assert bool(world.reading()) == bool(able)


@given(READERS, st.permutations(NAMES))
@settings(deadline=None)
def test_all_that_start_together_wait_for_the_same_one_and_the_disk_is_read_once(can_read, order):
    world = World(can_read)
    for name in NAMES:
        world.start(name)
    for _ in range(5):
        for name in order:
            world.look_and_say(name)
        world.now += 0.5
    able = [name for name in NAMES if can_read[name]]
    assert world.reads == able[:1]
    readers = {one.reader for name, one in world.elections.items() if name not in world.reads}
    assert readers <= {able[0] if able else ""}
    world.serve()
    for name in order:
        world.look_and_say(name)
    assert world.reads == able[:1]


def test_one_that_sees_the_weights_in_other_parts_volunteers_if_no_disk_has_them():
    first, second = (Election(name, can_read=False) for name in "ac")
    look = seen(b=Replica("waiting"), others=["192.0.2.1:1"])
    assert choices(first, look, look, look) == [Choice.WAIT, Choice.VOLUNTEER, Choice.READ]
    with_disk = seen(b=WAITS, others=["192.0.2.1:1"])
    assert choices(second, with_disk, with_disk) == [Choice.WAIT, Choice.WAIT]
    assert second.reader == "b"


def test_nothing_is_said_of_a_load_that_is_over():
    said = []
    cold = ColdStart(lambda: True, said.append, lambda choice: None, None)
    nothing = {}, None, None, cold, None, lambda attributes: None
    target = Target({}, (), identity(), netloader_settings(), DEVICE, *nothing)
    assert target.announce(Phase.VOLUNTEERING)
    target.complete()
    assert not target.announce(Phase.READING)
    assert said == [Phase.VOLUNTEERING]
