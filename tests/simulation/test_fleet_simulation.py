"""Seeded schedules of small fleets in virtual time: the decisions of real clients and servers."""

import random
from dataclasses import asdict, replace

import pytest

from benchmarks.fleet_simulation import CONFIG, PLACES_WHILE_LOADING, Case, simulate


def schedule(seed):
    """Joins, deaths, stalls and lies over three to eight peers."""
    draw = random.Random(seed)
    replicas = draw.randint(2, 7)
    part = draw.choice([0.0, 1 / replicas])
    fault = draw.choice(["killed", "stalled", "lying"])
    case = Case(
        replicas,
        chunks=draw.randint(4, 16),
        chunks_per_second=draw.choice([2.0, 100.0]),
        speeds=(1.0, *draw.sample([0.1, 0.5, 1.0, 3.0], 2)),
        within=draw.choice([0.0, 0.05, 3.0]),
        seed_dies=draw.choice([0.0, 0.0, 0.0, 0.5, 1.1]),
        preparing=draw.choice([0.0, 1.0]),
        seed=seed,
    )
    return replace(case, **{fault: part})


@pytest.mark.parametrize("hundred", range(20))
def test_every_honest_replica_completes_or_says_why_not(hundred):
    for seed in range(100 * hundred, 100 * hundred + 100):
        case = schedule(seed)
        result = simulate(case)
        assert result.most_sessions <= CONFIG.max_sessions * PLACES_WHILE_LOADING, case
        assert result.most_sources <= CONFIG.max_sources, case
        assert result.twice == 0, case
        assert result.complete + sum(result.fallbacks.values()) == result.honest, case
        assert "" not in result.fallbacks, case
        if not case.seed_dies:
            assert not result.fallbacks, case
            assert result.complete == result.honest, case


def test_a_schedule_can_be_given_again():
    for seed in range(5):
        once, again = (asdict(simulate(schedule(seed))) for _ in range(2))
        del once["seconds"], again["seconds"]
        assert once == again


def test_a_seed_sends_each_block_once_before_it_sends_one_twice():
    result = simulate(Case(4, chunks=64, chunks_per_second=100.0))
    assert result.repeated == 0
    assert result.complete == 4


@pytest.mark.parametrize(
    ("target", "fault"), [(1.12, {}), (1.2, {"slow": 1 / 8}), (1.3, {"lying": 1 / 8})]
)
def test_eight_take_little_longer_than_one_whoever_is_among_them(target, fault):
    # With some of these seeds the seed feeds the one that is slow or lies.
    case = Case(8, chunks=256, chunks_per_second=24.0, **fault)
    assert max(simulate(replace(case, seed=seed)).relative for seed in range(4)) <= target
