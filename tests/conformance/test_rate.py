"""MAX_SEND_RATE: what a source sends in total, and that nobody counts as stalled because of it.

Every time here is a least one, which no busy machine makes shorter.
"""

import contextlib
import time

from .faults import closed_port
from .models import COUNT, MIB, ROW, rows
from .sides import PATIENCE, fresh, load, loading, source, store_of, until

TOTAL = COUNT * ROW


def test_all_clients_of_a_source_share_its_rate(way):
    started = time.monotonic()
    with source(way, max_send_rate=8 * TOTAL) as running, contextlib.ExitStack() as stack:
        results = [stack.enter_context(loading(way, [running])) for _ in range(2)]
        for result in results:
            result().check()
    assert time.monotonic() - started >= (2 * TOTAL - ROW) / (8 * TOTAL)


def test_a_load_may_take_longer_than_the_progress_deadline(way):
    with source(way, max_send_rate=TOTAL / 1.5, max_sessions=1, progress_timeout=1.0) as running:
        seconds = load(way, [running], progress_timeout=1.0).check().seconds
    assert seconds >= (TOTAL - ROW) / (TOTAL / 1.5) > 1.4


def test_clients_that_share_a_low_rate_do_not_count_as_stalled(way):
    # Eight chunks, which a group's client asks for at once, take longer than the deadline.
    config = {"max_send_rate": int(2 * ROW / 0.2), "max_sessions": 2}
    with source(way, **config) as running, contextlib.ExitStack() as stack:
        results = [
            stack.enter_context(loading(way, [running], progress_timeout=1.5)) for _ in range(2)
        ]
        for result in results:
            assert result().check().seconds >= 2 * TOTAL / config["max_send_rate"] / 2


def test_large_chunks_are_sent_in_pieces_that_the_rate_allows(way):
    config = {"max_send_rate": 20 * MIB, "max_sessions": 4, "progress_timeout": 1.0}
    with source(way, **config) as running:
        assert running.server.config.max_message_bytes == 2 * MIB
        load(way, [running], chunk_mib=16, progress_timeout=1.0).check()


def test_a_source_stops_at_once_however_slow_it_is(way):
    # all of it would take longer than a test may
    rate = int(2 * MIB / PATIENCE) + 1
    with (
        source(way, max_send_rate=rate, max_sessions=1, progress_timeout=PATIENCE) as running,
        loading(way, [running], progress_timeout=PATIENCE) as result,
    ):
        until(lambda: running.status.bytes_sent > 0)
        running.server.stop()
        result(PATIENCE / 2).check_failed(str(running.address))


def test_what_a_slow_source_has_not_sent_another_one_brings(way):
    with (
        source(way, fresh(store_of(way, rows)), max_send_rate=TOTAL) as slow,
        source(way) as fast,
    ):
        outcome = load(way, [closed_port(), slow, fast]).check()
    assert str(fast.address) in outcome.gave
