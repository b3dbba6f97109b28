"""Two-rank groups: messages, and runs of blocks through them."""

import queue
import threading

import pytest
import torch

from vllm_ascend.model_loader.netloader.errors import ProtocolError
from vllm_ascend.model_loader.netloader.executor import scheduler
from vllm_ascend.model_loader.netloader.executor.chunks.blocks import Run
from vllm_ascend.model_loader.netloader.executor.elastic_load import P2PLoad
from vllm_ascend.model_loader.netloader.executor.model.match import match
from vllm_ascend.model_loader.netloader.executor.scheduler import Peer, Scheduler
from vllm_ascend.model_loader.netloader.executor.transport.group import (
    AHEAD,
    BATCH,
    CLIENT,
    SOURCE,
    WINDOW,
    GroupReceiver,
    GroupSender,
    form_group,
)

from .support import (
    HOST,
    MIB,
    PATIENCE,
    LinkDevice,
    assorted,
    blank_like,
    channels,
    differing,
    incomplete,
    random_tensor,
    store_of,
    until,
)


def never():
    return False


def form(channel, rank, progress=PATIENCE, handshake=PATIENCE, device=None, gone=never):
    return form_group(
        device or LinkDevice(),
        channel.tell,
        channel.hear,
        rank,
        HOST,
        handshake=handshake,
        progress=progress,
        gone=gone,
    )


class Pair:
    """Both ends of a session's group."""

    def __init__(self, progress=PATIENCE):
        near, far = channels()
        self.devices = LinkDevice(), LinkDevice()
        self.sessions = []
        thread = threading.Thread(target=self._form, args=(far, progress), daemon=True)
        thread.start()
        self.client = form(near, CLIENT, progress, device=self.devices[CLIENT])
        thread.join(PATIENCE)

    def _form(self, channel, progress):
        self.source = form(channel, SOURCE, progress, device=self.devices[SOURCE])

    def close(self):
        self.source.close()
        self.client.close()
        for session in self.sessions:
            session.control.end()


@pytest.fixture
def pair():
    pair = Pair()
    yield pair
    pair.close()


# Messages


def test_messages_arrive_in_the_order_in_which_they_were_started(pair):
    sent = [random_tensor(i, torch.uint8, 1 + 70_000 * i) for i in range(8)]
    received = [torch.empty_like(message) for message in sent]
    for message in sent:
        pair.source.send(message)
    for message in received:
        pair.client.receive(message)
    assert pair.source.in_flight == pair.client.in_flight == 8
    for message, expected in zip(received, sent, strict=True):
        pair.client.wait()
        assert torch.equal(message, expected)
        pair.source.wait()
    assert pair.source.in_flight == pair.client.in_flight == 0


def test_a_message_that_does_not_come_is_an_error_when_the_deadline_passes():
    pair = Pair(progress=0.1)
    pair.client.receive(torch.empty(10, dtype=torch.uint8))
    with pytest.raises(RuntimeError, match=r"no progress for 0\.1 s"):
        pair.client.wait()
    pair.close()


def test_a_peer_that_leaves_is_noticed_at_once(pair):
    pair.client.receive(torch.empty(10, dtype=torch.uint8))
    pair.source.close()
    with pytest.raises(RuntimeError, match="the transfer failed"):
        pair.client.wait()


def test_nothing_is_written_after_the_group_was_left(pair):
    # As when a source is too slow, and the run is fetched from another one into the same memory.
    received = torch.zeros(1 << 20, dtype=torch.uint8)
    pair.client.receive(received)
    pair.client.close()
    pair.source.send(torch.ones(1 << 20, dtype=torch.uint8))
    with pytest.raises(RuntimeError):
        pair.source.wait()
    assert (received == 0).all()


def test_messages_count_as_under_way_until_the_device_has_dropped_them(pair, monkeypatch):
    device, seen = pair.devices[CLIENT], []
    close = device.close

    def closing(group, unfinished):
        seen.append((pair.client.in_flight, len(unfinished)))
        close(group, unfinished)

    monkeypatch.setattr(device, "close", closing)
    pair.client.receive(torch.zeros(10, dtype=torch.uint8))
    pair.client.close()
    assert seen == [(1, 1)]
    assert pair.client.in_flight == 0


def test_leaving_twice_is_leaving_once(pair):
    pair.client.close()
    with pair.client:
        pass
    assert pair.devices[CLIENT].closed == 1


# Forming one


@pytest.mark.parametrize("rank", [CLIENT, SOURCE])
def test_a_peer_that_never_comes_is_an_error_when_the_deadline_passes(rank):
    near, _ = channels()
    with pytest.raises(RuntimeError, match=r"no process group within 0\.1 s"):
        form(near, rank, handshake=0.1)


