"""Sessions in a row, failed or not, leave nothing behind on either side."""

import copy
import ctypes
import itertools
import threading
from unittest import mock

import pytest

from vllm_ascend.model_loader.netloader.interaction import client

from .counted import grown, used
from .faults import closed_port
from .models import small
from .sides import PATIENCE, client_process, load, load_here, source, until
from .ways import GlooDevice, Way


class MallInfo2(ctypes.Structure):
    """See mallinfo2(3)."""

    _fields_ = [
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd")),
        *((name, ctypes.c_size_t) for name in ("usmblks", "fsmblks", "uordblks", "fordblks")),
        ("keepcost", ctypes.c_size_t),
    ]


def allocated():
    """MB that this process has from malloc, which is less than what its threads' heaps hold."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = MallInfo2
    counted = mallinfo2()
    return (counted.hblkhd + counted.uordblks) / 1e6


def fail_often(way, address, times):
    """Loads that cannot check what has come, and through a CPU's groups lose every other one."""

    def fail(_):
        raise RuntimeError("injected failure")

    blind = copy.copy(way.device())
    blind.digests = fail
    devices = [blind, GlooDevice(fail)] if way is Way.STREAM else [blind]
    with mock.patch.object(client, "_LAST_WORDS", 0.01):  # none come, as the source is well
        for number in range(times):
            device = devices[number % len(devices)]
            load_here(way, [address], small, device=device).check_failed("injected failure")


def there(way, function, *arguments):
    """Calls a function in the process of clients."""
    if not way.on_npu:
        return function(*arguments)
    process = client_process(way)
    process.start(function, *arguments)
    return process.result(3 * PATIENCE)


def test_nothing_is_left_of_many_failed_sessions(way):
    with source(way, small) as running:
        counts = []
        for _ in range(10):
            there(way, fail_often, way, running.address, 20)
            until(lambda: running.sessions == 0)
            counts.append([used(way), there(way, used, way), allocated()])
        if way.on_npu:
            # On a busy machine sessions overlap for a moment, and device memory is kept for each of
            # the few streams. That ends; a leak grows every time.
            for side in (0, 1):
                more = [
                    {name for name, *_ in grown(before[side], now[side])}
                    for before, now in itertools.pairwise(counts)
                ]
                assert not set.intersection(*more), more
        else:
            until(lambda: not grown(counts[0][0], used(way)))
            assert counts[-1][2] < counts[0][2] + 1
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
