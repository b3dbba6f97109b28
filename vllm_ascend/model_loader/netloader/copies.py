"""Weights of running instances without a model: in host memory, in files, or only measured."""

import contextlib
import functools
import json
import math
import os
import statistics
import threading
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from . import checkpoint
from .config import NetLoaderConfig
from .errors import (
    ConfigError,
    LoadFailed,
    NetLoaderError,
    ProtocolError,
    SourceError,
    SourceRefused,
)
from .executor.chunks.blocks import Blocks, Run, count_of
from .executor.chunks.digests import Digests, check_length, combine
from .executor.chunks.manifest import RAW, Manifest, TensorEntry, decode
from .executor.devices import rowsums
from .executor.devices.cpu import CpuDevice
from .executor.memory import DTYPES, Part, as_tensor, host_view
from .executor.model.raw import viewed_through
from .executor.store import BlockStore, make_store
from .executor.view.offered import Viewed
from .identity import CHECKPOINT, ModelIdentity
from .interaction import api
from .interaction.api import Done, Join, ModelStatus, Status
from .interaction.client import ElasticClient
from .interaction.cold_start import Phase
from .interaction.discovery import reached_at
from .load import elastic_load
from .loading.sessions import connect, status_of
from .loading.view import records_by_name
from .serve import Offer, WeightServer
from .utils import MAX_PORT, MIN_PORT, Address, logger, one_line, shortened, size

_CHUNK = 8 << 20  # bytes of a request that only measures
_ROUND_TRIPS = 21
_MAX_ASKED = 1024  # ranks of one instance
_ASKED_AT_ONCE = 32
_MAX_BYTES, _MOST_AXES = 1 << 50, 64  # of one tensor
# What safetensors has no name for is a row of bytes there.
_NAMES = {dtype: name for name, dtype in checkpoint.DTYPES.items()}


@dataclass(frozen=True)
class Description:
    """What the weights of one rank are.

    Attributes:
        identity: whose they are.
        manifest: their tensors.
        blocks: how these are cut.
        digests: of the blocks.
        ranks: the weights digests of the instance's ranks, as far as known.
    """

    identity: ModelIdentity
    manifest: Manifest
    blocks: Blocks
    digests: Digests
    ranks: Mapping[int, str]

    @property
    def entries(self) -> list[TensorEntry]:
        """The tensors that have bytes of their own, in order."""
        return [entry for entry in self.manifest.tensors if entry.alias_of is None]


@dataclass(frozen=True)
class Measured:
    """What a number of connections has brought.

    Attributes:
        connections: how many.
        nbytes: bytes of blocks that came.
        seconds: for which they were asked.
        wrong: blocks that were not what their digests say.
        failures: why connections ended early.
    """

    connections: int
    nbytes: int
    seconds: float
    wrong: int
    failures: Sequence[str]


class _Host(CpuDevice):
    """Host memory that holds what any kind of device has.

    Args:
        algorithm: of the digests.
    """

    def __init__(self, algorithm: str) -> None:
        self.digest_algorithm = algorithm

    def digests(self, parts: Sequence[Part]) -> bytes:
        """Hash each block."""
        if self.digest_algorithm == rowsums.ALGORITHM:
            return rowsums.digests([as_tensor(part) for part in parts])
        return super().digests(parts)


def statuses(
    addresses: Sequence[Address], config: NetLoaderConfig
) -> tuple[dict[Address, Status], list[SourceError]]:
    """Ask ranks, and all other ranks of their instances, for their status.

    Returns:
        Those that answer, each process once, and why others do not.
    """
    found: dict[Address, Status] = {}
    problems: list[SourceError] = []
    instances: set[str] = set()
    asked: set[Address] = set()
    left = [*dict.fromkeys(addresses)]

    def ask(address: Address) -> Status | SourceError:
        try:
            return status_of(address, config)
        except SourceError as error:
            return error

    with ThreadPoolExecutor(_ASKED_AT_ONCE) as threads:
        while left := left[: _MAX_ASKED - len(asked)]:
            asked.update(left)
            named: dict[Address, None] = {}
            for address, answer in zip(left, threads.map(ask, left), strict=True):
                if isinstance(answer, SourceError):
                    problems.append(answer)
                elif answer.instance not in instances:
                    instances.add(answer.instance)
                    found[address] = answer
                    named |= dict.fromkeys(_named(address, answer, instances))
            left = [address for address in named if address not in asked]
    return found, problems


