import itertools
import sys
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from vllm_ascend.model_loader.netloader.executor.chunks.blocks import Blocks, Run
from vllm_ascend.model_loader.netloader.executor.scheduler import FirstCopy, Peer, Scheduler

from .support import MIB, PATIENCE


def scheduler_of(sizes, chunk_mib=1, **settings):
    """A scheduler of tensors of such sizes, in MiB."""
    blocks = Blocks([size * MIB for size in sizes])
    return Scheduler(blocks, blocks.cut(chunk_mib * MIB), **settings)


def of(count):
    """A scheduler of so many runs, each of which is a block and a tensor."""
    return scheduler_of([1] * count)


def numbers(runs):
    assert all(run.first == run.last for run in runs)
    return [run.first for run in runs]


def everything(scheduler, limit=8):
    """All that it hands out until it has nothing more, request by request."""
    return list(iter(lambda: numbers(scheduler.take(Peer(), limit)), []))


def test_every_run_is_handed_out_once_and_in_order():
    scheduler = of(30)
    assert [*itertools.chain(*everything(scheduler))] == list(range(30))
    assert scheduler.take(Peer(), 8) == []


def test_a_session_by_itself_gets_all_it_asks_for():
    scheduler = of(30)
    with scheduler.session(Peer()):
        assert [len(runs) for runs in everything(scheduler)] == [8, 8, 8, 6]


def test_several_sessions_get_less_the_less_is_left():
    scheduler = of(30)
    with scheduler.session(Peer()), scheduler.session(Peer()):
        assert [len(scheduler.take(Peer(), 100)) for _ in range(3)] == [8, 6, 4]


def test_a_session_that_holds_its_share_gets_no_more_while_others_are_there():
    scheduler = of(30)
    with scheduler.session(Peer()), scheduler.session(Peer()):
        assert len(scheduler.take(Peer(), 100, held=5)) == 3
        assert len(scheduler.take(Peer(), 100, held=7)) == 0
    with scheduler.session(Peer()):
        assert len(scheduler.take(Peer(), 100, held=7)) == 27


def test_a_session_may_always_hold_two_runs():
    scheduler = of(2)
    with scheduler.session(Peer()), scheduler.session(Peer()):
        assert [numbers(scheduler.take(Peer(), 8)) for _ in range(2)] == [[0, 1], []]
    scheduler = of(2)
    with scheduler.session(Peer()), scheduler.session(Peer()):
        takes = [numbers(scheduler.take(Peer(), 8, held=held)) for held in (1, 2, 1)]
        assert takes == [[0], [], [1]]


def test_a_session_that_ended_counts_no_more():
    scheduler = of(30)
    with pytest.raises(RuntimeError), scheduler.session(Peer()):
        raise RuntimeError
    with scheduler.session(Peer()):
        assert len(scheduler.take(Peer(), 100)) == 30


def test_runs_given_back_come_before_the_others():
    scheduler = of(3)
    assert numbers(scheduler.take(Peer(), 1)) == [0]
    scheduler.give_back([Run(0, 0)])
    assert numbers(scheduler.take(Peer(), 3)) == [0, 1, 2]


def test_it_is_finished_when_every_run_is_done():
    scheduler = of(2)
    for run in scheduler.take(Peer(), 2):
        assert not scheduler.finished
        scheduler.done(run)
    assert scheduler.finished


def test_what_is_in_place_is_handed_out_to_nobody():
    scheduler = of(4)
    assert numbers(scheduler.wanted) == [0, 1, 2, 3]
    for number in (0, 2):
        scheduler.skip(Run(number, number))
    assert numbers(scheduler.wanted) == [1, 3]
    with scheduler.session(Peer()):
        taken = scheduler.take(Peer(), 4)
        assert numbers(taken) == [1, 3]
        assert not scheduler.finished
        for run in taken:
            scheduler.done(run)
    assert scheduler.finished


def test_with_nothing_to_fetch_it_is_finished():
    assert of(0).finished
    assert not scheduler_of([0]).finished  # a block without bytes is one to be checked


@pytest.mark.parametrize("max_bytes", [1, MIB, 3 * MIB, sys.maxsize])
def test_a_run_over_a_sources_limit_is_handed_out_in_parts(max_bytes):
    blocks = Blocks([8 * MIB, 100, 100, 8 * MIB])
    scheduler = Scheduler(blocks, blocks.cut(8 * MIB))
    taken = []
    while runs := scheduler.take(Peer(), 2, max_bytes=max_bytes):
        for run in runs:
            assert blocks.size_of(run) <= max(max_bytes, MIB)
            taken += range(run.first, run.last + 1)
            assert not scheduler.finished
            scheduler.done(run)
    assert taken == list(range(blocks.count))
    assert scheduler.finished


