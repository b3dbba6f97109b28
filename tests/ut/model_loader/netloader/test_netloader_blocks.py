import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vllm_ascend.model_loader.netloader.executor.chunks.blocks import (
    BLOCK_BYTES,
    Blocks,
    Run,
    Span,
    count_of,
)

B = BLOCK_BYTES
# Around what makes a difference: blocks, chunks, and the part of a chunk that counts as large.
_near = st.builds(
    lambda base, off: max(0, base + off),
    st.sampled_from([0, B // 8, B // 2, B, 2 * B, 4 * B]),
    st.integers(-2, 2),
)
_sizes = st.lists(_near | st.integers(0, 5 * B), max_size=30)
_chunks = st.sampled_from([1, B - 1, B, B + 1, 3 * B, 8 * B, 64 * B])


@st.composite
def _runs(draw):
    """Blocks, and a run of them."""
    blocks = Blocks(draw(_sizes.filter(bool)))
    first = draw(st.integers(0, blocks.count - 1))
    return blocks, Run(first, draw(st.integers(first, blocks.count - 1)))


def one_by_one(blocks):
    """The span of each block by itself."""
    spans = [blocks.spans(Run(block, block)) for block in range(blocks.count)]
    assert all(len(of_block) == 1 for of_block in spans)
    return [span for [span] in spans]


# How tensors are cut


def test_blocks_are_of_one_mebibyte_on_every_instance():
    assert BLOCK_BYTES == 1 << 20
    blocks = Blocks([B + 1, 0, B, 5])
    assert one_by_one(blocks) == [
        Span(0, 0, B),
        Span(0, B, 1),
        Span(1, 0, 0),
        Span(2, 0, B),
        Span(3, 0, 5),
    ]
    assert (blocks.count, blocks.nbytes) == (5, 2 * B + 6)


@given(_sizes)
def test_every_byte_is_in_one_block_in_the_order_of_the_tensors(sizes):
    blocks = Blocks(sizes)
    ends = [0] * len(sizes)
    for span in one_by_one(blocks):
        assert span.offset == ends[span.tensor]
        assert span.offset % B == 0
        assert 0 <= span.nbytes <= B
        ends[span.tensor] += span.nbytes
    assert ends == sizes
    assert [span.tensor for span in one_by_one(blocks)] == sorted(
        tensor for tensor, size in enumerate(sizes) for _ in range(max(1, -(-size // B)))
    )
    assert blocks.nbytes == sum(sizes)
    assert blocks.count == count_of(sizes)


@given(_sizes)
def test_a_tensor_and_its_blocks_know_each_other(sizes):
    blocks = Blocks(sizes)
    every = []
    for tensor in range(len(sizes)):
        first, last = blocks.blocks_of(tensor)
        every += range(first, last + 1)
        assert {blocks.tensor_of(block) for block in range(first, last + 1)} == {tensor}
        assert blocks.size_of(Run(first, last)) == sizes[tensor]
    assert every == list(range(blocks.count))


def test_no_tensors_have_no_blocks():
    blocks = Blocks([])
    assert (blocks.count, blocks.nbytes, blocks.cut(B)) == (0, 0, [])
    assert not blocks.contains(Run(0, 0))


@pytest.mark.parametrize("run", [Run(-1, 0), Run(0, 3), Run(2, 1), Run(3, 3), Run(10**20, 10**20)])
def test_a_run_of_other_blocks_is_not_contained(run):
    blocks = Blocks([B, B, B])
    assert blocks.contains(Run(0, 2))
    assert blocks.contains(Run(1, 1))
    assert not blocks.contains(run)


# Runs


@given(_runs())
def test_a_run_has_the_bytes_of_its_blocks(drawn):
    blocks, run = drawn
    alone = one_by_one(blocks)[run.first : run.last + 1]
    merged = [
        Span(tensor, spans[0].offset, sum(span.nbytes for span in spans))
        for tensor, group in itertools.groupby(alone, key=lambda span: span.tensor)
        if (spans := list(group))
    ]
    assert blocks.spans(run) == merged
    assert blocks.size_of(run) == sum(span.nbytes for span in alone)


@given(_runs(), _chunks)
def test_a_split_run_is_the_same_blocks_in_as_large_parts_as_are_allowed(drawn, limit):
    blocks, run = drawn
    parts = blocks.split(run, limit)
    assert [block for part in parts for block in range(part.first, part.last + 1)] == list(
        range(run.first, run.last + 1)
    )
    for part in parts:
        assert part.first == part.last or blocks.size_of(part) <= limit
    for one, other in itertools.pairwise(parts):
        assert blocks.size_of(Run(one.first, other.first)) > limit


def test_a_part_may_be_as_large_as_is_allowed():
    blocks = Blocks([4 * B, 5, B - 5])
    assert blocks.split(Run(0, 5), 4 * B) == [Run(0, 3), Run(4, 5)]
    assert blocks.split(Run(2, 5), 3 * B) == [Run(2, 5)]


# What is asked for


def _check(sizes, chunk_bytes, **how):
    blocks = Blocks(sizes)
    runs = blocks.cut(chunk_bytes, **how)
    assert [block for run in runs for block in range(run.first, run.last + 1)] == list(
        range(blocks.count)
    )
    for run in runs:
        assert run.first == run.last or blocks.size_of(run) <= chunk_bytes
    return blocks, runs


@given(_sizes, _chunks)
@example([1] * 50, B)
@example([0, 0, B, 0], B)
@example([B] * 9, 64 * B)
def test_every_block_is_asked_for_once_in_runs_as_large_as_are_allowed(sizes, chunk_bytes):
    blocks, runs = _check(sizes, chunk_bytes)
    for one, other in itertools.pairwise(runs):
        assert blocks.size_of(Run(one.first, other.first)) > chunk_bytes


@given(_sizes, _chunks)
@example([1] * 50, B)
@example([B // 8, B // 8 - 1, B // 8 - 1], B)
@example([0, 0, B, 0], B)
@example([B] * 9, 64 * B)
def test_large_tensors_share_no_run_where_they_are_alone(sizes, chunk_bytes):
    blocks, runs = _check(sizes, chunk_bytes, large_alone=True)
    for one, other in itertools.pairwise(runs):
        tensors = blocks.tensor_of(one.first), blocks.tensor_of(other.first)
        if all(sizes[tensor] * 8 < chunk_bytes for tensor in tensors):
            assert blocks.size_of(Run(one.first, other.first)) > chunk_bytes
    for run in runs:
        spans = blocks.spans(run)
        assert len(spans) == 1 or all(sizes[span.tensor] * 8 < chunk_bytes for span in spans)


def test_small_tensors_share_a_run_and_large_ones_are_cut_into_chunks():
    sizes = [B // 10] * 25 + [9 * B + 1]
    # Forty tenths of a block fill a chunk; the large one has ten blocks.
    runs = _check(sizes, 4 * B, large_alone=True)[1]
    assert runs == [Run(0, 24), Run(25, 28), Run(29, 32), Run(33, 34)]
    assert _check(sizes, 4 * B)[1] == [Run(0, 25), Run(26, 29), Run(30, 33), Run(34, 34)]
    for large_alone in (False, True):
        runs = _check([B // 10] * 45, 4 * B, large_alone=large_alone)[1]
        assert runs == [Run(0, 39), Run(40, 44)]


def test_a_thousand_tiny_tensors_are_asked_for_together():
    assert _check([4] * 2500, B)[1] == [Run(0, 1023), Run(1024, 2047), Run(2048, 2499)]


def test_a_chunk_of_less_than_a_block_has_one():
    assert _check([3 * B], 1)[1] == [Run(0, 0), Run(1, 1), Run(2, 2)]


@given(_runs())
def test_a_run_of_whole_tensors_is_told_from_one_with_parts(drawn):
    blocks, run = drawn
    spans = blocks.spans(run)
    parts = [span for span in spans if span.nbytes < blocks.sizes[span.tensor]]
    expected = None if parts else range(spans[0].tensor, spans[-1].tensor + 1)
    assert blocks.whole(run) == expected
