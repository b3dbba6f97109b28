"""`StreamDevice` on a CPU, with stand-ins for what an accelerator's part of torch would be."""

import contextlib
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_ascend.model_loader.netloader import utils
from vllm_ascend.model_loader.netloader.errors import LoadFailed
from vllm_ascend.model_loader.netloader.executor.devices import rowsums, streams
from vllm_ascend.model_loader.netloader.executor.devices.cpu import CpuDevice
from vllm_ascend.model_loader.netloader.executor.devices.streams import StreamDevice, Transfer
from vllm_ascend.model_loader.netloader.executor.digest import digest_model
from vllm_ascend.model_loader.netloader.executor.manifest import PROCESSED, RAW, describe
from vllm_ascend.model_loader.netloader.executor.plan import make_plan
from vllm_ascend.model_loader.netloader.executor.weights import Weights

from .support import (
    DEVICE,
    MIB,
    PATIENCE,
    assorted,
    blank_like,
    bytes_of,
    differing,
    failing_after,
    load,
    random_tensor,
    rows,
    settings,
    source,
    tapped,
    until,
)
from .test_netloader_plan import DTYPES

CPU = torch.device("cpu")


class Stream:
    def __init__(self, device):
        self.device = device


class Api:
    """In the place of `torch.npu`."""

    Stream = Stream

    def __init__(self):
        self.here = threading.local()
        self.synchronized = []
        self.emptied = 0

    def set_device(self, device):
        self.here.device = device

    @contextlib.contextmanager
    def stream(self, stream):
        self.here.stream = stream
        try:
            yield
        finally:
            self.here.stream = None

    def synchronize(self, device):
        self.synchronized.append(device)

    def empty_cache(self):
        self.emptied += 1


class Work:
    """In the place of an accelerator's operation, which happens when the test says so."""

    def __init__(self, done=False, success=True):
        self.happened = threading.Event()
        self.success = success
        self.asked = 0
        if done:
            self.happened.set()

    def is_completed(self):
        self.asked += 1
        return self.happened.is_set()

    def is_success(self):
        return self.success


class Clock:
    """In the place of `time`: a clock that runs only while somebody sleeps."""

    def __init__(self):
        self.now = 1000.0
        self.start = self.now
        self.at = []

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        for moment, event in self.at:
            if self.now >= self.start + moment:
                event.set()

    @property
    def passed(self):
        return self.now - self.start


class Group:
    """In the place of a process group: every message takes as long as the test says."""

    def __init__(self, works=()):
        self.works = list(works)
        self.started = []
        self.aborted = threading.Event()

    def send(self, messages, peer, tag):
        return self._start("send", messages, peer)

    def recv(self, messages, peer, tag):
        return self._start("receive", messages, peer)

    def _start(self, way, messages, peer):
        self.started.append((way, messages[0], peer))
        return self.works.pop(0)

    def abort(self):
        self.aborted.set()


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(streams, "time", clock)
    monkeypatch.setattr(utils, "time", clock)
    return clock


@pytest.fixture
def api():
    return Api()


@pytest.fixture
def device(api):
    return StreamDevice(CPU, api)


def transfer(work):
    return Transfer(work, torch.empty(1, dtype=torch.uint8))


def present():
    return False


def gone():
    return True


# Waiting


def test_a_transfer_that_has_happened_is_not_waited_for(device, clock):
    device.wait(transfer(Work(done=True)), 5.0, gone)
    assert clock.passed == 0


def test_a_transfer_is_waited_for_until_it_has_happened(device, clock):
    work = Work()
    clock.at.append((3.0, work.happened))
    device.wait(transfer(work), 5.0, present)
    assert 3.0 <= clock.passed < 3.1


def test_a_transfer_that_does_not_happen_is_an_error_when_the_deadline_passes(device, clock):
    with pytest.raises(RuntimeError, match=r"nothing moved in 5 s"):
        device.wait(transfer(Work()), 5.0, present)
    assert 5.0 <= clock.passed < 5.1


def test_a_peer_that_has_hung_up_is_not_waited_for_until_the_deadline(device, clock):
    with pytest.raises(RuntimeError, match="the peer has hung up"):
        device.wait(transfer(Work()), 5.0, gone)
    assert clock.passed < 1


