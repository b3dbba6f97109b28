"""Sources that fail, stall, lie or have something else: what came is kept, what is wrong is not."""

import contextlib
import random
import threading
import time

import pytest
import torch

from vllm_ascend.model_loader.netloader.errors import Withdrawn
from vllm_ascend.model_loader.netloader.executor.chunks.digests import Digests, of_instance
from vllm_ascend.model_loader.netloader.executor.store import make_store
from vllm_ascend.model_loader.netloader.executor.transport.group import AHEAD, WINDOW
from vllm_ascend.model_loader.netloader.loading import sessions
from vllm_ascend.model_loader.netloader.serve import Offer

from . import models
from .faults import Proxy, closed_port, corrupting, failing_after, tapped
from .models import COUNT, many_rows, rows
from .sides import PATIENCE, fresh, identity, load, load_here, make, source, store_of, until
from .ways import Way

MANY = 64
ONE = {"max_sources": 1}
# A stalled peer is lost soon, but not because the machine is busy.
SOON = 1.5


def under_way(way):
    """Chunks that come again at most when a source is lost."""
    return 2 * WINDOW if way.in_groups else 4


# Lost on the way


def test_a_source_that_fails_costs_only_what_was_under_way(way):
    first, second = tapped(way, many_rows, failing_after(40)), tapped(way, many_rows)
    with source(way, first) as failing, source(way, second) as steady:
        outcome = load(way, [failing, steady], many_rows, **ONE).check()
        assert outcome.said(f"source {failing.address}: ")
        assert until(lambda: failing.sessions == steady.sessions == 0, 1.0) < 1
    again = second.readable.read
    assert set(range(40, MANY)) <= set(again)
    assert len(again) == len(set(again)) <= MANY - 40 + under_way(way)


def test_a_source_that_fails_among_several_costs_only_what_was_under_way(way):
    begun = threading.Event()  # the other one has, by the time the first fails

    def fail(index, count):
        if count == 3:
            assert begun.wait(20)
            raise RuntimeError("injected failure")

    first = tapped(way, many_rows, fail)
    second = tapped(way, many_rows, lambda index, count: begun.set())
    with source(way, first) as failing, source(way, second) as steady:
        load(way, [failing, steady], many_rows).check()
    assert len(first.readable.read) + len(second.readable.read) <= MANY + 1 + under_way(way)


def test_nothing_that_a_lost_source_sends_later_reaches_the_tensors(way, over):
    def sleep_and_send_something_else(index, count):
        if count >= 5:
            over.wait(30)
            return torch.zeros_like(first.tensors[index])
        return None

    first = tapped(way, rows, sleep_and_send_something_else)
    with source(way, first) as late, source(way) as steady:
        load(way, [late, steady], progress_timeout=SOON, **ONE).check()
        over.set()
        until(lambda: late.sessions == 0)


@pytest.mark.parametrize("last", [8, COUNT - 2], ids=["early", "with nothing left to ask for"])
def test_weights_withdrawn_in_mid_transfer_end_the_session_with_the_reason(way, last):
    def withdraw(index, count):
        if count == last:
            store.withdraw(Withdrawn("the weights are being replaced"))

    store = tapped(way, rows, withdraw)
    with source(way, store) as running:
        load(way, [running]).check_failed(
            f"{running.address}: changed: the weights are being replaced"
        )
    assert len(store.readable.read) <= last + 1 + AHEAD * way.in_groups


@contextlib.contextmanager
def replaced_in_mid_transfer(way):
    """A source whose weights are replaced, once, while it sends them."""

    def replace(index, count):
        if count == 8:
            threading.Thread(target=running.offer, args=(way, later)).start()
            assert first.withdrawn.wait(PATIENCE)

    first, later = tapped(way, rows, replace), fresh(store_of(way, rows, 1))
    with source(way, first) as running:
        yield running


def test_weights_replaced_in_mid_transfer_are_loaded_from_the_start(way):
    with replaced_in_mid_transfer(way) as running, Proxy(running.address) as again:
        load(way, [running, again], rows, 1, **ONE).check()


# Several at once


def test_live_sources_share_the_work(way):
    both = threading.Barrier(2)

    def meet(index, count):
        if count == 0:
            both.wait(20)

    first, second = tapped(way, rows, meet), tapped(way, rows, meet)
    with source(way, first) as one, source(way, second) as another:
        outcome = load(way, [one, another]).check()
    assert sorted(first.readable.read + second.readable.read) == list(range(COUNT))
    assert f"{one.address} (" in outcome.gave
    assert f"{another.address} (" in outcome.gave


