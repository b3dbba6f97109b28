"""What a source answers, without the connections around it."""

import contextlib
import itertools
import logging
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest
import torch

from tests.certificates import SECRET, secret_file
from tests.identity import identity
from vllm_ascend.model_loader.netloader import serve, utils
from vllm_ascend.model_loader.netloader.config import Transport
from vllm_ascend.model_loader.netloader.errors import Withdrawn
from vllm_ascend.model_loader.netloader.executor import scheduler
from vllm_ascend.model_loader.netloader.executor.chunks.blocks import Run
from vllm_ascend.model_loader.netloader.executor.chunks.digests import combine, of_instance
from vllm_ascend.model_loader.netloader.executor.chunks.manifest import PROCESSED, Manifest
from vllm_ascend.model_loader.netloader.executor.transport.group import CLIENT, form_group
from vllm_ascend.model_loader.netloader.interaction import api, peer_book
from vllm_ascend.model_loader.netloader.interaction.api import (
    Code,
    Done,
    Endpoint,
    GroupOpened,
    Join,
    Peer,
    Refusal,
)
from vllm_ascend.model_loader.netloader.interaction.client import ElasticClient, GroupControl
from vllm_ascend.model_loader.netloader.interaction.cold_start import Phase
from vllm_ascend.model_loader.netloader.interaction.server import Session
from vllm_ascend.model_loader.netloader.port_file import PortFile
from vllm_ascend.model_loader.netloader.serve import Offer, Relay, WeightServer
from vllm_ascend.model_loader.netloader.utils import Address, logger

from .support import (
    DEVICE,
    HOST,
    MIB,
    PATIENCE,
    Clock,
    LinkDevice,
    assorted,
    bytes_of,
    incomplete,
    random_tensor,
    settings,
    store_of,
    until,
)

WHO = identity()
DRAFT = identity(group="netloader_draft")
TENSORS = {f"t{i}": random_tensor(i, torch.uint8, MIB) for i in range(12)}
ALL = 12 * MIB


class Wire:
    def __init__(self, number=1, host="192.0.2.7"):
        self.peer = Address(host, number)
        self.local_host = HOST
        self.hung_up = False
        self.ended = threading.Event()

    def cut(self):
        self.ended.set()


def session(number=1):
    return Session(Wire(number))


def server(*offers, **config):
    made = WeightServer(settings(**config), 0, HOST)
    for offer in offers:
        made.offer(offer)
    return made


def offer(who=WHO, tensors=TENSORS, device=DEVICE, **options):
    return Offer(who, store_of(tensors, device, layout=who.layout), **options)


WEIGHTS = offer().store.digests.weights


def refusal(call, *arguments):
    with pytest.raises(Refusal) as error:
        call(*arguments)
    return error.value.problem.code, str(error.value)


def join(to, who=WHO, weights=None, by=None):
    return to.join(by or session(), Join(who, weights))


def withdraw(to, who=WHO, code=Code.CHANGING, reason="the weights are being replaced"):
    to.withdraw(who.group, code, reason)


def fetched(to, weights, first, last, by=None):
    """The bytes of blocks, and the sizes of the pieces in which they come."""
    answer = to.blocks(by or session(), weights, first, last)
    pieces = [b"".join(views) for views in answer.chunks]
    assert sum(map(len, pieces)) == answer.nbytes
    return b"".join(pieces), [len(piece) for piece in pieces]


@pytest.fixture
def records():
    """What was logged, as level and text."""
    kept = []

    class Keep(logging.Handler):
        def emit(self, record):
            kept.append((record.levelname, record.getMessage()))

    handler, level = Keep(logging.DEBUG), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield kept
    logger.setLevel(level)
    logger.removeHandler(handler)


# Joins


@pytest.mark.parametrize("known", [None, WEIGHTS])
def test_a_client_gets_the_weights_digests_of_all_ranks_of_the_instance(known):
    ranks = {0: WEIGHTS, 1: "xxh3_128:01"}
    joined = join(server(offer(ranks=lambda: ranks)), weights=known)
    assert (joined.ranks, joined.manifest is msgspec.UNSET) == (ranks, known is not None)


def test_a_client_of_the_same_model_gets_manifest_and_digests():
    store = store_of(assorted(), attributes={"a.scale": 0.5})
    to = server(Offer(WHO, store))
    joined = join(to)
    assert (joined.weights, joined.epoch, joined.instance) == (
        store.digests.weights,
        1,
        to.process,
    )
    manifest = msgspec.json.decode(joined.manifest, type=Manifest)
    assert manifest == store.manifest
    algorithm = joined.weights.partition(":")[0]
    assert combine(algorithm, manifest, store.blocks, joined.blocks) == store.digests


def test_a_client_that_has_the_manifest_gets_a_yes_or_a_no():
    one = offer()
    to = server(one)
    known = one.store.digests.weights
    joined = join(to, weights=known)
    assert joined.weights == known
    assert joined.manifest is joined.blocks is msgspec.UNSET
    other = store_of({"t": torch.ones(1)}).digests.weights
    assert refusal(join, to, WHO, other) == ("other_weights", f"the weights digest is {known}")


def test_another_model_is_declined_with_each_field_and_both_values(records):
    who = identity(tp=2, dtype="torch.float16")
    with pytest.raises(Refusal) as error:
        join(server(offer()), who)
    assert error.value.code is Code.OTHER_MODEL
    assert [msgspec.structs.astuple(one) for one in error.value.problem.differences] == [
        ("tp", "2", "1"),
        ("dtype", "'torch.float16'", "'torch.bfloat16'"),
    ]
    [(level, line)] = records
    assert level == "INFO"
    assert line == (
        "NetLoader rank 0: declined 192.0.2.7:1: the models differ: "
        "tp is 2 at the client and 1 at the source: "
        "dtype is 'torch.float16' at the client and 'torch.bfloat16' at the source"
    )


def test_what_a_client_says_of_itself_is_logged_bounded_and_printable(records):
    who = identity(model="\x1b[2J\n" * 900)
    refusal(join, server(offer()), who)
    [(_, line)] = records
    assert line.isprintable()
    assert len(line) < 700


def test_a_group_that_this_instance_has_no_model_of_is_declined():
    code, message = refusal(join, server(offer()), DRAFT)
    assert code == "no_model"
    assert "there is no model of group 'netloader_draft'" in message


def test_an_instance_that_cannot_be_a_source_says_why():
    to = server(Offer(WHO, None, "post-processing has changed x"))
    assert refusal(join, to) == ("cannot_serve", "post-processing has changed x")
    # Of another model even that is none of its business.
    assert refusal(join, to, identity(model="other"))[0] == "other_model"