@pytest.mark.parametrize("rank", [CLIENT, SOURCE])
def test_a_peer_that_leaves_before_there_is_a_group_is_noticed_at_once(rank):
    near, far = channels()
    far.close()
    with pytest.raises(RuntimeError, match="the peer closed the connection"):
        form(near, rank)


def test_a_peer_that_comes_and_makes_no_group_is_an_error_when_the_deadline_passes():
    near, far = channels()
    far.tell("1 is here", b"")
    device = LinkDevice()
    with pytest.raises(RuntimeError, match=r"not connected|no progress|no process group"):
        form(near, CLIENT, handshake=0.1, device=device)
    assert device.closed == 1


def test_what_the_channel_says_of_its_failure_is_the_reason():
    def refuse(*_):
        raise ProtocolError("the answer has no values")

    near, _ = channels()
    near.hear = refuse
    with pytest.raises(ProtocolError, match="the answer has no values"):
        form(near, CLIENT)


def test_a_group_is_left_when_the_peer_does_not_get_it():
    class Leaving(LinkDevice):
        """Its process ends once the group has been made."""

        def create_group(self, *arguments):
            group = super().create_group(*arguments)
            near.close()
            return group

    def leave():
        with pytest.raises(RuntimeError):
            form(near, CLIENT, device=Leaving())

    seen = LinkDevice()
    near, far = channels()
    thread = threading.Thread(target=leave, daemon=True)
    thread.start()
    with pytest.raises(RuntimeError, match="the peer closed the connection"):
        form(far, SOURCE, device=seen)
    thread.join(PATIENCE)
    assert seen.closed == 1


def test_the_stores_are_closed_once_there_is_a_group():
    """The connection is for other messages then, whatever a backend sets later."""
    near, far = channels()
    said, tell = [], near.tell

    def noting(key, value):
        said.append(key)
        tell(key, value)

    class Keeping(LinkDevice):
        def create_group(self, store, *arguments):
            self.store = store
            return super().create_group(store, *arguments)

    near.tell, device = noting, Keeping()
    thread = threading.Thread(target=form, args=(far, SOURCE), daemon=True)
    thread.start()
    with form(near, CLIENT, device=device):
        before = [*said]
        device.store.set("late", b"")
        assert said == before
    thread.join(PATIENCE)


# Runs of blocks


class Control:
    """A client's way to a source that runs in a thread of this process."""

    def __init__(self, group, store, device):
        self.sender = GroupSender(group, store, device)
        self.batches = []
        self.failure = None
        self._blocks = store.blocks
        self._asked, self._answers = queue.Queue(), queue.Queue()
        self.sizes = lambda sizes: sizes
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def ask(self, runs):
        self.batches.append([*runs])
        self._asked.put(runs)

    def answer(self):
        return self._answers.get(timeout=PATIENCE)

    @property
    def answered(self):
        return not self._answers.empty()

    def end(self):
        self._asked.put(None)
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()

    def _serve(self):
        try:
            while (runs := self._asked.get(timeout=PATIENCE)) is not None:
                sizes = self.sizes([self._blocks.size_of(run) for run in runs])
                self._answers.put(sizes)
                for run, size in zip(runs, sizes, strict=False):
                    if size is not None:
                        self.sender.send(run)
                        assert self.sender.in_flight <= WINDOW
            self.sender.finish()
        except (RuntimeError, AssertionError) as error:  # the second: closed by the test
            self.failure = error


class Session:
    """A store here, one there, and all that is between them."""

    def __init__(self, pair, tensors, chunk_bytes=MIB):
        pair.sessions.append(self)
        self.there = store_of(tensors, pair.devices[SOURCE])
        self.blanks = blank_like(tensors)
        matched = match(self.there.manifest, self.blanks, self.blanks.keys(), {})
        device = pair.devices[CLIENT]
        self.here = incomplete(self.there, matched, device)
        self.control = Control(pair.source, self.there, pair.devices[SOURCE])
        self.receiver = GroupReceiver(self.control, pair.client, self.here, device, 64 * MIB)
        self.scheduler = Scheduler(
            self.there.blocks, self.there.blocks.cut(chunk_bytes, large_alone=True)
        )
        self.load = P2PLoad(self.receiver, self.here, self.scheduler, verify=True, keep_alive=0.01)


