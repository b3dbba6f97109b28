"""What is particular to CPUs."""

import itertools
import os
import resource
import threading
from pathlib import Path

import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed import HashStore, ProcessGroupGloo

from vllm_ascend.model_loader.netloader.executor.devices import cpu, device_of

DEVICE = device_of("cpu", 16)
HOST = "127.0.0.1"
HUGE = 2 << 20


def asks_for_huge_pages(address: int) -> bool:
    """Whether the mapping that an address lies in has the flag that the advice sets."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            low, high = (int(bound, 16) for bound in head.split("-"))
            inside = low <= address < high
        elif inside and head == "VmFlags:":
            return "hg" in line.split()
    return False


HUGE_PAGES = pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="no transparent huge pages"
)
GO_ON = threading.Event()


@pytest.fixture
def seconds_per_block(monkeypatch):
    """A clock of the thread's time that says how long each block takes."""
    clock = iter(())

    def tell(*blocks):
        nonlocal clock
        clock = itertools.chain.from_iterable((0.0, seconds) for seconds in blocks)

    monkeypatch.setattr(cpu.time, "thread_time", lambda: next(clock))
    return tell


def blocks_with_huge_pages(tensor):
    first = -(-tensor.data_ptr() // HUGE) * HUGE
    end = tensor.data_ptr() + tensor.nbytes
    return [asks_for_huge_pages(start) for start in range(first, end - cpu._BLOCK, cpu._BLOCK)]


@HUGE_PAGES
def test_large_tensors_get_huge_pages_and_keep_their_contents():
    large = torch.arange(4 << 20, dtype=torch.int64)
    DEVICE.prepare([large], GO_ON)
    assert blocks_with_huge_pages(large)[0]
    assert torch.equal(large, torch.arange(4 << 20, dtype=torch.int64))


@HUGE_PAGES
def test_huge_pages_that_come_fast_are_all_asked_for(seconds_per_block):
    large = torch.empty(50 << 20, dtype=torch.uint8)
    seconds_per_block(*[0.0001] * 20)
    DEVICE.prepare([large], GO_ON)
    assert all(blocks_with_huge_pages(large))


@HUGE_PAGES
def test_huge_pages_that_come_slowly_are_asked_for_less_and_less(seconds_per_block):
    large = torch.empty(50 << 20, dtype=torch.uint8)
    seconds_per_block(*[1.0] * 20)
    DEVICE.prepare([large], GO_ON)
    asked = [number for number, huge in enumerate(blocks_with_huge_pages(large)) if huge]
    assert asked == [0, 2, 5, 10]


def test_memory_is_there_when_it_was_prepared():
    large = torch.empty(32 << 20, dtype=torch.uint8)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    DEVICE.prepare([large], GO_ON)
    prepared = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    large.fill_(1)
    # All but what lies before the first huge page's place and after the last one's.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - prepared < 1100
    assert prepared > faults


def test_nothing_is_prepared_once_it_is_stopped():
    large = torch.empty(32 << 20, dtype=torch.uint8)
    stop = threading.Event()
    stop.set()
    DEVICE.prepare([large], stop)
    assert not any(blocks_with_huge_pages(large))


def test_tensors_without_a_whole_huge_page_of_their_own_are_left_alone():
    base = torch.zeros(32 << 20, dtype=torch.uint8)
    strided = base.view(8, 4 << 20)[:, : 1 << 20]
    small = [torch.zeros(()), torch.zeros(0), torch.zeros(1 << 10)]
    DEVICE.prepare([strided, *small], GO_ON)
    assert not asks_for_huge_pages(base.data_ptr() + base.nbytes // 2)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.bfloat16, torch.complex128])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (5, 7)])
def test_a_hash_is_that_of_the_bytes(dtype, shape):
    tensor = torch.randint(0, 2, shape).to(dtype)
    expected = bytes(tensor.view(-1).view(torch.uint8).tolist())
    assert DEVICE.hash(tensor) == xxhash.xxh3_128_digest(expected)


def test_threads_of_gloo_do_not_preempt_others_and_the_callers_policy_stays(monkeypatch):
    made = []
    create_device = ProcessGroupGloo.create_device

    def noting(**arguments):
        made.append(os.sched_getscheduler(0))
        return create_device(**arguments)

    monkeypatch.setattr(cpu.ProcessGroupGloo, "create_device", noting)
    before = os.sched_getscheduler(0)
    with pytest.raises(RuntimeError):  # nobody comes
        DEVICE.create_group(HashStore(), 0, HOST, 0.1, lambda: False)
    assert made == [os.SCHED_BATCH]
    assert os.sched_getscheduler(0) == before


def test_where_the_policy_may_not_be_changed_a_group_is_formed_all_the_same(monkeypatch):
    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    with pytest.raises(RuntimeError):  # nobody comes
        DEVICE.create_group(HashStore(), 0, HOST, 0.1, lambda: False)


# Addresses


def gloo_address(host, length=136, rest=bytes(136 + 16)):
    """What gloo puts into the store: see `CpuDevice.acceptable`."""
    return len(host).to_bytes(8, "little") + host + length.to_bytes(8, "little") + rest


@given(st.binary(max_size=64), st.binary(max_size=64), st.binary(min_size=152, max_size=152))
def test_an_address_of_any_host_is_acceptable(here, there, rest):
    assert DEVICE.acceptable(gloo_address(there, rest=rest), gloo_address(here))


@given(st.binary(max_size=16), st.integers(0, 2**64 - 1), st.binary(max_size=200))
def test_an_address_whose_lengths_are_wrong_is_not(host, length, rest):
    right = length == 136 and len(rest) == 152
    assert DEVICE.acceptable(gloo_address(host, length, rest), gloo_address(b"here")) == right