def test_no_more_sources_are_pulled_from_than_allowed(way):
    first, second = tapped(way, rows), tapped(way, rows)
    with source(way, first) as one, source(way, second) as another:
        outcome = load(way, [one, another], **ONE).check()
    assert outcome.gave == str(one.address)
    assert len(first.readable.read) == COUNT
    assert second.readable.read == []


def test_what_came_from_other_weights_is_fetched_again(way):
    first, second = tapped(way, rows, failing_after(10)), tapped(way, rows, seed=1)
    with source(way, first) as one, source(way, second) as another:
        outcome = load(way, [one, another], rows, 1, **ONE).check()
    assert sorted(second.readable.read) == list(range(COUNT))
    assert outcome.gave == str(another.address)  # nothing of what the first gave is there


@contextlib.contextmanager
def in_turn(way, then=None):
    """Two sources of which the second answers, and is put off, while the first sends."""
    sending, answered = threading.Event(), threading.Event()

    def tap(index, count):
        sending.set()
        if count == 5:
            assert answered.wait(20)
            until(lambda: another.sessions == 0)
            if then is not None:
                raise then

    def hold(said):
        sending.wait(20)
        return said

    def note(said):
        if said.of == "join" and " 200 " in said.line:
            answered.set()
        return said

    second = tapped(way, rows, seed=1)
    with (
        source(way, tapped(way, rows, tap)) as one,
        source(way, second) as another,
        Proxy(another.address, note, hold) as proxy,
    ):
        yield [one, proxy], second.readable


def test_a_source_of_other_weights_still_counts_when_the_first_is_lost(way):
    with in_turn(way, then=RuntimeError("injected failure")) as (sources, read):
        load(way, sources, rows, 1).check()
    assert sorted(read.read) == list(range(COUNT))


def test_a_source_of_other_weights_gives_nothing_while_the_first_sends(way):
    with in_turn(way) as (sources, read):
        outcome = load(way, sources).check()
    assert read.read == []
    assert outcome.said("are not those that are being loaded")


def test_a_source_that_answers_late_does_not_delay_a_finished_load(way, over):
    def hold(said):
        over.wait(30)
        return said

    with (
        source(way) as running,
        source(way, seed=1) as late,
        Proxy(late.address, to_client=hold) as proxy,
    ):
        sources = [proxy, closed_port(), running]
        assert load(way, sources, handshake_timeout=20.0).check().seconds < 10
        over.set()
        until(lambda: late.sessions == 0)


@pytest.mark.ways(Way.HTTP, Way.NPU_HTTP)
def test_further_connections_that_are_let_in_late_do_not_delay_a_finished_load(way, over):
    with source(way) as running:
        join, first = running.server.join, threading.Lock()

        def let_in(session, asked):
            if not first.acquire(blocking=False):
                over.wait(PATIENCE)
            return join(session, asked)

        running.server.join = let_in
        outcome = load(way, [running], connections=3, handshake_timeout=PATIENCE).check()
        assert outcome.seconds < PATIENCE / 2
        over.set()
        until(lambda: running.sessions == 0)


@pytest.mark.ways(Way.HTTP)
def test_further_connections_that_cannot_be_made_do_not_delay_a_finished_load(
    way, over, monkeypatch
):
    dial, made = sessions.connect, threading.Lock()

    def connect(address, config):
        if not made.acquire(blocking=False):
            over.wait(PATIENCE)
        return dial(address, config)

    monkeypatch.setattr(sessions, "connect", connect)
    with source(way) as running:
        assert load_here(way, [running], connections=3).check().seconds < PATIENCE / 2
        over.set()
        until(lambda: running.sessions == 0)


def test_a_stalled_source_does_not_fail_a_load_that_another_one_can_finish(way, over):
    def stall(index, count):
        if count == 2:
            over.wait(30)

    with source(way, tapped(way, rows, stall)) as stalled, source(way) as running:
        load(way, [stalled, running], progress_timeout=SOON).check()
        over.set()


def test_a_session_with_nothing_to_fetch_stays_until_it_is_needed(way):
    # Longer than the second source waits for a silent client.
    begun = threading.Event()

    def fail_at_last(index, count):
        if count == 1:
            begun.set()
            time.sleep(3.0)
            raise RuntimeError("injected failure")

    first = tapped(way, rows, fail_at_last)
    second = tapped(way, rows, lambda *_: begun.wait(20) and None)
    with source(way, first) as one, source(way, second, progress_timeout=2.0) as another:
        outcome = load(way, [one, another], progress_timeout=3.6).check()
    assert 2 <= len(first.readable.read) <= 3
    assert not outcome.said(f"source {another.address}")


