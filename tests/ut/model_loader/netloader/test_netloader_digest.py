import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_ascend.model_loader.netloader.executor.digest import (
    chunk_digest,
    combine,
    digest_model,
    model_digest,
)
from vllm_ascend.model_loader.netloader.executor.manifest import RAW, Manifest, TensorEntry
from vllm_ascend.model_loader.netloader.executor.pieces import piece_hashes, size_of
from vllm_ascend.model_loader.netloader.executor.plan import make_plan

from .support import DEVICE, MIB, assorted, blank_like, load, random_tensor, source, weights_of

CHUNK = 1024
MANIFEST = Manifest(RAW, [TensorEntry("a", "torch.int8", (2,))], {"scale": 0.5})


def _tensors(seed=0):
    return [
        random_tensor(seed, torch.uint8, 5000),
        random_tensor(seed + 1, torch.float32, 10),
        random_tensor(seed + 2, torch.bfloat16, 10),
        random_tensor(seed + 3, torch.int8, 40, 50).t(),
    ]


def _digests(tensors):
    plan = make_plan([size_of(t) for t in tensors], CHUNK)
    return digest_model(MANIFEST, plan, tensors, DEVICE)


def test_equal_bytes_have_equal_digests_wherever_they_are():
    one, other = _tensors(), _tensors()
    other[3] = other[3].contiguous()  # as a receiver with other strides has it
    assert _digests(one) == _digests(other)


@given(st.integers(0, 3), st.floats(0, 1, exclude_max=True), st.integers(0, 7))
def test_any_flipped_bit_changes_one_chunk_and_the_model(index, place, bit):
    right, wrong = _tensors(), _tensors()
    flat = wrong[index].untyped_storage()
    position = int(place * len(flat))
    flat[position] = flat[position] ^ (1 << bit)
    before, after = _digests(right), _digests(wrong)
    assert before.model != after.model
    changed = [a != b for a, b in zip(before.chunks, after.chunks, strict=True)]
    assert sum(changed) == 1


def test_the_piece_that_differs_is_known():
    right, wrong = _tensors(), _tensors()
    wrong[2].view(torch.uint8)[0] ^= 1
    plan = make_plan([size_of(t) for t in right], CHUNK)
    packed = next(n for n, chunk in enumerate(plan.chunks) if len(chunk.pieces) > 1)
    before, after = _digests(right).pieces[packed], _digests(wrong).pieces[packed]
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False]


def test_swapped_chunks_change_the_digests():
    tensor = random_tensor(0, torch.uint8, 4 * CHUNK)
    swapped = torch.cat([tensor[CHUNK : 2 * CHUNK], tensor[:CHUNK], tensor[2 * CHUNK :]])
    before, after = _digests([tensor]), _digests([swapped])
    assert before.chunks != after.chunks
    assert sorted(before.chunks) == sorted(after.chunks)
    assert before.model != after.model


def test_memory_that_was_never_written_changes_the_digests():
    zeroed = _tensors()
    zeroed[0][CHUNK : 2 * CHUNK] = 0
    assert _digests(_tensors()).model != _digests(zeroed).model
    assert _digests([torch.zeros(9)]).model != _digests([torch.zeros(10)]).model


def test_a_tensor_at_the_wrong_offset_changes_the_digests():
    tensor = random_tensor(0, torch.uint8, 4096)
    assert _digests([tensor]).model != _digests([torch.roll(tensor, 16)]).model


def test_tensors_that_changed_places_change_the_digests():
    one, two = random_tensor(0, torch.uint8, 50), random_tensor(1, torch.uint8, 50)
    assert _digests([one, two]).model != _digests([two, one]).model


def test_bytes_that_moved_to_the_next_tensor_change_the_digests():
    data = random_tensor(0, torch.uint8, 100)
    assert _digests([data[:50], data[50:]]).model != _digests([data[:48], data[48:]]).model


def test_the_parts_make_the_whole():
    tensors = _tensors()
    plan = make_plan([size_of(t) for t in tensors], CHUNK)
    pieces = [piece_hashes(chunk, tensors, DEVICE) for chunk in plan.chunks]
    digests = digest_model(MANIFEST, plan, tensors, DEVICE)
    assert combine(MANIFEST, pieces) == digests
    assert tuple(map(chunk_digest, pieces)) == digests.chunks
    assert model_digest(MANIFEST, digests.chunks) == digests.model


@pytest.mark.parametrize(
    "other",
    [
        Manifest(RAW, [TensorEntry("b", "torch.int8", (2,))], {"scale": 0.5}),
        Manifest(RAW, [TensorEntry("a", "torch.uint8", (2,))], {"scale": 0.5}),
        Manifest(RAW, [TensorEntry("a", "torch.int8", (1, 2))], {"scale": 0.5}),
        Manifest(RAW, MANIFEST.tensors, {"scale": 0.25}),
        Manifest("other", MANIFEST.tensors, MANIFEST.attributes),
    ],
)
def test_another_manifest_of_the_same_bytes_is_another_model(other):
    assert model_digest(MANIFEST, ["ab"]) != model_digest(other, ["ab"])
    again = msgspec.json.decode(msgspec.json.encode(MANIFEST), type=Manifest)
    assert model_digest(MANIFEST, ["ab"]) == model_digest(again, ["ab"])


def test_an_empty_model_has_a_digest():
    assert _digests([]).model == _digests([torch.empty(0)]).model


@pytest.mark.parametrize("chunk_bytes", [MIB, 3 * MIB])
def test_both_sides_of_a_load_have_the_same_digests(chunk_bytes):
    tensors = assorted()
    weights = weights_of(tensors, chunk_bytes)
    blanks = blank_like(tensors)
    with source(weights) as running:
        loaded = load([running], blanks)
    assert loaded.digests == weights.digests
    assert weights_of(blanks, chunk_bytes).digests == weights.digests