def test_a_client_of_a_model_that_is_still_loading_is_to_come_again(records):
    to = server(offer())
    to.expect(DRAFT.group)
    with pytest.raises(Refusal) as error:
        join(to, DRAFT)
    assert error.value.code is Code.LOADING
    assert [level for level, _ in records] == ["DEBUG"]  # it asks many times
    to.offer(offer(DRAFT))
    assert join(to, DRAFT).epoch == 1
    to.expect(DRAFT.group)
    join(to, DRAFT)  # which is there already


def test_target_and_draft_are_served_side_by_side():
    target, draft = offer(), offer(DRAFT, {"d": torch.ones(3)})
    to = server(target, draft)
    for one in (target, draft):
        weights = one.store.digests.weights
        assert join(to, one.identity).weights == weights
        data, _ = fetched(to, weights, 0, one.store.blocks.count - 1)
        assert len(data) == one.store.blocks.nbytes
    withdraw(to, DRAFT)
    join(to)
    assert refusal(join, to, DRAFT)[0] == "changing"


def test_a_setting_that_is_nested_too_deep_to_be_told_is_refused():
    to, codes, body = server(offer()), set(), msgspec.json.encode(Join(WHO))
    for depth in itertools.count(500):
        nested = b"[" * depth + b"]" * depth
        try:
            asked = api.decode(body.replace(b'"hidden_size":4', b'"hidden_size":' + nested), Join)
        except Refusal:
            break  # it is not even decoded
        codes.add(refusal(to.join, session(), asked)[0])
    assert codes == {"other_model", "bad_request"}


@pytest.fixture
def passing(monkeypatch):
    """Time goes on only where a test lets it."""
    clock = Clock()
    monkeypatch.setattr(utils, "time", clock)
    return clock


def test_clients_that_are_refused_again_and_again_do_not_fill_the_log(records, passing):
    to = server(offer())
    other = identity(config={f"setting_{number}": number for number in range(20)})
    for _ in range(100):
        refusal(join, to, other)
    refusal(join, to, DRAFT)
    refusal(to.join, Session(Wire(host="192.0.2.8")), Join(other))
    passing.sleep(10)
    refusal(join, to, other)
    refused = [text for _, text in records if "declined" in text]
    who = ["192.0.2.7:1: the models", "192.0.2.7:1: there is no", "192.0.2.8:1", "192.0.2.7:1"]
    assert [w in text for w, text in zip(who, refused, strict=True)] == [True] * 4
    assert refused[3].endswith(": and 15 more (99 more since the last line like this)")
    assert refused[3].count("config.") == 5


@pytest.mark.parametrize("how", [None, Done(complete=False, reason="x"), Done(complete=True)])
def test_clients_that_end_again_and_again_without_all_do_not_fill_the_log(records, passing, how):
    one = offer()
    to = server(one)

    def end(blocks):
        client = session()
        join(to, by=client)
        if blocks:
            fetched(to, one.store.digests.weights, 0, blocks - 1, client)
        if how is not None:
            to.done(client, how)
        client.close()

    for _ in range(100):
        end(0)
    passing.sleep(10)
    end(0)
    sent = [text for _, text in records if "sent " in text]
    assert len(sent) == 2
    assert sent[1].endswith(" (99 more since the last line like this)")
    for _ in range(3):
        end(12)
    complete = how is not None and how.complete
    assert len([text for _, text in records if "sent 12.6" in text]) == 3 * complete


# Blocks


def test_any_run_of_blocks_is_their_bytes():
    one = offer(tensors=assorted())
    to, weights, blocks = server(one), one.store.digests.weights, one.store.blocks
    whole = b"".join(bytes(bytes_of(tensor).tolist()) for tensor in one.store.tensors)
    data, _ = fetched(to, weights, 0, blocks.count - 1)
    assert data == whole
    at = 0
    for block in range(blocks.count):
        data, _ = fetched(to, weights, block, block)
        assert data == whole[at : at + len(data)]
        at += len(data)


def test_a_run_goes_out_in_pieces_that_the_rate_limiter_lets_go_one_by_one():
    one = offer()
    _, pieces = fetched(server(one), one.store.digests.weights, 0, 10)
    assert pieces == [8 * MIB, 3 * MIB]
    slow = server(one, max_send_rate=1 << 30, max_sessions=200, progress_timeout=1.0)
    assert slow.config.max_message_bytes == 2 * MIB
    waited = []
    slow._limiter.wait = lambda nbytes, stop, gone: waited.append(nbytes)
    _, pieces = fetched(slow, one.store.digests.weights, 0, 4)
    assert pieces == waited == [2 * MIB, 2 * MIB, MIB]


def test_a_client_that_is_gone_gets_nothing_that_the_rate_limiter_holds_back():
    one, wire = offer(), Wire()
    slow, by = server(one, max_send_rate=MIB), Session(wire)
    fetched(slow, one.store.digests.weights, 0, 0, by)
    wire.hung_up = True
    for _ in range(100):  # and nobody waits for what they have asked for
        with pytest.raises(ConnectionResetError):
            fetched(slow, one.store.digests.weights, 0, 11, by)
    assert slow.bytes_sent == MIB
    started = time.monotonic()
    fetched(slow, one.store.digests.weights, 0, 0)
    assert time.monotonic() - started < PATIENCE


@pytest.mark.parametrize(("first", "last"), [(0, 12), (12, 12), (10**18, 10**18)])
def test_blocks_that_do_not_exist_are_out_of_range(first, last):
    one = offer()
    to = server(one)
    code, message = refusal(to.blocks, session(), one.store.digests.weights, first, last)
    assert code == "out_of_range"
    assert message == f"there are no blocks {first}-{last}; allowed: 0-11"


def test_a_store_is_served_while_it_is_being_filled():
    full = store_of(TENSORS)
    half = incomplete(full, full.tensors)
    for run in full.blocks.cut(MIB)[:6]:
        half.add(run)
    to, weights = server(Offer(WHO, half)), full.digests.weights
    joined = join(to)
    assert joined.weights == weights
    client = session()
    data, _ = fetched(to, weights, 0, 5, by=client)
    assert len(data) == 6 * MIB
    code, message = refusal(to.blocks, client, weights, 5, 6)
    assert (code, message) == ("not_here", "block 6 is not here")
    half.add(full.blocks.cut(MIB)[6])
    assert fetched(to, weights, 5, 6, by=client)[1] == [2 * MIB]


# Weights that change


def test_weights_that_are_withdrawn_are_had_no_more():
    one = offer()
    to, weights = server(one), one.store.digests.weights
    withdraw(to, WHO)
    assert refusal(join, to) == ("changing", "the weights are being replaced")
    assert refusal(to.blocks, session(), weights, 0, 0)[0] == "changed"
    assert refusal(to.open_group, session(), weights)[0] == "changed"
    assert one.store.withdrawn.is_set()


