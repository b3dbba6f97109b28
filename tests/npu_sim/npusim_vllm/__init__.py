"""Makes torch_npu and vLLM Ascend run on the simulated CANN, for tests only.

tools/install_ascend.sh links this folder into site-packages, beside a .pth file that imports `boot`
at the start of each interpreter for which NPUSIM_LIB is set. A test's process uses the functions.
"""

import ctypes
import functools
import json
import os
from typing import Any


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(os.path.join(os.environ["NPUSIM_LIB"], "libnpusim.so"))
    library.npusim_fault.argtypes = [ctypes.c_char_p]
    library.npusim_counts.restype = ctypes.c_char_p
    return library


def fault(spec: str) -> None:
    """Asks for faults in this process, beside those it has; "clear" removes all. See README.md."""
    if _library().npusim_fault(spec.encode()):
        raise ValueError(f"{spec!r} is no fault; the reason is on stderr")


def forget_most() -> None:
    """Lets `most_device_memory` be counted anew from now on."""
    _library().npusim_forget_most()


def counts() -> dict[str, Any]:
    """Returns what of the simulated devices this process uses now, and the most it has used."""
    counted: dict[str, Any] = json.loads(_library().npusim_counts())
    return counted
