"""Makes tiny models for vLLM Ascend, with what a CPU says to them.

``python models.py FOLDER`` writes FOLDER/plain and FOLDER/mla_moe, and in vLLM Ascend's quantized
format (serve them with ``--quantization ascend``) FOLDER/w8a8, FOLDER/w8a8_dynamic and, with
experts, FOLDER/qwen3_moe, FOLDER/deepseek_v3 and FOLDER/deepseek_w4a8. Beside the weights of each
lies reference.json: prompts as token ids, and the greedy tokens that follow them. Run it as a
script of its own, as it imports torch.
"""

import functools
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

PROMPTS = ([1, 2, 3, 4], [5, 6, 7], list(range(10, 40)))
TOKENS = 8
# With other seeds the two best tokens or experts are close somewhere, and rounding may choose the
# other.
SEED = 16
MLA_MOE_SEED = 1759
QWEN3_MOE_SEED = 5
DEEPSEEK_V3_SEED = 5
# Behind each prompt that a draft has learned to foresee.
FORESEEN = 40
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")
WEIGHTS = "model.safetensors"
DESCRIPTION = "quant_model_description.json"
REFERENCE = "reference.json"

# What all these models have in common.
_SMALL = {
    "vocab_size": 512,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.08,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "bfloat16",
}


def make_plain(folder: Path, seed: int = SEED) -> None:
    """Writes a bfloat16 Llama of two layers."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        **_SMALL,
        intermediate_size=256,
        num_hidden_layers=2,
        num_key_value_heads=2,
    )
    save(LlamaForCausalLM(config), folder)


def make_mla_moe(folder: Path, seed: int = MLA_MOE_SEED) -> None:
    """Writes a bfloat16 DeepSeek V2 of three layers, the last two of which have experts."""
    torch.manual_seed(seed)
    config = DeepseekV2Config(
        **_SMALL,
        intermediate_size=256,
        moe_intermediate_size=64,
        num_hidden_layers=3,
        q_lora_rank=None,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=48,
        first_k_dense_replace=1,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        # Without it the experts say little beside the rest, and wrong ones would hardly show.
        routed_scaling_factor=4.0,
        n_group=1,
        topk_group=1,
    )
    save(with_norms(DeepseekV2ForCausalLM(config)), folder)


def make_qwen3_moe(folder: Path) -> None:
    """Writes a bfloat16 Qwen3 of two layers of experts."""
    torch.manual_seed(QWEN3_MOE_SEED)
    config = Qwen3MoeConfig(
        **_SMALL,
        intermediate_size=256,
        moe_intermediate_size=64,
        num_hidden_layers=2,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
    )
    model = with_norms(Qwen3MoeForCausalLM(config))
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.mlp.gate.weight, std=config.initializer_range)
    save(model, folder)


def deepseek_v3_config(**changes: Any) -> DeepseekV3Config:
    """Returns a configuration of two layers, the last of which has experts in groups."""
    settings = {
        **_SMALL,
        "intermediate_size": 256,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_nextn_predict_layers": 1,
        "num_key_value_heads": 4,
        "q_lora_rank": 64,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 48,
        "first_k_dense_replace": 1,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "routed_scaling_factor": 2.5,
        "n_group": 2,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
    }
    return DeepseekV3Config(**settings | changes)


def make_deepseek_v3(folder: Path) -> None:
    """Writes a bfloat16 DeepSeek V3, without what predicts further tokens."""
    torch.manual_seed(DEEPSEEK_V3_SEED)
    save(with_norms(DeepseekV3ForCausalLM(deepseek_v3_config())), folder)


def with_norms(model: PreTrainedModel) -> PreTrainedModel:
    """Returns a model without constants, which would be there in a client that did not get them."""
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            torch.nn.init.uniform_(buffer, 0.0, 0.2)
    return model


def save(model: PreTrainedModel, folder: Path) -> None:
    """Writes a model with its tokenizer and its reference."""
    model.bfloat16().save_pretrained(folder)
    make_tokenizer(model.config.vocab_size).save_pretrained(folder)
    write_reference(folder, load(folder))


def make_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """Returns a tokenizer whose text for token 7 is t7."""
    names = [*SPECIAL_TOKENS, *(f"t{i}" for i in range(len(SPECIAL_TOKENS), size))]
    unk, bos, eos = SPECIAL_TOKENS
    words = models.WordLevel({name: i for i, name in enumerate(names)}, unk_token=unk)
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=unk, bos_token=bos, eos_token=eos
    )


def load(folder: Path) -> PreTrainedModel:
    """Returns the model on the CPU."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def generate(model: PreTrainedModel, count: int = TOKENS) -> list[list[int]]:
    """Returns the greedy tokens after each prompt."""
    outputs = (
        model.generate(
            torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=None
        )
        for prompt in PROMPTS
    )
    return [out[0, len(prompt) :].tolist() for prompt, out in zip(PROMPTS, outputs, strict=True)]


