"""Runs of blocks as bodies of HTTP, from and into host memory, without the HTTP around them."""

import itertools
import weakref

import pytest
import torch

from vllm_ascend.model_loader.netloader import copies
from vllm_ascend.model_loader.netloader.errors import TransferCorrupt
from vllm_ascend.model_loader.netloader.executor.chunks.blocks import Run
from vllm_ascend.model_loader.netloader.executor.devices import rowsums
from vllm_ascend.model_loader.netloader.executor.elastic_load import P2PLoad
from vllm_ascend.model_loader.netloader.executor.model.match import match
from vllm_ascend.model_loader.netloader.executor.scheduler import Scheduler
from vllm_ascend.model_loader.netloader.executor.transport.http import HttpReceiver, HttpSender
from vllm_ascend.model_loader.netloader.executor.transport.messages import (
    from_host,
    own_memory,
    to_host,
    unpack,
)

from .support import (
    DEVICE,
    MIB,
    LinkDevice,
    assorted,
    blank_like,
    bytes_of,
    differing,
    incomplete,
    random_tensor,
    store_of,
)


class Apart(LinkDevice):
    """An accelerator whose messages reach nothing of the host's, and so no tensor here."""

    def reachable(self, tensor):
        return False


DEVICES = {"host": lambda: DEVICE, "accelerator": LinkDevice, "nothing reachable": Apart}


def loopback(store):
    """A source of a store's blocks, which asks and answers in one process."""

    class Source:
        def __init__(self):
            self.views = []
            self.asked = []
            self.due = []
            self.sender = HttpSender(store, self.views.extend)

        def ask_blocks(self, weights, first, last):
            assert weights == store.digests.weights
            self.asked.append(Run(first, last))
            self.due.append(Run(first, last))

        def receive_blocks(self, nbytes, into):
            self.views.clear()
            self.sender.send(self.due.pop(0))
            data = b"".join(self.views)
            assert len(data) == nbytes
            for view in filter(len, itertools.chain.from_iterable(into)):
                memoryview(view).cast("B")[:], data = data[: len(view)], data[len(view) :]
            assert not data

    return Source()


class Session:
    def __init__(self, tensors, there, here, chunk_bytes=MIB):
        self.there = store_of(tensors, there)
        self.blanks = blank_like(tensors)
        matched = match(self.there.manifest, self.blanks, self.blanks.keys(), {})
        self.here = incomplete(self.there, matched, here)
        self.source = loopback(self.there)
        scheduler = Scheduler(self.there.blocks, self.there.blocks.cut(chunk_bytes))
        verify = there.digest_algorithm == here.digest_algorithm
        receiver = HttpReceiver(self.source, self.here, verify=verify)
        self.load = P2PLoad(receiver, self.here, scheduler, verify=verify, keep_alive=0.01)


def test_what_had_to_be_copied_stays_until_the_next_run_is_sent(monkeypatch):
    store = store_of({"t": random_tensor(0, torch.int32, 8, 8).t()})
    parts, copies = store.parts, []

    def noting(run):
        [copy] = parts(run)
        copies.append(weakref.ref(copy))
        return [copy]

    monkeypatch.setattr(store, "parts", noting)
    sender = HttpSender(store, lambda views: None)
    for there in ([True], [False, True]):
        sender.send(Run(0, 0))
        assert [copy() is not None for copy in copies] == there


@pytest.mark.parametrize("chunk_bytes", [MIB, 16 * MIB])
@pytest.mark.parametrize("there", DEVICES)
@pytest.mark.parametrize("here", DEVICES)
def test_a_model_arrives_as_it_was_on_whatever_devices_it_is(there, here, chunk_bytes):
    there, here = DEVICES[there](), DEVICES[here]()
    session = Session(assorted(), there, here, chunk_bytes)
    session.load.run()
    assert differing(assorted(), session.blanks) == []
    assert session.here.complete
    assert session.load.bytes_received == session.there.blocks.nbytes


def test_contiguous_tensors_in_host_memory_are_neither_copied_here_nor_there():
    tensors = {
        "large": random_tensor(0, torch.uint8, 3 * MIB),
        "small": random_tensor(1, torch.int64, 5),
    }
    session = Session(tensors, DEVICE, DEVICE, 64 * MIB)
    filled = []
    receive = session.source.receive_blocks

    def noting(nbytes, into):
        receive(nbytes, (filled.extend(views) or views for views in into))

    session.source.receive_blocks = noting
    session.load.run()
    assert session.source.asked == [Run(0, 3)]
    assert [*map(address, session.source.views)] == [one.data_ptr() for one in tensors.values()]
    large, small = (one.data_ptr() for one in session.blanks.values())
    assert [*map(address, filled)] == [large, small]


def address(buffer):
    return torch.frombuffer(buffer, dtype=torch.uint8).data_ptr()


def test_blocks_are_checked_once_and_as_they_come():
    tensors = {"large": random_tensor(0, torch.uint8, 9 * MIB + 1), "small": torch.ones(3)}
    session = Session(tensors, DEVICE, DEVICE, 16 * MIB)
    steps = []
    receive, check = session.source.receive_blocks, session.here.wrong

    def noting(nbytes, into):
        receive(nbytes, (steps.append(sum(map(len, views))) or views for views in into))

    def checking(run, parts):
        steps.append(run)
        return check(run, parts)

    session.source.receive_blocks, session.here.wrong = noting, checking
    session.load.run()
    assert steps == [4 * MIB, Run(0, 3), 4 * MIB, Run(4, 7), MIB + 13, Run(8, 10)]
    assert differing(tensors, session.blanks) == []


