"""`rowsums` against the formula of its docstring, written down once more in plain Python."""

import hashlib

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import example, given
from hypothesis import strategies as st

from vllm_ascend.model_loader.netloader.executor.devices import rowsums
from vllm_ascend.model_loader.netloader.executor.devices.rowsums import (
    ALGORITHM,
    LANES,
    ROW_BYTES,
    agrees_with_host,
    hashes,
)

from .support import bytes_of, random_tensor
from .test_netloader_plan import DTYPES

WORDS = ROW_BYTES // 2
_noise = np.frombuffer(hashlib.shake_256(b"netloader").digest(LANES * WORDS * 4), "<i4")
# The hash of 17 times the bytes from 0 to 255.
PINNED = "5c6b0165779e15d529cd8cfa4f79af6f"
# 2048 products of 16 and 32 bits need 58 bits, so nothing overflows here.
WEIGHTS = (_noise | 1).reshape(LANES, WORDS).astype(np.int64)


def row_sums(row):
    """The weighted sums of a row's 16-bit words, modulo 2**32."""
    words = np.frombuffer(row, "<i2").astype(np.int64)
    return [int(sum_) % 2**32 for sum_ in (WEIGHTS * words).sum(1)]


def reference(tensor):
    data = bytes_of(tensor).numpy().tobytes()
    full = len(data) // ROW_BYTES * ROW_BYTES
    rows = [data[start : start + ROW_BYTES] for start in range(0, full, ROW_BYTES)]
    sums = b"".join(sum_.to_bytes(4, "little") for row in rows for sum_ in row_sums(row))
    return xxhash.xxh3_128_digest(sums + data[full:] + len(data).to_bytes(8, "little"))


def of_bytes(data):
    """The hash of bytes."""
    return hashes([torch.tensor(list(data), dtype=torch.uint8)])[0]


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
def test_hashes_are_those_of_the_documented_formula(tensors):
    assert hashes(tensors) == tuple(map(reference, tensors))


@given(st.lists(_tensors(), max_size=5))
def test_tensors_hashed_together_have_the_hashes_they_have_alone(tensors):
    assert hashes(tensors) == tuple(hashes([tensor])[0] for tensor in tensors)


@pytest.mark.parametrize("rows", [1023, 1024, 1025, 2049])
@pytest.mark.parametrize("rest", [0, 1])
def test_rows_beyond_one_step_are_all_summed(rows, rest):
    tensor = random_tensor(rows, torch.uint8, rows * ROW_BYTES + rest)
    assert hashes([tensor]) == (reference(tensor),)


def test_the_largest_and_smallest_words_overflow_as_documented():
    for word in (-32768, 32767, -1):
        tensor = torch.full((2, WORDS), word, dtype=torch.int16)
        assert hashes([tensor]) == (reference(tensor),)


@pytest.mark.parametrize("offset", [1, 2, 3, 5])
def test_rows_may_begin_at_any_byte_of_a_storage(offset):
    tensor = random_tensor(0, torch.uint8, 2 * ROW_BYTES + 7 + offset)[offset:]
    assert hashes([tensor]) == hashes([tensor.clone()]) == (reference(tensor),)


def test_parameters_single_elements_and_views_are_taken():
    strided = torch.arange(10.0)[3::2][:1]  # contiguous, with a stride of 2
    parameter = torch.nn.Parameter(torch.ones(3))
    assert hashes([strided, parameter, torch.tensor(5)]) == tuple(
        map(reference, (strided, parameter, torch.tensor(5)))
    )


def test_no_tensors_have_no_hashes():
    assert hashes([]) == ()


def test_the_algorithm_is_fixed_for_all_versions():
    """Peers of different versions compare these."""
    assert ALGORITHM == "rowsums-xxh3_128"
    assert of_bytes(bytes(range(256)) * 17).hex() == PINNED