def test_parts_of_a_run_may_go_to_another_source_in_larger_ones():
    scheduler = scheduler_of([4], 4)
    assert scheduler.take(Peer(), 1, max_bytes=MIB) == [Run(0, 0)]
    assert scheduler.take(Peer(), 9) == [Run(1, 1), Run(2, 2), Run(3, 3)]


class Interleavings(RuleBasedStateMachine):
    """Sessions that come and go, fail and finish in any order."""

    @initialize(
        sizes=st.lists(st.sampled_from([0, 100, MIB, 5 * MIB + 1]), max_size=12),
        chunk_mib=st.sampled_from([1, 4]),
    )
    def begin(self, sizes, chunk_mib):
        self.blocks = Blocks(sizes)
        self.scheduler = Scheduler(self.blocks, self.blocks.cut(chunk_mib * MIB))
        self.sessions = []
        self.done = []

    def one(self, number):
        return self.sessions[number % len(self.sessions)] if self.sessions else None

    @rule()
    def join(self):
        session = self.scheduler.session(Peer())
        session.__enter__()
        self.sessions.append((session, []))

    @rule(
        number=st.integers(0, 9),
        limit=st.integers(1, 9),
        max_bytes=st.sampled_from([MIB, 3 * MIB, sys.maxsize]),
    )
    def take(self, number, limit, max_bytes):
        if one := self.one(number):
            held = one[1]
            runs = self.scheduler.take(Peer(), limit, len(held), max_bytes)
            assert len(runs) <= limit
            held += runs

    @rule(number=st.integers(0, 9))
    def finish(self, number):
        if (one := self.one(number)) and one[1]:
            self.done.append(one[1].pop(0))
            self.scheduler.done(self.done[-1])

    @rule(number=st.integers(0, 9))
    def wrong(self, number):
        if (one := self.one(number)) and one[1]:
            self.scheduler.give_back([one[1].pop()])

    @rule(number=st.integers(0, 9))
    def leave(self, number):
        if one := self.one(number):
            self.sessions.remove(one)
            session, held = one
            session.__exit__(None, None, None)
            self.scheduler.give_back(held)

    @invariant()
    def every_block_is_in_one_place(self):
        if not hasattr(self, "scheduler"):
            return
        held = [run for _, runs in self.sessions for run in runs]
        counted = self.numbers([*held, *self.done, *self.scheduler.wanted])
        assert counted == list(range(self.blocks.count))
        assert self.scheduler.finished == (len(self.numbers(self.done)) == self.blocks.count)

    @staticmethod
    def numbers(runs):
        return sorted(block for run in runs for block in range(run.first, run.last + 1))


TestInterleavings = Interleavings.TestCase
TestInterleavings.settings = settings(max_examples=30, stateful_step_count=40)


@given(st.integers(1, 4), st.integers(0, 40), st.integers(1, 4))
def test_threads_get_every_run_once_between_them(threads, count, limit):
    scheduler, got = of(count), []

    def work(turn):
        with scheduler.session(Peer()):
            while not scheduler.finished:
                runs = scheduler.take(Peer(), limit)
                if not runs:
                    scheduler.wait(Peer(), 0.01)
                for run in runs:
                    if (run.first + turn) % 7 == 0:
                        turn += 1
                        scheduler.give_back([run])
                    else:
                        got.append(run.first)
                        scheduler.done(run)

    working = [threading.Thread(target=work, args=(turn,)) for turn in range(threads)]
    for thread in working:
        thread.start()
    for thread in working:
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert sorted(got) == list(range(count))


@pytest.mark.parametrize("happens", ["given back", "done"])
def test_who_waits_goes_on_when_a_run_comes_back_or_all_are_done(happens):
    scheduler = of(1)
    scheduler.take(Peer(), 1)
    over = threading.Event()

    def wait():
        scheduler.wait(Peer(), 10 * PATIENCE)
        over.set()

    threading.Thread(target=wait, daemon=True).start()
    assert not over.wait(0.05)
    scheduler.done(Run(0, 0)) if happens == "done" else scheduler.give_back([Run(0, 0)])
    assert over.wait(PATIENCE)


