"""What NetLoader takes from vLLM: who a model is, and what making one leaves behind."""

import dataclasses
import sys
import types

import pytest
import vllm
from vllm.config import CompilationConfig

from vllm_ascend.model_loader.netloader.compat import (
    groups_to_come,
    identity_of,
    remember_registrations,
)
from vllm_ascend.model_loader.netloader.executor.manifest import PROCESSED, RAW
from vllm_ascend.model_loader.netloader.interaction.protocol import DRAFT_GROUP, TARGET_GROUP

# Registrations


@dataclasses.dataclass
class Config:
    compilation_config: CompilationConfig


ADAPTOR = "vllm_ascend.eplb.adaptor.vllm_adaptor"


def import_adaptor(monkeypatch, *layers):
    """What importing vLLM Ascend's adaptor leaves; it cannot be imported here."""

    registered = list(layers)
    module = types.ModuleType(ADAPTOR)
    module.VllmEplbAdaptor = type("VllmEplbAdaptor", (), {"_registered_moe_layers": registered})
    monkeypatch.setitem(sys.modules, ADAPTOR, module)
    return registered


def test_expert_layers_of_vllm_ascend_are_brought_back_as_they_were(monkeypatch):
    layers = import_adaptor(monkeypatch, "target's")
    restore = remember_registrations(Config(CompilationConfig()))
    layers.append("half-filled draft's")
    restore()
    assert layers == ["target's"]
    layers.append("draft's")
    restore()
    assert layers == ["target's"]


def test_an_adaptor_imported_while_a_model_is_made_has_no_layers_afterwards(monkeypatch):
    monkeypatch.delitem(sys.modules, ADAPTOR, raising=False)
    restore = remember_registrations(Config(CompilationConfig()))
    layers = import_adaptor(monkeypatch)
    layers.append("half-filled")
    restore()
    assert layers == []


@pytest.mark.parametrize("contents", [{}, {"VllmEplbAdaptor": type("VllmEplbAdaptor", (), {})}])
def test_an_adaptor_of_another_version_is_left_alone(contents, monkeypatch):
    module = types.ModuleType(ADAPTOR)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, ADAPTOR, module)
    remember_registrations(Config(CompilationConfig()))()
    assert vars(module).items() >= contents.items()


# Identities


def model_config(**settings):
    return types.SimpleNamespace(
        hf_config=types.SimpleNamespace(to_dict=lambda: {"hidden_size": 4} | settings),
        revision=None,
        dtype="torch.bfloat16",
        quantization=None,
        is_moe=False,
    )


def instance(target, draft=None):
    """An instance; `draft` is what speculation has for its draft model's configuration."""
    parallel = types.SimpleNamespace(
        tensor_parallel_size=1,
        pipeline_parallel_size=1,
        data_parallel_size=1,
        enable_expert_parallel=False,
    )
    speculative = draft and types.SimpleNamespace(
        target_model_config=target, draft_model_config=draft
    )
    return types.SimpleNamespace(parallel_config=parallel, speculative_config=speculative)


def who(config, model, layout=RAW):
    return identity_of(config, model, "m", 0, layout)


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
    assert of_target.digest() != of_draft.digest()
    assert of_target.differences(of_draft) == [
        f"group is '{TARGET_GROUP}' here and '{DRAFT_GROUP}' there"
    ]
    assert groups_to_come(config, of_target) == [DRAFT_GROUP]
    assert groups_to_come(config, of_draft) == []


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


def test_the_processed_layout_goes_by_the_version_that_processes(monkeypatch):
    target = model_config()
    config = instance(target)
    here = who(config, target, PROCESSED)
    assert here.layout == PROCESSED
    assert f"vllm {vllm.__version__}" in here.vllm_version
    monkeypatch.setattr(vllm, "__version__", "0.0.1")
    assert who(config, target, PROCESSED).vllm_version != here.vllm_version


def test_the_raw_layout_is_the_same_in_all_versions():
    target = model_config()
    assert who(instance(target), target).vllm_version is None


def test_where_a_model_lies_is_no_part_of_who_it_is():
    here, there = model_config(_name_or_path="/a"), model_config(_name_or_path="/b")
    assert who(instance(here), here) == who(instance(there), there)


def test_where_a_model_lies_is_no_part_of_who_it_is_in_nested_settings_either():
    """As in an EAGLE draft's configuration, and in those of parts of multimodal models."""
    here, there = (
        model_config(model={"_name_or_path": path, "transformers_version": version})
        for path, version in (("/a", "4"), ("/b", "5"))
    )
    assert who(instance(here), here) == who(instance(there), there)
