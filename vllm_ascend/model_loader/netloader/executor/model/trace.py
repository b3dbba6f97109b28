"""Watching weights on their way into a model, so that its parameters can be read as a checkpoint.

Every operation of `load_weights` passes by: views of checkpoint tensors are let through, copies of
them into other memory are noted as boxes, and what else is done with them is noted as computing.
Nothing has to be known of the model. Checkpoint tensors may be on the meta device, which tells what
a model would copy where: the model, on its own device, then keeps what it has.
"""

import functools
import gc
import operator
import sys
from bisect import bisect_left, bisect_right, insort
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from math import prod
from typing import Any

import msgspec
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

from ..memory import bytes_of
from ..view.boxes import Box, Dim, Piece, Unmapped, boxes, last_of, reach, row_major, without
from ..view.casts import keeps, shortest
from ..view.records import Copy, Fill, Kept, Parameter, Records, Seen, name_of, parameter_of

_aten = torch.ops.aten
_COPY = _aten.copy_.default
# The same elements in the same shape, in other memory.
_COPIES = {_aten.clone.default, _aten._to_copy.default}
# Of one number.
_FILLS = {_aten.fill_.Scalar, _aten.zero_.default}
# Look at no element: views whose schema does not say so, and new memory.
_BLIND = {
    _aten._unsafe_view.default,
    _aten._reshape_alias.default,
    _aten.empty_like.default,
    _aten.zeros_like.default,
    _aten.ones_like.default,
    _aten.full_like.default,
    _aten.new_empty.default,
    _aten.new_empty_strided.default,
    _aten.new_zeros.default,
    _aten.new_ones.default,
    _aten.new_full.default,
}
# Shorter ways to the views that are made most often.
_SHORTER: dict[Any, Callable[..., Any]] = {
    _aten.detach.default: torch.detach,
    _aten.select.int: torch.select,
    _aten.unbind.int: torch.unbind,
    _aten.unsqueeze.default: torch.unsqueeze,
}
_first_of = operator.attrgetter("first")
# Scales and the like are what is computed with: bytes kept of one box, and of all together.
_KEPT_OF_ONE = 64 << 10
_KEPT_OF_ALL = 1 << 20
# A tensor of which more rows are looked up is kept as a whole, or not.
_MOST_ROWS = 256


