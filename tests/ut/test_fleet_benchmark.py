"""What `make bench-fleet` says of what it has measured; the fleets themselves need a network."""

import xml.etree.ElementTree

import pytest
import torch

from benchmarks import fleet
from benchmarks.fleet import Case, Result


def result(*seconds, **more):
    return Result(dict(enumerate(seconds, start=1)), **more)


@pytest.mark.parametrize(
    ("case", "seconds", "last"),
    [
        (Case(3), (2.0, 3.0, 1.0), 1.5),
        (Case(3, slow=1), (9.0, 3.0, 1.0), 1.5),
        (Case(3, lies="flips"), (9.0, 3.0, 1.0), 1.5),
        (Case(3, late=1.0), (9.0, 9.0, 2.0), 1.0),
        (Case(3), (2.0, 3.0), None),
    ],
)
def test_the_time_of_a_fleet_is_that_of_its_last_client_that_counts(case, seconds, last):
    assert fleet.relative(case, result(*seconds), solo=2.0) == last


def test_those_that_are_killed_do_not_count():
    killed = Result({3: 5.0}, {1: "killed", 2: "killed"})
    assert fleet.relative(Case(3, killed=2), killed, solo=2.0) == 2.5


def summary(**changes):
    names = fleet.cases(1.0)
    times = dict.fromkeys(names, 1.25) | changes
    results = {name: result(1.0, wrong=1, seed_copies=1.5, storage_copies=1.0) for name in names}
    return fleet.summary(times, results), len(names)


def test_the_json_object_has_what_readers_of_it_expect():
    found, count = summary(liar_stale=1.75)
    assert found == {
        "relative": {"2": 1.25, "4": 1.25, "8": 1.25, "16": 1.25},
        "seed_copies": 1.5,
        "relays_killed": 1.25,
        "seed_killed_complete": True,
        "late": 1.25,
        "slow_link": 1.25,
        "cold_copies": 1.0,
        "liar": 1.75,
        "wrong": count,
    }


def test_a_load_that_failed_has_no_time():
    found, _ = summary(liar_stale=None, seed_killed_complete=None)
    assert found["liar"] is None
    assert found["seed_killed_complete"] is False


def test_the_picture_shows_each_size_with_its_time():
    svg = xml.etree.ElementTree.fromstring(fleet.picture({1: 1.0, 8: 1.39}, "a text"))
    texts = [each.text for each in svg.iter() if each.tag.endswith("text")]
    assert {"1", "8", "1.00", "1.39", "a text"} <= {*texts}


def test_lies_change_what_is_passed_on():
    views = [memoryview(b"abcd"), memoryview(b"ef")]
    assert [bytes(view) for view in fleet.flip(views)] == [b"abbd", b"ef"]
    assert [bytes(view) for view in fleet.stale(views)] == [bytes(4), bytes(2)]


def test_one_wrong_byte_is_seen():
    right = {"a": torch.zeros(9, dtype=torch.uint8), "b": torch.ones(9, dtype=torch.uint8)}
    found = {name: tensor.clone() for name, tensor in right.items()}
    assert fleet.same(found, right)
    found["b"][8] = 2
    assert not fleet.same(found, right)
