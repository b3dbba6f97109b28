"""EAGLE and MTP drafts as a vLLM worker loads them, without the cost of starting an instance."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers import utils as layer_utils
from vllm.v1.spec_decode.draft_model import DraftModelProposer
from vllm.v1.spec_decode.eagle import EagleProposer

from tests.e2e.loading import assert_same, load, make_config, worker
from tools.make_model import copy_without_weights, make_model
from vllm_ascend.model_loader.netloader import netloader
from vllm_ascend.model_loader.netloader.compat import groups_to_come, identity_of
from vllm_ascend.model_loader.netloader.errors import LoadFailed, SourceRefused
from vllm_ascend.model_loader.netloader.executor.chunks.manifest import PROCESSED, RAW
from vllm_ascend.model_loader.netloader.executor.devices.cpu import CpuDevice
from vllm_ascend.model_loader.netloader.identity import ModelIdentity
from vllm_ascend.model_loader.netloader.interaction.api import (
    DRAFT_GROUP,
    TARGET_GROUP,
    Join,
    Joined,
)
from vllm_ascend.model_loader.netloader.interaction.elastic import ElasticClient
from vllm_ascend.model_loader.netloader.utils import parse_address

FLAGS = ("has_own_embed_tokens", "has_own_lm_head")
HIDDEN, INTERMEDIATE, VOCABULARY, DRAFT_VOCABULARY, KV = 256, 512, 2048, 1024, 128


# Drafts on disk


def tensors(seed: int, **shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name.replace("__", "."): torch.randn(shape, generator=generator).to(torch.bfloat16)
        for name, shape in shapes.items()
    }


def layer(seed: int, name: str, inputs: int = HIDDEN) -> dict[str, torch.Tensor]:
    """A checkpoint's decoder layer."""
    made = tensors(
        seed,
        self_attn__q_proj__weight=(HIDDEN, inputs),
        self_attn__k_proj__weight=(KV, inputs),
        self_attn__v_proj__weight=(KV, inputs),
        self_attn__o_proj__weight=(HIDDEN, HIDDEN),
        mlp__gate_proj__weight=(INTERMEDIATE, HIDDEN),
        mlp__up_proj__weight=(INTERMEDIATE, HIDDEN),
        mlp__down_proj__weight=(HIDDEN, INTERMEDIATE),
        input_layernorm__weight=(HIDDEN,),
        post_attention_layernorm__weight=(HIDDEN,),
    )
    return {f"{name}.{key}": tensor for key, tensor in made.items()}


def eagle(seed: int, embeddings: bool) -> dict[str, torch.Tensor]:
    made = layer(seed, "layers.0") | tensors(seed + 1, fc__weight=(HIDDEN, 2 * HIDDEN))
    del made["layers.0.input_layernorm.weight"]
    if embeddings:
        made |= tensors(seed + 2, embed_tokens__weight=(VOCABULARY, HIDDEN))
    return made


def eagle3(seed: int) -> dict[str, torch.Tensor]:
    made = layer(seed, "midlayer", 2 * HIDDEN) | tensors(
        seed + 1,
        fc__weight=(HIDDEN, 3 * HIDDEN),
        midlayer__hidden_norm__weight=(HIDDEN,),
        norm__weight=(HIDDEN,),
        lm_head__weight=(DRAFT_VOCABULARY, HIDDEN),
    )
    return made | {"d2t": torch.arange(DRAFT_VOCABULARY)}


def llama_config(**more: Any) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=VOCABULARY,
        max_position_embeddings=2048,
        dtype="bfloat16",
        **more,
    )