def test_who_waits_in_vain_goes_on_when_its_time_is_up():
    scheduler = of(1)
    scheduler.take(Peer(), 1)
    scheduler.wait(Peer(), 0.01)


# Sources that are incomplete


class Ticks:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def of_relays(count, *having, order=None):
    """A scheduler, and one incomplete source for each of the lists of blocks that it has."""
    blocks = Blocks([MIB] * count)
    runs = [Run(block, block) for block in order or range(count)]
    scheduler = Scheduler(blocks, runs, Ticks())
    peers = []
    scheduler.kept = []  # a session that nobody has any more is over
    for blocks in having:
        peer = Peer(complete=False)
        scheduler.kept.append(scheduler.session(peer))
        scheduler.kept[-1].__enter__()
        scheduler.heard(peer, [Run(block, block) for block in blocks], complete=False)
        peers.append(peer)
    return scheduler, peers


def taken(scheduler, peer=None, limit=1):
    return numbers(scheduler.take(peer or Peer(), limit))


def test_an_incomplete_source_is_asked_for_what_it_has():
    scheduler, [peer] = of_relays(9, [2, 5])
    assert taken(scheduler, peer, 9) == [2, 5]
    assert taken(scheduler, peer) == []
    scheduler.heard(peer, [Run(6, 7)], complete=False)
    assert taken(scheduler, peer, 9) == [6, 7]
    scheduler.heard(peer, [], complete=True)
    assert taken(scheduler, peer, 9) == [0, 1, 3, 4, 8]


def test_a_run_is_there_once_all_its_blocks_are():
    scheduler = scheduler_of([8], 4)
    peer = Peer(complete=False)
    with scheduler.session(peer):
        scheduler.heard(peer, [Run(0, 2), Run(5, 7)], complete=False)
        assert scheduler.take(peer, 9) == []
        scheduler.heard(peer, [Run(3, 3)], complete=False)
        assert scheduler.take(peer, 9) == [Run(0, 3)]


def test_blocks_that_do_not_exist_are_no_news():
    scheduler, [peer] = of_relays(3, [])
    scheduler.heard(peer, [Run(2, 99), Run(50, 60)], complete=False)
    assert taken(scheduler, peer, 9) == [2]


def test_news_that_come_before_the_session_begins_count_from_when_it_does():
    scheduler, [other] = of_relays(4, [0, 1])
    early = Peer(complete=False)
    scheduler.heard(early, [Run(1, 1)], complete=False)
    with scheduler.session(early):
        assert taken(scheduler, other) == [0]  # two have the other one
        assert taken(scheduler, early, 9) == [1]
    scheduler.give_back([Run(1, 1)])
    with scheduler.session(early):  # once more, as further connections may
        assert taken(scheduler, early, 9) == [1]
    early = Peer(complete=False)
    scheduler.heard(early, [], complete=True)
    with scheduler.session(early):
        assert taken(scheduler, early, 9) == [2, 3]


def test_what_is_told_again_is_no_news():
    scheduler, [peer] = of_relays(3, [0])
    scheduler._clock.now = 5.0
    scheduler.heard(peer, [Run(0, 0), Run(9, 2**53), Run(2, 1)], complete=False)
    assert scheduler.idle_for(peer) == 5.0


def test_what_is_told_a_thousand_times_costs_no_time():
    scheduler = of(100_000)
    peer = Peer(complete=False)
    with scheduler.session(peer):
        began = time.thread_time()
        scheduler.heard(peer, [Run(0, 2**53)] * 2048, complete=False)
        assert time.thread_time() - began < 3


def test_what_the_fewest_have_comes_first():
    scheduler, [one, other] = of_relays(4, [0, 1, 2], [1, 2])
    assert taken(scheduler) == [3]
    assert taken(scheduler) == [0]
    scheduler.heard(other, [Run(0, 0)], complete=False)
    scheduler, [one, other] = of_relays(4, [0, 1, 2], [0, 2])
    assert taken(scheduler, one) == [1]
    assert taken(scheduler, other) == [0]


@given(
    st.lists(
        st.tuples(st.sets(st.integers(0, 7)), st.sampled_from(["stays", "goes", "gets all"])),
        max_size=9,
    )
)
def test_of_any_sources_that_come_and_go_those_that_have_a_run_are_counted(sources):
    scheduler, peers = of_relays(8, *(blocks for blocks, _ in sources))
    counts = [0] * 8
    for peer, (blocks, then) in zip(peers, sources, strict=True):
        if then == "goes":
            scheduler.end(peer)
        elif then == "gets all":
            scheduler.heard(peer, [], complete=True)
        for block in blocks if then == "stays" else ():
            counts[block] += 1
    order = [block for [block] in iter(lambda: taken(scheduler), [])]
    assert order == sorted(range(8), key=counts.__getitem__)


