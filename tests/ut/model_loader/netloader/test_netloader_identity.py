import enum

import msgspec
import pytest
import torch

from vllm_ascend.model_loader.netloader.identity import ModelIdentity, digest_of_settings

from .support import identity, python

OTHER = {
    "group": "netloader_draft",
    "model": "another",
    "revision": "main",
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
    assert OTHER.keys() == set(ModelIdentity.__struct_fields__)


def test_equal_identities_do_not_differ():
    assert identity().differences(identity()) == []
    assert identity().digest() == identity().digest()


@pytest.mark.parametrize(("field", "value"), OTHER.items())
def test_a_difference_is_named_with_both_values(field, value):
    here, there = identity(), identity(**{field: value})
    mine = getattr(here, field)
    assert here.differences(there) == [f"{field} is {mine!r} here and {value!r} there"]
    assert there.differences(here) == [f"{field} is {value!r} here and {mine!r} there"]


def test_several_differences_are_all_named():
    assert len(identity().differences(identity(**OTHER))) == len(OTHER)


def test_the_digest_depends_on_every_field():
    digests = {identity(**{field: value}).digest() for field, value in OTHER.items()}
    assert len(digests | {identity().digest()}) == len(OTHER) + 1


def test_the_digest_does_not_mix_up_neighbouring_fields():
    assert identity(tp=1, pp=2).digest() != identity(tp=2, pp=1).digest()
    assert identity(revision=None).digest() != identity(revision="None").digest()


def test_an_identity_travels():
    here = identity(**OTHER)
    assert msgspec.json.decode(msgspec.json.encode(here), type=ModelIdentity) == here


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
