import contextlib
import heapq
import itertools
import threading

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vllm_ascend.model_loader.netloader.executor import rate_limiter
from vllm_ascend.model_loader.netloader.executor.rate_limiter import RateLimiter

from .support import PATIENCE, Clock


class Stop:
    """In the place of an event: it sleeps on the test's clock, and is never set."""

    def __init__(self, clock):
        self._clock = clock
        self.waited = []

    def wait(self, seconds):
        self.waited.append(seconds)
        self._clock.sleep(max(0.0, seconds))


class Clients:
    """Threads that share a limiter, and sleep on the test's clock: one at a time is awake.

    It stands in the place of their events, too.
    """

    def __init__(self, clock):
        self._clock, self._asleep, self._count = clock, [], itertools.count()
        self._all_asleep = threading.Semaphore(0)

    def run(self, *lives):
        threads = [threading.Thread(target=self._live, args=[life], daemon=True) for life in lives]
        for thread in threads:
            thread.start()
            assert self._all_asleep.acquire(timeout=PATIENCE)
        while self._asleep:
            moment, _, awake = heapq.heappop(self._asleep)
            self._clock.sleep(max(0.0, moment - self._clock.now))
            awake.release()
            assert self._all_asleep.acquire(timeout=PATIENCE)

    def _live(self, life):
        try:
            life()
        finally:
            self._all_asleep.release()

    def wait(self, seconds):
        awake = threading.Semaphore(0)
        heapq.heappush(self._asleep, (self._clock.now + seconds, next(self._count), awake))
        self._all_asleep.release()
        awake.acquire()


def assert_within_the_rate(started, rate):
    """No stretch of time has more than the rate and one message."""
    for first, (begin, _) in enumerate(started):
        sent = 0
        for moment, nbytes in started[first:]:
            assert sent <= rate * (moment - begin) + 1e-6
            sent += nbytes


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(rate_limiter, "time", clock)
    return clock


def test_messages_start_as_the_rate_allows(clock):
    limiter, stop, starts = RateLimiter(1000), Stop(clock), []
    for nbytes in (500, 0, 2000, 1, 1):
        limiter.wait(nbytes, stop)
        starts.append(clock.passed)
    assert starts == pytest.approx([0, 0.5, 0.5, 2.5, 2.501])


@given(st.lists(st.tuples(st.integers(1, 5000), st.floats(0, 3)), min_size=1, max_size=30))
def test_no_stretch_of_time_has_more_than_the_rate_and_one_message(messages):
    """However the messages come: what was not sent earlier earns no credit."""
    clock = Clock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rate_limiter, "time", clock)
        limiter, stop, started = RateLimiter(1000), Stop(clock), []
        for nbytes, pause in messages:
            clock.sleep(pause)
            limiter.wait(nbytes, stop)
            started.append((clock.passed, nbytes))
    assert_within_the_rate(started, 1000)


@settings(max_examples=50)
@given(
    st.lists(
        st.tuples(st.integers(0, 5000), st.floats(0, 3), st.none() | st.floats(0, 9)),
        min_size=2,
        max_size=8,
    )
)
@example([(600, 0.0, None), (2000, 0.0, 0.4), (100, 0.45, None), (100, 0.46, None)])
def test_no_stretch_of_time_has_more_where_clients_hang_up_and_nobody_waits_for_their_bytes(arrive):
    clock = Clock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rate_limiter, "time", clock)
        limiter, clients, started = RateLimiter(1000), Clients(clock), []

        def life(nbytes, pause, leaves):
            clients.wait(pause)
            try:
                gone = (lambda: False) if leaves is None else lambda: clock.passed >= leaves
                limiter.wait(nbytes, clients, gone)
            except ConnectionResetError:
                assert leaves <= clock.passed
            else:
                started.append((clock.passed, nbytes))

        clients.run(*(lambda one=one: life(*one) for one in arrive))
    assert_within_the_rate(started, 1000)
    sent = sum(nbytes for _, nbytes in started) / 1000
    leave = [leaves for _, _, leaves in arrive if leaves is not None]
    assert started == sorted(started, key=lambda one: one[0])
    # The last one is noticed half a second later, and so is that its turn is over.
    latest = max(*(pause for _, pause, _ in arrive), *leave, 0.0)
    assert all(moment <= latest + 1.0 + sent for moment, _ in started)


def test_a_message_that_may_start_is_not_held_back(clock):
    limiter, stop = RateLimiter(1000), Stop(clock)
    limiter.wait(500, stop)
    clock.sleep(10)
    limiter.wait(500, stop)
    assert clock.passed == 10


def test_all_who_share_a_limiter_share_its_rate_first_come_first_served(clock):
    limiter, mine, theirs = RateLimiter(1000), Stop(clock), Stop(clock)
    for stop in (mine, theirs, mine, theirs):
        limiter.wait(1000, stop)
    assert clock.passed == 3
    assert mine.waited == [0.5] * 2
    assert theirs.waited == [0.5] * 4


def test_without_a_rate_nobody_waits(clock):
    stop = Stop(clock)
    RateLimiter(None).wait(1 << 60, stop)
    assert stop.waited == []


def test_whoever_waits_goes_on_when_the_weights_are_withdrawn():
    limiter, stop, over = RateLimiter(1), threading.Event(), threading.Event()
    limiter.wait(3600, stop)

    def wait():
        limiter.wait(1, stop)
        over.set()

    threading.Thread(target=wait, daemon=True).start()
    assert not over.wait(0.05)
    stop.set()
    assert over.wait(PATIENCE)


def test_whoever_waits_for_a_client_that_goes_learns_it_within_half_a_second(clock):
    limiter, stop = RateLimiter(1), Stop(clock)
    limiter.wait(3600, stop)
    with pytest.raises(ConnectionResetError):
        limiter.wait(1, stop, lambda: clock.passed >= 5)
    assert 5 <= clock.passed <= 5.5


@pytest.mark.parametrize("stopped", [True, False])
def test_nobody_waits_for_bytes_that_nobody_wants_any_more(clock, stopped):
    limiter, stop = RateLimiter(1000), threading.Event()
    limiter.wait(1000, stop)
    for _ in range(100):
        with contextlib.nullcontext() if stopped else pytest.raises(ConnectionResetError):
            stop.set()
            limiter.wait(1000, stop, lambda: not stopped)
    limiter.wait(1000, Stop(clock))
    assert clock.passed == pytest.approx(1)
