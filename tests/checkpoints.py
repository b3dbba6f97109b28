"""What ranks have of a checkpoint, read and put together as tests expect it."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch

from vllm_ascend.model_loader.netloader.executor.view.boxes import box_of
from vllm_ascend.model_loader.netloader.executor.view.casts import keeps
from vllm_ascend.model_loader.netloader.executor.view.fetch import Fetch, Part
from vllm_ascend.model_loader.netloader.executor.view.records import Records, chain_of, dtype_of
from vllm_ascend.model_loader.netloader.interaction.api import Region
from vllm_ascend.model_loader.netloader.interaction.client import ElasticClient
from vllm_ascend.model_loader.netloader.utils import Buffer

Tensors = Mapping[str, torch.Tensor]


def read_regions(
    client: ElasticClient, weights: str, regions: Sequence[Region], into: Buffer
) -> None:
    """Read regions into memory that has room for exactly these."""
    client.ask_regions(weights, regions)
    client.receive_regions(len(into), [[into]])


def rebuild(
    name: str, ranks: Sequence[tuple[Records, Tensors]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Make a checkpoint tensor of what some ranks have of it.

    Returns:
        The tensor, and which of its elements are known. What was rounded on its way into a
        parameter is not known.
    """
    found = [(one, *rank) for rank in ranks for one in rank[0].tensors if one.name == name]
    shape, dtype = found[0][0].shape, dtype_of(found[0][0].dtype)
    whole, known = torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=torch.bool)
    for seen, records, parameters in found:
        for copy in seen.copies:
            chain = [dtype_of(step) for step in chain_of(copy, seen)]
            if not all(keeps(a, b) for a, b in pairwise(chain)):
                continue
            memory = parameters[records.parameters[copy.parameter].name]
            first = memory.storage_offset() + copy.offset
            elements = memory.as_strided(copy.size, copy.stride, first).view(chain[-1])
            box_of(whole, copy.box).copy_(elements.to(chain[0]).view(dtype))
            box_of(known, copy.box).fill_(True)
        for kept in seen.kept:
            if kept.values is not None:
                values = torch.frombuffer(bytearray(kept.values), dtype=dtype)
                box_of(whole, kept.box).copy_(values.reshape(kept.size))
                box_of(known, kept.box).fill_(True)
    return whole, known


def made_of(
    fetch: Fetch, parts: Sequence[tuple[int, Part]], ranks: Sequence[tuple[Records, Tensors]]
) -> tuple[list[torch.Tensor], int]:
    """Make the tensors that are fetched of parts of them, none of which may come twice.

    Args:
        fetch: what is fetched.
        parts: with the number of the rank that each comes from.
        ranks: what each has.

    Returns:
        The tensors, and how many elements came.
    """
    made = [torch.zeros(one.shape, dtype=dtype_of(one.dtype)) for one in fetch.tensors]
    came = [torch.zeros(one.shape, dtype=torch.int) for one in fetch.tensors]
    for rank, part in parts:
        records, parameters = ranks[rank]
        there = parameters[records.parameters[part.parameter].name]
        first = there.storage_offset() + part.offset
        elements = there.as_strided(part.box.size, part.stride, first).view(
            dtype_of(part.through[-1])
        )
        elements = elements.to(dtype_of(part.through[0])).view(made[part.tensor].dtype)
        box_of(made[part.tensor], part.box).copy_(elements)
        box_of(came[part.tensor], part.box).add_(1)
    assert all((one <= 1).all() for one in came)
    for number, boxes in fetch.kept.items():
        for box, kept in boxes.items():
            values = torch.frombuffer(bytearray(kept.values or b""), dtype=made[number].dtype)
            box_of(made[number], box).copy_(values.reshape(kept.size))
    return made, sum(int(one.sum()) for one in came)
