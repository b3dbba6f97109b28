"""What the two ends of a session do, whatever the transport between them."""

import logging
import re
import sys
import threading
import time

import pytest
import torch

from vllm_ascend.model_loader.netloader import load
from vllm_ascend.model_loader.netloader.errors import (
    AskOthers,
    MakesRoom,
    NotHere,
    SourceBusy,
    SourceLost,
    TransferCorrupt,
    Withdrawn,
)
from vllm_ascend.model_loader.netloader.executor import elastic_load, scheduler
from vllm_ascend.model_loader.netloader.executor.chunks.blocks import Run
from vllm_ascend.model_loader.netloader.executor.elastic_load import P2PLoad, P2PSend
from vllm_ascend.model_loader.netloader.executor.rate_limiter import RateLimiter
from vllm_ascend.model_loader.netloader.executor.scheduler import Peer, Scheduler
from vllm_ascend.model_loader.netloader.loading.target import chunk_mib_for
from vllm_ascend.model_loader.netloader.utils import logger

from .support import MIB, PATIENCE, incomplete, random_tensor, store_of, until

COUNT = 12
TENSORS = {f"t{i}": random_tensor(i, torch.uint8, MIB) for i in range(COUNT)}


@pytest.fixture(scope="module")
def there():
    return store_of(TENSORS)


class Receiver:
    """Brings runs from a store at once; `spoil(run)` may raise, or say that bytes get lost."""

    def __init__(self, there, here, *, batch=1, ahead=1, max_bytes=sys.maxsize):
        self.there, self.here = there, here
        self.batch, self.ahead, self.max_bytes = batch, ahead, max_bytes
        self.requests, self.waiting = [], []
        self.spoil = lambda run: False

    def request(self, runs):
        self.requests.append([*runs])
        self.waiting += runs
        assert len(self.waiting) <= self.ahead

    def receive(self):
        run = self.waiting.pop(0)
        wrong = self.spoil(run)
        for block in range(run.first, run.last + 1):
            data = torch.zeros(MIB, dtype=torch.uint8) if wrong else self.there.tensors[block]
            self.here.tensors[block].copy_(data)
        return lambda: self.here.wrong(run)


class Client:
    def __init__(self, there, *, verify=True, keep_alive=0.005, **options):
        self.here = incomplete(there, [torch.empty_like(tensor) for tensor in there.tensors])
        self.scheduler = Scheduler(there.blocks, there.blocks.cut(MIB))
        self.receiver = Receiver(there, self.here, **options)
        self.load = P2PLoad(
            self.receiver, self.here, self.scheduler, verify=verify, keep_alive=keep_alive
        )

    def is_right(self):
        return self.here.complete and self.here.wrong(Run(0, COUNT - 1)) == []


@pytest.mark.parametrize(("batch", "ahead"), [(1, 1), (1, 3), (4, 8), (100, 200)])
def test_a_store_is_filled_with_runs_asked_for_ahead(there, batch, ahead):
    client = Client(there, batch=batch, ahead=ahead)
    client.load.run()
    assert client.is_right()
    assert client.scheduler.finished
    assert client.load.bytes_received == COUNT * MIB
    assert client.load.outstanding == []
    assert all(0 < len(runs) <= batch for runs in client.receiver.requests)


def test_the_next_run_is_on_its_way_while_one_is_checked(there):
    client, checked = Client(there), []
    wrong = client.here.wrong

    def check(run):
        checked.append((run, [*client.receiver.waiting]))
        return wrong(run)

    client.here.wrong = check
    client.load.run()
    assert checked[0] == (Run(0, 0), [Run(1, 1)])
    assert checked[-1] == (Run(COUNT - 1, COUNT - 1), [])


def test_a_run_that_came_wrong_once_is_fetched_again(there):
    client, spoilt = Client(there), []

    def spoil(run):
        return run == Run(3, 3) and run not in spoilt and not spoilt.append(run)

    client.receiver.spoil = spoil
    client.load.run()
    assert client.is_right()
    assert [runs for runs in client.receiver.requests if runs == [Run(3, 3)]] == [[Run(3, 3)]] * 2
    assert client.load.bytes_received == COUNT * MIB


def test_a_run_that_came_wrong_twice_ends_the_session_with_the_tensors_name(there):
    client = Client(there)
    client.receiver.spoil = lambda run: run == Run(3, 3)
    with pytest.raises(TransferCorrupt, match=r"wrong bytes twice in blocks 3-3 \(t3\)"):
        client.load.run()
    assert Run(3, 3) in client.load.outstanding
    with pytest.raises(NotHere):
        client.here.check(Run(3, 3))
    # What else was on its way comes back with it.
    client.scheduler.give_back(client.load.outstanding)
    other = P2PLoad(
        Receiver(there, client.here), client.here, client.scheduler, verify=True, keep_alive=1
    )
    other.run()
    assert client.is_right()
    assert client.load.bytes_received + other.bytes_received == COUNT * MIB


