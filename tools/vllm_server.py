"""Runs `vllm serve` as a child process for the demo and the end-to-end tests.

It starts fast rather than representative: no compilation, a small context, one small KV cache. No
process outlives the ``with`` block, whatever ends it.
"""

import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

import psutil

HOST = "127.0.0.1"
START_SECONDS = 300.0  # of a machine that others use as well; alone it takes 20 to 40 s
STOP_SECONDS = 20.0
POLL_SECONDS = 0.05
REQUEST_SECONDS = 60.0
LOG_TAIL_LINES = 40

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "NO_COLOR": "1",
    "PYTHONUNBUFFERED": "1",
    # Compiling the sampler alone costs 10 s and needs a C++ compiler.
    "TORCH_COMPILE_DISABLE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # vLLM's own choice would bind every instance to the same core. One thread each keeps two
    # instances on a small machine apart, and their sums in the same order.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_HOST_IP": HOST,
    "VLLM_LOGGING_COLOR": "0",
    "VLLM_NO_USAGE_STATS": "1",
}

ARGUMENTS = [
    "--enforce-eager",
    "--dtype=bfloat16",
    "--max-model-len=256",
    "--max-num-seqs=4",
    "--max-num-batched-tokens=256",
    "--no-enable-prefix-caching",
    "--disable-uvicorn-access-log",
    "--disable-fastapi-docs",
    # Clearing a cache of 1 GiB costs 4 s.
    f"--kv-cache-memory-bytes={64 << 20}",
    # Without it vLLM kills its workers at once, before they can clean up.
    "--shutdown-timeout=10",
]


class ServerError(RuntimeError):
    """An instance died or was not ready in time; carries the end of its log."""


@dataclass(frozen=True)
class Completion:
    """What an instance said: the text of each token, and how sure it was of it."""

    tokens: tuple[str, ...]
    logprobs: tuple[float, ...]

    @property
    def text(self) -> str:
        return "".join(self.tokens)


# Starts a command with an environment and a log file.
Launch = Callable[[list[str], dict[str, str], Path], psutil.Process]


def launch(command: list[str], environment: dict[str, str], log: Path) -> psutil.Process:
    """Starts a program as the first process of a group of its own."""
    with log.open("wb") as output:
        return psutil.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            # A Ctrl-C in the terminal reaches only us, and we can end the group as a whole.
            start_new_session=True,
        )


