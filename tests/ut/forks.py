"""Runs code in children of one process that has imported vLLM, as that takes seconds."""

import json
import os
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).parents[2]

_PARENT = """
import gc, json, os, sys, traceback
gc.disable()
answers = os.dup(1)
os.dup2(2, 1)  # what is imported may write to standard output
import vllm.model_executor.layers.attention, vllm.tracing
assert "vllm_ascend" not in sys.modules
gc.freeze()
gc.enable()
for line in sys.stdin:
    code, arguments, site, folder, output, environment = json.loads(line)
    if child := os.fork():
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os.write(answers, f"{status}\\n".encode())
        continue
    status = 2
    try:
        for number, name in enumerate(["stdout", "stderr"], start=1):
            path = os.path.join(output, name)
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
        os.chdir(folder)
        sys.path.insert(0, site)
        sys.argv[1:] = arguments
        os.environ.update(environment)
        exec(code, {"__name__": "__main__"})
        status = 0
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)
"""


def inherited():
    ours = {"NETLOADER_OVERLAY", "PYTHONPATH", "VLLM_PLUGINS"}
    return {name: value for name, value in os.environ.items() if name not in ours}


class Forks:
    """The parent, and where its children write to.

    Args:
        folder: that nobody else uses.
    """

    def __init__(self, folder):
        self._folder = folder
        self._parent = subprocess.Popen(
            [sys.executable, "-P", "-c", _PARENT],
            cwd=folder,
            env=inherited() | {"VLLM_LOGGING_STREAM": "ext://sys.stderr"},
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def run(self, code, *arguments, site=PROJECT, folder=PROJECT, **environment):
        """Run code with arguments.

        Args:
            code: of a program.
            arguments: in `sys.argv`.
            site: the first folder in which modules are looked for.
            folder: the current one.
            environment: what is to be set there.
        """
        order = code, arguments, str(site), str(folder), str(self._folder), environment
        print(json.dumps(order), file=self._parent.stdin, flush=True)
        status = self._parent.stdout.readline()
        assert status, "the process that imports vLLM has ended; its error is above"
        said = [(self._folder / name).read_text() for name in ("stdout", "stderr")]
        return subprocess.CompletedProcess("forked", int(status), *said)

    def end(self):
        self._parent.kill()
        self._parent.communicate()