def _named(asked: Address, status: Status, known: Container[str]) -> Iterator[Address]:
    """Return where the other ranks are that a rank names."""
    for model in status.models:
        for rank, end in sorted(model.endpoints.items()):
            if end.instance not in known:
                with contextlib.suppress(SourceRefused):  # no address
                    yield reached_at(asked, status, model, rank)


def model_of(address: Address, status: Status, group: str) -> ModelStatus:
    """Return what a status says of a model that can be pulled.

    Raises:
        SourceRefused: there is none.
    """
    for model in status.models:
        if model.identity.group == group:
            if model.weights is not None:
                return model
            raise SourceRefused(f"{address}: {model.state}: {model.reason}")
    raise SourceRefused(f"{address}: there is no model of group {group!r}")


def describe(client: ElasticClient, identity: ModelIdentity) -> Description:
    """Ask a source what it has; the session has begun then.

    Raises:
        SourceError: it does not say, or what it says does not fit together.
    """
    joined = client.join(Join(identity))
    try:
        if joined.manifest is msgspec.UNSET or joined.blocks is msgspec.UNSET:
            raise ProtocolError("sent no manifest")
        manifest = decode(bytes(joined.manifest), None)
        sizes = [_nbytes(entry) for entry in manifest.tensors if entry.alias_of is None]
        # A source may claim any size, and `Blocks` has numbers for each block.
        check_length(joined.blocks, count_of(sizes))
        blocks = Blocks(sizes)
        digests = combine(joined.weights.partition(":")[0], manifest, blocks, joined.blocks)
    except ProtocolError as error:
        raise ProtocolError(f"{client.address}: {one_line(error)}") from None
    if digests.weights != joined.weights:
        raise ProtocolError(
            f"{client.address}: manifest and block digests make {digests.weights}, and the source "
            f"says {joined.weights}"
        )
    return Description(identity, manifest, blocks, digests, joined.ranks)


# In files


def pull(
    sources: Sequence[Address],
    description: Description,
    path: Path | None,
    config: NetLoaderConfig,
    *,
    show_progress: bool = False,
) -> BlockStore:
    """Pull the weights of a rank into host memory, or into a file of safetensors that is mapped.

    Blocks that an earlier attempt has left in the file are not fetched again if they are right.

    Args:
        sources: ranks that have them.
        description: of these weights.
        path: of the file; None: they stay in memory.
        config: deadlines and connections.
        show_progress: whether to draw a progress bar.

    Raises:
        LoadFailed: no source gave all of them.
        OSError: the file cannot be written.
    """
    part = path.with_name(f"{path.name}.part") if path is not None else None
    memory = _memory(description, path, part)
    loaded = elastic_load(
        {},
        (),
        sources,
        description.identity,
        config,
        _Host(description.digests.algorithm),
        worker=description.identity.rank,
        wanted=description.digests.weights,
        show_progress=show_progress,
        place=lambda manifest: memory,
    )
    if path is not None and part is not None:
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    return loaded.store


def view_of(
    store: BlockStore, sources: Sequence[Address], config: NetLoaderConfig
) -> Viewed | None:
    """Return weights that were pulled as a checkpoint, as one of their sources says; or None."""
    if store.manifest.layout != RAW:
        return None
    try:
        entries = [entry for entry in store.manifest.tensors if entry.alias_of is None]
        tensors = [  # all are bytes here
            memory if entry.format else memory.view(_dtype(entry)).view(entry.shape)
            for entry, memory in zip(entries, store.tensors, strict=True)
        ]
        records = records_by_name(sources, config, store.digests.weights)
        return viewed_through(store.with_tensors(tensors), records)
    except LoadFailed as error:
        logger.debug("NetLoader: no view of what is held: %s", one_line(error))
    except Exception as error:  # all weights have come, and can be served without
        why = f"{type(error).__name__}: {one_line(error)}"
        logger.warning("NetLoader: no view of what is held: %s", why, exc_info=True)
    return None


def file_name(identity: ModelIdentity) -> str:
    """Return how the file with the weights of a rank is called."""
    return f"{identity.group}-rank-{identity.rank}.safetensors"


def _dtype(entry: TensorEntry) -> torch.dtype:
    dtype = DTYPES.get(f"torch.{entry.dtype.removeprefix('torch.')}")
    if dtype is None:
        name = shortened(entry.dtype, 200)
        raise ProtocolError(f"{entry.name} has the dtype {name}, which torch does not have")
    return dtype


