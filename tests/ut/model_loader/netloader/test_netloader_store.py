import threading
import time
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed import PrefixStore

from vllm_ascend.model_loader.netloader.errors import ProtocolError
from vllm_ascend.model_loader.netloader.executor.store import PeerStore

from .support import PATIENCE, channels


@pytest.fixture
def pair():
    with channels() as (near, far):
        yield PeerStore(near.tell, near.hear, PATIENCE), PeerStore(far.tell, far.hear, PATIENCE)


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
    with channels() as (near, far):
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
    with channels() as (near, _):
        store = PeerStore(near.tell, near.hear, 1.0)
        started = time.monotonic()
        for _ in range(3):  # of all calls together
            with pytest.raises(TimeoutError):
                store.get("a")
        assert time.monotonic() - started < 2.5
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
