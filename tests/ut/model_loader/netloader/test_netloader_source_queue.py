import itertools
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ascend.model_loader.netloader.errors import (
    MakesRoom,
    SourceBusy,
    SourceLost,
    SourceRefused,
    SourceUnreachable,
    TransferCorrupt,
)
from vllm_ascend.model_loader.netloader.interaction import source_queue
from vllm_ascend.model_loader.netloader.interaction.source_queue import SourceQueue
from vllm_ascend.model_loader.netloader.utils import Address

from .support import PATIENCE, Clock, until

A, B, C = (Address("192.0.2.7", port) for port in (1, 2, 3))
FINAL = [SourceRefused, SourceLost, TransferCorrupt, RuntimeError]
LATER = [SourceBusy, SourceUnreachable]


class _Condition:
    """In the place of one that a single thread waits for: its clock goes on instead."""

    def __init__(self, clock):
        self._clock = clock

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def notify_all(self):
        pass

    def wait(self, seconds):
        assert seconds is not None, "would wait for ever"
        self._clock.sleep(seconds + 1e-6)


class Jitter:
    """In the place of `random.uniform`: the middle, unless the test says otherwise."""

    def __init__(self):
        self.value = 1.0
        self.bounds = []

    def uniform(self, low, high):
        self.bounds.append((low, high))
        return self.value


class World:
    def __init__(self):
        self.clock, self.jitter = Clock(), Jitter()

    def queue(self, addresses, seconds):
        queue = SourceQueue(addresses, seconds, self.clock.monotonic, self.jitter.uniform)
        queue._changed = _Condition(self.clock)
        return queue


@pytest.fixture
def world():
    return World()


def asked(queue, answers):
    """Ask one source after the other, each of which fails in its way, until the load is over.

    Returns:
        The sources asked, in order.
    """
    return list(_asked(queue, answers))


def _asked(queue, answers):
    while (address := queue.next()) is not None:
        yield address
        queue.failed(address, answers(address))


# Who is asked


def test_sources_are_asked_in_order_of_preference_and_each_once(world):
    queue = world.queue([B, A, B, C, A], 300)
    assert asked(queue, lambda address: SourceRefused(f"{address}: other model")) == [B, A, C]
    assert queue.over.is_set()
    assert queue.reasons() == [f"{address}: other model" for address in (B, A, C)]
    assert world.clock.passed == 0


@pytest.mark.parametrize("kind", FINAL)
def test_a_source_that_has_failed_is_not_asked_again(kind, world):
    queue = world.queue([A], 300)
    assert asked(queue, lambda _: kind("no")) == [A]
    assert world.clock.passed == 0


def test_without_sources_there_is_nothing_to_wait_for(world):
    queue = world.queue([], 300)
    assert queue.next() is None
    assert queue.over.is_set()
    assert queue.reasons() == []


@pytest.mark.parametrize("kind", LATER)
def test_a_source_that_may_serve_later_is_asked_again_while_the_load_waits(kind, world):
    queue = world.queue([A], 60)
    times = []
    assert set(asked(queue, lambda _: times.append(world.clock.passed) or kind("later"))) == {A}
    growing = [0, 0.5, 1, 1.5, 2.25, 3.38, 5.06, 7.59, 11.39, 17.09, 25.63]
    assert times == pytest.approx([*growing, 35.63, 45.63, 55.63], abs=0.01)
    assert 60 <= world.clock.passed < 60.1
    assert queue.reasons() == ["later"]


@pytest.mark.parametrize("kind", LATER)
def test_who_does_not_wait_asks_each_source_once(kind, world):
    queue = world.queue([A, B], 0)
    assert asked(queue, lambda _: kind("later")) == [A, B]
    assert world.clock.passed == 0


def test_a_source_that_serves_after_all_ends_the_waiting(world):
    queue = world.queue([A], 300)
    for _ in range(3):
        queue.failed(queue.next(), SourceBusy("loading"))
    assert queue.next() == A
    assert world.clock.passed < 5


