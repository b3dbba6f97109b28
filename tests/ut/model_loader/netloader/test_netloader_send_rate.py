"""MAX_SEND_RATE: what a source sends in total, and that nothing else suffers from it.

Every time here is a least one, which no busy machine makes shorter.
"""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from vllm_ascend.model_loader.netloader.errors import LoadFailed
from vllm_ascend.model_loader.netloader.executor.pace import Pace

from .support import (
    MIB,
    PATIENCE,
    ROW,
    blank_like,
    differing,
    load,
    loads_right_bytes,
    rows,
    settings,
    source,
    tapped,
    until,
    weights_of,
)

NEVER = threading.Event()


@pytest.fixture(scope="module")
def weights():
    return rows()


def seconds_of(work):
    started = time.monotonic()
    work()
    return time.monotonic() - started


def run_all(threads):
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_without_a_rate_nobody_waits(monkeypatch):
    monkeypatch.setattr(NEVER, "wait", None)
    Pace(None).wait(1 << 60, NEVER)


def test_messages_start_at_the_rate_and_the_first_at_once():
    pace = Pace(1000)
    assert seconds_of(lambda: [pace.wait(100, NEVER) for _ in range(4)]) >= 0.3
    Pace(1).wait(10**6, NEVER)


def test_those_who_share_a_rate_share_it():
    pace = Pace(1000)
    threads = [threading.Thread(target=pace.wait, args=(100, NEVER)) for _ in range(4)]

    assert seconds_of(lambda: run_all(threads)) >= 0.3


def test_idle_time_earns_no_burst():
    pace = Pace(1000)
    pace.wait(1, NEVER)
    time.sleep(0.3)
    assert seconds_of(lambda: [pace.wait(100, NEVER) for _ in range(3)]) >= 0.2


def test_who_waits_can_be_stopped():
    pace, stop = Pace(1), threading.Event()
    pace.wait(10**6, stop)
    waiting = threading.Thread(target=pace.wait, args=(1, stop))
    waiting.start()
    stop.set()
    waiting.join(PATIENCE)
    assert not waiting.is_alive()


def test_a_source_sends_no_faster_than_its_rate(weights):
    total = len(weights) * ROW
    config = settings(max_send_rate=2 * total, max_sessions=1)
    with source(weights, config=config) as running:
        blanks = blank_like(weights)
        seconds = seconds_of(lambda: load([running], blanks))
    assert differing(blanks, weights) == []
    assert seconds >= (total - ROW) / (2 * total)


def test_all_clients_of_a_source_share_its_rate(weights):
    total = len(weights) * ROW
    with source(weights, config=settings(max_send_rate=4 * total)) as running:
        blanks = [blank_like(weights) for _ in range(3)]
        threads = [threading.Thread(target=load, args=([running], blank)) for blank in blanks]

        assert seconds_of(lambda: run_all(threads)) >= (3 * total - ROW) / (4 * total)
    assert [differing(blank, weights) for blank in blanks] == [[], [], []]


def test_a_load_may_take_longer_than_the_progress_deadline():
    weights = rows(count=24)
    config = settings(max_send_rate=24 * ROW // 2, max_sessions=1, progress_timeout=1.0)
    assert config.max_chunk_bytes == 0  # rows are smaller than the smallest chunk
    with source(weights, config=config) as running:
        blanks = blank_like(weights)
        # the session takes the offer's own chunks, as 0 is no size
        client = settings(progress_timeout=1.0)
        assert seconds_of(lambda: load([running], blanks, config=client)) >= 1.5
    assert differing(blanks, weights) == []


def test_clients_that_share_a_low_rate_do_not_count_as_stalled():
    # Each chunk takes 0.6 s when both pull, so that eight of them take longer than the deadline.
    weights = rows(count=10)
    config = settings(max_send_rate=int(2 * ROW / 0.6), max_sessions=2)
    client = settings(progress_timeout=2.0)
    with source(weights, config=config) as running:
        blanks = [blank_like(weights) for _ in range(2)]
        with ThreadPoolExecutor() as pool:
            for loading in [pool.submit(load, [running], b, config=client) for b in blanks]:
                loading.result()
    assert [differing(blank, weights) for blank in blanks] == [[], []]


def test_what_was_hashed_in_larger_chunks_is_sent_in_smaller_ones(weights):
    config = settings(max_send_rate=20 * MIB, max_sessions=4, progress_timeout=1.0, chunk_mib=4)
    assert config.chunk_bytes == 2 * MIB
    with source(weights_of(weights, 8 * MIB), config=config) as running:
        loaded = load([running], blank_like(weights))
        assert loaded.plan.chunk_bytes == 2 * MIB
    with source(weights_of(weights, 8 * MIB), config=settings(chunk_mib=4)) as running:
        assert load([running], blank_like(weights)).plan.chunk_bytes == 8 * MIB


def test_what_began_in_chunks_too_large_for_the_rate_begins_again_in_smaller_ones(weights):
    slow = settings(max_send_rate=20 * MIB, max_sessions=4, progress_timeout=1.0)
    begun = tapped(weights_of(weights, 4 * MIB), failing_when_asked)
    with source(begun) as first, source(weights_of(weights, MIB), config=slow) as second:
        blanks = blank_like(weights)
        loaded = load([first, second], blanks, config=settings(max_sources=1))
    assert loaded.plan.chunk_bytes == MIB
    assert differing(blanks, weights) == []


def failing_when_asked(index, count):
    if count >= 8:
        raise RuntimeError("injected failure")


def test_a_source_stops_at_once_however_slow_it_is(weights):
    # the second chunk would start after more than an hour
    config = settings(max_send_rate=1, progress_timeout=PATIENCE)
    with source(weights, config=config) as running:
        failures = []

        def client():
            try:
                load([running], blank_like(weights), config=settings(progress_timeout=PATIENCE))
            except LoadFailed as error:
                failures.append(str(error))

        waiting = threading.Thread(target=client)
        waiting.start()
        assert until(lambda: running.server._pace._next_start > time.monotonic() + ROW)
        running.server.stop()
        waiting.join(PATIENCE / 2)
        assert not waiting.is_alive()
        assert "the source is shutting down" in failures[0]


def test_a_source_that_is_slow_serves_the_next_client_too(weights):
    config = settings(max_send_rate=100 * MIB)
    with source(weights, config=config) as running:
        assert all(loads_right_bytes(running, weights) for _ in range(2))
