"""Replicas start together with one name, and none of them has the weights."""

import pytest

from vllm_ascend.model_loader.netloader.interaction.client import ElasticClient
from vllm_ascend.model_loader.netloader.interaction.cold_start import Choice
from vllm_ascend.model_loader.netloader.utils import Lookup, Name

from .fleet import fleet
from .models import rows
from .sides import PATIENCE, identity, log_lines, source, until
from .ways import Way

pytestmark = pytest.mark.ways(Way.HTTP)


def start(replicas, *, among=None, **how):
    """Let replicas load; their name stands for all of `among`, themselves included."""
    names = [Name(Lookup.INSTANCE, *each_of(one)) for one in among or replicas]
    for replica in replicas:
        replica.cold = True
        for key, value in how.items():
            setattr(replica, key, value)
        replica.start(names)


def each_of(replica):
    return replica.address.host, replica.address.port


def readers(replicas):
    return [replica for replica in replicas if replica.has_read]


def state_of(replica):
    with ElasticClient.connect(replica.address, connect=5, handshake=5, progress=5) as client:
        return [(model.state, model.can_read) for model in client.status().models]


def test_of_eight_that_start_together_one_reads_and_the_others_get_it_from_there(way):
    with fleet(way, 8, rows) as replicas, log_lines() as lines:
        start(replicas)
        for replica in replicas:
            replica.check()
        assert [one.name for one in readers(replicas)] == ["replica 0"]
        assert replicas[0].said == [Choice.WAIT, Choice.READ]
        assert all(one.said[-1] is Choice.LEAVE for one in replicas[1:])
    assert sum("chosen to read the weights from disk" in line for line in lines) == 1


def test_those_that_wait_say_so_and_name_the_one_that_reads(way):
    with fleet(way, 3, rows) as replicas, log_lines() as lines:
        start(replicas, hold=True)
        first, *others = replicas
        assert first.holding.wait(PATIENCE)
        says = f"waiting for {first.address} (instance {first.name}), which reads the weights"
        until(lambda: sum(says in line for line in lines) == len(others))
        assert state_of(first) == [("reading", True)]
        assert [state_of(one) for one in others] == [[("waiting", True)]] * 2
        first.go_on.set()
        for replica in replicas:
            replica.go_on.set()
            replica.check()
        assert readers(replicas) == [first]


def test_when_the_one_that_reads_dies_the_next_one_takes_over_and_no_other(way):
    with fleet(way, 4, rows) as replicas:
        start(replicas, hold=True)
        first, *others = replicas
        assert first.holding.wait(PATIENCE)
        first.die()
        first.go_on.set()
        until(lambda: readers(others))
        for replica in others:
            replica.go_on.set()
            replica.check()
        assert [one.name for one in readers(others)] == ["replica 1"]


def test_a_newcomer_with_a_lesser_id_waits_for_the_one_that_reads(way):
    with fleet(way, 3, rows) as replicas:
        newcomer, *others = replicas
        start(others, among=replicas, hold=True)
        assert others[0].holding.wait(PATIENCE)
        start([newcomer], among=replicas)
        until(lambda: state_of(newcomer) == [("waiting", True)])
        for replica in others:
            replica.go_on.set()
        for replica in replicas:
            replica.check()
        assert readers(replicas) == others[:1]


def test_one_without_weights_on_its_disk_gets_those_of_another_and_without_any_all_give_up(way):
    with fleet(way, 3, rows) as replicas:
        start(replicas[:2], among=replicas, can_read=False)
        start(replicas[2:], among=replicas)
        for replica in replicas:
            replica.check()
        assert readers(replicas) == replicas[2:]
    with fleet(way, 2, rows, source_wait=2.0) as replicas:
        start(replicas, can_read=False)
        for replica in replicas:
            replica.thread.join(PATIENCE)
        assert all("has no weights either" in replica.reasons for replica in replicas)


def test_of_those_without_weights_on_disk_one_reads_an_instance_that_is_cut_otherwise(way):
    cut = source(way, rows, who=identity(way, tp=2))
    with fleet(way, 4, rows) as replicas, cut as other:
        start(replicas, among=[*replicas, other], can_read=False)
        for replica in replicas:
            replica.check()
        [reader] = readers(replicas)
        assert set(reader.others) == {str(other.address)}
        assert other.status.bytes_sent == 0


def test_one_that_others_do_not_find_by_the_name_never_reads_for_all(way):
    with fleet(way, 2, rows, source_wait=2.0) as [stranger, gone]:
        gone.die()
        start([stranger], among=[gone])
        stranger.thread.join(PATIENCE)
        assert stranger.reasons and not stranger.has_read


def test_one_whose_weights_come_from_a_source_reads_nothing(way):
    with fleet(way, 2, rows) as [first, second]:
        start([first])
        first.check()
        start([second], among=[first, second])
        second.check()
        assert readers([first, second]) == [first]
        assert second.gave == str(first.address)


def test_a_rank_that_does_not_choose_does_what_the_first_one_has_told(way):
    with fleet(way, 2, rows) as [reads, leaves]:
        told = {reads: None, leaves: None}
        for one in told:
            start([one], told=lambda one=one: told[one])
        until(lambda: all(state_of(one) == [("waiting", True)] for one in told))
        assert not reads.has_read
        told.update({reads: Choice.READ, leaves: Choice.LEAVE})
        reads.check()
        leaves.thread.join(PATIENCE)
        assert reads.has_read and not leaves.has_read and leaves.reasons
