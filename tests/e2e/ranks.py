"""Two processes that are the ranks of instances, without an engine."""

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from vllm_ascend.model_loader.netloader.interaction.elastic import ElasticClient
from vllm_ascend.model_loader.netloader.utils import parse_address

from .views import View, load_view


class Pair:
    """Two processes: the ranks of every instance here.

    Args:
        folder: for what they write.
        environment: what they have in it besides.
    """

    def __init__(self, folder: Path, **environment: str) -> None:
        self.folder = folder
        self.names = iter(range(10**6))
        self.ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.e2e.ranks_process", str(rank), str(folder / "meet")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=(folder / f"log{rank}.txt").open("w"),
                # Different ones, so that vLLM's ranks share no memory that outlives them.
                env=os.environ | {"VLLM_DIST_IDENT": str(rank)} | environment,
                text=True,
            )
            for rank in (0, 1)
        ]

    def close(self) -> None:
        """Let both end, at once if need be."""
        for rank in self.ranks:
            assert rank.stdin is not None
            rank.stdin.close()
        for rank in self.ranks:
            with contextlib.suppress(subprocess.TimeoutExpired):
                rank.wait(30)
        self.kill()

    def kill(self) -> None:
        for rank in self.ranks:
            rank.kill()
            rank.wait()

    def do(self, order: dict[str, Any], only_first: dict[str, Any] | None = None) -> "Outcome":
        """Let both ranks do the same, but for what is another thing at the first."""
        for rank, changes in zip(self.ranks, (only_first or {}, {}), strict=True):
            assert rank.stdin is not None
            rank.stdin.write(json.dumps(order | changes) + "\n")
            rank.stdin.flush()
        answers = []
        for rank in self.ranks:
            assert rank.stdout is not None
            line = rank.stdout.readline()
            assert line, "a rank has died: see its log"
            answers.append(json.loads(line))
        return Outcome(order["name"], answers, self.folder / order["name"])

    def load(self, path: Path, only_first: dict[str, Any] | None = None, **extra: Any) -> "Outcome":
        name = f"i{next(self.names)}"
        given = {"name": name, "path": str(path), "MODEL": "m"}
        prefix = {"OUTPUT_PREFIX": str(self.folder / name)}
        return self.do(given | prefix | extra, only_first)

    def view(self, path: Path, **engine: Any) -> list[View]:
        """Watch how a checkpoint is loaded, with weights and without, by an instance cut so."""
        name = f"i{next(self.names)}"
        order = {"name": name, "path": str(path), "view": str(self.folder / name)}
        outcome = self.do(order | engine)
        assert outcome.errors == ["", ""], outcome.errors
        ranks = engine.get("tp", 1) * engine.get("pp", 1)
        return [load_view(f"{self.folder / name}{rank}.pt") for rank in range(ranks)]

    def reload(self, loaded: "Outcome", **extra: Any) -> "Outcome":
        return self.do({"name": loaded.name, "reload": True} | extra)


class Outcome:
    """What both ranks have said."""

    def __init__(self, name: str, answers: list[dict[str, Any]], prefix: Path) -> None:
        self.name = name
        self.errors = [answer["error"] for answer in answers]
        self.lines = [line for answer in answers for line in answer["lines"]]
        self.has = [answer.get("has") for answer in answers]
        self.prefix = prefix

    def address(self, rank: int) -> str:
        return Path(f"{self.prefix}{rank}.txt").read_text()

    def said(self, pattern: str) -> list[str]:
        return [found[0] for line in self.lines if (found := re.search(pattern, line))]

    def status(self, rank: int) -> Any:
        return status_at(self.address(rank))


def status_at(address: str) -> Any:
    """Return what a rank says of its model."""
    deadlines: dict[str, Any] = {"connect": 5.0, "handshake": 5.0, "progress": 5.0}
    with ElasticClient.connect(parse_address(address), **deadlines) as client:
        return client.status().models[0]
