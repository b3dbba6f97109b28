"""What NetLoader takes from vLLM: who a model is, and what making one leaves behind."""

import contextlib
import dataclasses
import sys
import types

import msgspec
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlavaConfig
from vllm.config import CompilationConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.quantization.fp8 import Fp8Config
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.model_loader.reload import record_metadata_for_reloading
from vllm.model_executor.models import adapters
from vllm.model_executor.models.utils import WeightsMapper

from vllm_ascend.model_loader.netloader import compat
from vllm_ascend.model_loader.netloader.changes import After, Change
from vllm_ascend.model_loader.netloader.compat import (
    groups_to_come,
    has_checkpoint,
    identity_of,
    instance_of,
    modules_without_files,
    name_of,
    places_of,
    ranks_of,
    remember_state,
    revision_of,
    take_over_load,
    why_no_reload,
)
from vllm_ascend.model_loader.netloader.errors import ConfigError
from vllm_ascend.model_loader.netloader.executor.chunks.manifest import RAW
from vllm_ascend.model_loader.netloader.identity import ModelIdentity, Revision
from vllm_ascend.model_loader.netloader.interaction.api import DRAFT_GROUP, TARGET_GROUP

# Registrations


@dataclasses.dataclass
class Config:
    compilation_config: CompilationConfig
    quant_config: Fp8Config | None = None


NO_MODEL = types.SimpleNamespace(hf_config=None, hf_text_config=None)
ADAPTOR = "vllm_ascend.eplb.adaptor.vllm_adaptor"


def import_adaptor(monkeypatch, *layers):
    """What importing vLLM Ascend's adaptor leaves; it cannot be imported here."""

    registered = list(layers)
    module = types.ModuleType(ADAPTOR)
    module.VllmEplbAdaptor = type("VllmEplbAdaptor", (), {"_registered_moe_layers": registered})
    monkeypatch.setitem(sys.modules, ADAPTOR, module)
    return registered


def test_registrations_are_brought_back_as_they_were():
    config = Config(CompilationConfig())
    compilation = config.compilation_config
    compilation.static_forward_context["before"] = 1
    compilation.custom_ops.append("+before")
    contexts = compilation.static_forward_context
    restore = remember_state(config, NO_MODEL)
    contexts["made"] = 2
    del contexts["before"]
    compilation.custom_ops.append("+made")
    compilation.static_all_moe_layers.append("made")
    restore()
    assert compilation.static_forward_context is contexts  # others may hold it
    assert contexts == {"before": 1}
    assert compilation.custom_ops == ["+before"]
    assert compilation.static_all_moe_layers == []
    restore()
    assert contexts == {"before": 1}


def test_expert_layers_of_vllm_ascend_are_brought_back_as_they_were(monkeypatch):
    layers = import_adaptor(monkeypatch, "target's")
    restore = remember_state(Config(CompilationConfig()), NO_MODEL)
    layers.append("half-filled draft's")
    restore()
    assert layers == ["target's"]
    layers.append("draft's")
    restore()
    assert layers == ["target's"]


def test_an_adaptor_imported_while_a_model_is_made_has_no_layers_afterwards(monkeypatch):
    monkeypatch.delitem(sys.modules, ADAPTOR, raising=False)
    restore = remember_state(Config(CompilationConfig()), NO_MODEL)
    layers = import_adaptor(monkeypatch)
    layers.append("half-filled")
    restore()
    assert layers == []


@pytest.mark.parametrize("imported", ["before", "meanwhile"])
def test_expert_layers_of_vllm_ascend_are_counted_as_if_there_was_one_model(imported, monkeypatch):
    name = "vllm_ascend.ops.fused_moe.fused_moe"
    module = types.ModuleType(name)
    module.AscendFusedMoE = type("AscendFusedMoE", (), {"moe_counter": -1})
    if imported == "before":
        module.AscendFusedMoE.moe_counter = 3  # the target's
        monkeypatch.setitem(sys.modules, name, module)
    before = module.AscendFusedMoE.moe_counter
    restore = remember_state(Config(CompilationConfig()), NO_MODEL)
    monkeypatch.setitem(sys.modules, name, module)
    module.AscendFusedMoE.moe_counter += 2
    restore()
    assert module.AscendFusedMoE.moe_counter == before


