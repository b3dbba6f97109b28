"""Where two ranks meet: a store each, whose values go over the session's connection."""

import threading
import time
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed import PrefixStore

from vllm_ascend.model_loader.netloader.errors import ProtocolError
from vllm_ascend.model_loader.netloader.executor.transport.rendezvous import Mailbox, PeerStore

from .support import PATIENCE, channels, until


@pytest.fixture
def pair():
    near, far = channels()
    return PeerStore(near.tell, near.hear, PATIENCE), PeerStore(far.tell, far.hear, PATIENCE)


def scripted(*said, timeout=PATIENCE):
    """A store that hears this, and what it tells."""
    told, said = [], list(said)

    def hear(timeout):
        if not said:
            raise TimeoutError("nothing")
        return said.pop(0)

    return PeerStore(lambda key, value: told.append((key, value)), hear, timeout), told


@given(st.dictionaries(st.text(max_size=20), st.binary(max_size=5000), max_size=8))
def test_what_one_sets_the_other_gets_as_torch_asks_for_it(values):
    near, far = channels()
    here = PeerStore(near.tell, near.hear, PATIENCE)
    there = PeerStore(far.tell, far.hear, PATIENCE)
    one, other = PrefixStore("group", here), PrefixStore("group", there)
    for key, value in values.items():
        one.set(key, value)
        assert one.get(key) == value
    for key, value in reversed(values.items()):
        assert other.get(key) == value
    other.wait(list(values), timedelta(seconds=1))
    assert other.check(list(values))
    assert not other.check(["what nobody has set"])


def test_both_go_on_once_both_have_come(pair):
    one, other = pair
    met = []

    def meet():
        other.meet(1, "is here")
        met.append(1)

    thread = threading.Thread(target=meet)
    thread.start()
    assert one.get("1 is here") == b""
    assert not met
    one.meet(0, "is here")
    thread.join(PATIENCE)
    assert met == [1]


def test_all_that_was_set_before_a_meeting_has_been_heard_after_it():
    store, told = scripted(("a", b"1"), ("b", b"2"), ("1 is here", b""))
    store.meet(0, "is here")
    assert told == [("0 is here", b"")]
    store.close()
    assert (store.get("a"), store.get("b")) == (b"1", b"2")


def test_a_value_that_is_not_set_is_an_error_when_the_deadline_passes():
    near, _ = channels()
    store = PeerStore(near.tell, near.hear, 0.3)
    started = time.monotonic()
    for _ in range(20):  # of all calls together
        with pytest.raises(TimeoutError):
            store.get("a")
    assert time.monotonic() - started < 3
    assert isinstance(store.failure, TimeoutError)
    assert store.remaining == 0


def test_why_it_failed_is_known_whatever_torch_makes_of_it():
    error = ProtocolError("not a valid message")

    def fail(*_):
        raise error

    for store, call in (
        (PeerStore(fail, fail, 1), lambda store: store.set("a", "b")),
        (PeerStore(fail, fail, 1), lambda store: store.get("a")),
        (PeerStore(fail, fail, 1), lambda store: store.wait(["a"])),
    ):
        with pytest.raises(Exception, match="not a valid message"):
            call(PrefixStore("group", store))
        assert store.failure is error


def test_a_peer_that_sets_without_end_is_an_error():
    def hear(timeout):
        numbers.append(len(numbers))
        return str(numbers[-1]), b"x"

    numbers = []
    store = PeerStore(lambda *_: None, hear, PATIENCE)
    with pytest.raises(ProtocolError, match="more than 64 values"):
        store.get("a")
    assert len(numbers) == 65


def test_a_store_that_is_closed_tells_and_hears_nothing_more():
    store, told = scripted(("a", b"1"))
    store.close()
    store.set("b", b"2")
    assert told == []
    assert store.get("b") == b"2"
    with pytest.raises(RuntimeError, match="'a' was not set"):
        store.get("a")


# The source's end, of which its client asks now and then


def test_what_either_side_sets_reaches_the_other():
    box = Mailbox()
    box.tell("a", b"1")
    box.tell("b", b"2")
    assert box.exchange([("c", b"3"), ("d", b"4")], 0) == [("a", b"1"), ("b", b"2")]
    assert box.exchange([], 0) == []
    assert [box.hear(0), box.hear(0)] == [("c", b"3"), ("d", b"4")]


def test_a_store_on_either_side_of_a_mailbox():
    box = Mailbox()
    heard = []

    def tell(key, value):
        heard.extend(box.exchange([(key, value)], PATIENCE))

    def hear(timeout):
        while not heard:
            heard.extend(box.exchange([], timeout))
        return heard.pop(0)

    here = PeerStore(tell, hear, PATIENCE)
    there = PeerStore(box.tell, box.hear, PATIENCE)
    thread = threading.Thread(target=there.meet, args=(1, "is here"), daemon=True)
    thread.start()
    here.set("address", b"x")
    here.meet(0, "is here")
    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert there.get("address") == b"x"


def test_who_asks_waits_for_something_new():
    box, got = Mailbox(), []
    asking = threading.Thread(target=lambda: got.append(box.exchange([], 10 * PATIENCE)))
    asking.start()
    box.tell("a", b"1")
    asking.join(PATIENCE)
    assert got == [[("a", b"1")]]


def test_who_has_set_something_does_not_wait():
    """A backend sets a value and waits for its peer elsewhere."""
    assert Mailbox().exchange([("a", b"1")], 10 * PATIENCE) == []


def test_who_hears_waits_for_something_new():
    box, got = Mailbox(), []
    hearing = threading.Thread(target=lambda: got.append(box.hear(10 * PATIENCE)))
    hearing.start()
    box.exchange([("a", b"1")], 0)
    hearing.join(PATIENCE)
    assert got == [("a", b"1")]


def test_a_value_that_does_not_come_in_time_is_an_error():
    with pytest.raises(TimeoutError, match=r"the peer set no value for 0\.01 s"):
        Mailbox().hear(0.01)


def test_nobody_waits_for_a_mailbox_that_is_closed():
    box, over = Mailbox(), []

    def hear():
        with pytest.raises(ConnectionResetError, match="the peer is gone"):
            box.hear(10 * PATIENCE)
        over.append("heard")

    def ask():
        box.exchange([], 10 * PATIENCE)
        over.append("asked")

    for call in (hear, ask):
        threading.Thread(target=call, daemon=True).start()
    box.close()
    assert until(lambda: len(over) == 2)
    with pytest.raises(ConnectionResetError):
        box.hear(10 * PATIENCE)


def test_a_mailbox_that_is_closed_has_no_last_value():
    """A group that is formed while its session ends would last for nobody."""
    box = Mailbox()
    box.exchange([("a", b"1")], 0)
    box.close()
    with pytest.raises(ConnectionResetError):
        box.hear(0)


def test_a_peer_cannot_set_more_values_than_any_backend_does():
    mailbox = Mailbox()
    mailbox.exchange([("key", b"")] * 64, 0)
    with pytest.raises(ProtocolError, match="more than 64 values for a process group"):
        mailbox.exchange([("key", b"")], 0)
    mailbox.hear(1)
    mailbox.exchange([("key", b"")], 0)
