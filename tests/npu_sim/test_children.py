"""The helper itself: what a child may see, and that none outlives its test."""

import time

import psutil
import pytest


def test_a_child_s_failure_shows_its_output(simulator):
    with pytest.raises(AssertionError, match=r"(?s)ended with 3.*words of the child"):
        simulator.run_code("print('words of the child'); raise SystemExit(3)").check()


def test_a_slow_child_is_killed_with_its_own_children(simulator):
    code = "import subprocess; p = subprocess.Popen(['sleep', '60']); print(p.pid); p.wait()"
    result = simulator.run_code(code, timeout=1)
    assert result.code is None
    sleeper = int(result.output)
    deadline = time.monotonic() + 5
    while psutil.pid_exists(sleeper) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not psutil.pid_exists(sleeper)


def test_a_child_imports_the_installed_vllm_ascend(simulator):
    code = "import importlib.util as u; print(u.find_spec('vllm_ascend').origin)"
    assert "site-packages/vllm_ascend/" in simulator.run_code(code).check().output
