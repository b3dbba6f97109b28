"""`rowsums` against the formula of its docstring, written down once more in plain Python."""

import hashlib

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import example, given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_ascend.model_loader.netloader.executor.devices import rowsums
from vllm_ascend.model_loader.netloader.executor.devices.rowsums import (
    ALGORITHM,
    LANES,
    ROW_BYTES,
    agrees_with_host,
    digests,
)

from .support import DTYPES, MIB, bytes_of, random_tensor

_noise = np.frombuffer(hashlib.shake_256(b"netloader").digest(ROW_BYTES * LANES), np.int8)
WEIGHTS = (_noise | 1).reshape(ROW_BYTES, LANES).astype(np.int64)
# The digest of 17 times the bytes from 0 to 255.
PINNED = "3eb9ebeec1284d069ac6a345e2c12ce8"


def row_sums(row):
    """The weighted sums of a row's bytes."""
    return [int(sum_) for sum_ in np.frombuffer(row, np.int8).astype(np.int64) @ WEIGHTS]


def reference(*tensors):
    """The digests of tensors' blocks, one by one."""
    found = []
    for tensor in tensors:
        data = bytes_of(tensor).numpy().tobytes()
        blocks = [data[start : start + MIB] for start in range(0, len(data), MIB)] or [b""]
        found += map(of_block, blocks)
    return b"".join(found)


def of_block(data):
    full = len(data) // ROW_BYTES * ROW_BYTES
    rows = [data[start : start + ROW_BYTES] for start in range(0, full, ROW_BYTES)]
    sums = b"".join(
        sum_.to_bytes(4, "little", signed=True) for row in rows for sum_ in row_sums(row)
    )
    return xxhash.xxh3_128_digest(sums + data[full:] + len(data).to_bytes(8, "little"))


def of_bytes(data):
    """The digest of bytes."""
    return digests([torch.tensor(list(data), dtype=torch.uint8)])


_lengths = st.sampled_from(
    [0, 1, 2, 3, 4095, 4096, 4097, 4098, 8191, 8192, 8193, 3 * 4096 + 1001]
) | st.integers(0, 20_000)


@st.composite
def _tensors(draw):
    """A contiguous tensor of any dtype that begins anywhere in its storage."""
    dtype, seed = draw(st.sampled_from(DTYPES)), draw(st.integers(0, 1000))
    size = torch.empty(0, dtype=dtype).element_size()
    count = draw(_lengths) // size
    before = draw(st.integers(0, 3))
    flat = random_tensor(seed, dtype, before + count)[before:]
    parts = draw(st.sampled_from([1, 1, 2, 3]))
    return flat.view(parts, -1) if count and count % parts == 0 else flat


# The formula


@given(st.lists(_tensors(), max_size=5))
def test_digests_are_those_of_the_documented_formula(tensors):
    assert digests(tensors) == reference(*tensors)


@given(st.lists(_tensors(), max_size=5))
def test_tensors_hashed_together_have_the_digests_they_have_alone(tensors):
    assert digests(tensors) == b"".join(digests([tensor]) for tensor in tensors)


_LENGTHS = [MIB - 1, MIB, MIB + 1, MIB + ROW_BYTES, 2 * MIB, 3 * MIB - ROW_BYTES - 1, 5 * MIB + 9]


@pytest.mark.parametrize("length", _LENGTHS)
def test_every_block_of_a_tensor_has_a_digest_of_its_own(length):
    tensor = random_tensor(length, torch.uint8, length)
    assert digests([tensor]) == reference(tensor)
    assert digests([tensor]) == b"".join(digests([part]) for part in tensor.split(MIB))


def test_blocks_of_several_tensors_are_told_apart():
    tensors = [random_tensor(n, torch.uint8, n) for n in (*_LENGTHS[:4], 0, 1, ROW_BYTES)]
    assert digests(tensors) == reference(*tensors)
    assert len(digests(tensors)) == 16 * (1 + 1 + 2 + 2 + 3)


@pytest.mark.parametrize("byte", [-128, 127, -1])
def test_the_largest_and_smallest_bytes_do_not_overflow(byte):
    tensor = torch.full((2, ROW_BYTES), byte, dtype=torch.int8)
    assert digests([tensor]) == reference(tensor)


@pytest.mark.parametrize("offset", [1, 2, 3, 5])
def test_rows_may_begin_at_any_byte_of_a_storage(offset):
    tensor = random_tensor(0, torch.uint8, 2 * ROW_BYTES + 7 + offset)[offset:]
    assert digests([tensor]) == digests([tensor.clone()]) == reference(tensor)


def test_parameters_single_elements_and_views_are_taken():
    strided = torch.arange(10.0)[3::2][:1]  # contiguous, with a stride of 2
    parameter = torch.nn.Parameter(torch.ones(3))
    assert digests([strided, parameter, torch.tensor(5)]) == reference(
        strided, parameter, torch.tensor(5)
    )


def test_no_tensors_have_no_digests():
    assert digests([]) == b""


def test_the_algorithm_is_fixed_for_all_versions():
    """Peers of different versions compare these."""
    assert ALGORITHM == "rowsums_xxh3_128"
    assert of_bytes(bytes(range(256)) * 17).hex() == PINNED


