"""The permission to use Intel's AMX tiles, which Linux gives a process that asks for it."""

import ctypes
import os
import platform
import sys

from ...utils import logger

_SYS_ARCH_PRCTL = 158  # x86-64
_ARCH_REQ_XCOMP_PERM = 0x1023  # <asm/prctl.h> of Linux 5.16 and later
_XFEATURE_XTILEDATA = 18


def request_amx_tiles() -> bool:
    """Ask Linux to let this process use AMX tiles.

    The permission belongs to the process: all of its threads have it, and so do forked children. A
    program started by exec has to ask anew. Asking again changes nothing.

    Returns:
        Whether the process may use them; False where there are none: another architecture, an
        older processor or an older kernel.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    # Not torch.cpu._init_amx(), which does the same: a private function may be gone tomorrow, the
    # system call stays.
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA) != 0:
        logger.debug("no AMX tiles: %s", os.strerror(ctypes.get_errno()))
        return False
    logger.debug("AMX tiles may be used")
    return True
