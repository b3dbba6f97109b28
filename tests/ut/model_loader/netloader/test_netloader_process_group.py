import contextlib
import functools
import socket
import threading
import time
from pathlib import Path

import pytest
import torch
from torch.distributed import PrefixStore

from vllm_ascend.model_loader.netloader.executor.devices.cpu import CpuDevice
from vllm_ascend.model_loader.netloader.executor.process_group import (
    CLIENT,
    SOURCE,
    form_group,
)
from vllm_ascend.model_loader.netloader.executor.store import PeerStore
from vllm_ascend.model_loader.netloader.utils import Patience, within

from .support import DEVICE, HOST, PATIENCE, Channel, channels, end, python, random_tensor, until


def never():  # gloo notices by itself when its peer is gone
    return False


def form(channel, rank, progress, handshake=5.0, device=DEVICE):
    return form_group(
        device,
        channel.tell,
        channel.hear,
        rank,
        HOST,
        handshake=handshake,
        progress=progress,
        gone=never,
    )


class Pair:
    """Both ends of a session's group."""

    def __init__(self, progress):
        with channels() as (near, far):
            thread = threading.Thread(target=self._form, args=(far, progress))
            thread.start()
            self.client = form(near, CLIENT, progress)
            thread.join()

    def _form(self, channel, progress):
        self.source = form(channel, SOURCE, progress)


@pytest.fixture
def pair():
    pair = Pair(progress=0.3)
    yield pair
    pair.source.close()
    pair.client.close()


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


def test_a_message_that_is_missing_is_not_made_up_for_by_the_next(pair):
    received = torch.zeros(10, dtype=torch.uint8)
    pair.source._next_tag()  # one that the source believes to have sent
    pair.source.send(torch.ones(10, dtype=torch.uint8))
    pair.client.receive(received)
    with pytest.raises(RuntimeError):
        pair.client.wait()
    assert (received == 0).all()


def test_a_message_that_does_not_come_is_an_error_when_the_deadline_passes(pair):
    pair.client.receive(torch.empty(10, dtype=torch.uint8))
    with pytest.raises(RuntimeError):
        pair.client.wait()


def test_a_peer_that_leaves_is_noticed_at_once():
    pair = Pair(progress=PATIENCE * 3)
    pair.client.receive(torch.empty(10, dtype=torch.uint8))
    pair.source.close()
    outcome = []

    def wait():
        with pytest.raises(RuntimeError) as error:
            pair.client.wait()
        outcome.append(error)

    waiter = threading.Thread(target=wait, daemon=True)
    waiter.start()
    assert until(lambda: outcome)
    pair.client.close()


SENDER = """
import socket, sys, torch
from tests.ut.model_loader.netloader.test_netloader_process_group import *
with socket.create_server((HOST, 0)) as listener:
    print(listener.getsockname()[1], flush=True)
    channel = Channel(listener.accept()[0])
group = form(channel, SOURCE, 60.0, handshake=30.0)
group.send(torch.ones(int(sys.argv[1]), dtype=torch.uint8))
group.wait()
"""


def test_a_peer_that_is_killed_in_the_middle_of_a_message_is_noticed_at_once():
    received = torch.zeros(1 << 30, dtype=torch.uint8)
    sender = python("-c", SENDER, received.numel(), cwd=Path(__file__).parents[4])
    try:
        port = int(sender.stdout.readline())
        channel = Channel(socket.create_connection((HOST, port)))
        with form(channel, CLIENT, PATIENCE * 3, handshake=30.0) as client:
            client.receive(received)
            assert until(lambda: received[0] == 1)
            sender.kill()
            started = time.monotonic()
            with pytest.raises(RuntimeError):
                client.wait()
            assert time.monotonic() - started < PATIENCE
            assert received[-1] == 0  # it was the middle
        channel.close()
    finally:
        end(sender)


def test_nothing_is_written_after_the_group_was_left(pair):
    # As when a source is too slow, and the chunk is fetched from another one into the same memory.
    received = torch.zeros(1 << 20, dtype=torch.uint8)
    pair.client.receive(received)
    pair.client.close()
    with pytest.raises(RuntimeError):
        pair.source.send(torch.ones(1 << 20, dtype=torch.uint8))
        pair.source.wait()
    assert (received == 0).all()


