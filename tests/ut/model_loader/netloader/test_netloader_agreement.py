import random
import threading
import time
from dataclasses import dataclass, field

import hypothesis
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed import HashStore

from vllm_ascend.model_loader.netloader import agreement
from vllm_ascend.model_loader.netloader.agreement import (
    AS_CONFIGURED,
    Attempt,
    Order,
    Ranks,
    Report,
    decide,
    load_together,
)
from vllm_ascend.model_loader.netloader.errors import LoadFailed
from vllm_ascend.model_loader.netloader.interaction.api import Endpoint
from vllm_ascend.model_loader.netloader.interaction.cold_start import Choice

from .support import python


def digest(checkpoint, rank):
    return f"xxh3_128:{ord(checkpoint):016x}{rank:016x}"


def list_of(checkpoint, count=2):
    return {rank: digest(checkpoint, rank) for rank in range(count)}


def ranks(rank, count, store):
    # Of the second replica, whose workers are numbered on.
    return Ranks(rank, range(count), "netloader", store, worker=count + rank)


def together(attempts, **options):
    """What becomes of the ranks of an instance: what `load_together` returns, or the error."""
    store, outcomes = HashStore(), {}
    options = {"sources": True, "fallback": True} | options

    def run(rank):
        try:
            it = ranks(rank, len(attempts), store)
            outcomes[rank] = load_together(it, attempts[rank], **options)
        except Exception as error:
            outcomes[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(attempts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return [outcomes[rank] for rank in range(len(attempts))]


@dataclass
class Source:
    """A rank of an instance that has a checkpoint; it ends after so many loads."""

    checkpoint: str
    lives: int
    told: dict[int, str]

    def give(self, rank, wanted):
        if self.lives == 0 or wanted not in (None, digest(self.checkpoint, rank)):
            return None
        self.lives -= 1
        return Attempt(self.checkpoint, "10.0.0.1:1", digest(self.checkpoint, rank), [self.told])


@dataclass
class Rank:
    """One rank: its sources, and the checkpoint on its disk, if there is one."""

    rank: int
    sources: list[Source]
    disk: str | None
    fallback: bool
    hashes: bool = True
    orders: list[Order] = field(default_factory=list)

    def __call__(self, order):
        self.orders.append(order)
        wanted = order.weights[self.rank] if order.weights else None
        if not order.disk:
            for source in self.sources:
                if got := source.give(self.rank, wanted):
                    return got
            if order.weights is not None or (self.sources and not self.fallback):
                raise LoadFailed("no source")
        if self.disk is None:
            raise LoadFailed("nothing on disk")
        weights = digest(self.disk, self.rank) if self.hashes else None
        return Attempt(self.disk, weights=weights)


@st.composite
def instances(draw):
    count = draw(st.integers(2, 4))
    fallback, disk = draw(st.booleans()), draw(st.sampled_from(["a", "b", "c", None]))

    def source(rank):
        checkpoint = draw(st.sampled_from("ab"))
        told = list_of(checkpoint, count)
        if draw(st.integers(0, 5)) == 0:
            told.pop(draw(st.integers(0, count - 1)))
        return Source(checkpoint, draw(st.integers(0, 3)), told)

    return [
        Rank(
            rank,
            [source(rank) for _ in range(draw(st.integers(0, 3)))],
            disk,
            fallback,
            hashes=draw(st.booleans()),
        )
        for rank in range(count)
    ]


@given(instances())
@hypothesis.settings(max_examples=300)
def test_an_instance_has_weights_of_one_checkpoint_or_none_at_all(instance):
    store, outcomes = HashStore(), {}

    def run(each):
        try:
            outcomes[each.rank] = load_together(
                ranks(each.rank, len(instance), store),
                each,
                sources=bool(each.sources),
                fallback=each.fallback,
            )
        except LoadFailed as error:
            outcomes[each.rank] = error

    threads = [threading.Thread(target=run, args=(each,)) for each in instance]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(outcomes) == len(instance)
    failed = [one for one in outcomes.values() if isinstance(one, LoadFailed)]
    assert len(failed) in (0, len(instance))
    if not failed:
        [checkpoint] = {checkpoint for checkpoint, _ in outcomes.values()}
        [one] = {msgspec.json.encode(digests) for _, digests in outcomes.values()}
        told = msgspec.json.decode(one, type=dict[int, str])
        assert told.items() <= list_of(checkpoint, len(instance)).items()
    disk = instance[0].disk
    if disk is not None and instance[0].fallback:
        assert not failed  # all can read it
    for each in instance:
        assert len(each.orders) <= 2 + agreement._MOST_LISTS


def test_ranks_from_one_instance_load_once():
    told = list_of("a")
    each = [Rank(rank, [Source("a", 9, told)], None, True) for rank in (0, 1)]
    assert together(each) == [("a", told), ("a", told)]
    assert [one.orders for one in each] == [[AS_CONFIGURED], [AS_CONFIGURED]]


def test_a_rank_whose_disk_has_the_weights_of_the_list_loads_once():
    told = list_of("a")
    each = [Rank(0, [Source("a", 9, told)], "a", True), Rank(1, [], "a", True)]
    assert together(each) == [("a", told), ("a", told)]
    assert [one.orders for one in each] == [[AS_CONFIGURED], [AS_CONFIGURED]]


def test_a_rank_with_other_weights_tries_the_sources_of_the_list_again(log):
    told = list_of("a")
    late = Source("a", 9, told)
    each = [Rank(0, [Source("a", 9, told)], "b", True), Rank(1, [], "b", True)]
    first = each[1].__call__

    def second(order):
        got = first(order) if order == AS_CONFIGURED else late.give(1, order.weights[1])
        each[1].sources = [late]
        return got

    assert together([each[0], second]) == [("a", told), ("a", told)]
    assert each[0].orders == [AS_CONFIGURED]
    [line] = log
    assert line == (
        "NetLoader rank 3: the ranks of this instance have different weights: rank 0 has "
        f"{told[0]} of 10.0.0.1:1; rank 1 has {digest('b', 1)} of disk; this rank loads again from "
        "sources that have the weights of other ranks"
    )


def through(view, rank):
    return lambda order: (
        Attempt("disk", weights=digest("d", rank))
        if order.disk
        else Attempt("view", "10.0.0.1:1", digest("n", rank), view=view)
    )


def test_ranks_that_read_the_view_of_one_instance_have_weights_that_belong_together():
    first, second = together([through("instance:a", 0), through("instance:a", 1)], fallback=False)
    assert first == second == ("view", list_of("n"))


@pytest.mark.parametrize("views", [("instance:a", "instance:b"), ("instance:a", "")])
def test_ranks_that_read_the_views_of_two_instances_read_the_disk(views):
    loads = [through(view, rank) for rank, view in enumerate(views)]
    assert [loaded for loaded, _ in together(loads)] == ["disk", "disk"]


def test_without_such_a_source_the_ranks_from_peers_read_the_disk():
    told = list_of("a")
    gone = Source("a", 0, told)
    each = [Rank(0, [Source("a", 9, told)], "b", True), Rank(1, [gone], "b", True)]
    assert together(each) == [("b", list_of("b"))] * 2
    assert each[0].orders == [AS_CONFIGURED, Order(disk=True)]
    # The attempt to get the others' weights has cost this one its own.
    assert each[1].orders == [AS_CONFIGURED, Order(told), Order(disk=True)]


def test_a_rank_without_sources_is_not_sent_to_any():
    told = list_of("a")
    reports = [
        Report(0, True, True, "10.0.0.1:1", told[0], [told]),
        Report(1, False, True, weights=digest("b", 1)),
    ]
    assert decide(reports, [told], [AS_CONFIGURED]) == Order(disk=True)
    reports[1] = msgspec.structs.replace(reports[1], sources=True)
    assert decide(reports, [told], [AS_CONFIGURED]) == Order(told)


def test_the_list_that_most_ranks_agree_with_comes_first():
    a, b = list_of("a", 3), list_of("b", 3)
    held = {0: a[0], 1: b[1], 2: b[2]}
    reports = [Report(rank, True, True, "10.0.0.1:1", held[rank]) for rank in held]
    assert decide(reports, [a, b], [AS_CONFIGURED]) == Order(b)
    assert decide(reports, [a, b], [AS_CONFIGURED, Order(b)]) == Order(a)
    assert decide(reports, [a, b], [AS_CONFIGURED, Order(b), Order(a)]) == Order(disk=True)


def test_without_fallback_the_error_says_what_each_rank_has():
    a, b = list_of("a"), list_of("b")
    each = [Rank(rank, [], None, False) for rank in (0, 1)]
    each[0].sources, each[1].sources = [Source("a", 9, a)], [Source("b", 9, b)]
    one, other = together(each, fallback=False)
    assert str(one) == str(other)
    # The last attempt was to get the weights that rank 1 had at first.
    assert (
        "cannot get weights that belong together: rank 0 has none (LoadFailed: no source)"
        in str(one)
    )
    assert f"rank 1 has {b[1]} of 10.0.0.1:1; FALLBACK is false" in str(one)


def test_a_rank_that_fails_fails_as_it_would_alone_and_all_others_with_it():
    told = list_of("a")

    def fail(order):
        raise ZeroDivisionError("out of\nluck")

    one, other = together([Rank(0, [Source("a", 9, told)], "a", True), fail])
    assert isinstance(other, ZeroDivisionError)
    assert isinstance(one, LoadFailed)
    assert "rank 1 has none (ZeroDivisionError: out of luck)" in str(one)
    assert "FALLBACK" not in str(one)


def test_weights_from_disk_need_no_digest_where_no_rank_has_a_source():
    each = [Rank(rank, [], "a", True, hashes=False) for rank in (0, 1)]
    assert together(each, sources=False) == [("a", {}), ("a", {})]


def test_one_rank_alone_tells_nobody_and_fails_by_its_own_error():
    alone = Ranks(3, [3], "netloader")
    mine = Rank(3, [], "a", True)
    assert load_together(alone, mine, sources=True, fallback=True) == ("a", {3: digest("a", 3)})

    def fail(order):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        load_together(alone, fail, sources=True, fallback=True)


def test_a_rank_that_never_reports_is_named_in_the_log_and_in_the_error(monkeypatch, log):
    monkeypatch.setattr(agreement, "_NEWS", 0.0)
    monkeypatch.setattr(agreement, "_DEADLINE", 0.05)
    with pytest.raises(LoadFailed, match="rank 1 has not loaded within"):
        load_together(
            ranks(0, 2, HashStore()), Rank(0, [], "a", True), sources=False, fallback=True
        )
    assert log[0] == "NetLoader rank 2: waiting for rank 1, to compare weights digests"


def test_a_store_that_is_gone_is_a_failed_load():
    class Gone(HashStore):
        def set(self, *_):
            raise RuntimeError("Connection\nreset")

    with pytest.raises(LoadFailed, match="cannot compare their weights: Connection reset"):
        load_together(ranks(0, 2, Gone()), Rank(0, [], "a", True), sources=False, fallback=True)


def test_reports_do_not_pile_up_and_loads_are_not_mixed_up():
    store, seen = HashStore(), []
    end = 5

    def run(rank):
        it = ranks(rank, 2, store)
        for number in range(end):
            time.sleep(random.random() / 100)
            report = Report(rank, True, True, origin=str(number))
            seen.append([each.origin for each in it.exchange(report)] == [str(number)] * 2)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert seen == [True] * 2 * end
    left = [store.check([f"netloader/netloader/{n}/0"]) for n in range(end + 2)]
    assert left == [False] * end + [True, False]


_PROCESS = """
import sys
import torch.distributed as dist
from vllm_ascend.model_loader.netloader.agreement import Attempt, Ranks, load_together
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
group = dist.group.WORLD
ranks = Ranks(rank, range(2), "netloader", group.get_group_store())
told = {0: "xxh3_128:0", 1: "xxh3_128:1"}
def attempt(order):
    if rank == 1 and number == 0:
        raise OSError("the disk is gone")
    if rank == 1 and order.weights is None:
        return Attempt("disk", weights="xxh3_128:f")
    return Attempt("peers", "10.0.0.1:1", told[rank], [told])
for number in range(2):
    try:
        print(*load_together(ranks, attempt, sources=True, fallback=False))
    except Exception as error:
        print(type(error).__name__, error)
group.barrier().wait()
"""


def test_processes_of_a_gloo_group_agree_also_after_one_of_them_has_failed(tmp_path):
    processes = [python("-c", _PROCESS, rank, tmp_path / "store") for rank in (0, 1)]
    one, other = (process.communicate(timeout=200)[0].splitlines() for process in processes)
    agreed = "peers {0: 'xxh3_128:0', 1: 'xxh3_128:1'}"
    assert one[0].startswith("LoadFailed the ranks of this instance cannot get")
    assert "rank 1 has none (OSError: the disk is gone)" in one[0]
    assert one[1:] == [agreed]
    assert other == ["OSError the disk is gone", agreed]


def test_the_list_is_what_the_ranks_have_published_last():
    store = HashStore()
    one, other = (ranks(rank, 2, store) for rank in (0, 1))
    agreed = list_of("a")
    assert one.present(agreed) == agreed
    other.publish(digest("b", 1))
    assert one.present(agreed) == {0: digest("a", 0), 1: digest("b", 1)}
    other.publish(None)
    assert one.present(agreed) == {0: digest("a", 0)}
    alone = Ranks(3, [3], "netloader")
    alone.publish(None)
    assert alone.present({3: "x"}) == {3: "x"}


def test_each_rank_knows_where_those_listen_that_have_told():
    store = HashStore()
    one, other = (ranks(rank, 2, store) for rank in (0, 1))
    first, second = Endpoint("10.0.0.1:1", "a"), Endpoint("10.0.0.2:2", "b")
    assert one.endpoints() == {}
    one.publish_endpoint(first)
    assert other.endpoints() == {0: first}
    other.publish_endpoint(second)
    assert one.endpoints() == other.endpoints() == {0: first, 1: second}
    later = Ranks(0, range(2), "netloader", store, instance=2)  # of the same processes
    assert later.endpoints() == {}
    alone = Ranks(3, [3], "netloader")
    alone.publish_endpoint(first)
    assert alone.endpoints() == {}


def test_each_rank_knows_the_hosts_of_those_that_have_told():
    store = HashStore()
    one, other = (ranks(rank, 2, store) for rank in (0, 1))
    other.publish(digest("a", 1))
    assert one.hosts() == []
    other.publish_host("10.0.0.2")
    assert one.hosts() == ["10.0.0.2"]
    one.publish_host("10.0.0.1")
    assert other.hosts() == ["10.0.0.1", "10.0.0.2"]
    assert Ranks(0, [0], "netloader").hosts() == []


def test_an_instance_reads_its_disk_for_all_only_if_each_of_its_ranks_can():
    store = HashStore()
    one, other = (ranks(rank, 2, store) for rank in (0, 1))
    one.publish_can_read(True)
    assert one.can_read(True) is None and one.can_read(False) is False
    other.publish_can_read(False)
    assert one.can_read(True) is other.can_read(False) is False
    other.publish_can_read(True)
    assert one.can_read(True) is other.can_read(True) is True
    assert Ranks(0, [0], "netloader").can_read(True) is True


class CountingStore:
    """Counts what is asked of a store."""

    def __init__(self):
        self.store, self.asked = HashStore(), 0

    def __getattr__(self, name):
        self.asked += 1
        return getattr(self.store, name)


def test_what_many_ranks_have_told_costs_two_questions():
    store = CountingStore()
    many = [ranks(rank, 64, store) for rank in range(64)]
    for rank, each in enumerate(many):
        each.publish(digest("a", rank))
    store.asked = 0
    assert many[0].present({}) == {rank: digest("a", rank) for rank in range(64)}
    assert store.asked == 2


def test_each_rank_knows_what_the_first_one_has_chosen_for_all():
    store = HashStore()
    one, other = (ranks(rank, 2, store) for rank in (0, 1))
    assert (one.chooses, other.chooses) == (True, False)
    assert other.choice() is None
    other.publish_choice(Choice.LEAVE)  # has no say
    assert other.choice() is None
    one.publish_choice(Choice.WAIT)
    one.publish_choice(Choice.READ)
    assert other.choice() is Choice.READ
    later = Ranks(1, range(2), "netloader", store, instance=2)  # of the same processes
    assert later.choice() is None
