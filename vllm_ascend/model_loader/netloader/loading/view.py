"""A load through a view: the checkpoint as the ranks of an instance have it that is cut otherwise.

vLLM's own `load_weights` decides what is done with a checkpoint. Here it gets one whose tensors
have no values, which tells what it copies where. If that is all it does, the values come straight
into the host's memory. Else it gets one whose tensors are made anew, in memory of their own, of
what it reads of them, and the values come from the ranks meanwhile.
"""

import gc
import random
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from dataclasses import dataclass, replace

import msgspec
import psutil
import torch
from torch import nn
from torch.nn.parameter import UninitializedTensorMixin

from ..config import NetLoaderConfig
from ..errors import (
    LayoutUnsupported,
    LoadFailed,
    ProtocolError,
    SourceBusy,
    SourceError,
    SourceLost,
    SourceRefused,
)
from ..executor.chunks.digests import is_one_of, of_instance
from ..executor.chunks.manifest import RAW
from ..executor.model.trace import Trace
from ..executor.view.boxes import Unmapped, row_major
from ..executor.view.fetch import catalog, find, is_copied, same_reading
from ..executor.view.places import InPlace
from ..executor.view.records import MOST_ENTRIES, Copy, Records, Seen, decode, dtype_of, nbytes_of
from ..identity import OF_EACH_TENSOR, ModelIdentity
from ..interaction import api
from ..interaction.api import Done
from ..interaction.discovery import reached_at
from ..utils import Address, logger, one_line, rate, shortened, size
from .sessions import connect
from .view_reader import PAUSE, Rank, Reader, Weights, confirm, connected, said_of

_RECORDS_AT_ONCE = 8  # ranks that are asked, and whose records are here before they are read
_RECORDS_COME = 60.0  # seconds for those of all ranks of an instance
_LOOKING = 120.0  # seconds for those of all instances, besides waiting for busy ones
# Seconds for those of weights that came by name, how many sources are asked, and what they may say.
_RECORDS_BY_NAME, _ASKED_BY_NAME, _MOST_BY_NAME = 5.0, 4, MOST_ENTRIES // 8


@dataclass(frozen=True)
class Instance:
    """An instance that is cut in another way, and what its ranks have of the checkpoint.

    Attributes:
        digest: of the instance.
        identity: of one of its ranks.
        ranks: all of its ranks.
        processes: names of their processes.
    """

    digest: str
    identity: ModelIdentity
    ranks: Sequence[Rank]
    processes: frozenset[str]

    def __str__(self) -> str:
        return ", ".join(dict.fromkeys(str(rank.address) for rank in self.ranks))


def find_instance(
    addresses: Iterable[Address],
    identity: ModelIdentity,
    config: NetLoaderConfig,
    worker: int,
    tried: Sequence[Instance] = (),
    began: float | None = None,
) -> Instance:
    """Return the first instance that can be read as a checkpoint.

    Args:
        addresses: of any of the ranks of instances, in order of preference.
        identity: of the rank that loads.
        config: deadlines, credentials, what weights are allowed.
        worker: number of this process among all workers of the instance, for the log.
        tried: those that are of no use.
        began: when waiting for sources began, by `time.monotonic`; None: now.

    Raises:
        LoadFailed: there is none; says what is wrong with each.
    """
    if identity.layout != RAW:
        raise LoadFailed(f"a view fills the raw layout, and not the {identity.layout} one")
    known = {process for instance in tried for process in instance.processes}
    left = [*dict.fromkeys(addresses)]
    now = time.monotonic()
    deadline = (now if began is None else began) + config.source_wait
    end = max(now, deadline) + _LOOKING
    said: dict[Address, str] = {}
    while True:
        later = []
        for address in left:
            try:
                instance = _instance_at(address, identity, config, known, end)
                if instance is not None:
                    return instance
            except Exception as error:  # what a source says is not to cost the start
                if isinstance(error, SourceBusy):
                    later.append(address)
                if said.get(address) != (reason := said_of(address, error)):
                    said[address] = reason
                    logger.warning("NetLoader rank %d: no view of source %s", worker, reason)
        left = later
        if not left or time.monotonic() > deadline:
            raise LoadFailed("; ".join(said.values()) or "there are no further instances")
        time.sleep(random.uniform(*PAUSE))