def test_a_source_that_is_gone_makes_what_it_has_rare_again():
    scheduler, _ = of_relays(3, [0])
    going = Peer(complete=False)
    with scheduler.session(going):
        scheduler.heard(going, [Run(1, 1), Run(2, 2)], complete=False)
        scheduler.heard(going, [Run(0, 0)], complete=False)
    assert [taken(scheduler) for _ in range(3)] == [[1], [2], [0]]


def test_what_comes_back_can_be_had_from_all_who_have_it():
    scheduler, [one, other] = of_relays(2, [0], [0])
    assert taken(scheduler, one) == [0]
    assert taken(scheduler, other) == []
    scheduler.give_back([Run(0, 0)])
    assert taken(scheduler, other) == [0]
    scheduler.give_back([Run(0, 0)])
    assert taken(scheduler) == [0]


def test_clients_may_have_different_orders():
    scheduler, [relay] = of_relays(4, [0, 2, 3], order=[3, 2, 1, 0])
    assert taken(scheduler) == [1]
    assert [taken(scheduler, relay) for _ in range(3)] == [[3], [2], [0]]


def test_a_source_is_asked_later_for_what_it_wants_others_to_be_asked_for():
    scheduler, [relay] = of_relays(2, [0])
    seed = Peer()
    with scheduler.session(seed):
        assert taken(scheduler, seed) == [1]
        scheduler.declined(seed, Run(1, 1))
        assert taken(scheduler, seed) == [0]
        assert taken(scheduler, seed) == []
        assert taken(scheduler, relay) == []
        scheduler._clock.now += 1
        assert taken(scheduler, seed) == [1]


@pytest.mark.parametrize("bring, waits", [(False, 0.1), (True, 0.5)])
def test_a_source_is_asked_again_less_often_while_others_bring_what_they_have(bring, waits):
    scheduler, [relay] = of_relays(4, range(4))
    seed, clock = Peer(), scheduler._clock
    with scheduler.session(seed):
        clock.now += 10
        if bring:
            scheduler.done(Run(*[taken(scheduler, relay)[0]] * 2))
        while number := taken(scheduler, seed):
            scheduler.declined(seed, Run(number[0], number[0]))
        since = clock.now
        assert scheduler.asks_again(seed) == pytest.approx(since + waits)
        clock.now += waits + 0.01
        assert taken(scheduler, seed)


def test_what_a_source_declined_comes_after_all_else_that_it_has():
    scheduler, _ = of_relays(4)
    seed = Peer()
    with scheduler.session(seed):
        assert taken(scheduler, seed) == [0]
        scheduler.declined(seed, Run(0, 0))
        scheduler._clock.now += 1
        assert [taken(scheduler, seed) for _ in range(4)] == [[1], [2], [3], [0]]


def bring(scheduler, peer, seconds):
    [run] = scheduler.take(peer, 1)
    scheduler._clock.now += seconds
    scheduler.done(run)


@pytest.mark.parametrize("seconds, is_relieved", [(0.1, True), (0.2, True), (0.5, False)])
def test_a_source_that_feeds_many_is_left_to_others_that_bring_as_much(seconds, is_relieved):
    scheduler, _ = of_relays(100)
    seed, other = Peer(), Peer(trusted=False)
    with scheduler.session(seed), scheduler.session(other):
        scheduler._clock.now += 32
        bring(scheduler, seed, 0.1)
        bring(scheduler, other, seconds)
        assert taken(scheduler, seed) != []  # it has not said that others are to be asked
        scheduler.declined(seed, Run(50, 50))
        assert (taken(scheduler, seed) == []) == is_relieved
        if is_relieved:
            assert scheduler.asks_again(seed) == scheduler._clock.now + 1
            scheduler._clock.now += 1  # nobody brings anything any more
            assert taken(scheduler, seed) != []


def test_a_source_is_not_left_to_another_one_that_only_says_that_it_has_everything():
    scheduler, _ = of_relays(100)
    seed, other = Peer(), Peer(trusted=False)
    with scheduler.session(seed):
        scheduler._clock.now += 32
        bring(scheduler, seed, 0.1)
        scheduler.declined(seed, Run(50, 50))
        with scheduler.session(other):
            assert taken(scheduler, seed) != []