def test_what_a_peer_sent_before_it_hung_up_is_taken(device, clock):
    work = Work()
    clock.at.append((0.3, work.happened))
    device.wait(transfer(work), 5.0, lambda: clock.passed > 0.1 and not work.happened.is_set())
    assert work.happened.is_set()


def test_a_peer_that_hangs_up_at_the_end_gets_no_time_beyond_the_deadline(device, clock):
    with pytest.raises(RuntimeError, match="the peer has hung up"):
        device.wait(transfer(Work()), 5.0, lambda: clock.passed > 4.8)
    assert clock.passed < 5.1


@pytest.mark.parametrize(("hung_up", "why"), [(present, "transfer failed"), (gone, "hung up")])
def test_an_operation_that_ends_without_success_is_an_error(device, hung_up, why):
    with pytest.raises(RuntimeError, match=why):
        device.wait(transfer(Work(done=True, success=False)), 5.0, hung_up)


def test_a_long_wait_does_not_ask_all_the_time(device, clock):
    work = Work()
    with pytest.raises(RuntimeError):
        device.wait(transfer(work), 10.0, present)
    assert work.asked < 20_000


# Leaving a group


def test_a_group_without_transfers_is_left_at_once(device, clock):
    group = Group()
    device.close(group, [])
    assert group.aborted.is_set()
    assert clock.passed == 0


def test_leaving_a_group_waits_for_what_was_under_way(device, clock):
    group, last = Group(), Work()
    clock.at.append((2.0, last.happened))
    device.close(group, [transfer(Work(done=True)), transfer(last)])
    assert group.aborted.is_set()
    assert last.happened.is_set()
    assert clock.passed < 3


def test_what_has_certainly_ended_is_not_waited_for(api, clock):
    class Thorough(StreamDevice):
        def abort(self, group, unfinished):
            return super().abort(group, unfinished) or unfinished

    group = Group()
    Thorough(CPU, api).close(group, [transfer(Work())])
    assert group.aborted.is_set()
    assert clock.passed == 0


def test_the_memory_of_what_does_not_end_is_never_used_again(device, clock, monkeypatch, log):
    abandoned = []
    monkeypatch.setattr(streams, "_abandoned", abandoned)
    unfinished = [transfer(Work()), transfer(Work())]
    device.close(Group(), unfinished)
    assert abandoned == unfinished
    assert "2 transfers did not end when aborted" in log[-1]
    assert clock.passed < 10


# Connecting


def connect(device, group, rank, timeout, gone=present):
    def meet():
        return device.exchange(group, rank, timeout, gone)

    assert device.connect(timeout, gone, meet) is group


@pytest.mark.parametrize(("rank", "way"), [(0, "receive"), (1, "send")])
def test_connecting_moves_a_byte_from_the_source_to_the_client(device, api, rank, way):
    group = Group([Work(done=True)])
    connect(device, group, rank, PATIENCE)
    [(started, message, peer)] = group.started
    assert (started, peer, message.nbytes) == (way, 1 - rank, 1)
    assert not group.aborted.is_set()


def test_a_connection_that_is_not_made_is_an_error_when_the_deadline_passes(device):
    stuck, late = threading.Event(), Work(done=True)

    class Stuck(Group):
        def _start(self, *_):
            stuck.wait(PATIENCE)  # as HCCL does, for minutes
            return late

    group = Stuck()
    with pytest.raises(RuntimeError, match=r"not connected within 0\.1 s"):
        connect(device, group, 1, 0.1)
    assert not group.aborted.is_set()
    stuck.set()
    # Nobody wants it any more.
    assert group.aborted.wait(PATIENCE)


class Aborting(StreamDevice):
    """Notes the groups that it has ended itself, as `NpuDevice` has to.

    HCCL's groups have an `abort` that does nothing.
    """

    def __init__(self, api):
        super().__init__(CPU, api)
        self.ended = threading.Event()

    def abort(self, group, unfinished):
        self.ended.set()
        super().abort(group, unfinished)
        return True


def test_a_connection_made_too_late_is_ended_the_devices_way(api):
    late = threading.Event()

    class Late(Group):
        def _start(self, *_):
            late.wait(PATIENCE)
            return Work(done=True)

    device, group = Aborting(api), Late()
    with pytest.raises(RuntimeError, match="not connected"):
        connect(device, group, 1, 0.1)
    late.set()
    assert group.aborted.wait(PATIENCE)
    assert device.ended.is_set()


