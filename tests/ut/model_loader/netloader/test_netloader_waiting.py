"""What waits and for how long: clients of a draft that is being loaded, calls with a deadline, and
how it is noticed that a peer has hung up."""

import contextlib
import dataclasses
import os
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from vllm_ascend.model_loader.netloader.errors import SourceError, SourceRefused
from vllm_ascend.model_loader.netloader.interaction.elastic import ElasticClient
from vllm_ascend.model_loader.netloader.interaction.protocol import (
    DRAFT_GROUP,
    TARGET_GROUP,
    Abort,
    Connection,
)
from vllm_ascend.model_loader.netloader.serve import Offer
from vllm_ascend.model_loader.netloader.utils import Patience, within

from .support import (
    DEVICE,
    HOST,
    PATIENCE,
    end,
    identity,
    join_of,
    loads_right_bytes,
    python,
    rows,
    settings,
    source,
    tcp_pair,
    until,
    weights_of,
)

# Clients of a draft that is being loaded

TARGET, DRAFT = rows(2), rows(2, seed=9)
DRAFTS = identity(group=DRAFT_GROUP, model="draft")
# Nobody waits as long as that: whoever does has not been told what it waits for.
LONG = settings(handshake_timeout=8 * PATIENCE)


@pytest.fixture(scope="module")
def target():
    return weights_of(TARGET)


@pytest.fixture(scope="module")
def draft():
    return weights_of(DRAFT)


@pytest.fixture
def expecting(target):
    """A source of a target that is loading its draft."""
    with source(target, config=LONG) as running:
        running.server.expect(DRAFT_GROUP)
        yield running


@pytest.fixture
def pool():
    with ThreadPoolExecutor() as pool:
        yield pool


def ask(running, who=DRAFTS):
    """Ask for a session; return the offer or raise why there is none."""
    with ElasticClient.connect(
        running.address, connect=5.0, handshake=2 * PATIENCE, progress=5.0
    ) as client:
        ack = client.join(join_of(who), who)
        client.finish(Abort("only asking"))
        return ack


def waiting(running):
    """How many clients wait; they have no session yet."""
    return len(running.server._offered._waiters)


def asking(running, pool, who=DRAFTS):
    """Ask for a model that is not there; return once the source has heard it."""
    asked = pool.submit(ask, running, who)
    assert until(lambda: waiting(running) or asked.done())
    return asked


def test_a_client_waits_for_a_draft_that_is_being_loaded(expecting, draft, pool):
    asked = asking(expecting, pool)
    assert not asked.done()
    expecting.server.offer(Offer(DRAFTS, draft, DEVICE))
    assert asked.result(PATIENCE).model_digest == draft.digests.model


def test_a_client_that_waited_gets_the_right_bytes(expecting, draft, pool):
    loading = pool.submit(loads_right_bytes, expecting, DRAFT, who=DRAFTS, config=LONG)
    assert until(lambda: waiting(expecting))
    expecting.server.offer(Offer(DRAFTS, draft, DEVICE))
    assert loading.result(PATIENCE)


def test_several_clients_that_wait_are_all_served(expecting, draft, pool):
    asked = [pool.submit(ask, expecting) for _ in range(3)]
    assert until(lambda: waiting(expecting) == 3)
    expecting.server.offer(Offer(DRAFTS, draft, DEVICE))
    assert {one.result(PATIENCE).model_digest for one in asked} == {draft.digests.model}


def test_the_target_is_served_while_clients_wait_for_the_draft(expecting, draft, pool):
    asked = asking(expecting, pool)
    assert loads_right_bytes(expecting, TARGET)
    assert not asked.done()
    expecting.server.offer(Offer(DRAFTS, draft, DEVICE))
    asked.result(PATIENCE)


def test_clients_that_wait_for_a_draft_take_no_place_from_those_of_the_target(target, draft, pool):
    with source(target, config=dataclasses.replace(LONG, max_sessions=1)) as running:
        running.server.expect(DRAFT_GROUP)
        asked = asking(running, pool)
        try:
            assert ask(running, identity()).model_digest == target.digests.model
            assert until(lambda: running.sessions == 0)
        finally:
            running.server.offer(Offer(DRAFTS, draft, DEVICE))
            asked.result(PATIENCE)


