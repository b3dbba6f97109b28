"""Small random models of every kind that the proof has a row for, made on disk."""

import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

from tools.make_model import _make_tokenizer

DENSE_WIDTH = 64
ADAPTER = "adapter"
_SIZES = {"vocab_size": 1024, "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
OTHERS: dict[str, transformers.PretrainedConfig] = {
    "qwen3-tied": transformers.Qwen3Config(
        **_SIZES,
        intermediate_size=512,
        num_key_value_heads=2,
        head_dim=64,
        tie_word_embeddings=True,
    ),
    "mixtral": transformers.MixtralConfig(
        **_SIZES,
        intermediate_size=256,
        num_key_value_heads=2,
        num_local_experts=4,
    ),
    "gemma2": transformers.Gemma2Config(
        **_SIZES,
        intermediate_size=512,
        num_key_value_heads=2,
        head_dim=64,
    ),
    "opt": transformers.OPTConfig(
        **_SIZES,
        ffn_dim=512,
        max_position_embeddings=512,
        word_embed_proj_dim=256,
    ),
    "gpt2": transformers.GPT2Config(
        vocab_size=1024, n_embd=256, n_layer=2, n_head=4, n_positions=512
    ),
    "deepseek-v2": transformers.DeepseekV2Config(
        **_SIZES,
        intermediate_size=512,
        moe_intermediate_size=128,
        num_key_value_heads=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        first_k_dense_replace=1,
        kv_lora_rank=512,
        q_lora_rank=None,
        qk_rope_head_dim=64,
        qk_nope_head_dim=128,
        v_head_dim=128,
        topk_group=1,
        n_group=1,
    ),
}


def make_other(
    path: Path, config: transformers.PretrainedConfig, seed: int, kind: type | None = None
) -> None:
    """Writes a random model that transformers knows, in bfloat16, with a tokenizer."""
    torch.manual_seed(seed)
    make = kind or transformers.AutoModelForCausalLM.from_config
    model = make(config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        # Unlike those that transformers begins with, these give answers that differ.
        gain = 3.0 / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 1.0
        parameter.data.normal_(0.0, gain, generator=generator)
    model.to(torch.bfloat16).save_pretrained(path)
    _make_tokenizer(config.vocab_size).save_pretrained(path)


def change_config(path: Path, **settings: object) -> None:
    """Sets settings of a model folder's configuration."""
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def make_four_bit(path: Path, seed: int, method: str) -> None:
    """Puts random 4-bit weights in the place of those of a model's linear layers."""
    generator = torch.Generator().manual_seed(seed)
    file = path / "model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        outputs, inputs = tensors.pop(name).shape
        layer, groups = name.removesuffix(".weight"), inputs // GROUP

        def packed(*shape: int) -> torch.Tensor:
            return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, generator=generator)

        scales = torch.rand(groups, outputs, generator=generator).mul(0.02).to(torch.bfloat16)
        if method == "awq":
            tensors[f"{layer}.qweight"] = packed(inputs, outputs // 8)
            tensors[f"{layer}.qzeros"] = packed(groups, outputs // 8)
            tensors[f"{layer}.scales"] = scales
        else:
            tensors[f"{layer}.weight_packed"] = packed(outputs, inputs // 8)
            tensors[f"{layer}.weight_scale"] = scales.t().contiguous()
            tensors[f"{layer}.weight_shape"] = torch.tensor([outputs, inputs])
    save_file(tensors, file, metadata={"format": "pt"})
    change_config(path, quantization_config=AWQ if method == "awq" else W4A16)


GROUP = 128
AWQ = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": GROUP,
    "zero_point": True,
    "version": "gemm",
    "modules_to_not_convert": ["lm_head"],
}
W4A16 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 4,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": GROUP,
                "dynamic": False,
            },
            "input_activations": None,
        }
    },
}


def add_dense(path: Path, seed: int = 0) -> None:
    """Gives a model folder the Sentence-Transformers Dense module that embedding models have."""
    hidden = json.loads((path / "config.json").read_text())["hidden_size"]
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Dense": "Dense"}
    modules = [
        {"idx": i, "name": str(i), "path": folder, "type": f"sentence_transformers.models.{kind}"}
        for i, (folder, kind) in enumerate(kinds.items())
    ]
    pooling = {"word_embedding_dimension": hidden, "pooling_mode_mean_tokens": True}
    dense = {
        "in_features": hidden,
        "out_features": DENSE_WIDTH,
        "bias": False,
        "activation_function": "torch.nn.modules.linear.Identity",
    }
    (path / "modules.json").write_text(json.dumps(modules))
    for folder, config in {"1_Pooling": pooling, "2_Dense": dense}.items():
        (path / folder).mkdir(exist_ok=True)
        (path / folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(DENSE_WIDTH, hidden, generator=generator)
    save_file({"linear.weight": weight}, path / "2_Dense/model.safetensors")