def test_others_are_asked_before_those_that_may_serve_later(world):
    queue = world.queue([A, B, C], 300)
    assert queue.next() == A
    queue.failed(A, SourceBusy("busy"))
    assert [queue.next(), queue.next()] == [B, C]
    assert world.clock.passed == 0
    queue.failed(B, SourceLost("gone"))
    queue.failed(C, SourceLost("gone"))
    assert queue.next() == A


def test_the_time_that_a_source_asks_for_is_kept(world):
    queue = world.queue([A, B], 300)
    for address, seconds in ((A, 30), (B, 0)):
        assert queue.next() == address
        queue.failed(address, SourceBusy("busy", "busy", retry_after=seconds))
    assert queue.next() == B
    queue.failed(B, SourceRefused("no"))
    assert queue.next() == A
    assert world.clock.passed == pytest.approx(30, abs=0.01)


def test_a_time_beyond_the_deadline_is_not_waited_for(world):
    queue = world.queue([A], 5)
    assert asked(queue, lambda _: SourceBusy("busy", "busy", retry_after=9999)) == [A]
    assert world.clock.passed == pytest.approx(5, abs=0.01)


@pytest.mark.parametrize("jitter", [0.75, 1.25])
def test_clients_that_were_refused_together_do_not_come_back_together(jitter, world):
    world.jitter.value = jitter
    queue, times = world.queue([A], 300), []
    for _ in range(8):
        address = queue.next()
        times.append(world.clock.passed)
        queue.failed(address, SourceBusy("busy"))
    pauses = [other - one for one, other in itertools.pairwise(times)]
    expected = [max(0.5, before / 2) * jitter for before in times[:-1]]
    assert pauses == pytest.approx(expected, abs=0.01)
    assert set(world.jitter.bounds) == {(0.75, 1.25)}


# Whom it is worth waiting for


def test_where_one_has_failed_those_that_cannot_be_reached_are_not_waited_for(world):
    queue = world.queue([A, B], 300)
    answers = {A: SourceUnreachable("cannot connect"), B: SourceRefused("other model")}
    assert asked(queue, answers.get) == [A, B]
    assert world.clock.passed == 0
    assert queue.reasons() == ["cannot connect", "other model"]


def test_where_one_may_serve_later_those_that_cannot_be_reached_are_asked_again_too(world):
    queue = world.queue([A, B, C], 10)
    answers = {A: SourceUnreachable("none"), B: SourceRefused("other"), C: SourceBusy("busy")}
    order = asked(queue, answers.get)
    assert order.count(B) == 1
    assert order.count(A) > 3
    assert order.count(C) > 3


def test_the_one_that_is_waited_for_is_known(world):
    queue = world.queue([A, B], 5)
    queue.failed(queue.next(), SourceBusy("busy"))
    queue.failed(queue.next(), SourceLost("gone"))
    assert queue.waits(A)
    assert not queue.waits(B)
    world.clock.sleep(6)
    assert not queue.waits(A)
    assert queue.next() is None


def test_who_cannot_be_reached_is_waited_for_only_as_long_as_that_is_all(world):
    queue = world.queue([A, B], 300)
    queue.failed(queue.next(), SourceUnreachable("none"))
    assert queue.waits(A)
    queue.failed(queue.next(), SourceRefused("no"))
    assert not queue.waits(A)


def test_a_source_that_said_later_and_then_fails_is_given_up(world):
    queue = world.queue([A], 300)
    queue.failed(queue.next(), SourceBusy("busy"))
    queue.failed(queue.next(), SourceRefused("other model"))
    assert queue.next() is None
    assert queue.reasons() == ["other model"]


# News


def test_the_same_failure_twice_is_no_news(world):
    queue = world.queue([A], 300)
    said = ["busy", "busy", "loading", "busy"]
    news = [queue.failed(queue.next(), SourceBusy(text)) for text in said]
    assert news == [True, False, True, True]
    assert queue.reasons() == ["busy"]


