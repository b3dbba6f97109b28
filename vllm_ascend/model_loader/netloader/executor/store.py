"""The block store: weights as blocks in tensors' memory, complete or still being filled."""

import contextlib
import functools
import itertools
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import msgspec
import torch

from ..errors import NotHere, Withdrawn
from ..utils import Buffer
from .chunks.blocks import Blocks, Run
from .chunks.digests import DIGEST_BYTES, Digests, combine
from .chunks.manifest import NO_MEANING, Manifest, Sample, Scalar
from .devices import Device
from .memory import Part, contiguous, host_memory, host_view, in_place, read
from .model.match import describe

# Bytes that are hashed at once when all of a model is: on accelerators that costs some launches.
_HASHED_AT_ONCE = 16 << 20


class BlockStore:
    """What an instance holds: manifest, digests, which blocks are here, and their bytes.

    A source's store is complete from the start. A client's is filled, run by run, by one session or
    several, and can be read from meanwhile.

    Args:
        manifest: the tensors' names and kinds.
        blocks: how the tensors are cut.
        tensors: the manifest's tensors without aliases, in order; their memory is read, and written
            where the store is not complete.
        digests: of the blocks, as a source has told them or as they were computed here.
        device: where the tensors are.
        complete: whether all blocks are here already.

    Attributes:
        withdrawn: set once nothing can be read any more.
    """

    def __init__(
        self,
        manifest: Manifest,
        blocks: Blocks,
        tensors: Sequence[torch.Tensor],
        digests: Digests,
        device: Device,
        *,
        complete: bool,
    ) -> None:
        self.manifest = manifest
        self.blocks = blocks
        self.tensors = tensors
        self.digests = digests
        self.device = device
        self.withdrawn = threading.Event()
        self._why: Withdrawn | None = None
        self._lock = threading.RLock()
        self._readers: Counter[int] = Counter()  # by thread
        self._read = threading.Condition(self._lock)
        self._news = threading.Condition(self._lock)
        self._here = bytearray(b"\1" if complete else b"\0") * blocks.count
        self._missing = 0 if complete else blocks.count
        self._came = [Run(0, blocks.count - 1)] if complete and blocks.count else []

    @functools.cached_property
    def readable(self) -> Sequence[torch.Tensor]:
        """The tensors as their bytes are read: see `devices.Device.readable`."""
        return self.device.readable(self.tensors)

    @functools.cached_property
    def encoded_manifest(self) -> bytes:
        """The manifest as it travels; for many tensors encoding it takes milliseconds."""
        return msgspec.json.encode(self.manifest)

    @property
    def complete(self) -> bool:
        """Whether all blocks are here."""
        return self._missing == 0

    def here(self, cells: int) -> list[float]:
        """Return which parts of the blocks are here, from 0 to 1, for so many cells at most."""
        count = self.blocks.count
        if not count:
            return []
        with self._lock:
            ends = [count * cell // min(cells, count) for cell in range(min(cells, count) + 1)]
            return [
                self._here.count(1, at, end) / (end - at) for at, end in itertools.pairwise(ends)
            ]

    @property
    def blocks_here(self) -> int:
        """Number of the blocks that are here."""
        return self.blocks.count - self._missing

    def withdraw(self, why: Withdrawn) -> None:
        """Let no read begin from now on, as the memory is about to change or to go away."""
        with self._lock:  # so that a read has begun, or sees this
            self._why = self._why or why
            self._news.notify_all()
        self.withdrawn.set()

    @contextlib.contextmanager
    def reading(self, run: Run) -> Iterator[None]:
        """Read the memory of a run: see `idle`.

        Raises:
            Withdrawn: see `check`.
            NotHere: see `check`.
        """
        thread = threading.get_ident()
        with self._lock:
            self.check(run)
            self._readers[thread] += 1
        try:
            yield
        finally:
            with self._read:
                self._readers[thread] -= 1
                if not self._readers[thread]:
                    del self._readers[thread]
                self._read.notify_all()

    def idle(self, seconds: float) -> bool:
        """Wait until no other thread is `reading`; return whether that is so in time."""
        me = {threading.get_ident()}
        with self._read:
            return self._read.wait_for(lambda: self._readers.keys() <= me, seconds)

    def check(self, run: Run) -> None:
        """Return if a run can be read. A thread that is `reading` may read what it has begun.

        Raises:
            Withdrawn: nothing can be read any more; says why.
            NotHere: a block of it has not come yet.
        """
        if self._why is not None and threading.get_ident() not in self._readers:
            raise type(self._why)(str(self._why))
        if self._missing and (block := self._here.find(0, run.first, run.last + 1)) >= 0:
            raise NotHere(f"block {block} is not here")

    def parts(self, run: Run) -> list[torch.Tensor]:
        """Return a run's bytes as contiguous tensors, one after the other, copies where need be."""
        whole = self.blocks.whole(run)
        if whole is None:
            return [read(span, self.readable) for span in self.blocks.spans(run)]
        # Of a hundred thousand small tensors each span would cost microseconds.
        return [contiguous(self.readable[index]) for index in whole]

    def memory(self, run: Run) -> list[Buffer] | None:
        """Return a run's own memory, which is the host's, to be filled; None: it has gaps."""
        whole = self.blocks.whole(run)
        if whole is None:
            places = [in_place(span, self.tensors) for span in self.blocks.spans(run)]
            found = [host_view(place) for place in places if place is not None]
            return [*found] if len(found) == len(places) else None
        # Of a hundred thousand small tensors each further question would cost microseconds.
        tensors = self.tensors[whole.start : whole.stop]
        if not all(tensor.is_contiguous() for tensor in tensors):
            return None
        sizes = self.blocks.sizes[whole.start : whole.stop]
        return [
            host_memory(tensor.data_ptr(), nbytes)
            for tensor, nbytes in zip(tensors, sizes, strict=True)
        ]

    def wrong(self, run: Run, parts: Sequence[Part] | None = None) -> list[int]:
        """Return the blocks of a run that are not what their digests say.

        Args:
            run: the run.
            parts: its bytes, where the caller has them; None: they are read from the tensors.
        """
        found = self.device.digests(self.parts(run) if parts is None else parts)
        expected = self.digests.blocks[run.first * DIGEST_BYTES : (run.last + 1) * DIGEST_BYTES]
        if found == expected:
            return []
        return [
            block
            for block in range(run.first, run.last + 1)
            if found[(at := (block - run.first) * DIGEST_BYTES) : at + DIGEST_BYTES]
            != self.digests.of(block)
        ]

    def add(self, run: Run) -> None:
        """Record that a run is here."""
        count = run.last - run.first + 1
        with self._lock:
            self._missing -= self._here.count(0, run.first, run.last + 1)
            self._here[run.first : run.last + 1] = b"\1" * count
            self._came.append(run)
            self._news.notify_all()

    def came(self, since: int, seconds: float) -> Sequence[Run]:
        """Return the runs that have come after the first `since` ones, once there are any.

        Args:
            since: how many are known.
            seconds: for which to wait.

        Raises:
            Withdrawn: nothing can be read any more.
        """
        with self._news:
            self._news.wait_for(lambda: len(self._came) > since or self._why, seconds)
            if self._why is not None:
                raise type(self._why)(str(self._why))
            return self._came[since:]

    def names(self, blocks: Iterable[int]) -> list[str]:
        """Return the names of the tensors that blocks belong to."""
        names = self.manifest.names
        return [names[tensor] for tensor in sorted({self.blocks.tensor_of(b) for b in blocks})]

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> "BlockStore":
        """Return a complete store of the same bytes in other memory."""
        return BlockStore(
            self.manifest, self.blocks, tensors, self.digests, self.device, complete=True
        )

    def hashed_anew(
        self,
        attributes: Mapping[str, Scalar] | None = None,
        stop: threading.Event | None = None,
    ) -> "BlockStore":
        """Return a complete store with the digests of what is in memory now.

        Args:
            attributes: in the place of the manifest's.
            stop: ends it early.

        Raises:
            Withdrawn: it was stopped.
        """
        manifest = self.manifest
        if attributes is not None and attributes != manifest.attributes:
            manifest = msgspec.structs.replace(manifest, attributes=dict(attributes))

        def go_on(nbytes: int) -> None:
            if stop is not None and stop.is_set():
                raise Withdrawn("the weights are changing")

        return _hashed(manifest, self.blocks, self.tensors, self.device, go_on)


def make_store(
    tensors: Mapping[str, torch.Tensor],
    layout: str,
    attributes: Mapping[str, Scalar],
    device: Device,
    meaning: Mapping[str, str] = NO_MEANING,
    made: Mapping[str, Sample] | None = None,
    progress: Callable[[int], object] = lambda nbytes: None,
) -> BlockStore:
    """Describe and hash named tensors as they are to be served.

    Args:
        tensors: name -> tensor.
        layout: the manifest's layout.
        attributes: the manifest's attributes.
        device: where the tensors are.
        meaning: the manifest's meaning.
        made: the manifest's samples of what does not travel.
        progress: called with the bytes that are hashed next; what it raises ends it early.

    Raises:
        LayoutUnsupported: a tensor has no memory.
    """
    formats = device.formats(tensors)
    manifest, distinct, sizes = describe(tensors, layout, attributes, formats, meaning)
    manifest = msgspec.structs.replace(manifest, made=made or {})
    blocks = Blocks(sizes)
    return _hashed(manifest, blocks, distinct, device, progress)


def _hashed(
    manifest: Manifest,
    blocks: Blocks,
    tensors: Sequence[torch.Tensor],
    device: Device,
    progress: Callable[[int], object],
) -> BlockStore:
    device.synchronize()
    readable = device.readable(tensors)
    of_blocks = bytearray()
    for run in blocks.cut(_HASHED_AT_ONCE, large_alone=True):
        progress(blocks.size_of(run))
        of_blocks += device.digests([read(span, readable) for span in blocks.spans(run)])
    digests = combine(device.digest_algorithm, manifest, blocks, bytes(of_blocks))
    return BlockStore(manifest, blocks, tensors, digests, device, complete=True)