def test_a_rotary_table_is_shared_with_no_model_before_or_after(monkeypatch):
    of_ascend = "vllm_ascend.ops.rotary_embedding"
    module = types.ModuleType(of_ascend)
    module._cos_sin_cache, module._cos_cache = None, "the target's"
    monkeypatch.setitem(sys.modules, of_ascend, module)
    config = VllmConfig()

    def rotary():
        with set_current_vllm_config(config):
            made = get_rope(8, max_position=16, is_neox_style=True, dtype=torch.float32)
        module._cos_sin_cache, module._cos_cache = made.cos_sin_cache, made.cos_sin_cache
        return made

    in_use = rotary()
    right = in_use.cos_sin_cache.clone()
    module._cos_sin_cache, module._cos_cache = None, "the target's"
    restore = remember_state(config, NO_MODEL)
    rotary().cos_sin_cache.fill_(9.0)  # as a source sends it, before it is checked
    restore()
    assert (module._cos_sin_cache, module._cos_cache) == (None, "the target's")
    assert torch.equal(rotary().cos_sin_cache, right)
    assert torch.equal(in_use.cos_sin_cache, right)


def test_layers_that_are_not_quantized_have_the_same_names_each_time_a_model_is_made():
    quantization = Fp8Config(ignored_layers=["layers.3.share_expert.up_proj"])
    mapper = WeightsMapper(orig_to_new_substr={".share_expert.": ".moe.share_expert."})
    restore = remember_state(Config(CompilationConfig(), quantization), NO_MODEL)
    for _ in range(3):  # as vLLM does whenever it makes the model
        quantization.apply_vllm_mapper(mapper)
        quantization.packed_modules_mapping["made"] = ["up_proj"]
        assert quantization.ignored_layers == ["layers.3.moe.share_expert.up_proj"]
        restore()
        assert quantization.packed_modules_mapping == {}


def test_a_models_configuration_is_as_it_was_each_time_a_model_is_made():
    inside = LlamaConfig(layer_types=["full_attention"], num_hidden_layers=1)
    config = LlavaConfig(text_config=inside)
    text = config.text_config
    model = types.SimpleNamespace(hf_config=config, hf_text_config=text)
    before = config.to_dict()
    restore = remember_state(Config(CompilationConfig()), model)
    for _ in range(2):
        # as drafts do that count their layers behind those of the target
        text.layer_types = ["full_attention"] * 2 + text.layer_types
        text.rope_parameters["made"] = 1
        config.made = True
        restore()
        assert config.to_dict() == before
        assert config.text_config is text  # which others have as well


@pytest.mark.parametrize("contents", [{}, {"VllmEplbAdaptor": type("VllmEplbAdaptor", (), {})}])
def test_an_adaptor_of_another_version_is_left_alone(contents, monkeypatch):
    module = types.ModuleType(ADAPTOR)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, ADAPTOR, module)
    remember_state(Config(CompilationConfig()), NO_MODEL)()
    assert vars(module).items() >= contents.items()


# Names and revisions

ONE, TWO = "1" * 40, "2" * 40


