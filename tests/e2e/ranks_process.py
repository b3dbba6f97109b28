"""A process that is one rank of instances of two, which load models as workers do.

For each line on stdin it loads a model and keeps it by its name, or reloads it in place, or watches
how it is loaded from disk, and answers with a line on stdout: the error if there was one, what
NetLoader logged, and what the model then has. The first argument is the rank, the second a file at
which both meet.
"""

import hashlib
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # vLLM logs to stdout

from vllm.config import VllmConfig  # noqa: E402

from tests.e2e.hub_process import _Lines  # noqa: E402
from tests.e2e.loading import make_config, worker  # noqa: E402
from tests.e2e.views import watch  # noqa: E402
from vllm_ascend.model_loader.netloader.executor.model.raw import raw_tensors  # noqa: E402


def main(rank: int, meeting: Path) -> None:
    models: dict[str, tuple[nn.Module, VllmConfig]] = {}
    handler = _Lines()
    for line in sys.stdin:
        order = json.loads(line)
        name, handler.lines = order.pop("name"), []
        answer: dict[str, Any] = {"error": ""}
        try:
            if view := order.pop("view", ""):
                seen = []
                for device in ("cpu", "meta"):
                    config = make_config(load_format="auto", **order)
                    with worker(config, rank, meeting) as loader:
                        seen += watch(loader, config, device)
                torch.save(seen[:3], f"{view}{rank}.pt")
            elif order.pop("reload", False):
                model, config = models[name]
                config.load_config.model_loader_extra_config |= order
                with worker(config, rank, meeting) as loader:
                    loader.load_weights(model, config.model_config)
            else:
                config = make_config(**order)
                logging.getLogger("vllm.netloader").addHandler(handler)
                with worker(config, rank, meeting) as loader:
                    model = loader.load_model(vllm_config=config, model_config=config.model_config)
                models[name] = model, config
        except Exception as error:
            answer["error"] = f"{type(error).__name__}: {error}"
        if name in models:
            answer["has"] = contents(models[name][0])
        print(json.dumps(answer | {"lines": handler.lines}), file=answers, flush=True)


def contents(model: nn.Module) -> str:
    """Return a digest of those of a model's tensors that no kernel has packed away."""
    whole = hashlib.sha256()
    for name, tensor in sorted(raw_tensors(model)[0].items()):
        if tensor.is_floating_point() and tensor.numel():
            whole.update(name.encode())
            plain = tensor.detach().contiguous().view(-1).view(torch.uint8)
            whole.update(plain.numpy().tobytes())
    return whole.hexdigest()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
