"""Builds the simulated CANN and runs Python programs on it in processes of their own.

Nothing here imports torch or torch_npu: the process that runs the tests must work without CANN.
``python -m tests.npu_sim.simulator`` builds the libraries if needed and prints their folder, which
is what NPUSIM_LIB takes.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .cann.build import SITE_PACKAGES, SOURCES, build_into

HERE = Path(__file__).parent
CHILDREN = HERE / "children"
CACHE = HERE.parents[1] / ".venv" / "npu-sim"

ENVIRONMENT = {
    "NPU_SIM_DEVICES": "2",
    "NPU_SIM_HBM_MB": "8192",
    # Shorter than a test's patience, so that a hanging peer ends in an error that can be read.
    "HCCL_CONNECT_TIMEOUT": "20",
    "HCCL_EXEC_TIMEOUT": "20",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    # The environment is installed uncompiled; compiling it again in each process takes half a
    # minute.
    "PYTHONDONTWRITEBYTECODE": "",
    "PYTHONUNBUFFERED": "1",
}
# Of the caller's environment, these would change what a child imports or which devices it sees.
NOT_INHERITED = (
    "ASCEND_RT_VISIBLE_DEVICES",
    "NPU_SIM_FAULTS",
    "PYTHONPATH",
    "TORCH_DEVICE_BACKEND_AUTOLOAD",
)


def why_not() -> str | None:
    """Returns why the simulator cannot be used here, if it cannot."""
    for package in ("torch", "torch_npu"):
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return f"{package} is not installed (make test-npu has an environment that has it)"
    for program in ("g++", "nm"):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    return None


def build() -> Path:
    """Returns the folder of the libraries, built if the cache does not have them.

    Builders at the same time do not disturb each other: each builds in a folder of its own, and the
    first to finish gives it its name.
    """
    folder = CACHE / _key()
    if folder.is_dir():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="building-") as temporary:
        libraries = Path(temporary) / "libraries"
        build_into(libraries, Path(temporary))
        try:
            libraries.rename(folder)
        except OSError:
            if not folder.is_dir():  # it is if another builder was faster
                raise
    return folder


def _key() -> str:
    """Changes whenever the libraries would."""
    key = hashlib.sha256()
    for path in sorted(path for path in SOURCES.iterdir() if path.is_file()):
        key.update(path.read_bytes())
    for package in ("torch", "torch_npu"):
        key.update(importlib.metadata.version(package).encode())
    # The libraries know where torch's are.
    key.update(str(SITE_PACKAGES).encode())
    return key.hexdigest()[:16]


def environment(changes: Mapping[str, str] | None = None) -> dict[str, str]:
    """Returns the environment in which a Python process, and each of its children, has NPUs."""
    inherited = {name: v for name, v in os.environ.items() if name not in NOT_INHERITED}
    return inherited | ENVIRONMENT | {"NPUSIM_LIB": str(build())} | dict(changes or {})


@functools.cache
def case_names(script: str) -> list[str]:
    """Returns the names of the cases in a child script (see children/cases.py)."""
    return re.findall(r"^@case\ndef (\w+)", (CHILDREN / script).read_text(), re.MULTILINE)


@dataclass(frozen=True)
class Result:
    """How a child ended; ``code`` is negative for a signal, and None if it was too slow."""

    code: int | None
    output: str

    def check(self) -> "Result":
        """Fails with the child's output unless it ended well."""
        assert self.code == 0, f"{self}"
        return self

    def check_case(self, name: str) -> None:
        """Fails unless this case ran and passed."""
        cases = {
            line["case"]: line["error"]
            for line in map(json.loads, re.findall(r"^(\{\"case\".*)$", self.output, re.MULTILINE))
        }
        assert name in cases, f"{name} did not run\n{self}"
        assert cases[name] is None, f"{name}: {cases[name]}\n{self}"

    def __str__(self) -> str:
        how = "did not end in time" if self.code is None else f"ended with {self.code}"
        return f"the child {how}; its output:\n{self.output}"


class Child:
    """A Python process with NPUs. Its own children end with it."""

    def __init__(self, command: list[str], folder: Path, changes: Mapping[str, str] | None) -> None:
        # A file, not a pipe: nobody has to read it while the child runs.
        number, name = tempfile.mkstemp(suffix=".txt")
        self._output = Path(name)
        with os.fdopen(number, "wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, *command],
                # Not the repository's root, whose vllm_ascend would hide the installed one.
                cwd=folder,
                env=environment(changes),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return self._output.read_text(errors="replace")

    def wait(self, timeout: float = 60.0) -> Result:
        """Waits for the end, which comes at the timeout at the latest."""
        code: int | None = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self.process.wait(timeout)
        self.kill()
        return Result(code, self.output)

    def kill(self) -> None:
        """Ends the process and all of its group that are left."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Simulator:
    """Starts children, and kills those left over."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._children: list[Child] = []

    def start(self, script: str, *arguments: object, env: Mapping[str, str] | None = None) -> Child:
        """Starts a script of the folder ``children``."""
        command = [str(CHILDREN / script), *map(str, arguments)]
        return self._start(command, env)

    def start_code(self, code: str, env: Mapping[str, str] | None = None) -> Child:
        """Starts a program given as text."""
        return self._start(["-c", code], env)

    def start_module(self, command: list[str], folder: Path, env: Mapping[str, str]) -> Child:
        """Starts a module, with its arguments, in a folder."""
        child = Child(["-m", *command], folder, env)
        self._children.append(child)
        return child

    def run(
        self,
        script: str,
        *arguments: object,
        env: Mapping[str, str] | None = None,
        timeout: float = 60.0,
    ) -> Result:
        """Runs a script of the folder ``children`` to its end."""
        return self.start(script, *arguments, env=env).wait(timeout)

    def run_code(
        self, code: str, *, env: Mapping[str, str] | None = None, timeout: float = 60.0
    ) -> Result:
        """Runs a program given as text to its end."""
        return self.start_code(code, env).wait(timeout)

    def kill_all(self) -> None:
        """Ends what still runs."""
        for child in self._children:
            child.kill()

    def _start(self, command: list[str], env: Mapping[str, str] | None) -> Child:
        child = Child(command, self.folder, env)
        self._children.append(child)
        return child


if __name__ == "__main__":
    if reason := why_not():
        sys.exit(f"simulator: {reason}")
    print(build())
