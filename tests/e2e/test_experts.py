"""Experts spread over two ranks: which expert a tensor is of depends on how they are placed."""

import json
import os

import torch
from transformers import AutoModelForCausalLM, DeepseekV2Config

from tools.make_model import copy_without_weights

from ..ut.model_loader.netloader.support import end, python

START = 240.0  # seconds for two processes that import vLLM at once


def make_grouped_experts(folder):
    """A model whose experts are in groups, as only those can be placed in another way."""
    config = DeepseekV2Config(
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=512,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_shared_experts=1,
        first_k_dense_replace=0,
        n_group=2,
        topk_group=1,
        topk_method="group_limited_greedy",
        kv_lora_rank=512,
        q_lora_rank=None,
        qk_rope_head_dim=64,
        qk_nope_head_dim=128,
        v_head_dim=128,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def test_a_client_that_places_experts_otherwise_is_told_so_and_one_that_does_not_loads(tmp_path):
    full, bare = tmp_path / "full", tmp_path / "bare"
    make_grouped_experts(full)
    copy_without_weights(full, bare)
    arguments = tmp_path / "store", full, bare, tmp_path / "rank_"
    module = "tests.e2e.experts_process"
    shared = {"VLLM_DIST_IDENT": f"experts-{os.getpid()}"}  # as vLLM's executor sets it
    ranks = [python("-m", module, rank, *arguments, env=shared) for rank in range(2)]
    try:
        said = [json.loads(rank.communicate(timeout=START)[0].splitlines()[-1]) for rank in ranks]
    finally:
        for rank in ranks:
            end(rank)
    assert [one["equal"] for one in said] == [True, True]
    maps = [
        ("0 -1 1 -1 2 -1 3 -1", "0 1 2 3 -1 -1 -1 -1"),
        ("-1 0 -1 1 -1 2 -1 3", "-1 -1 -1 -1 0 1 2 3"),
    ]
    for (here, there), one in zip(maps, said, strict=True):
        assert one["reason"].startswith("SOURCE: tensors are not made in the same way: ")
        assert one["reason"].endswith(f"_expert_map is {here} here and {there} there")
