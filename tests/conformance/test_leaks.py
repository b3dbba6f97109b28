"""Sessions in a row, failed or not, leave nothing behind on either side."""

import gc
import os
import threading

import pytest

from .faults import closed_port
from .models import small
from .sides import load, load_here, source, until
from .ways import GlooDevice, Way

ON_CPU = pytest.mark.ways(Way.HTTP, Way.STREAM)


def used():
    """Threads, descriptors and resident megabytes of this process."""
    gc.collect()
    with open("/proc/self/statm") as pages:
        resident = int(pages.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    return threading.active_count(), len(os.listdir("/proc/self/fd")), resident


class Out(GlooDevice):
    """Loses every message; on the way without groups, fails to check what came."""

    def __init__(self):
        def fail(message):
            raise RuntimeError("injected failure")

        super().__init__(fail)

    def digests(self, parts):
        raise RuntimeError("injected failure")


def failing(way):
    device = Out()
    if not way.in_groups:
        device = type(way.device())()
        device.digests = Out.digests.__get__(device)
    return device


@pytest.mark.parametrize(
    ("way", "times"), [(Way.HTTP, 200), (Way.STREAM, 80)], ids=["http", "stream"]
)
def test_nothing_is_left_of_many_failed_sessions(way, times):
    device = failing(way)
    with source(way, small) as running:
        before = used()
        for number in range(times):
            load_here(way, [running], small, device=device).check_failed()
            until(lambda: running.sessions == 0)
            if number == 20:  # memory that is kept for the next one is there now
                before = used()
        until(lambda: used()[0] <= before[0] and used()[1] <= before[1])
        assert used()[2] < before[2] + 10
        load(way, [running], small).check()


@ON_CPU
def test_no_thread_is_left_after_a_load(way):
    with source(way) as running:
        before = threading.active_count()
        load(way, [closed_port(), running]).check()
        until(lambda: threading.active_count() <= before)


@pytest.mark.ways(Way.HTTP)
def test_without_threads_there_is_no_model_and_no_hang(way, monkeypatch):
    def fail(_):
        raise RuntimeError("can't start new thread")

    with source(way) as running:
        monkeypatch.setattr(threading.Thread, "start", fail)
        load_here(way, [running]).check_failed()
        monkeypatch.undo()


@pytest.mark.ways(Way.HTTP)
@pytest.mark.parametrize("scarce", ["netloader-prefault", "netloader-load-more-0"])
def test_threads_that_only_save_time_need_not_be_there(way, monkeypatch, scarce):
    def fail(thread):
        if thread.name == scarce:
            failed.append(thread)
            raise RuntimeError("can't start new thread")
        start(thread)

    start, failed = threading.Thread.start, []
    monkeypatch.setattr(threading.Thread, "start", fail)
    with source(way) as running:
        load_here(way, [running], connections=2).check()
    assert failed


@pytest.mark.ways(Way.HTTP)
def test_memory_is_not_prefaulted_any_more_when_the_load_is_over(way):
    stopped = []

    class Slow(type(way.device())):
        def prefault(self, tensors, stop):
            stopped.append(stop.wait(20))

    with source(way) as running:
        load_here(way, [running], device=Slow()).check()
    assert stopped == [True]
