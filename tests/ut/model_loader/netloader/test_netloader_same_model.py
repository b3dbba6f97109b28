"""Which instances may exchange weights: vLLM's own configurations of tiny models, in pairs."""

import json
import shutil
import types

import msgspec
import pytest
import torch
import vllm
from torch import nn
from transformers import LlamaConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.models import registry

from tools.make_model import make_model
from vllm_ascend.model_loader.netloader.compat import (
    identity_of,
    meaning_of,
    name_of,
    why_experts_move,
    why_weights_move,
    worker_of,
)
from vllm_ascend.model_loader.netloader.executor.chunks.manifest import PROCESSED, RAW
from vllm_ascend.model_loader.netloader.interaction import api


@pytest.fixture(scope="module", autouse=True)
def _looks_at_models_here():
    """vLLM looks at a model's class in a process of its own, which imports vLLM once more."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_run_in_subprocess", lambda look: look())
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for arch in ("llama", "moe", "w8a8-dynamic"):
        make_model(folder / arch, arch, "tiny")
    return folder


@pytest.fixture
def with_settings(models, tmp_path):
    """A model's folder in which its configuration is changed."""

    def with_settings(arch, change, name="changed"):
        folder = tmp_path / name
        shutil.copytree(models / arch, folder)
        settings = json.loads((folder / "config.json").read_text())
        change(settings)
        (folder / "config.json").write_text(json.dumps(settings))
        return folder

    return with_settings


def configured(folder, **arguments):
    """The configuration of an instance with these engine arguments."""
    usual = {"dtype": "bfloat16", "enforce_eager": True, "max_model_len": 128}
    return EngineArgs(model=str(folder), **usual | arguments).create_engine_config()


def who(config, rank=0, layout=RAW, name="m"):
    return identity_of(config, config.model_config, name, rank, layout)


def differences(client, source):
    """The lines of the refusal, if a client and a source with these configurations differ."""
    identities = [msgspec.json.decode(msgspec.json.encode(who(one))) for one in (client, source)]
    one, other = (msgspec.convert(identity, type(who(client))) for identity in identities)
    return [str(difference) for difference in api.differences(one, other)]


# What does not matter


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_model_len": 64},
        {"seed": 7},
        {"max_num_seqs": 3, "max_num_batched_tokens": 64},
        {"enforce_eager": False},
        {"block_size": 64},
        {"hf_overrides": {"max_position_embeddings": 4096}, "max_model_len": 4000},
        {"hf_overrides": {"initializer_range": 0.5, "attention_dropout": 0.5, "use_cache": False}},
        {"hf_overrides": {"id2label": {"0": "no", "1": "yes"}}},
        {"served_model_name": "other"},
    ],
    ids=str,
)
def test_what_does_not_touch_weights_does_not_matter(models, arguments):
    plain, other = configured(models / "llama"), configured(models / "llama", **arguments)
    assert differences(plain, other) == []


def as_other_versions_write_it(settings):
    settings["rope_theta"] = settings.pop("rope_parameters")["rope_theta"]
    settings["rope_scaling"] = None
    settings["torch_dtype"] = settings.pop("dtype")
    settings["transformers_version"] = "4.40.0"
    settings["_name_or_path"] = "/elsewhere"


def without_defaults(settings):
    defaults = LlamaConfig().to_dict()
    same = [name for name in settings if defaults.get(name, settings) == settings[name]]
    assert len(same) > 5
    for name in set(same) - {"model_type"}:
        del settings[name]


@pytest.mark.parametrize("change", [as_other_versions_write_it, without_defaults])
def test_how_a_configuration_is_written_does_not_matter(models, with_settings, change):
    assert (
        differences(configured(models / "llama"), configured(with_settings("llama", change))) == []
    )


class Newer(LlamaConfig):
    """As a later version has it, with a setting more, and another name for one."""

    attention_sinks: int = 4
    attribute_map = {"feed_forward_size": "intermediate_size"}  # noqa: RUF012


def test_a_default_that_only_one_version_of_transformers_writes_does_not_matter(models):
    plain, newer = (configured(models / "llama") for _ in range(2))
    settings = newer.model_config.hf_config.to_dict()
    newer.model_config.hf_config = Newer(**settings)
    assert newer.model_config.hf_config.to_dict()["attention_sinks"] == 4
    assert differences(plain, newer) == differences(newer, plain) == []
    newer.model_config.hf_config = Newer(**settings, attention_sinks=5)
    assert differences(plain, newer) == [
        "config.attention_sinks is None at the client and 5 at the source"
    ]


# What does


