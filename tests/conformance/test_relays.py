"""Clients pass on what they have got while the rest is on its way."""

import contextlib
import dataclasses
import os
import signal

import pytest

from vllm_ascend.model_loader.netloader.errors import SourceBusy
from vllm_ascend.model_loader.netloader.executor import scheduler
from vllm_ascend.model_loader.netloader.interaction import api, source_queue
from vllm_ascend.model_loader.netloader.interaction.api import Join
from vllm_ascend.model_loader.netloader.interaction.client import ElasticClient
from vllm_ascend.model_loader.netloader.loading import sessions
from vllm_ascend.model_loader.netloader.utils import parse_address

from . import sides
from .faults import holding_back, lie
from .fleet import PATIENT, cut_off, fleet, load_and_relay
from .models import ROW, many_rows, rows
from .sides import PATIENCE, identity, log_lines, until
from .ways import Way

pytestmark = pytest.mark.ways(Way.HTTP)
in_groups_too = pytest.mark.ways(Way.HTTP, Way.STREAM)

COPIES = 1.2
_LONG = 10 * PATIENCE  # seconds that no test waits for
ALL = 64  # blocks of `many_rows`


def source(way, model, **config):
    return sides.source(way, model, **PATIENT | config)


def start(replicas, *sources):
    for replica in replicas:
        replica.start(sources)


def check(replicas):
    for replica in replicas:
        replica.check()


def blocks_of(replicas):
    """Which blocks exist at some of the replicas."""
    stores = [replica.filling for replica in replicas]
    return {block for store in stores if store for block in range(ALL) if store._here[block]}


def dial(address):
    return ElasticClient.connect(address, connect=5.0, handshake=5.0, progress=5.0)


@pytest.fixture
def patience(monkeypatch):
    """On a busy machine a client may get nothing for seconds, though it could."""
    monkeypatch.setattr(scheduler, "STARVED", PATIENCE)


# What is passed on


@in_groups_too
def test_a_source_sends_far_less_than_a_copy_to_each_of_four_that_start_together(way, patience):
    # A quarter of so few blocks is asked for ahead in each group, also once all were sent.
    most = 2.5 if way.in_groups else COPIES
    with source(way, many_rows, max_send_rate=64 * ROW) as seed, fleet(way, 4) as replicas:
        start(replicas, seed)
        check(replicas)
        assert seed.status.bytes_sent <= most * seed.store.blocks.nbytes
        if not way.in_groups:
            assert all("), " in replica.gave for replica in replicas)  # from several


def test_those_for_whom_the_source_has_no_place_load_from_those_for_whom_it_has(way, patience):
    with (
        source(way, many_rows, max_send_rate=128 * ROW, max_sessions=1) as seed,
        fleet(way, 3) as replicas,
    ):
        start(replicas, seed)
        check(replicas)
        assert any(str(seed.address) not in replica.gave for replica in replicas)
        assert seed.status.bytes_sent <= COPIES * seed.store.blocks.nbytes


def test_other_weights_than_the_source_has_are_not_taken_from_those_whom_it_names(way):
    with (
        source(way, many_rows, max_sessions=1) as seed,
        sides.source(way, many_rows, seed=1, **PATIENT) as other,
        fleet(way, 1, max_sources=4) as [replica],
    ):
        peer = api.Peer(str(other.address), "another process")
        seed.server.know(seed.store.digests.weights, peer)
        with dial(seed.address) as first:
            first.join(Join(identity(way)))
            with log_lines() as lines:
                start([replica], seed)
                until(lambda: any("which no source in SOURCE has" in line for line in lines))
        replica.check()
        assert replica.gave == str(seed.address)


def test_a_client_that_passes_nothing_on_gets_all_from_the_source(way):
    with source(way, many_rows) as seed, fleet(way, 1, verify=False) as [alone]:
        alone.start([seed])
        alone.check()
        assert alone.gave == str(seed.address)


