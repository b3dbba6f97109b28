"""Groups: what is wrong with their messages, and HTTP where none can be formed."""

import time

import pytest
import torch

from vllm_ascend.model_loader.netloader.config import Transport

from .faults import flipped
from .models import COUNT
from .sides import PATIENCE, fresh, load, load_here, loading, rows, source, store_of, until
from .ways import GlooDevice, Way

pytestmark = pytest.mark.ways(Way.STREAM)

SOON = 0.8
QUICK = {"max_sources": 1, "handshake_timeout": 2.0, "progress_timeout": SOON}
RIGHT, LOST, WRONG = "", "transfer", "wrong bytes twice in blocks"


# Without groups


class Groupless(GlooDevice):
    def create_group(self, store, rank, local_host, timeout, gone):
        raise RuntimeError("no fabric\n here")


def said_of_http(outcome):
    said = [line for line in outcome.log if "so the weights come over HTTP" in line]
    assert len(said) == 1
    return said[0]


def test_a_client_that_cannot_form_a_group_loads_over_http(way):
    with source(way) as running:
        outcome = load_here(way, [running], device=Groupless(), **QUICK).check()
    assert f"source {running.address}: no process group" in said_of_http(outcome)
    assert "no fabric here" in said_of_http(outcome)


def test_a_source_that_cannot_form_a_group_sends_over_http(way):
    store = fresh(store_of(way, rows))
    store.device = Groupless()
    with source(way, store) as running:
        assert said_of_http(load(way, [running], **QUICK).check())
        until(lambda: running.sessions == 0)


class Slow(GlooDevice):
    """Takes longer to form a group than a source waits for a silent client."""

    def create_group(self, store, rank, local_host, timeout, gone):
        time.sleep(3 * SOON)
        return super().create_group(store, rank, local_host, timeout, gone)


def test_a_source_waits_for_a_group_that_takes_longer_than_its_progress_timeout(way):
    with source(way, handshake_timeout=PATIENCE, progress_timeout=SOON) as running:
        outcome = load_here(way, [running], device=Slow(), handshake_timeout=PATIENCE).check()
    assert not outcome.said("no process group")


class Patient(GlooDevice):
    """Goes on forming a group until the source has ended the connection."""

    def create_group(self, store, rank, local_host, timeout, gone):
        until(gone)
        raise RuntimeError("the peer has hung up")


def test_a_source_that_has_ended_the_connection_meanwhile_is_asked_again_over_http(way):
    with source(way, handshake_timeout=SOON, progress_timeout=SOON) as running:
        outcome = load_here(way, [running], device=Patient(), handshake_timeout=PATIENCE).check()
        assert "the peer has hung up" in said_of_http(outcome)


def test_a_source_that_sends_over_http_only_says_so(way):
    with source(way, transport=Transport.HTTP) as running:
        outcome = load(way, [running], **QUICK).check()
        assert "no_groups: this instance sends over HTTP only" in said_of_http(outcome)


@pytest.mark.parametrize("connections", [1, 2])
def test_a_client_may_want_http(way, connections):
    with source(way) as running:
        outcome = load(way, [running], transport=Transport.HTTP, connections=connections).check()
        assert not outcome.said("no process group")


# Messages. None is ever longer than the client expects: gloo ends the process that receives such a
# one.


def at(number, fault):
    """One message of a session has the fault."""
    return lambda message: fault(message) if message.number == number else message.go()


def since(number, fault):
    """All messages of a session from one on have the fault."""
    return lambda message: fault(message) if message.number >= number else message.go()


def late(message):
    time.sleep(SOON / 50)
    return message.go()


def cut(message):
    raise RuntimeError("injected failure")


def cut_within(message):
    halved(message)
    return cut(message)


def flip(message):
    return message.go(flipped(message.memory))


def halved(message):
    return message.go(message.memory[: len(message.memory) // 2])


def zeroed(message):
    return message.go(torch.zeros_like(message.memory))


def repeated(message):
    # There is none before the first.
    other = message.memory if message.before is None else message.before
    return message.go(other[: len(message.memory)])


class Nothing:
    """What a message that was never started looks like to those who wait for it."""

    def is_completed(self):
        return True

    is_success = is_completed


def dropped(message):
    return Nothing()


# name: (makes the fault of the `n`th message or all since, what such a source ends with)
SENT = {
    "late": (at(9, late), RIGHT),
    "all late": (since(9, late), RIGHT),
    "cut": (at(9, cut), LOST),
    "cut within": (at(9, cut_within), LOST),
    "flipped": (at(9, flip), RIGHT),
    "all flipped": (since(9, flip), WRONG),
    "halved": (at(9, halved), RIGHT),
    "all halved": (since(9, halved), WRONG),
    "all zeroed": (since(9, zeroed), WRONG),
    "repeated": (at(9, repeated), RIGHT),
    "all repeated": (since(9, repeated), WRONG),
    "dropped": (at(9, dropped), WRONG),
}


@pytest.mark.parametrize("fault", SENT)
def test_a_fault_in_what_a_source_sends_is_survived(way, fault):
    wrong, expected = SENT[fault]
    store = fresh(store_of(way, rows))
    store.device = GlooDevice(wrong)
    with source(way, store, progress_timeout=SOON) as faulty, source(way) as good:
        with loading(way, [faulty], **QUICK) as result:
            load(way, [faulty, good], **QUICK).check()
            outcome = result()
        until(lambda: faulty.sessions == 0)
        store.device.fault = None
        load(way, [faulty]).check()
    if expected:
        outcome.check_failed(f"{faulty.address}: ", expected)
    else:
        outcome.check()


class After:
    """A message with which something happens once it has arrived."""

    def __init__(self, message, happens):
        self._work = message.go()
        self._memory = message.memory
        self._happens = happens

    def is_completed(self):
        if not self._work.is_completed():
            return False
        if self._happens is not None:
            self._happens(self._memory)
            self._happens = None
        return True

    def is_success(self):
        return self._work.is_success()


def flipped_on_arrival(message):
    return After(message, lambda memory: memory[-1:].bitwise_xor_(1))


RECEIVED = {
    "late": (at(5, late), RIGHT),
    "cut": (at(5, cut), LOST),
    "flipped": (at(5, flipped_on_arrival), RIGHT),
    "all flipped": (since(5, flipped_on_arrival), WRONG),
    "dropped": (at(5, dropped), WRONG),
}


@pytest.mark.parametrize("fault", RECEIVED)
def test_a_fault_in_what_a_client_receives_leaves_the_source_well(way, fault):
    wrong, expected = RECEIVED[fault]
    with source(way, progress_timeout=SOON) as running:
        outcome = load_here(way, [running], device=GlooDevice(wrong), **QUICK)
        until(lambda: running.sessions == 0)
        load(way, [running]).check()
    if expected:
        outcome.check_failed(f"{running.address}: ", expected)
    else:
        outcome.check()


def test_a_client_that_stalls_loses_its_place_and_then_loads_from_the_next(way):
    def stall(message):
        if message.number == 5 and not stalled:
            stalled.append(message.number)
            # By its own deadline the source gives a client up that takes nothing more.
            until(lambda: first.sessions == 0)
            load(way, [first]).check()
        return message.go()

    stalled = []
    with source(way, progress_timeout=SOON) as first, source(way) as second:
        load_here(way, [first, second], device=GlooDevice(stall), **QUICK).check()
    assert stalled == [5]
    assert COUNT > 5
