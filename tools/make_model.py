"""Makes small random models on disk, so that tests and the demo need no model hub.

``python -m tools.make_model PATH --arch llama --size small --seed 0`` writes a model folder that
``vllm serve`` accepts. The same arguments give the same bytes. The tokenizer knows one word per
token, so that text made of its words survives encoding and decoding, and the text of a token names
the token.
"""

import argparse
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
)

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")
SYLLABLES = [consonant + vowel for consonant in "bdfghklmnprstvwz" for vowel in "aeiou"]
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".safetensors.index.json")
INT8_MAX = 127
ADAPTER_RANK = 8


@dataclass(frozen=True)
class Size:
    """The dimensions that all architectures share."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int


SIZES = {
    "tiny": Size(hidden=256, intermediate=512, layers=3, heads=4, kv_heads=2, vocab=2048),
    "small": Size(hidden=512, intermediate=1408, layers=8, heads=8, kv_heads=4, vocab=2048),
    "medium": Size(hidden=1024, intermediate=4096, layers=14, heads=16, kv_heads=8, vocab=8192),
    "large": Size(hidden=2048, intermediate=8192, layers=12, heads=32, kv_heads=8, vocab=48000),
}


def _shared(size: Size) -> dict[str, Any]:
    return {
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "head_dim": size.hidden // size.heads,
        "vocab_size": size.vocab,
        "max_position_embeddings": 2048,
        "bos_token_id": SPECIAL_TOKENS.index("<s>"),
        "eos_token_id": SPECIAL_TOKENS.index("</s>"),
        "tie_word_embeddings": False,
    }


def _llama(size: Size) -> PretrainedConfig:
    return LlamaConfig(**_shared(size))


def _llama_tied(size: Size) -> PretrainedConfig:
    return LlamaConfig(**_shared(size) | {"tie_word_embeddings": True})


def _moe(size: Size) -> PretrainedConfig:
    experts = 4
    return Qwen3MoeConfig(
        **_shared(size),
        num_experts=experts,
        num_experts_per_tok=2,
        moe_intermediate_size=size.intermediate // experts,
    )


CONFIGS: dict[str, Callable[[Size], PretrainedConfig]] = {
    "llama": _llama,
    "llama-tied": _llama_tied,
    "moe": _moe,
    "w8a8-dynamic": _llama,
    "w8a8-static": _llama,
}


def make_model(path: Path, arch: str = "llama", size: str = "small", seed: int = 0) -> None:
    """Writes a random model with its configuration and tokenizer.

    Args:
        path: Folder to write to; made when missing.
        arch: One of ``CONFIGS``.
        size: One of ``SIZES``.
        seed: The same seed gives the same weights.
    """
    transformers.utils.logging.disable_progress_bar()
    config = CONFIGS[arch](SIZES[size])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.to_empty(device="cpu")
    model.tie_weights()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        _fill(parameter.data, generator)
    path.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(path)
    _make_tokenizer(config.vocab_size).save_pretrained(path)
    if arch.startswith("w8a8-"):
        _quantize(path, static=arch == "w8a8-static", generator=generator)


def _fill(tensor: torch.Tensor, generator: torch.Generator) -> None:
    """Fills a parameter so that greedy output varies instead of repeating one token.

    Dividing by the fan-in keeps every layer's output about as large as its input, at any size. The
    factor of 3 makes the layers, not the input embedding, decide the next token, and keeps the
    best token well ahead of bfloat16's rounding. One-dimensional parameters are norm weights: their
    random signs keep a tied output layer from favouring the token that was just read.
    """
    fan_in = tensor.shape[-1] if tensor.dim() > 1 else 1
    gain = 3.0 if tensor.dim() > 1 else 1.0
    tensor.normal_(0.0, gain / fan_in**0.5, generator=generator)


def _make_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    tokens = [*SPECIAL_TOKENS, *map(_word, range(vocab_size - len(SPECIAL_TOKENS)))]
    tokenizer = Tokenizer(
        WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=SPECIAL_TOKENS[0])
    )
    tokenizer.pre_tokenizer = WhitespaceSplit()
    unk, bos, eos = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=unk,
        bos_token=bos,
        eos_token=eos,
        clean_up_tokenization_spaces=False,
    )


def _word(number: int) -> str:
    word = ""
    while number or len(word) < 4:
        number, digit = divmod(number, len(SYLLABLES))
        word = SYLLABLES[digit] + word
    return word


def _quantize(path: Path, static: bool, generator: torch.Generator) -> None:
    """Turns a saved model's linear layers into compressed-tensors int8 W8A8."""
    file = path / "model.safetensors"
    tensors = load_file(file)
    for name, weight in list(tensors.items()):
        if not name.endswith("_proj.weight"):
            continue
        layer = name.removesuffix(".weight")
        scale = weight.float().abs().amax(dim=1, keepdim=True) / INT8_MAX
        tensors[name] = (weight.float() / scale).round().to(torch.int8)
        tensors[f"{layer}.weight_scale"] = scale
        if static:
            # Clipping some inputs does a random model no harm. The scale differs from layer to
            # layer, so that a loader that mixes the scales up changes the output.
            spread = torch.rand(1, generator=generator)
            tensors[f"{layer}.input_scale"] = (5.0 + 3.0 * spread) / INT8_MAX
    save_file(tensors, file, metadata={"format": "pt"})

    config_file = path / "config.json"
    config = json.loads(config_file.read_text())
    config["quantization_config"] = _quantization_config(static)
    config_file.write_text(json.dumps(config, indent=2))


def _quantization_config(static: bool) -> dict[str, Any]:
    int8 = {"num_bits": 8, "type": "int", "symmetric": True}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": int8 | {"strategy": "channel", "dynamic": False},
                "input_activations": int8
                | {"strategy": "tensor" if static else "token", "dynamic": not static},
            }
        },
    }


def make_adapter(path: Path, model: Path) -> None:
    """Writes a random LoRA adapter for a model, the same one each time."""
    path.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    adapted = ("q_proj", "v_proj", "o_proj", "down_proj")
    tensors = {}
    for name, weight in load_file(model / "model.safetensors").items():
        layer = name.removesuffix(".weight")
        if layer.endswith(adapted):
            outputs, inputs = weight.shape
            for half, shape in ("A", (ADAPTER_RANK, inputs)), ("B", (outputs, ADAPTER_RANK)):
                tensor = torch.randn(shape, generator=generator) / shape[1] ** 0.5
                tensors[f"base_model.model.{layer}.lora_{half}.weight"] = tensor
    save_file(tensors, path / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": ADAPTER_RANK,
        "lora_alpha": 2 * ADAPTER_RANK,
        "target_modules": adapted,
        "bias": "none",
    }
    (path / "adapter_config.json").write_text(json.dumps(config))


def copy_without_weights(source: Path, destination: Path) -> None:
    """Copies a model folder but no weight file: what a client of a network loader has on disk."""
    # A clone from a model hub has the weights a second time, in .git.
    weights = shutil.ignore_patterns(".git", *(f"*{suffix}" for suffix in WEIGHT_SUFFIXES))
    shutil.copytree(source, destination, ignore=weights, dirs_exist_ok=True)


def main() -> None:
    """Makes one model from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("path", type=Path)
    parser.add_argument("--arch", choices=sorted(CONFIGS), default="llama")
    parser.add_argument("--size", choices=sorted(SIZES), default="small")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    make_model(arguments.path, arguments.arch, arguments.size, arguments.seed)


if __name__ == "__main__":
    main()