def test_an_expected_draft_that_does_not_come_is_refused_with_yet(target):
    with source(target, config=settings(handshake_timeout=0.2)) as running:
        running.server.expect(DRAFT_GROUP)
        with pytest.raises(SourceRefused, match=f"no model of group '{DRAFT_GROUP}' here yet"):
            ask(running)


def test_a_draft_that_is_not_expected_is_refused_at_once(target):
    with source(target, config=LONG) as running, pytest.raises(SourceRefused) as refused:
        ask(running)
    assert str(refused.value).endswith(f"there is no model of group '{DRAFT_GROUP}' here")


def test_a_draft_that_cannot_be_sent_is_refused_with_the_reason_to_those_who_waited(
    expecting, pool
):
    asked = asking(expecting, pool)
    expecting.server.offer(Offer(DRAFTS, None, DEVICE, "a.weight was made by loading"))
    with pytest.raises(SourceRefused, match=r"a\.weight was made by loading"):
        asked.result(PATIENCE)


def test_another_draft_than_the_one_waited_for_is_refused_with_the_difference(
    expecting, draft, pool
):
    asked = asking(expecting, pool, identity(group=DRAFT_GROUP, model="other"))
    expecting.server.offer(Offer(DRAFTS, draft, DEVICE))
    with pytest.raises(SourceRefused, match="model is 'other' here and 'draft' there"):
        asked.result(PATIENCE)


def test_a_draft_that_was_there_and_is_withdrawn_is_not_waited_for(expecting, draft):
    expecting.server.offer(Offer(DRAFTS, draft, DEVICE))
    expecting.server.withdraw(DRAFT_GROUP)
    with pytest.raises(SourceRefused) as refused:
        ask(expecting)
    assert str(refused.value).endswith("here")


def test_what_is_there_already_cannot_be_expected(target):
    with source(target, config=LONG) as running:
        running.server.expect(TARGET_GROUP)
        running.server.withdraw(TARGET_GROUP)
        with pytest.raises(SourceRefused) as refused:
            ask(running, identity())
    assert str(refused.value).endswith("here")


def test_stopping_sends_away_those_who_wait(expecting, pool):
    asked = asking(expecting, pool)
    pool.submit(expecting.server.stop).result(PATIENCE)
    with pytest.raises(SourceError):
        asked.result(PATIENCE)
    assert until(lambda: "netloader-session" not in {t.name for t in threading.enumerate()})


# Calls with a deadline


class Undone(list):
    """Notes what was undone."""

    def __call__(self, result):
        self.append(result)


def seconds(number):
    return Patience(number, lambda: False, 0.0)


def none_left():
    return until(lambda: "netloader-within" not in {t.name for t in threading.enumerate()})


def test_the_result_of_a_call_in_time_is_returned_and_not_undone():
    undo = Undone()
    assert within(seconds(PATIENCE), lambda: "result", undo) == "result"
    assert none_left()
    assert undo == []


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(3)])
def test_an_exception_in_time_is_passed_on(error):
    def fail():
        raise error

    undo = Undone()
    with pytest.raises(type(error)) as raised:
        within(seconds(PATIENCE), fail, undo)
    assert raised.value is error
    assert undo == []


def test_a_callees_own_timeout_is_passed_on_as_it_is():
    error = TimeoutError("the callee's own")

    def fail():
        raise error

    with pytest.raises(TimeoutError) as raised:
        within(seconds(PATIENCE), fail, Undone())
    assert raised.value is error


@pytest.fixture
def unhandled(monkeypatch):
    """Exceptions that ended a thread."""
    errors = []
    monkeypatch.setattr(threading, "excepthook", errors.append)
    yield errors
    assert errors == []


@pytest.mark.usefixtures("unhandled")
def test_a_result_that_comes_too_late_is_undone():
    late, undo = threading.Event(), Undone()

    def take_long():
        assert late.wait(PATIENCE)
        return "result"

    with pytest.raises(TimeoutError, match="nothing in time"):
        within(seconds(0.05), take_long, undo)
    assert undo == []
    late.set()
    assert until(lambda: undo == ["result"])
    assert none_left()


@pytest.mark.usefixtures("unhandled")
def test_an_exception_that_comes_too_late_is_nobodys():
    late, undo = threading.Event(), Undone()

    def take_long():
        late.wait(PATIENCE)
        raise ValueError

    with pytest.raises(TimeoutError, match="nothing in time"):
        within(seconds(0.05), take_long, undo)
    late.set()
    assert none_left()
    assert undo == []


