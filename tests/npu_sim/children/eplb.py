"""Moves experts as vLLM Ascend does, and prints what a client would be told at each step."""

import json
from types import SimpleNamespace

import torch
from torch import nn
from vllm_ascend.eplb.adaptor.vllm_adaptor import VllmEplbAdaptor
from vllm_ascend.eplb.core.eplb_device_transfer_loader import (
    D2DExpertWeightLoader,
    ExpertWeightUpdateState,
)

from vllm_ascend.model_loader.netloader import compat, registry
from vllm_ascend.model_loader.netloader.config import parse_config
from vllm_ascend.model_loader.netloader.executor.chunks.manifest import PROCESSED
from vllm_ascend.model_loader.netloader.executor.devices.choose import device_of
from vllm_ascend.model_loader.netloader.executor.store import make_store
from vllm_ascend.model_loader.netloader.identity import Revision, plain_identity
from vllm_ascend.model_loader.netloader.serve import Offer

model = nn.Linear(4, 4)
numbers = dict.fromkeys(("tp", "pp", "pcp", "dp", "ep"), 1)
numbers |= dict.fromkeys(("rank", "dp_rank", "ep_rank"), 0)
names = {"group": "netloader", "model": "m", "dtype": "torch.float32", "layout": PROCESSED}
nothing = {"quantization": None, "vllm_version": None, "config": {}, "defaults": {}}
identity = plain_identity(**numbers, **names, **nothing, revision=Revision())
store = make_store(dict(model.named_parameters()), PROCESSED, {}, device_of("cpu", 16))

config = SimpleNamespace(
    parallel_config=SimpleNamespace(worker_cls="auto"),
    compilation_config=SimpleNamespace(static_forward_context={}),
)
watched = compat.watch(config, model, registry.changing, registry.reading, registry.processing)
member = registry.Member(parse_config({}), "127.0.0.1", instance=compat.instance_of(config))
registry.put_in_use(model, "path", member, Offer(identity, store), watched)


def tell(step: str) -> None:
    [status] = registry.in_use(model).server.status(0).models
    print("\n" + json.dumps({"step": step, "state": status.state, "reason": status.reason}))


class Place:
    """What an expert or a map is written to."""

    shape = torch.Size([4])

    def __init__(self, name: str) -> None:
        self._name = name

    def copy_(self, other: object) -> None:
        tell(self._name)


adaptor = object.__new__(VllmEplbAdaptor)
adaptor.num_moe_layers = 1
adaptor.expert_map_per_layer_cpu = {0: Place("map")}
adaptor.log2phy_map_per_layer = {0: Place("log2phy")}
adaptor.expert_weight_key_per_layer = {0: "key"}
adaptor.expert_param_per_layer = {0: [[Place("weight")]]}
adaptor.buffer_tensor_list = {"key": [["received"]]}

mover = object.__new__(D2DExpertWeightLoader)
mover.set_adator(adaptor)
mover.state = ExpertWeightUpdateState.TRANSFERRING
mover.layer_id = 0
mover.comm_op_list = None
mover.updated_expert_map = mover.updated_log2phy_map = "new"
mover.recv_expert_list = [(0, 0)]

tell("before")
mover.update_expert_map_and_weight([])
tell("after")