class Resolved(str):
    """What vLLM 0.30 and later have as a revision: its text is what was asked for, or main."""

    def __new__(cls, initial, resolved):
        made = super().__new__(cls, initial or "main")
        made.initial, made.resolved = initial, resolved
        return made


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub cache that has the configuration of org/model, whose main is commit ONE."""
    cache = tmp_path / "hub"
    folder = cache / "models--org--model"
    for commit in (ONE, TWO):
        (folder / "snapshots" / commit).mkdir(parents=True)
        (folder / "snapshots" / commit / "config.json").write_text("{}")
    (folder / "refs").mkdir()
    for ref, commit in {"main": ONE, "v2": TWO}.items():
        (folder / "refs" / ref).write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    return cache


def asked_for(model, revision=None):
    return types.SimpleNamespace(model=str(model), revision=revision)


@pytest.mark.parametrize(
    ("asked", "revision"),
    [
        (Resolved(None, TWO), Revision(TWO)),
        (Resolved("main", TWO), Revision(TWO)),
        (Resolved("v2", TWO), Revision(TWO, pinned=True)),
        (Resolved(TWO, TWO), Revision(TWO, pinned=True)),
        # vLLM before 0.30 does not say what it has resolved; the cache does.
        (None, Revision(ONE)),
        ("main", Revision(ONE)),
        ("v2", Revision(TWO, pinned=True)),
        (TWO, Revision(TWO, pinned=True)),
        ("3" * 40, Revision("3" * 40, pinned=True)),
        ("unknown", Revision("unknown", pinned=True)),
    ],
)
def test_a_model_by_its_hub_name_has_the_commit_that_its_revision_is(hub, asked, revision):
    assert name_of(asked_for("org/model", asked)) == "org/model"
    found = revision_of(asked_for("org/model", asked))
    assert found == revision


@pytest.mark.parametrize(
    ("asked", "pinned"), [(None, False), ("main", False), ("v2", True), (TWO, True)]
)
def test_a_folder_of_the_hubs_cache_goes_by_the_models_name_and_commit(hub, asked, pinned):
    """With HF_HUB_OFFLINE it stands where the name was."""
    config = asked_for(hub / "models--org--model" / "snapshots" / TWO, asked)
    assert name_of(config) == "org/model"
    assert revision_of(config) == Revision(TWO, pinned)


def test_a_folder_of_its_own_has_the_revision_it_is_said_to_have(tmp_path):
    assert name_of(asked_for(tmp_path)) == str(tmp_path)
    assert revision_of(asked_for(tmp_path)) == Revision()
    assert revision_of(asked_for(tmp_path, "v1")) == Revision("v1", pinned=True)


def test_a_model_that_the_cache_does_not_know_has_no_known_revision(hub):
    for model in ("org/other", "/no/such/folder", "s3://bucket/model"):
        assert revision_of(asked_for(model)) == Revision()


def test_names_of_modelscope_have_no_commit_of_the_hub(hub, monkeypatch):
    monkeypatch.setenv("VLLM_USE_MODELSCOPE", "True")
    assert revision_of(asked_for("org/model")) == Revision()


def test_an_identity_has_plain_types_and_the_commit(hub):
    model = model_config()
    model.model, model.revision = "org/model", Resolved("v2", TWO)
    found = who(instance(model), model)
    assert found.revision == Revision(TWO, pinned=True)
    assert msgspec.json.decode(msgspec.json.encode(found), type=ModelIdentity) == found


def test_a_field_that_no_message_can_carry_is_an_error_at_start():
    model = model_config()
    config = instance(model)
    model.quantization = object()
    with pytest.raises(ConfigError, match="quantization is <object"):
        who(config, model)


# Identities


def model_config(moe=False):
    return types.SimpleNamespace(
        hf_config=types.SimpleNamespace(to_dict=lambda: {"hidden_size": 4}),
        model="m",
        revision=None,
        dtype="torch.bfloat16",
        quantization=None,
        is_moe=moe,
    )


def instance(target, draft=None, dp=1, tp=1, pp=1):
    """An instance; `draft` is what speculation has for its draft model's configuration."""
    parallel = types.SimpleNamespace(
        tensor_parallel_size=tp,
        pipeline_parallel_size=pp,
        data_parallel_size=dp,
        data_parallel_index=0,
        enable_expert_parallel=False,
    )
    speculative = draft and types.SimpleNamespace(
        target_model_config=target, draft_model_config=draft
    )
    return types.SimpleNamespace(parallel_config=parallel, speculative_config=speculative)


def who(config, model):
    return identity_of(config, model, "m", 0, RAW)


def test_without_speculation_there_is_only_a_target():
    target = model_config()
    config = instance(target)
    identity = who(config, target)
    assert identity.group == TARGET_GROUP
    assert groups_to_come(config, identity) == []


def test_a_draft_has_a_group_of_its_own_even_if_it_is_configured_like_its_target():
    target, draft = model_config(), model_config()
    config = instance(target, draft)
    of_target, of_draft = who(config, target), who(config, draft)
    assert of_target.group == TARGET_GROUP
    assert of_draft.group == DRAFT_GROUP
    assert of_target.differences(of_draft) == [("group", TARGET_GROUP, DRAFT_GROUP)]
    assert groups_to_come(config, of_target) == [DRAFT_GROUP]
    assert groups_to_come(config, of_draft) == []


