"""Running instances as the end-to-end tests speak of them."""

import json
import os
import ssl
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from prometheus_client.parser import text_string_to_metric_families

from tools.netloader_view import Load, find_loads, find_sent, read_address
from tools.vllm_server import Completion, Launch, VllmServer

from .forking import forking

fork = forking("vllm.entrypoints.cli.serve")

PROMPTS = ("baba", "bebe dodu fafe", "gage gigo gugo hahe hiho")
TOKENS = 32
FROM_DISK = r"NetLoader rank \d+: trying the disk, as no source gave the weights: (.*)"


@dataclass(frozen=True)
class Model:
    """A model folder, and a copy of it without weight files."""

    full: Path
    bare: Path


@dataclass(frozen=True)
class Instance:
    """A `vllm serve` that runs with the netloader."""

    server: VllmServer
    prefix: Path

    def address(self, rank: int = 0) -> str:
        return read_address(self.prefix, rank)

    def address_file(self, rank: int = 0) -> Path:
        return Path(f"{self.prefix}{rank}.txt")

    def say(self) -> list[Completion]:
        return [self.server.complete(prompt, TOKENS) for prompt in PROMPTS]

    def say_with(self, adapter: str) -> list[Completion]:
        """What it says with a LoRA adapter."""
        return [self.server.complete(prompt, TOKENS, adapter=adapter) for prompt in PROMPTS]

    def loads(self) -> list[Load]:
        return find_loads(self.server.read_log())

    def digests_sent(self) -> set[str]:
        sessions = find_sent(self.server.read_log())
        return {sent.digest for sent in sessions if sent.end == "complete"}

    def why_from_disk(self) -> str:
        """Returns the reasons in the log for trying the disk, empty if it did not."""
        match = self.server.search_log(FROM_DISK)
        return match[1] if match else ""


@contextmanager
def running(
    folder: Path,
    model: Path | str,
    config: dict[str, Any],
    *,
    arguments: Sequence[str] = (),
    environment: dict[str, str] | None = None,
    start: Launch = fork,
) -> Iterator[Instance]:
    """Runs an instance, ready to answer, whose files are in a folder made for it.

    It is forked from a process that has imported vLLM. With `launch` it starts as a user would
    start it, which takes six times as long; variables that an import reads need it.
    """
    folder.mkdir()
    prefix = folder / "rank"
    server = VllmServer(
        model,
        folder / "log.txt",
        extra_config={"OUTPUT_PREFIX": str(prefix), "SOURCE_WAIT": 0} | config,
        arguments=arguments,
        environment=environment,
        launch=start,
    )
    with server:
        yield Instance(server, prefix)


def metrics(address: str, token: str = "") -> dict[str, float]:
    """What Prometheus reads at a rank, summed over labels; with a token: inside TLS."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    request = Request(f"{'https' if token else 'http'}://{address}/metrics")
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    with urlopen(request, timeout=30, context=context) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    found: dict[str, float] = defaultdict(float)
    for sample in (sample for family in families for sample in family.samples):
        found[sample.name] += sample.value
    return found


COMMAND = (sys.executable, "-m", "vllm_ascend.model_loader.netloader")


@contextmanager
def holding(*what: str, environment: Mapping[str, str] | None = None) -> Iterator[str]:
    """Holds weights in a process without vLLM; yields its address.

    Args:
        what: the address of a rank of a running instance, or arguments of `hold`.
        environment: changes of it.
    """
    with subprocess.Popen(
        [*COMMAND, "hold", "--json", *what],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | dict(environment or {}),
    ) as holder:
        try:
            assert holder.stdout is not None
            yield next(iter(json.loads(holder.stdout.readline())))
        finally:
            holder.kill()


def drafting(draft: Path) -> str:
    """The argument of `vllm serve` for speculative decoding with a draft model."""
    config = {"method": "draft_model", "model": str(draft), "num_speculative_tokens": 2}
    return f"--speculative-config={json.dumps(config)}"