@dataclass(frozen=True)
class Pair:
    """A target and its draft on disk."""

    method: str
    target: Path
    draft: Path | None = None  # None: in the target's checkpoint

    def config(self, load_format: str, **extra: Any) -> VllmConfig:
        speculative: dict[str, Any] = {"method": self.method, "num_speculative_tokens": 1}
        if self.draft is not None:
            speculative["model"] = str(self.draft)
        return EngineArgs(
            model=str(self.target),
            load_format=load_format,
            model_loader_extra_config=extra,
            speculative_config=speculative,
            dtype="bfloat16",
            enforce_eager=True,
            max_model_len=256,
            use_tqdm_on_load=False,
        ).create_engine_config()

    @contextlib.contextmanager
    def without_weights(self) -> Iterator[None]:
        """Take the weight files of both away for a while."""
        folders = {self.target, self.draft or self.target}
        files = [file for folder in folders for file in folder.glob("*.safetensors")]
        for file in files:
            file.rename(f"{file}.hidden")
        try:
            yield
        finally:
            for file in files:
                Path(f"{file}.hidden").rename(file)


KINDS = ("eagle", "eagle-embeddings", "eagle3", "mtp")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    folder = tmp_path_factory.mktemp("drafts")
    target = folder / "target"
    make_model(target, "llama", "tiny")
    return {kind: make_pair(folder, kind, target) for kind in KINDS}


def make_pair(folder: Path, kind: str, target: Path) -> Pair:
    method, _, embeddings = kind.partition("-")
    path = folder / kind
    if method == "mtp":
        make_mtp(path)
        return Pair(method, path)
    made = eagle(7, bool(embeddings)) if method == "eagle" else eagle3(7)
    more = {"draft_vocab_size": DRAFT_VOCABULARY} if method == "eagle3" else {}
    llama_config(**more).save_pretrained(path)
    save_file(made, path / "model.safetensors", metadata={"format": "pt"})
    return Pair(method, target, path)


def make_mtp(path: Path) -> None:
    """MiMo: a Qwen2 with a layer that drafts."""
    config = transformers.Qwen2Config(
        architectures=["MiMoForCausalLM"],
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        dtype="bfloat16",
        num_nextn_predict_layers=1,
    )
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(path)
    config.architectures = ["MiMoForCausalLM"]
    config.save_pretrained(path)
    file = path / "model.safetensors"
    name = "model.mtp_layers.0"
    drafting = layer(11, name) | tensors(
        12,
        **{
            f"{name}.{key}": (HIDDEN,)
            for key in (
                "token_layernorm.weight",
                "hidden_layernorm.weight",
                "final_layernorm.weight",
                "self_attn.q_proj.bias",
            )
        },
        **{f"{name}.self_attn.{key}_proj.bias": (KV,) for key in "kv"},
        **{f"{name}.input_proj.weight": (HIDDEN, 2 * HIDDEN)},
    )
    save_file(load_file(file) | drafting, file, metadata={"format": "pt"})


# Target and draft of an instance


@dataclass(frozen=True)
class Both:
    """A target and its draft in use, and the configuration they were loaded with."""

    config: VllmConfig
    target: nn.Module
    draft: nn.Module


def load_both(config: VllmConfig) -> Both:
    """Load a target, and then its draft as vLLM's proposer does."""
    speculative = config.speculative_config
    assert speculative is not None
    kind = DraftModelProposer if speculative.method == "draft_model" else EagleProposer
    with worker(config) as loader:
        target = loader.load_model(vllm_config=config, model_config=config.model_config)
        proposer = kind.__new__(kind)  # its buffers are of no use here
        proposer.vllm_config, proposer.speculative_config = config, speculative
        return Both(config, target, proposer._get_model())


