"""What a process has of all that a leak would make grow."""

import gc
import os
import threading


def used(way):
    if way.on_npu:
        from . import npus

        return npus.used()
    gc.collect()
    return {"threads": threading.active_count(), "files": len(os.listdir("/proc/self/fd"))}


def grown(before, now):
    """What there is more of: name, then, now."""
    return [(name, before[name], now[name]) for name in now if now[name] > before[name]]