def _nbytes(entry: TensorEntry) -> int:
    axes, nbytes = entry.shape[: _MOST_AXES + 1], _dtype(entry).itemsize
    nbytes *= math.prod(axes)
    if len(axes) > _MOST_AXES or min(axes, default=0) < 0 or nbytes > _MAX_BYTES:
        shape = shortened(str([*axes]), 200)
        raise ProtocolError(f"{entry.name} has the shape {shape}, which no tensor has")
    return nbytes


def _memory(description: Description, path: Path | None, part: Path | None) -> list[torch.Tensor]:
    """Return the bytes of each tensor."""
    # The largest elements first, so that all are at multiples of their size.
    sizes, entries = description.blocks.sizes, description.entries
    order = sorted(range(len(sizes)), key=lambda index: -_dtype(entries[index]).itemsize)
    at, places = 0, [0] * len(sizes)
    for index in order:
        places[index], at = at, at + sizes[index]
    if path is None or part is None:
        try:
            return [torch.empty(nbytes, dtype=torch.uint8) for nbytes in sizes]
        except RuntimeError:  # torch's, where there is no memory
            raise NetLoaderError(f"out of memory: the weights have {size(at)}") from None
    head = _head(description, [(index, places[index]) for index in order])
    part.parent.mkdir(parents=True, exist_ok=True)
    if _begins_with(path, head):  # else it stays until all of these weights are there
        path.replace(part)
    if not _begins_with(part, head):  # of other weights, or new
        part.unlink(missing_ok=True)  # whoever has mapped it keeps what it had
        part.write_bytes(head)
    with part.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, len(head) + at)  # else a full disk is a SIGBUS
        file.truncate(len(head) + at)
    mapped = torch.from_file(str(part), shared=True, size=len(head) + at, dtype=torch.uint8)
    return [mapped[len(head) + at :][:nbytes] for at, nbytes in zip(places, sizes, strict=True)]


def _begins_with(path: Path, head: bytes) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(head)) == head
    except FileNotFoundError:
        return False


def _head(description: Description, order: Sequence[tuple[int, int]]) -> bytes:
    """Return what a file of safetensors begins with."""
    manifest, entries = description.manifest, description.entries
    head: dict[str, object] = {
        "__metadata__": {
            "format": "pt",
            "weights": description.digests.weights,
            "layout": manifest.layout,
            "attributes": json.dumps(manifest.attributes),
            # Tied weights are there once; strides and formats of NPUs are only told here.
            "manifest": msgspec.json.encode(manifest).decode(),
        }
    }
    for index, at in order:
        entry, nbytes = entries[index], description.blocks.sizes[index]
        name, shape = _NAMES.get(_dtype(entry)), [*entry.shape]
        if name is None:
            name, shape = "U8", [nbytes]
        elif entry.stride is not None or entry.format is not None:
            shape = [math.prod(shape)]
        head[entry.name] = {"dtype": name, "shape": shape, "data_offsets": [at, at + nbytes]}
    text = msgspec.json.encode(head)
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text


# For others


@contextlib.contextmanager
def holding(
    held: Sequence[tuple[Description, BlockStore, Viewed | None, str]],
    config: NetLoaderConfig,
    host: str,
) -> Iterator[list[Address]]:
    """Serve weights of ranks as their instances do.

    Args:
        held: of each rank: what it has, its weights, their view, where they came from.
        config: port and bounds; the rank is added to the port.
        host: the address of this machine that others reach.

    Yields:
        Where each of them listens.

    Raises:
        ConfigError: the ports are out of range.
        CannotListen: a port is taken.
    """
    servers: dict[int, WeightServer] = {}
    ranks = {what.identity.rank: store.digests.weights for what, store, *_ in held}
    known = {**dict(held[0][0].ranks), **ranks} if held else {}

    def endpoints() -> dict[int, api.Endpoint]:
        ends = {rank: server.endpoint for rank, server in servers.items()}
        return {rank: end for rank, end in ends.items() if end is not None}

    with contextlib.ExitStack() as stack:
        addresses = []
        for what, store, view, source in held:
            rank = what.identity.rank
            server = WeightServer(config, rank, host)
            server.offer(
                Offer(
                    what.identity,
                    store,
                    loaded_from=source,
                    ranks=lambda: known,
                    endpoints=endpoints,
                    view=view,
                )
            )
            stack.callback(server.stop)
            addresses.append(server.start(port_of(config, rank)))
            servers[rank] = server
        yield addresses


