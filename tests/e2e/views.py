"""How a rank loads a checkpoint, watched in a process of its own and looked at in another one."""

from typing import NamedTuple

import torch
from torch import nn

from vllm_ascend.model_loader.netloader.executor.model.trace import Trace
from vllm_ascend.model_loader.netloader.executor.view.records import Records, decode, encode

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


def watch(loader, config, device: str) -> tuple[bytes, dict[str, torch.Tensor]]:
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