class VllmServer:
    """One `vllm serve` with all its processes.

    ``with VllmServer(...) as server`` waits until it is ready, and kills it at the end, which saves
    the 8 s of an orderly ``stop``. ``start`` and ``wait_until_ready`` exist apart so that several
    instances can start side by side.
    """

    def __init__(
        self,
        model: Path | str,
        log: Path,
        *,
        load_format: str = "netloader",
        extra_config: Mapping[str, Any] | None = None,
        arguments: Sequence[str] = (),
        environment: dict[str, str] | None = None,
        launch: Launch = launch,
    ) -> None:
        self.model = model
        self.log = log
        self.port = free_port()
        self._command = [
            *(str(Path(sys.executable).with_name("vllm")), "serve", str(model)),
            *(f"--host={HOST}", f"--port={self.port}", f"--load-format={load_format}"),
            *ARGUMENTS,
            *arguments,
        ]
        if extra_config is not None:
            self._command.append(f"--model-loader-extra-config={json.dumps(extra_config)}")
        # Where its ranks meet; vLLM's own choice is a port that others may be given meanwhile. Of
        # replicas each would choose the same one.
        replicas = any("data-parallel" in argument for argument in arguments)
        meeting = {} if replicas else {"VLLM_PORT": str(free_port())}
        self._environment = os.environ | ENVIRONMENT | meeting | (environment or {})
        self._launch = launch
        self._process: psutil.Process | None = None

    def start(self) -> None:
        """Starts the processes and returns at once."""
        self._process = self._launch(self._command, self._environment, self.log)

    def wait_until_ready(self, timeout: float = START_SECONDS) -> None:
        """Waits until the instance answers requests.

        Raises:
            ServerError: It ended instead, or was not ready in time.
        """
        self._wait(self._is_healthy, "answer requests", timeout)

    def wait_for_log(self, pattern: str, timeout: float = START_SECONDS) -> re.Match[str]:
        """Waits for a line of the log that matches and returns the first.

        Raises:
            ServerError: The instance ended without such a line, or it did not come in time.
        """
        self._wait(lambda: self.search_log(pattern) is not None, f"log {pattern!r}", timeout)
        match = self.search_log(pattern)
        assert match is not None
        return match

    def search_log(self, pattern: str) -> re.Match[str] | None:
        """Returns the first match in the log so far."""
        return re.search(pattern, self.read_log(), re.MULTILINE)

    def read_log(self) -> str:
        """Returns all that the instance has printed so far."""
        return self.log.read_text(errors="replace")

    def complete(
        self,
        prompt: str | Sequence[int],
        max_tokens: int = 32,
        replica: int | None = None,
        adapter: str | None = None,
    ) -> Completion:
        """Generates at temperature 0 and to full length, whatever the tokens are.

        A prompt is text, or the numbers of its tokens. A replica is asked for by its data-parallel
        rank; None: vLLM chooses. An adapter (LoRA) is asked for by its name; None: the model alone.
        """
        answer = self._post(
            "/v1/completions",
            {
                "prompt": prompt,
                "max_tokens": max_tokens,
                "temperature": 0,
                "logprobs": 1,
                "ignore_eos": True,
                **({} if adapter is None else {"model": adapter}),
            },
            {} if replica is None else {"X-data-parallel-rank": str(replica)},
        )
        logprobs = answer["choices"][0]["logprobs"]
        return Completion(tuple(logprobs["tokens"]), tuple(logprobs["token_logprobs"]))

    def reload(self, extra_config: Mapping[str, Any]) -> None:
        """Reloads the weights in place, with another `model_loader_extra_config` from now on.

        The instance's environment must have `VLLM_SERVER_DEV_MODE=1`.
        """
        changes = {"load_config": {"model_loader_extra_config": extra_config}}
        config = {"method": "update_config", "kwargs": {"overrides": changes}}
        for call in (config, {"method": "reload_weights"}):
            self._post("/collective_rpc", call, {})

    def count(self, metric: str) -> float:
        """Returns what one of vLLM's counters has come to, whatever its labels."""
        with _open(f"http://{HOST}:{self.port}/metrics", timeout=REQUEST_SECONDS) as answer:
            text = answer.read().decode()
        values = re.findall(rf"^{re.escape(metric)}(?:{{.*}})? (\S+)$", text, re.MULTILINE)
        return sum(map(float, values))

    @property
    def is_running(self) -> bool:
        """Whether the instance's first process is alive."""
        if self._process is None:
            return False
        with contextlib.suppress(psutil.NoSuchProcess):
            return self._process.is_running() and self._process.status() != psutil.STATUS_ZOMBIE
        return False

    def stop(self, timeout: float = STOP_SECONDS) -> None:
        """Lets the instance end as a service manager would, and kills what is left of it."""
        if self._process is not None:
            try:
                with contextlib.suppress(psutil.NoSuchProcess):
                    self._process.terminate()
                self._process.wait(timeout)
            finally:
                self.kill()

    def kill(self) -> None:
        """Ends the instance at once, as if it had crashed."""
        if self._process is None:
            return
        deadline = time.monotonic() + STOP_SECONDS
        while group := self._group():
            for process in group:
                with contextlib.suppress(psutil.NoSuchProcess):
                    # Python's resource tracker ends by itself, after it has freed the shared memory
                    # of the processes killed here.
                    tracker = any("resource_tracker" in word for word in process.cmdline())
                    if not tracker or time.monotonic() > deadline:
                        process.kill()
            time.sleep(POLL_SECONDS)
        self._process.wait()

    def pause(self) -> None:
        """Stops the instance's processes where they are: it neither answers nor hangs up."""
        for process in self._group():
            process.suspend()

    def resume(self) -> None:
        """Lets a paused instance go on."""
        for process in self._group():
            process.resume()

    def __enter__(self) -> Self:
        try:
            self.start()
            self.wait_until_ready()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.kill()

    def _group(self) -> list[psutil.Process]:
        """Returns the instance's living processes, also those whose parent has died."""
        assert self._process is not None
        group = []
        for process in psutil.process_iter():
            with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
                ours = os.getpgid(process.pid) == self._process.pid
                # Those that have ended may stay on as zombies until init looks after them.
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    group.append(process)
        return group

    def _wait(self, done: Callable[[], bool], what: str, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while not done():
            if not self.is_running:
                raise ServerError(f"{self.model} ended before it would {what}\n{self._tail()}")
            if time.monotonic() > deadline:
                raise ServerError(
                    f"{self.model} did not {what} within {timeout:.0f} s\n{self._tail()}"
                )
            time.sleep(POLL_SECONDS)

    def _tail(self) -> str:
        lines = self.read_log().splitlines()[-LOG_TAIL_LINES:]
        return "\n".join([f"--- the end of {self.log}:", *lines])

    def _is_healthy(self) -> bool:
        try:
            with _open(f"http://{HOST}:{self.port}/health", timeout=REQUEST_SECONDS):
                return True
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False

    def _post(self, path: str, body: Mapping[str, Any], headers: Mapping[str, str]) -> Any:
        request = urllib.request.Request(
            f"http://{HOST}:{self.port}{path}",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json", **headers},
        )
        try:
            with _open(request, timeout=REQUEST_SECONDS) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise ServerError(f"{path}: {error}: {error.read().decode(errors='replace')}") from None


def clean_up_when_interrupted() -> None:
    """Lets the first Ctrl-C or SIGTERM raise KeyboardInterrupt and ignores further ones.

    A second one, as make sends to its children or an impatient user does, would otherwise cut short
    the ending of the instances.
    """

    def interrupt(_number: int, _frame: object) -> NoReturn:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)


# A proxy from the environment must not see requests to this machine.
_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


def free_port(count: int = 1) -> int:
    """Returns the first of ports that nobody listens on, outside those that systems hand out.

    vLLM takes its port seconds later, and its gloo groups open dozens of system-chosen ones
    meanwhile.
    """
    while True:
        first = random.randrange(20000, 32000)
        if all(map(_is_free, range(first, first + count))):
            return first


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
        return True
