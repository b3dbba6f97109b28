"""Which instances may exchange weights: vLLM's own configurations of tiny models, in pairs."""

import json
import types

import msgspec
import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from tests.e2e.loading import load, make_config
from tools.make_model import make_model
from vllm_ascend.model_loader.netloader.compat import (
    identity_of,
    meaning_of,
    name_of,
    why_experts_move,
    worker_of,
)
from vllm_ascend.model_loader.netloader.executor.chunks.manifest import PROCESSED, RAW
from vllm_ascend.model_loader.netloader.interaction import api


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for arch in ("llama", "moe"):
        make_model(folder / arch, arch, "tiny")
    return folder


@pytest.fixture
def configured(models, monkeypatch):
    """The configuration of an instance with these engine arguments."""

    def configured(arch="llama", **arguments):
        with monkeypatch.context() as patch:
            patch.setattr("tests.e2e.loading.OPTIONS", arguments, raising=False)
            return make_config(models / arch, "auto", arguments=arguments)

    return configured


def who(config, rank=0, layout=RAW):
    return identity_of(config, config.model_config, "m", rank, layout)


def differences(one, other):
    return [str(difference) for difference in api.differences(one, other)]