class Seed:
    """An instance with a draft that has loaded both from disk and is a source of both."""

    def __init__(self, pair: Pair, prefix: Path) -> None:
        self.pair = pair
        self.both = load_both(pair.config("netloader", MODEL="m", OUTPUT_PREFIX=str(prefix)))
        self.address = Path(f"{prefix}0.txt").read_text()

    def client(self, pair: Pair | None = None) -> VllmConfig:
        """The configuration of an instance that asks this one alone, and serves nothing."""
        source = [{"device_id": 0, "sources": [self.address]}]
        return (pair or self.pair).config("netloader", MODEL="m", SOURCE=source, LISTEN_PORT=1)

    def identity(self, group: str) -> ModelIdentity:
        """The identity of one of its models, as it says itself."""
        deadlines = {"connect": 5.0, "handshake": 5.0, "progress": 5.0}
        with ElasticClient.connect(parse_address(self.address), **deadlines) as client:
            models = client.status().models
        [found] = [model.identity for model in models if model.identity.group == group]
        return found

    def answer(self, group: str, identity: ModelIdentity) -> Joined | str:
        """What a client of an identity is told that asks for a group: its weights, or why not."""
        deadlines = {"connect": 5.0, "handshake": 5.0, "progress": 5.0}
        join = Join(msgspec.structs.replace(identity, group=group))
        with ElasticClient.connect(parse_address(self.address), **deadlines) as client:
            try:
                return client.join(join)
            except SourceRefused as refused:
                return str(refused)


Seeds: TypeAlias = Callable[[str], Seed]


@pytest.fixture(scope="module")
def seeds(pairs: dict[str, Pair], tmp_path_factory: pytest.TempPathFactory) -> Seeds:
    folder = tmp_path_factory.mktemp("seeds")
    return cache(lambda kind: Seed(pairs[kind], folder / f"{kind}_"))


def flags(model: nn.Module) -> dict[str, Any]:
    return {name: getattr(model, name) for name in FLAGS if hasattr(model, name)}


# What a draft has of its own; it takes the rest from its target.
OWN = {
    "eagle": {"has_own_embed_tokens": False, "has_own_lm_head": False},
    "eagle-embeddings": {"has_own_embed_tokens": True, "has_own_lm_head": False},
    "eagle3": {"has_own_embed_tokens": False, "has_own_lm_head": True},
    "mtp": {},
}


@pytest.mark.core
@pytest.mark.parametrize("kind", KINDS)
def test_a_draft_comes_from_the_port_of_its_target_with_its_flags(kind: str, seeds: Seeds) -> None:
    seed = seeds(kind)
    plain = load_both(seed.pair.config("auto"))
    with seed.pair.without_weights():
        client = load_both(seed.client())
    assert flags(client.draft) == flags(seed.both.draft) == flags(plain.draft) == OWN[kind]
    if OWN[kind].get("has_own_embed_tokens") is False:  # the checkpoint has none: they are anything
        plain.draft.model.embed_tokens.weight.data.copy_(client.draft.model.embed_tokens.weight)
    for expected in (seed.both, plain):
        assert_same(expected.target, client.target)
        assert_same(expected.draft, client.draft)


@pytest.mark.parametrize("kind", ["eagle3", "mtp"])
@pytest.mark.parametrize(
    ("group", "other"), [(TARGET_GROUP, DRAFT_GROUP), (DRAFT_GROUP, TARGET_GROUP)]
)
def test_one_models_identity_does_not_get_the_other_model(
    kind: str, group: str, other: str, seeds: Seeds
) -> None:
    seed = seeds(kind)
    assert isinstance(seed.answer(group, seed.identity(group)), Joined)
    answer = seed.answer(group, seed.identity(other))
    assert "other_model: the models differ: " in str(answer)


def test_a_draft_that_is_its_targets_twin_is_not_taken_for_it(
    pairs: dict[str, Pair], tmp_path: Path
) -> None:
    """The draft has the very files of the target, and the same MODEL."""
    target = pairs["eagle"].target
    twins = Pair("draft_model", target, target)
    seed = Seed(twins, tmp_path / "rank_")
    groups = TARGET_GROUP, DRAFT_GROUP
    target_offer, draft_offer = (seed.answer(group, seed.identity(group)) for group in groups)
    assert isinstance(target_offer, Joined)
    assert isinstance(draft_offer, Joined)
    assert target_offer.weights == draft_offer.weights
    with twins.without_weights():
        client = load_both(seed.client())
    assert_same(seed.both.target, client.target)
    assert_same(seed.both.draft, client.draft)