# Wrong bytes


def test_a_chunk_that_comes_wrong_once_is_fetched_again(way):
    sent = corrupting(way, rows, times=1)
    with source(way, sent) as running:
        load(way, [running]).check()
    assert sorted(sent.readable.read) == sorted([*range(COUNT), 7])


def test_a_source_whose_bytes_come_wrong_twice_is_dropped_with_the_tensors_name(way):
    second = tapped(way, rows)
    with source(way, corrupting(way, rows, times=2)) as wrong, source(way, second) as right:
        outcome = load(way, [wrong, right], **ONE).check()
        assert wrong.status.models[0].state == "serving"
    assert outcome.said(f"source {wrong.address}: wrong bytes twice in blocks 7-7 (row.7)")
    assert 7 in second.readable.read
    assert len(second.readable.read) < COUNT


CHANGED = "changed: the source's weights have changed since they were offered"


def test_a_source_whose_own_bytes_are_wrong_withdraws_them_and_the_client_goes_on(way):
    second = tapped(way, rows)
    with source(way, corrupting(way, rows, 99)) as wrong, source(way, second) as right:
        renewed = []
        wrong.server.renew = renewed.append
        outcome = load(way, [wrong, right], **ONE).check()
        assert outcome.said(f"source {wrong.address}: {CHANGED}")
        [model] = wrong.status.models
        assert (model.state, renewed) == ("changing", ["netloader"])
    assert len(second.readable.read) < COUNT


def test_weights_pushed_into_a_source_behind_its_back_are_loaded_when_it_has_noticed(way):
    def renew(running, store):
        with store.device.attached():
            running.offer(way, store.hashed_anew())

    for changed in (range(COUNT), [COUNT - 1]):
        device, tensors = way.device(), make(way, rows, 0)
        store = make_store(tensors, device.layout, {}, device)
        with source(way, store) as running:
            renewing = threading.Thread(target=renew, args=(running, store))
            running.server.renew = lambda _, thread=renewing: thread.start()
            for index in changed:
                store.tensors[index].copy_(store_of(way, rows, 1).tensors[index])
            outcome = load(way, [running], rows, 1, source_wait=PATIENCE)
            assert outcome.reasons == ""
            assert outcome.said(f"source {running.address}: {CHANGED}")
            assert len(outcome.wrong) == COUNT - len(changed)  # those that are the old ones still
            [model] = running.status.models
            assert (model.weights, model.epoch) == (outcome.digest, 2)


def test_a_client_that_does_not_look_gets_no_mixture_of_two_epochs(way):
    with replaced_in_mid_transfer(way) as running:
        load(way, [running], rows, 1, verify=False, source_wait=PATIENCE).check()


def test_wrong_bytes_in_a_packed_chunk_are_noticed(way):
    with source(way, corrupting(way, models.small, times=2, wrong=4)) as running:
        load(way, [running], models.small).check_failed("wrong bytes twice in blocks 0-8 (t4)")


def test_wrong_bytes_are_not_noticed_where_nobody_looks(way):
    # What VERIFY is for.
    with source(way, corrupting(way, rows, times=1)) as running:
        outcome = load(way, [running], verify=False)
    assert outcome.reasons == ""
    assert outcome.wrong == ["row.7"]


def test_memory_that_nothing_was_written_to_is_noticed(way):
    store = tapped(way, rows, lambda index, count: torch.zeros_like(tensors[index]))
    tensors = store_of(way, rows).readable
    with source(way, store) as running:
        load(way, [running]).check_failed(CHANGED)


def test_chunks_in_the_wrong_order_are_noticed(way):
    tensors = store_of(way, rows).readable
    with source(way, tapped(way, rows, lambda index, count: tensors[index ^ 1])) as running:
        load(way, [running]).check_failed(CHANGED)


def test_weights_that_change_while_they_are_sent_are_not_loaded(way):
    device, tensors = way.device(), make(way, models.packed, 0)
    store = make_store(tensors, device.layout, {}, device)

    def change(index, count):
        if count == 300:
            for tensor in store.tensors[300:]:
                tensor.zero_()

    with source(way, tapped(way, store, change)) as running, source(way, models.packed) as good:
        load(way, [running, good], models.packed, **ONE).check()
        load(way, [running], models.packed).check_failed("cannot_serve: the weights have changed")