def write_reference(folder: Path, model: PreTrainedModel) -> None:
    """Writes what the model says."""
    tokens = generate(model)
    assert all(len(set(said)) > 1 for said in tokens), "a wrong weight would hardly show"
    (folder / REFERENCE).write_text(json.dumps({"prompts": PROMPTS, "tokens": tokens}))


def projections(model: PreTrainedModel) -> dict[str, torch.nn.Module]:
    """Returns the layers that are quantized, but for the experts."""
    return {
        name: module
        for name, module in model.named_modules()
        # MLA takes this one apart, which vLLM Ascend does not do with int8.
        if name.endswith(("_proj", "_proj_with_mqa")) and not name.endswith("kv_b_proj")
    }


def experts(model: PreTrainedModel) -> dict[str, torch.nn.Module]:
    """Returns the layers that have experts."""
    return {name: module for name, module in model.named_modules() if name.endswith(".experts")}


def calibrate(model: PreTrainedModel) -> dict[str, float]:
    """Returns the largest input of each projection."""
    largest = dict.fromkeys(projections(model), 0.0)
    for name, module in projections(model).items():

        def see(module, inputs, name=name):
            largest[name] = max(largest[name], float(inputs[0].abs().max()))

        module.register_forward_pre_hook(see)
    generate(model)
    return largest


def make_quantized(plain: Path, folder: Path, kind: str, kind_of_experts: str = "") -> None:
    """Writes a version in integers, and what it says.

    Args:
        plain: the model's folder.
        folder: to write to.
        kind: of the projections: W8A8, with scales of the activations, or W8A8_DYNAMIC, without.
        kind_of_experts: W8A8_DYNAMIC or W4A8_DYNAMIC, if there are any.
    """
    shutil.copytree(plain, folder)
    model = load(plain)
    largest = calibrate(model)
    layers_of_experts = tuple(f"{name}." for name in experts(model))
    tensors = {}
    description = {"model_quant_type": kind, "version": "1.0.0", "group_size": 0}
    for name, weight in load_file(plain / WEIGHTS).items():
        layer = name.removesuffix(".weight")
        if layer in largest:
            made, made_as = in_int8(weight), kind
            if kind == "W8A8":
                made |= with_static_scales(made["weight_scale"], largest[layer])
        elif layers_of_experts and layer.startswith(layers_of_experts):
            made_as = kind_of_experts
            made = in_int4(weight) if kind_of_experts == "W4A8_DYNAMIC" else in_int8(weight)
        else:
            tensors[name], description[name] = weight, "FLOAT"
            continue
        tensors |= {f"{layer}.{key}": tensor for key, tensor in made.items()}
        description |= {f"{layer}.{key}": made_as for key in made}
    write_quantized(folder, tensors, description)
    write_reference(folder, quantized_model(plain, tensors, kind))


def write_quantized(
    folder: Path, tensors: Mapping[str, torch.Tensor], description: Mapping[str, object]
) -> None:
    """Writes a quantized model's tensors and what each of them is."""
    save_file(dict(tensors), folder / WEIGHTS, metadata={"format": "pt"})
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=1))