def test_an_incomplete_source_says_which_blocks_it_has_as_they_come(way):
    with source(way, many_rows) as seed, fleet(way, 1) as [relay]:
        with holding_back(seed.server, ALL // 2):
            relay.start([seed])
            until(lambda: relay.filling is not None)
            weights, version, told = seed.store.digests.weights, 0, set()
            with dial(relay.address) as client:
                assert [model.state for model in client.status().models] == ["loading"]
                while len(told) < ALL // 2:
                    have = client.have(weights, version, 5)
                    new = {b for first, last in have.runs for b in range(first, last + 1)}
                    assert new
                    assert not new & told
                    told |= new
                    version = have.version
                assert client.have(weights, version, 0) == api.Have(version, [], False)
        relay.check()


def test_the_peers_of_a_source_are_those_that_load_from_it(way):
    with source(way, many_rows, max_send_rate=64 * ROW) as seed, fleet(way, 2) as replicas:
        start(replicas, seed)
        with dial(seed.address) as client:
            weights = seed.store.digests.weights
            until(lambda: len(client.peers(weights)) == 2)
            assert {peer.address for peer in client.peers(weights)} == {
                str(replica.address) for replica in replicas
            }
            assert {peer.instance for peer in client.peers(weights)} == {"replica 0", "replica 1"}
            assert client.peers("xxh3_128:" + "0" * 32) == []
        check(replicas)


def test_who_is_refused_for_now_hears_of_others(way):
    with (
        source(way, many_rows, max_send_rate=64 * ROW, max_sessions=1) as seed,
        fleet(way, 1) as [relay],
    ):
        relay.start([seed])
        until(lambda: relay.filling is not None)
        with dial(seed.address) as client, pytest.raises(SourceBusy) as refused:
            client.join(Join(identity(way)))
        assert refused.value.peers == ((str(relay.address), "replica 0"),)
        relay.check()


@in_groups_too
def test_while_weights_are_made_ready_nobody_reads_them_and_after_that_they_are_served(way):
    with source(way, rows) as seed, fleet(way, 2, rows) as [first, second]:
        first.hold = True
        first.start([seed])
        until(lambda: first.holding.is_set())
        with dial(first.address) as client, pytest.raises(SourceBusy, match="preparing"):
            client.join(Join(identity(way)))
        with log_lines() as lines:
            second.start([first])
            until(lambda: any("answered preparing" in line for line in lines))
            first.go_on.set()
            first.check()
            second.check()
        assert str(first.address) in second.gave


def test_a_client_asks_its_sources_for_others_while_it_loads(way):
    with (
        source(way, many_rows) as seed,
        source(way, many_rows) as other,
        fleet(way, 1) as [client],
        holding_back(seed.server, 3),
    ):
        client.start([seed])
        until(lambda: seed.status.bytes_sent > 2 * ROW)
        peer = api.Peer(str(other.address), other.server.process)
        seed.server.know(seed.store.digests.weights, peer)
        client.check()
        assert str(other.address) in client.gave


@in_groups_too
def test_the_log_says_what_was_relayed(way):
    with source(way, many_rows, max_send_rate=128 * ROW) as seed, fleet(way, 3) as replicas:
        with log_lines() as lines:
            start(replicas, seed)
            check(replicas)
        assert any(" loaded " in line and ", relayed " in line for line in lines)


def test_an_instance_does_not_load_from_itself(way):
    with source(way, many_rows) as seed, fleet(way, 1) as [replica]:
        with log_lines() as lines:
            start([replica], replica, seed)
            check([replica])
        assert replica.gave == str(seed.address)
        assert any(f"{replica.address}: this is the instance itself" in line for line in lines)


def tell_ranks(server, ranks):
    [(group, offer)] = server._offers.items()
    server._offers[group] = dataclasses.replace(offer, ranks=lambda: ranks)


def test_what_ranks_belong_together_is_what_sources_say_and_not_those_whom_they_name(way):
    with (
        source(way, many_rows, max_sessions=1) as seed,
        source(way, many_rows) as other,
        fleet(way, 1) as [replica],
        dial(seed.address) as first,
    ):
        weights = seed.store.digests.weights
        ranks = {0: weights, 1: "xxh3_128:" + "1" * 32}
        tell_ranks(seed.server, ranks)
        tell_ranks(other.server, {0: weights, 1: "xxh3_128:" + "2" * 32})
        seed.server.know(weights, api.Peer(str(other.address), "another process"))
        first.join(Join(identity(way)))
        start([replica], seed)
        check([replica])
        assert replica.gave == str(other.address)
        assert replica.lists == [ranks]


# Those that are slow


def test_what_a_slow_source_holds_is_brought_by_another(way):
    with (
        source(way, many_rows) as slow,
        source(way, many_rows) as fast,
        fleet(way, 1) as [client],
        holding_back(slow.server, 3),
    ):
        with log_lines() as lines:
            client.start([slow, fast])
            client.check()
        assert f"{slow.address} (" in client.gave
        assert any(f"{slow.address}: slow: " in line for line in lines)
        assert fast.status.bytes_sent + slow.status.bytes_sent <= COPIES * fast.store.blocks.nbytes


def test_one_that_others_have_named_and_that_trickles_keeps_no_load_from_the_disk(
    way, monkeypatch, over
):
    monkeypatch.setattr(source_queue, "_GRACE", 1.0)
    with (
        source(way, many_rows, max_sessions=1) as seed,
        source(way, many_rows) as other,
        fleet(way, 1, source_wait=1.0) as [replica],
        dial(seed.address) as first,
    ):
        pieces = other.server._pieces

        def trickle(served, run):
            over.wait(1.0)
            yield from pieces(served, run)

        other.server._pieces = trickle
        peer = api.Peer(str(other.address), other.server.process)
        seed.server.know(seed.store.digests.weights, peer)
        first.join(Join(identity(way)))
        start([replica], seed)
        replica.thread.join(PATIENCE)
        assert f"{other.address}: too slow, and SOURCE_WAIT is over" in replica.reasons


def test_a_relay_that_has_nothing_new_is_left_where_there_is_one_thread_and_another_source(way):
    with (
        source(way, many_rows) as seed,
        source(way, many_rows) as other,
        fleet(way, 2, max_sources=1, progress_timeout=_LONG) as [relay, client],
        holding_back(seed.server, 3),
    ):
        relay.start([seed])
        until(lambda: relay.filling is not None)
        client.start([relay, other])
        until(lambda: other.status.bytes_sent, PATIENCE / 2)  # the relay has news after that
        client.check()


def test_of_a_load_that_others_leave_without_a_source_nothing_is_left(way, monkeypatch, over):
    """A relay that still trickles then is no reason to keep the memory that was to be filled."""
    monkeypatch.setattr(sessions, "_ORPHANED", (1.0, 1.0))
    with (
        source(way, many_rows, max_send_rate=64 * ROW) as seed,
        fleet(way, 2, source_wait=60.0, progress_timeout=2.0) as [relay, victim],
    ):
        pieces = relay.server._pieces

        def trickle(served, run):
            if relay.filling.blocks_here <= 8:
                yield from pieces(served, run)
            while not over.wait(0.2):
                yield [memoryview(b"x")]

        relay.server._pieces = trickle
        relay.start([seed])
        until(lambda: relay.filling is not None and relay.filling.blocks_here > 8)
        victim.start([seed, relay])
        until(lambda: victim.filling is not None and victim.filling.blocks_here > 1)
        cut_off(seed.server)
        assert relay.server._server.sessions == 1
        victim.thread.join(PATIENCE)
        until(lambda: relay.server._server.sessions == 0, PATIENCE / 4)


# Those that go


@in_groups_too
def test_a_relay_that_dies_costs_what_was_on_its_way(way, started, tmp_path):
    prefix = f"{tmp_path}/relay-"
    process = started(0)
    with source(way, many_rows, max_send_rate=64 * ROW) as seed, fleet(way, 3) as replicas:
        process.start(load_and_relay, way, [seed.address], output_prefix=prefix)
        until(lambda: os.path.exists(f"{prefix}0.txt"))
        with open(f"{prefix}0.txt") as file:
            address = parse_address(file.read())
        start(replicas, seed)

        def has_a_quarter():
            with contextlib.suppress(SourceBusy), dial(address) as client:
                return client.have(seed.store.digests.weights, 0, 5).version > ALL // 4
            return False  # it has not begun

        until(has_a_quarter)
        process.signal(signal.SIGKILL)
        check(replicas)


@in_groups_too
def test_when_the_source_dies_after_every_block_exists_somewhere_all_complete(way, started):
    process = started(0)
    address = process.call(_serve, way)
    with fleet(way, 3, max_send_rate=32 * ROW) as replicas:
        start(replicas, address)
        until(lambda: len(blocks_of(replicas)) == ALL)
        process.signal(signal.SIGKILL)
        complete = [replica for replica in replicas if replica.filling.complete]
        check(replicas)
        assert len(complete) < len(replicas)


def _serve(way):
    from .sides import serve

    return serve(way, many_rows, max_send_rate=64 * ROW, **PATIENT)


def test_those_that_lack_the_same_blocks_when_the_source_dies_do_not_wait_for_each_other(way):
    with (
        source(way, many_rows, max_send_rate=32 * ROW) as seed,
        fleet(way, 3, source_wait=_LONG, progress_timeout=1.0) as replicas,
    ):
        start(replicas, seed)
        until(lambda: len(blocks_of(replicas)) > ALL // 4)
        cut_off(seed.server)
        with log_lines() as lines:
            for replica in replicas:
                replica.thread.join(PATIENCE)
                assert not replica.thread.is_alive()
        assert all(replica.reasons for replica in replicas)
        assert any("no source has all blocks any more" in line for line in lines)


# Those that lie


def claim(replica):
    """Say that every block is here."""
    have = replica.server.have

    def false(session, weights, since, wait):
        have(session, weights, since, 0)
        return api.Have(1, [(0, ALL - 1)], True)

    replica.server.have = false


@in_groups_too
@pytest.mark.parametrize("lies", [lie, claim])
def test_a_relay_that_lies_costs_its_own_session_and_is_not_used_again(way, lies):
    with source(way, many_rows, max_send_rate=64 * ROW) as seed, fleet(way, 3) as replicas:
        liar, *honest = replicas
        lies(liar)
        liar.start([seed])
        until(lambda: liar.filling is not None)
        with log_lines() as lines:
            start(honest, seed)
            check(replicas)
        assert any(str(seed.address) in replica.gave for replica in honest)
        about = f"source {liar.address}: "
        assert any(about in line for line in lines)
        assert sum(f"{about}wrong bytes" in line for line in lines) <= len(honest)
        if lies is lie:
            assert not any(str(liar.address) in replica.gave for replica in honest)


def spin(asked):
    return api.Have(1, [], False)


def repeat(asked):
    return api.Have(1, [(0, 2**53)] * api.MAX_NEWS, False)


@pytest.mark.parametrize(
    ("answer", "text"), [(spin, "does not wait"), (repeat, "more news than there are blocks")]
)
def test_a_relay_whose_news_are_none_is_left(way, answer, text):
    with source(way, many_rows, max_send_rate=64 * ROW) as seed, fleet(way, 2) as [liar, honest]:
        liar.server.have = lambda *asked: answer(asked)
        liar.start([seed])
        until(lambda: liar.filling is not None)
        with log_lines() as lines:
            honest.start([seed])
            check([liar, honest])
        assert any(f"source {liar.address}: " in line and text in line for line in lines)


def test_a_relay_that_lies_on_a_further_connection_is_left(way):
    with (
        source(way, many_rows, max_send_rate=64 * ROW) as seed,
        fleet(way, 2, connections=2) as [liar, honest],
    ):
        join, blocks, joined = liar.server.join, liar.server.blocks, []

        def let_in(session, asked):
            joined.append(session)
            return join(session, asked)

        def answer(session, weights, first, last):
            run = blocks(session, weights, first, last)
            right = session is joined[0]
            return run if right else dataclasses.replace(run, chunks=_spoilt(run.chunks))

        liar.server.join, liar.server.blocks = let_in, answer
        liar.start([seed])
        until(lambda: liar.filling is not None)
        with log_lines() as lines:
            honest.start([seed])
            check([liar, honest])
        assert any(f"source {liar.address}: wrong bytes" in line for line in lines)


def test_a_connection_for_news_that_ends_is_made_anew(way):
    with source(way, many_rows, max_send_rate=64 * ROW) as seed, fleet(way, 2) as [relay, other]:
        have, fails = relay.server.have, iter([True, True])

        def news(session, *asked):
            if next(fails, False):
                session.cut()
            return have(session, *asked)

        relay.server.have = news
        relay.start([seed])
        until(lambda: relay.filling is not None)
        with log_lines() as lines:
            other.start([seed])
            check([relay, other])
        assert next(fails, None) is None
        assert not any(f"source {relay.address}: closed" in line for line in lines)


def _spoilt(chunks):
    for views in chunks:
        yield [bytes(byte ^ 1 for byte in bytes(view)) for view in views]