def test_a_source_of_a_short_load_is_left_to_others_for_a_short_time():
    scheduler, _ = of_relays(100)
    seed, other = Peer(), Peer(trusted=False)
    with scheduler.session(seed), scheduler.session(other):
        bring(scheduler, seed, 0.8)
        bring(scheduler, other, 0.8)
        scheduler.declined(seed, Run(50, 50))
        scheduler._clock.now += 0.05
        assert taken(scheduler, seed) == []
        scheduler._clock.now += 0.06
        assert taken(scheduler, seed) != []


def test_sources_that_come_and_go_leave_nothing_with_the_others():
    scheduler, [relay] = of_relays(100, range(100))
    for _ in range(50):
        with scheduler.session(Peer(complete=False)) as liar:
            scheduler.heard(liar, [Run(0, 99)], complete=False)
    assert sorted(taken(scheduler, relay)[0] for _ in range(100)) == [*range(100)]


def test_news_of_what_is_not_wanted_any_more_is_none():
    scheduler, [relay] = of_relays(2, [])
    assert taken(scheduler) == [0]
    scheduler._clock.now += 5
    scheduler.heard(relay, [Run(0, 0)], complete=False)
    assert scheduler.idle_for(relay) == 5
    scheduler.heard(relay, [Run(1, 1)], complete=False)
    assert scheduler.idle_for(relay) == 0


def test_it_is_known_for_how_long_a_source_holds_a_run():
    scheduler, [relay] = of_relays(2, [0, 1])
    assert scheduler.held_for(relay) == 0
    assert taken(scheduler, relay) == [0]
    scheduler._clock.now += 5
    assert taken(scheduler, relay) == [1]
    assert scheduler.held_for(relay) == 5
    scheduler.done(Run(0, 0))
    assert scheduler.held_for(relay) == 0


def test_who_waits_goes_on_with_news_and_without_hope_of_any():
    scheduler, [peer] = of_relays(2, [])
    for event in (
        lambda: scheduler.heard(peer, [Run(1, 1)], complete=False),
        lambda: scheduler.lost(peer, RuntimeError("gone")),
    ):
        over = threading.Event()

        def wait(over=over):
            scheduler.wait(peer, 10 * PATIENCE)
            over.set()

        threading.Thread(target=wait, daemon=True).start()
        assert not over.wait(0.05)
        event()
        assert over.wait(PATIENCE)
        taken(scheduler, peer)
    assert str(peer.failure) == "gone"


# Slow sources


def test_what_a_slow_source_holds_is_taken_over_by_one_that_has_brought_something():
    scheduler, cuts = of_relays(3)[0], []
    fast, slow, group = Peer(), Peer(), Peer()
    slow.cut = lambda: cuts.append("slow")
    with scheduler.session(fast), scheduler.session(slow), scheduler.session(group):
        assert taken(scheduler, group) == [0]
        assert taken(scheduler, slow) == [1]
        assert taken(scheduler, fast) == [2]
        scheduler._clock.now = 1.0
        assert scheduler.slow(fast) is None
        scheduler.done(Run(2, 2))
        assert scheduler.slow(fast) is None
        scheduler._clock.now = 3.9
        assert scheduler.slow(fast) is None
        scheduler._clock.now = 4.0
        assert scheduler.slow(slow) is None  # its own
        assert scheduler.slow(Peer()) is None  # has brought nothing
        scheduler.slow(fast)()
        assert cuts == ["slow"]
        assert scheduler.slow(fast) is None
        scheduler.give_back([Run(1, 1)])
        assert taken(scheduler, fast) == [1]


def test_what_a_source_does_not_have_is_left_to_a_slow_one():
    scheduler, [relay] = of_relays(2, [0])
    slow = Peer()
    slow.cut = lambda: None
    with scheduler.session(slow):
        assert taken(scheduler, relay) == [0]
        assert taken(scheduler, slow) == [1]
        scheduler._clock.now = 1.0
        scheduler.done(Run(0, 0))
        scheduler._clock.now = 99.0
        assert scheduler.slow(relay) is None
        scheduler.heard(relay, [Run(1, 1)], complete=False)
        assert scheduler.slow(relay) is not None


