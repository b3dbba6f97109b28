import itertools
import sys
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from vllm_ascend.model_loader.netloader.executor.chunks.blocks import Blocks, Run
from vllm_ascend.model_loader.netloader.executor.scheduler import Scheduler

from .support import MIB, PATIENCE


def of(count):
    """A scheduler of so many runs, each of which is a block and a tensor."""
    return Scheduler(Blocks([MIB] * count), MIB)


def numbers(runs):
    assert all(run.first == run.last for run in runs)
    return [run.first for run in runs]


def everything(scheduler, limit=8):
    """All that it hands out until it has nothing more, request by request."""
    return list(iter(lambda: numbers(scheduler.take(limit)), []))


def test_every_run_is_handed_out_once_and_in_order():
    scheduler = of(30)
    assert [*itertools.chain(*everything(scheduler))] == list(range(30))
    assert scheduler.take(8) == []


def test_a_session_by_itself_gets_all_it_asks_for():
    scheduler = of(30)
    with scheduler.session():
        assert [len(runs) for runs in everything(scheduler)] == [8, 8, 8, 6]


def test_several_sessions_get_less_the_less_is_left():
    scheduler = of(30)
    with scheduler.session(), scheduler.session():
        assert [len(scheduler.take(100)) for _ in range(3)] == [8, 6, 4]


def test_a_session_that_holds_its_share_gets_no_more_while_others_are_there():
    scheduler = of(30)
    with scheduler.session(), scheduler.session():
        assert len(scheduler.take(100, held=5)) == 3
        assert len(scheduler.take(100, held=7)) == 0
    with scheduler.session():
        assert len(scheduler.take(100, held=7)) == 27


def test_a_session_may_always_hold_two_runs():
    scheduler = of(2)
    with scheduler.session(), scheduler.session():
        assert [numbers(scheduler.take(8)) for _ in range(2)] == [[0, 1], []]
    scheduler = of(2)
    with scheduler.session(), scheduler.session():
        takes = [numbers(scheduler.take(8, held=held)) for held in (1, 2, 1)]
        assert takes == [[0], [], [1]]


def test_a_session_that_ended_counts_no_more():
    scheduler = of(30)
    with pytest.raises(RuntimeError), scheduler.session():
        raise RuntimeError
    with scheduler.session():
        assert len(scheduler.take(100)) == 30


def test_runs_given_back_come_before_the_others():
    scheduler = of(3)
    assert numbers(scheduler.take(1)) == [0]
    scheduler.give_back([Run(0, 0)])
    assert numbers(scheduler.take(3)) == [0, 1, 2]


def test_it_is_finished_when_every_run_is_done():
    scheduler = of(2)
    scheduler.take(2)
    scheduler.done()
    assert not scheduler.finished
    scheduler.done()
    assert scheduler.finished


def test_with_nothing_to_fetch_it_is_finished():
    assert of(0).finished
    assert not Scheduler(Blocks([0]), MIB).finished  # a block without bytes is one to be checked


@pytest.mark.parametrize("max_bytes", [1, MIB, 3 * MIB, sys.maxsize])
def test_a_run_over_a_sources_limit_is_handed_out_in_parts(max_bytes):
    blocks = Blocks([8 * MIB, 100, 100, 8 * MIB])
    scheduler = Scheduler(blocks, 8 * MIB)
    taken = []
    while runs := scheduler.take(2, max_bytes=max_bytes):
        for run in runs:
            assert blocks.size_of(run) <= max(max_bytes, MIB)
            taken += range(run.first, run.last + 1)
            assert not scheduler.finished
            scheduler.done()
    assert taken == list(range(blocks.count))
    assert scheduler.finished


def test_parts_of_a_run_may_go_to_another_source_in_larger_ones():
    scheduler = Scheduler(Blocks([4 * MIB]), 4 * MIB)
    assert scheduler.take(1, max_bytes=MIB) == [Run(0, 0)]
    assert scheduler.take(9) == [Run(1, 1), Run(2, 2), Run(3, 3)]


class Interleavings(RuleBasedStateMachine):
    """Sessions that come and go, fail and finish in any order."""

    @initialize(
        sizes=st.lists(st.sampled_from([0, 100, MIB, 5 * MIB + 1]), max_size=12),
        chunk_mib=st.sampled_from([1, 4]),
    )
    def begin(self, sizes, chunk_mib):
        self.blocks = Blocks(sizes)
        self.scheduler = Scheduler(self.blocks, chunk_mib * MIB)
        self.sessions = []
        self.done = []

    def one(self, number):
        return self.sessions[number % len(self.sessions)] if self.sessions else None

    @rule()
    def join(self):
        session = self.scheduler.session()
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
            runs = self.scheduler.take(limit, len(held), max_bytes)
            assert len(runs) <= limit
            held += runs

    @rule(number=st.integers(0, 9))
    def finish(self, number):
        if (one := self.one(number)) and one[1]:
            self.done.append(one[1].pop(0))
            self.scheduler.done()

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
        counted = self.numbers([*held, *self.done, *self.scheduler._wanted])
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
        with scheduler.session():
            while not scheduler.finished:
                runs = scheduler.take(limit)
                if not runs:
                    scheduler.wait(0.01)
                for run in runs:
                    if (run.first + turn) % 7 == 0:
                        turn += 1
                        scheduler.give_back([run])
                    else:
                        got.append(run.first)
                        scheduler.done()

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
    scheduler.take(1)
    over = threading.Event()

    def wait():
        scheduler.wait(10 * PATIENCE)
        over.set()

    threading.Thread(target=wait, daemon=True).start()
    assert not over.wait(0.05)
    scheduler.done() if happens == "done" else scheduler.give_back([Run(0, 0)])
    assert over.wait(PATIENCE)


def test_who_waits_in_vain_goes_on_when_its_time_is_up():
    scheduler = of(1)
    scheduler.take(1)
    scheduler.wait(0.01)