def test_many_tensors_that_came_wrong_are_named_in_part():
    store = store_of({f"t{i}": random_tensor(i, torch.uint8, 10) for i in range(9)})
    here = incomplete(store, [torch.zeros(10, dtype=torch.uint8) for _ in range(9)])

    class Nothing(Receiver):
        def receive(self):
            run = self.waiting.pop(0)
            return lambda: here.wrong(run)

    load = P2PLoad(
        Nothing(store, here),
        here,
        Scheduler(store.blocks, store.blocks.cut(MIB)),
        verify=True,
        keep_alive=1,
    )
    with pytest.raises(TransferCorrupt, match=r"blocks 0-8 \(t0, t1, t2, and 6 more\)"):
        load.run()


def test_without_verification_whatever_comes_is_taken(there):
    client = Client(there, verify=False)
    client.receiver.spoil = lambda run: True
    client.load.run()
    assert client.here.complete
    assert not client.is_right()


def test_after_a_failure_what_was_asked_for_can_be_given_to_another_session(there):
    client = Client(there, batch=2, ahead=6)

    def spoil(run):
        if run.first == 5:
            raise SourceLost("gone")

    client.receiver.spoil = spoil
    with pytest.raises(SourceLost):
        client.load.run()
    outstanding = client.load.outstanding
    assert outstanding[0] == Run(5, 5)
    done = client.load.bytes_received // MIB
    client.scheduler.give_back(outstanding)
    left = client.scheduler.take(Peer(), 100)
    assert done + len(left) == COUNT
    assert len({*left}) == len(left)


def test_runs_over_the_sources_limit_are_not_asked_for():
    store = store_of({"t": random_tensor(0, torch.uint8, 4 * MIB)})
    here = incomplete(store, [torch.empty_like(store.tensors[0])])

    class Whole(Receiver):
        def receive(self):
            run = self.waiting.pop(0)
            for part, own in zip(self.there.parts(run), self.here.parts(run), strict=True):
                own.copy_(part)
            return lambda: here.wrong(run)

    receiver = Whole(store, here, max_bytes=2 * MIB)
    P2PLoad(
        receiver,
        here,
        Scheduler(store.blocks, store.blocks.cut(4 * MIB)),
        verify=True,
        keep_alive=1,
    ).run()
    assert here.complete
    assert [runs for runs in receiver.requests if runs] == [[Run(0, 1)], [Run(2, 3)]]


def test_a_session_with_nothing_to_fetch_says_that_it_is_there_until_it_has(there):
    client = Client(there)
    elsewhere = client.scheduler.take(Peer(), COUNT)
    thread = threading.Thread(target=client.load.run, daemon=True)
    thread.start()
    assert until(lambda: client.receiver.requests[:3] == [[], [], []])
    client.scheduler.give_back(elsewhere)
    thread.join(PATIENCE)
    assert client.is_right()


def test_a_session_ends_when_others_have_brought_all_of_it(there):
    client = Client(there, keep_alive=10 * PATIENCE)
    elsewhere = client.scheduler.take(Peer(), COUNT)
    thread = threading.Thread(target=client.load.run, daemon=True)
    thread.start()
    for run in elsewhere:
        client.scheduler.done(run)
    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert [runs for runs in client.receiver.requests if runs] == []


def of_incomplete_source(there, **its):
    client = Client(there)
    return P2PLoad(
        client.receiver,
        client.here,
        client.scheduler,
        verify=True,
        peer=Peer(complete=False),
        **{"keep_alive": 10 * PATIENCE} | its,
    )


def test_a_source_without_news_is_left_if_there_is_another_to_ask(there, monkeypatch):
    monkeypatch.setattr(elastic_load, "_TRY_ANOTHER", 0.01)
    asked = iter([False, True])
    with pytest.raises(SourceBusy, match="no blocks just now"):
        of_incomplete_source(there, others=lambda: next(asked)).run()


def test_a_source_whose_replacement_takes_longer_is_left_later(there, monkeypatch):
    monkeypatch.setattr(elastic_load, "_TRY_ANOTHER", 0.01)
    load = of_incomplete_source(there, others=lambda: True, patience=0.2)
    started = time.monotonic()
    with pytest.raises(SourceBusy, match="no blocks just now"):
        load.run()
    assert time.monotonic() - started >= 0.2


def test_a_relay_that_brings_least_is_left_for_another_once_all_has_come_that_it_was_asked_for(
    there, monkeypatch
):
    monkeypatch.setattr(scheduler, "_REVIEW", 0.0)
    free = iter([False, False, True])
    load = of_incomplete_source(there, others=lambda: next(free))
    load._scheduler.heard(load._peer, [Run(0, COUNT - 1)], complete=False)
    with pytest.raises(MakesRoom):
        load.run()
    assert load.bytes_received > 0
    assert load.outstanding == []


