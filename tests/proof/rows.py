"""The rows of the proof: which models, and what each is asked."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
import vllm
from packaging.version import Version
from vllm.platforms import current_platform

from tools.make_model import ADAPTER_RANK, make_adapter, make_model

from .models import (
    ADAPTER,
    OTHERS,
    add_dense,
    change_config,
    make_four_bit,
    make_other,
)

# Before, vLLM finds no layer behind that of a LoRA adapter when it loads a checkpoint.
LORA_RELOADS = Version(vllm.__version__) >= Version("0.28")
POOLING = {"runner": "pooling"}
FOUR_BIT = "cpu_gemm_wna16"
# Without, vLLM leaves the weights of linear layers where they are, and views of them stay right.
PACKED = torch.cpu._is_avx512_supported()


@dataclass(frozen=True)
class Row:
    """One kind of model.

    Attributes:
        name: of the row.
        make: writes the model of a seed into a folder.
        ask: what it is asked: `generate`, a task of pooling models, or nothing where the CPU has no
            kernels for it; then its tensors and the outputs of its linear layers are compared.
        engine: arguments of its engine.
        config: NetLoader's.
        reload: a part of the reason with which its reload in place may be refused; empty: none.
        from_disk: whether the first instance reloads from the disk of the second one at last.
        oldest: the vLLM before which it cannot run.
        operator: of vLLM's kernels, without which it cannot run; CPUs with AVX2 only have fewer.
    """

    name: str
    make: Callable[[Path, int], None]
    ask: str = "generate"
    engine: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    reload: str = ""
    from_disk: bool = False
    oldest: str = ""
    operator: str = ""

    @property
    def lacks(self) -> str:
        """Why this vLLM cannot run it on this CPU; empty: it can."""
        if self.oldest and Version(vllm.__version__) < Version(self.oldest):
            return f"this vLLM cannot run it on a CPU (from {self.oldest} on)"
        current_platform.import_kernels()
        if self.operator and not hasattr(torch.ops._C, self.operator):
            return f"this vLLM cannot run it on this CPU (no {self.operator})"
        return ""


def _standard(arch: str, path: Path, seed: int) -> None:
    make_model(path, arch, "tiny", seed)


def _adapted(path: Path, seed: int) -> None:
    make_model(path, "llama", "tiny", seed)
    make_adapter(path.parent / ADAPTER, path)


def _other(arch: str, path: Path, seed: int) -> None:
    make_other(path, OTHERS[arch], seed)


def _four_bit(method: str, path: Path, seed: int) -> None:
    make_model(path, "llama", "tiny", seed)
    make_four_bit(path, seed, method)


def _dense(path: Path, seed: int) -> None:
    make_model(path, "llama", "tiny", seed)
    add_dense(path, seed)


def _classifier(path: Path, seed: int) -> None:
    kind = transformers.Qwen3ForSequenceClassification
    config = transformers.Qwen3Config(**OTHERS["qwen3-tied"].to_dict() | {"num_labels": 3})
    config.pad_token_id = 0
    make_other(path, config, seed, kind)


def _reranker(tied: bool, path: Path, seed: int) -> None:
    config = transformers.Qwen3Config(
        **OTHERS["qwen3-tied"].to_dict() | {"tie_word_embeddings": tied}
    )
    make_other(path, config, seed)
    change_config(
        path,
        architectures=["Qwen3ForSequenceClassification"],
        classifier_from_token=["bebe", "dodu"],
        method="from_2_way_softmax",
        num_labels=1,
    )


def _bert(path: Path, seed: int) -> None:
    config = transformers.BertConfig(
        vocab_size=1024,
        hidden_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=512,
    )
    make_other(path, config, seed, transformers.BertModel)


def _whisper(path: Path, seed: int) -> None:
    config = transformers.WhisperConfig(
        vocab_size=1024,
        d_model=256,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=512,
        decoder_ffn_dim=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    make_other(path, config, seed, transformers.WhisperForConditionalGeneration)


def _mamba2(path: Path, seed: int) -> None:
    config = transformers.Mamba2Config(
        vocab_size=1024,
        hidden_size=256,
        state_size=64,
        num_hidden_layers=2,
        num_heads=8,
        head_dim=64,
        n_groups=1,
    )
    make_other(path, config, seed)


IN_PLACE = "in place on a CPU"
LORA = {"enable_lora": True, "max_loras": 1, "max_lora_rank": ADAPTER_RANK}
ROWS = [
    Row("Llama", partial(_standard, "llama")),
    Row("Llama, LoRA", _adapted, engine=LORA, reload="" if LORA_RELOADS else "cannot load"),
    Row("Qwen3, tied", partial(_other, "qwen3-tied")),
    Row("Qwen3-MoE", partial(_standard, "moe"), reload=IN_PLACE),
    Row("Gemma 2", partial(_other, "gemma2")),
    Row("OPT", partial(_other, "opt")),
    Row("GPT-2", partial(_other, "gpt2")),
    Row("Mixtral", partial(_other, "mixtral"), reload=IN_PLACE),
    Row("DeepSeek-V2, MLA", partial(_other, "deepseek-v2"), reload=IN_PLACE, oldest="0.28"),
    Row("W8A8, static", partial(_standard, "w8a8-static"), reload=IN_PLACE),
    Row("W8A8, dynamic", partial(_standard, "w8a8-dynamic"), reload=IN_PLACE),
    Row("AWQ", partial(_four_bit, "awq"), reload=IN_PLACE, operator=FOUR_BIT),
    Row("W4A16", partial(_four_bit, "w4a16"), reload=IN_PLACE, operator=FOUR_BIT),
    Row("classifier", _classifier, "classify", POOLING),
    Row("embedding, Dense", _dense, "embed", POOLING),
    Row("reranker", partial(_reranker, False), "classify", POOLING),
    Row("reranker, tied", partial(_reranker, True), "classify", POOLING),
    Row("BERT", _bert, "embed", POOLING),
    Row("Whisper", _whisper, ""),
    Row("Mamba-2", _mamba2, "", reload=IN_PLACE if PACKED else ""),
]
