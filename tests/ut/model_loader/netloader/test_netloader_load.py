import contextlib
import dataclasses
import json
import random
import signal
import socket
import threading
import time

import msgspec
import pytest
import torch

from vllm_ascend.model_loader.netloader.config import MAX_MODEL_NAME_BYTES
from vllm_ascend.model_loader.netloader.errors import LoadFailed
from vllm_ascend.model_loader.netloader.executor.devices.cpu import CpuDevice
from vllm_ascend.model_loader.netloader.executor.elastic_load import BATCH, WINDOW
from vllm_ascend.model_loader.netloader.identity import MAX_REVISION_BYTES, Revision
from vllm_ascend.model_loader.netloader.serve import Offer
from vllm_ascend.model_loader.netloader.utils import Address

from .support import (
    COUNT,
    DEVICE,
    HOST,
    MIB,
    PATIENCE,
    ROW,
    Proxy,
    assorted,
    blank_like,
    changing,
    client_process,
    closed_port,
    dial,
    differing,
    failing_after,
    flipped,
    identity,
    load,
    loads_right_bytes,
    random_tensor,
    rows,
    settings,
    source,
    source_process,
    tapped,
    until,
    weights_of,
)

MODEL = rows()
# A stalled peer is lost soon.
# (Not sooner: the DNS may take a second, see conftest.)
SOON = 1.5
IMPATIENT = settings(progress_timeout=SOON)
ONE_AT_A_TIME = settings(max_sources=1)


@pytest.fixture(scope="module")
def weights():
    return weights_of(MODEL)


@pytest.fixture(scope="module")
def other_weights():
    """The same tensors with other contents: another checkpoint of the same model."""
    return weights_of(OTHER)


OTHER = rows(seed=1)