@pytest.mark.parametrize(("load_format", "groups"), [("netloader", [DRAFT_GROUP]), ("auto", [])])
def test_a_draft_is_expected_only_if_its_own_load_format_is_netloader(load_format, groups):
    target, draft = model_config(), model_config()
    config = instance(target, draft)
    config.speculative_config.draft_load_config = types.SimpleNamespace(load_format=load_format)
    assert groups_to_come(config, who(config, target)) == groups


def test_speculation_without_a_model_leaves_the_target_in_its_group():
    """Ngram has the target's configuration in the place of a draft's."""
    target = model_config()
    config = instance(target, target)
    identity = who(config, target)
    assert identity.group == TARGET_GROUP
    assert identity == who(instance(target), target)  # it loads from one without speculation
    assert groups_to_come(config, identity) == []


def test_speculation_that_has_no_configuration_of_a_draft_leaves_the_target_in_its_group():
    target = model_config()
    config = instance(target)
    config.speculative_config = types.SimpleNamespace(
        target_model_config=target, draft_model_config=None
    )
    assert who(config, target).group == TARGET_GROUP
    assert groups_to_come(config, who(config, target)) == []


@pytest.fixture
def world(monkeypatch):
    """Be one of so many ranks."""
    store = torch.distributed.HashStore()

    def be_one_of(size, rank=0):
        group = types.SimpleNamespace(
            size=lambda: size, rank=lambda: rank, get_group_store=lambda: store
        )
        monkeypatch.setattr(torch.distributed, "group", types.SimpleNamespace(WORLD=group))
        return store

    return be_one_of


@pytest.mark.parametrize(
    ("dp", "tp", "pp", "drafts"),
    [
        (1, 2, 1, [0, 1]),
        (1, 2, 2, [2, 3]),
        (1, 1, 3, [2]),
        (2, 2, 2, [2, 3, 6, 7]),  # two replicas that share experts
    ],
)
def test_all_ranks_load_the_target_and_those_of_the_last_stage_the_draft(world, dp, tp, pp, drafts):
    size = dp * tp * pp
    store = world(size)
    target, draft = model_config(moe=True), model_config(moe=True)
    config = instance(target, draft, dp=dp, tp=tp, pp=pp)
    ranks = [ranks_of(config, who(config, model)) for model in (target, draft)]
    assert [each.all for each in ranks] == [[*range(size)], drafts]
    assert [each.workers for each in ranks] == [[*range(size)]] * 2  # all of them listen
    assert [each.group for each in ranks] == [TARGET_GROUP, DRAFT_GROUP]
    assert {each.store for each in ranks} == {store}


@pytest.mark.parametrize("moe", [True, False])
def test_instances_in_one_process_group_load_each_for_itself(world, moe):
    """As with an external launcher that starts several."""
    target = model_config(moe)
    config = instance(target, tp=2)
    seen = []
    for rank in range(4):
        world(4, rank)
        seen.append(ranks_of(config, identity_of(config, target, "m", rank, RAW)))
    assert [(each.rank, each.all, each.worker) for each in seen] == [
        *((0, [0, 1], 0), (1, [0, 1], 1), (0, [0, 1], 2), (1, [0, 1], 3))
    ]
    assert [each.workers for each in seen] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    for each in seen[::2]:
        each.store.set("key", str(each.worker))
    assert [each.store.get("key") for each in seen] == [b"0", b"0", b"2", b"2"]


def test_replicas_that_share_experts_can_have_groups_of_their_own(world):
    """As with elastic expert parallelism."""
    store = world(2, 1)
    target = model_config(moe=True)
    config = instance(target, dp=2, tp=2)
    config.parallel_config.data_parallel_index = 1
    ranks = ranks_of(config, identity_of(config, target, "m", 1, RAW))
    assert (ranks.rank, ranks.all, ranks.worker, ranks.workers) == (3, [2, 3], 3, [2, 3])
    assert ranks.store is store


def test_in_a_group_of_another_size_a_rank_is_alone(world):
    world(3, 1)
    target = model_config()
    config = instance(target, tp=2)
    ranks = ranks_of(config, identity_of(config, target, "m", 1, RAW))
    assert (ranks.all, ranks.several) == ([1], False)


def test_without_a_process_group_a_rank_is_alone(monkeypatch):
    monkeypatch.setattr(torch.distributed, "group", types.SimpleNamespace(WORLD=None))
    target = model_config()
    ranks = ranks_of(instance(target), who(instance(target), target))
    assert (ranks.all, ranks.several) == ([ranks.rank], False)