def _instance_at(
    address: Address,
    identity: ModelIdentity,
    config: NetLoaderConfig,
    known: set[str],
    end: float,
) -> Instance | None:
    """Return the instance that a rank belongs to; None: it is known."""
    deadline = min(end, time.monotonic() + _RECORDS_COME)
    if time.monotonic() > deadline:
        raise SourceLost(f"{address}: was not asked, as looking for a view has taken too long")
    with connect(address, config) as client:
        status = client.status()
    model = next((one for one in status.models if one.identity.group == identity.group), None)
    if model is None:
        raise SourceRefused(f"{address}: has no model of group {identity.group!r}")
    processes = frozenset(end.instance for end in model.endpoints.values())
    if processes & known or status.instance in known:
        return None
    if differ := api.differences(identity, model.identity, view=True):
        raise SourceRefused(f"{address}: the models differ: {'; '.join(map(str, differ))}")
    ranks, world = model.ranks, api.world_of(model.identity, len(model.ranks))
    if not world or not world <= ranks.keys() or not world <= model.endpoints.keys():
        raise SourceBusy(f"{address}: does not say yet what all of its ranks have")
    pinned, digest = config.weights_digest, of_instance(ranks)
    for rank in sorted(world):
        if not is_one_of(pinned, ranks[rank], ranks):
            raise SourceRefused(
                f"{address}: its weights are {ranks[rank]} of {digest} and WEIGHTS_DIGEST is "
                f"{', '.join(pinned or ())}"
            )
    ends = {rank: reached_at(address, status, model, rank) for rank in sorted(world)}
    found: list[Rank] = []
    left, numbers = MOST_ENTRIES, [*ends]
    threads = ThreadPoolExecutor(_RECORDS_AT_ONCE, "netloader-view-records")
    try:
        for first in range(0, len(numbers), _RECORDS_AT_ONCE):
            some = numbers[first : first + _RECORDS_AT_ONCE]
            asked = {
                rank: threads.submit(
                    _records_of, ends[rank], identity, config, ranks[rank], digest, deadline
                )
                for rank in some
            }
            for rank in some:
                data = asked.pop(rank).result(max(0, deadline - time.monotonic()))
                began = time.monotonic()
                found.append(Rank(ends[rank], ranks[rank], _read(ends[rank], data, left)))
                left -= found[-1].records.entries
                deadline += time.monotonic() - began  # not the source's time
    except TimeoutError:
        raise SourceLost(f"{address}: not all records came within {_RECORDS_COME:g} s") from None
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
    catalog([rank.records for rank in found])
    return Instance(digest, model.identity, found, processes | {status.instance})


def _records_of(
    address: Address,
    identity: ModelIdentity,
    config: NetLoaderConfig,
    weights: str,
    instance: str,
    deadline: float,
) -> bytes:
    with (
        connected(address, identity, config, weights, instance) as client,
        client.ended_after(max(0.0, deadline - time.monotonic())),
    ):
        records = client.records(weights)
        client.done(Done(complete=False, reason=api.LOOKED))
    return records


def _read(address: Address, data: bytes, most: int) -> Records:
    try:
        return decode(data, most)
    except ProtocolError as error:
        raise ProtocolError(f"{address}: {error}") from None


def records_by_name(sources: Iterable[Address], config: NetLoaderConfig, weights: str) -> Records:
    """Return how weights that came by name came from a checkpoint, as one of their sources says.

    Args:
        sources: those that gave the weights, in order of preference.
        config: deadlines, credentials.
        weights: their digest.

    Raises:
        LoadFailed: none of them says so in time; says what is wrong with each.
    """
    deadline, said = time.monotonic() + _RECORDS_BY_NAME, []
    for address in [*sources][:_ASKED_BY_NAME]:
        if (seconds := deadline - time.monotonic()) <= 0:
            break
        short = replace(
            config,
            connect_timeout=min(seconds, config.connect_timeout),
            handshake_timeout=min(seconds, config.handshake_timeout),
        )
        try:
            with connect(address, short) as client, client.ended_after(seconds):
                return decode(client.records(weights), _MOST_BY_NAME)
        except SourceError as error:
            said.append(said_of(address, error))
    nobody = "none of the sources in SOURCE gave weights, so no view could be asked for"
    raise LoadFailed("; ".join(said) or nobody)


