"""Sessions in a row, failed or not, leave nothing behind on either side."""

import copy
import itertools
import os
import threading
from unittest import mock

import pytest

from vllm_ascend.model_loader.netloader.interaction import client

from .faults import closed_port
from .models import small
from .sides import client_process, grown, load, load_here, source, until, used
from .ways import Way


def resident():
    """Of this process, in MB."""
    with open("/proc/self/statm") as pages:
        return int(pages.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def fail_often(way, address, times):
    """Loads that cannot check what has come."""

    def fail(parts):
        raise RuntimeError("injected failure")

    device = copy.copy(way.device())
    device.digests = fail
    with mock.patch.object(client, "_LAST_WORDS", 0.01):  # none come, as the source is well
        for _ in range(times):
            load_here(way, [address], small, device=device).check_failed("injected failure")


def test_nothing_is_left_of_many_failed_sessions(way):
    there = client_process(way).call if way.on_npu else lambda call, *arguments: call(*arguments)
    with source(way, small) as running:
        counts = []
        for _ in range(10):
            there(fail_often, way, running.address, 20)
            until(lambda: running.sessions == 0)
            counts.append([used(way), there(used, way), resident()])
        # On a busy machine sessions overlap for a moment, and device memory is kept for each of the
        # few streams. That ends; a leak grows every time.
        more = [
            [*grown(before[0], now[0]), *grown(before[1], now[1])]
            for before, now in itertools.pairwise(counts)
        ]
        assert not all(more), more
        if not way.on_npu:  # where it has the device's memory, too
            assert counts[-1][2] < counts[0][2] + 10
        load(way, [running], small).check()


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