def test_a_reason_is_on_one_line(world):
    queue = world.queue([A], 0)
    queue.failed(queue.next(), SourceLost("one\n  two"))
    assert queue.reasons() == ["one two"]


# Those with other weights


def test_a_source_with_other_weights_is_asked_again_when_nobody_else_is_left(world):
    queue = world.queue([A, B], 300)
    assert [queue.next(), queue.next()] == [A, B]
    queue.postpone(B, "other weights")
    assert queue.reasons() == ["other weights"]
    queue.failed(A, SourceLost("gone"))
    assert queue.next() == B
    queue.failed(B, SourceLost("gone too"))
    assert queue.next() is None
    assert queue.reasons() == ["gone", "gone too"]


def test_a_source_with_other_weights_is_not_waited_for_by_those_who_wait(world):
    """It can serve now, and whoever said "later" may never."""
    queue = world.queue([A, B, C], 300)
    assert [queue.next(), queue.next(), queue.next()] == [A, B, C]
    queue.postpone(B, "other weights")
    queue.failed(A, SourceBusy("busy"))
    queue.failed(C, SourceLost("gone"))
    assert queue.next() == B
    assert world.clock.passed == 0


@given(st.data())
def test_whatever_sources_answer_the_load_ends_in_time_and_says_why(data):
    world = World()
    world.jitter.value = data.draw(st.floats(0.75, 1.25))
    seconds = data.draw(st.sampled_from([0, 1, 30]))
    queue = world.queue([A, B, C], seconds)
    kinds = st.sampled_from([*FINAL, *LATER, "postponed"])
    postponed = set()
    for count in itertools.count():
        if (address := queue.next()) is None:
            break
        assert count < 500
        kind = data.draw(kinds)
        if kind == "postponed" and address not in postponed:
            postponed.add(address)
            queue.postpone(address, "other weights")
        else:
            error = SourceRefused if kind == "postponed" else kind
            queue.failed(address, error(f"{address}: no"))
    assert queue.over.is_set()
    assert world.clock.passed <= seconds + 0.1
    assert len(queue.reasons()) == 3


# What names stand for


def test_what_names_stand_for_is_asked_in_order_of_preference_after_addresses(world):
    queue = world.queue([A], 300)
    assert queue.found([(C, "c"), (B, "b"), (A, "a")], {}) == []
    assert asked(queue, lambda address: SourceRefused("no")) == [A, C, B]


def test_a_failed_source_is_asked_again_only_once_another_process_has_its_address(world):
    queue = world.queue([], 300)
    queue.found([(A, "first")], {})
    assert queue.next() == A
    queue.found([(B, "b"), (A, "first")], {})
    assert queue.next() == B
    queue.failed(A, SourceRefused("no"))
    queue.found([(A, "first")], {})
    waiting = queue.found([(A, "second")], {})
    assert waiting == [] and queue.next() == A
    queue.failed(A, SourceRefused("no"))
    queue.failed(B, SourceRefused("no"))
    assert queue.next() is None


def test_two_that_are_found_at_one_address_are_asked_as_one(world):
    queue = world.queue([], 30)
    queue.found([(A, "one"), (A, "other")], {})
    assert asked(queue, lambda _: SourceRefused("no")) == [A]


def test_nothing_is_looked_up_any_more_once_the_load_does_not_wait():
    queue = SourceQueue([A], 0.2)
    assert queue.next() == A
    thread = threading.Thread(target=queue.next)
    thread.start()
    assert until(lambda: queue.idle)
    assert until(lambda: not queue.idle)
    assert thread.is_alive()
    queue.succeeded()
    thread.join(PATIENCE)


@pytest.mark.parametrize("kind", LATER)
def test_names_that_may_bring_sources_later_are_waited_for(world, kind):
    queue = world.queue([], 30)
    problem = kind("dns+fleet:1: not yet")
    assert queue.found([], {"dns+fleet:1": problem}) == [problem]
    assert queue.next() is None
    assert 30 <= world.clock.passed < 31
    assert queue.reasons() == ["dns+fleet:1: not yet"]


