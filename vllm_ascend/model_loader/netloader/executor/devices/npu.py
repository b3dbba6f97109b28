"""Ascend NPUs: HCCL, and the private format FRACTAL_NZ."""

import contextlib
import ctypes
import functools
import itertools
import os
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch_npu  # gives torch its `npu`
from torch.distributed import BroadcastOptions, PrefixStore, ProcessGroup, Store
from torch.nn.parameter import UninitializedTensorMixin
from torch_npu._C._distributed_c10d import ProcessGroupHCCL

from ...errors import LayoutUnsupported
from .rowsums import kept_on
from .streams import GRACE, StreamDevice, Transfer

_ND, _FRACTAL_NZ = 2, 29  # aclFormat
_NEVER = timedelta(days=365)
_WATCHDOG_STOPPED = 2  # torch_npu's WatchdogStatus::STOP
# Attempts at a stream that no other session uses; the last one is taken as it comes.
_ATTEMPTS = 8
_GOOD, _BAD = "good", "bad"
_CLIENT_READY = "client ready"
# Seconds of a session's turn to connect, and for which a session waits for its turn.
_TURN, _LONGEST_WAIT = 2.0, 4.0
# A watchdog that is stopped forgets no operation by itself; each one keeps an event.
_FORGET_EVERY = 64