def load_through_view(
    instance: Instance,
    model: nn.Module,
    fill: Callable[[Weights], object],
    identity: ModelIdentity,
    config: NetLoaderConfig,
    worker: int,
    *,
    in_place: bool,
) -> Records:
    """Fill a model with what the ranks of an instance have.

    Args:
        instance: where the weights come from.
        model: what is filled; if that fails, what it has is anything.
        fill: has the model load tensors, and checks that it has got all.
        identity: of the rank that loads.
        config: deadlines, connections.
        worker: number of this process among all workers of the instance, for the log.
        in_place: whether the model's memory is the host's.

    Returns:
        How the weights came from the checkpoint.

    Raises:
        LoadFailed: not everything came, or not everything is to be had.
    """
    started = time.monotonic()
    records = [rank.records for rank in instance.ranks]
    try:
        needs = needs_of(model, fill, catalog(records))
        fetch, missing = find(needs, records, identity.rank)
    except (LayoutUnsupported, LoadFailed, ProtocolError, Unmapped) as error:
        raise LoadFailed(f"{instance}: {one_line(error)}") from None
    if missing:
        more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise LoadFailed(f"{instance}: {shortened(str(missing[0]))}{more}")
    logger.debug(
        "NetLoader: traced and planned in %.2f s: %d parts, %s",
        time.monotonic() - started,
        sum(map(len, fetch.parts)),
        size(fetch.nbytes),
    )
    straight = InPlace(needs, model) if in_place and is_copied(needs) else None
    trace = Trace()
    reader = Reader(fetch, instance.ranks, instance.digest, identity, config, straight)
    failure = ""
    try:
        with reader:
            if straight is None:
                with trace:
                    fill(trace.watch(reader.tensors()))
            else:
                straight.put_kept(fetch)
                reader.finish()
    except Exception as error:  # also of a model that gets nothing more
        failure = reader.failure or f"{type(error).__name__}: {one_line(error)}"
        logger.debug("NetLoader: loading through a view", exc_info=True)
    # Outside the handler: there the exception would keep the model alive.
    if failure:
        raise LoadFailed(f"{instance}: {failure}")
    seen = needs if straight is not None else _seen_again(trace, model, needs, instance)
    try:
        confirm(instance.ranks, identity, config, instance.digest)
    except SourceError as error:
        raise LoadFailed(f"{instance}: {one_line(error)}") from None
    seconds = time.monotonic() - started
    logger.info(
        "NetLoader rank %d: loaded %d tensors, %s in %.2f s (%s) from %s through their view of "
        "the checkpoint (%s there, %s here)",
        worker,
        len(needs.parameters),
        size(fetch.nbytes),
        seconds,
        rate(fetch.nbytes, seconds),
        reader.shares(),
        *_placements(instance.identity, identity),
    )
    _tell_what_was_pinned(instance, config, worker)
    return seen


def _seen_again(trace: Trace, model: nn.Module, needs: Records, instance: Instance) -> Records:
    """Return what a load with values has read, which is what the one without them has.

    Raises:
        LoadFailed: it is not.
    """
    try:
        seen = trace.records(model)
    except Unmapped as error:
        raise LoadFailed(f"{instance}: {error}") from None
    if not same_reading(needs, seen):
        raise LoadFailed(
            f"{instance}: loading reads other tensors the second time; this model cannot load "
            "through a view"
        )
    return seen


def whole_checkpoint(
    instance: Instance,
    identity: ModelIdentity,
    config: NetLoaderConfig,
    worker: int,
    ranks_here: int,
) -> Weights:
    """Return what an instance has read of a checkpoint, once all of it has come.

    Args:
        instance: where it comes from.
        identity: of the rank that asks.
        config: deadlines, connections.
        worker: number of this process among all workers of the instance, for the log.
        ranks_here: how many ranks share this host's memory, and do the same.

    Returns:
        Its tensors, in memory of their own, which is free again once the next one is asked for.

    Raises:
        LoadFailed: not everything came or is to be had, or there is no memory for it.
    """
    started = time.monotonic()
    records = [rank.records for rank in instance.ranks]
    read = {
        seen.name: msgspec.structs.replace(seen, copies=(_whole(seen),), kept=())
        for each in records
        for seen in each.tensors
        if seen.copies or seen.kept
    }
    try:
        fetch, missing = find(Records((*read.values(),), ()), records, identity.rank)
    except (LoadFailed, ProtocolError) as error:
        raise LoadFailed(f"{instance}: {one_line(error)}") from None
    if missing:
        raise LoadFailed(f"{instance}: {shortened(str(missing[0]))}")
    nbytes = sum(nbytes_of(seen.shape, seen.dtype) for seen in read.values())
    if nbytes * ranks_here > (available := psutil.virtual_memory().available):
        raise LoadFailed(
            f"{instance}: a reload through a view takes {size(nbytes)} of host memory for each of "
            f"{ranks_here} ranks, and {size(available)} are available"
        )
    reader = Reader(fetch, instance.ranks, instance.digest, identity, config)
    try:
        with reader:
            came = [(name, tensor) for name, tensor in reader.tensors() if name in read]
        confirm(instance.ranks, identity, config, instance.digest)
    except (LoadFailed, SourceError) as error:
        raise LoadFailed(f"{instance}: {error}") from None
    except Exception as error:  # what a source says is not to cost the reload
        logger.debug("NetLoader rank %d: reading through a view failed", worker, exc_info=True)
        raise LoadFailed(f"{instance}: {type(error).__name__}: {one_line(error)}") from None
    seconds = time.monotonic() - started
    logger.info(
        "NetLoader rank %d: got the checkpoint for a reload, %d tensors, %s in %.2f s (%s) from %s",
        worker,
        len(came),
        size(fetch.nbytes),
        seconds,
        rate(fetch.nbytes, seconds),
        reader.shares(),
    )
    _tell_what_was_pinned(instance, config, worker)
    return _taken(came)