@pytest.mark.parametrize("chunk_bytes", [MIB, 4 * MIB])
def test_a_model_arrives_as_it_was(pair, chunk_bytes):
    tensors = assorted()
    session = Session(pair, tensors, chunk_bytes)
    session.load.run()
    assert differing(tensors, session.blanks) == []
    assert session.here.complete
    session.control.end()
    assert session.control.failure is None
    assert pair.source.in_flight == pair.client.in_flight == 0


def test_thousands_of_runs_arrive_with_bounded_memory(pair):
    made = []
    for device in pair.devices:
        device.empty = lambda nbytes: made.append(nbytes) or torch.empty(nbytes, dtype=torch.uint8)
    tensors = {f"t{i}": random_tensor(i % 50, torch.uint8, 40_000) for i in range(1000)}
    session = Session(pair, tensors)
    session.load.run()
    assert differing(tensors, session.blanks) == []
    assert len(session.there.blocks.cut(MIB)) > 5 * WINDOW
    assert len(made) <= 2 * WINDOW + 2
    assert max(made) <= MIB


def test_runs_in_one_piece_travel_from_and_into_their_own_memory(pair):
    tensors = {"t": random_tensor(0, torch.uint8, 3 * MIB)}
    session = Session(pair, tensors)
    for device in pair.devices:
        device.empty = None  # nothing is staged
    session.load.run()
    places = [
        sorted(message.data_ptr() for _, message in device.groups[0].started[1:])
        for device in pair.devices
    ]
    for place, tensor in zip(places, (session.blanks["t"], tensors["t"]), strict=True):
        assert place == [tensor.data_ptr() + i * MIB for i in range(3)]


def test_blocks_without_bytes_need_no_message(pair):
    tensors = {"a": torch.empty(0, 4), "b": torch.empty(0)}
    session = Session(pair, tensors)
    session.load.run()
    assert session.here.complete
    assert all(len(device.groups[0].started) == 1 for device in pair.devices)  # the first byte


def test_runs_are_asked_for_in_batches_before_they_are_needed(pair):
    tensors = {f"t{i}": random_tensor(i, torch.uint8, MIB) for i in range(40)}
    session = Session(pair, tensors)
    session.load.run()
    assert [len(batch) for batch in session.control.batches] == [BATCH] * 5
    assert AHEAD == 2 * BATCH


def test_what_the_source_has_sent_to_others_is_asked_for_again(pair, monkeypatch):
    monkeypatch.setattr(scheduler, "_ASK_AGAIN", 0.01)
    tensors = {f"t{i}": random_tensor(i, torch.uint8, MIB) for i in range(20)}
    session = Session(pair, tensors)
    declined = iter([True, False, True, True])
    session.control.sizes = lambda sizes: [
        None if next(declined, False) else size for size in sizes
    ]
    session.load.run()
    assert differing(tensors, session.blanks) == []
    session.control.end()
    assert session.control.failure is None
    asked = [run for batch in session.control.batches for run in batch]
    assert len(asked) == 20 + 3


def test_sizes_of_more_runs_than_were_asked_for_end_the_session(pair):
    session = Session(pair, {"t": random_tensor(0, torch.uint8, 5000)})
    session.control.sizes = lambda sizes: [*sizes, None]
    with pytest.raises(ProtocolError, match=r"blocks have \[5000\] bytes here and \[5000, None\]"):
        session.load.run()
    assert pair.client.in_flight == 0


def test_sizes_that_are_not_those_of_the_runs_end_the_session_before_anything_is_received(pair):
    session = Session(pair, {f"t{i}": random_tensor(i, torch.uint8, 5000) for i in range(3)})
    session.control.sizes = lambda sizes: [size + 1 for size in sizes]
    with pytest.raises(ProtocolError, match=r"blocks have \[15000\] bytes here and \[15001\]"):
        session.load.run()
    assert pair.client.in_flight == 0
    assert session.load.outstanding == [Run(0, 2)]


def test_a_session_with_nothing_to_fetch_says_that_it_is_there(pair):
    session = Session(pair, {"t": random_tensor(0, torch.uint8, 100)})
    [elsewhere] = session.scheduler.take(Peer(), 1)
    thread = threading.Thread(target=session.load.run, daemon=True)
    thread.start()
    assert until(lambda: len(session.control.batches) >= 3)
    assert session.control.batches[:3] == [[], [], []]
    session.scheduler.give_back([elsewhere])
    thread.join(PATIENCE)
    assert session.here.complete


def test_a_source_whose_client_has_gone_stops(pair):
    session = Session(pair, {f"t{i}": random_tensor(i, torch.uint8, MIB) for i in range(20)})
    pair.client.close()
    session.control.ask([Run(i, i) for i in range(20)])
    session.control.end()
    assert "the transfer failed" in str(session.control.failure)