def test_names_that_bring_no_sources_for_good_are_not_waited_for(world):
    queue = world.queue([], 30)
    queue.found([], {"a": SourceRefused("other model"), "b": SourceUnreachable("not there")})
    assert queue.next() is None
    assert world.clock.passed == 0


def test_names_that_cannot_be_reached_are_not_waited_for_once_a_source_has_failed(world):
    queue = world.queue([A], 30)
    queue.found([], {"b": SourceUnreachable("not there")})
    assert asked(queue, lambda _: SourceRefused("no")) == [A]
    assert world.clock.passed == 0


def test_a_problem_is_news_once_until_it_is_another(world):
    queue = world.queue([A], 30)
    one, other = SourceBusy("not yet"), SourceBusy("still not")
    assert queue.found([], {"a": one}) == [one]
    assert queue.found([], {"a": SourceBusy("not yet")}) == []
    assert queue.found([], {"a": other}) == [other]
    assert queue.found([], {}) == []
    assert queue.reasons() == []
    assert queue.found([], {"a": one}) == [one]


# Several threads


def test_what_is_found_goes_to_a_thread_that_waits():
    queue = SourceQueue([], 300)
    queue.found([], {"a": SourceBusy("not yet")})
    assert not queue.idle
    thread, got = ask(queue)
    until(lambda: queue.idle)
    queue.found([(A, "a")], {})
    assert joined(thread, got) == [A]
    assert not queue.idle


def ask(queue):
    """Ask for the next source in a thread of its own; what it gets is in the list."""
    got, started = [], threading.Event()

    def ask():
        started.set()
        got.append(queue.next())

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    assert started.wait(PATIENCE)
    return thread, got


def joined(thread, got):
    thread.join(PATIENCE)
    assert not thread.is_alive()
    return got


def test_each_source_is_asked_by_one_thread_at_a_time():
    queue = SourceQueue([A, B], 300)
    assert {queue.next(), queue.next()} == {A, B}
    thread, got = ask(queue)
    thread.join(0.05)
    assert thread.is_alive()  # somebody asks each of them, and may fail
    queue.failed(A, SourceBusy("busy"))
    assert joined(thread, got) == [A]


def test_a_source_that_others_name_is_asked_until_it_fails_or_is_another_process():
    queue = SourceQueue([A], 0)
    queue.heard(B, "one")
    assert [queue.next(), queue.next()] == [A, B]
    assert [queue.is_hearsay(one) for one in (A, B)] == [False, True]
    queue.failed(B, SourceLost("gone"))
    queue.heard(B, "one")
    queue.heard(C, "another")
    assert queue.next() == C
    queue.heard(B, "its successor")
    assert queue.next() == B
    queue.heard(A, "another")
    assert not queue.is_hearsay(A)
    queue.found([(B, "its successor")], {})
    assert not queue.is_hearsay(B)


def test_a_source_that_has_sent_wrong_bytes_is_not_asked_again_because_others_name_it():
    queue = SourceQueue([A], 0)
    assert queue.next() == A
    queue.heard(B, "one")
    assert queue.next() == B
    queue.failed(B, TransferCorrupt("wrong bytes"))
    queue.heard(B, "another")
    queue.failed(A, SourceLost("gone"))
    assert queue.next() is None


def test_others_can_name_so_many_sources_and_no_more(monkeypatch):
    monkeypatch.setattr(source_queue, "MAX_HEARD", 1)
    queue = SourceQueue([A], 0)
    for address in (A, B, C):
        queue.heard(address, "one")
    assert [queue.next(), queue.next()] == [A, B]
    queue.failed(A, SourceLost("gone"))
    queue.failed(B, SourceLost("gone"))
    assert queue.next() is None


def test_a_source_that_was_given_is_asked_again_before_those_that_others_name(world):
    queue = world.queue([A], 300)
    assert queue.next() == A
    queue.heard(B, "b")
    queue.failed(A, SourceBusy("busy"))
    assert queue.next() == B
    queue.failed(B, SourceUnreachable("none"))
    for port in range(100):
        queue.heard(Address("192.0.2.8", port + 1), "c")
    world.clock.sleep(1)
    assert queue.next() == A


