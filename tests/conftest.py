import logging
import platform
from pathlib import Path

import pytest

# By its name, as not every environment of the tests has what the package imports.
logger = logging.getLogger("vllm.netloader")


# What vLLM and torch choose their CPU kernels by -> a flag in /proc/cpuinfo.
_INSTRUCTION_SETS = {"AMX": "amx_tile", "AVX-512": "avx512f", "AVX2": "avx2"}


def pytest_report_header():
    """Say which CPU kernels the tests run with, as a failure may be a kernel's."""
    cpuinfo = Path("/proc/cpuinfo")
    words = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    found = [name for name, flag in _INSTRUCTION_SETS.items() if flag in words]
    return f"CPU: {platform.machine()}, instruction sets: {', '.join(found) or 'others'}"


class _Lines(logging.Handler):
    def __init__(self):
        super().__init__(logging.DEBUG)
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


@pytest.fixture
def log():
    """The log lines of NetLoader, whatever vLLM has done to its loggers."""
    handler = _Lines()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield handler.lines
    logger.setLevel(level)
    logger.removeHandler(handler)