def refusal(*sources, into=None, **options):
    with pytest.raises(LoadFailed) as error:
        load(sources, blank_like(MODEL) if into is None else into, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# Exact bytes


def test_every_kind_of_tensor_arrives_bit_by_bit():
    model = assorted()
    blanks = blank_like(model)
    with source(model) as running:
        loaded = load([running], blanks)
    assert differing(blanks, model) == []
    assert blanks["embed.weight"] is blanks["lm_head.weight"]
    assert len(loaded.tensors) == len(model) - 1


def test_thousands_of_tiny_tensors_arrive():
    model = {f"layer.{i}.scale": random_tensor(i, torch.float16, i % 7) for i in range(5000)}
    blanks = blank_like(model)
    with source(model) as running:
        load([running], blanks)
    assert differing(blanks, model) == []


class Counting(CpuDevice):
    def __init__(self):
        self.buffers = 0

    def empty(self, nbytes):
        self.buffers += nbytes > 1  # a trailer has one byte
        return super().empty(nbytes)


def test_either_side_has_no_more_staging_buffers_than_stated():
    model = {f"t{i}": random_tensor(i, torch.uint8, 7000) for i in range(300)}
    weights = weights_of(model, chunk_bytes=64 << 10)
    assert len(weights.plan.chunks) > 2 * WINDOW
    blanks, here, there = blank_like(model), Counting(), Counting()
    with source(weights, device=there) as running:
        load([running], blanks, device=here)
    assert differing(blanks, model) == []
    assert 1 <= here.buffers <= WINDOW
    assert 1 <= there.buffers <= WINDOW


def test_parameters_arrive():
    model = torch.nn.Sequential(torch.nn.Linear(300, 400), torch.nn.LayerNorm(400))
    there = dict(model.named_parameters())
    here = {name: torch.nn.Parameter(torch.zeros_like(one)) for name, one in there.items()}
    with source(there) as running:
        load([running], here)
    assert differing(here, there) == []


def test_tensors_made_under_inference_mode_arrive():
    # vLLM reloads weights under inference mode, while the transfer runs in threads without it.
    model = assorted()
    with torch.inference_mode():
        blanks = blank_like(model)
        with source(model) as running:
            load([running], blanks)
        assert differing(blanks, model) == []


def test_a_model_of_nothing_is_loaded():
    for model in ({}, {"empty": torch.empty(0)}):
        with source(model) as running:
            assert load([running], blank_like(model)).plan.nbytes == 0


def test_a_model_of_less_than_a_chunk_arrives():
    model = {"one": torch.tensor(1.5)}
    blanks = blank_like(model)
    with source(model) as running:
        load([running], blanks)
    assert blanks["one"] == 1.5


def test_unverified_bytes_arrive_too(weights):
    blanks = blank_like(MODEL)
    with source(weights) as running:
        loaded = load([running], blanks, config=settings(verify=False))
    assert differing(blanks, MODEL) == []
    assert loaded.digests is None


def test_tensors_that_no_source_has_stay_as_they_are(weights):
    blanks = blank_like(MODEL)
    blanks["derived"] = torch.ones(3)
    with source(weights) as running:
        loaded = load([running], blanks, required=set(MODEL))
    assert (blanks["derived"] == 1).all()
    assert len(loaded.tensors) == len(MODEL)


def test_what_was_loaded_can_be_offered_on(weights):
    first, second = blank_like(MODEL), blank_like(MODEL)
    with source(weights) as running:
        loaded = load([running], first)
    assert loaded.digests == weights.digests
    again = dataclasses.replace(weights, manifest=loaded.manifest, tensors=loaded.tensors)
    with source(again) as running:
        load([running], second)
    assert differing(second, MODEL) == []


def test_several_clients_at_once_are_all_served_right(weights):
    filled = [blank_like(MODEL) for _ in range(4)]
    with source(weights) as running:
        threads = [threading.Thread(target=load, args=([running], into)) for into in filled]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [differing(into, MODEL) for into in filled] == [[]] * 4


def test_attributes_travel_with_the_tensors():
    attributes = {"flag": True, "scale": 1.5, "layer.name": "x", "none": None, "count": 3}
    with source(weights_of({"a": torch.ones(2)}, attributes=attributes)) as running:
        loaded = load([running], {"a": torch.zeros(2)})
    assert loaded.manifest.attributes == attributes


@pytest.mark.parametrize("name", ["x" * MAX_MODEL_NAME_BYTES, "ü" * 85])
def test_the_longest_model_name_fits_in_a_join(weights, name):
    revision = Revision("r" * MAX_REVISION_BYTES, pinned=True)
    who = identity(model=name, group="netloader_draft", revision=revision, rank=2**20, tp=2**20)
    blanks = blank_like(MODEL)
    with source(weights, who=who) as running:
        load([running], blanks, who=who)
    assert differing(blanks, MODEL) == []


PINNED, OTHER_PIN, MAIN = (
    Revision("1" * 40, pinned=True),
    Revision("2" * 40, pinned=True),
    Revision("2" * 40),
)


@pytest.mark.parametrize(
    ("there", "here"), [(PINNED, PINNED), (PINNED, Revision()), (Revision(), PINNED)]
)
def test_weights_of_the_same_revision_or_of_an_unknown_one_are_taken(weights, log, there, here):
    blanks = blank_like(MODEL)
    with source(weights, who=identity(revision=there)) as running:
        load([running], blanks, who=identity(revision=here))
    assert differing(blanks, MODEL) == []
    assert not [line for line in log if "commit" in line]


def test_two_pinned_commits_are_refused_by_name(weights):
    with source(weights, who=identity(revision=PINNED)) as running:
        why = f"refused: the models differ: revision is '{'2' * 40}' here and '{'1' * 40}' there"
        with pytest.raises(LoadFailed, match=why):
            load([running], blank_like(MODEL), who=identity(revision=OTHER_PIN))
        assert loads_right_bytes(running, MODEL)


def test_another_commit_of_main_is_taken_and_the_log_says_so(weights, log):
    blanks = blank_like(MODEL)
    with source(weights, who=identity(revision=Revision("1" * 40))) as running:
        load([running], blanks, who=identity(revision=MAIN))
    assert differing(blanks, MODEL) == []
    [line] = [line for line in log if "commit" in line]
    assert line == (
        f"NetLoader rank 0: source {running.address} has commit {'1' * 40} of the model, "
        f"which is commit {'2' * 40} here; without --revision the source's is taken"
    )


# Sources that are of no use, and then one that is


def test_a_dead_source_is_passed_over(weights, log):
    dead = closed_port()
    blanks = blank_like(MODEL)
    with source(weights) as running:
        load([dead, running], blanks, config=ONE_AT_A_TIME)
    assert differing(blanks, MODEL) == []
    said = [line for line in log if line.startswith(f"NetLoader rank 0: source {dead}")]
    assert len(said) == 1
    assert "cannot connect" in said[0]


def test_a_source_of_another_model_is_passed_over(weights, log):
    other, blanks = identity(model="another"), blank_like(MODEL)
    with source(weights, who=other) as wrong, source(weights) as right:
        load([wrong, right], blanks, config=ONE_AT_A_TIME)
    assert differing(blanks, MODEL) == []
    assert any("model is 'small' here and 'another' there" in line for line in log)


def test_a_source_of_other_tensors_is_passed_over(weights, log):
    blanks = blank_like(MODEL)
    with source(MODEL | {"row.7": torch.zeros(5)}) as wrong, source(weights) as right:
        load([wrong, right], blanks, config=ONE_AT_A_TIME)
    assert differing(blanks, MODEL) == []
    assert any(f"row.7 is uint8[{ROW}] here and float32[5] there" in line for line in log)


def test_a_source_with_ties_of_its_own_is_passed_over():
    tensor = random_tensor(0, torch.uint8, 50)
    message = refusal_of({"a": tensor, "b": tensor}, {"a": tensor.clone(), "b": tensor.clone()})
    assert "b shares the memory of no other here and of a there" in message


def refusal_of(there, here):
    with source(there) as running:
        return refusal(running, into=here)


def test_a_client_with_ties_of_its_own_takes_nothing():
    tensor = random_tensor(0, torch.uint8, 50)
    before = tensor.clone()
    message = refusal_of({"a": tensor + 1, "b": tensor + 2}, {"a": tensor, "b": tensor})
    assert "b shares the memory of a here and of no other there" in message
    assert torch.equal(tensor, before)


def test_a_source_that_cannot_send_is_passed_over(weights, log):
    blanks = blank_like(MODEL)
    with source(None, reason="a.weight has changed") as wrong, source(weights) as right:
        load([wrong, right], blanks, config=ONE_AT_A_TIME)
    assert differing(blanks, MODEL) == []
    assert any("refused: a.weight has changed" in line for line in log)


def test_a_source_without_the_layout_is_refused():
    raw = weights_of(MODEL)
    processed = dataclasses.replace(
        raw, manifest=msgspec.structs.replace(raw.manifest, layout="processed")
    )
    with source(processed) as running:
        assert "layout is 'raw' here and 'processed' there" in refusal(running)


def test_a_source_with_another_digest_algorithm_is_refused(weights):
    def change(content):
        content["digest_algorithm"] = "other"

    with source(weights) as running, Proxy(running.address, changing("JOIN_ACK", change)) as proxy:
        assert "digests are xxh3_128 here and other there" in refusal(proxy.address)


@pytest.mark.parametrize(
    "manifest",
    [{}, [], {"layout": "raw", "tensors": [["a", "b"]], "attributes": {}}, {"layout": "raw"}, "x"],
)
def test_a_manifest_that_is_none_is_refused(weights, manifest):
    def change(content):
        content["manifest"] = manifest

    with source(weights) as running, Proxy(running.address, changing("JOIN_ACK", change)) as proxy:
        assert "not a valid manifest" in refusal(proxy.address)


@pytest.mark.parametrize("entries", [[], [["row.0", "torch.uint8", [ROW], "row.0"]]])
def test_a_manifest_that_leaves_tensors_out_is_refused(weights, entries):
    def change(content):
        content["manifest"]["tensors"] = entries

    with source(weights) as running, Proxy(running.address, changing("JOIN_ACK", change)) as proxy:
        assert "tensors differ" in refusal(proxy.address)


def test_no_sources_at_all_is_a_failure_that_says_so():
    assert refusal(into={}) == "there are no sources"


def test_all_reasons_stand_in_one_line_when_no_source_is_left(weights):
    dead = closed_port()
    with (
        source(weights, who=identity(tp=2)) as other,
        source(None, reason="not\nto be had") as declined,
        source(tapped(weights, failing_after(3))) as failing,
    ):
        message = refusal(dead, other, declined, failing, config=ONE_AT_A_TIME)
    reasons = message.split("; ")
    assert f"{dead}: cannot connect: Connection refused" in reasons
    assert f"{other.address}: refused: the models differ: tp is 1 here and 2 there" in reasons
    assert f"{declined.address}: refused: not to be had" in reasons
    assert any(reason.startswith(f"{failing.address}: ") for reason in reasons)
    assert len(reasons) == 4


def test_an_error_on_this_side_is_a_failure_too_and_one_line(weights, log):
    def fail(*_):
        raise RuntimeError("the device\n\tis out of order")

    broken = CpuDevice()
    broken.hash = fail
    with source(weights) as running:
        message = refusal(running, device=broken)
    assert "the device is out of" in message
    assert not any("\n" in line for line in log)


def test_memory_that_cannot_be_prepared_costs_only_speed(weights):
    def fail(*_):
        raise RuntimeError("the device is out of order")

    broken = CpuDevice()
    broken.prepare = fail
    blanks = blank_like(MODEL)
    with source(weights) as running:
        load([running], blanks, device=broken)
    assert differing(blanks, MODEL) == []


def test_memory_is_not_prepared_any_more_when_the_load_is_over(weights):
    stopped = []

    class Slow(CpuDevice):
        def prepare(self, tensors, stop):
            stopped.append(stop.wait(PATIENCE))

    with source(weights) as running:
        load([running], blank_like(MODEL), device=Slow())
    assert stopped == [True]


def test_without_threads_there_is_no_model_and_no_hang(weights, monkeypatch):
    def fail(_):
        raise RuntimeError("can't start new thread")

    with source(weights) as running:
        monkeypatch.setattr(threading.Thread, "start", fail)
        with pytest.raises(LoadFailed):
            load([running], blank_like(MODEL))
        monkeypatch.undo()


def test_memory_is_not_prepared_where_there_are_no_more_threads(weights, monkeypatch):
    start = threading.Thread.start

    def fail(thread):
        if thread.name == "netloader-prepare":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", fail)
    with source(weights) as running:
        assert loads_right_bytes(running, MODEL)


def test_a_process_may_end_right_after_its_load():
    with source(rows()) as running:
        for _ in range(4):
            with client_process(running.address) as process:
                assert process.wait(PATIENCE) == 0


# A source that is lost on the way


def test_a_source_that_fails_costs_only_the_chunks_on_their_way(weights):
    first, second = tapped(weights, failing_after(40)), tapped(weights)
    blanks = blank_like(MODEL)
    with source(first) as failing, source(second) as steady:
        load([failing, steady], blanks, config=ONE_AT_A_TIME)
    assert differing(blanks, MODEL) == []
    # The first sent 40; what was under way on either side or not checked yet came again.
    assert set(range(40, COUNT)) <= set(second.tensors.read)
    assert len(second.tensors.read) <= COUNT - 40 + 2 * WINDOW
    assert len(set(second.tensors.read)) == len(second.tensors.read)


def test_a_source_that_fails_among_several_costs_only_the_chunks_on_their_way(weights):
    # The other one has begun by the time the first fails.
    begun = threading.Event()

    def fail(index, count):
        if count == 3:
            assert begun.wait(20)
            raise RuntimeError("injected failure")

    first = tapped(weights, fail)
    second = tapped(weights, lambda index, count: begun.set())
    blanks = blank_like(MODEL)
    with source(first) as failing, source(second) as steady:
        load([failing, steady], blanks)
    assert differing(blanks, MODEL) == []
    assert len(first.tensors.read) + len(second.tensors.read) <= COUNT + 1 + 2 * WINDOW


def test_a_killed_source_costs_only_the_chunks_on_their_way(weights):
    second = tapped(weights)
    blanks = blank_like(MODEL)
    with source_process(0, signal_after=40) as killed, source(second) as steady:
        started = time.monotonic()
        load([killed.address, steady], blanks, config=settings(max_sources=1, progress_timeout=30))
        assert time.monotonic() - started < 15  # a death is noticed, not waited for
    assert differing(blanks, MODEL) == []
    assert len(second.tensors.read) <= COUNT - 40 + 2 * WINDOW


def test_a_stopped_source_is_lost_when_the_deadline_passes(weights):
    second = tapped(weights)
    blanks = blank_like(MODEL)
    with (
        source_process(0, signal_after=40, number=signal.SIGSTOP) as stopped,
        source(second) as steady,
    ):
        load(
            [stopped.address, steady], blanks, config=settings(max_sources=1, progress_timeout=SOON)
        )
        assert differing(blanks, MODEL) == []
        assert len(second.tensors.read) <= COUNT - 40 + 2 * WINDOW
        stopped.send_signal(signal.SIGCONT)
        with dial(stopped.address) as sock:  # it is awake again
            sock.sendall(b"\n")
            assert sock.recv(1)
        assert differing(blanks, MODEL) == []


def test_nothing_that_a_lost_source_sends_later_reaches_the_tensors(weights):
    awake = threading.Event()

    def sleep_and_send_something_else(index, count):
        if count >= 5:
            awake.wait(30)
            return torch.zeros(ROW, dtype=torch.uint8)
        return None

    first = tapped(weights, sleep_and_send_something_else)
    blanks = blank_like(MODEL)
    with source(first) as late, source(weights) as steady:
        load([late, steady], blanks, config=settings(max_sources=1, progress_timeout=SOON))
        assert differing(blanks, MODEL) == []
        awake.set()
        assert until(lambda: late.sessions == 0)
        assert differing(blanks, MODEL) == []


@pytest.mark.parametrize("label", ["JOIN_ACK", "SENDING"])
def test_a_control_connection_that_breaks_is_a_lost_source(weights, label, log):
    def cut(message):
        return None if message["label"] == label else message

    blanks = blank_like(MODEL)
    with source(weights) as running, Proxy(running.address, to_client=cut) as proxy:
        load([proxy.address, running], blanks, config=ONE_AT_A_TIME)
    assert differing(blanks, MODEL) == []
    assert any(f"source {proxy.address}: " in line for line in log)


@pytest.mark.parametrize("label", ["JOIN_ACK", "SENDING"])
def test_a_source_that_falls_silent_is_lost_when_its_deadline_passes(weights, label):
    over = threading.Event()

    def hold(message):
        if message["label"] == label:
            over.wait(30)
        return message

    blanks = blank_like(MODEL)
    config = settings(max_sources=1, handshake_timeout=SOON, progress_timeout=SOON)
    with source(weights) as running, Proxy(running.address, to_client=hold) as proxy:
        started = time.monotonic()
        load([proxy.address, running], blanks, config=config)
        assert time.monotonic() - started < 10
        over.set()
    assert differing(blanks, MODEL) == []


def test_weights_withdrawn_in_mid_transfer_end_the_session_with_the_reason(weights):
    def withdraw(index, count):
        if count == 8:
            running.offer.withdraw("the weights are being replaced")

    tapping = tapped(weights, withdraw)
    with source(tapping) as running:
        message = refusal(running)
    assert message == f"{running.address}: gave up: the weights are being replaced"
    assert len(tapping.tensors.read) <= 2 * BATCH


def test_weights_replaced_in_mid_transfer_are_loaded_from_the_start(weights, other_weights):
    def replace(index, count):
        if count == 8:
            running.server.offer(Offer(identity(), other_weights, DEVICE))

    blanks = blank_like(MODEL)
    with source(tapped(weights, replace)) as running:
        load([running, running], blanks, config=ONE_AT_A_TIME)
    assert differing(blanks, OTHER) == []


# Several sources at once


def test_live_sources_share_the_work(weights, log):
    both = threading.Barrier(2)

    def meet(index, count):
        if count == 0:
            both.wait(20)

    first, second = tapped(weights, meet), tapped(weights, meet)
    blanks = blank_like(MODEL)
    with source(first) as one, source(second) as another:
        load([one, another], blanks)
    assert differing(blanks, MODEL) == []
    assert sorted(first.tensors.read + second.tensors.read) == list(range(COUNT))
    summary = next(line for line in log if "loaded 64 tensors" in line)
    assert f"{one.address} (" in summary
    assert f"{another.address} (" in summary


def test_no_more_sources_are_pulled_from_than_allowed(weights):
    first, second = tapped(weights), tapped(weights)
    with source(first) as one, source(second) as another:
        load([one, another], blank_like(MODEL), config=ONE_AT_A_TIME)
    assert len(first.tensors.read) == COUNT
    assert second.tensors.read == []


def test_sources_of_different_weights_are_never_mixed(weights, other_weights):
    for _ in range(3):
        blanks = blank_like(MODEL)
        with source(weights) as one, source(other_weights) as another:
            load([one, another], blanks)
        assert [] in (differing(blanks, MODEL), differing(blanks, OTHER))


def test_what_came_from_other_weights_is_fetched_again(weights, other_weights):
    blanks = blank_like(MODEL)
    with source(tapped(weights, failing_after(40))) as one, source(other_weights) as another:
        load([one, another], blanks, config=ONE_AT_A_TIME)
    assert differing(blanks, OTHER) == []


class InTurn:
    """Two sources of which the second answers while the first sends, and is seen to be declined."""

    def __init__(self, weights, then=None):
        self._sending, self._declined = threading.Event(), threading.Event()
        self._then = then
        self.weights = tapped(weights, self._tap)

    def _tap(self, index, count):
        self._sending.set()
        if count == 5:
            assert self._declined.wait(20)
            if self._then is not None:
                raise self._then

    def proxy(self, address):
        return Proxy(address, self._to_client, self._to_source)

    def _to_client(self, message):
        self._sending.wait(20)
        return message

    def _to_source(self, message):
        if message["label"] == "ABORT":
            self._declined.set()
        return message


def test_a_source_of_other_weights_still_counts_when_the_first_is_lost(weights, other_weights):
    turns = InTurn(weights, then=RuntimeError("injected failure"))
    blanks = blank_like(MODEL)
    with (
        source(turns.weights) as one,
        source(other_weights) as another,
        turns.proxy(another.address) as proxy,
    ):
        load([one, proxy.address], blanks)
    assert differing(blanks, OTHER) == []


def test_a_source_of_other_weights_gives_nothing_while_the_first_sends(weights, other_weights, log):
    turns = InTurn(weights)
    second = tapped(other_weights)
    blanks = blank_like(MODEL)
    with (
        source(turns.weights) as one,
        source(second) as another,
        turns.proxy(another.address) as proxy,
    ):
        load([one, proxy.address], blanks)
    assert differing(blanks, MODEL) == []
    assert second.tensors.read == []
    assert any("are not those that are being loaded" in line for line in log)


def test_sources_with_chunks_of_different_sizes_can_be_changed_between(weights):
    large = weights_of(MODEL, chunk_bytes=3 * MIB)
    blanks = blank_like(MODEL)
    with source(tapped(weights, failing_after(40))) as one, source(large) as another:
        load([one, another], blanks, config=ONE_AT_A_TIME)
        # The second has cut its model as the first did.
        assert MIB in another.offer._chunkings
        assert until(lambda: another.sessions == 0)
        assert another.server._status(0).bytes_sent <= (COUNT - 40 + 2 * WINDOW) * ROW
    assert differing(blanks, MODEL) == []


def test_sources_with_chunks_of_different_sizes_share_the_work(weights):
    # Both may be asked before either has said how large its chunks are.
    both, met = threading.Barrier(2), []

    def meet(name, running):
        def tap(index, count):
            if running and name not in met:
                met.append(name)
                both.wait(20)

        return tap

    running = []
    first = tapped(weights, meet("first", running))
    second = tapped(weights_of(MODEL, chunk_bytes=3 * MIB), meet("second", running))
    blanks = blank_like(MODEL)
    with source(first) as one, source(second) as another:
        # What they would do when asked, done before so that it is told from sending.
        one.offer.chunking(3 * MIB)
        another.offer.chunking(MIB)
        running += [one, another]
        load(running, blanks)
    assert differing(blanks, MODEL) == []
    assert sorted(met) == ["first", "second"]


def test_a_source_that_insists_on_other_chunks_is_not_asked_for_ever(weights):
    asked, begun, over = [], threading.Event(), threading.Event()

    def change(content):
        begun.wait(20)  # the other source has to be the first, whose chunk size counts
        content["chunk_bytes"] = 2 * MIB

    def note(message):
        if message["label"] == "JOIN":
            asked.append(message["content"]["chunk_bytes"])
        # The first JOIN asks for any size, unless the other source was there so much earlier.
        if message["label"] == "ABORT" and asked[-1]:
            over.set()
        return message

    def slow(index, count):
        begun.set()
        if count == 5:
            over.wait(20)
            time.sleep(0.3)

    blanks = blank_like(MODEL)
    with (
        source(tapped(weights, slow)) as one,
        source(weights) as other,
        Proxy(other.address, changing("JOIN_ACK", change), note) as proxy,
    ):
        load([one, proxy.address], blanks)
    assert differing(blanks, MODEL) == []
    assert len(asked) <= 2


def test_a_source_that_answers_late_does_not_delay_a_finished_load(weights):
    over = threading.Event()

    def hold(message):
        over.wait(30)
        return message

    blanks = blank_like(MODEL)
    with (
        source(weights) as running,
        source(weights) as late,
        Proxy(late.address, to_client=hold) as proxy,
        socket.create_server((HOST, 0)) as mute,
    ):
        started = time.monotonic()
        load(
            [proxy.address, Address(HOST, mute.getsockname()[1]), closed_port(), running],
            blanks,
            config=settings(handshake_timeout=20.0),
        )
        assert time.monotonic() - started < 10
        over.set()
    assert differing(blanks, MODEL) == []


def load_threads():
    return [one for one in threading.enumerate() if one.name.startswith("netloader-load")]


def test_a_source_of_other_weights_that_answers_after_the_load_changes_nothing(
    weights, other_weights
):
    over, aborted = threading.Event(), threading.Event()

    def hold(message):
        over.wait(30)
        return message

    def note(message):
        if message["label"] in ("ABORT", "DONE"):
            aborted.set()
        return message

    blanks = blank_like(MODEL)
    with (
        source(weights) as running,
        source(other_weights) as late,
        Proxy(late.address, to_client=hold, to_source=note) as proxy,
    ):
        load([running, proxy.address], blanks, config=settings(handshake_timeout=20.0))
        assert differing(blanks, MODEL) == []
        assert until(lambda: len(load_threads()) == 1)  # the first source's has ended
        over.set()
        assert aborted.wait(20)
    assert differing(blanks, MODEL) == []


def test_a_stalled_source_does_not_fail_a_load_that_another_one_can_finish(weights):
    over = threading.Event()

    def stall(index, count):
        if count == 2:
            over.wait(30)

    blanks = blank_like(MODEL)
    with source(tapped(weights, stall)) as stalled, source(weights) as running:
        load([stalled, running], blanks, config=IMPATIENT)
        over.set()
    assert differing(blanks, MODEL) == []


def test_a_session_with_nothing_to_fetch_stays_until_it_is_needed(weights):
    # The second source would give a silent client up before the first, which is slow, fails.
    brief = settings(progress_timeout=1.0)
    begun = threading.Event()

    def slow(index, count):
        begun.set()
        time.sleep(0.4)
        if count == BATCH - 1:
            raise RuntimeError("injected failure")

    first, second = tapped(weights, slow), tapped(weights, lambda *_: begun.wait(20) and None)
    blanks = blank_like(MODEL)
    with source(first) as one, source(second, config=brief) as another:
        load([one, another], blanks, config=settings(progress_timeout=1.5))
    assert differing(blanks, MODEL) == []
    assert len(first.tensors.read) == BATCH


# Wrong bytes


def corrupting(weights, times, wrong=7):
    """Weights of a source that sends tensor `wrong` with a bit flipped, the first `times` times."""
    left = [times]

    def tap(index, count):
        if index == wrong and left[0]:
            left[0] -= 1
            return flipped(weights.tensors[index])
        return None

    return tapped(weights, tap)


def test_a_chunk_that_comes_wrong_once_is_fetched_again(weights):
    sent = corrupting(weights, times=1)
    blanks = blank_like(MODEL)
    with source(sent) as running:
        load([running], blanks)
    assert differing(blanks, MODEL) == []
    assert sorted(sent.tensors.read) == sorted([*range(COUNT), 7])


def test_a_source_whose_bytes_stay_wrong_is_dropped_with_the_tensors_name(weights, log):
    second = tapped(weights)
    blanks = blank_like(MODEL)
    with source(corrupting(weights, times=99)) as wrong, source(second) as right:
        load([wrong, right], blanks, config=ONE_AT_A_TIME)
    assert differing(blanks, MODEL) == []
    assert any(
        f"source {wrong.address}: wrong bytes twice in chunk 7 (row.7)" in line for line in log
    )
    assert 7 in second.tensors.read
    assert len(second.tensors.read) < COUNT


def test_wrong_bytes_in_a_packed_chunk_are_noticed():
    model = {f"t{i}": random_tensor(i, torch.float32, 10) for i in range(9)}
    weights = weights_of(model)
    with source(corrupting(weights, times=99, wrong=4)) as running:
        message = refusal(running, into=blank_like(model))
    assert "wrong bytes twice in chunk 0 (t0, t1, t2, and 6 more)" in message


def test_wrong_bytes_from_every_source_are_no_model(weights):
    wrong = [corrupting(weights, times=99, wrong=index) for index in (2, 3)]
    with source(wrong[0]) as one, source(wrong[1]) as another:
        blanks = blank_like(MODEL)
        with contextlib.suppress(LoadFailed):
            load([one, another], blanks)
            assert differing(blanks, MODEL) == []  # each may have given what the other has wrong


def test_wrong_bytes_are_not_noticed_where_nobody_looks(weights):
    # What VERIFY is for.
    blanks = blank_like(MODEL)
    with source(corrupting(weights, times=1)) as running:
        load([running], blanks, config=settings(verify=False))
    assert differing(blanks, MODEL) == ["row.7"]


def test_memory_that_nothing_was_written_to_is_noticed(weights):
    zeros = [torch.zeros_like(tensor) for tensor in weights.tensors]
    with source(tapped(weights, lambda index, count: zeros[index])) as running:
        assert "wrong bytes twice" in refusal(running)


def test_chunks_in_the_wrong_order_are_noticed(weights):
    def swap(index, count):
        return weights.tensors[index ^ 1]

    with source(tapped(weights, swap)) as running:
        assert "wrong bytes twice" in refusal(running)


def lying_digest(weights, chunk=7):
    chunks = list(weights.digests.chunks)
    chunks[chunk] = "0" * 32
    return dataclasses.replace(
        weights, digests=dataclasses.replace(weights.digests, chunks=tuple(chunks))
    )


def lying_model_digest(weights):
    return dataclasses.replace(
        weights, digests=dataclasses.replace(weights.digests, model="0" * 32)
    )


def test_a_digest_that_is_wrong_drops_the_source(weights, log):
    blanks = blank_like(MODEL)
    with source(lying_digest(weights)) as liar, source(weights) as honest:
        load([liar, honest], blanks, config=ONE_AT_A_TIME)
    assert differing(blanks, MODEL) == []
    assert any(f"source {liar.address}: wrong bytes twice in chunk 7" in line for line in log)


def test_a_model_digest_that_is_wrong_drops_the_source_and_all_it_gave(weights, log):
    second = tapped(weights)
    blanks = blank_like(MODEL)
    with source(lying_model_digest(weights)) as liar, source(second) as honest:
        load([liar, honest], blanks, config=ONE_AT_A_TIME)
    assert differing(blanks, MODEL) == []
    assert sorted(second.tensors.read) == list(range(COUNT))
    assert any("was announced as 00000000" in line for line in log)


def test_a_lying_source_does_not_keep_an_honest_one_out(weights):
    turns = InTurn(lying_model_digest(weights))
    blanks = blank_like(MODEL)
    with (
        source(turns.weights) as liar,
        source(weights) as honest,
        turns.proxy(honest.address) as proxy,
    ):
        load([liar, proxy.address], blanks)
    assert differing(blanks, MODEL) == []


def test_bytes_that_agree_with_a_false_digest_are_not_the_announced_model(weights, other_weights):
    # Every chunk is what its digest says, and the whole is another model.
    mixed = dataclasses.replace(
        other_weights,
        digests=dataclasses.replace(other_weights.digests, model=weights.digests.model),
    )
    with source(mixed) as liar:
        assert "the model's digest is" in refusal(liar)


def test_a_source_that_sends_nothing_it_announced_is_lost(weights):
    def drop(message):
        wanted = message["label"] == "FETCH" and message["content"]["chunks"]
        return b"" if wanted else message

    config = settings(max_sources=1, progress_timeout=SOON)
    blanks = blank_like(MODEL)
    with source(weights) as running, Proxy(running.address, to_source=drop) as proxy:
        load([proxy.address, running], blanks, config=config)
    assert differing(blanks, MODEL) == []


# After the load


def test_no_thread_is_left_after_a_load(weights):
    before = threading.active_count()
    with source(weights) as running:
        load([closed_port(), running], blank_like(MODEL))
    assert until(lambda: threading.active_count() <= before)


def test_the_log_says_what_was_loaded_from_where(weights, log):
    with source(weights) as running:
        loaded = load([running], blank_like(MODEL))
    summary = next(line for line in log if "loaded" in line)
    assert "loaded 64 tensors, 8.4 MB" in summary
    assert f"from {running.address}, digest {loaded.digests.model}" in summary


# Faults at random, the same ones every time


FAULTS = ["none", "fails", "stalls", "withdraws", "corrupts once", "corrupts", "lies", "other"]


@contextlib.contextmanager
def faulty(fault, after, over, weights, other_weights):
    """A source with a fault that shows when it sends its `after`th chunk."""

    def tap(index, count):
        if count == after:
            if fault == "fails":
                raise RuntimeError("injected failure")
            if fault == "stalls":
                over.wait(30)
            if fault == "withdraws":
                running.offer.withdraw("the weights are being replaced")

    sent = {
        "corrupts once": lambda: corrupting(weights, 1, wrong=after),
        "corrupts": lambda: corrupting(weights, 99, wrong=after),
        "lies": lambda: lying_digest(weights, chunk=after),
        "other": lambda: other_weights,
    }.get(fault, lambda: tapped(weights, tap))()
    with source(sent) as running:
        yield running


@pytest.mark.parametrize("seed", range(8))
def test_whatever_goes_wrong_with_some_sources_a_good_one_is_enough(seed, weights, other_weights):
    chance = random.Random(seed)
    config = settings(max_sources=chance.choice([1, 2, 4]), progress_timeout=SOON)
    faults = [
        (chance.choice(FAULTS), chance.randrange(COUNT)) for _ in range(chance.randrange(1, 5))
    ]
    over = threading.Event()
    blanks = blank_like(MODEL)
    with contextlib.ExitStack() as stack:
        sources = [
            stack.enter_context(faulty(fault, after, over, weights, other_weights))
            for fault, after in faults
        ]
        sources.append(stack.enter_context(source(weights)))
        stack.callback(over.set)
        load(sources, blanks, config=config)
        over.set()
    assert [] in (differing(blanks, MODEL), differing(blanks, OTHER)), faults


@pytest.mark.parametrize("seed", range(5))
def test_damage_on_the_control_connection_is_survived(seed, weights):
    chance = random.Random(seed)

    def damage(message):
        line = bytearray(json.dumps(message).encode())
        if chance.random() < 0.15:
            line[chance.randrange(len(line))] = chance.randrange(256)
        return bytes(line) + b"\n"

    config = settings(max_sources=1, handshake_timeout=2.0, progress_timeout=SOON)
    blanks = blank_like(MODEL)
    with (
        source(weights, config=IMPATIENT) as running,
        Proxy(running.address, to_client=damage, to_source=damage) as proxy,
    ):
        load([proxy.address, running], blanks, config=config)
    assert differing(blanks, MODEL) == []