def test_weights_are_odd_and_all_lanes_have_their_own():
    weights = rowsums._weights(torch.device("cpu"))
    assert weights.shape == (ROW_BYTES, LANES)
    assert (weights & 1).all()
    assert len({tuple(lane.tolist()) for lane in weights.t()}) == LANES


# What is noticed


ROWS = 2
LONG = random_tensor(1, torch.uint8, ROWS * ROW_BYTES + 37)
LONG_DIGEST = digests([LONG])


@given(st.integers(0, LONG.numel() - 1), st.integers(0, 7))
@example(0, 7)
@example(1, 7)
@example(ROW_BYTES - 1, 7)
@example(ROW_BYTES, 0)
@example(ROWS * ROW_BYTES, 0)
@example(LONG.numel() - 1, 7)
def test_every_flipped_bit_is_noticed(position, bit):
    changed = LONG.clone()
    changed[position] ^= 1 << bit
    assert digests([changed]) != LONG_DIGEST


def test_every_bit_of_a_row_changes_all_of_its_sums():
    """So nothing depends on the luck of a weight."""
    row, weights = random_tensor(2, torch.int8, 1, ROW_BYTES), rowsums._weights(LONG.device)
    before = rowsums.exact_product(row, weights)
    flipped = row.repeat(ROW_BYTES, 1)
    for bit in range(8):
        turned = flipped.clone()
        turned.diagonal().bitwise_xor_(torch.tensor(1 << bit).to(torch.int8))
        assert (rowsums.exact_product(turned, weights) != before).all()


@given(st.integers(0, ROW_BYTES - 1), st.integers(0, ROW_BYTES - 1), st.integers(0, ROWS - 1))
@example(0, 1, 0)
def test_two_flipped_signs_in_one_row_are_noticed(one, other, row):
    if one == other:
        return
    changed = LONG.clone()
    for byte in (one, other):
        changed[row * ROW_BYTES + byte] ^= 0x80
    assert digests([changed]) != LONG_DIGEST


@given(st.integers(0, ROW_BYTES - 1), st.integers(0, ROW_BYTES - 1))
@example(0, ROW_BYTES - 1)
def test_swapped_bytes_are_noticed(one, other):
    data = LONG[:ROW_BYTES].clone()
    if data[one] == data[other]:
        return
    before = digests([data])
    data[[one, other]] = data[[other, one]]
    assert digests([data]) != before


def test_swapped_rows_are_noticed():
    rows = LONG[: ROWS * ROW_BYTES].view(ROWS, ROW_BYTES)
    assert digests([rows.flip(0)]) != digests([rows])


def test_swapped_tensors_have_swapped_digests():
    one, other = random_tensor(3, torch.uint8, 5000), random_tensor(4, torch.uint8, 5000)
    both = digests([one, other])
    assert both[:16] != both[16:]
    assert digests([other, one]) == both[16:] + both[:16]


@given(st.sampled_from([0, 1, 4095, 4096, 4097, 8192]), st.integers(1, 5000))
def test_zeros_at_the_end_and_their_absence_are_noticed(length, zeros):
    data = torch.zeros(length, dtype=torch.uint8)
    longer = torch.zeros(length + zeros, dtype=torch.uint8)
    assert digests([data]) != digests([longer])
    filled = random_tensor(5, torch.uint8, length)
    assert digests([filled]) != digests([torch.cat([filled, longer[:zeros]])])


def test_bytes_that_move_between_neighbours_are_noticed():
    data = random_tensor(6, torch.uint8, 3 * ROW_BYTES)
    one, other = (digests(data.split([at, data.numel() - at])) for at in (ROW_BYTES - 1, ROW_BYTES))
    assert not {one[:16], one[16:]} & {other[:16], other[16:]}


# Devices


def test_a_cpu_computes_what_a_cpu_computes():
    assert agrees_with_host(torch.device("cpu"))


def saturates(rows, weights):
    return rowsums.exact_product(rows, weights).clamp(-(2**24), 2**24 - 1)


def rounds(rows, weights):
    return (rows.to(torch.bfloat16) @ weights.to(torch.bfloat16)).to(torch.int32)


def ignores_the_last_row(rows, weights):
    sums = rowsums.exact_product(rows, weights)
    sums[-1] = 0
    return sums


def is_missing(rows, weights):
    raise NotImplementedError("no kernel")


@pytest.mark.parametrize("product", [saturates, rounds, ignores_the_last_row, is_missing])
def test_a_device_that_computes_otherwise_is_noticed(product):
    assert not agrees_with_host(torch.device("cpu"), product)


class Launches(TorchDispatchMode):
    """Counts operators that are not views, and the most bytes that one of them returns."""

    def __init__(self):
        super().__init__()
        self.count = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view and "product" not in str(func):
            self.count += 1
            self.largest = max(self.largest, result.nbytes)
        return result


@pytest.mark.parametrize("sizes", [[64 * MIB], [1000] * 4000 + [5000] * 4000])
def test_a_chunk_of_any_size_takes_few_operators_and_no_more_memory_than_it_has(sizes):
    def product(rows, weights):
        return torch._int_mm(rows, weights)

    parts = [torch.zeros(size, dtype=torch.uint8) for size in sizes]
    with Launches() as launches:
        digests(parts, product)
    assert launches.count <= 6
    assert launches.largest <= sum(sizes)