def test_a_run_that_is_on_its_way_arrives_before_its_memory_changes_and_is_the_last_one():
    one, client = offer(), session()
    to, weights = server(one), one.store.digests.weights
    got, go_on = [], threading.Event()

    def send():
        for views in to.blocks(client, weights, 0, 11).chunks:
            got.append(sum(map(len, views)))
            go_on.wait(PATIENCE)

    sending = threading.Thread(target=send)
    sending.start()
    assert until(lambda: got)
    changing = threading.Thread(target=withdraw, args=(to,))
    changing.start()
    assert one.store.withdrawn.wait(PATIENCE)
    assert refusal(join, to) == ("changing", "the weights are being replaced")
    assert changing.is_alive()
    go_on.set()
    for thread in (changing, sending):
        thread.join(PATIENCE)
    assert sum(got) == ALL
    assert not client._wire.ended.is_set()
    assert refusal(to.blocks, client, weights, 0, 0) == (
        "changed",
        "the weights are being replaced",
    )


def test_a_session_that_reads_for_too_long_is_cut_before_the_memory_changes(monkeypatch, records):
    monkeypatch.setattr(serve, "_LAST_RUNS", 0.01)
    one, client = offer(), session()
    to, weights = server(one), one.store.digests.weights
    begun = threading.Event()

    def send():
        with contextlib.closing(to.blocks(client, weights, 0, 11).chunks) as chunks:
            next(chunks)
            begun.set()
            assert client._wire.ended.wait(PATIENCE)  # as the write to a stalled client does
        client.close()

    sending = threading.Thread(target=send)
    sending.start()
    assert begun.wait(PATIENCE)
    withdraw(to)
    assert one.store.idle(0)
    assert to.status(0).sessions == []
    assert not any(level == "ERROR" for level, _ in records)
    sending.join(PATIENCE)


def test_a_session_that_cannot_be_ended_is_an_error_in_the_log(monkeypatch, records):
    monkeypatch.setattr(serve, "_LAST_RUNS", 0.01)
    monkeypatch.setattr(serve, "_UNTIL_CUT", 0.01)
    one = offer()
    to, over = server(one), threading.Event()
    chunks = []

    def send():
        chunks.append(to.blocks(session(), one.store.digests.weights, 0, 11).chunks)
        next(chunks[0])
        over.wait(PATIENCE)

    sending = threading.Thread(target=send)
    sending.start()
    assert until(lambda: one.store._readers)
    withdraw(to)
    over.set()
    sending.join(PATIENCE)
    [line] = [line for level, line in records if level == "ERROR"]
    assert "sessions still read the weights" in line


def test_whoever_asks_is_refused_with_the_reason_and_the_status_has_it():
    to = server(offer())
    withdraw(to, WHO, Code.ASLEEP, "sleep level 1")
    assert refusal(join, to) == ("asleep", "sleep level 1")
    withdraw(to, WHO, Code.CHANGING, "reload_weights")
    assert refusal(join, to) == ("changing", "reload_weights")
    [status] = to.status(0).models
    assert (status.state, status.reason) == ("changing", "reload_weights")
    assert (status.weights, status.epoch) == (None, 1)
    assert refusal(join, to, identity(rank=3))[0] == "other_model"


def test_a_model_that_was_never_a_source_keeps_its_own_reason():
    to = server(Offer(WHO, None, "no copy was kept"))
    withdraw(to, WHO)
    assert refusal(join, to) == ("cannot_serve", "no copy was kept")


def test_a_model_that_was_unloaded_is_gone_and_not_changed():
    one, client = offer(), session()
    to, weights = server(one), one.store.digests.weights
    fetched(to, weights, 0, 0, by=client)
    to.forget(WHO.group)
    assert refusal(to.blocks, client, weights, 0, 0) == (
        "gone",
        "the source has unloaded the model",
    )
    assert refusal(join, to)[0] == "no_model"


# Weights that change without notice


@pytest.fixture
def checked(monkeypatch):
    """A server whose checks need not wait, the weights, and the groups to be offered anew."""
    monkeypatch.setattr(serve, "_BETWEEN_CHECKS", 0)
    one = offer(tensors={name: tensor.clone() for name, tensor in TENSORS.items()})
    to, renewed = server(one), []
    to.renew = renewed.append
    return to, one.store, renewed


def test_blocks_that_are_right_at_the_source_change_nothing(checked, records):
    to, store, renewed = checked
    to.check(session(), store.digests.weights, 3, 3)
    assert join(to).weights == store.digests.weights
    assert renewed == [] and not any(level == "WARNING" for level, _ in records)


def test_weights_that_have_changed_without_notice_are_withdrawn_and_offered_anew(checked, records):
    to, store, renewed = checked
    store.tensors[3][0] ^= 1
    changed = "changed", "the weights have changed since they were offered"
    assert refusal(to.check, session(), store.digests.weights, 3, 3) == changed
    assert renewed == [WHO.group]
    assert refusal(join, to) == ("changing", changed[1])
    assert refusal(to.check, session(2), store.digests.weights, 3, 3)[0] == "changed"
    assert renewed == [WHO.group]
    [line] = [line for level, line in records if level == "WARNING"]
    assert "the weights have changed without notice: found in t3, which 192.0.2.7:1" in line


def test_regions_go_out_in_pieces_of_a_message_at_most(monkeypatch):
    sizes = []

    class View:
        def nbytes_of(self, regions):
            return 9

        def pieces(self, regions, nbytes):
            sizes.append(nbytes)
            return []

    to = server(offer(view=View()))
    for nbytes in (5, 1 << 30):
        monkeypatch.setattr(type(to.config), "max_message_bytes", nbytes)
        [*to.regions(session(), WEIGHTS, []).chunks]
    assert sizes == [5, 2 << 20]


def test_weights_that_nobody_hashes_anew_are_given_up_once_they_have_changed(checked):
    _, store, _ = checked
    to = server(Offer(WHO, store))
    store.tensors[3][0] ^= 1
    changed = "the weights have changed since they were offered"
    assert refusal(to.check, session(), store.digests.weights, 3, 3) == ("changed", changed)
    assert refusal(join, to) == ("cannot_serve", changed)


def test_whoever_withdraws_weights_waits_for_their_readers_also_if_they_were_found_changed(checked):
    to, store, _ = checked
    store.tensors[3][0] ^= 1
    reading, over = threading.Event(), threading.Event()

    def read():
        with store.reading(Run(0, 0)):
            reading.set()
            over.wait(PATIENCE)

    threading.Thread(target=read, daemon=True).start()
    assert reading.wait(PATIENCE)
    assert refusal(to.check, session(), store.digests.weights, 3, 3)[0] == "changed"
    asleep = WHO.group, api.Code.ASLEEP, "it sleeps"
    withdrawing = threading.Thread(target=to.withdraw, args=asleep, daemon=True)
    withdrawing.start()
    withdrawing.join(0.2)
    assert withdrawing.is_alive()
    over.set()
    withdrawing.join(PATIENCE)
    assert not withdrawing.is_alive()