@pytest.mark.parametrize(
    ("arch", "overrides", "line"),
    [
        ("llama", {"rms_norm_eps": 0.5}, "config.rms_norm_eps is 1e-06 {} and 0.5 {}"),
        ("llama", {"hidden_act": "gelu"}, "config.hidden_act is 'silu' {} and 'gelu' {}"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 20000.0}},
            "config.rope_parameters.rope_theta is 10000.0 {} and 20000.0 {}",
        ),
        ("llama", {"num_key_value_heads": 4}, "config.num_key_value_heads is 2 {} and 4 {}"),
        ("llama", {"unheard_of": [1, 2]}, "config.unheard_of is None {} and [1, 2] {}"),
        ("moe", {"num_experts_per_tok": 3}, "config.num_experts_per_tok is 2 {} and 3 {}"),
        ("moe", {"norm_topk_prob": True}, "config.norm_topk_prob is False {} and True {}"),
    ],
    ids=str,
)
def test_a_setting_that_decides_the_use_of_weights_is_named_with_both_values(
    models, arch, overrides, line
):
    plain, other = configured(models / arch), configured(models / arch, hf_overrides=overrides)
    assert differences(plain, other) == [line.format("at the client", "at the source")]


def test_a_setting_of_the_quantization_is_named_with_both_values(models, with_settings):
    def change(settings):
        [group] = settings["quantization_config"]["config_groups"].values()
        group["weights"]["symmetric"] = False

    changed = with_settings("w8a8-dynamic", change)
    [line] = differences(configured(models / "w8a8-dynamic"), configured(changed))
    assert line.startswith("config.quantization_config.config_groups.group_0.weights.symmetric is")
    assert line.endswith("is True at the client and False at the source")


def test_the_settings_of_an_online_quantization_count(models):
    plain, online = (configured(models / "llama") for _ in range(2))
    online.model_config.quantization_config = {"scheme": "fp8"}
    [line] = differences(plain, online)
    assert line.startswith("config.online_quantization is None at the client and ")
    assert "'scheme': 'fp8'" in line


def test_another_dtype_is_named(models):
    plain, other = configured(models / "llama"), configured(models / "llama", dtype="float32")
    assert differences(plain, other) == [
        "dtype is 'torch.bfloat16' at the client and 'torch.float32' at the source"
    ]


def test_a_refusal_names_the_first_differences_only(models, with_settings):
    def change(settings):
        settings |= {f"x{index}": "y" * 300 for index in range(30)}

    [*lines] = differences(configured(models / "llama"), configured(with_settings("llama", change)))
    assert len(lines) == api.MAX_DIFFERENCES
    assert all(len(line) < 300 for line in lines)


def test_the_processed_layout_goes_by_the_version_of_vllm_too(models, monkeypatch):
    config = configured(models / "llama")
    here = who(config, layout=PROCESSED)
    assert here.layout == PROCESSED
    monkeypatch.setattr(vllm, "__version__", "0.0.1")
    [(field, _, there)] = here.differences(who(config, layout=PROCESSED))
    assert field == "vllm_version"
    assert "vllm 0.0.1" in there


# Ranks


def replica(config, index, **parallel):
    """A worker's configuration in the data-parallel replica of this number."""
    for name, value in parallel.items():
        setattr(config.parallel_config, name, value)
    config.parallel_config.data_parallel_index = index
    return config


def test_replicas_of_a_dense_model_have_the_same_weights_and_ports_of_their_own(models):
    # vLLM makes each of them an instance of its own, with a data-parallel size of 1.
    config = configured(models / "llama")
    seen = {}
    for index in range(2):
        replica(config, index, tensor_parallel_size=2)
        for rank in range(2):
            seen[worker_of(config, rank)] = who(config, rank)
    assert [*seen] == [0, 1, 2, 3]
    assert [identity.rank for identity in seen.values()] == [0, 1, 0, 1]
    assert seen[2].differences(seen[0]) == []
    assert seen[2].differences(seen[1]) == [("rank", 0, 1)]


def test_experts_are_spread_over_replicas(models):
    config = configured(models / "moe")
    parallel = {"tensor_parallel_size": 2, "data_parallel_size": 2, "enable_expert_parallel": True}
    seen = {}
    for index in range(2):
        replica(config, index, **parallel)
        for rank in (2 * index, 2 * index + 1):  # torch counts through all replicas
            seen[worker_of(config, rank)] = who(config, rank)
    assert [*seen] == [0, 1, 2, 3]
    ranks = [(one.rank, one.dp_rank, one.ep_rank, one.dp, one.ep) for one in seen.values()]
    assert ranks == [(0, 0, 0, 2, 4), (1, 0, 1, 2, 4), (2, 1, 2, 2, 4), (3, 1, 3, 2, 4)]


def test_stages_of_a_pipeline_have_the_expert_ranks_of_their_own(models):
    config = configured(models / "moe")
    replica(
        config, 0, tensor_parallel_size=2, pipeline_parallel_size=2, enable_expert_parallel=True
    )
    assert [who(config, rank).ep_rank for rank in range(4)] == [0, 1, 0, 1]


