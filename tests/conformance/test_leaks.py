"""Sessions in a row, failed or not, leave nothing behind on either side."""

import copy
import os
import threading
from unittest import mock

import pytest

from vllm_ascend.model_loader.netloader.interaction import client

from .faults import closed_port
from .models import small
from .sides import client_process, grown, load, load_here, source, until, used
from .ways import Way


def used_here(way):
    """What this process has, and its resident memory in MB."""
    counted = used(way)
    with open("/proc/self/statm") as pages:
        return counted, int(pages.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def more_used(before, now):
    return grown(before[0], now[0]) or now[1] > before[1] + 10


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
        before = None
        for _ in range(10):
            there(fail_often, way, running.address, 20)
            until(lambda: running.sessions == 0)
            # Memory that is kept for the next one is there after the first ones.
            before = before or [used_here(way), there(used_here, way)]
        until(lambda: not more_used(before[0], used_here(way)))
        until(lambda: not more_used(before[1], there(used_here, way)))
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