def test_a_client_cannot_have_more_checked_than_a_few_blocks_a_second(records):
    one, client = offer(tensors={"t": torch.zeros(20 * MIB, dtype=torch.uint8)}), session()
    to, weights = server(one), one.store.digests.weights
    assert refusal(to.check, client, weights, 0, 16)[0] == "out_of_range"
    assert refusal(to.check, client, weights, 20, 20)[0] == "out_of_range"
    read = []
    one.store.wrong = lambda run: read.append(run) or []
    to.check(client, weights, 0, 15)
    for _ in range(3):
        assert refusal(to.check, client, weights, 0, 0)[0] == "busy"
    assert len(read) == 1


def test_a_new_offer_takes_the_place_of_the_one_before_in_a_new_epoch():
    first, second = offer(), offer(tensors={"t": torch.ones(5)})
    to = server(first)
    to.offer(second)
    joined = join(to)
    assert (joined.weights, joined.epoch) == (second.store.digests.weights, 2)
    assert refusal(to.blocks, session(), first.store.digests.weights, 0, 0)[0] == "changed"
    assert first.store.withdrawn.is_set()


def test_the_same_weights_offered_anew_are_had_again_by_whoever_is_connected():
    first, client = offer(), session()
    to, weights = server(first), first.store.digests.weights
    fetched(to, weights, 0, 0, by=client)
    withdraw(to, WHO)
    refusal(to.blocks, client, weights, 0, 0)
    to.offer(Offer(WHO, first.store.with_tensors(first.store.tensors)))
    assert len(fetched(to, weights, 0, 3, by=client)[0]) == 4 * MIB
    # Nothing that was sent is forgotten.
    assert to.status(1).bytes_sent == 5 * MIB
    client.close()
    assert to.status(0).bytes_sent == 5 * MIB


def test_withdrawing_what_is_not_there_changes_nothing():
    to = server()
    withdraw(to, WHO)
    assert refusal(join, to)[0] == "no_model"


# Status


def test_status_says_what_is_served_and_how_far_each_session_is():
    ranks = {0: "xxh3_128:00 of before", 1: "xxh3_128:01"}
    one, draft = (
        offer(loaded_from="192.0.2.9:1", ranks=lambda: ranks),
        Offer(DRAFT, None, "no copy was kept"),
    )
    to, weights = server(one, draft, max_sessions=7), one.store.digests.weights
    client, other = session(1), session(2)
    chunks = to.blocks(client, weights, 0, 11).chunks
    assert to.status(2).sessions[0].bytes_sent == 0
    next(chunks)
    fetched(to, weights, 3, 3, by=other)
    status = to.status(2)
    ranks |= {0: weights}
    all_here, nothing = (ALL, 12, 12, "9" * 12, []), (0, 0, 0, "", [])
    assert [msgspec.structs.astuple(model) for model in status.models] == [
        (
            *(WHO, "serving", "", weights, 1, "192.0.2.9:1", of_instance(ranks), ranks, {}),
            *(False, *all_here),
        ),
        (DRAFT, "cannot_serve", "no copy was kept", None, 1, "disk", None, {}, {}, False, *nothing),
    ]
    assert [(one.peer, one.weights, one.bytes_sent) for one in status.sessions] == [
        ("192.0.2.7:1", weights, 8 * MIB),
        ("192.0.2.7:2", weights, MIB),
    ]
    assert (status.places, status.places_taken, status.bytes_sent) == (7, 2, 9 * MIB)
    assert (status.instance, status.rank) == (to.process, 0)
    assert msgspec.json.decode(msgspec.json.encode(status), type=type(status)) == status
    client.close()
    status = to.status(1)
    assert [one.peer for one in status.sessions] == ["192.0.2.7:2"]
    assert status.bytes_sent == 9 * MIB


def test_nobody_waits_while_the_status_asks_other_ranks():
    def ask():
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(lambda: to.expect("another") or {}).result(PATIENCE)

    to = server(offer(ranks=ask, endpoints=ask))
    assert to.status(0).models[0].ranks == {}


# The end of a session


def ended(to, client, records):
    client.close()
    return records[-1]


def test_a_complete_session_is_one_line_at_info(records):
    one = offer()
    to, weights, client = server(one), one.store.digests.weights, session()
    join(to, by=client)
    fetched(to, weights, 0, 11, by=client)
    to.done(client, Done(complete=True))
    level, line = ended(to, client, records)
    assert level == "INFO"
    assert line.startswith("NetLoader rank 0: sent 12.6 MB of 12.6 MB (12 tensors) in ")
    assert line.endswith(f" to 192.0.2.7:1, weights digest {weights}: complete")
    assert len(records) == 1


@pytest.mark.parametrize(
    ("done", "end"),
    [
        (None, "the client went away"),
        (
            Done(complete=False, reason="wrong\nbytes \x1b[2J" + "x" * 400),
            "the client gave up: wrong bytes [2J" + "x" * 284 + "...",
        ),
    ],
)
def test_a_session_that_was_not_completed_is_a_warning_with_how_far_it_came(done, end, records):
    one = offer()
    to, weights, client = server(one), one.store.digests.weights, session()
    fetched(to, weights, 0, 0, by=client)
    if done is not None:
        to.done(client, done)
    level, line = ended(to, client, records)
    assert level == "WARNING"
    assert "sent 1.0 MB of 12.6 MB (12 tensors) in " in line
    assert line.partition(f"weights digest {weights}: ")[2] == end


def test_a_client_that_joined_and_fetched_from_others_alone_has_completed_its_session(records):
    to, client = server(offer()), session()
    join(to, by=client)
    to.done(client, Done(complete=True))
    level, line = ended(to, client, records)
    assert (level, "sent 0.0 MB of 12.6 MB" in line) == ("INFO", True)


def test_a_visitor_that_was_declined_has_no_session(records):
    to, visitor = server(offer()), session()
    refusal(join, to, DRAFT, None, visitor)
    to.done(visitor, Done(complete=True))
    visitor.close()
    assert len(records) == 1
    assert to.status(0).sessions == []


# Groups


def on_accelerator(**config):
    device = LinkDevice()
    who = identity(layout=PROCESSED)
    one = offer(who, device=device)
    return server(one, **config), one.store, device