@pytest.mark.parametrize(
    ("timeout", "gone", "reason"), [(0.1, present, "nothing moved"), (PATIENCE, gone, "hung up")]
)
def test_a_byte_that_does_not_arrive_does_not_stay_on_its_stream(api, timeout, gone, reason):
    """It would fail after half an hour, and inference with it; see `NpuDevice.abort`."""
    device = Aborting(api)
    with pytest.raises(RuntimeError, match=reason):
        connect(device, Group([Work()]), 1, timeout, gone)
    # Not some time later, by a thread that was left behind.
    assert device.ended.is_set()


def test_a_peer_that_goes_while_the_backend_looks_for_it_is_not_waited_for(device):
    looking, late = threading.Event(), threading.Event()

    class Looking(Group):
        def _start(self, *_):
            looking.set()
            late.wait(PATIENCE)  # as HCCL does, for minutes
            return Work(done=True)

    group = Looking()
    with pytest.raises(RuntimeError, match="the peer has hung up"):
        connect(device, group, 1, PATIENCE, looking.is_set)
    assert not group.aborted.is_set()
    late.set()
    assert group.aborted.wait(PATIENCE)


def test_a_connection_that_fails_is_an_error_with_its_reason(device):
    group = Group([Work(done=True, success=False)])
    with pytest.raises(RuntimeError, match="the transfer failed"):
        connect(device, group, 0, PATIENCE)


# Streams


def attach(device, api, inside):
    """Use the device; return what was chosen for this thread."""
    with device.attached():
        chosen = api.here.device, api.here.stream
        inside()
    assert api.here.stream is None
    return chosen


