"""How the offers of an instance follow the changes of its weights."""

import contextlib
import threading

import pytest

from vllm_ascend.model_loader.netloader.changes import After, Change, Instance

from .support import PATIENCE

RELOAD = Change("reload", After.WHOLE)
LATER = Change("reload", After.WHOLE, at_once=False)
START = Change("start", After.MORE)
PUSH = Change("push", After.UNKNOWN)
SLEEP, DEEP_SLEEP = (Change(f"sleep {n}", After.MORE, sleep=n) for n in (1, 2))
WAKE = Change("wake", After.AWAKE, at_once=False)


class Story:
    """What an instance's offers go through: `withdrawn` and `renewed`, in order."""

    def __init__(self):
        self.told = []
        self.instance = Instance(self._withdraw, self._renew)
        self.hold = threading.Event()
        self.hold.set()
        self.begun = threading.Event()

    def _withdraw(self, code, reason):
        self.told.append(code.text)
        self.reason = reason

    def _renew(self, name, directly, unchanged, stop):
        self.begun.set()
        while not self.hold.wait(0.001) and not stop.is_set():
            pass
        how = ["directly"] * directly + ["unchanged"] * unchanged
        self.told.append("stopped" if stop.is_set() else " ".join(["renewed", *how]))

    def do(self, *changes, fail=False):
        for change in changes:
            try:
                with self.instance.changing(change):
                    if fail:
                        raise ZeroDivisionError
            except ZeroDivisionError:
                assert fail
            self.instance.wait()
        return self.told


@pytest.fixture
def story():
    return Story()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ([RELOAD], ["changing", "renewed"]),
        ([Change("copy", After.WHOLE, directly=True)], ["changing", "renewed directly"]),
        ([LATER], []),
        ([START, RELOAD], ["changing", "changing", "renewed"]),
        (
            [Change("start", After.MORE, directly=True), RELOAD],
            ["changing", "changing", "renewed directly"],
        ),
        ([START], ["changing"]),
        ([PUSH], ["changing", "cannot_serve"]),
        ([PUSH, RELOAD], ["changing", "cannot_serve", "changing", "renewed"]),
        ([Change("EPLB", After.MOVED)], ["changing", "cannot_serve"]),
        ([SLEEP], ["asleep"]),
        ([SLEEP, WAKE], ["asleep", "renewed unchanged"]),
        ([WAKE], []),
        ([DEEP_SLEEP, WAKE], ["asleep", "changing"]),
        ([DEEP_SLEEP, WAKE, RELOAD], ["asleep", "changing", "changing", "renewed"]),
        ([SLEEP, DEEP_SLEEP, SLEEP, WAKE], ["asleep", "asleep", "asleep", "changing"]),
        ([SLEEP, RELOAD], ["asleep"]),
        ([START, WAKE], ["changing"]),
        ([RELOAD, LATER], ["changing", "renewed"]),
    ],
    ids=str,
)
def test_changes_one_after_the_other(story, changes, told):
    assert story.do(*changes) == told


def test_nothing_is_offered_before_the_outermost_change_is_over(story):
    with story.instance.changing(LATER):
        assert story.told == []
        with story.instance.changing(PUSH):
            assert story.told == ["changing"]
        story.instance.wait()
        assert story.told == ["changing"]
    story.instance.wait()
    assert story.told == ["changing", "renewed"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (LATER, []),
        (RELOAD, ["changing", "renewed unchanged"]),
        (START, ["changing", "renewed unchanged"]),
        (SLEEP, ["asleep", "cannot_serve"]),
    ],
)
def test_a_change_that_fails_leaves_the_weights_as_they_were_or_no_source(story, change, told):
    assert story.do(change, fail=True) == told


@pytest.mark.parametrize(
    ("level", "told"), [(SLEEP, "renewed unchanged"), (DEEP_SLEEP, "changing")]
)
def test_an_instance_that_could_not_be_woken_up_sleeps_on(story, level, told):
    """Nobody reads its memory, which may not be there."""
    story.do(level)
    assert story.do(WAKE, fail=True) == ["asleep"]
    assert story.do(WAKE) == ["asleep", told]


def test_after_a_sleep_that_failed_nobody_reads_the_weights_until_others_are_in(story):
    story.do(SLEEP, fail=True)
    assert story.do(WAKE) == ["asleep", "cannot_serve"]
    assert story.reason == "sleep 1 has failed, and which weights are in memory is not known"
    assert story.do(RELOAD) == ["asleep", "cannot_serve", "changing", "renewed"]


def test_a_change_ends_the_hashing_of_the_one_before_it_before_the_first_byte_changes(story):
    story.hold.clear()
    with story.instance.changing(RELOAD):
        pass
    assert story.begun.wait(PATIENCE)
    with story.instance.changing(RELOAD):
        assert story.told == ["changing", "stopped", "changing"]
    story.hold.set()
    story.instance.wait()
    assert story.told[-1] == "renewed"


def test_a_change_without_notice_is_hashed_unless_there_is_another_one(story):
    story.instance.changed_without_notice()
    story.instance.wait()
    assert story.told == ["renewed directly"]
    story.do(START)
    story.instance.changed_without_notice()
    story.instance.wait()
    assert story.told == ["renewed directly", "changing"]


@pytest.mark.parametrize(("change", "fail"), [(LATER, True), (LATER, False), (WAKE, False)])
def test_a_change_found_during_a_call_that_changes_nothing_is_hashed_afterwards(
    story, change, fail
):
    with contextlib.suppress(ZeroDivisionError), story.instance.changing(change):
        story.instance.changed_without_notice()
        if fail:
            raise ZeroDivisionError
    story.instance.wait()
    assert story.told == ["renewed directly"]


def test_a_change_found_while_weights_are_hashed_has_them_hashed_again(story):
    story.hold.clear()
    with story.instance.changing(RELOAD):
        pass
    assert story.begun.wait(PATIENCE)
    story.instance.changed_without_notice()
    story.hold.set()
    story.instance.wait()
    assert story.told == ["changing", "renewed", "renewed directly"]


def test_the_reason_names_what_is_called(story):
    story.do(PUSH)
    assert story.reason == "push has changed weights, and nobody said that they are complete"
    story.do(START)
    assert story.reason == "the weights are being changed (start)"


def test_an_instance_that_is_over_offers_nothing(story):
    story.hold.clear()
    with story.instance.changing(RELOAD):
        pass
    story.instance.stop()
    story.instance.wait()
    assert story.told == ["changing", "stopped"]
