"""Whatever happens among peers, each load ends with the right bytes or a reason, without a leak.

A schedule that fails is played again with CONFORMANCE_SCHEDULE=NUMBER.
"""

import os
import time

import pytest

from .schedules import play
from .ways import Way

AT_ONCE = 6  # in processes of their own, as each looks for leaks of its process
EACH = 50  # in a test
PATIENCE = 200.0
ONLY = os.environ.get("CONFORMANCE_SCHEDULE")


def shares():
    for way, most in (Way.HTTP, 200), (Way.STREAM, 25):
        numbers = range(most) if ONLY is None else [int(ONLY)]
        for first in range(0, len(numbers), EACH):
            share = numbers[first : first + EACH]
            yield pytest.param(way, share, id=f"{way.value}-{share[0]}-{share[-1]}")


@pytest.mark.timeout(PATIENCE + 40)
@pytest.mark.parametrize(("way", "numbers"), [*shares()])
def test_each_load_ends_with_the_right_bytes_or_a_reason(way, numbers, started):
    processes = [started(0) for _ in range(min(AT_ONCE, len(numbers)))]
    left, playing, failures = [*numbers], {}, {}
    deadline = time.monotonic() + PATIENCE
    while left or playing:
        for process in processes:
            if left and not process.busy:
                playing[process] = left.pop(0)
                process.start(play, way, playing[process])
        for process in [*playing]:
            if process.ready(0.02):
                number = playing.pop(process)
                try:
                    process.result()
                except AssertionError as error:
                    failures[number] = str(error)
        assert time.monotonic() < deadline, f"schedules {[*playing.values()]} go on"
    assert not failures, "\n".join(f"schedule {one}: {why}" for one, why in failures.items())