def test_threads_that_use_the_device_at_once_have_streams_of_their_own(device, api):
    together, chosen = threading.Barrier(3), []
    attach(device, api, lambda: None)  # leaves a stream that one of them may have

    def use():
        chosen.append(attach(device, api, lambda: together.wait(PATIENCE)))

    threads = [threading.Thread(target=use) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert [device for device, _ in chosen] == [CPU] * 3
    assert len({stream for _, stream in chosen}) == 3
    assert all(stream.device == CPU for _, stream in chosen)


def test_a_stream_is_used_again_also_after_an_error(device, api):
    """Else a few dozen sessions would have gone through all that torch has."""

    def fail():
        raise RuntimeError("the session failed")

    _, first = attach(device, api, lambda: None)
    with pytest.raises(RuntimeError, match="the session failed"):
        attach(device, api, fail)
    _, last = attach(device, api, lambda: None)
    assert last is first


def test_synchronizing_waits_for_the_whole_device(device, api):
    device.synchronize()
    assert api.synchronized == [CPU]


def test_memory_that_torch_keeps_is_given_back(device, api):
    device.empty_cache()
    assert api.emptied == 1


# Checksums


def test_checksums_are_row_sums(device):
    tensors = [*assorted().values()][:2]
    assert device.digest_algorithm == rowsums.ALGORITHM
    assert device.hashes(tensors) == rowsums.hashes(tensors)


@pytest.fixture
def wrong_device(api, monkeypatch, log):
    monkeypatch.setattr(rowsums, "agrees_with_host", lambda device: False)
    device = StreamDevice(CPU, api)
    assert device.digest_algorithm not in (rowsums.ALGORITHM, DEVICE.digest_algorithm)
    assert "computes other checksums than a CPU" in log[-1]
    return device


def test_a_device_that_computes_wrong_has_its_checksums_made_on_the_host(wrong_device, monkeypatch):
    monkeypatch.setattr(rowsums, "hashes", None)  # is not to be asked
    tensors = [random_tensor(0, torch.float32, 5000), random_tensor(1, torch.int8, 3)]
    assert wrong_device.hashes(tensors) == DEVICE.hashes(tensors)


# Packing


class Unreachable(StreamDevice):
    """Takes all memory for another device's."""

    def reachable(self, tensor):
        return False


@given(
    st.lists(
        st.tuples(st.sampled_from(DTYPES), st.integers(0, 50), st.integers(0, 3)),
        min_size=1,
        max_size=6,
    ),
    st.booleans(),
)
def test_packing_and_unpacking_is_the_identity_on_bits(kinds, reachable):
    device = (StreamDevice if reachable else Unreachable)(CPU, Api())
    tensors = [
        random_tensor(index, dtype, before + count)[before:]
        for index, (dtype, count, before) in enumerate(kinds)
    ]
    whole = torch.cat([torch.empty(0, dtype=torch.uint8), *map(bytes_of, tensors)])
    message = torch.full_like(whole, 0xA5)
    device.pack(tensors, message)
    assert torch.equal(message, whole)
    blanks = [torch.zeros_like(tensor) for tensor in tensors]
    device.unpack(message, blanks)
    for blank, tensor in zip(blanks, tensors, strict=True):
        assert torch.equal(bytes_of(blank), bytes_of(tensor))


# Whole loads, with gloo in the place of HCCL


class _Moving:
    """Gloo's operations tell only those who wait for them; an accelerator's can be asked."""

    def __init__(self, work):
        self._success = False
        self._thread = threading.Thread(target=self._wait, args=(work,), daemon=True)
        self._thread.start()

    def _wait(self, work):
        with contextlib.suppress(RuntimeError):
            work.wait()
            self._success = True

    def is_completed(self):
        return not self._thread.is_alive()

    def is_success(self):
        return self._success


class _GlooGroup:
    def __init__(self, group):
        self._group = group

    def send(self, messages, peer, tag):
        return _Moving(self._group.send(messages, peer, tag))

    def recv(self, messages, peer, tag):
        return _Moving(self._group.recv(messages, peer, tag))

    def abort(self):
        self._group.abort()


class OverGloo(StreamDevice):
    def __init__(self):
        super().__init__(CPU, Api())

    def create_group(self, store, rank, local_host, timeout, gone):
        group = _GlooGroup(CpuDevice().create_group(store, rank, local_host, timeout, gone))
        return self.connect(timeout, gone, lambda: self.exchange(group, rank, timeout, gone))


def weights_on(device, tensors):
    manifest, distinct = describe(tensors, RAW, {}, device.format_of)
    plan = make_plan([tensor.nbytes for tensor in distinct], MIB)
    return Weights(manifest, distinct, plan, digest_model(manifest, plan, distinct, device))


def test_a_model_is_loaded_with_row_sums_for_checksums():
    device, tensors = OverGloo(), assorted()
    assert device.layout == PROCESSED
    weights = weights_on(device, tensors)
    with source(weights, device=device) as running:
        blanks = blank_like(tensors)
        loaded = load([running], blanks, device=device)
    assert differing(blanks, tensors) == []
    assert loaded.digests == weights.digests
    assert loaded.digests != weights_on(DEVICE, tensors).digests


def test_a_wrong_byte_is_noticed_by_row_sums():
    device, tensors = OverGloo(), rows(4)

    def flip(index, count):
        if index == 2:
            wrong = tensors["row.2"].clone()
            wrong[77] ^= 4
            return wrong
        return None

    weights = tapped(weights_on(device, tensors), flip)
    with source(weights, device=device) as running, pytest.raises(LoadFailed, match=r"row\.2"):
        load([running], blank_like(tensors), device=device)


def test_a_source_that_fails_in_mid_transfer_is_replaced_by_the_next():
    device, tensors = OverGloo(), rows(12)
    weights = weights_on(device, tensors)
    with (
        source(tapped(weights, failing_after(5)), device=device) as failing,
        source(weights, device=device) as good,
    ):
        blanks = blank_like(tensors)
        load([failing, good], blanks, device=device, config=settings(max_sources=1))
        assert until(lambda: failing.sessions == 0)
    assert differing(blanks, tensors) == []


def test_devices_with_other_checksums_do_not_load_from_each_other(wrong_device, monkeypatch):
    monkeypatch.undo()
    tensors = rows(2)
    there = OverGloo()
    with (
        source(weights_on(there, tensors), device=there) as running,
        pytest.raises(LoadFailed) as failed,
    ):
        load([running], blank_like(tensors), device=wrong_device)
    here, there = wrong_device.digest_algorithm, there.digest_algorithm
    assert f"digests are {here} here and {there} there" in str(failed.value)
