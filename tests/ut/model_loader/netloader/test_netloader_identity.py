import enum

import msgspec
import pytest
import torch

from tests.identity import identity
from vllm_ascend.model_loader.netloader.errors import ConfigError
from vllm_ascend.model_loader.netloader.identity import (
    MAX_REVISION_BYTES,
    ModelIdentity,
    Revision,
    cached_snapshot,
    digest_of_settings,
    plain_identity,
    revision_name,
)

from .support import python

OTHER = {
    "group": "netloader_draft",
    "model": "another",
    "rank": 1,
    "tp": 2,
    "pp": 2,
    "dp": 2,
    "ep": True,
    "dtype": "torch.float16",
    "quantization": "fp8",
    "quantization_config": "0000000000000000",
    "config": "0000000000000000",
    "layout": "processed",
    "vllm_version": "0.32.0",
}


def test_every_field_has_another_value_in_these_tests():
    assert OTHER.keys() | {"revision"} == set(ModelIdentity.__struct_fields__)


def test_equal_identities_do_not_differ():
    assert identity().differences(identity()) == []


@pytest.mark.parametrize(("field", "value"), OTHER.items())
def test_a_difference_is_named_with_both_values(field, value):
    here, there = identity(), identity(**{field: value})
    mine = getattr(here, field)
    assert here.differences(there) == [(field, mine, value)]
    assert there.differences(here) == [(field, value, mine)]


def test_several_differences_are_all_named_in_the_order_of_the_fields():
    named = [field for field, _, _ in identity().differences(identity(**OTHER))]
    assert named == [field for field in ModelIdentity.__struct_fields__ if field in OTHER]


def test_no_value_is_not_the_text_that_stands_for_it():
    assert identity(quantization=None).differences(identity(quantization="None")) == [
        ("quantization", None, "None")
    ]


def test_an_identity_travels():
    here = identity(**OTHER, revision=Revision(ONE, pinned=True))
    assert msgspec.json.decode(msgspec.json.encode(here), type=ModelIdentity) == here


def test_an_identity_with_a_field_that_is_not_known_here_is_none():
    fields = msgspec.to_builtins(identity()) | {"since_tomorrow": 1}
    with pytest.raises(msgspec.ValidationError, match="since_tomorrow"):
        msgspec.convert(fields, ModelIdentity)


# Revisions

ONE, TWO = "1" * 40, "2" * 40
UNKNOWN = Revision()  # no revision asked for, or main, and no commit known; or a folder
MAIN_ONE, MAIN_TWO = Revision(ONE), Revision(TWO)
PINNED_ONE, PINNED_TWO = Revision(ONE, pinned=True), Revision(TWO, pinned=True)
TAG_ONE, TAG_TWO = Revision("v1", pinned=True), Revision("v2", pinned=True)  # commits not known


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (UNKNOWN, UNKNOWN),
        (UNKNOWN, MAIN_ONE),
        (UNKNOWN, PINNED_ONE),
        (UNKNOWN, TAG_ONE),
        (MAIN_ONE, MAIN_ONE),
        (MAIN_ONE, MAIN_TWO),  # nobody has asked for either
        (MAIN_ONE, PINNED_ONE),
        (MAIN_ONE, TAG_ONE),
        (PINNED_ONE, PINNED_ONE),
        (PINNED_ONE, TAG_ONE),
        (TAG_ONE, TAG_ONE),
    ],
)
def test_revisions_that_may_be_the_same_are_no_difference(one, other):
    here, there = identity(revision=one), identity(revision=other)
    assert not one.differs(other)
    assert not other.differs(one)
    assert here.differences(there) == there.differences(here) == []


@pytest.mark.parametrize(
    ("one", "other"),
    [(PINNED_ONE, PINNED_TWO), (PINNED_ONE, MAIN_TWO), (TAG_ONE, TAG_TWO)],
)
def test_revisions_that_cannot_be_the_same_are_named_with_both_values(one, other):
    here, there = identity(revision=one), identity(revision=other)
    assert one.differs(other)
    assert other.differs(one)
    assert here.differences(there) == [("revision", one.name, other.name)]
    assert there.differences(here) == [("revision", other.name, one.name)]


def test_of_two_commits_of_main_each_is_other_than_the_other():
    assert MAIN_ONE.is_other(MAIN_TWO)
    assert not MAIN_ONE.is_other(MAIN_ONE)
    assert not MAIN_ONE.is_other(UNKNOWN)
    assert not UNKNOWN.is_other(MAIN_ONE)


def test_a_revision_that_a_join_has_no_room_for_is_an_error():
    assert revision_name("r" * MAX_REVISION_BYTES) == "r" * MAX_REVISION_BYTES
    for long in ("r" * (MAX_REVISION_BYTES + 1), "ü" * 22):
        with pytest.raises(ConfigError, match=r"--revision is '.+; allowed: a name of up to 128"):
            revision_name(long)


