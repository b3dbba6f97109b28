"""The permission for AMX tiles, on processors with and without them."""

import ctypes
import platform
import sys
from pathlib import Path

import pytest

from vllm_ascend.model_loader.netloader.executor.devices import amx
from vllm_ascend.model_loader.netloader.executor.devices.amx import request_amx_tiles

from .support import python

CPUINFO = Path("/proc/cpuinfo")
HAS_TILES = CPUINFO.exists() and "amx_tile" in CPUINFO.read_text().split()

_ASK = """
import ctypes, os
from vllm_ascend.model_loader.netloader.executor.devices.amx import request_amx_tiles

def is_permitted():
    get_permissions, features = 0x1022, ctypes.c_uint64()
    ctypes.CDLL(None).syscall(158, get_permissions, ctypes.byref(features))
    return bool(features.value >> 18 & 1)

print("before", is_permitted())
print("first", request_amx_tiles())
print("again", request_amx_tiles())
print("after", is_permitted(), flush=True)
if not os.fork():
    print("child", is_permitted(), flush=True)
    os._exit(0)
os.wait()
"""


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="not Linux on x86-64"
)
def test_a_process_and_its_forked_child_may_use_tiles_once_it_has_asked_where_there_are_some():
    process = python("-c", _ASK)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0
    assert output.splitlines() == [
        "before False",
        f"first {HAS_TILES}",
        f"again {HAS_TILES}",
        f"after {HAS_TILES}",
        f"child {HAS_TILES}",
    ]


class Libc:
    """Answers a system call."""

    def __init__(self, answer, errno=0):
        self.answer, self.errno, self.calls = answer, errno, []

    def syscall(self, *arguments):
        self.calls.append(arguments)
        ctypes.set_errno(self.errno)
        return self.answer


@pytest.fixture
def libc(monkeypatch):
    """A libc on Linux and x86-64."""

    def answers(*answer):
        made = Libc(*answer)
        monkeypatch.setattr(amx.ctypes, "CDLL", lambda *_, **__: made)
        return made

    monkeypatch.setattr(amx.sys, "platform", "linux")
    monkeypatch.setattr(amx.platform, "machine", lambda: "x86_64")
    return answers


def test_it_is_tile_data_that_is_asked_for(libc):
    called = libc(0)
    assert request_amx_tiles() is True
    # arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    assert called.calls == [(158, 0x1023, 18)]


def test_a_refusal_is_no_more_than_a_line_for_debugging(libc, log):
    libc(-1, 95)
    assert request_amx_tiles() is False
    assert log == ["no AMX tiles: Operation not supported"]


@pytest.mark.parametrize(("system", "machine"), [("linux", "aarch64"), ("darwin", "x86_64")])
def test_elsewhere_the_number_of_the_call_means_something_else(system, machine, libc, monkeypatch):
    called = libc(0)
    monkeypatch.setattr(amx.sys, "platform", system)
    monkeypatch.setattr(amx.platform, "machine", lambda: machine)
    assert request_amx_tiles() is False
    assert called.calls == []
