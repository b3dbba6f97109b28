"""Small random models of every kind that the proof has a row for, made on disk."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

DENSE_WIDTH = 64


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