def test_the_raw_layout_is_the_same_in_all_versions():
    target = model_config()
    assert who(instance(target), target).vllm_version is None


# Changes of weights


class Watched:
    """What is told of the changes of a worker and a model shaped as vLLM's."""

    def __init__(self, monkeypatch):
        self.config = types.SimpleNamespace(
            compilation_config=CompilationConfig(),
            parallel_config=types.SimpleNamespace(worker_cls="made.worker.Worker"),
        )
        self.name = instance_of(self.config)

        class Worker:
            vllm_config = self.config
            load_model = update_config = add_lora = execute_model = lambda *_, **__: "done"

            def __getattr__(self, name):
                raise AttributeError(name)

        for name in compat._CHANGES:
            setattr(Worker, name, lambda worker, *args, _name=name, **kwargs: self.call(_name))

        class Runner:
            vllm_config = self.config

            def reload_weights(runner, *_, **__):
                return self.call("reload_weights of the runner")

        class Model(torch.nn.Module):
            def load_weights(model, weights):
                self.loaded.append(weights)
                return self.call("load_weights")

        class State:
            def rearrange(state, is_profile=False, **_):
                return self.call("rearrange")

        class Adaptor:
            def do_update_expert_map(adaptor, *_):
                return self.call("do_update_expert_map")

            def do_update_log2phy_map(adaptor, *_):
                return self.call("do_update_log2phy_map")

            def do_update_expert_weight(adaptor, *_):
                return self.call("do_update_expert_weight")

        class Method(QuantizeMethodBase):
            def create_weights(self, layer, *_, **__):
                pass

            def apply(self, layer, *_, **__):
                pass

            def process_weights_after_loading(method, layer):
                return self.call("process")

        for module, name, kind in (
            ("made.worker", "Worker", Worker),
            ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner", Runner),
            ("vllm.distributed.eplb.eplb_state", "EplbState", State),
            (ADAPTOR, "VllmEplbAdaptor", Adaptor),
        ):
            made = types.ModuleType(module)
            setattr(made, name, kind)
            monkeypatch.setitem(sys.modules, module, made)
        monkeypatch.setattr(compat, "_moving_experts", set())
        self.told, self.loaded = [], []
        self.worker, self.model, self.state, self.adaptor = Worker(), Model(), State(), Adaptor()
        self.runner = Runner()
        self.model.layer = torch.nn.Linear(1, 1)
        self.model.layer.quant_method = Method()
        self.layers = self.watch()

    def watch(self):
        return compat.watch(
            self.config,
            self.model,
            self.changing,
            lambda model, weights: (model, weights),
            lambda layer: self.told.append(("layer", layer)),
        )

    @contextlib.contextmanager
    def changing(self, whose, change):
        self.told.append((whose, change))
        yield
        self.told.append("over")

    @contextlib.contextmanager
    def set_config(self, config):
        self.told.append(config)
        yield

    def call(self, name):
        self.told.append(name)
        return name


@pytest.fixture
def watched(monkeypatch):
    return Watched(monkeypatch)


def test_every_method_of_a_worker_that_changes_weights_is_told_of_before_and_after(watched):
    for name in compat._CHANGES:
        arguments = [("weights",)] if name == "discard" else []
        assert getattr(watched.worker, name)(*arguments) == name
        (whose, change), called, over = watched.told
        assert (whose, called, over) == (watched.name, name, "over")
        assert isinstance(change, Change)
        watched.told.clear()


def test_what_changes_no_weights_is_not_told_of(watched):
    for name in ("load_model", "update_config", "add_lora", "execute_model"):
        getattr(watched.worker, name)()
    watched.worker.discard(("kv_cache",))
    watched.worker.wake_up(["kv_cache"])
    watched.worker.sleep(0)
    watched.state.rearrange(is_profile=True)
    watched.state.rearrange(True)
    assert watched.told == ["discard", "wake_up", "sleep", "rearrange", "rearrange"]