@pytest.mark.parametrize(("arch", "ep"), [("moe", 2), ("llama", 1)])
def test_whether_experts_are_spread_matters_where_there_are_experts(models, arch, ep):
    config = configured(models / arch)
    replica(config, 0, tensor_parallel_size=2)
    assert who(config).ep == 1
    config.parallel_config.enable_expert_parallel = True
    assert who(config).ep == ep


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"enable_eplb": True}, "--enable-eplb"),
        ({"enable_eplb": True, "enable_elastic_ep": True}, "--enable-elastic-ep"),
    ],
)
def test_experts_that_move_are_a_reason_not_to_exchange_weights(models, setting, named):
    moe, dense = configured(models / "moe"), configured(models / "llama")
    assert why_experts_move(moe, moe.model_config) == ""
    for config in (moe, dense):
        replica(config, 0, **setting)
    reason = "lets experts move from rank to rank while the model is in use"
    assert why_experts_move(moe, moe.model_config) == f"{named} {reason}"
    assert why_experts_move(dense, dense.model_config) == ""


@pytest.mark.parametrize(
    "eplb", [{"dynamic_eplb": True}, {"expert_map_record_path": "map.json", "dynamic_eplb": False}]
)
def test_experts_that_vllm_ascend_moves_are_a_reason_too(models, eplb):
    config = configured(models / "moe")
    config.additional_config = {"eplb_config": {"expert_map_path": "map.json"}}
    assert why_experts_move(config, config.model_config) == ""
    config.additional_config = {"eplb_config": eplb}
    assert why_experts_move(config, config.model_config).startswith("eplb_config in --additional")


def test_layers_that_vllm_ascend_spreads_over_ranks_are_a_reason_without_experts_too(models):
    config = configured(models / "llama")
    for nothing in ({}, {"layer_sharding": None}, {"layer_sharding": []}):
        config.additional_config = nothing
        assert why_weights_move(config) == ""
    config.additional_config = {"layer_sharding": ["o_proj"]}
    assert why_weights_move(config).startswith("layer_sharding in --additional-config lets")


# Names


def test_a_model_in_object_storage_goes_by_the_name_that_was_asked_for():
    config = types.SimpleNamespace(model="/tmp/pulled", model_weights="s3://bucket/model")
    assert name_of(config) == "s3://bucket/model"
    config.model_weights = ""
    assert name_of(config) == "/tmp/pulled"


# What the model itself says


class Kernel:
    pass


Kernel.__module__ = "vllm.kernels"


class Method:
    def __init__(self, **attributes):
        vars(self).update(attributes)


class Experts(nn.Module):
    """An expert layer with two of its model's four experts."""

    def __init__(self, placed, **attributes):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 2), requires_grad=False)
        self.register_buffer("_expert_map", placed, persistent=False)
        self.register_buffer("expert_load_view", torch.ones(4, dtype=torch.int32))
        vars(self).update({"local_num_experts": 2, "global_num_experts": 4} | attributes)


def model_of(*layers):
    model = nn.Module()
    model.layers = nn.ModuleList(layers)
    return model


LINEAR, ROUND_ROBIN = torch.tensor([0, 1, -1, -1]), torch.tensor([0, -1, 1, -1])


@pytest.mark.parametrize("layout", [RAW, PROCESSED])
def test_which_expert_each_slot_has_is_said_by_content(layout):
    assert meaning_of(model_of(Experts(LINEAR), Experts(LINEAR)), layout) == {
        "layers.*._expert_map": "0 1 -1 -1"
    }
    assert meaning_of(model_of(Experts(LINEAR), Experts(ROUND_ROBIN), Experts(LINEAR)), layout) == {
        "layers.*._expert_map": "0 1 -1 -1 in 0 2; 0 -1 1 -1 in 1"
    }


@pytest.mark.parametrize(
    "name", ["log2phy", "global_expert_map", "physical_to_logical_map", "expert_global_to_physical"]
)
def test_tables_of_experts_count_as_plain_attributes_too(name):
    layer = Experts(None, **{name: torch.tensor([[1, 0], [2, 3]])})
    assert meaning_of(model_of(layer), RAW) == {f"layers.*.{name}": "1 0 2 3"}


def test_without_a_table_the_setting_that_places_experts_counts():
    layer = Experts(None, expert_placement_strategy="linear", ep_rank=1, ep_size=2)
    assert meaning_of(model_of(layer), RAW) == {
        "layers.*.expert_placement_strategy": "linear",
        "layers.*.ep_rank": "1",
        "layers.*.ep_size": "2",
    }
    layer.local_num_experts = 4
    assert meaning_of(model_of(layer), RAW) == {}


def test_the_processed_layout_names_the_kernels_that_weights_were_made_for():
    kernel = Kernel()
    kernel.layout = api.Code.BUSY
    method = Method(
        kernel=kernel, experts_cls=Experts, size=3, _hidden=Kernel(), moe_config=Kernel()
    )
    layer = Experts(None, global_num_experts=2, quant_method=method, kv_cache_dtype="fp8")
    model = model_of(layer)
    assert meaning_of(model, RAW) == {}
    assert meaning_of(model, PROCESSED) == {
        "layers.*.quant_method": "Method(experts_cls=Experts, kernel=Kernel(layout=BUSY))",
        "layers.*.kv_cache_dtype": "fp8",
    }
    layer.impl = Method(scale=1.0)
    assert "layers.*.impl" not in meaning_of(model, PROCESSED)
    layer.impl.W_UV = torch.zeros(1)
    assert meaning_of(model, PROCESSED)["layers.*.impl"] == "Method"
