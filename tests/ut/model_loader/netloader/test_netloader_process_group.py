import socket
import threading
import time
from pathlib import Path

import pytest
import torch
from torch.distributed import PrefixStore

from vllm_ascend.model_loader.netloader.executor.process_group import (
    CLIENT,
    SOURCE,
    form_group,
    host_store,
    join_group,
)

from .support import DEVICE, HOST, PATIENCE, end, python, random_tensor, until

SESSION = "0" * 32


def never():  # gloo notices by itself when its peer is gone
    return False


def join(port, progress, handshake=5.0, session=SESSION):
    return join_group(
        DEVICE, HOST, port, session, HOST, handshake=handshake, progress=progress, gone=never
    )


class Pair:
    """Both ends of a session's group."""

    def __init__(self, progress):
        store = host_store(HOST, 5.0)
        self._progress = progress
        thread = threading.Thread(target=self._form, args=(store,))
        thread.start()
        self.client = join(store.port, progress)
        thread.join()

    def _form(self, store):
        self.source = form_group(
            DEVICE, store, SESSION, SOURCE, HOST, handshake=5.0, progress=self._progress, gone=never
        )


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
import sys, torch
from tests.ut.model_loader.netloader.test_netloader_process_group import *
store = host_store(HOST, 30.0)
print(store.port, flush=True)
group = form_group(DEVICE, store, SESSION, SOURCE, HOST, handshake=30.0, progress=60.0, gone=never)
group.send(torch.ones(int(sys.argv[1]), dtype=torch.uint8))
group.wait()
"""


def test_a_peer_that_is_killed_in_the_middle_of_a_message_is_noticed_at_once():
    received = torch.zeros(1 << 30, dtype=torch.uint8)
    sender = python("-c", SENDER, received.numel(), cwd=Path(__file__).parents[4])
    try:
        with join(int(sender.stdout.readline()), PATIENCE * 3, handshake=30.0) as client:
            client.receive(received)
            assert until(lambda: received[0] == 1)
            sender.kill()
            started = time.monotonic()
            with pytest.raises(RuntimeError):
                client.wait()
            assert time.monotonic() - started < PATIENCE
            assert received[-1] == 0  # it was the middle
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


def test_a_client_that_never_comes_is_an_error_when_the_deadline_passes():
    store = host_store(HOST, 0.3)
    with pytest.raises(RuntimeError):
        form_group(DEVICE, store, SESSION, SOURCE, HOST, handshake=0.3, progress=0.3, gone=never)


def test_a_source_that_never_comes_is_an_error_when_the_deadline_passes():
    store = host_store(HOST, 0.3)
    with pytest.raises(RuntimeError):
        join(store.port, 0.3, handshake=0.3)


def test_a_store_that_never_answers_is_an_error_when_the_deadline_passes():
    with socket.create_server((HOST, 0)) as mute:
        started = time.monotonic()
        with pytest.raises(RuntimeError, match=r"no process group within 0\.3 s"):
            join(mute.getsockname()[1], 0.3, handshake=0.3)
        assert time.monotonic() - started < PATIENCE / 2
        mute.close()
    # The thread that was left behind ends with the connection.
    assert until(lambda: "netloader-within" not in {t.name for t in threading.enumerate()})


def test_a_group_that_is_formed_too_late_is_left(monkeypatch):
    late = threading.Event()
    made = []

    class Late:
        def create_group(self, *arguments):
            late.wait(PATIENCE)
            made.append(DEVICE.create_group(*arguments))
            return made[-1]

        def __getattr__(self, name):
            return getattr(DEVICE, name)

    store = host_store(HOST, 5.0)
    source = threading.Thread(
        target=lambda: form_group(
            DEVICE, store, SESSION, SOURCE, HOST, handshake=PATIENCE, progress=1.0, gone=never
        ).close()
    )
    source.start()
    with pytest.raises(RuntimeError, match="no process group"):
        join_group(Late(), HOST, store.port, SESSION, HOST, handshake=0.3, progress=1.0, gone=never)
    late.set()
    source.join(PATIENCE)
    assert until(lambda: "netloader-within" not in {t.name for t in threading.enumerate()})
    with pytest.raises(RuntimeError):
        made[0].send([torch.zeros(1)], SOURCE, 0).wait()


def test_a_peer_that_has_left_again_is_an_error_when_the_deadline_passes():
    store = host_store(HOST, 5.0)
    meeting = PrefixStore(SESSION, store)
    meeting.set(f"rank {CLIENT} is here", "")
    with pytest.raises(RuntimeError):  # publishes its address, and gives up
        DEVICE.create_group(PrefixStore("group", meeting), CLIENT, HOST, 0.3)
    started = time.monotonic()
    with pytest.raises(RuntimeError):
        form_group(DEVICE, store, SESSION, SOURCE, HOST, handshake=1.0, progress=1.0, gone=never)
    # with all of the deadline for each of gloo's attempts it could be five
    assert time.monotonic() - started < 3


def test_sessions_on_one_store_do_not_meet():
    store = host_store(HOST, 5.0)
    failed = []

    def form(session):
        with pytest.raises(RuntimeError):
            form_group(
                DEVICE, store, session, SOURCE, HOST, handshake=0.5, progress=0.5, gone=never
            )
        failed.append(session)

    thread = threading.Thread(target=form, args=("a" * 32,))
    thread.start()
    with pytest.raises(RuntimeError):
        join(store.port, 0.5, handshake=0.5, session="b" * 32)
    thread.join(PATIENCE)
    assert failed == ["a" * 32]