@pytest.mark.parametrize(
    ("method", "arguments", "expected"),
    [
        ("reload_weights", {}, {"at_once": False, "directly": False, "after": After.WHOLE}),
        ("reload_weights", {"is_checkpoint_format": False}, {"at_once": True, "directly": True}),
        ("sleep", {"level": 2}, {"sleep": 2, "at_once": True, "after": After.MORE}),
        ("sleep", {}, {"sleep": 1}),
        ("wake_up", {"tags": ["weights"]}, {"at_once": False, "after": After.AWAKE}),
        ("wake_up", {"tags": None}, {"after": After.AWAKE}),
        ("update_weights", {"update_info": {}}, {"after": After.MORE, "at_once": True}),
        ("finish_weight_update", {}, {"after": After.WHOLE}),
        ("apply_model", {"fn": print}, {"after": After.WHOLE, "directly": True}),
    ],
    ids=str,
)
def test_what_a_method_does_depends_on_its_arguments(watched, method, arguments, expected):
    getattr(watched.worker, method)(**arguments)
    change = watched.told[0][1]
    assert {name: getattr(change, name) for name in expected} == expected


def test_a_positional_form_is_known_too(watched):
    watched.worker.reload_weights(iter(()), None, False)
    watched.worker.sleep(2)
    watched.worker.wake_up(["kv_cache"])
    assert watched.told[0][1].at_once
    assert watched.told[3][1].sleep == 2
    assert watched.told[-1] == "wake_up"


def test_a_model_whose_load_weights_is_called_is_told_of_whoever_calls(watched):
    watched.model.load_weights([])
    (whose, change), *_ = watched.told
    assert whose is watched.model and change.after is After.UNKNOWN


def test_a_model_loads_what_comes_back_for_the_weights_that_it_is_given(watched):
    assert watched.model.load_weights(["w"]) == watched.model.load_weights(weights=["w"])
    assert watched.loaded == [(watched.model, ["w"])] * 2


def test_a_runner_that_reloads_is_told_of_and_has_its_configuration(watched, monkeypatch):
    """vLLM Ascend's worker has no method for it."""
    monkeypatch.setattr(compat, "set_current_vllm_config", watched.set_config)
    watched.runner.reload_weights(weights_path="elsewhere")
    current, (whose, change), *rest = watched.told
    assert (current, whose, change.after) == (watched.config, watched.name, After.WHOLE)
    assert rest == ["reload_weights of the runner", "over"]


def test_moved_experts_are_told_of_in_vllm_and_in_vllm_ascend(watched):
    watched.state.rearrange()
    watched.adaptor.do_update_expert_map(0, 1)
    watched.adaptor.do_update_log2phy_map(0, 1)
    watched.adaptor.do_update_expert_weight(0, 1, 2)
    changes = [one for one in watched.told if isinstance(one, tuple)]
    expected = [(watched.name, After.MOVED)] * 4
    assert [(whose, change.after) for whose, change in changes] == expected


def test_a_layer_is_told_of_before_it_is_processed_again(watched):
    assert watched.layers == [watched.model.layer]
    watched.model.layer.quant_method.process_weights_after_loading(watched.model.layer)
    assert watched.told == [("layer", watched.model.layer), "process"]


def test_a_layer_with_a_method_of_its_own_is_told_of_before_it_is_processed_again(watched):
    layer = watched.model.layer
    layer.quant_method.process_weights_after_loading = lambda layer: watched.told.append("process")
    watched.watch()
    layer.quant_method.process_weights_after_loading(layer)
    layer.quant_method.process_weights_after_loading(layer=layer)
    assert watched.told == [("layer", layer), "process"] * 2


def test_what_is_watched_already_is_told_of_once(watched):
    watched.watch()
    watched.worker.sleep(1)
    watched.model.load_weights([])
    assert watched.told.count("over") == 2


def test_vllms_own_worker_has_what_is_watched():
    from vllm.v1.worker.gpu_worker import Worker

    newer = {"discard", "reset_weights", "start_draft_weight_update"}
    assert {name for name in compat._CHANGES if not hasattr(Worker, name)} <= newer


# Reloads


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=True)
        self.head.weight = self.embed.weight
        self.head.register_buffer("table", torch.ones(2), persistent=False)
        self.loaded = []

    def load_weights(self, weights):
        self.loaded.append([*weights])
        return {"own"}


def recorded(model):
    record_metadata_for_reloading(model)
    return model