def test_where_memory_is_the_hosts_there_are_no_groups():
    one = offer()
    to = server(one)
    assert refusal(to.open_group, session(), one.store.digests.weights)[0] == "no_groups"


def test_where_the_operator_wants_http_there_are_no_groups():
    to, store, _ = on_accelerator(transport=Transport.HTTP)
    assert refusal(to.open_group, session(), store.digests.weights)[0] == "no_groups"


class Connection:
    """In the place of an `ElasticClient`: it asks the source's end of the group directly."""

    def __init__(self, group):
        self._group = group

    def exchange(self, name, values):
        return self._group.exchange(values)


@pytest.fixture
def grouped():
    """A session in a group: the server, the source's end and the client's."""
    to, store, _ = on_accelerator()
    client = session()
    group = to.open_group(client, store.digests.weights)
    control = GroupControl(Connection(group), GroupOpened("0", group.max_bytes))
    ours = form_group(
        LinkDevice(),
        control.tell,
        control.hear,
        CLIENT,
        HOST,
        handshake=PATIENCE,
        progress=PATIENCE,
        gone=lambda: False,
    )
    yield to, group, ours, client
    ours.close()
    client.close()


def test_runs_go_out_through_a_group_and_count(grouped):
    to, group, ours, _ = grouped
    assert group.sizes([(0, 1), (5, 5)]) == [2 * MIB, MIB]
    received = [torch.empty(n * MIB, dtype=torch.uint8) for n in (2, 1)]
    for message in received:
        ours.receive(message)
    group.send([(0, 1), (5, 5)])
    for _ in received:
        ours.wait()
    group.settle()
    assert torch.equal(received[0], torch.cat([TENSORS["t0"], TENSORS["t1"]]))
    assert torch.equal(received[1], TENSORS["t5"])
    assert to.status(1).sessions[0].bytes_sent == 3 * MIB


@pytest.mark.parametrize("runs", [[(0, 0), (3, 12)], [(5, 4)], [(2**53, 2**53)]])
def test_blocks_that_do_not_exist_are_refused_before_any_is_sent(grouped, runs):
    _, group, _, _ = grouped
    code, message = refusal(group.sizes, runs)
    assert code == "out_of_range"
    assert "blocks 0-11, 67108864 bytes of them at once" in message


def test_a_run_over_the_limit_is_refused():
    to, store, _ = on_accelerator(max_send_rate=1 << 30, max_sessions=200, progress_timeout=1.0)
    client = session()
    group = to.open_group(client, store.digests.weights)
    assert group.max_bytes == 2 * MIB
    assert group.sizes([(0, 1)]) == [2 * MIB]
    assert refusal(group.sizes, [(0, 2)])[0] == "out_of_range"
    client.close()


def test_weights_withdrawn_meanwhile_are_not_sent_through_a_group(grouped):
    to, group, _, _ = grouped
    group.sizes([(0, 0)])
    withdraw(to, WHO)
    assert refusal(group.sizes, [(0, 0)])[0] == "changed"
    assert refusal(group.send, [(0, 0)])[0] == "changed"


def test_a_client_that_has_left_its_group_is_told_that_the_transfer_failed(grouped):
    _, group, ours, _ = grouped
    ours.close()
    group.send([(0, 0)])
    assert refusal(group.settle) == ("transfer_failed", "the transfer failed")


def test_a_group_whose_client_has_left_is_closed_before_the_memory_changes(grouped):
    """A device may go on reading what it was to send."""
    to, group, ours, client = grouped
    ours.close()
    group.send([(0, 0)])

    def end_when_cut():
        assert client._wire.ended.wait(PATIENCE)
        client.close()

    ending = threading.Thread(target=end_when_cut)
    ending.start()
    withdraw(to)
    assert not group.in_flight
    assert to.status(0).sessions == []
    ending.join(PATIENCE)


def test_the_end_of_a_session_is_that_of_its_group(grouped):
    to, _, ours, client = grouped
    client.close()
    ours.receive(torch.empty(1, dtype=torch.uint8))
    with pytest.raises(RuntimeError, match="the transfer failed"):
        ours.wait()
    assert to.status(0).sessions == []


def test_a_session_with_a_group_gets_no_other_weights_as_its_messages_are_waited_for():
    to, store, _ = on_accelerator(handshake_timeout=0.1)
    draft = offer(DRAFT)
    to.offer(draft)
    client = session()
    to.open_group(client, store.digests.weights)
    assert refusal(join, to, DRAFT, None, client)[0] == "bad_request"
    assert refusal(to.blocks, client, draft.store.digests.weights, 0, 0)[0] == "bad_request"
    join(to, identity(layout=PROCESSED), by=client)
    client.close()


def test_a_session_that_ends_while_its_group_is_formed_leaves_no_thread():
    to, store, _ = on_accelerator(handshake_timeout=PATIENCE)
    client = session()
    to.open_group(client, store.digests.weights)
    client.close()
    assert until(lambda: not [t for t in threading.enumerate() if t.name == "netloader-group"])


def test_a_group_that_was_not_formed_is_told_as_a_failed_transfer():
    to, store, _ = on_accelerator(handshake_timeout=0.1)
    client = session()
    group = to.open_group(client, store.digests.weights)
    assert refusal(group.send, [(0, 0)]) == ("transfer_failed", "no process group within 0.1 s")
    client.close()


# Listening


def test_it_says_where_it_listens_and_what_clients_use(records):
    to = WeightServer(settings(listen_host=None), 3, "192.0.2.1")
    address = to.start(0)
    try:
        assert address.host == "192.0.2.1"
        assert records[-1] == (
            "INFO",
            f"NetLoader rank 3: listening on port {address.port} of all addresses; "
            f"clients use 192.0.2.1:{address.port}",
        )
    finally:
        to.stop()


@pytest.mark.parametrize(
    ("host", "rank", "secret", "warned"),
    [
        (None, 0, False, True),
        ("0.0.0.0", 0, False, True),
        (None, 1, False, False),  # one line for an instance
        (HOST, 0, False, False),
        (None, 0, True, False),
    ],
)
def test_a_port_that_everybody_reaches_is_one_warning(
    records, tmp_path, host, rank, secret, warned
):
    path = secret_file(tmp_path, SECRET) if secret else None
    to = WeightServer(settings(listen_host=host, secret_file=path), rank, HOST)
    address = to.start(0)
    to.stop()
    warnings = [line for level, line in records if level == "WARNING"]
    line = (
        f"NetLoader rank 0: whoever reaches port {address.port} can pull the weights; "
        "SECRET_FILE or TLS_CERT lets in only peers"
    )
    assert warnings == ([line] if warned else [])


