"""`StreamDevice` on a CPU, with stand-ins for what an accelerator's part of torch would be."""

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_ascend.model_loader.netloader import utils
from vllm_ascend.model_loader.netloader.executor.devices import rowsums, streams
from vllm_ascend.model_loader.netloader.executor.devices.streams import StreamDevice, Transfer

from .support import DEVICE, DTYPES, MIB, PATIENCE, Api, Clock, bytes_of, random_tensor

CPU = torch.device("cpu")


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
    monkeypatch.setattr(streams, "_DRAIN", 5.0)  # tests/conformance has less patience with gloo
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
    with pytest.raises(RuntimeError, match=r"no progress for 5 s"):
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
    ("timeout", "gone", "reason"), [(0.1, present, "no progress"), (PATIENCE, gone, "hung up")]
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


# Digests


def test_digests_are_row_sums(device):
    tensors = [random_tensor(0, torch.bfloat16, MIB), torch.tensor(5)]
    assert device.digest_algorithm == rowsums.ALGORITHM != DEVICE.digest_algorithm
    assert device.digests(tensors) == rowsums.digests(tensors) != DEVICE.digests(tensors)


def test_a_device_that_computes_wrong_has_its_digests_made_on_the_host(api, monkeypatch, log):
    monkeypatch.setattr(rowsums, "agrees_with_host", lambda device, product: False)
    monkeypatch.setattr(rowsums, "digests", None)  # is not to be asked
    device = StreamDevice(CPU, api)
    tensors = [random_tensor(0, torch.float32, MIB), random_tensor(1, torch.int8, 3)]
    for _ in range(2):
        assert device.digest_algorithm == DEVICE.digest_algorithm
        assert device.digests(tensors) == DEVICE.digests(tensors)
    [line] = log
    assert "digests" in line
    assert "computed on the host" in line


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