def test_the_places_of_a_reload_are_those_that_the_model_was_made_with():
    model = recorded(Tied())
    model.embed.weight = model.head.weight = nn.Parameter(torch.zeros(7))  # packed, so to speak
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    tensors, required = places_of(model)
    assert required == {"embed.weight", "head.weight", "head.bias"}
    assert tensors.keys() - required == {"head.table"}
    assert {name: tensor.shape for name, tensor in tensors.items() if name in required} == {
        "embed.weight": (5, 3),
        "head.weight": (5, 3),
        "head.bias": (5,),
    }
    assert tensors["head.weight"] is tensors["embed.weight"]
    assert not {tensor.data_ptr() for tensor in tensors.values()} & {*before.values()}
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before


def test_a_layer_that_wraps_another_gives_its_places_other_names():
    model = recorded(Tied())
    model.head = nn.ModuleDict({"base_layer": model.head})
    assert {"head.base_layer.weight", "head.base_layer.bias"} <= places_of(model)[1]
    assert "head.weight" not in places_of(model)[0]


def test_one_load_of_a_model_is_taken_over_and_known_by_its_iterator():
    model = Tied()
    ours = iter(())
    take_over_load(model, ours, lambda: {"filled"})
    assert model.load_weights(ours) == {"filled"}
    assert model.loaded == []
    assert model.load_weights(ours) == {"own"}


def test_a_load_from_elsewhere_is_not_taken_over():
    model = Tied()
    take_over_load(model, iter(()), lambda: {"filled"})
    assert model.load_weights(iter([1])) == {"own"}
    assert model.loaded == [[1]]


def test_a_view_of_a_weight_whose_memory_was_replaced_is_not_reloaded():
    model = Tied()
    model.head.register_buffer("view", model.head.weight.data.view(-1), persistent=False)
    recorded(model)
    assert why_no_reload(model, torch.device("cpu")) == ""
    model.head.weight.data = model.head.weight.data.clone()
    assert "cannot reload head.view (a view of a weight)" in why_no_reload(
        model, torch.device("cpu")
    )


def test_modules_whose_files_are_missing_are_made_while_sources_are_asked(monkeypatch):
    asked = []
    monkeypatch.setattr(adapters, "_load_dense_weights", lambda *given: bool(asked.append(given)))
    with pytest.raises(ZeroDivisionError), modules_without_files():
        assert adapters._load_dense_weights("linear", "2_Dense") is True
        raise ZeroDivisionError
    assert adapters._load_dense_weights("linear", "2_Dense") is False
    assert asked == [("linear", "2_Dense")] * 2


# Whether the weights are on the disk


INDEX = '{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}'


@pytest.mark.parametrize(
    ("files", "complete"),
    [
        ({}, False),
        ({"config.json": "{}", "training_args.bin": ""}, False),
        ({"model.safetensors": ""}, True),
        ({"pytorch_model.bin": ""}, True),
        ({"model-00001-of-00002.safetensors": ""}, False),
        ({f"model-0000{n}-of-00002.safetensors": "" for n in (1, 2)}, True),
        ({"model.safetensors.index.json": INDEX, "one.safetensors": ""}, False),
        (
            {"model.safetensors.index.json": INDEX, "one.safetensors": "", "two.safetensors": ""},
            True,
        ),
        ({"model.safetensors.index.json": "[1]", "one.safetensors": ""}, False),
        ({"model.safetensors.index.json": "{", "one.safetensors": ""}, False),
    ],
)
def test_a_checkpoint_is_on_the_disk_if_all_its_files_are(hub, tmp_path, files, complete):
    cached = hub / "models--org--model" / "snapshots" / ONE
    for folder in tmp_path / "own", cached:
        folder.mkdir(exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text)
    for model in tmp_path / "own", cached, "org/model":
        assert has_checkpoint(asked_for(model)) == complete, model
    assert not has_checkpoint(asked_for("org/model", "v2"))


def test_what_is_no_folder_and_not_in_the_cache_is_not_on_the_disk(hub, tmp_path, monkeypatch):
    for model in "org/other", "/no/such/folder", "s3://bucket/model":
        assert not has_checkpoint(asked_for(model))
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "nowhere")
    assert not has_checkpoint(asked_for(tmp_path))
    (hub / "models--org--model" / "snapshots" / ONE / "model.safetensors").touch()
    assert has_checkpoint(asked_for("org/model"))
    monkeypatch.setenv("VLLM_USE_MODELSCOPE", "True")
    assert not has_checkpoint(asked_for("org/model"))
