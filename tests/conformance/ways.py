"""The ways in which the suite runs: what a device is, and where its clients have to be."""

import contextlib
import functools
import os
import threading
from datetime import timedelta
from enum import Enum

import torch
from torch.distributed import ProcessGroupGloo

from vllm_ascend.model_loader.netloader.config import Transport
from vllm_ascend.model_loader.netloader.executor.devices import streams
from vllm_ascend.model_loader.netloader.executor.devices.choose import device_of
from vllm_ascend.model_loader.netloader.executor.devices.cpu import CpuDevice
from vllm_ascend.model_loader.netloader.executor.devices.streams import StreamDevice

_NEVER = timedelta(hours=1)
# Gloo's operations do not end when a group is aborted while the peer is stopped.
streams._DRAIN = 0.5


class Way(Enum):
    """How the bytes go from a source to a client."""

    HTTP = "http"  # between CPUs
    STREAM = "stream"  # through groups of a device with streams, which is a CPU with gloo
    HCCL = "hccl"  # through groups of simulated NPUs
    NPU_HTTP = "npu_http"  # over HTTP between simulated NPUs

    @property
    def on_npu(self):
        """On NPUs every side is a process of its own: HCCL takes one rank of a group in each."""
        return self in (Way.HCCL, Way.NPU_HTTP)

    @property
    def in_groups(self):
        return self in (Way.STREAM, Way.HCCL)

    @property
    def transport(self):
        return Transport.HTTP if self is Way.NPU_HTTP else Transport.AUTO

    @functools.cache
    def device(self, index=None):
        """The device of that number; without one, that of this process."""
        index = INDEX if index is None else index
        if self.on_npu:
            torch.npu.set_device(index)
            torch.npu.config.allow_internal_format = True
            return device_of(f"npu:{index}", 16)
        return CpuDevice() if self is Way.HTTP else GlooDevice()

    def use_device(self):
        """Let this thread use the device of this process."""
        if self.on_npu:
            torch.npu.set_device(INDEX)


# The device of this process, of those that it sees.
INDEX = int(os.environ.get("CONFORMANCE_DEVICE", "0"))


class Streams:
    """In the place of `torch.npu`."""

    def __init__(self):
        self.Stream = lambda device: object()

    def set_device(self, device):
        pass

    def stream(self, stream):
        return contextlib.nullcontext()

    def synchronize(self, device):
        pass

    def empty_cache(self):
        pass


class GlooDevice(StreamDevice):
    """A `StreamDevice` on a CPU whose groups are gloo's.

    `fault(message)` gets each `Message` of groups formed while it is there, and returns what has
    to be waited for, usually `message.go()`.
    """

    def __init__(self, fault=None):
        super().__init__(torch.device("cpu"), Streams())
        self.fault = fault

    def empty_host(self, nbytes):
        return torch.empty(nbytes, dtype=torch.uint8)

    def int8_product(self, rows, weights):
        """In float32, several times as fast here, and exact, as 1024 x 128 x 127 is below 2**24."""
        parts = zip(rows.split(1024, 1), weights.split(1024), strict=True)
        return sum((one.float() @ other.float()).to(torch.int32) for one, other in parts)

    def create_group(self, store, rank, local_host, timeout, gone):
        def meet():
            options = ProcessGroupGloo._Options()
            options._timeout = timedelta(seconds=max(timeout / 5, 0.01))
            near = ProcessGroupGloo.create_device(hostname=local_host, lazy_init=False)
            options._devices = [near]
            group = _GlooGroup(ProcessGroupGloo(store, rank, 2, options), self.fault)
            return self.exchange(group, rank, timeout, gone)

        return self.connect(timeout, gone, meet)


class Message:
    """One message that is about to be sent or received.

    `number` counts the session's messages from 0, and `before` is the memory of the one before.
    """

    def __init__(self, start, number, memory, before):
        self._start = start
        self.number = number
        self.memory = memory
        self.before = before

    def go(self, memory=None):
        """Start it, perhaps with other memory than was meant."""
        return _Moving(self._start([self.memory if memory is None else memory]))


class _GlooGroup:
    def __init__(self, group, fault):
        self._group = group
        self._fault = fault or Message.go
        self._count = -1  # the first one only connects
        self._before = None

    def send(self, messages, peer, tag):
        return self._message(lambda memory: self._group.send(memory, peer, tag), messages[0])

    def recv(self, messages, peer, tag):
        return self._message(lambda memory: self._group.recv(memory, peer, tag), messages[0])

    def abort(self):
        self._group.abort()

    def _message(self, start, memory):
        message = Message(start, self._count, memory, self._before)
        self._count += 1
        self._before = memory
        return self._fault(message) if message.number >= 0 else message.go()


class _Moving:
    """Gloo's operations tell only those who wait for them; an accelerator's can be asked."""

    def __init__(self, work):
        self._success = False
        self._thread = threading.Thread(target=self._wait, args=(work,), daemon=True)
        self._thread.start()

    def _wait(self, work):
        with contextlib.suppress(RuntimeError):
            work.wait(_NEVER)
            self._success = True

    def is_completed(self):
        return not self._thread.is_alive()

    def is_success(self):
        return self._success