@pytest.mark.parametrize(
    ("path", "snapshot"),
    [
        (f"/home/a/.cache/hub/models--org--model-1.5/snapshots/{ONE}", ("org/model-1.5", ONE)),
        (f"models--gpt2/snapshots/{TWO}/", ("gpt2", TWO)),
        (f"/hub/models--org--model/snapshots/{ONE}/draft", None),  # another model inside of it
        (f"/hub/datasets--org--data/snapshots/{ONE}", None),
        ("/hub/models--org--model/snapshots/main", None),
        ("/hub/models--org--model", None),
        ("org/model", None),
        ("", None),
    ],
)
def test_a_folder_of_the_hubs_cache_says_which_model_and_commit_it_is(path, snapshot):
    assert cached_snapshot(path) == snapshot


# Plain types


class Text(str):
    resolved = ONE


class Whole(int):
    pass


class Method(enum.StrEnum):
    FP8 = "fp8"


class Size(enum.IntEnum):
    TWO = 2


def fields(**changes):
    return msgspec.structs.asdict(identity()) | changes


def test_an_identity_is_of_plain_types_whatever_vllm_gives():
    here = plain_identity(
        **fields(
            model=Text("m"),
            revision=Revision(Text("v1"), pinned=True),
            tp=Size.TWO,
            pp=Whole(3),
            quantization=Method.FP8,
        )
    )
    plain = identity(
        model="m", revision=Revision("v1", pinned=True), tp=2, pp=3, quantization="fp8"
    )
    assert here == plain
    for field in ModelIdentity.__struct_fields__:
        assert type(getattr(here, field)) is type(getattr(plain, field))
    assert type(here.revision.name) is str
    assert msgspec.json.decode(msgspec.json.encode(here), type=ModelIdentity) == plain


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dtype", torch.bfloat16),
        ("model", "half a pair \ud800"),
        ("rank", 1j),
        ("tp", "2"),
        ("quantization_config", None),
        ("revision", Revision(object(), pinned=True)),  # type: ignore[arg-type]
    ],
)
def test_what_no_message_can_carry_is_an_error_that_names_the_field(field, value):
    with pytest.raises(ConfigError, match=rf"the model's identity: .*\b{field}\b"):
        plain_identity(**fields(**{field: value}))


# Settings


class Colour(enum.Enum):
    RED = 1


NESTED = {"a": 1, "b": {"c": [1, 2.5, None, True, "x"], "d": {"e": "f"}}}


def test_the_digest_of_settings_does_not_depend_on_the_order_of_keys():
    other_order = {"b": {"d": {"e": "f"}, "c": [1, 2.5, None, True, "x"]}, "a": 1}
    assert digest_of_settings(NESTED) == digest_of_settings(other_order)


@pytest.mark.parametrize(
    "changed",
    [
        {**NESTED, "a": 2},
        {**NESTED, "z": None},
        {"a": 1},
        {"a": 1, "b": {"c": [1, 2.5, None, True, "x"], "d": {"e": "g"}}},
        {"a": 1, "b": {"c": [2.5, 1, None, True, "x"], "d": {"e": "f"}}},
        {"a": 1, "b": {"c": [1, 2.5, None, True], "d": {"e": "f"}}},
        {"a": "1", "b": NESTED["b"]},
        {},
    ],
)
def test_the_digest_of_settings_depends_on_every_nested_value(changed):
    assert digest_of_settings(changed) != digest_of_settings(NESTED)


def test_integer_keys_count_like_the_strings_that_json_makes_of_them():
    assert digest_of_settings({"id2label": {0: "a", 1: "b"}}) == digest_of_settings(
        {"id2label": {"1": "b", "0": "a"}}
    )


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.bfloat16, torch.float16),
        (Colour, int),
        (Colour.RED, None),
        ((1, 2), (2, 1)),
        (b"a", b"b"),
        (2**70, 2**71),
        (torch.device("cpu"), torch.device("meta")),
    ],
)
def test_odd_values_count_by_what_they_are(one, other):
    assert digest_of_settings({"x": one}) == digest_of_settings({"x": one})
    assert digest_of_settings({"x": one}) != digest_of_settings({"x": other})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1j, {1.5: "x"}])
def test_values_that_json_does_not_have_are_no_error(value):
    assert digest_of_settings({"x": value})


_DIGEST_A_SET = """
from vllm_ascend.model_loader.netloader.identity import digest_of_settings
print(digest_of_settings({"names": {"a", "b", "c", "d", "e", "f", "g"}}))
"""


def test_a_set_counts_the_same_in_every_process():
    # The order of a set of strings differs from one process to the next.
    processes = [
        python("-c", _DIGEST_A_SET, env={"PYTHONHASHSEED": str(seed)}) for seed in range(1, 4)
    ]
    digests = {process.communicate(timeout=60)[0] for process in processes}
    assert all(process.returncode == 0 for process in processes)
    assert len(digests) == 1