def test_where_the_port_file_cannot_be_written_nothing_is_left_open(tmp_path):
    opened = []

    def fail(self):
        opened.append(self._text)
        raise OSError("disk full")

    to = WeightServer(settings(output_prefix=f"{tmp_path}/rank_"), 0, HOST)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(PortFile, "publish", fail)
        to.start(0)
    assert not to.listening
    [address] = opened
    with pytest.raises(OSError):
        socket.create_connection((HOST, int(address.rpartition(":")[2])), 1)
    again = to.start(0)
    with ElasticClient.connect(again, connect=5, handshake=5, progress=5) as client:
        assert client.status().instance == to.process
    to.stop()


def test_what_is_served_is_withdrawn_when_the_server_stops():
    one = offer()
    to = server(one)
    client = session()
    fetched(to, one.store.digests.weights, 0, 0, by=client)
    to.start(0)
    to.stop()
    assert refusal(to.blocks, client, one.store.digests.weights, 0, 0) == (
        "gone",
        "the source is shutting down",
    )
    for code, text in (
        refusal(join, to),
        refusal(join, to, DRAFT),
        refusal(to.blocks, session(), one.store.digests.weights, 0, 0),
    ):
        assert (code, text) == ("gone", "the source is shutting down")


# Relays


def relayed(name):
    return Peer(f"10.0.0.9:{name}", f"process {name}")


def joins(to, peer=None, by=None):
    by = by or session()
    return by, to.join(by, Join(WHO, peer=peer))


def test_a_client_hears_of_others_and_they_hear_of_it():
    to, met = server(offer()), []
    to.met = lambda weights, peer: met.append((weights, peer))
    assert joins(to, relayed(1))[1].peers == []
    assert [peer.address for peer in joins(to, relayed(2))[1].peers] == [relayed(1).address]
    assert joins(to)[1].peers != []  # one that passes nothing on
    assert met == [(WEIGHTS, relayed(1)), (WEIGHTS, relayed(2))]
    named = {peer.address: peer for peer in to.peers_of(WEIGHTS)}
    assert {*named} == {relayed(1).address, relayed(2).address}
    assert to.peers_of("xxh3_128:00") == []


def test_those_named_to_fewest_are_named_first(monkeypatch):
    monkeypatch.setattr(api, "MAX_PEERS", 2)
    to = server(offer())
    clients = [joins(to, relayed(number))[0] for number in range(1, 7)]
    counts = [known.peer.load for known in to._peers._known.values()]
    assert max(counts) - min(counts) <= 2 and sum(counts) == 1 + 2 * 4
    assert clients


def test_a_client_that_went_away_is_named_no_more_and_one_that_is_complete_serves():
    to = server(offer())
    gone, done = joins(to, relayed(1))[0], joins(to, relayed(2))[0]
    gone.close()
    to.done(done, Done(complete=True))
    done.close()
    [left] = to.peers_of(WEIGHTS)
    assert (left.address, left.state) == (relayed(2).address, "serving")


def test_what_a_client_says_of_itself_but_its_address_is_not_passed_on():
    to = server(offer())
    joins(to, Peer("10.0.0.9:1", "honest", "serving", 2**53))
    joins(to, Peer("nowhere", "not an address"))
    assert joins(to, relayed(2))[1].peers == [Peer("10.0.0.9:1", "honest", "loading", 2)]
    assert len(to.peers_of(WEIGHTS)) == 2


def test_those_last_heard_of_are_remembered_and_no_more_than_so_many(monkeypatch):
    monkeypatch.setattr(peer_book, "_MOST", 2)
    to = server(offer())
    for number in (1, 2, 1, 3):
        to.know(WEIGHTS, relayed(number))
    assert [peer.address for peer in to.peers_of(WEIGHTS)] == [
        relayed(number).address for number in (1, 3)
    ]


def test_of_those_that_have_a_session_some_are_named_whoever_else_asks():
    to = server(offer())
    for number in range(2000):
        to.others(Join(WHO, peer=relayed(100 + number)))
        if number == 999:
            there = {relayed(number).address for number in (1, 2, 3)}
            for one in (1, 2, 3):
                joins(to, relayed(one))
    for newcomer in range(4, 8):
        named = {peer.address for peer in joins(to, relayed(newcomer))[1].peers}
        assert len(named & (there | {relayed(n).address for n in range(4, newcomer)})) >= 2


def test_a_connection_that_goes_on_with_another_model_counts_for_one_peer():
    to = server(offer(), offer(DRAFT, {"d": torch.ones(3)}))
    client = session()
    for number in range(1, 5):
        to.join(client, Join(WHO, peer=relayed(number)))
        fetched(to, WEIGHTS, number, number, by=client)
        to.join(client, Join(DRAFT))
    assert to._first_copies == {}
    client.close()
    assert to.peers_of(WEIGHTS) == []


def test_a_client_that_had_to_wait_and_then_went_away_is_named_no_more():
    to = server(offer())
    to.others(Join(WHO, peer=relayed(1)))
    joins(to, relayed(1))[0].close()
    assert to.peers_of(WEIGHTS) == []


@pytest.mark.parametrize("code", [Code.LOADING, Code.PREPARING])
def test_who_asks_for_blocks_that_are_being_made_ready_is_to_come_again(code):
    to = server(offer())
    to.withdraw(WHO.group, code, "why")
    assert refusal(to.have, session(), WEIGHTS, 0, 0) == (code.text, "why")


def test_nothing_is_kept_of_clients_that_are_gone_or_of_weights_that_are_withdrawn():
    to = server(offer())
    for number, end in enumerate([True, False], 1):
        client = joins(to, relayed(number))[0]
        fetched(to, WEIGHTS, number, number, by=client)
        to.done(client, Done(complete=end))
        client.close()
    assert to._first_copies == {}
    fetched(to, WEIGHTS, 0, 0, by=joins(to, relayed(1))[0])
    withdraw(to)
    assert to._first_copies == {}
    to.offer(offer())
    fetched(to, WEIGHTS, 0, 0, by=joins(to, relayed(1))[0])
    to.forget(WHO.group)
    assert to._first_copies == {}


def test_a_peer_that_nobody_has_heard_of_for_long_is_forgotten(monkeypatch):
    to = server(offer())
    to.know(WEIGHTS, relayed(1))
    assert len(to.peers_of(WEIGHTS)) == 1
    monkeypatch.setattr(peer_book, "_REMEMBERED", -1.0)
    assert to.peers_of(WEIGHTS) == []


def test_who_is_refused_for_now_hears_of_those_with_the_same_weights():
    to = server(offer())
    joins(to, relayed(1))
    weights, peers, _ = to.others(Join(WHO))
    assert weights == WEIGHTS
    assert [peer.address for peer in peers] == [relayed(1).address]
    assert to.others(Join(identity(model="other"))) is None
    assert to.others(Join(DRAFT)) is None