def test_weights_are_odd_and_all_lanes_have_their_own():
    [*lanes] = rowsums._weights(torch.device("cpu"))
    assert len(lanes) == LANES
    assert all((lane & 1).all() for lane in lanes)
    assert len({tuple(lane.tolist()) for lane in lanes}) == LANES


# What is noticed


ROWS = 2
LONG = random_tensor(1, torch.uint8, ROWS * ROW_BYTES + 37)
LONG_HASH = hashes([LONG])


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
    assert hashes([changed]) != LONG_HASH


def test_every_bit_of_a_row_changes_all_of_its_sums():
    """So nothing depends on the luck of a weight."""
    row = random_tensor(2, torch.int16, 1, WORDS)
    before = rowsums.row_sums(row)
    flipped = row.repeat(WORDS, 1)
    for bit in range(16):
        turned = flipped.clone()
        turned.diagonal().bitwise_xor_(torch.tensor(1 << bit).to(torch.int16))
        assert (rowsums.row_sums(turned) != before).all()


@given(st.integers(0, WORDS - 1), st.integers(0, WORDS - 1), st.integers(0, ROWS - 1))
@example(0, 1, 0)
def test_two_flipped_signs_in_one_row_are_noticed(one, other, row):
    """The highest bits of two words, in which only 16 bits of a weight count."""
    if one == other:
        return
    changed = LONG.clone()
    for word in (one, other):
        changed[row * ROW_BYTES + 2 * word + 1] ^= 0x80
    assert hashes([changed]) != LONG_HASH


@given(st.integers(0, WORDS - 1), st.integers(0, WORDS - 1))
@example(0, WORDS - 1)
def test_swapped_words_are_noticed(one, other):
    words = LONG[:ROW_BYTES].view(torch.int16).clone()
    if words[one] == words[other]:
        return
    before = hashes([words])
    words[[one, other]] = words[[other, one]]
    assert hashes([words]) != before


def test_swapped_rows_are_noticed():
    rows = LONG[: ROWS * ROW_BYTES].view(ROWS, ROW_BYTES)
    assert hashes([rows.flip(0)]) != hashes([rows])


def test_swapped_tensors_have_swapped_hashes():
    one, other = random_tensor(3, torch.uint8, 5000), random_tensor(4, torch.uint8, 5000)
    first, second = hashes([one, other])
    assert first != second
    assert hashes([other, one]) == (second, first)


@given(st.sampled_from([0, 1, 4095, 4096, 4097, 8192]), st.integers(1, 5000))
def test_zeros_at_the_end_and_their_absence_are_noticed(length, zeros):
    data = torch.zeros(length, dtype=torch.uint8)
    longer = torch.zeros(length + zeros, dtype=torch.uint8)
    assert hashes([data]) != hashes([longer])
    filled = random_tensor(5, torch.uint8, length)
    assert hashes([filled]) != hashes([torch.cat([filled, longer[:zeros]])])


def test_bytes_that_move_between_neighbours_are_noticed():
    data = random_tensor(6, torch.uint8, 3 * ROW_BYTES)
    split = [hashes(data.split([at, data.numel() - at])) for at in (ROW_BYTES - 1, ROW_BYTES)]
    assert not set(split[0]) & set(split[1])


# Devices


def test_a_cpu_computes_what_a_cpu_computes():
    assert agrees_with_host(torch.device("cpu"))


@pytest.mark.parametrize("wrong", ["saturates", "ignores the last row"])
def test_a_device_that_computes_otherwise_is_noticed(wrong, monkeypatch):
    right, calls = rowsums.row_sums, []

    def on_device(rows):
        sums = right(rows)
        calls.append(rows)
        if len(calls) > 1:  # the host's
            return sums
        if wrong == "saturates":
            weights = torch.stack(rowsums._weights(rows.device)).double()
            exact = rows.double() @ weights.t()
            return exact.clamp(-(2**31), 2**31 - 1).to(torch.int32)
        sums[-1] = 0
        return sums

    monkeypatch.setattr(rowsums, "row_sums", on_device)
    assert not agrees_with_host(torch.device("cpu"))
