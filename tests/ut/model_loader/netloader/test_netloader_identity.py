import enum

import msgspec
import pytest
import torch

from tests.identity import identity
from vllm_ascend.model_loader.netloader.errors import ConfigError
from vllm_ascend.model_loader.netloader.identity import (
    MAX_CONFIG_BYTES,
    MAX_REVISION_BYTES,
    MAX_SETTING_BYTES,
    ModelIdentity,
    Revision,
    cached_snapshot,
    flattened,
    plain_identity,
    revision_name,
)

OTHER = {
    "group": "netloader_draft",
    "model": "another",
    "rank": 1,
    "tp": 2,
    "pp": 2,
    "pcp": 2,
    "dp": 2,
    "dp_rank": 1,
    "ep": 8,
    "ep_rank": 7,
    "dtype": "torch.float16",
    "quantization": "fp8",
    "layout": "processed",
    "vllm_version": "0.32.0",
}
SETTINGS = {"config", "defaults"}


def test_every_field_has_another_value_in_these_tests():
    assert OTHER.keys() | SETTINGS | {"revision"} == set(ModelIdentity.__struct_fields__)


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
        ("config", None),
        ("defaults", {1j: 1}),
        ("revision", Revision(object(), pinned=True)),  # type: ignore[arg-type]
    ],
)
def test_what_no_message_can_carry_is_an_error_that_names_the_field(field, value):
    with pytest.raises(ConfigError, match=rf"the model's identity: .*\b{field}\b"):
        plain_identity(**fields(**{field: value}))


# Settings


def differ(here, there):
    """The differences of two models whose settings are pairs of those set and of defaults."""
    one, other = (identity(config=config, defaults=defaults) for config, defaults in (here, there))
    found = one.differences(other)
    assert other.differences(one) == [(field, theirs, ours) for field, ours, theirs in found]
    return found


@pytest.mark.parametrize(
    ("here", "there"),
    [
        (({"a": 1}, {}), ({"a": 1}, {})),
        (({"a": 1}, {}), ({}, {"a": 1})),  # the classes have other defaults
        (({}, {"a": 1}), ({}, {})),  # only one of the versions knows it, and it is as if it did not
        (({"a": None}, {}), ({}, {})),
        (({"a": 10000}, {}), ({"a": 10000.0}, {})),
    ],
)
def test_settings_that_mean_the_same_are_no_difference(here, there):
    assert differ(here, there) == []


@pytest.mark.parametrize(
    ("here", "there", "values"),
    [
        (({"a": 1}, {}), ({"a": 2}, {}), (1, 2)),
        (({"a": 1}, {}), ({}, {"a": 2}), (1, 2)),
        (({}, {"a": 1}), ({}, {"a": 2}), (1, 2)),  # the classes have other defaults
        (({"a": 1}, {}), ({}, {}), (1, None)),
        (({"a": None}, {}), ({}, {"a": 4096}), (None, 4096)),
    ],
)
def test_settings_that_do_not_mean_the_same_are_named_with_both_values(here, there, values):
    assert differ(here, there) == [("config.a", *values)]


class Colour(enum.Enum):
    RED = 1


def test_settings_go_by_dotted_names_and_lists_are_values():
    nested = {"a": 1, "b": {"c": [1, 2.5, None, True, "x"], "d": {"e": "f"}, "g": {}}}
    found = flattened(nested)
    assert found == {"a": 1, "b.c": [1, 2.5, None, True, "x"], "b.d.e": "f", "b.g": None}


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (torch.bfloat16, "torch.bfloat16"),
        (Colour.RED, 1),
        ((1, (2,)), [1, [2]]),
        ({"b", "a"}, ["a", "b"]),
        (2**70, str(2**70)),
        (float("inf"), "inf"),
        (Whole(3), 3),
        ("half \ud800", "half \\ud800"),
    ],
)
def test_what_json_does_not_have_counts_by_what_it_is(value, found):
    settings = flattened({"x": value})
    assert settings == {"x": found}
    assert msgspec.json.decode(msgspec.json.encode(settings)) == settings