def test_ngram_speculation_changes_nothing_for_the_target(
    pairs: dict[str, Pair], tmp_path: Path
) -> None:
    target, prefix = pairs["eagle"].target, tmp_path / "rank_"
    ngram = Pair("ngram", target)
    config = ngram.config("netloader", MODEL="m", OUTPUT_PREFIX=str(prefix))
    source = load(config)
    source_list = [{"device_id": 0, "sources": [Path(f"{prefix}0.txt").read_text()]}]
    with ngram.without_weights():
        client = load(make_config(target, MODEL="m", SOURCE=source_list, LISTEN_PORT=1))
    assert_same(source, client)
    identity = identity_of(config, config.model_config, "m", 0, RAW)
    assert identity.group == TARGET_GROUP
    assert groups_to_come(config, identity) == []


def test_a_source_without_a_draft_gives_none(pairs: dict[str, Pair], tmp_path: Path) -> None:
    pair, prefix = pairs["eagle3"], tmp_path / "rank_"
    model = load(make_config(pair.target, MODEL="m", OUTPUT_PREFIX=str(prefix)))
    source = [{"device_id": 0, "sources": [Path(f"{prefix}0.txt").read_text()]}]
    config = pair.config("netloader", MODEL="m", SOURCE=source, LISTEN_PORT=1)
    why = f"there is no model of group '{DRAFT_GROUP}' here"
    with pair.without_weights(), pytest.raises(LoadFailed, match=why):
        load_both(config)
    assert model is not None  # as long as it lives it is served


def test_an_eagle_draft_in_another_folder_is_the_same_draft(seeds: Seeds, tmp_path: Path) -> None:
    seed = seeds("eagle3")
    assert seed.pair.draft is not None
    copy_without_weights(seed.pair.draft, tmp_path / "elsewhere")
    pair = dataclasses.replace(seed.pair, draft=tmp_path / "elsewhere")
    assert_same(seed.both.draft, load_both(seed.client(pair)).draft)


class Accelerator(CpuDevice):
    """Instances on it exchange what post-processing has made of weights."""

    layout = PROCESSED


def process(layer: nn.Module, remove_weight: bool) -> None:
    """Leave a layer's weight a tensor; vLLM packs a CPU's into a handle."""
    layer.cpu_linear = torch.nn.functional.linear


@pytest.mark.core
@pytest.mark.parametrize("kind", ["eagle", "eagle3", "mtp"])
def test_a_processed_draft_comes_from_the_source_too(
    kind: str, pairs: dict[str, Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Accelerator()
    monkeypatch.setattr(netloader, "device_of", lambda *_: device)
    monkeypatch.setattr(layer_utils, "dispatch_cpu_unquantized_gemm", process)
    seed = Seed(pairs[kind], tmp_path / "rank_")
    with seed.pair.without_weights():
        client = load_both(seed.client())
    assert flags(client.draft) == flags(seed.both.draft) == OWN[kind]
    assert_same(seed.both.target, client.target)
    assert_same(seed.both.draft, client.draft)


class UsedMemory(TorchDispatchMode):
    """Has torch.empty give memory in which something was before."""

    def __init__(self, left_over: float) -> None:
        super().__init__()
        self._left_over = left_over

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten.empty and result.is_floating_point():
            result.fill_(self._left_over)
        return result


def test_instances_with_the_same_eagle_draft_serve_the_same_weights(
    pairs: dict[str, Pair], tmp_path: Path
) -> None:
    """Else a client can use only one of them at a time, and begins anew when it is lost."""
    digests = []
    for name, left_over in (("a", 1.0), ("b", 2.0)):
        with UsedMemory(left_over):
            seed = Seed(pairs["eagle3"], tmp_path / name)
        answer = seed.answer(DRAFT_GROUP, seed.identity(DRAFT_GROUP))
        assert isinstance(answer, Joined)
        digests.append(answer.weights)
    assert digests[0] == digests[1]
