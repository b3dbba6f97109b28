"""What runs in processes with simulated NPUs, beside loads: inference, and what is counted."""

import gc
import os
import threading
import time
import traceback
import types

import torch
import torch.distributed as dist
from npusim_vllm import counts

from . import ways
from .sides import PATIENCE, until

here = types.SimpleNamespace(rounds=0, stopping=False, broken=None)


def join_ranks(rank, path):
    """Makes the default group, as tensor parallelism has one, and starts to infer with it."""
    ways.Way.HCCL.device()
    dist.init_process_group("hccl", store=dist.FileStore(path, 2), rank=rank, world_size=2)
    here.thread = threading.Thread(target=_infer, args=(rank, ways.INDEX), daemon=True)
    here.thread.start()


def _infer(rank, index):
    try:
        torch.npu.set_device(index)
        x = torch.arange(64.0 * 64).view(64, 64).npu() / 4096
        expected = x.cpu() @ x.cpu()
        stopped = False
        while not stopped:
            state = torch.tensor([rank + 1.0, here.stopping]).npu()
            dist.all_reduce(state)
            y = x @ x
            torch.npu.current_stream().synchronize()
            total, stopped = state.cpu().tolist()
            assert total == 3, total
            torch.testing.assert_close(y.cpu(), expected)
            here.rounds += 1
            time.sleep(0.01)
    except BaseException:
        here.broken = traceback.format_exc()


def check_inference():
    """Fails unless inference goes on."""
    before = here.rounds
    until(lambda: here.broken or here.rounds > before + 5)
    assert here.broken is None, here.broken
    torch.npu.current_stream().synchronize()


def end_inference():
    here.stopping = True
    here.thread.join(PATIENCE)
    assert here.broken is None, here.broken
    assert not here.thread.is_alive()
    return here.rounds


def wait_until_hccl_rests(communicators=0):
    """Waits until this process has no other communicators, and HCCL nothing to do.

    A session gives its own back at its end, or shortly after it where a thread still connects.
    """

    def rests():
        counted = counts()
        return counted["communicators"] == communicators and counted["p2p_pending"] == 0

    until(rests)


def used():
    """What this process uses, of all that a leak would make grow."""
    gc.collect()
    torch.npu.current_stream().synchronize()
    torch.npu.empty_cache()  # what is kept for each stream, of which a busy machine uses more
    counted = counts()
    # The simulator has a thread and a file for each stream that was ever used, of those that
    # torch_npu hands out in turn.
    return {
        "device_memory": counted["device_memory"][ways.INDEX],
        "communicators": counted["communicators"],
        "pending": counted["p2p_pending"],
        "streams": counted["streams"],
        "allocated": torch.npu.memory_allocated(),
        "threads": len(os.listdir("/proc/self/task")) - counted["stream_threads"],
        "files": len(os.listdir("/proc/self/fd")) - counted["stream_threads"],
    }