def port_of(config: NetLoaderConfig, rank: int) -> int:
    """Return the port on which a rank is served; 0: the system chooses.

    Raises:
        ConfigError: there is none.
    """
    port = config.port_for(rank)
    if port is None:
        raise ConfigError(
            f"LISTEN_PORT is {config.listen_port}; allowed: {MIN_PORT} to {MAX_PORT} less the "
            "rank, or leave it out"
        )
    return port


@contextlib.contextmanager
def holding_checkpoint(
    folder: Path,
    identity: ModelIdentity,
    config: NetLoaderConfig,
    host: str,
    progress: Callable[[checkpoint.Checkpoint, int], object],
) -> Iterator[tuple[Address, str, checkpoint.Checkpoint]]:
    """Serve the checkpoint of a folder.

    The server opens first, and clients wait while all is read once for the digests.

    Args:
        folder: of the checkpoint.
        identity: of its model.
        config: port and bounds.
        host: the address of this machine that others reach.
        progress: called with the checkpoint and the bytes that are read next.

    Yields:
        Where it listens, the weights digest, and the checkpoint, which is to be checked at least
        once a second: if it has changed, nobody reads it any more once this is over.

    Raises:
        CheckpointError: there is no checkpoint, or it has changed.
        CannotListen: the port is taken.
        OSError: a file cannot be read.
    """
    server = WeightServer(config, 0, host)
    offer = functools.partial(Offer, identity, loaded_from="a checkpoint folder", folder=folder)
    reading = offer(
        None, "the checkpoint is being read", code=api.Code.LOADING, phase=Phase.READING
    )
    with contextlib.ExitStack() as stack:
        found = stack.enter_context(checkpoint.opened(folder))
        server.announce(reading)
        stack.callback(server.stop)
        address = server.start(port_of(config, 0))
        store = make_store(
            found.tensors, CHECKPOINT, {}, CpuDevice(), progress=functools.partial(progress, found)
        )
        found.check()
        ranks, view = {0: store.digests.weights}, checkpoint.view_of(found)
        server.offer(offer(store, ranks=lambda: ranks, view=view))
        try:
            yield address, store.digests.weights, found
        finally:
            # Before the files are closed: who wants to write to them waits for that.
            server.withdraw(identity.group, api.Code.GONE, "the checkpoint is no longer held")


# Only measured


def latency(client: ElasticClient, weights: str) -> float:
    """Return the seconds that a request and its answer take, as a rule."""
    took = []
    for _ in range(_ROUND_TRIPS):
        started = time.monotonic()
        client.peers(weights)
        took.append(time.monotonic() - started)
    return statistics.median(took)


def measure(
    address: Address,
    description: Description,
    connections: int,
    seconds: float,
    config: NetLoaderConfig,
    progress: Callable[[int], object] = lambda nbytes: None,
) -> Measured:
    """Pull blocks to nowhere, and check them, over so many connections for so long.

    Args:
        address: the source.
        description: of its weights.
        connections: how many.
        seconds: for which blocks are asked for.
        config: deadlines.
        progress: called with the bytes that have come.
    """
    lock, failures = threading.Lock(), []
    nbytes = wrong = 0
    runs = description.blocks.cut(_CHUNK)
    most = seconds + config.progress_timeout  # also where bytes come one by one
    started = time.monotonic()

    def work(number: int) -> None:
        nonlocal nbytes, wrong
        buffer = torch.empty(max(map(description.blocks.size_of, runs)), dtype=torch.uint8)
        device = _Host(description.digests.algorithm)
        at = number * len(runs) // connections
        try:
            with connect(address, config) as client, client.ended_after(most):
                while time.monotonic() - started < seconds:
                    run = runs[at % len(runs)]
                    at += 1
                    came = buffer[: description.blocks.size_of(run)]
                    client.ask_blocks(description.digests.weights, run.first, run.last)
                    client.receive_blocks(len(came), [[host_view(came)]])
                    bad = _wrong(description, device, run, came)
                    with lock:
                        nbytes += len(came)
                        wrong += bad
                        progress(len(came))
                client.done(Done(complete=True))
        except SourceError as error:
            with lock:
                failures.append(str(error))

    threads = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return Measured(connections, nbytes, time.monotonic() - started, wrong, failures)


def _wrong(description: Description, device: _Host, run: Run, came: torch.Tensor) -> int:
    """Return how many blocks of a run are not what their digests say."""
    sizes = [span.nbytes for span in description.blocks.spans(run)]
    found = device.digests(came.split(sizes))
    return sum(
        found[16 * at : 16 * at + 16] != description.digests.of(block)
        for at, block in enumerate(range(run.first, run.last + 1))
    )