def in_int8(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns a matrix with a scale for each row."""
    scale = weight.float().abs().amax(1, keepdim=True) / 127
    return {
        "weight": (weight.float() / scale).round().clamp(-127, 127).to(torch.int8),
        "weight_scale": scale.bfloat16(),
        "weight_offset": torch.zeros_like(scale).bfloat16(),
    }


def with_static_scales(weight_scale: torch.Tensor, largest: float) -> dict[str, torch.Tensor]:
    """Returns what a projection with a fixed scale for its inputs has besides."""
    input_scale = torch.tensor([largest / 127]).bfloat16()
    return {
        "input_scale": input_scale,
        "input_offset": torch.zeros(1, dtype=torch.int8),
        "quant_bias": torch.zeros(len(weight_scale), dtype=torch.int32),
        "deq_scale": weight_scale[:, 0].float() * input_scale.float(),
    }


def in_int4(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns a matrix of int4 with a scale for each row; two rows share their bytes.

    The operator multiplies by inputs that are 8 less, so that there is a correction for each row,
    in a sum of 16 where ranks divide the columns.
    """
    scale = weight.float().abs().amax(1, keepdim=True) / 7
    values = (weight.float() / scale).round().clamp(-7, 7).to(torch.int8)
    low, high = values[::2], values[1::2]
    parts = 16 if weight.shape[0] > weight.shape[1] else 1
    correction = 8 * (values * scale).unflatten(1, (parts, -1)).sum(-1)
    return {
        "weight": high << 4 | low & 15,
        "weight_scale": scale,
        "weight_offset": torch.zeros_like(scale),
        "scale_bias": correction,
    }


Integers = Callable[[str], tuple[torch.Tensor, torch.Tensor]]


def quantized_model(plain: Path, tensors: Mapping[str, torch.Tensor], kind: str) -> PreTrainedModel:
    """Returns the model with layers that compute with integers, as the NPU's operators do."""
    model = load(plain)

    @functools.cache
    def integers(layer: str) -> tuple[torch.Tensor, torch.Tensor]:
        weight, scale = tensors[f"{layer}.weight"], tensors[f"{layer}.weight_scale"].float()[:, 0]
        if f"{layer}.scale_bias" in tensors:
            weight = torch.stack([weight << 4 >> 4, weight >> 4], 1).flatten(0, 1)
        return weight.double(), scale

    def projection(layer: str) -> Callable[[torch.Tensor], torch.Tensor]:
        def multiply(x: torch.Tensor) -> torch.Tensor:
            weight, scale = integers(layer)
            if kind == "W8A8":
                x = x.float() / tensors[f"{layer}.input_scale"].float()
                sums = (x.round().clamp(-128, 127).double() @ weight.T).float()
                return (sums * tensors[f"{layer}.deq_scale"]).bfloat16()
            return product(x, weight, scale).bfloat16()

        return multiply

    for name, module in projections(model).items():
        module.forward = projection(name)
    for name, module in experts(model).items():
        module.forward = of_experts(name, integers)
    return model


def product(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Quantizes each row of the input, multiplies, and scales."""
    x = x.float()
    input_scale = x.abs().amax(-1, keepdim=True) / 127
    sums = ((x / input_scale).round().double() @ weight.T).float()
    return sums * scale * input_scale


def of_experts(layer: str, integers: Integers) -> Callable[..., torch.Tensor]:
    """Returns what stands in for the forward of a layer of experts."""

    def forward(x: torch.Tensor, chosen: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(x.shape)
        for expert in chosen.unique().tolist():
            token, place = (chosen == expert).nonzero(as_tuple=True)
            gate, up, down = (
                integers(f"{layer}.{expert}.{part}_proj") for part in ("gate", "up", "down")
            )
            inner = torch.nn.functional.silu(product(x[token], *gate)) * product(x[token], *up)
            share = shares[token, place, None].bfloat16().float()
            total.index_add_(0, token, product(inner, *down).bfloat16().float() * share)
        return total.to(x.dtype)

    return forward


def add_draft(plain: Path, folder: Path) -> None:
    """Adds to a quantized DeepSeek V3 the layer that foresees one token more, in bfloat16.

    Its decoder layer is random and says little. What it foresees comes from the matrix before it,
    fitted to what the model says after the prompts.
    """
    with tempfile.TemporaryDirectory() as temporary:
        config = deepseek_v3_config(num_hidden_layers=1, first_k_dense_replace=0)
        with_norms(DeepseekV3ForCausalLM(config)).bfloat16().save_pretrained(temporary)
        of_layer = load_file(Path(temporary) / WEIGHTS)
    tensors, description = (
        load_file(folder / WEIGHTS),
        json.loads((folder / DESCRIPTION).read_text()),
    )
    number = deepseek_v3_config().num_hidden_layers
    layer = f"model.layers.{number}"
    size = deepseek_v3_config().hidden_size
    draft = {
        name.replace("model.layers.0", layer): weight
        * (0.1 if "down" in name or "o_proj" in name else 1)
        for name, weight in of_layer.items()
        if name.startswith("model.layers.0.")
    } | {
        f"{layer}.embed_tokens.weight": tensors["model.embed_tokens.weight"].clone(),
        f"{layer}.shared_head.head.weight": tensors["lm_head.weight"].clone(),
        f"{layer}.shared_head.norm.weight": torch.ones(size, dtype=torch.bfloat16),
        f"{layer}.enorm.weight": torch.empty(size).uniform_(0.5, 1.5).bfloat16(),
        f"{layer}.hnorm.weight": torch.empty(size).uniform_(0.5, 1.5).bfloat16(),
    }
    model = quantized_model(plain, tensors, "W8A8_DYNAMIC")
    inputs, outputs = [], []
    for prompt, said in zip(PROMPTS, generate(model, FORESEEN), strict=True):
        tokens = torch.tensor([[*prompt, *said]])
        with torch.no_grad():
            hidden = model.model(tokens).last_hidden_state[0].float()
            embedded = model.model.embed_tokens(tokens)[0].float()
        of_token = normed(embedded[1:], draft[f"{layer}.enorm.weight"])
        before = normed(hidden[:-1], draft[f"{layer}.hnorm.weight"])
        inputs.append(torch.cat([of_token, before], 1))
        outputs.append(hidden[1:])
    fitted = torch.linalg.lstsq(torch.cat(inputs), torch.cat(outputs), driver="gelsd").solution
    draft[f"{layer}.eh_proj.weight"] = fitted.T.bfloat16()
    tensors |= {name: weight.contiguous() for name, weight in draft.items()}
    write_quantized(folder, tensors, description | dict.fromkeys(draft, "FLOAT"))


def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Returns the RMS norm."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight.float()


def make_all(folder: Path) -> None:
    """Writes the models."""
    plain = folder / "plain"
    make_plain(plain)
    make_mla_moe(folder / "mla_moe")
    make_quantized(plain, folder / "w8a8", "W8A8")
    make_quantized(plain, folder / "w8a8_dynamic", "W8A8_DYNAMIC")
    with tempfile.TemporaryDirectory() as temporary:
        qwen3_moe, deepseek_v3 = Path(temporary, "qwen3_moe"), Path(temporary, "deepseek_v3")
        make_qwen3_moe(qwen3_moe)
        make_quantized(qwen3_moe, folder / "qwen3_moe", "W8A8_DYNAMIC", "W8A8_DYNAMIC")
        make_deepseek_v3(deepseek_v3)
        make_quantized(deepseek_v3, folder / "deepseek_v3", "W8A8_DYNAMIC", "W8A8_DYNAMIC")
        add_draft(deepseek_v3, folder / "deepseek_v3")
        make_quantized(deepseek_v3, folder / "deepseek_w4a8", "W8A8_DYNAMIC", "W4A8_DYNAMIC")


if __name__ == "__main__":
    make_all(Path(sys.argv[1]))