class NpuDevice(StreamDevice):
    """See `devices.Device`.

    Args:
        index: of the device among those that this process sees.
        hccl_buffer_mb: memory in MB that HCCL takes for each direction of a session.
    """

    def __init__(self, index: int, hccl_buffer_mb: int) -> None:
        super().__init__(torch.device("npu", index), torch.npu)
        self._hccl_buffer_mb = hccl_buffer_mb
        self._messages = itertools.count()
        self._lock = threading.Lock()
        self._streams: weakref.WeakKeyDictionary[ProcessGroup, Any] = weakref.WeakKeyDictionary()

    def create_group(
        self, store: Store, rank: int, local_host: str, timeout: float, gone: Callable[[], bool]
    ) -> ProcessGroup:
        """Make a HCCL group that torch_npu's watchdog does not watch.

        The watchdog ends the process when an operation fails or takes too long, and with it an
        instance that serves. Here the session looks after its peer.
        """
        if os.environ.get("RANK_TABLE_FILE"):
            # torch_npu would take the two for ranks 0 and 1 of this instance's own world.
            raise RuntimeError("RANK_TABLE_FILE is set, which knows no ranks of other instances")
        return self.connect(timeout, gone, lambda: self._connected(store, rank, timeout, gone))

    def int8_product(self, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Multiply as for quantized layers, but leave the sums as they are: int32, not scaled."""
        return torch_npu.npu_quant_matmul(rows, weights, self._one, output_dtype=torch.int32)

    @functools.cached_property
    def _one(self) -> torch.Tensor:
        return kept_on(self.device, torch.ones(1, dtype=torch.float32))

    def abort(self, group: ProcessGroup, unfinished: bool) -> bool:
        """Take what is under way off its stream, then destroy the communicator.

        An operation whose peer is gone would stay on its stream until HCCL_EXEC_TIMEOUT, half an
        hour, and fail then. torch_npu's streams stop at a failure, and with them the device's
        context: inference would end.
        """
        ended = not unfinished or _abort_stream(self._streams[group].npu_stream)
        # Its `abort` is that of torch's base class, which does nothing.
        group.abort_hccl_comm("the session has ended")
        with self._lock:
            self._streams.pop(group, None)
        return ended

    # What torch_npu launches goes through one queue of the process, except on a few streams that it
    # keeps apart for launching at once. Sessions use those: an error that HCCL returns stops that
    # queue for inference, too; while HCCL connects, nothing else would be launched; and a peer that
    # stalls holds up all that comes behind on its stream. Nobody else asks for these streams.

    @functools.cached_property
    def _ring(self) -> dict[int, Any]:
        """These streams by id, in the order in which torch_npu hands them out, in turn."""
        ring: dict[int, Any] = {}
        while (stream := torch.npu.SyncLaunchStream(self.device)).stream_id not in ring:
            ring[stream.stream_id] = stream
        return ring

    def _connected(
        self, store: Store, rank: int, timeout: float, gone: Callable[[], bool]
    ) -> ProcessGroup:
        """Make groups until one has a stream, on both sides, that no other session there uses.

        A group takes the next one when HCCL has found the peer, whoever has taken some meanwhile.
        """
        deadline = time.monotonic() + timeout
        for attempt in range(_ATTEMPTS):
            votes = PrefixStore(f"attempt {attempt}", store)
            group = self._new_group(PrefixStore("group", votes), rank)
            try:
                good = self._take_stream(group, rank, votes, deadline) or attempt == _ATTEMPTS - 1
                votes.set(f"rank {rank}", _GOOD if good else _BAD)
                # Before the group is closed, which the peer may still be connecting.
                theirs = votes.get(f"rank {1 - rank}")
            except Exception:
                self.close(group, [])
                raise
            if good and theirs == _GOOD.encode():
                left = max(0.0, deadline - time.monotonic())
                return self.exchange(group, rank, left, gone)
            self.close(group, [])
        raise RuntimeError("no stream is free on both sides")

    def _new_group(self, store: Store, rank: int) -> ProcessGroup:
        options = ProcessGroupHCCL.Options()
        options._timeout = _NEVER
        options.group_name = "netloader"
        options.hccl_config = {"hccl_buffer_size": self._hccl_buffer_mb}
        # Without ranks it would take the place of the instance's world in torch_npu's books.
        options.global_ranks_in_group = [0, 1]
        group = ProcessGroupHCCL(store, rank, 2, options)
        group.set_watchdog_status(_WATCHDOG_STOPPED)
        return group

    def _take_stream(self, group: ProcessGroup, rank: int, votes: Store, deadline: float) -> bool:
        """Have HCCL find the peer; return whether the group has a stream of its own.

        An operation without bytes does it. Nothing of that would stay on another session's stream.
        """
        # The client's turn comes first: were two sessions in other orders at their two ends, each
        # would wait for the other.
        if rank:
            votes.get(_CLIENT_READY)
        with _turns.take(deadline):
            if not rank:
                votes.set(_CLIENT_READY, "")
            found = self._broadcast(group, self.empty(0), 0, self._next_free_stream())
        with self._lock:
            taken, in_use = group._get_stream_id(False), self._in_use()
            self._streams[group] = self._ring[taken]
        shared = taken in in_use
        try:
            self.wait(found, GRACE, lambda: False)
        except RuntimeError:
            # Another session has taken the stream it was started on, and is held up there.
            if not shared:
                _abort_stream(self._ring[taken].npu_stream)
            return False
        return not shared or len(in_use) == len(self._ring)

    def _next_free_stream(self) -> Any:
        """Ask for streams until the next one is no other session's, and return that one."""
        with self._lock:
            ids = list(self._ring)
            in_use = self._in_use()
            for _ in ids:
                last = ids.index(torch.npu.SyncLaunchStream(self.device).stream_id)
                coming = ids[(last + 1) % len(ids)]
                if coming not in in_use:
                    break
        return self._ring[coming]

    def _in_use(self) -> set[int]:
        return {stream.stream_id for stream in self._streams.values()}

    # Messages only go from the source to the client, and are broadcasts: what torch_npu makes for
    # sends and receives takes no notice of `hccl_buffer_size`, only of an environment variable
    # (P2P_HCCL_BUFFSIZE), which would also be for the instance's own groups.

    def send(self, group: ProcessGroup, message: torch.Tensor, peer: int) -> Transfer:
        """Broadcast to the only other rank."""
        return self._take_part(group, message, group.rank())

    def receive(self, group: ProcessGroup, message: torch.Tensor, peer: int) -> Transfer:
        """Take part in the peer's broadcast."""
        return self._take_part(group, message, peer)

    def _take_part(self, group: ProcessGroup, message: torch.Tensor, root: int) -> Transfer:
        if next(self._messages) % _FORGET_EVERY == 0:
            group.clear_workmeta_list()
        return self._broadcast(group, message, root, self._streams[group])

    def _broadcast(
        self, group: ProcessGroup, message: torch.Tensor, root: int, stream: Any
    ) -> Transfer:
        options = BroadcastOptions()
        options.rootRank, options.rootTensor = root, 0
        data = [message.view(torch.int8)]
        # The session's stream does not wait for the thread's: all has been done there already.
        torch.npu.current_stream(self.device).synchronize()
        with torch.npu.stream(stream):
            return Transfer(group.broadcast(data, options), message)

    def formats(self, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, str]:
        """Name FRACTAL_NZ, in which a tensor is stored in padded blocks of 16 rows."""
        return {name: "FRACTAL_NZ" for name, tensor in tensors.items() if self._is_nz(tensor)}

    def readable(self, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Cast FRACTAL_NZ to ND when asked for."""
        if not any(map(self._is_nz, tensors)):
            return tensors
        return _CastToNd(tensors, self)

    def writable(self, tensors: Sequence[torch.Tensor]) -> Callable[[], None]:
        """Replace FRACTAL_NZ memory by ND memory, and cast it when it has been filled."""
        cast = [tensor for tensor in tensors if self._is_nz(tensor)]
        storages = Counter(tensor.untyped_storage().data_ptr() for tensor in tensors)
        for tensor in cast:
            if storages[tensor.untyped_storage().data_ptr()] > 1:
                raise LayoutUnsupported(
                    f"a FRACTAL_NZ tensor of shape {list(tensor.shape)} shares memory with another"
                )
        kinds = [(_packed(tensor).shape, _packed(tensor).dtype) for tensor in cast]
        for tensor in cast:
            tensor.data = torch.empty(0, dtype=tensor.dtype, device=self.device)
        if cast:
            # torch keeps what was freed for the stream that it was made on, which is another one.
            self.empty_cache()
        for tensor, (shape, stored) in zip(cast, kinds, strict=True):
            made = torch.empty(shape, dtype=stored, device=self.device)
            tensor.data = made.view(tensor.dtype)

        def restore() -> None:
            for tensor in cast:
                tensor.data = self._cast(tensor.data, _FRACTAL_NZ)

        return restore

    def to_nd(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor without a private format, a copy if it has one."""
        return self._cast(tensor.detach(), _ND) if self._is_nz(tensor) else tensor

    def _cast(self, tensor: torch.Tensor, acl_format: int) -> torch.Tensor:
        cast: torch.Tensor = torch_npu.npu_format_cast(_packed(tensor), acl_format)
        return cast.view(tensor.dtype)

    def _is_nz(self, tensor: torch.Tensor) -> bool:
        return (
            tensor.device.type == "npu"
            and not isinstance(tensor, UninitializedTensorMixin)
            and tensor.numel() > 0
            and torch_npu.get_npu_format(tensor) == _FRACTAL_NZ
        )


def _packed(tensor: torch.Tensor) -> torch.Tensor:
    """Return a FRACTAL_NZ tensor as the dtype that it was stored as.

    An int32 one is vLLM Ascend's W4A8: eight int4 in each element, stored as int8.
    """
    return tensor.view(torch.int8) if tensor.dtype == torch.int32 else tensor


class _CastToNd(Sequence[torch.Tensor]):
    """Tensors, those in FRACTAL_NZ as ND copies, of which each thread keeps only the last one."""

    def __init__(self, tensors: Sequence[torch.Tensor], device: NpuDevice) -> None:
        self._tensors = tensors
        self._device = device
        self._of_thread = threading.local()

    def __len__(self) -> int:
        return len(self._tensors)

    def __getitem__(self, index: Any) -> Any:  # an overload for slices is of no use here
        last: tuple[int, torch.Tensor] | None = getattr(self._of_thread, "last", None)
        if last is None or last[0] != index:
            tensor = self._device.to_nd(self._tensors[index])
            if tensor is self._tensors[index]:
                return tensor
            self._of_thread.last = last = index, tensor
        return last[1]


class _Turns:
    """Lets the sessions of a process connect one after the other.

    torch_npu adds each new communicator to a list without a lock, which ends the process when two
    do it at the same moment. A session whose peer does not come holds up others until its turn is
    over, which then passes to one of them. Where there are several such sessions, those that have
    waited long go on without a turn.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._last: object | None = None
        self._ends = 0.0

    @contextlib.contextmanager
    def take(self, deadline: float) -> Iterator[None]:
        """Wait until nobody has a turn, or not much longer than one takes.

        Raises:
            RuntimeError: the deadline, of `time.monotonic`, has passed meanwhile.
        """
        mine = object()
        with self._changed:
            latest = min(time.monotonic() + _LONGEST_WAIT, deadline)
            while self._last and (left := min(self._ends, latest) - time.monotonic()) > 0:
                self._changed.wait(left)
            if time.monotonic() >= deadline:
                raise RuntimeError("other sessions were connecting for too long")
            self._last, self._ends = mine, time.monotonic() + _TURN
        try:
            yield
        finally:
            with self._changed:
                if self._last is mine:
                    self._last = None
                    self._changed.notify_all()


_turns = _Turns()


def _abort_stream(stream: int) -> bool:
    """Drop all that is queued on a stream; return whether that was possible."""
    try:
        abort = ctypes.CDLL("libascendcl.so").aclrtStreamAbort
    except (OSError, AttributeError):  # an older CANN
        return False
    abort.argtypes = (ctypes.c_void_p,)
    return int(abort(stream)) == 0


@functools.cache
def npu_device(index: int | None, hccl_buffer_mb: int) -> NpuDevice:
    """Return an NPU; without an index, the one that this thread has chosen."""
    if index is None:
        return npu_device(torch.npu.current_device(), hccl_buffer_mb)
    return NpuDevice(index, hccl_buffer_mb)