def test_leaving_twice_is_harmless(pair):
    pair.client.close()
    with pair.client:
        pass


@pytest.mark.parametrize("rank", [CLIENT, SOURCE])
def test_a_peer_that_never_comes_is_an_error_when_the_deadline_passes(rank):
    with (
        channels() as (near, _),
        pytest.raises(RuntimeError, match=r"no process group within 0\.3"),
    ):
        form(near, rank, 0.3, handshake=0.3)


@pytest.mark.parametrize("rank", [CLIENT, SOURCE])
def test_a_peer_that_leaves_before_there_is_a_group_is_noticed_at_once(rank):
    with channels() as (near, far):
        far.close()
        with pytest.raises(RuntimeError, match=r"closed the connection|[Bb]roken pipe|reset"):
            form(near, rank, PATIENCE * 3, handshake=PATIENCE * 3)


def test_a_peer_that_has_left_again_is_an_error_when_the_deadline_passes():
    with channels() as (near, far):
        gone = PeerStore(near.tell, near.hear, PATIENCE)
        gone.set(f"{CLIENT} is here", b"")
        near.tell("group/0/0", address_of_nobody())
        started = time.monotonic()
        # The port may be somebody else's by now, who accepts and does not answer.
        with pytest.raises(RuntimeError, match=r"[Gg]loo.*connect|no process group within 1 s"):
            form(far, SOURCE, 1.0, handshake=1.0)
        # with all of the deadline for each of gloo's attempts it could be five
        assert time.monotonic() - started < 4.5


def address_of_nobody():
    """What a gloo group, which is not there any more, has set."""
    values = {}

    def hear(timeout):
        raise TimeoutError("nobody else comes")

    store = PeerStore(values.__setitem__, hear, 0.3)
    with pytest.raises(TimeoutError):
        DEVICE.create_group(PrefixStore("group", store), CLIENT, HOST, 0.3, lambda: False)
    return values["group/0/0"]


def test_a_group_is_left_when_the_peer_does_not_get_it():
    class Leaving(CpuDevice):
        """Its process ends once the group has been made."""

        def create_group(self, *arguments):
            group = super().create_group(*arguments)
            near.close()
            return group

    class Seen(CpuDevice):
        closed = 0

        def close(self, group, unfinished):
            self.closed += 1
            super().close(group, unfinished)

    def leave():
        with pytest.raises(RuntimeError):
            form(near, CLIENT, 1.0, device=Leaving())

    seen = Seen()
    with channels() as (near, far):
        thread = threading.Thread(target=leave)
        thread.start()
        with pytest.raises(RuntimeError):
            form(far, SOURCE, PATIENCE * 3, handshake=PATIENCE * 3, device=seen)
        thread.join()
    assert seen.closed == 1


def test_the_deadline_holds_when_hardly_anything_is_left_of_it():
    """Gloo takes a deadline of under a millisecond for none."""

    def form(store):
        with contextlib.suppress(RuntimeError):  # none if it is this side that connects
            DEVICE.create_group(PrefixStore("group", store), SOURCE, HOST, 0.004, lambda: False)

    address = bytearray(address_of_nobody())
    port = 20 + int.from_bytes(address[:8], "little") - 2
    # Which side connects depends on the ports.
    for _ in range(8):
        with channels() as (near, far), socket.create_server((HOST, 0)) as mute:
            address[port : port + 2] = mute.getsockname()[1].to_bytes(2, "big")
            near.tell("group/0/0", bytes(address))
            store = PeerStore(far.tell, far.hear, PATIENCE)
            within(
                Patience(PATIENCE, lambda: False, 0.0),
                functools.partial(form, store),
                lambda _: None,
            )


def test_a_group_is_formed_at_once_where_torch_is_told_to_be_lazy(monkeypatch):
    monkeypatch.setenv("TORCH_GLOO_LAZY_INIT", "1")
    test_messages_arrive_in_the_order_in_which_they_were_started(Pair(progress=5.0))
