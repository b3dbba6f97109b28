import msgspec
import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from vllm_ascend.model_loader.netloader.errors import ProtocolError
from vllm_ascend.model_loader.netloader.executor import store as store_module
from vllm_ascend.model_loader.netloader.executor.chunks.blocks import BLOCK_BYTES, Blocks
from vllm_ascend.model_loader.netloader.executor.chunks.digests import (
    DIGEST_BYTES,
    Digests,
    combine,
    of_instance,
)
from vllm_ascend.model_loader.netloader.executor.chunks.manifest import (
    PROCESSED,
    RAW,
    Manifest,
    TensorEntry,
)

from .support import DEVICE, MIB, any_model, assorted, random_tensor, store_of

MANIFEST = Manifest(
    RAW, [TensorEntry("a", "torch.int8", (2,)), TensorEntry("b", "torch.int8", (2,))], {"s": 0.5}
)
TWO = Blocks([2, 2])
ONE, OTHER = bytes(range(16)), bytes(range(16, 32))


def name_of(tensors, attributes=None):
    return store_of(tensors, attributes=attributes).digests.weights


def test_the_name_is_the_algorithm_and_a_digest_of_manifest_and_tensors():
    """Instances of all versions compare it."""
    whole = xxhash.xxh3_128(msgspec.json.encode(MANIFEST))
    whole.update(xxhash.xxh3_128_digest(ONE))
    whole.update(xxhash.xxh3_128_digest(OTHER))
    digests = combine("xxh3_128", MANIFEST, TWO, ONE + OTHER)
    assert digests == Digests(ONE + OTHER, f"xxh3_128:{whole.hexdigest()}")
    assert digests.algorithm == "xxh3_128"
    assert [digests.of(0), digests.of(1)] == [ONE, OTHER]


def test_the_name_of_known_weights_stays_what_it_is():
    """A name that an operator has pinned holds after an upgrade."""
    tensors = {
        "a": torch.arange(300_000, dtype=torch.int32),
        "b": torch.ones(3, 4, dtype=torch.bfloat16).t(),
        "c": torch.empty(0),
    }
    assert name_of(tensors, {"scale": 0.5, "name": "x"}) == (
        "xxh3_128:0d4d05028a3b1a943e1a54919fdaf4e2"
    )


@pytest.mark.parametrize("at_once", [1, MIB, 4 * MIB, 1 << 40])
def test_equal_weights_have_equal_names_however_many_bytes_are_hashed_at_once(at_once, monkeypatch):
    expected = store_of(assorted()).digests
    monkeypatch.setattr(store_module, "_HASHED_AT_ONCE", at_once)
    assert store_of(assorted()).digests == expected


def test_equal_bytes_have_equal_names_whatever_their_strides():
    tensors = assorted()
    turned = {name: tensor.contiguous() for name, tensor in tensors.items()}
    turned["lm_head.weight"] = turned["embed.weight"]  # tied as before
    assert name_of(turned) == name_of(tensors)


def test_attributes_count_in_the_order_of_their_names():
    tensors = {"t": torch.ones(2)}
    assert name_of(tensors, {"a": 1, "b": 2}) == name_of(tensors, {"b": 2, "a": 1})
    assert name_of(tensors, {"a": 1}) != name_of(tensors, {"a": 2})
    assert name_of(tensors, {"a": 1}) != name_of(tensors)


@given(any_model().filter(lambda model: any(t.numel() for t in model.values())), st.data())
def test_any_changed_byte_changes_the_name_and_the_digest_of_one_block(model, data):
    before = store_of(model)
    name = data.draw(st.sampled_from([name for name, t in model.items() if t.numel()]))
    tensor = model[name]
    index = tuple(data.draw(st.integers(0, size - 1)) for size in tensor.shape)
    part = tensor[index].reshape(1)
    part.view(torch.uint8)[0] ^= 1  # all of a bool's bits but the first are none of its
    after = store_of(model)
    assert after.manifest == before.manifest
    assert after.digests.weights != before.digests.weights
    changed = [b for b in range(before.blocks.count) if before.digests.of(b) != after.digests.of(b)]
    assert len(changed) == 1


