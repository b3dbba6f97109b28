"""Sleep mode's memory: what `vllm_ascend.device_allocator.camem` takes from libraries.

They are vLLM Ascend's own, which is not compiled here, and `acl`, which comes with CANN.
"""

import ctypes
import os
from collections.abc import Callable
from typing import Any

Handle = tuple[int, int, int, int]  # device, bytes, address, and what is of no use here

_ALLOCATED = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_size_t, ctypes.c_void_p)
_FREED = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_PATH = os.path.join(os.environ["NPUSIM_LIB"], "libnpusim.so")
_library = ctypes.CDLL(_PATH)
_library.npusim_sleep_map.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_library.npusim_sleep_unmap.argtypes = [ctypes.c_void_p]
_library.aclrtMemcpy.argtypes = [
    *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int),
]
_callbacks: list[Any] = []  # the library calls them for as long as the process lives


def functions() -> dict[str, Any]:
    """Returns what replaces names of the module."""
    return {
        "init_module": _init_module,
        "python_create_and_map": _create_and_map,
        "python_unmap_and_release": _unmap_and_release,
        "memcpy": _memcpy,
        "lib_name": _PATH,
        "camem_available": True,
    }


def _init_module(allocated: Callable[[Handle], None], freed: Callable[[int], Handle]) -> None:
    def allocate(device: int, size: int, address: int) -> None:
        allocated((device, size, address, 0))

    _callbacks[:] = _ALLOCATED(allocate), _FREED(freed)
    _library.npusim_sleep_init(*_callbacks)


def _create_and_map(_device: int, size: int, address: int, _handle: int) -> None:
    _check(_library.npusim_sleep_map(address, size))


def _unmap_and_release(_device: int, _size: int, address: int, _handle: int) -> None:
    _check(_library.npusim_sleep_unmap(address))


def _memcpy(to: int, room: int, source: int, size: int, kind: int) -> int:
    error = int(_library.aclrtMemcpy(to, room, source, size, kind))
    _check(error)
    return error


def _check(error: int) -> None:
    if error:
        raise RuntimeError(f"npusim: error {error} of CANN's memory")
