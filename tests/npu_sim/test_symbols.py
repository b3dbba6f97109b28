"""torch_npu's libraries do not load unless all names that they need exist.

Where a newer torch_npu needs more, this names it; the loader would stop at the first.
"""

import ctypes

import pytest

from .cann.build import SITE_PACKAGES, run, symbols
from .simulator import build

TORCH_NPU = SITE_PACKAGES / "torch_npu/lib"


def defined(libraries):
    return set().union(*(symbols(library, "--defined-only") for library in libraries))


def undefined(library):
    """Names without a version, as those of the C and C++ libraries have, that are not optional."""
    lines = run("nm", "--portability", "--dynamic", "--undefined-only", library).splitlines()
    names = (line.split() for line in lines)
    return {name for name, kind, *_ in names if kind == "U" and "@" not in name}


@pytest.fixture(scope="module")
def from_torch():
    return defined([*(SITE_PACKAGES / "torch/lib").glob("*.so"), *TORCH_NPU.glob("*.so")])


@pytest.mark.parametrize(
    ("library", "some"),
    [
        ("libtorch_npu.so", {"aclrtMalloc", "aclopCompileAndExecute", "MsprofReportApi"}),
        ("libop_plugin_atb.so", {"_ZN3atb13CreateContextEPPNS_7ContextE"}),
    ],
)
def test_what_torch_npu_needs_is_simulated(library, some, from_torch):
    process = ctypes.CDLL(None)  # this one, which has Python and the C library
    others = undefined(TORCH_NPU / library) - from_torch
    needed = {name for name in others if not hasattr(process, name)}
    assert some <= needed
    missing = needed - defined(build().iterdir())
    assert not missing