def test_those_that_others_name_keep_no_load_waiting(world):
    queue = world.queue([A], 10)
    assert queue.next() == A
    queue.failed(A, SourceBusy("busy"))
    world.clock.sleep(11)
    queue.heard(B, "b")
    assert queue.next() is None


def test_those_that_others_name_keep_no_load_from_the_disk_after_the_deadline(world):
    queue = world.queue([A], 0)
    assert queue.next() == A
    for port in range(9):
        queue.heard(Address("192.0.2.8", port + 1), "c")
    assert queue.poll() is not None
    world.clock.sleep(29)
    queue.progressed()
    world.clock.sleep(29)
    assert queue.poll() is not None  # something has come
    world.clock.sleep(2)
    assert queue.poll() is None


def test_a_load_is_late_when_it_has_waited_and_too_little_comes(world):
    queue = world.queue([A], 40)
    world.clock.sleep(39)
    assert not queue.late
    queue.progressed()
    world.clock.sleep(29)
    assert not queue.late
    world.clock.sleep(2)
    assert queue.late


def test_a_source_that_may_be_asked_again_may_have_what_those_lack_that_load_themselves(world):
    queue = world.queue([A, B], 300)
    assert queue.has_others({A})
    assert queue.next() == A and queue.next() == B
    queue.failed(A, SourceBusy("has no blocks just now that are wanted"))
    queue.failed(B, SourceBusy("busy"))
    assert queue.has_others({A}) and not queue.has_others({A, B})
    queue.failed(B, SourceUnreachable("Connection refused"))
    assert not queue.has_others({A})


def test_of_those_that_others_name_only_so_many_are_asked_at_once():
    queue = SourceQueue([A, B], 300, most_hearsay=2)
    assert queue.next() == A
    assert queue.next() == B
    named = [Address("192.0.2.8", port + 1) for port in range(3)]
    for address in named:
        queue.heard(address, address.host)
    asked = [queue.next(), queue.next()]
    assert {*asked} < {*named}
    assert queue.poll() is None
    queue.failed(B, SourceBusy("busy", retry_after=0.01))
    assert queue.next() == B  # also while they say nothing
    queue.failed(asked[0], SourceLost("gone"))
    assert queue.next() in named


def test_who_may_not_be_asked_for_the_others_is_said_to_lack_a_thread():
    queue = SourceQueue([A], 300, most_hearsay=1)
    assert queue.next() == A
    queue.heard(B, "b")
    assert not queue.lacks_threads(idle=1)
    assert queue.next() == B
    queue.heard(C, "c")
    assert queue.lacks_threads(idle=1)
    queue.failed(B, SourceLost("gone"))
    assert not queue.lacks_threads(idle=1)
    assert queue.lacks_threads(idle=0)


def test_a_source_that_others_name_is_asked_again_soon(world):
    queue = world.queue([A], 300)
    assert queue.next() == A
    queue.heard(B, "b")
    assert queue.next() == B
    queue.failed(B, SourceBusy("loading"))
    assert queue.next() == B
    assert world.clock.passed < 0.2


def test_a_process_is_asked_at_one_address_at_a_time():
    queue = SourceQueue([A, B], 300)
    assert [queue.next(), queue.next()] == [A, B]
    queue.joined(A, "a")
    with pytest.raises(SourceBusy, match=f"{B}: is asked as {A} already"):
        queue.joined(B, "a")
    queue.failed(A, SourceLost("gone"))
    queue.joined(B, "a")


def test_a_process_that_others_name_at_an_address_is_believed_a_few_times(world):
    queue = world.queue([A], 300)
    assert queue.next() == A
    asked = []
    for count in range(9):
        queue.heard(B, f"process {count}")
        if (address := queue.poll()) is not None:
            asked.append(address)
            queue.failed(B, SourceRefused("no"))
    assert asked == [B] * 4
    queue.failed(A, SourceRefused("other model"))
    queue.heard(A, "another process")
    assert queue.next() is None