def test_an_object_without_a_text_of_its_own_counts_by_its_class():
    one, other = flattened({"x": object()}), flattened({"x": object()})
    assert one == other == {"x": "<object object>"}


@pytest.mark.parametrize(
    "name",
    [
        "_name_or_path",
        "transformers_version",
        "torch_dtype",
        "id2label",
        "max_position_embeddings",
        "attention_dropout",
        "use_cache",
        "repetition_penalty",
    ],
)
def test_what_neither_weights_nor_their_use_need_is_left_out_wherever_it_stands(name):
    assert flattened({name: 1, "a": {name: 2, "b": 3}, "c": [{name: 4}]}) == {"a.b": 3, "c": [{}]}


@pytest.mark.parametrize(
    "name",
    [
        "unheard_of",
        "rms_norm_eps",
        "hidden_act",
        "sliding_window",
        "problem_type",
        "mamba_ssm_dtype",
    ],
)
def test_every_other_setting_counts(name):
    assert flattened({name: 1, "a": {name: 2}}) == {name: 1, f"a.{name}": 2}


def test_rotary_embeddings_count_as_transformers_5_writes_them():
    rope = {"rope_theta": 5.0, "rope_type": "default"}
    written = {
        "rope_theta": 5.0,
        "rope_scaling": None,
        "rope_parameters": {"type": "default"} | rope,
    }
    assert flattened(written) == flattened({"rope_parameters": rope})
    assert flattened({"rope_theta": 5.0}) == {"rope_theta": 5.0}  # the model reads it there


@pytest.mark.parametrize(
    ("kind", "counts"), [("dynamic", True), ("longrope", True), ("yarn", False)]
)
def test_the_longest_position_counts_where_rotary_embeddings_are_scaled_by_it(kind, counts):
    found = flattened({"max_position_embeddings": 9, "rope_parameters": {"rope_type": kind}})
    assert found.get("max_position_embeddings") == (9 if counts else None)


def test_all_settings_of_a_quantization_count_but_the_version_that_wrote_them():
    awq = {"quantization_config": {"version": "gemm", "_type": "x", "dtype": "int4"}}
    assert flattened(awq) == {
        f"quantization_config.{k}": v for k, v in awq["quantization_config"].items()
    }
    assert flattened({"quantization_config": {"version": "0.10.2", "bits": 4}}) == {
        "quantization_config.bits": 4
    }


def test_a_large_value_counts_by_a_digest_under_its_name():
    def found(last):
        return flattened({"layers": ["full_attention"] * 100 + [last], "small": 1})

    assert found("a") == found("a") != found("b")
    assert len(found("a")["layers"]) < MAX_SETTING_BYTES
    assert found("a")["layers"].startswith("sha256 ")
    assert found("a")["small"] == 1


@pytest.mark.parametrize("groups", [{}, {f"g{i}": {"x": "y" * 400} for i in range(100)}])
def test_settings_as_a_whole_are_bounded_and_the_largest_group_counts_by_a_digest(groups):
    def found(last):
        large = {f"layer{i}": "int8" for i in range(5000)} | {"last": last}
        return flattened({"hidden_size": 4, "large": large} | groups)

    a, again, b = found("a"), found("a"), found("b")
    assert len(msgspec.json.encode(a)) <= MAX_CONFIG_BYTES
    assert a["large"].startswith("sha256 ")
    assert a["hidden_size"] == 4
    assert a == again
    assert [name for name in a if a[name] != b[name]] == ["large"]


def test_settings_that_are_too_many_to_name_count_by_one_digest():
    def found(last):
        return flattened({f"x{i}": i for i in range(5000)} | {"last": last})

    assert len(msgspec.json.encode(found("a"))) <= MAX_CONFIG_BYTES
    assert found("a") == found("a") != found("b")
