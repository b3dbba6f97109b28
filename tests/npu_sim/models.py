"""Makes tiny models for vLLM Ascend, with what a CPU says to them.

``python models.py FOLDER`` writes FOLDER/plain, FOLDER/mla_moe, FOLDER/w8a8 and
FOLDER/w8a8_dynamic; the last two in vLLM Ascend's quantized format (serve them with
``--quantization ascend``). Beside the weights of each lies reference.json: prompts as token ids,
and the greedy tokens that follow them. Run it as a script of its own, as it imports torch.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

PROMPTS = ([1, 2, 3, 4], [5, 6, 7], list(range(10, 40)))
TOKENS = 8
# With other seeds the two best tokens or experts are close somewhere, and rounding may choose the
# other.
SEED = 16
MLA_MOE_SEED = 1759
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")
WEIGHTS = "model.safetensors"
DESCRIPTION = "quant_model_description.json"
REFERENCE = "reference.json"


def make_plain(folder: Path, seed: int = SEED) -> None:
    """Writes a bfloat16 Llama of two layers."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.08,
        bos_token_id=1,
        eos_token_id=2,
        dtype="bfloat16",
    )
    save(LlamaForCausalLM(config), folder)


def make_mla_moe(folder: Path, seed: int = MLA_MOE_SEED) -> None:
    """Writes a bfloat16 DeepSeek V2 of three layers, the last two of which have experts."""
    torch.manual_seed(seed)
    config = DeepseekV2Config(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
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
        max_position_embeddings=256,
        initializer_range=0.08,
        bos_token_id=1,
        eos_token_id=2,
        dtype="bfloat16",
    )
    model = DeepseekV2ForCausalLM(config)
    for name, weight in model.named_parameters():
        if "norm" in name:  # ones would be there in a client, too, that did not get them
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    save(model, folder)


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


def generate(model: PreTrainedModel) -> list[list[int]]:
    """Returns the greedy tokens after each prompt."""
    outputs = (
        model.generate(
            torch.tensor([prompt]), max_new_tokens=TOKENS, do_sample=False, eos_token_id=None
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
    """Returns the layers that are quantized."""
    return {name: m for name, m in model.named_modules() if name.endswith("_proj")}


def calibrate(model: PreTrainedModel) -> dict[str, float]:
    """Returns the largest input of each projection."""
    largest = dict.fromkeys(projections(model), 0.0)
    for name, module in projections(model).items():

        def see(module, inputs, name=name):
            largest[name] = max(largest[name], float(inputs[0].abs().max()))

        module.register_forward_pre_hook(see)
    generate(model)
    return largest


def make_quantized(plain: Path, folder: Path, kind: str) -> None:
    """Writes an int8 version: W8A8 with scales of the activations, W8A8_DYNAMIC without."""
    shutil.copytree(plain, folder)
    largest = calibrate(load(plain))
    tensors = {}
    description = {"model_quant_type": kind, "version": "1.0.0", "group_size": 0}
    for name, weight in load_file(plain / WEIGHTS).items():
        layer = name.removesuffix(".weight")
        if layer not in largest:
            tensors[name], description[name] = weight, "FLOAT"
            continue
        scale = weight.float().abs().amax(1, keepdim=True) / 127
        made = {
            "weight": (weight.float() / scale).round().clamp(-127, 127).to(torch.int8),
            "weight_scale": scale.bfloat16(),
            "weight_offset": torch.zeros_like(scale).bfloat16(),
        }
        if kind == "W8A8":
            input_scale = torch.tensor([largest[layer] / 127]).bfloat16()
            made |= {
                "input_scale": input_scale,
                "input_offset": torch.zeros(1, dtype=torch.int8),
                "quant_bias": torch.zeros(len(weight), dtype=torch.int32),
                "deq_scale": scale[:, 0].bfloat16().float() * input_scale.float(),
            }
        tensors |= {f"{layer}.{key}": tensor for key, tensor in made.items()}
        description |= {f"{layer}.{key}": kind for key in made}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=1))
    write_reference(folder, int8_model(plain, tensors, kind))


def int8_model(plain: Path, tensors: dict[str, torch.Tensor], kind: str) -> PreTrainedModel:
    """Returns the model with projections that compute with int8, as the NPU's operators do."""
    model = load(plain)

    def forward(layer):
        def multiply(x):
            x = x.float()
            weight = tensors[f"{layer}.weight"].double()
            if kind == "W8A8":
                quantized = (x / tensors[f"{layer}.input_scale"].float()).round().clamp(-128, 127)
                return ((quantized.double() @ weight.T).float() * deq_scale(layer)).bfloat16()
            input_scale = x.abs().amax(-1, keepdim=True) / 127
            y = ((x / input_scale).round().double() @ weight.T).float()
            return (y * tensors[f"{layer}.weight_scale"].float()[:, 0] * input_scale).bfloat16()

        return multiply

    def deq_scale(layer):
        return tensors[f"{layer}.deq_scale"]

    for name, module in projections(model).items():
        module.forward = forward(name)
    return model


def make_all(folder: Path) -> None:
    """Writes the four models."""
    plain = folder / "plain"
    make_plain(plain)
    make_mla_moe(folder / "mla_moe")
    make_quantized(plain, folder / "w8a8", "W8A8")
    make_quantized(plain, folder / "w8a8_dynamic", "W8A8_DYNAMIC")


if __name__ == "__main__":
    make_all(Path(sys.argv[1]))