def test_the_only_one_that_has_what_is_wanted_is_left_alone_however_slow_it_is():
    scheduler, [relay] = of_relays(4, [0])
    slow = Peer()
    slow.cut = lambda: None
    with scheduler.session(slow):
        assert taken(scheduler, relay) == [0]
        assert taken(scheduler, slow, 2) == [1, 2]
        scheduler.done(Run(0, 0))
        scheduler.heard(relay, [Run(1, 1)], complete=False)
        scheduler._clock.now = 99.0
        assert scheduler.slow(relay) is None
        scheduler.heard(relay, [Run(2, 2)], complete=False)
        assert scheduler.slow(relay) is None  # nobody else has 3
        scheduler.heard(relay, [Run(3, 3)], complete=False)
        assert scheduler.slow(relay) is not None


def test_who_waits_goes_on_when_another_has_become_slow(monkeypatch):
    monkeypatch.setattr("vllm_ascend.model_loader.netloader.executor.scheduler._SLOW", 0.0)
    scheduler, fast, slow = of(2), Peer(), Peer()
    cut = slow.cut = lambda: None
    with scheduler.session(fast), scheduler.session(slow):
        scheduler.take(slow, 1)
        [run] = scheduler.take(fast, 1)
        scheduler.done(run)
        scheduler.wait(fast, 10 * PATIENCE)
        assert scheduler.slow(fast) is cut


def test_a_slow_source_that_waits_goes_on_when_a_faster_one_has_gone():
    ticks = Ticks()
    scheduler, slow, fast = scheduler_of([1] * 9, clock=ticks), Peer(), Peer()
    over = threading.Event()

    def wait():
        scheduler.wait(slow, 10 * PATIENCE)
        over.set()

    with scheduler.session(slow):
        with scheduler.session(fast):
            [first] = scheduler.take(slow, 1)
            for _ in range(7):
                [run] = scheduler.take(fast, 1)
                ticks.now += 1.0
                scheduler.done(run)
            ticks.now = 100.0
            scheduler.done(first)
            assert scheduler.take(slow, 1) == []  # the faster one will have brought it
            threading.Thread(target=wait, daemon=True).start()
            assert not over.wait(0.05)
        assert over.wait(PATIENCE)
        assert taken(scheduler, slow) == [8]


def test_an_incomplete_source_has_been_idle_since_it_had_something_new():
    scheduler, [peer] = of_relays(3, [0])
    scheduler._clock.now = 5.0
    assert scheduler.idle_for(peer) == 5.0
    scheduler.heard(peer, [], complete=False)
    assert scheduler.idle_for(peer) == 5.0
    scheduler.heard(peer, [Run(1, 1)], complete=False)
    assert scheduler.idle_for(peer) == 0.0
    scheduler._clock.now = 7.0
    assert taken(scheduler, peer) == [0]
    assert scheduler.idle_for(peer) == 0.0
    scheduler._clock.now = 9.0
    assert scheduler.idle_for(Peer()) == 0.0  # a complete one


def test_of_several_relays_the_one_that_brings_least_is_left():
    scheduler, [one, other] = of_relays(9, [0, 1, 2], [3, 4, 5])
    seed = Peer()
    scheduler.begin(seed)
    for source in (one, one, other):
        [run] = scheduler.take(source, 1)
        scheduler.done(run)
    assert not scheduler.brings_least(other)
    scheduler._clock.now = 1.0
    assert not scheduler.brings_least(seed)
    assert scheduler.brings_least(other)
    for source in (one, other, other):
        [run] = scheduler.take(source, 1)
        scheduler.done(run)
    late = Peer(complete=False)
    scheduler._clock.now = 1.5
    scheduler.begin(late)
    scheduler._clock.now = 2.0
    assert not scheduler.brings_least(late)  # it has not had the time
    assert scheduler.brings_least(one)


def test_of_several_sources_an_incomplete_one_is_asked_for_one_run_at_a_time():
    scheduler, [one, other] = of_relays(40, range(20), range(20, 40))
    assert len(scheduler.take(one, 2)) == 2
    seed = Peer()
    with scheduler.session(seed):
        assert len(scheduler.take(seed, 2)) == 2
        assert len(scheduler.take(other, 2)) == 1
        assert scheduler.take(other, 1, held=1) == []


def test_a_source_is_not_asked_for_what_faster_ones_will_have_brought_before():
    scheduler, [fast, slow] = of_relays(20, range(20), range(20))

    def bring(count):
        for _ in range(count):
            [run] = scheduler.take(fast, 1)
            scheduler._clock.now += 0.1
            scheduler.done(run)

    [first] = scheduler.take(slow, 1)
    bring(12)
    scheduler.done(first)
    [held] = scheduler.take(slow, 1)  # much is left
    scheduler.give_back([held])
    bring(4)
    assert scheduler.take(slow, 1) == []
    scheduler.end(fast)
    assert scheduler.take(slow, 1) != []  # nobody else is there


