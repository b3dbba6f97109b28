"""How a rank loads a checkpoint, watched in a process of its own and looked at in another one."""

from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from safetensors.torch import load_file
from torch import nn

from tests.checkpoints import read_regions, rebuild
from vllm_ascend.model_loader.netloader.executor.memory import host_view
from vllm_ascend.model_loader.netloader.executor.model.trace import Trace
from vllm_ascend.model_loader.netloader.executor.view.records import (
    Records,
    decode,
    dtype_of,
    encode,
)
from vllm_ascend.model_loader.netloader.interaction.api import Join, Region
from vllm_ascend.model_loader.netloader.interaction.client import ElasticClient
from vllm_ascend.model_loader.netloader.utils import parse_address

# vLLM knows by `id(model)` which layers a stage of a pipeline goes without.
_alive: list[nn.Module] = []


class View(NamedTuple):
    """What a rank has of a checkpoint, and what it would need.

    Attributes:
        records: of a load from disk.
        parameters: what that filled, in memory that was zero before.
        needs: the records of a load of weights without values.
    """

    records: Records
    parameters: dict[str, torch.Tensor]
    needs: Records


def watch(loader: Any, config: Any, device: str) -> tuple[bytes, dict[str, torch.Tensor]]:
    """Load weights that are on a device into a model, and return records and parameters."""
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    with set_default_torch_dtype(config.model_config.dtype), torch.device("cpu"):
        model = initialize_model(vllm_config=config, model_config=config.model_config)
    _alive.append(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    weights = loader.get_all_weights(config.model_config, model)
    trace = Trace()
    with trace:
        model.load_weights(trace.watch((name, one.to(device)) for name, one in weights))
    records = trace.records(model)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return encode(records), {one.name: tensors[one.name].detach() for one in records.parameters}


def load_view(path: str) -> View:
    """Read what a rank wrote of its loads of weights with and without values."""
    records, parameters, needs = torch.load(path, weights_only=True)
    return View(decode(records), parameters, decode(needs))


def not_seen_through(address: str, checkpoint: Path) -> list[str]:
    """Return the tensors of a checkpoint of which a source cannot give every element.

    All that it gives, to a client that is cut in another way, is what the checkpoint has.
    """
    deadlines: dict[str, Any] = {"connect": 20.0, "handshake": 20.0, "progress": 20.0}
    with ElasticClient.connect(parse_address(address), **deadlines) as client:
        [model] = client.status().models
        elsewhere = msgspec.structs.replace(model.identity, tp=8, rank=7)
        weights = client.join(Join(elsewhere, view=True)).weights
        records, memory = decode(client.records(weights)), {}
        for number, one in enumerate(records.parameters):
            memory[one.name] = torch.empty(one.extent, dtype=dtype_of(one.dtype))
            region = Region(number, 0, [one.extent], [1])
            read_regions(client, weights, [region], host_view(memory[one.name]))
    gaps = []
    for name, tensor in load_file(checkpoint / "model.safetensors").items():
        made, known = rebuild(name, [(records, memory)])
        assert made.dtype == tensor.dtype
        assert torch.equal(_bytes(made[known]), _bytes(tensor[known])), name
        if not known.all():
            gaps.append(name)
    return gaps


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