def test_what_a_receiver_has_not_checked_can_be_checked_later():
    session = Session({"a": torch.ones(3)}, DEVICE, DEVICE, MIB)
    receiver = HttpReceiver(session.source, session.here, verify=False)
    session.source.receive_blocks = lambda nbytes, into: [*into]  # nothing comes
    receiver.request([Run(0, 0)])
    session.blanks["a"].zero_()
    assert receiver.receive()() == [0]


def test_a_command_checks_what_an_accelerator_has_hashed():
    tensors = {"a": random_tensor(0, torch.uint8, 5 * MIB + 1), "b": torch.empty(0)}
    host = copies._Host(rowsums.ALGORITHM)
    session = Session(tensors, host, host, 16 * MIB)
    session.load.run()
    assert session.here.digests.algorithm == rowsums.ALGORITHM
    assert differing(tensors, session.blanks) == []
    session.blanks["a"][2 * MIB] ^= 1
    assert session.here.wrong(Run(0, 6), session.here.memory(Run(0, 6))) == [2]


@pytest.mark.parametrize("at", [0, 4 * MIB - 1, 4 * MIB, 5 * MIB, 9 * MIB + 12])
def test_a_wrong_byte_in_any_piece_is_noticed(at):
    tensors = {"large": random_tensor(0, torch.uint8, 9 * MIB + 1), "small": torch.ones(3)}
    session = Session(tensors, DEVICE, DEVICE, 16 * MIB)
    wrong = tensors["large" if at <= 9 * MIB else "small"].view(torch.uint8)
    wrong[at if at <= 9 * MIB else at - 9 * MIB - 1] ^= 1
    with pytest.raises(TransferCorrupt, match=r"twice in blocks 0-10"):
        session.load.run()
    assert session.load.bytes_received == 0


def test_the_source_has_the_next_request_while_it_answers_one():
    session = Session({"a": random_tensor(0, torch.uint8, 9 * MIB)}, DEVICE, DEVICE)
    ahead = []
    receive = session.source.receive_blocks

    def noting(nbytes, into):
        ahead.append(len(session.source.due))
        receive(nbytes, into)

    session.source.receive_blocks = noting
    session.load.run()
    assert ahead == [1, *[2] * 7, 1]


def test_a_run_on_an_accelerator_passes_through_one_buffer_of_host_memory():
    tensors = {f"t{i}": random_tensor(i, torch.uint8, MIB) for i in range(9)}
    devices = LinkDevice(), LinkDevice()
    made = []
    for device in devices:
        device.empty_host = lambda n: made.append(n) or torch.empty(n, dtype=torch.uint8)
    session = Session(tensors, *devices)
    session.load.run()
    assert differing(tensors, session.blanks) == []
    assert made == [MIB, MIB]  # one at either end


def test_a_larger_run_gets_a_larger_buffer():
    tensors = {"a": torch.ones(100), "b": random_tensor(0, torch.uint8, 2 * MIB)}
    session = Session(tensors, LinkDevice(), LinkDevice(), 2 * MIB)
    session.load.run()
    assert differing(tensors, session.blanks) == []


# Messages


@pytest.mark.parametrize("device", [LinkDevice, Apart])
def test_runs_travel_through_host_memory(device):
    device, tensors = device(), assorted()
    there = store_of(tensors, device)
    blanks = blank_like(tensors)
    here = incomplete(there, match(there.manifest, blanks, blanks.keys(), {}), device)
    for run in there.blocks.cut(MIB):
        host = torch.empty(there.blocks.size_of(run), dtype=torch.uint8)
        to_host(run, there, host, device)
        assert torch.equal(host, torch.cat([bytes_of(part) for part in there.parts(run)]))
        from_host(run, here, host, device)
        assert here.wrong(run) == []
    assert differing(tensors, blanks) == []


def test_a_run_in_one_piece_is_its_own_message():
    device = LinkDevice()
    tensors = {
        "large": random_tensor(0, torch.bfloat16, MIB),
        "turned": torch.ones(300, 400).t(),
        "small": torch.ones(3),
    }
    store = store_of(tensors, device)
    message = own_memory(Run(1, 1), store, device)
    assert message.dtype == torch.uint8
    assert message.data_ptr() == tensors["large"].data_ptr() + MIB
    assert message.nbytes == MIB
    assert own_memory(Run(2, 2), store, device) is None  # strides
    assert own_memory(Run(2, 3), store, device) is None  # two tensors
    assert own_memory(Run(3, 3), store, device).nbytes == 12
    assert own_memory(Run(3, 3), store, Apart()) is None


def test_a_message_is_unpacked_into_strided_tensors_too():
    device = LinkDevice()
    tensors = {"a": torch.arange(5.0), "turned": torch.arange(12.0).view(3, 4).t()}
    there = store_of(tensors, device)
    blanks = blank_like(tensors)
    here = incomplete(there, [*blanks.values()], device)
    unpack(Run(0, 1), here, torch.cat([bytes_of(part) for part in there.parts(Run(0, 1))]), device)
    assert differing(tensors, blanks) == []