# What a source sends to whom


def test_a_source_sends_each_block_once_before_it_sends_one_twice():
    first = FirstCopy(3, Ticks())
    assert first.sends("a", Run(0, 0))
    assert not first.sends("b", Run(0, 0))
    assert not first.sends("b", Run(0, 1))
    assert first.sends("b", Run(1, 1))
    assert first.sends("a", Run(0, 0))  # its own, that may have come wrong
    assert not first.sends("a", Run(1, 1))
    assert first.sends("a", Run(2, 2))
    assert not first.sends("a", Run(1, 1))


def test_when_all_was_sent_to_somebody_the_next_one_gets_it_when_that_one_had_time_to_pass_it_on():
    clock = Ticks()
    first = FirstCopy(3, clock)
    for client, number in ("a", 0), ("b", 1), ("b", 2):
        assert first.sends(client, Run(number, number))
    clock.now = 0.1
    assert not first.sends("a", Run(1, 1))
    clock.now = 8.0
    assert first.sends("a", Run(1, 1))
    assert not first.sends("c", Run(1, 2))  # which a has got just now
    assert first.sends("c", Run(2, 2))
    clock.now = 8.9
    assert not first.sends("c", Run(1, 1))
    clock.now = 9.2  # an eighth of the time so far
    assert first.sends("c", Run(1, 1))
    clock.now = 100.0  # after a long time in which nobody wanted anything
    assert first.sends("d", Run(1, 1))
    clock.now = 101.9
    assert not first.sends("e", Run(1, 1))
    clock.now = 102.1
    assert first.sends("e", Run(1, 1))


def test_what_a_client_got_that_is_gone_is_sent_again():
    first = FirstCopy(3, Ticks())
    assert first.sends("a", Run(0, 0))
    first.gone("a")
    assert first.sends("b", Run(0, 0))
    assert not first.sends("a", Run(0, 0))
    first.gone("b", complete=True)
    assert not first.sends("a", Run(0, 0))
    first.gone("nobody")


def test_what_one_that_is_gone_has_passed_on_keeps_nothing_back():
    clock = Ticks()
    first = FirstCopy(3, clock)
    for client, number in ("a", 0), ("b", 1), ("b", 2):
        assert first.sends(client, Run(number, number))
    first.gone("a")  # nobody asks for what it got
    clock.now = 1.0
    assert first.sends("c", Run(1, 1))


def send_in_turn(first, clients, numbers, seconds):
    """Send runs one by one, each to the next client and so many seconds after the one before."""
    for number in numbers:
        first._clock.now += seconds
        assert first.sends(clients[number % len(clients)], Run(number, number))


def test_a_client_that_gets_nothing_gets_what_it_asks_for():
    clock = Ticks()
    first = FirstCopy(100, clock)
    send_in_turn(first, "a", range(60), 1 / 60)
    assert not first.sends("b", Run(0, 0))
    clock.now += 2.1
    assert first.sends("a", Run(60, 60))
    assert first.sends("b", Run(0, 0))
    assert not first.sends("b", Run(1, 1))
    clock.now += 2.1
    assert first.sends("a", Run(61, 61))
    assert first.sends("b", Run(1, 1))  # it may still reach nobody else
    assert first.sends("b", Run(99, 99))


def test_a_run_that_takes_long_is_not_one_that_was_waited_for():
    clock = Ticks()
    first = FirstCopy(100, clock)
    for number, client in enumerate("abc"):
        assert first.sends(client, Run(number, number))
    clock.now += 60.0
    assert not first.sends("a", Run(1, 1))
    assert first.sends("a", Run(3, 3))


def test_what_nobody_wants_any_more_keeps_nothing_back():
    clock = Ticks()
    first = FirstCopy(1000, clock)
    send_in_turn(first, "abc", range(999), 0.01)
    lacking = {"a": {*range(1, 999, 3)}, "b": {*range(2, 999, 3)}, "c": {*range(0, 999, 3)}}
    began = clock.now
    while any(lacking.values()):  # they do not reach each other
        clock.now += 0.01
        assert clock.now - began < 6.0, lacking
        for client, blocks in lacking.items():
            got = next((one for one in blocks if first.sends(client, Run(one, one))), None)
            blocks.discard(got)


