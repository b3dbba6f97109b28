"""The guide's tables of what a session takes on a device, measured at both of its sides."""

import re
from pathlib import Path

import pytest
import torch

from vllm_ascend.model_loader.netloader.interaction.discovery import NOBODY
from vllm_ascend.model_loader.netloader.load import elastic_load

from . import models, ways
from .models import MIB
from .sides import PATIENCE, differing, identity, make, serve, settings, wait_for_no_sessions
from .ways import Way

WAY = Way.HCCL
pytestmark = pytest.mark.ways(WAY)

PAGE = Path(__file__).parents[2] / "docs/source/user_guide/feature_guide/netloader_ascend.md"
# In MiB. torch asks CANN for whole MiB, a few bytes more than a tensor has.
CHUNK, BUFFER, LARGEST = 1, 16, 12
OPTIONS = {
    "chunk_mib": CHUNK,
    "handshake_timeout": PATIENCE,  # so that a slow machine does not take HTTP
    "progress_timeout": PATIENCE,
}


def large_and_small(make):
    large = {f"nz.{i}": make.nz(make(torch.bfloat16, 2032, 256 * LARGEST)) for i in range(4)}
    return large | models.packed(make)


def taken():
    from npusim_vllm import counts

    torch.npu.current_stream().synchronize()
    return counts()["device_memory"][ways.INDEX]


def watch():
    """Returns what is taken now, and by tensors; the most is counted from now on."""
    from npusim_vllm import forget_most

    torch.npu.empty_cache()
    torch.npu.reset_peak_memory_stats()
    forget_most()
    return taken(), torch.npu.memory_allocated()


def measure(before):
    """Returns the most that tensors took since then, the most that CANN gave, and what it gives."""
    from npusim_vllm import counts

    taken_before, allocated_before = before
    after = taken() - taken_before
    most = counts()["most_device_memory"][ways.INDEX] - taken_before
    return torch.npu.max_memory_allocated() - allocated_before, most, after


def load_and_measure(address):
    tensors, who = make(WAY, large_and_small, 1000), identity(WAY)
    before, changed = watch(), settings(WAY, **OPTIONS)
    elastic_load(tensors, set(tensors), [address], who, changed, WAY.device(), own=NOBODY)
    measured = measure(before)
    assert not differing(WAY, tensors, make(WAY, large_and_small, 0))
    return measured


def documented():
    """The bound and what was measured in MiB, for each row of the page's table."""
    row = r"^\| (a .+?) \| (.+?) \| (\d+) MiB \| (\d+) MiB \|$"
    values = {"CHUNK_MIB": CHUNK, "HCCL_BUFFER_SIZE": BUFFER, "largest": LARGEST}

    def value(term):
        number, name = re.fullmatch(r"(?:(\d+) . )?`?(\w+)`?", term).groups("1")
        return int(number) * values[name]

    return {
        side: (sum(map(value, bound.split(" + "))), int(during), int(after))
        for side, bound, during, after in re.findall(row, PAGE.read_text(), re.M)
    }


def test_a_session_takes_no_more_of_a_device_than_documented(way, started):
    source, client = started(0), started(1)
    address = source.call(serve, WAY, large_and_small, **OPTIONS)
    client.call(load_and_measure, address)  # makes streams, and what digests are computed with
    source.call(wait_for_no_sessions)
    before = source.call(watch)
    at_client = client.call(load_and_measure, address)
    source.call(wait_for_no_sessions)
    at_source = source.call(measure, before)
    for side, measured in {"a source": at_source, "a client": at_client}.items():
        tensors, during, after = (taken / MIB for taken in measured)
        bound, most_during, most_after = documented()[side]
        said = f"{side}: {tensors:.1f} MiB in tensors, {during} MiB during, {after} MiB after"
        print(said)
        assert 0 < tensors + 2 * BUFFER <= bound, said
        assert most_during - 8 < during <= most_during, said
        assert after <= most_after, said
