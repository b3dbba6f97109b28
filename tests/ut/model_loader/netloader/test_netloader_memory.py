import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_ascend.model_loader.netloader.executor import memory
from vllm_ascend.model_loader.netloader.executor.chunks.blocks import Span
from vllm_ascend.model_loader.netloader.executor.memory import host_view, in_place, read, write

from .support import DTYPES, any_tensor, blank_like, bytes_of, random_tensor


@st.composite
def _spans(draw):
    """A tensor and consecutive spans that are all of it, cut between elements."""
    tensor = draw(any_tensor())
    step = 16 * draw(st.integers(1, 40))
    offsets = range(0, tensor.nbytes, step) or [0]
    return tensor, [Span(0, at, min(step, tensor.nbytes - at)) for at in offsets]


def copied(tensor, spans):
    """A tensor like another one, into which its bytes were brought span by span."""
    here = blank_like({"t": tensor})["t"]
    for span in spans:
        data = read(span, [tensor])
        assert data.is_contiguous()
        assert data.nbytes == span.nbytes
        write(span, [here], bytes_of(data).clone())
    return here


@given(_spans())
def test_what_is_read_and_written_is_the_tensors_bytes(drawn):
    tensor, spans = drawn
    assert torch.equal(bytes_of(copied(tensor, spans)), bytes_of(tensor))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_transposed_tensor_of_any_dtype_is_read_and_written(dtype):
    tensor = random_tensor(1, dtype, 6, 7, 2).permute(2, 0, 1)
    spans = [Span(0, at, min(64, tensor.nbytes - at)) for at in range(0, tensor.nbytes, 64)]
    assert torch.equal(bytes_of(copied(tensor, spans)), bytes_of(tensor))


def test_a_single_element_may_have_any_stride():
    tensor = torch.arange(10.0)[3::2][:1]
    assert copied(tensor, [Span(0, 0, 4)]) == 3.0


def test_the_elements_of_a_strided_tensor_may_come_from_any_byte_of_a_buffer():
    tensor = random_tensor(1, torch.int64, 2, 3).t()
    buffer = torch.empty(3 + tensor.nbytes, dtype=torch.uint8)[3:]
    buffer.copy_(bytes_of(tensor))
    here = blank_like({"t": tensor})["t"]
    write(Span(0, 0, tensor.nbytes), [here], buffer)
    assert torch.equal(here, tensor)


@pytest.mark.parametrize("rows", [slice(1, None, 2), slice(3, 7)])
@pytest.mark.parametrize("columns", [slice(2, None, 3), slice(None)])
def test_memory_around_a_tensor_stays_as_it_is(rows, columns):
    around = torch.zeros(10, 10)
    inside = around[rows, columns]
    write(Span(0, 0, inside.nbytes), [inside], bytes_of(torch.ones_like(inside)))
    assert (inside == 1).all()
    inside.zero_()
    assert (around == 0).all()


class _Written(TorchDispatchMode):
    """Notes the tensors that operators are given to write to."""

    def __init__(self):
        super().__init__()
        self.tensors = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        for said, argument in zip(operator._schema.arguments, args, strict=False):
            if said.alias_info is not None and said.alias_info.is_write:
                self.tensors.append(argument)
        return operator(*args, **(kwargs or {}))


# Sessions fill parts of one tensor at once, and a device may write to a copy of what it is given.
@given(any_tensor().filter(lambda tensor: not tensor.is_contiguous()), st.data())
def test_an_operator_that_writes_a_part_is_given_no_other_part(tensor, data):
    first = data.draw(st.integers(0, tensor.numel() - 1))
    end = data.draw(st.integers(first + 1, tensor.numel()))
    span = Span(0, first * tensor.itemsize, (end - first) * tensor.itemsize)
    part = read(span, [tensor]).clone()
    places = torch.arange(tensor.untyped_storage().nbytes() // tensor.itemsize)
    of_tensor = places.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    with _Written() as written:
        write(span, [tensor], part)
    given_out = [
        places.as_strided(one.shape, one.stride(), one.storage_offset()).reshape(-1)
        for one in written.tensors
        if one.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
    ]
    assert torch.equal(torch.cat(given_out), of_tensor.reshape(-1)[first:end])


def test_parameters_that_want_gradients_are_read_and_written():
    for parameter in (torch.nn.Parameter(torch.ones(5)), torch.nn.Parameter(torch.ones(6, 7)).t()):
        span = Span(0, 0, parameter.nbytes)
        assert torch.equal(read(span, [parameter]).view(torch.float32).view(-1)[:5], torch.ones(5))
        write(span, [parameter], torch.zeros(span.nbytes, dtype=torch.uint8))
        assert (parameter == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_part_of_a_contiguous_tensor_is_its_own_memory(dtype):
    tensor = random_tensor(0, dtype, 400)
    span = Span(1, 64, 128)
    for view in (in_place(span, [None, tensor]), read(span, [None, tensor])):
        assert view.data_ptr() == tensor.data_ptr() + 64
        assert view.dtype == torch.uint8
        assert torch.equal(view, bytes_of(tensor)[64:192])


def test_all_of_a_contiguous_tensor_is_the_tensor_itself():
    tensor = torch.arange(100.0)
    assert in_place(Span(0, 0, 400), [tensor]) is tensor
    assert read(Span(0, 0, 400), [tensor]) is tensor


def test_a_strided_tensor_has_no_memory_in_one_piece():
    assert in_place(Span(0, 0, 64), [torch.arange(100.0)[::2]]) is None


# What sockets read and write


@given(any_tensor().filter(lambda tensor: tensor.is_contiguous()))
def test_a_tensors_memory_is_seen_as_bytes(tensor):
    view = memoryview(host_view(tensor))
    assert (view.itemsize, view.nbytes, view.contiguous) == (1, tensor.nbytes, True)
    assert bytes(view) == bytes(bytes_of(tensor).tolist())


def test_what_is_written_to_a_view_is_in_the_tensor():
    tensor = torch.zeros(3, dtype=torch.int16)
    memoryview(host_view(tensor)).cast("B")[2:4] = b"\x01\x02"
    assert tensor.tolist() == [0, 0x0201, 0]


def test_a_view_keeps_its_tensor_for_as_long_as_it_or_a_part_of_it_is_there():
    tensor = torch.ones(1000)
    there = weakref.ref(tensor)
    part = memoryview(host_view(tensor)).cast("B")[100:200]
    del tensor
    assert there() is not None
    assert bytes(part[:4]) == bytes(bytes_of(torch.ones(1)).tolist())
    del part
    assert there() is None


@given(any_tensor().filter(lambda tensor: tensor.is_contiguous()))
def test_the_bytes_of_a_contiguous_tensor_are_its_own_memory(tensor):
    own = memory.bytes_of(tensor)
    assert own.shape == (tensor.nbytes,)
    assert own.data_ptr() == tensor.data_ptr()
    assert torch.equal(own, bytes_of(tensor))