@pytest.mark.ways(Way.HTTP, Way.STREAM)
@pytest.mark.parametrize("seed", range(3))
def test_any_flipped_bit_is_noticed(way, seed):
    chance = random.Random(seed)
    tensors = store_of(way, models.assorted).readable
    at = chance.randrange(len(tensors))

    def flip(index, count):
        if index != at or count in flips or not tensors[index].numel():
            return None
        flips.append(count)
        if len(flips) > 1:
            return None
        copy = tensors[index].clone(memory_format=torch.contiguous_format)
        data = copy.view(-1).view(torch.uint8)
        data[chance.randrange(len(data))].bitwise_xor_(1 << chance.randrange(8))
        return copy

    flips = []
    with source(way, tapped(way, models.assorted, flip)) as running:
        load(way, [running], models.assorted).check()
        until(lambda: running.sessions == 0)
        assert not flips or running.status.bytes_sent > running.store.blocks.nbytes


# Digests that are lies


def lying(way, block=7):
    """A store one of whose digests is wrong, while its weights digest is right."""
    store = fresh(store_of(way, rows))
    of_blocks = bytearray(store.digests.blocks)
    of_blocks[16 * block] ^= 1
    store.digests = Digests(bytes(of_blocks), store.digests.weights)
    return store


def test_digests_that_do_not_make_the_weights_digest_drop_the_source(way):
    second = tapped(way, rows)
    with source(way, lying(way)) as liar, source(way, second) as honest:
        outcome = load(way, [liar, honest], **ONE).check()
    assert outcome.said(f"source {liar.address}: manifest and block digests make ")
    assert sorted(second.readable.read) == list(range(COUNT))


def test_digests_of_other_weights_do_not_bring_them(way):
    # All that is sent is consistent, and is not what WEIGHTS_DIGEST says.
    store, pinned = store_of(way, rows, 1), store_of(way, rows, 0).digests.weights
    with source(way, store) as running:
        load(way, [running], weights_digest=(pinned,)).check_failed(
            f"its weights are {store.digests.weights} of "
        )
    with source(way, rows, 0) as running:
        load(way, [running], weights_digest=(store.digests.weights, pinned)).check()


def test_a_source_that_does_not_know_yet_what_its_ranks_have_is_asked_again(way):
    who, store = identity(way, tp=2), fresh(store_of(way, rows))
    every = {0: store.digests.weights, 1: store.digests.weights[:-1] + "0"}
    told = iter([{0: every[0]}])
    with source(way, store, who=who) as running:
        offer = Offer(who, store, ranks=lambda: next(told, every))
        running.server._offers[who.group] = offer
        pinned = {"weights_digest": (of_instance(every),), "source_wait": PATIENCE}
        outcome = load(way, [running], who=who, **pinned).check()
    assert outcome.said("does not say yet what all of its ranks have")


# Faults at random, the same ones every time

FAULTS = ["none", "fails", "stalls", "withdraws", "corrupts once", "corrupts", "lies", "other"]


@contextlib.contextmanager
def faulty(way, fault, after, over):
    """A source with a fault that shows when it sends its `after`th chunk."""

    def tap(index, count):
        if count == after:
            if fault == "fails":
                raise RuntimeError("injected failure")
            if fault == "stalls":
                over.wait(30)
            if fault == "withdraws":
                store.withdraw(Withdrawn("the weights are being replaced"))

    store = {
        "corrupts once": lambda: corrupting(way, rows, 1, wrong=after),
        "corrupts": lambda: corrupting(way, rows, 99, wrong=after),
        "lies": lambda: lying(way, after),
        "other": lambda: fresh(store_of(way, rows, 1)),
    }.get(fault, lambda: tapped(way, rows, tap))()
    with source(way, store, progress_timeout=SOON) as running:
        yield running


@pytest.mark.parametrize("seed", range(8))
def test_whatever_goes_wrong_with_some_sources_a_good_one_is_enough(way, seed, over):
    chance = random.Random(seed)
    faults = [
        (chance.choice(FAULTS), chance.randrange(COUNT)) for _ in range(chance.randrange(1, 5))
    ]
    with contextlib.ExitStack() as stack:
        sources = [stack.enter_context(faulty(way, *fault, over)) for fault in faults]
        sources.append(stack.enter_context(source(way)))
        stack.callback(over.set)
        outcome = load(way, sources, max_sources=chance.choice([1, 2, 4]), progress_timeout=SOON)
        over.set()
        if outcome.digest == store_of(way, rows, 1).digests.weights:
            assert len(outcome.wrong) == COUNT, "weights are mixed"
        else:
            outcome.check()
        for running in sources:
            until(lambda running=running: running.sessions == 0)


# Many clients


def test_the_next_client_can_come_at_once(way):
    with source(way, max_sessions=1) as running:
        for _ in range(5):
            load(way, [running]).check()
            assert until(lambda: running.sessions == 0) < 1