def test_who_is_refused_for_now_is_named_to_others():
    to = server(offer())
    to.others(Join(WHO, peer=relayed(1)))
    assert [peer.address for peer in to.others(Join(WHO))[1]] == [relayed(1).address]


def test_a_block_is_sent_to_a_second_relay_once_all_were_sent_to_somebody(monkeypatch):
    monkeypatch.setattr(scheduler, "_LEAST_PASSED_ON", 60.0)
    to = server(offer())
    one, other, plain = joins(to, relayed(1))[0], joins(to, relayed(2))[0], joins(to)[0]
    fetched(to, WEIGHTS, 0, 5, by=one)
    assert refusal(to.blocks, other, WEIGHTS, 3, 8)[0] == "ask_others"
    fetched(to, WEIGHTS, 3, 8, by=plain)
    fetched(to, WEIGHTS, 6, 11, by=other)
    assert refusal(to.blocks, other, WEIGHTS, 3, 8)[0] == "ask_others"
    for name in ("_LEAST_PASSED_ON", "_PASSED_ON"):
        monkeypatch.setattr(scheduler, name, 0.0)
    fetched(to, WEIGHTS, 3, 8, by=other)
    to = server(offer())
    one, other = joins(to, relayed(1))[0], joins(to, relayed(2))[0]
    fetched(to, WEIGHTS, 0, 5, by=one)
    one.close()
    fetched(to, WEIGHTS, 3, 8, by=other)


def joins_on_accelerator(to, peer=None):
    by = session()
    return by, to.join(by, Join(identity(layout=PROCESSED), peer=peer))


def test_through_groups_two_relays_are_fed_and_others_hear_of_them():
    to, store, _ = on_accelerator()
    one, _ = joins_on_accelerator(to, relayed(1))
    joins_on_accelerator(to, relayed(2))
    joins_on_accelerator(to)  # one that passes nothing on takes no place of theirs
    third = Join(identity(layout=PROCESSED), peer=relayed(3))
    code, text = refusal(to.join, session(), third)
    assert (code, text) == ("busy", "2 clients are fed that pass on what they get")
    assert {peer.address for peer in to.others(third)[1]} == {
        relayed(number).address for number in (1, 2)
    }
    to.join(one, Join(identity(layout=PROCESSED), store.digests.weights, relayed(1)))  # once more
    one.close()
    joins_on_accelerator(to, relayed(3))


def test_over_http_there_are_as_many_relays_as_sessions():
    for to in (server(offer()), on_accelerator(transport=Transport.HTTP)[0]):
        [one] = to._offers.values()
        for number in range(4):
            to.join(session(), Join(one.identity, peer=relayed(number)))


def test_through_groups_a_block_is_sent_to_a_second_relay_once_all_were_sent_to_somebody(
    monkeypatch,
):
    monkeypatch.setattr(scheduler, "_LEAST_PASSED_ON", 60.0)
    to, store, _ = on_accelerator()
    weights = store.digests.weights
    one, other, plain = (
        to.open_group(joins_on_accelerator(to, peer)[0], weights)
        for peer in (relayed(1), relayed(2), None)
    )
    assert one.sizes([(0, 5)]) == [6 * MIB]
    assert other.sizes([(3, 5), (6, 6), (5, 7)]) == [None, MIB, None]
    assert plain.sizes([(3, 5)]) == [3 * MIB]
    assert other.sizes([(7, 11), (3, 5)]) == [5 * MIB, None]
    for name in ("_LEAST_PASSED_ON", "_PASSED_ON"):
        monkeypatch.setattr(scheduler, name, 0.0)
    assert other.sizes([(3, 5)]) == [3 * MIB]


def test_a_relay_forms_one_group_at_a_time():
    to = server()
    who = identity(layout=PROCESSED)
    relay, store = loading(to, who, LinkDevice())
    relay.begin(store, lambda weights, peer: None)
    weights, client = store.digests.weights, session()
    to.join(client, Join(who))
    with relay.connecting:
        assert refusal(to.open_group, client, weights) == ("busy", "another group is being formed")
    to.open_group(client, weights)
    assert refusal(to.open_group, session(), weights)[0] == "busy"
    client.close()  # nobody comes to the group
    assert until(lambda: not to.connecting.locked())
    to.open_group(session(), weights)


def test_who_joins_once_all_relays_have_gone_is_not_sent_to_them():
    to = server(offer())
    one, plain = joins(to, relayed(1))[0], joins(to)[0]
    fetched(to, WEIGHTS, 0, 5, by=one)
    to.done(one, Done(complete=True))
    other = joins(to, relayed(2))[0]
    assert refusal(to.blocks, other, WEIGHTS, 0, 5)[0] == "ask_others"
    for gone in (one, other):
        gone.close()
    fetched(to, WEIGHTS, 0, 5, by=joins(to, relayed(3))[0])
    plain.close()


def loading(to, who=WHO, device=None):
    made = Offer(who, None, "the weights are being loaded", code=Code.LOADING)
    to.endpoint = Endpoint("10.0.0.1:1", to.process)
    to.announce(made)
    there = store_of(TENSORS, *[device] if device else [])
    empty = [torch.empty_like(one) for one in there.tensors]
    return Relay(to, made), incomplete(there, empty, there.device)


def relaying():
    """A server, the load that it passes on from now on, and what that has of the weights."""
    to = server()
    relay, store = loading(to)
    relay.begin(store, lambda weights, peer: None)
    return to, relay, store


def test_what_has_come_of_a_load_that_begins_anew_is_read_by_nobody():
    _, relay, store = relaying()
    relay.announce(Phase.LOADING)
    with pytest.raises(Withdrawn):
        store.check(Run(0, 0))


def test_a_load_passes_on_what_has_come_until_it_ends():
    to = server()
    relay, store = loading(to)
    weights = store.digests.weights
    assert refusal(join, to)[0] == "loading"
    relay.begin(store, lambda weights, peer: None)
    joined = join(to)
    assert (joined.complete, joined.epoch, joined.weights) == (False, 0, weights)
    assert refusal(to.blocks, session(), weights, 0, 1)[0] == "not_here"
    for tensor, own in zip(TENSORS.values(), store.tensors, strict=True):
        own.copy_(tensor)
    store.add(Run(0, 1))
    by = session()
    assert fetched(to, weights, 0, 1, by=by)[0] == b"".join(map(_content, [*TENSORS.values()][:2]))
    assert to.have(by, weights, 0, 0) == api.Have(1, [Run(0, 1)], False)
    assert [model.state for model in to.status(0).models] == ["loading"]
    relay.end(complete=True)
    assert refusal(to.blocks, by, weights, 0, 1)[0] == "preparing"
    assert refusal(to.have, by, weights, 0, 0)[0] == "preparing"
    assert refusal(join, to)[0] == "preparing"
    to.offer(Offer(WHO, store_of(TENSORS)))
    assert join(to).epoch == 1
    fetched(to, weights, 0, 1, by=by)


