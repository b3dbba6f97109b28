"""Sources that are of no use: each is refused with the reason, and the next one is asked."""

import pytest

from vllm_ascend.model_loader.netloader.config import MAX_MODEL_NAME_BYTES
from vllm_ascend.model_loader.netloader.executor.chunks.digests import combine
from vllm_ascend.model_loader.netloader.executor.devices.cpu import CpuDevice
from vllm_ascend.model_loader.netloader.executor.store import make_store

from . import models
from .faults import closed_port, failing_after, tapped
from .models import ROW, rows
from .sides import expected, fresh, identity, load, load_here, source, store_of
from .ways import Way

ONE = {"max_sources": 1}


def passed_over(way, useless, model=rows, **options):
    """Return what a client says of a source before it loads from the next one."""
    with source(way, model) as right:
        outcome = load(way, [useless, right], model, **ONE, **options).check()
    said = [line for line in outcome.log if f"source {useless}: " in line]
    assert len(said) == 1, said
    return said[0]


def test_a_source_that_is_not_there_is_passed_over(way):
    assert "cannot connect: Connection refused" in passed_over(way, closed_port())


def test_a_source_of_another_model_is_passed_over(way):
    with source(way, who=identity(way, model="another")) as other:
        said = passed_over(way, other.address)
    assert "other_model: the models differ: model is 'small' here and 'another' there" in said


@pytest.mark.parametrize(
    ("there", "here", "said"),
    [
        (models.other_rows, rows, f"row.7 is uint8[{ROW}] here and float32[5] there"),
        (models.more_rows, rows, "row.24 is only there"),
        (rows, models.more_rows, "row.24 is only here"),
        (models.tied, models.untied, "b shares the memory of no other here and of a there"),
        (models.untied, models.tied, "b shares the memory of a here and of no other there"),
    ],
)
def test_a_source_of_other_tensors_is_passed_over(way, there, here, said):
    with source(way, there) as other:
        assert said in passed_over(way, other.address, here)


def test_a_source_that_cannot_serve_is_passed_over(way):
    with source(way, None, reason="a.weight has changed") as other:
        assert "cannot_serve: a.weight has changed" in passed_over(way, other.address)


def test_a_source_without_the_model_is_passed_over(way):
    with source(way, who=identity(way, group="netloader_draft")) as other:
        said = passed_over(way, other.address)
    assert "no_model: there is no model of group 'netloader'" in said


def test_another_layout_is_refused(way):
    device, there = way.device(), {"raw": "processed", "processed": "raw"}
    layout = there[device.layout]
    with source(way, make_store(expected(way, rows, 0), layout, {}, device)) as other:
        said = passed_over(way, other.address)
    assert f"layout is {device.layout!r} here and {layout!r} there" in said


def test_another_digest_algorithm_is_refused_unless_nobody_looks(way):
    device, store = way.device(), fresh(store_of(way, models.small))
    algorithm = "md5"
    store.digests = combine(algorithm, store.manifest, store.blocks, store.digests.blocks)
    with source(way, store) as running:
        load(way, [running], models.small).check_failed(
            f"digests are {device.digest_algorithm} here and {algorithm} there"
        )
        load(way, [running], models.small, verify=False).check()


@pytest.mark.parametrize("name", ["x" * MAX_MODEL_NAME_BYTES, "ü" * 85])
def test_the_longest_model_name_is_no_problem(way, name):
    who = identity(way, model=name, group="netloader_draft")
    with source(way, who=who) as running:
        load(way, [running], who=who).check()


def test_no_sources_at_all_is_a_failure_that_says_so(way):
    assert load(way, [], models.nothing).reasons == "there are no sources"


def test_all_reasons_stand_in_one_line_when_no_source_is_left(way):
    dead = closed_port()
    with (
        source(way, who=identity(way, tp=2)) as other,
        source(way, None, reason="not\nto be had") as declined,
        source(way, tapped(way, rows, failing_after(3))) as failing,
    ):
        outcome = load(way, [dead, other, declined, failing], **ONE).check_failed()
    reasons = outcome.reasons.split("; ")
    assert f"{dead}: cannot connect: Connection refused" in reasons
    assert f"{other.address}: other_model: the models differ: tp is 1 here and 2 there" in reasons
    assert f"{declined.address}: cannot_serve: not to be had" in reasons
    assert any(reason.startswith(f"{failing.address}: ") for reason in reasons)
    assert len(reasons) == 4


# What is wrong on this side


class Broken(CpuDevice):
    def digests(self, parts):
        raise RuntimeError("the device\n\tis out of order")

    def prefault(self, tensors, stop):
        raise RuntimeError("the device is out of order")


@pytest.mark.ways(Way.HTTP)
def test_an_error_on_this_side_is_a_failure_too_and_one_line(way):
    with source(way) as running:
        outcome = load_here(way, [running], device=Broken())
    outcome.check_failed("the device is out of order")
    assert not any("\n" in line for line in outcome.log if "Traceback" not in line)


@pytest.mark.ways(Way.HTTP)
def test_memory_that_cannot_be_prefaulted_costs_only_speed(way):
    with source(way) as running:
        load_here(way, [running], device=Broken(), verify=False).check()
