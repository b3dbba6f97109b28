"""What is particular to CPUs."""

import itertools
import resource
import threading
from pathlib import Path

import pytest
import torch
import xxhash

from vllm_ascend.model_loader.netloader.executor.devices import cpu
from vllm_ascend.model_loader.netloader.executor.devices.choose import device_of
from vllm_ascend.model_loader.netloader.executor.memory import host_view

from .support import MIB, random_tensor

DEVICE = device_of("cpu", 16)
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
    large = torch.empty(50 << 20, dtype=torch.uint8)
    part = large[23 << 20 : 25 << 20].random_()  # the block before and the one after are not there
    before = part.clone()
    DEVICE.prefault([large], GO_ON)
    assert blocks_with_huge_pages(large)[0]
    assert torch.equal(part, before)


@HUGE_PAGES
def test_memory_that_is_there_is_left_alone():
    large = torch.empty(50 << 20, dtype=torch.uint8).fill_(1)
    DEVICE.prefault([large], GO_ON)
    assert not any(blocks_with_huge_pages(large))


@HUGE_PAGES
def test_huge_pages_that_come_fast_are_all_asked_for(seconds_per_block):
    large = torch.empty(50 << 20, dtype=torch.uint8)
    seconds_per_block(*[0.0001] * 20)
    DEVICE.prefault([large], GO_ON)
    assert all(blocks_with_huge_pages(large))


@HUGE_PAGES
def test_huge_pages_that_come_slowly_are_asked_for_less_and_less(seconds_per_block):
    large = torch.empty(50 << 20, dtype=torch.uint8)
    seconds_per_block(*[1.0] * 20)
    DEVICE.prefault([large], GO_ON)
    asked = [number for number, huge in enumerate(blocks_with_huge_pages(large)) if huge]
    assert asked == [0, 2, 5, 10]


def test_memory_is_there_when_it_was_asked_for():
    large = torch.empty(32 << 20, dtype=torch.uint8)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    DEVICE.prefault([large], GO_ON)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    large.fill_(1)
    # All but what lies before the first huge page's place and after the last one's.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - after < 1100
    assert after > faults


def test_nothing_is_asked_for_once_it_is_stopped():
    large = torch.empty(32 << 20, dtype=torch.uint8)
    stop = threading.Event()
    stop.set()
    DEVICE.prefault([large], stop)
    assert not any(blocks_with_huge_pages(large))


def test_tensors_without_a_whole_huge_page_of_their_own_are_left_alone():
    base = torch.zeros(32 << 20, dtype=torch.uint8)
    strided = base.view(8, 4 << 20)[:, : 1 << 20]
    small = [torch.zeros(()), torch.zeros(0), torch.zeros(1 << 10)]
    DEVICE.prefault([strided, *small], GO_ON)
    assert not asks_for_huge_pages(base.data_ptr() + base.nbytes // 2)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.bfloat16, torch.complex128])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (5, 7)])
def test_a_small_tensor_has_the_digest_of_its_bytes(dtype, shape):
    tensor = torch.randint(0, 2, shape).to(dtype)
    expected = bytes(tensor.view(-1).view(torch.uint8).tolist())
    assert DEVICE.digests([tensor]) == xxhash.xxh3_128_digest(expected)


@pytest.mark.parametrize("length", [MIB - 1, MIB, MIB + 1, 3 * MIB, 3 * MIB + 5])
def test_every_block_of_a_tensor_has_a_digest_of_its_own(length):
    tensor = random_tensor(0, torch.uint8, length)
    data = tensor.numpy().tobytes()
    blocks = [data[start : start + MIB] for start in range(0, length, MIB)]
    assert DEVICE.digests([tensor]) == b"".join(map(xxhash.xxh3_128_digest, blocks))


def test_the_digests_of_several_tensors_follow_one_another():
    parts = [random_tensor(i, torch.int16, n) for i, n in enumerate((5, 0, MIB, 1))]
    assert DEVICE.digests(parts) == b"".join(DEVICE.digests([part]) for part in parts)
    assert DEVICE.digests([host_view(part) for part in parts]) == DEVICE.digests(parts)
    assert DEVICE.digests([memoryview(host_view(part)) for part in parts]) == DEVICE.digests(parts)
    assert len(DEVICE.digests(parts)) == 16 * (1 + 1 + 2 + 1)
    assert DEVICE.digests([]) == b""


def test_the_memory_of_a_cpu_is_the_hosts():
    """So sockets reach it, and there is no fabric to form groups in."""
    assert DEVICE.accelerator is None
    assert device_of("cpu", 16).digest_algorithm == "xxh3_128"
