import threading
import time

import pytest
import torch

from vllm_ascend.model_loader.netloader.executor.process_group import (
    CLIENT,
    SOURCE,
    form_group,
    host_store,
    visit_store,
)

from .support import DEVICE, HOST, PATIENCE, end, python, random_tensor, until


class Pair:
    """Both ends of a session's group."""

    def __init__(self, progress):
        store = host_store(HOST, 5.0)
        self._progress = progress
        thread = threading.Thread(target=self._form, args=("source", store, SOURCE))
        thread.start()
        self._form("client", visit_store(HOST, store.port, 5.0), CLIENT)
        thread.join()

    def _form(self, name, store, rank):
        group = form_group(
            DEVICE, store, "0" * 32, rank, HOST, handshake=5.0, progress=self._progress
        )
        setattr(self, name, group)


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
from vllm_ascend.model_loader.netloader.executor.process_group import SOURCE, form_group, visit_store
from tests.ut.model_loader.netloader.support import DEVICE, HOST
store = visit_store(HOST, int(sys.argv[1]), 30.0)
group = form_group(DEVICE, store, "0" * 32, SOURCE, HOST, handshake=30.0, progress=60.0)
group.send(torch.ones(int(sys.argv[2]), dtype=torch.uint8))
group.wait()
"""


def test_a_peer_that_is_killed_in_the_middle_of_a_message_is_noticed_at_once():
    store = host_store(HOST, 30.0)
    received = torch.zeros(1 << 30, dtype=torch.uint8)
    sender = python("-c", SENDER, store.port, received.numel())
    client = form_group(
        DEVICE, store, "0" * 32, CLIENT, HOST, handshake=30.0, progress=PATIENCE * 3
    )
    try:
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
        client.close()


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


def test_a_peer_that_never_comes_is_an_error_when_the_deadline_passes():
    store = host_store(HOST, 0.3)
    with pytest.raises(RuntimeError):
        form_group(DEVICE, store, "0" * 32, SOURCE, HOST, handshake=0.3, progress=0.3)


def test_sessions_on_one_store_do_not_meet():
    store = host_store(HOST, 5.0)
    failed = []

    def form(session, store, rank):
        try:
            form_group(DEVICE, store, session, rank, HOST, handshake=0.5, progress=0.5).close()
        except RuntimeError:
            failed.append(session)

    threads = [
        threading.Thread(target=form, args=("a" * 32, store, SOURCE)),
        threading.Thread(target=form, args=("b" * 32, visit_store(HOST, store.port, 5.0), CLIENT)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(failed) == ["a" * 32, "b" * 32]