def test_a_source_that_was_left_for_another_is_asked_again_and_that_is_no_news(world):
    queue = world.queue([A], 300)
    assert queue.next() == A
    assert queue.failed(A, SourceBusy("busy"))
    assert queue.next() == A
    assert not queue.failed(A, MakesRoom("another source may bring more"))
    assert queue.reasons() == ["busy"]
    assert queue.next() == A


def test_a_source_that_has_given_something_is_asked_again_for_a_while_after_the_deadline(world):
    queue, times = world.queue([A], 0), []
    assert queue.next() == A
    world.clock.sleep(100)
    queue.failed(A, SourceBusy("slow"), soon=True)
    while queue.next() is not None:
        times.append(world.clock.passed)
        queue.failed(A, SourceBusy("preparing"))
    assert times and all(100 < time < 130 for time in times)
    assert 130 <= world.clock.passed < 131


def test_who_waits_goes_on_if_the_deadline_passes_before_it_sleeps(world):
    queue = world.queue([A], 10)
    assert queue.next() == A
    queue.failed(A, SourceBusy("busy", retry_after=60))
    assert queue.poll() is None
    world.clock.sleep(20)
    assert queue.pause() == 0.0


def test_threads_are_lacking_while_there_is_a_source_to_ask_and_nobody_waits_for_one():
    queue = SourceQueue([A], 300)
    assert queue.lacks_threads()
    assert queue.next() == A
    assert not queue.lacks_threads()
    queue.heard(B, "one")
    assert queue.lacks_threads()
    assert queue.next() == B
    thread, got = ask(queue)
    queue.failed(A, SourceBusy("busy", "busy"))
    assert not queue.lacks_threads()  # there is none to ask yet
    assert joined(thread, got) == [A]


def test_when_the_load_is_complete_nobody_waits_any_more():
    queue = SourceQueue([A, B], 300)
    assert queue.next() == A
    queue.failed(A, SourceBusy("busy", "busy", retry_after=600))
    assert queue.next() == B
    waiting = [ask(queue) for _ in range(3)]
    queue.succeeded()
    assert [joined(*one) for one in waiting] == [[None]] * 3
    assert queue.over.is_set()
    assert queue.next() is None


def test_when_the_last_one_fails_nobody_waits_any_more():
    queue = SourceQueue([A], 300)
    assert queue.next() == A
    waiting = [ask(queue) for _ in range(3)]
    queue.failed(A, SourceLost("gone"))
    assert [joined(*one) for one in waiting] == [[None]] * 3


def test_a_postponed_source_goes_to_a_thread_that_waits():
    queue = SourceQueue([A, B], 300)
    assert [queue.next(), queue.next()] == [A, B]
    queue.postpone(B, "other weights")
    thread, got = ask(queue)
    thread.join(0.05)
    assert thread.is_alive()  # A may still bring all of it
    queue.failed(A, SourceLost("gone"))
    assert joined(thread, got) == [B]


def test_those_that_others_name_are_asked_in_an_order_of_ones_own(world):
    queue = world.queue([A], 300)
    world.jitter.value = 1.2
    queue.heard(B, "b")
    world.jitter.value = 0.8
    queue.heard(C, "c")
    assert [queue.next(), queue.next(), queue.next()] == [A, C, B]


# Held for what a look-up may show


def test_a_load_that_is_held_goes_on_without_sources_until_its_deadline(world):
    queue = world.queue([], 300)
    queue.hold(True)
    assert queue.next() is None
    assert world.clock.passed == pytest.approx(300)


def test_a_load_that_is_held_no_more_is_over_without_sources(world):
    queue = world.queue([A], 300)
    queue.hold(True)
    assert queue.next() == A
    queue.failed(A, SourceRefused("no"))
    assert queue.poll() is None and not queue.over.is_set()
    queue.hold(False)
    assert queue.next() is None
    assert world.clock.passed == 0
