"""A process that loads models as workers do; the Hub's settings are read when it is imported.

For each line on stdin, the arguments of `make_config` as JSON, it loads a model, keeps it and
answers with a line on stdout: what NetLoader logged, and what the model then has.
"""

import hashlib
import json
import logging
import os
import sys
from typing import Any

import torch
from torch import nn

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # vLLM logs to stdout

from tests.e2e.loading import load, make_config  # noqa: E402


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def main() -> None:
    models: list[nn.Module] = []  # those that are served as long as this process lives
    handler = _Lines()
    for line in sys.stdin:
        handler.lines = []
        config = make_config(**json.loads(line))
        logging.getLogger("vllm.netloader").addHandler(handler)
        models.append(load(config))
        embeddings = models[-1].get_parameter("model.embed_tokens.weight")
        answer: dict[str, Any] = {
            "model": config.model_config.model,
            "lines": handler.lines,
            "embeddings": hashlib.sha256(
                embeddings.detach().view(torch.uint8).numpy().tobytes()
            ).hexdigest(),
        }
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
