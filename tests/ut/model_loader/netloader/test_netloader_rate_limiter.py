import threading

import pytest
from hypothesis import given
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
    for first, (begin, _) in enumerate(started):
        sent = 0
        for moment, nbytes in started[first:]:
            assert sent <= 1000 * (moment - begin) + 1e-6
            sent += nbytes


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


def test_whoever_waits_for_a_client_that_goes_goes_on_within_half_a_second(clock):
    limiter, stop = RateLimiter(1), Stop(clock)
    limiter.wait(3600, stop)
    limiter.wait(1, stop, lambda: clock.passed >= 5)
    assert 5 <= clock.passed <= 5.5