def _taken(tensors: list[tuple[str, torch.Tensor]]) -> Weights:
    """Yield what a list has, and keep none that was taken."""
    tensors.reverse()
    while tensors:
        yield tensors.pop()


def _tell_what_was_pinned(instance: Instance, config: NetLoaderConfig, worker: int) -> None:
    if config.weights_digest is not None:
        logger.info(
            "NetLoader rank %d: WEIGHTS_DIGEST was compared with what the ranks of the source say "
            "that they have, %s, and not with the bytes that came",
            worker,
            instance.digest,
        )


def _whole(seen: Seen) -> Copy:
    return Copy((0,) * len(seen.shape), seen.shape, 0, 0, row_major(seen.shape))


def needs_of(
    model: nn.Module, fill: Callable[[Weights], object], tensors: Sequence[Seen]
) -> Records:
    """Return what a model reads of a checkpoint, and what it would write where.

    Args:
        model: it keeps what it has.
        fill: has it load tensors.
        tensors: of the checkpoint.

    Raises:
        LayoutUnsupported: that cannot be told; says why.
    """
    for name, tensor in model.named_parameters():
        if isinstance(tensor, UninitializedTensorMixin) or tensor.is_meta:
            raise LayoutUnsupported(f"{name} is made while loading, as online quantization does")
    trace, collects = Trace(), gc.isenabled()
    gc.disable()  # it would look at a model's objects again and again, and there are no cycles
    try:
        empty = [(one.name, _without_values(one)) for one in tensors]  # unwatched
        with trace:
            fill(trace.watch(_taken(empty)))
        needs = trace.records(model)
    except Exception as error:
        logger.debug("NetLoader: loading tensors without values", exc_info=True)
        why = f"{type(error).__name__}: {one_line(error)}"
    else:
        if replaced := [name for name, tensor in model.named_parameters() if tensor.is_meta]:
            raise LayoutUnsupported(f"{replaced[0]} is replaced while loading")
        return needs
    finally:
        if collects:
            gc.enable()
    raise LayoutUnsupported(f"what loading reads cannot be told: {why}")


def _without_values(seen: Seen) -> torch.Tensor:
    return torch.empty(seen.shape, dtype=dtype_of(seen.dtype), device="meta")


def _placements(there: ModelIdentity, here: ModelIdentity) -> tuple[str, str]:
    """Return in what two ranks are cut differently, in words that the log has for both sides."""
    sizes = [
        ("TP", there.tp, here.tp),
        ("PP", there.pp, here.pp),
        ("PCP", there.pcp, here.pcp),
        ("DP", there.dp, here.dp),
        ("EP", there.ep, here.ep),
    ]
    differ = [(f"{name} {one}", f"{name} {other}") for name, one, other in sizes if one != other]
    # A folder with a checkpoint is not cut, and has no dtype that could differ from this rank's.
    whole = there.dtype == OF_EACH_TENSOR
    if not whole and there.dtype != here.dtype:
        differ.append((_dtype(there), _dtype(here)))
    if not differ:
        differ = [(f"TP {there.tp}", f"TP {here.tp}")]
    theirs, ours = (" and ".join(side) for side in zip(*differ, strict=True))
    return "the whole checkpoint" if whole else theirs, ours


def _dtype(identity: ModelIdentity) -> str:
    # A source may say anything here, as it does not decide what the checkpoint is.
    return f"dtype {shortened(identity.dtype.removeprefix('torch.'), 40)}"