@pytest.mark.parametrize("at", [0, MIB - 1, MIB, 2 * MIB + 2])
def test_a_changed_byte_changes_the_digest_of_its_block(at):
    tensor = random_tensor(0, torch.uint8, 2 * MIB + 3)
    before = store_of({"t": tensor}).digests
    tensor[at] ^= 1
    after = store_of({"t": tensor}).digests
    changed = [block for block in range(3) if before.of(block) != after.of(block)]
    assert changed == [at // BLOCK_BYTES]
    assert after.weights != before.weights


@pytest.mark.parametrize(
    "other",
    [
        msgspec.structs.replace(MANIFEST, layout=PROCESSED),
        msgspec.structs.replace(MANIFEST, attributes={"s": 0.25}),
        msgspec.structs.replace(MANIFEST, attributes={}),
        msgspec.structs.replace(MANIFEST, tensors=MANIFEST.tensors[::-1]),
        *[
            msgspec.structs.replace(MANIFEST, tensors=[MANIFEST.tensors[0], entry])
            for entry in (
                TensorEntry("c", "torch.int8", (2,)),
                TensorEntry("b", "torch.uint8", (2,)),
                TensorEntry("b", "torch.int8", (1, 2)),
                TensorEntry("b", "torch.int8", (2,), None, (2,)),
                TensorEntry("b", "torch.int8", (2,), None, None, "FRACTAL_NZ"),
                TensorEntry("b", "torch.int8", (2,), "a"),
            )
        ],
    ],
)
def test_another_manifest_of_the_same_bytes_is_another_name(other):
    there = combine("xxh3_128", other, TWO, ONE + OTHER)
    assert there.weights != combine("xxh3_128", MANIFEST, TWO, ONE + OTHER).weights
    assert there.blocks == ONE + OTHER


def test_another_algorithm_is_another_name():
    names = {combine(one, MANIFEST, TWO, ONE + OTHER).weights for one in ("a", "b")}
    assert len(names) == 2


def test_a_manifest_that_has_travelled_makes_the_same_name():
    store = store_of(assorted(), attributes={"b": 1.5, "a": None, "c": "ü"})
    there = msgspec.json.decode(msgspec.json.encode(store.manifest), type=Manifest)
    again = combine(DEVICE.digest_algorithm, there, store.blocks, store.digests.blocks)
    assert again == store.digests


def test_tensors_of_one_shape_that_changed_places_change_the_name():
    one, other = random_tensor(0, torch.uint8, 50), random_tensor(1, torch.uint8, 50)
    assert name_of({"a": one, "b": other}) != name_of({"a": other, "b": one})


def test_a_block_that_moved_to_the_next_tensor_changes_the_name():
    digests = [bytes([i]) * 16 for i in range(4)]
    names = {
        combine("xxh3_128", MANIFEST, Blocks(sizes), b"".join(digests)).weights
        for sizes in ([MIB, 3 * MIB], [2 * MIB, 2 * MIB], [3 * MIB, MIB])
    }
    assert len(names) == 3


@pytest.mark.parametrize("nbytes", [0, 16, 31, 33, 48, 16 * 10**6])
def test_another_number_of_digests_than_blocks_is_refused(nbytes):
    with pytest.raises(ProtocolError, match=f"{nbytes} bytes of digests came for 2 blocks"):
        combine("xxh3_128", MANIFEST, TWO, bytes(nbytes))


def test_no_tensors_have_a_name():
    assert name_of({}).startswith("xxh3_128:")
    assert name_of({}) != name_of({"a": torch.empty(0)})


def test_a_tensor_without_bytes_has_a_block_and_a_digest():
    store = store_of({"a": torch.empty(0, 4)})
    assert store.blocks.count == 1
    assert len(store.digests.blocks) == DIGEST_BYTES


def test_the_instance_digest_is_that_of_who_has_what():
    a, b = name_of({}), name_of({"a": torch.empty(0)})
    assert of_instance({0: a, 1: b}) == of_instance({1: b, 0: a})
    others = ({0: b, 1: a}, {0: a}, {0: a, 2: b}, {0: a, 1: a}, {0: a, 1: b, 2: b})
    assert of_instance({0: a, 1: b}) not in {of_instance(other) for other in others}