@pytest.mark.usefixtures("unhandled")
def test_a_call_for_a_peer_that_hangs_up_meanwhile_is_waited_for_a_little_longer():
    late, undo, left = threading.Event(), Undone(), threading.Event()

    def take_long():
        left.set()
        late.wait(PATIENCE)

    patience = Patience(PATIENCE, left.is_set, 0.1)
    with pytest.raises(TimeoutError, match="nothing in time"):
        within(patience, take_long, undo)
    assert patience.hung_up
    late.set()
    assert until(lambda: undo == [None])


def test_what_a_peer_has_done_before_it_hung_up_counts():
    patience = Patience(PATIENCE, lambda: True, PATIENCE)

    def take_until_the_peer_has_gone():
        assert until(lambda: patience.hung_up)
        return "result"

    assert within(patience, take_until_the_peer_has_gone, Undone()) == "result"


def test_a_call_runs_in_a_thread_that_holds_up_nobody():
    assert within(seconds(PATIENCE), lambda: threading.current_thread().daemon, Undone())
    assert within(seconds(PATIENCE), threading.get_ident, Undone()) != threading.get_ident()


# Peers that hang up


class Clock:
    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr("time.monotonic", lambda: self.now)


def test_patience_ends_with_its_time(monkeypatch):
    clock = Clock(monkeypatch)
    patience = Patience(5.0, lambda: False, 1.0)
    clock.now += 4.9
    assert not patience.over()
    clock.now += 0.2
    assert patience.over()
    assert not patience.hung_up


@pytest.mark.parametrize(("noticed", "ends"), [(2.0, 3.0), (4.5, 5.0)])
def test_patience_with_a_peer_that_hangs_up_ends_soon_and_never_later(monkeypatch, noticed, ends):
    clock, left = Clock(monkeypatch), []
    patience = Patience(5.0, lambda: bool(left), 1.0)
    clock.now += noticed
    assert not patience.over()
    left.append(True)
    assert not patience.over()
    left.clear()  # hung up is hung up
    clock.now = 1000.0 + ends - 0.1
    assert not patience.over()
    clock.now += 0.2
    assert patience.over()
    assert patience.hung_up


def test_an_open_connection_has_not_hung_up():
    with tcp_pair() as (connection, far):
        assert not connection.hung_up
        far.sendall(b"unread")
        assert until(lambda: connection.has_data)
        assert not connection.hung_up


@pytest.mark.parametrize("unread", [b"", b"unread", b"x" * 100_000])
def test_a_peer_that_closes_has_hung_up_whatever_is_unread(unread):
    with tcp_pair() as (connection, far):
        far.sendall(unread)
        far.close()
        assert until(lambda: connection.hung_up)
        assert connection.hung_up  # and it stays so


def test_what_a_peer_said_before_it_hung_up_can_still_be_read():
    with tcp_pair() as (connection, far):
        far.sendall(b'{"label":"ABORT","content":{"reason":"enough"}}\n')
        far.close()
        assert until(lambda: connection.hung_up)
        assert connection.receive_request(PATIENCE) == Abort("enough")


def test_a_peer_that_resets_has_hung_up():
    with tcp_pair() as (connection, far):
        far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        far.close()
        assert until(lambda: connection.hung_up)


def test_a_connection_that_was_cut_here_has_hung_up():
    """So a source that stops does not wait for transfers."""
    with tcp_pair() as (connection, _):
        connection.cut()
        assert connection.hung_up


def test_asking_takes_nothing_away():
    with tcp_pair() as (connection, far):
        far.sendall(b'{"label":"ABORT","content":{"reason":"enough"}}\n')
        for _ in range(3):
            assert not connection.hung_up
        assert connection.receive_request(PATIENCE) == Abort("enough")


_CONNECT = """
import socket, sys, time
sock = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
sock.sendall(b"half a mess")
print("connected", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("unread", [False, True])
def test_a_peer_whose_process_is_killed_has_hung_up(unread):
    with socket.create_server((HOST, 0)) as listener:
        process = python("-c", _CONNECT, listener.getsockname()[1])
        try:
            near, _ = listener.accept()
            assert process.stdout.readline() == "connected\n"
            if not unread:
                assert near.recv(100) == b"half a mess"
            with contextlib.closing(Connection(near)) as connection:
                assert not connection.hung_up
                os.kill(process.pid, signal.SIGKILL)
                assert until(lambda: connection.hung_up)
        finally:
            end(process)