def test_a_load_that_is_complete_waits_for_its_clients_for_a_part_of_its_time(monkeypatch):
    to, relay, store = relaying()
    store.add(Run(0, store.blocks.count - 1))
    client = joins(to, relayed(1))[0]
    refused = []

    def leave():
        while not to._lingering:
            time.sleep(0.001)
        try:
            refused.append(refusal(join, to)[0])
            fetched(to, store.digests.weights, 0, 1, by=client)
        finally:
            client.close()

    monkeypatch.setattr(serve, "_LINGER", 1.0)
    relay._began -= PATIENCE
    leaving = threading.Thread(target=leave, daemon=True)
    leaving.start()
    relay.end(complete=True)
    leaving.join(PATIENCE)
    assert refused == ["preparing"]
    assert refusal(to.blocks, session(), store.digests.weights, 0, 1)[0] == "preparing"
    relay.begin(store, lambda weights, peer: None)
    joins(to, relayed(1))
    monkeypatch.setattr(serve, "_LINGER", 0.0)
    relay.end(complete=True)  # and not for those that stay


def test_there_are_more_places_while_nothing_is_served_yet():
    for config, places in (({}, (4, 8, 4)), ({"max_send_rate": 2**30}, (4, 4, 4))):
        to = server(**config)
        relay, store = loading(to)
        found = [to.status(0).places]
        relay.begin(store, lambda weights, peer: None)
        found.append(to.status(0).places)
        relay.end(complete=True)
        to.offer(offer())
        found.append(to.status(0).places)
        assert tuple(found) == places


def _content(tensor):
    return bytes(bytes_of(tensor).numpy())


def test_a_load_that_fails_is_being_loaded_again():
    to, relay, store = relaying()
    relay.end(complete=False)
    assert refusal(join, to)[0] == "loading"
    assert store.withdrawn.is_set()


@pytest.mark.parametrize("complete", [True, False])
def test_the_memory_of_a_load_is_read_by_nobody_when_it_has_ended(complete, monkeypatch):
    monkeypatch.setattr(serve, "_LINGER", 0.0)
    monkeypatch.setattr(serve, "_LAST_RUNS", PATIENCE)
    to, relay, store = relaying()
    reading = session()
    store.add(Run(0, store.blocks.count - 1))
    chunks = iter(to.blocks(reading, store.digests.weights, 0, 1).chunks)
    next(chunks)  # is on its way from now on
    ending = threading.Thread(target=relay.end, kwargs={"complete": complete})
    ending.start()
    assert store.withdrawn.wait(PATIENCE)
    ending.join(0.2)
    assert ending.is_alive()
    assert list(chunks) == []
    ending.join(PATIENCE)
    assert not ending.is_alive()


def test_a_load_names_its_own_sources():
    to, relay, store = relaying()
    relay.know(store.digests.weights, Address("10.0.0.2", 5), "seed", complete=True)
    relay.know(store.digests.weights, Address("10.0.0.3", 5), "relay", complete=False)
    assert joins(to, relayed(1))[1].peers == [
        Peer("10.0.0.2:5", "seed", "serving", 1),
        Peer("10.0.0.3:5", "relay", "loading", 1),
    ]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "fe80::1%eth0", "169.254.0.1"])
def test_an_address_that_others_reach_somebody_else_at_is_not_named(host):
    to, relay, store = relaying()
    relay.know(store.digests.weights, Address(host, 5), "seed", complete=True)
    assert joins(to, relayed(1))[1].peers == []


def test_who_is_refused_hears_which_process_has_refused_it():
    with pytest.raises(Refusal) as error:
        join(to := server(), WHO)
    assert error.value.problem.instance == to.process


def test_a_list_of_ranks_goes_with_weights_also_while_they_are_loaded_or_all_places_are_taken():
    ranks = {0: WEIGHTS, 1: "xxh3_128:" + "1" * 32}
    assert server(offer(ranks=lambda: ranks)).others(Join(WHO))[2] == ranks
    to = server()
    relay, store = loading(to)
    relay.begin(store, lambda weights, peer: None, lambda: ranks)
    assert join(to).ranks == ranks
    refused = Refusal(Code.BUSY, "busy")
    for count, told in ((512, 512), (513, 0)):
        refused.name(WEIGHTS, [relayed(1)] * api.MAX_PEERS, dict.fromkeys(range(count), ranks[1]))
        assert len(refused.problem.ranks) == told
        assert len(msgspec.json.encode(refused.problem)) < api.MAX_BODY


def test_what_a_client_says_of_blocks_ends_no_load():
    to, _, store = relaying()
    store.add(Run(0, 0))  # whose bytes are wrong
    weights = store.digests.weights
    assert refusal(to.check, session(), weights, 0, 0)[0] == "loading"
    assert join(to).weights == weights


def test_nobody_else_can_have_a_client_named_no_more():
    to = server(offer())
    honest, again = joins(to, relayed(1))[0], joins(to, relayed(1))[0]
    fetched(to, WEIGHTS, 0, 0, by=honest)
    honest.close()  # it has reconnected
    for peer in (relayed(1), Peer(relayed(1).address, "another")):
        joins(to, peer)[0].close()
    assert [peer.instance for peer in to.peers_of(WEIGHTS)] == [relayed(1).instance]
    assert refusal(to.blocks, joins(to, relayed(2))[0], WEIGHTS, 0, 0)[0] == "ask_others"
    joins(to, relayed(3), by=again)
    again.close()
    assert [peer.address for peer in to.peers_of(WEIGHTS)] == [relayed(2).address]


def test_news_are_told_in_parts_and_then_that_all_are_here(monkeypatch):
    monkeypatch.setattr(api, "MAX_NEWS", 2)
    to, _, store = relaying()
    for block in range(12):
        store.add(Run(block, block))
    weights, by = store.digests.weights, session()
    first = to.have(by, weights, 0, 0)
    assert first == api.Have(2, [(0, 0), (1, 1)], False)
    assert to.have(by, weights, 10, 0) == api.Have(12, [(10, 10), (11, 11)], True)
    assert to.have(by, weights, 12, 60) == api.Have(12, [], True)


def test_a_client_that_has_gone_is_not_told_what_comes(monkeypatch):
    monkeypatch.setattr(serve, "_LOOK", 0.01)
    to, _, store = relaying()
    wire = Wire()
    by, wire.hung_up = Session(wire), True
    assert to.have(by, store.digests.weights, 0, 10 * PATIENCE).runs == []