class _Span(msgspec.Struct, frozen=True, gc=False):
    """Part of a storage that has elements of a checkpoint tensor.

    Attributes:
        name: the checkpoint tensor.
        shape: its shape.
        first: the storage's first byte of the span.
        end: the byte after its last one.
        size: the span's dimensions, in which it lies in row-major order.
        base: number of its first element in the checkpoint tensor, or in the storage of `parent`.
        stride: steps there.
        parent: what it is a copy of; None: the checkpoint tensor itself.
        chain: the dtypes that its elements went through, see `Copy.through`.
    """

    name: str
    shape: tuple[int, ...]
    first: int
    end: int
    size: tuple[int, ...]
    base: int
    stride: tuple[int, ...]
    parent: "_Span | None"
    chain: tuple[torch.dtype, ...]

    def find(self, offset: int, dims: Iterable[Dim]) -> Sequence[Piece]:
        """Find elements of the storage in the checkpoint tensor."""
        pieces = boxes(self.size, offset - self.first // self.chain[-1].itemsize, dims)
        # All of the checkpoint tensor, as it is.
        own = self.parent is None and self.base == 0 and self.size == self.shape
        if own and self.stride == row_major(self.shape):
            return pieces
        return [*self._find_above(pieces)]

    def _find_above(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        for piece in pieces:
            steps = zip(piece.box.start, self.stride, strict=True)
            base = self.base + sum(start * step for start, step in steps)
            above = [*zip(piece.box.size, self.stride, piece.stride, strict=True)]
            parent = self.parent
            more = boxes(self.shape, base, above) if parent is None else parent.find(base, above)
            for one in more:
                yield one._replace(offset=one.offset + piece.offset)

    def chain_to(self, dtype: torch.dtype) -> tuple[torch.dtype, ...]:
        """Return the dtypes that elements went through when the storage is seen with a dtype."""
        if dtype == self.chain[-1]:
            return self.chain
        if len(self.chain) > 1 or dtype.itemsize != self.chain[0].itemsize:
            raise Unmapped(f"{self.chain} seen as {dtype}")
        return (dtype,)


class _Write(msgspec.Struct, frozen=True, gc=False):
    """Memory that was written.

    Attributes:
        offset: its first element, in its storage.
        size: number of elements, for each dimension.
        stride: steps, for each dimension.
        dtype: as which it was seen.
        first: its first byte in its storage.
        end: the byte after its last one.
        source: the checkpoint tensor's name; empty: it was not copied from one.
        pieces: where its elements are in the checkpoint tensor, if they are copies.
        chain: the dtypes that they went through.
        operation: what made the values; empty: copies, or `value` everywhere.
        value: the number that it was filled with.
    """

    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    first: int
    end: int
    source: str = ""
    pieces: Sequence[Piece] = ()
    chain: tuple[torch.dtype, ...] = ()
    operation: str = ""
    value: bool | int | float = 0

    @property
    def is_fill(self) -> bool:
        """Whether it was filled with one number."""
        return not self.source and not self.operation

    def area(self, tensor: torch.Tensor) -> list[Box]:
        """Return what it is of a tensor's memory, seen as rows."""
        shape = (prod(tensor.shape[:-1]), tensor.shape[-1]) if tensor.dim() else (1, 1)
        dims = [(n, step, 0) for n, step in zip(self.size, self.stride, strict=True)]
        return [piece.box for piece in boxes(shape, self.offset - tensor.storage_offset(), dims)]


class Trace(TorchDispatchMode):
    """Notes how checkpoint tensors are copied into a model.

    Used as `with trace: model.load_weights(trace.watch(weights))`, and asked for `records` then.

    Attributes:
        failure: what went wrong while taking notes; the load went on without.
    """

    def __init__(self) -> None:
        super().__init__()
        self.failure = ""
        self._catalog: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        self._kept: dict[str, dict[Box, Kept]] = defaultdict(dict)
        self._room = _KEPT_OF_ALL
        self._spans: dict[int, list[_Span]] = {}
        self._writes: dict[int, list[_Write]] = defaultdict(list)
        # These keep an address from being used again, and not the memory.
        self._known: dict[int, StorageWeakRef] = {}
        # By the address of an operation, whose hash takes longer. What is known is never freed.
        self._views: dict[int, Callable[..., Any]] = {}
        self._numbers: set[bool | int | float] = set()  # that were read from checkpoint tensors

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # a guard for what is compiled, which takes longer than making a view

    def watch(
        self, weights: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield a checkpoint's tensors as they come, and take note of each, not of its making."""
        for name, tensor in iter(functools.partial(self._unwatched, iter(weights)), None):
            shape = tuple(tensor.shape)
            self._catalog[name] = tensor.dtype, shape
            try:
                chain = (tensor.dtype,)
                self._add(tensor, name, shape, 0, row_major(shape), None, chain)
            except Exception as error:
                self._failed(name, error)
            yield name, tensor

    def _unwatched(
        self, weights: Iterator[tuple[str, torch.Tensor]]
    ) -> tuple[str, torch.Tensor] | None:
        """Return the next tensor; reading files takes more operations than loading does."""
        if _get_current_dispatch_mode() is not self:
            return next(weights, None)
        self.__exit__(None, None, None)
        try:
            return next(weights, None)
        finally:
            self.__enter__()

    def records(self, model: nn.Module) -> Records:
        """Return what the parameters and buffers of a model have of the checkpoint.

        Raises:
            Unmapped: something went wrong while taking notes.
        """
        if self.failure:
            raise Unmapped(self.failure)
        sharing: dict[int, dict[tuple[int, int], tuple[str, torch.Tensor]]] = defaultdict(dict)
        for name, tensor in (
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        ):
            in_storage = sharing[tensor.untyped_storage()._cdata]
            in_storage.setdefault(_bounds_of(tensor), (name, tensor))
        copies: dict[str, list[Copy]] = defaultdict(list)
        parameters: list[Parameter] = []
        fills: list[Fill] = []
        computed: dict[str, str] = {}
        overwritten = False
        for key, tensors in sharing.items():
            writes: dict[tuple[int, int], list[_Write]] = defaultdict(list)
            for write in self._writes.get(key, ()):
                touched = [one for one in tensors if one[0] < write.end and write.first < one[1]]
                for where in touched:
                    writes[where].append(write)
                if not touched:  # memory that the model has in no parameter
                    self._keep_boxes(write)
            for where, (name, tensor) in tensors.items():
                if (span := self._span(tensor)) is not None:  # the checkpoint's own memory
                    writes[where].append(self._write_of(tensor, tensor, span))
                if where not in writes:
                    continue
                number, start = len(parameters), tensor.storage_offset()
                parameters.append(parameter_of(name, tensor))
                last, lost, problem = _last(writes[where], tensor)
                if problem:
                    computed[name] = problem
                there = {id(write) for write in (*last, *lost)}
                overwritten |= any(one.source and id(one) not in there for one in writes[where])
                for write in lost:
                    self._keep_boxes(write)
                for write in last:
                    if write.is_fill:
                        where_filled = write.offset - start, write.size, write.stride
                        fills.append(Fill(number, *where_filled, write.value))
                    if not write.source:
                        continue
                    own = self._catalog[write.source][0]
                    through = _through(write.chain, write.dtype, own)
                    copies[write.source] += [
                        Copy(
                            *piece.box,
                            number,
                            write.offset - start + piece.offset,
                            piece.stride,
                            through,
                        )
                        for piece in write.pieces
                    ]
        for key in self._aside(sharing):
            for span in self._spans.get(key, ()):
                self._keep_whole(span.name)
            for write in self._writes.get(key, ()):
                self._keep_boxes(write)
        return Records(
            tensors=tuple(
                Seen(
                    name,
                    name_of(dtype),
                    shape,
                    tuple(copies.get(name, ())),
                    tuple(self._kept.get(name, {}).values()),
                )
                for name, (dtype, shape) in self._catalog.items()
            ),
            parameters=tuple(parameters),
            fills=tuple(fills),
            computed=computed,
            overwritten=overwritten,
        )

    def _aside(self, sharing: Mapping[int, object]) -> list[int]:
        """Return what memory somebody still has that is of no parameter, such as an attribute."""
        left = [key for key, memory in self._known.items() if key not in sharing]
        if not all(self._known[key].expired() for key in left):
            gc.collect()  # frames that refer to themselves may have kept what loading had
        return [key for key in left if not self._known[key].expired()]

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Take note of an operation, and do it."""
        if not kwargs and (view := self._views.get(id(func))) is not None:
            return view(*args)
        kwargs = kwargs or {}
        if func is not _COPY and _looks_at_nothing(func):
            self._views[id(func)] = _SHORTER.get(func, func)
            return func(*args, **kwargs)
        after = None
        try:
            after = self._before(func, args, kwargs)
        except Exception as error:
            self._failed(func, error)
        if func is _COPY and args[1].is_meta and not args[0].is_meta:
            return args[0]  # no values that could be copied
        if func is _aten._to_copy.default and args[0].is_meta:
            kwargs = {**kwargs, "device": args[0].device}  # no values, on any device
        out = func(*args, **kwargs)
        if after is not None:
            try:
                after(out)
            except Exception as error:
                self._failed(func, error)
        return out

    def _failed(self, what: object, error: Exception) -> None:
        """Let a load go on without records, as it is worth more than they are."""
        self.failure = self.failure or f"{what}: {type(error).__name__}: {error}"

    def _before(
        self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Callable[[Any], None] | None:
        """Take note of an operation before it is done, and return what is to be done after it."""
        copies = func is _COPY and _is_plain(args[0])
        if copies and (span := self._span(args[1])) is not None:
            self._note(args[0], self._write_of(args[0], args[1], span))
            return None
        inputs = [
            one for one in _tensors(args, kwargs) if one.untyped_storage()._cdata in self._known
        ]
        if func in _COPIES and inputs and (span := self._span(inputs[0])) is not None:
            return functools.partial(self._copied, inputs[0], span)
        fills = func in _FILLS and (len(args) < 2 or args[1] not in self._numbers)
        for one in inputs:
            replaced = func is _COPY and one is args[0] is not args[1]
            if not replaced and (not fills or self._span(one) is not None):
                self._read(func, one, args)
        for one in _changed(func, args, kwargs):
            value = args[1] if len(args) > 1 and fills else 0
            write = _Write(*_seen(one), operation="" if fills else str(func), value=value)
            self._note(one, write)
        return self._numbers.add if func is _aten._local_scalar_dense.default and inputs else None

    def _hold(self, tensor: torch.Tensor) -> int:
        storage = tensor.untyped_storage()
        key: int = storage._cdata
        if key not in self._known:
            self._known[key] = StorageWeakRef(storage)
        return key

    def _add(
        self,
        tensor: torch.Tensor,
        name: str,
        shape: tuple[int, ...],
        base: int,
        stride: Sequence[int],
        parent: _Span | None,
        chain: tuple[torch.dtype, ...],
    ) -> None:
        """Take note of a tensor whose elements are those of a checkpoint tensor."""
        if not tensor.numel():
            return
        size, steps = tuple(tensor.shape), tuple(stride)
        if not tensor.is_contiguous():
            order = sorted(range(tensor.dim()), key=lambda axis: -tensor.stride(axis))
            if not tensor.permute(order).is_contiguous():
                return
            size, steps = (tuple(one[axis] for axis in order) for one in (size, steps))
        span = _Span(name, shape, *_bounds_of(tensor), size, base, steps, parent, chain)
        spans = self._spans.setdefault(self._hold(tensor), [])
        if spans:
            insort(spans, span, key=_first_of)
        else:
            spans.append(span)

    def _span(self, tensor: torch.Tensor) -> _Span | None:
        """Return what a tensor has of the checkpoint, if all of it is of one checkpoint tensor."""
        spans = self._spans.get(tensor.untyped_storage()._cdata)
        if not spans or not tensor.numel():
            return None
        low, high = _bounds_of(tensor)
        span, many = spans[0], len(spans) > 1
        if many and (at := bisect_right(spans, low, key=_first_of)):
            span = spans[at - 1]
        outside = low < span.first or span.end < high
        if outside or span.chain[-1].itemsize != tensor.element_size():
            return None
        return span if _is_plain(tensor) else None

    def _copied(self, tensor: torch.Tensor, span: _Span, out: torch.Tensor) -> None:
        """Take note of new memory that has the elements of a tensor."""
        try:
            chain = span.chain_to(tensor.dtype)
        except Unmapped:
            self._read(_aten.clone.default, tensor, ())
            return
        if out.dtype != chain[-1]:
            chain = (*chain, out.dtype)
        base, stride = tensor.storage_offset(), tensor.stride()
        self._add(out, span.name, span.shape, base, stride, span, chain)

    def _write_of(self, target: torch.Tensor, tensor: torch.Tensor, span: _Span) -> _Write:
        """Return what copying a tensor that has a part of a span writes."""
        view = _seen(target)
        size, stride = view[1:3]
        spread = tensor if tensor.shape == size else tensor.expand(size)
        dims = tuple(zip(size, spread.stride(), stride, strict=True))
        try:
            chain = span.chain_to(tensor.dtype)
            pieces = span.find(tensor.storage_offset(), dims)
        except Unmapped as error:
            self._read(_COPY, tensor, ())
            return _Write(*view, operation=f"copy of {span.name}: {error}")
        return _Write(*view, source=span.name, pieces=pieces, chain=chain)

    def _note(self, target: torch.Tensor, write: _Write) -> None:
        """Take note of what is about to be written."""
        key = self._hold(target)
        if spans := self._spans.get(key):  # a checkpoint tensor itself, or a copy of it
            low, high = write.first, write.end
            for span in spans:
                if span.first < high and low < span.end:
                    self._keep_all(target, span)
            self._spans[key] = [one for one in spans if high <= one.first or one.end <= low]
        self._writes[key].append(write)

    def _keep_all(self, target: torch.Tensor, span: _Span) -> None:
        """Keep what a span has before it changes."""
        itemsize = span.chain[-1].itemsize
        memory = torch.empty(0, dtype=span.chain[-1], device=target.device)
        memory.set_(target.untyped_storage(), span.first // itemsize, span.size)
        self._read(_COPY, memory, ())

    def _read(self, func: Any, tensor: torch.Tensor, args: Sequence[Any]) -> None:
        """Keep the values of a tensor that something is computed from."""
        if func is _aten.index.Tensor and tensor is args[0] and tensor.dim():
            rows = [one for one in args[1] if one is not None]
            if len(args[1]) == len(rows) == 1 and _few_rows(rows[0]):
                for row in sorted(set(rows[0].flatten().tolist())):
                    self._read(_aten.select.int, tensor[row:][:1], ())
                return
        if not tensor.numel():
            return
        if (span := self._span(tensor)) is not None:
            dims = [*zip(tensor.shape, tensor.stride(), tensor.stride(), strict=True)]
            try:
                chain = span.chain_to(tensor.dtype)
                for piece in span.find(tensor.storage_offset(), [dim for dim in dims if dim[1]]):
                    at = tensor.storage_offset() + piece.offset
                    self._keep(span.name, piece.box, tensor, at, piece.stride, chain)
                return
            except Unmapped:
                pass  # all of it, then
        low, high = _bounds_of(tensor)
        key = tensor.untyped_storage()._cdata
        for one in self._spans.get(key, ()):
            if one.first < high and low < one.end:
                self._keep_whole(one.name)
        writes = [one for one in self._writes.get(key, ()) if one.first < one.end]
        apart = _are_apart(writes, 0, sys.maxsize, tensor.element_size())
        for number, write in enumerate(writes):
            if not write.pieces or high <= write.first or write.end <= low:
                continue
            fates = set() if apart else _fates(write, writes[number + 1 :], tensor)
            if "" in fates:
                continue
            if fates or write.dtype != tensor.dtype:
                self._keep_boxes(write)
                continue
            for piece in write.pieces:
                self._keep_rows(write, piece, tensor)

    def _keep_whole(self, name: str) -> None:
        """Note that a checkpoint tensor is read, but not which part of it."""
        shape = self._catalog[name][1]
        self._keep_box(name, Box((0,) * len(shape), shape))

    def _keep_boxes(self, write: _Write) -> None:
        """Note that what was copied is read, but is not where it was written."""
        for piece in write.pieces:
            self._keep_box(write.source, piece.box)

    def _keep_box(self, name: str, box: Box) -> None:
        """Note that a box is read, without its values."""
        if 0 not in box.size:
            self._kept[name].setdefault(box, Kept(*box))

    def _keep_rows(self, write: _Write, piece: Piece, tensor: torch.Tensor) -> None:
        """Keep the rows of a copy that a tensor has something of."""
        (start, size), step = piece.box, piece.stride[0] if piece.stride else 0
        at = write.offset + piece.offset
        first, end = 0, size[0] if size else 1
        if step:
            low, high = (byte // tensor.element_size() for byte in _bounds_of(tensor))
            deep = last_of(size[1:], piece.stride[1:])
            first, end = max(0, -((at + deep - low) // step)), min(end, -((at - high) // step))
        if first >= end:
            return
        if size:
            start, size = (start[0] + first, *start[1:]), (end - first, *size[1:])
        chain = (*write.chain, write.dtype)
        box = Box(start, size)
        self._keep(write.source, box, tensor, at + first * step, piece.stride, chain)

    def _keep(
        self,
        name: str,
        box: Box,
        tensor: torch.Tensor,
        offset: int,
        stride: tuple[int, ...],
        chain: Sequence[torch.dtype],
    ) -> None:
        """Keep a box of a checkpoint tensor, which lies in the storage of another tensor."""
        dtype = self._catalog[name][0]
        nbytes = prod(box.size) * dtype.itemsize
        values = None
        fits = nbytes <= min(_KEPT_OF_ONE, self._room)
        exact = all(keeps(a, b) for a, b in pairwise(chain))
        if box in self._kept[name]:
            return
        if fits and exact and not tensor.is_meta:
            memory = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            memory.set_(tensor.untyped_storage(), offset, box.size, stride)
            memory = memory.view(chain[-1]).to(chain[0]).contiguous()
            values = bytes_of(memory).cpu().numpy().tobytes()
            self._room -= nbytes
        self._kept[name][box] = Kept(*box, values)


def _tensors(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    for value in (*args, *kwargs.values()):
        for one in value if isinstance(value, list | tuple) else (value,):
            if isinstance(one, torch.Tensor):
                yield one


def _changed(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    """Return the tensors that an operation writes to."""
    for number, name in _written_by(func):
        yield from _tensors((kwargs.get(name), *args[number : number + 1]), {})


@functools.cache  # looking at a schema takes longer than making a view
def _written_by(func: Any) -> list[tuple[int, str]]:
    """Return which arguments an operation writes to, by number and name."""
    arguments = enumerate(func._schema.arguments)
    return [(i, one.name) for i, one in arguments if one.alias_info and one.alias_info.is_write]


@functools.lru_cache(maxsize=256)
def _through(
    chain: tuple[torch.dtype, ...], dtype: torch.dtype, own: torch.dtype
) -> tuple[str, ...]:
    """Return what `Copy.through` is of what went through a chain and was written as a dtype."""
    steps = shortest([*chain, dtype])
    return () if steps == [own] else tuple(map(name_of, steps))


@functools.cache
def _looks_at_nothing(func: Any) -> bool:
    """Return whether an operation only makes views, or new memory."""
    if func in _BLIND:
        return True
    schema = func._schema
    returns = schema.returns
    return bool(not schema.is_mutable and returns and all(one.alias_info for one in returns))


def _is_plain(tensor: torch.Tensor) -> bool:
    """Return whether a tensor's elements are those in its memory."""
    return not tensor.is_neg() and not tensor.is_conj()


def _few_rows(rows: torch.Tensor) -> bool:
    whole = not rows.dtype.is_floating_point and rows.dtype not in (torch.bool, torch.uint8)
    return whole and not rows.is_meta and rows.numel() <= _MOST_ROWS and bool((rows >= 0).all())


def _seen(
    tensor: torch.Tensor,
) -> tuple[int, tuple[int, ...], tuple[int, ...], torch.dtype, int, int]:
    """Return the first fields of `_Write` for all that a tensor sees of its storage."""
    offset, size, stride = tensor.storage_offset(), tensor.shape, tensor.stride()
    itemsize = tensor.element_size()
    end = offset + reach(size, stride)
    return offset, tuple(size), stride, tensor.dtype, offset * itemsize, end * itemsize


def _bounds_of(tensor: torch.Tensor) -> tuple[int, int]:
    """Return a tensor's first byte in its storage, and the one after its last one."""
    offset, itemsize = tensor.storage_offset(), tensor.element_size()
    return offset * itemsize, (offset + reach(tensor.shape, tensor.stride())) * itemsize


def _last(writes: Sequence[_Write], tensor: torch.Tensor) -> tuple[list[_Write], list[_Write], str]:
    """Return what is still there of what was written, in order.

    Returns:
        The writes, those of which something may be there as well, and what cannot be told.
    """
    lost: list[_Write] = []
    last: dict[int, _Write] = {}
    lows: list[tuple[int, int]] = []  # first byte, number
    longest, problem = 0, ""
    low, high = _bounds_of(tensor)
    writes = [write for write in writes if write.first < write.end]
    if _are_apart(writes, low, high, tensor.element_size()):
        return writes, lost, next((one.operation for one in reversed(writes) if one.operation), "")
    for number, write in enumerate(writes):
        first, end = write.first, write.end
        strange = ""
        if first < low or high < end or write.dtype.itemsize != tensor.element_size():
            strange = f"written as {write.dtype} {write.size}"
        around = lows[bisect_left(lows, (first - longest, 0)) : bisect_left(lows, (end, 0))]
        for place in around:
            old = last[place[1]]
            fate = _fate(old, write, tensor, strange)
            if fate is not None:
                del last[place[1]]
                lows.remove(place)
                if fate:
                    lost.append(old)
                    problem = fate
        if strange:
            lost.append(write)
            problem = strange
            continue
        insort(lows, (first, number))
        last[number] = write
        longest = max(longest, end - first)
    for write in last.values():
        problem = write.operation or problem
    return [*last.values()], lost, problem


def _are_apart(writes: Sequence[_Write], low: int, high: int, itemsize: int) -> bool:
    """Return whether writes are to bytes of their own, with elements of a tensor's size."""
    end = low
    for write in sorted(writes, key=_first_of):
        if write.first < end or write.dtype.itemsize != itemsize:
            return False
        end = write.end
    return end <= high


def _fates(old: _Write, later: Iterable[_Write], tensor: torch.Tensor) -> set[str]:
    """Return what later writes do to an earlier one, as `_fate` does; nothing: it is there."""
    width = tensor.element_size()
    fates: set[str] = set()
    for new in later:
        strange = "" if old.dtype.itemsize == new.dtype.itemsize == width else "of another size"
        if (fate := _fate(old, new, tensor, strange)) is not None:
            fates.add(fate)
    return fates


def _fate(old: _Write, new: _Write, tensor: torch.Tensor, strange: str) -> str | None:
    """Return None if an earlier write stays, empty if it is replaced, or what is wrong."""
    if old.end <= new.first or new.end <= old.first:
        return None
    if strange:
        return strange
    if (old.offset, old.size, old.stride) == (new.offset, new.size, new.stride):
        return ""
    try:
        before, left = old.area(tensor), old.area(tensor)
        for box in new.area(tensor):
            left = without(left, box)
    except Unmapped as error:
        return f"written more than once: {error}"
    if left == before or (old.is_fill and left):
        return None
    return "" if not left else f"{new.source or new.operation} is over a part of {old.source}"
