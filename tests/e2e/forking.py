"""Starts `vllm serve` with vLLM imported already, which is most of an instance's start."""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil

from tools.vllm_server import ENVIRONMENT, Launch

_FORKS = Path(__file__).with_name("forks.py")


def forking(*modules: str, environment: Callable[[], Mapping[str, str]] = dict) -> Launch:
    """Returns what does as tools.vllm_server.launch does, from one process.

    Args:
        modules: imported there, beside the command line of vLLM.
        environment: changes of it for these imports.
    """

    @functools.cache
    def parent() -> subprocess.Popen[str]:
        # It ends when this process does.
        return subprocess.Popen(
            [sys.executable, "-P", str(_FORKS), *modules],
            env=os.environ | ENVIRONMENT | dict(environment()),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def fork(command: list[str], environment: dict[str, str], log: Path) -> psutil.Process:
        orders, answers = parent().stdin, parent().stdout
        assert orders
        assert answers
        print(json.dumps([command, environment, str(log)]), file=orders, flush=True)
        answer = answers.readline()
        assert answer, f"{_FORKS.name} ended before it started an instance; its error is above"
        return psutil.Process(int(answer))

    return fork