def test_a_source_without_news_is_left_in_the_end(there):
    with pytest.raises(SourceBusy, match="no blocks just now"):
        of_incomplete_source(there, keep_alive=0.01).run()


def test_a_source_that_names_others_for_all_that_is_wanted_is_left(there, monkeypatch):
    monkeypatch.setattr(scheduler, "_ASK_AGAIN", 0.0)
    monkeypatch.setattr(elastic_load, "STARVED", 0.01, raising=False)
    client, asked = Client(there, keep_alive=0.01), []

    def spoil(run):
        asked.append(run)
        assert len(asked) < 100_000
        if len(asked) > 1:
            raise AskOthers("others have got these")

    client.receiver.spoil = spoil
    with pytest.raises(SourceBusy, match="names others for all that is wanted"):
        client.load.run()
    assert client.load.bytes_received == MIB


def test_a_source_that_is_not_trusted_sends_wrong_bytes_once(there):
    client = Client(there)
    client.load._peer.trusted = False
    client.receiver.spoil = lambda run: run.first == 5
    with pytest.raises(TransferCorrupt, match="wrong bytes in blocks 5-5"):
        client.load.run()
    assert client.receiver.requests.count([Run(5, 5)]) == 1


# Sending


class Sender:
    def __init__(self):
        self.sent = []

    def send(self, run):
        self.sent.append(run)


def test_runs_are_sent_in_order_and_their_bytes_are_counted(there):
    sender = Sender()
    send = P2PSend(there, sender, RateLimiter(None))
    for run in (Run(3, 5), Run(0, 0)):
        send.send(run)
    assert sender.sent == [Run(3, 5), Run(0, 0)]
    assert send.bytes_sent == 4 * MIB


def test_what_could_not_be_sent_does_not_count(there):
    sender = Sender()
    sender.send = lambda run: 1 / 0
    send = P2PSend(there, sender, RateLimiter(None))
    with pytest.raises(ZeroDivisionError):
        send.send(Run(0, 0))
    assert send.bytes_sent == 0


def test_a_block_that_is_not_here_yet_is_not_sent_and_costs_nothing_else(there):
    client = Client(there)
    client.receiver.request([Run(2, 2)])
    client.receiver.receive()
    with pytest.raises(NotHere):
        P2PSend(client.here, Sender(), RateLimiter(None)).send(Run(2, 2))
    client.here.add(Run(2, 2))
    sender = Sender()
    send = P2PSend(client.here, sender, RateLimiter(None))
    send.send(Run(2, 2))
    with pytest.raises(NotHere):
        send.send(Run(3, 3))
    assert sender.sent == [Run(2, 2)]


def test_withdrawing_the_weights_ends_a_wait_for_the_rate_limiter():
    store = store_of({"t": random_tensor(0, torch.uint8, MIB)})
    send = P2PSend(store, Sender(), RateLimiter(MIB // 1000))
    send.send(Run(0, 0))
    outcome = []

    def wait():
        try:
            send.send(Run(0, 0))
        except Withdrawn as error:
            outcome.append(str(error))

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    thread.join(0.05)
    assert thread.is_alive()
    store.withdraw(Withdrawn("the weights are being replaced"))
    thread.join(PATIENCE)
    assert outcome == ["the weights are being replaced"]
    assert send.bytes_sent == MIB


@pytest.mark.parametrize(
    ("gib", "groups", "relays", "mib"),
    [
        (0.001, False, True, 1),
        (1, False, True, 2),
        (4, False, True, 8),
        (16, False, True, 8),
        (1, False, False, 8),
        (1, True, True, 16),
    ],
)
def test_what_is_passed_on_over_http_is_cut_into_many_chunks(gib, groups, relays, mib):
    assert chunk_mib_for(int(gib * (1 << 30)), groups, relays) == mib


def test_the_progress_bar_shows_bytes_leaves_log_lines_alone_and_is_closed_on_failure(
    capsys, monkeypatch
):
    handlers = [logging.StreamHandler(sys.stderr)]
    monkeypatch.setattr(logging.getLogger("vllm"), "handlers", handlers)

    def fail(bar):
        with bar:
            bar.show(0, 0, 1)
            assert capsys.readouterr().err == ""  # nobody knows of how many
            bar.show(3_000_000, 12_000_000, 1)
            logger.warning("a source is lost")
            bar.show(6_000_000, 12_000_000, 2)
            raise SourceLost("injected failure")

    bar = load._ProgressBar(time.monotonic())
    with pytest.raises(SourceLost):
        fail(bar)
    logger.warning("it is over")
    pieces = [piece.strip() for piece in re.split(r"[\r\n]", capsys.readouterr().err)]
    assert {"a source is lost", "it is over"} <= {*pieces}
    last = [piece for piece in pieces if piece.startswith("Loading weights from peers: ")][-1]
    assert "50%" in last and "6.00M/12.0M" in last and "B/s, peers=2]" in last
    assert logging.getLogger("vllm").handlers == handlers