def test_where_many_are_served_in_turn_nothing_for_one_turn_is_not_long():
    clock = Ticks()
    first = FirstCopy(1000, clock)
    send_in_turn(first, range(50), range(100), 0.2)  # each gets one every ten seconds
    assert not first.sends("late", Run(0, 0))
    clock.now += 20.0
    assert not first.sends("late", Run(0, 0))
    send_in_turn(first, range(50), range(100, 400), 0.2)
    assert first.sends("late", Run(0, 0))


def test_a_time_in_which_nobody_was_there_is_not_one_in_which_little_was_sent():
    clock = Ticks()
    first = FirstCopy(100, clock)
    assert first.sends("a", Run(0, 0))
    first.gone("a", complete=True)
    clock.now = 1000.0
    send_in_turn(first, "b", range(1, 60), 1 / 60)
    assert not first.sends("c", Run(1, 1))
    clock.now += 2.1
    assert first.sends("c", Run(1, 1))


def a_copy_to_three(runs):
    """A source that has sent runs of 1,000 to three, one a second to each: a 0, b 1, c 2, a 3."""
    clock = Ticks()
    first = FirstCopy(1000, clock)
    send_in_turn(first, "abc", range(runs), 1 / 3)
    return first, clock


def test_who_passes_on_nothing_is_to_ask_others_and_gets_little_meanwhile():
    first, _ = a_copy_to_three(60)
    assert not first.sends("a", Run(49, 49))
    assert first.sends("b", Run(60, 60))
    assert not first.sends("c", Run(49, 49))  # the same one again
    assert first.sends("b", Run(61, 61))
    assert not first.sends("c", Run(46, 46))
    assert not first.sends("b", Run(62, 62))
    send_in_turn(first, "ac", range(62, 112), 0.1)
    assert not first.sends("b", Run(112, 112))  # in 5 s
    assert first.sends("a", Run(112, 999))
    assert not first.sends("b", Run(0, 0))
    assert first.sends("c", Run(0, 0))


def test_who_passes_on_nothing_and_reaches_nobody_else_gets_something_now_and_then():
    first, clock = a_copy_to_three(60)
    first.sends("a", Run(31, 31))
    got = 0
    for number in range(60, 660):
        clock.now += 0.1
        assert first.sends("ac"[number % 2], Run(number, number))
        got += first.sends("b", Run(999 - got, 999 - got))
    assert 3 <= got <= 10


def test_who_passes_on_nothing_gets_what_it_asks_for_if_nobody_else_does():
    first, clock = a_copy_to_three(60)
    first.sends("a", Run(31, 31))
    assert not first.sends("b", Run(60, 60))
    clock.now += 2.1
    assert all(first.sends("b", Run(number, number)) for number in range(60, 70))
    assert first.sends("a", Run(70, 70))
    assert not first.sends("b", Run(71, 71))


def test_a_block_that_is_missed_for_long_counts_for_several():
    first, _ = a_copy_to_three(60)
    assert not first.sends("a", Run(31, 31))
    assert not first.sends("b", Run(60, 60))


def test_where_all_are_slow_to_pass_something_on_nobody_is_said_not_to():
    first, _ = a_copy_to_three(60)
    for number in range(30):
        first.sends("abc"[(number + 1) % 3], Run(number, number))
    assert all(first.sends(client, Run(60 + i, 60 + i)) for i, client in enumerate("abc"))


def test_who_has_had_no_time_to_pass_something_on_is_not_said_to_pass_on_nothing():
    first, _ = a_copy_to_three(60)
    for number in (52, 55, 58):
        assert not first.sends("a", Run(number, number))
    assert first.sends("b", Run(100, 100))


def test_what_a_newcomer_asks_for_says_nothing_of_who_has_got_it():
    first, _ = a_copy_to_three(60)
    for number in range(60):
        assert not first.sends("newcomer", Run(number, number))
    assert all(first.sends(client, Run(100 + i, 100 + i)) for i, client in enumerate("abc"))


@pytest.mark.parametrize("client", "abc")
def test_nobody_can_say_of_most_clients_that_they_pass_on_nothing(client):
    first, clock = a_copy_to_three(6)
    first.sends("liar", Run(100, 100))
    for number in range(6, 60):
        clock.now = number / 3
        first.sends("abc"[number % 3], Run(number, number))
    for number in range(40):
        first.sends("liar", Run(number, number))
    assert first.sends(client, Run(901, 901))
