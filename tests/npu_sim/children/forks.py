"""Runs `vllm serve` again and again, from one process that has imported what each would import.

A line of standard input is JSON: the arguments, the environment and the log file of an instance,
which writes its process ID to standard output. At the end of the input it ends, and they go on.
"""

import gc
import json
import os
import signal
import sys

# What is imported logs to standard output.
ANSWERS = os.dup(1)
os.dup2(2, 1)

import vllm.entrypoints.cli.serve  # noqa: E402, F401
import vllm_ascend.worker.worker  # noqa: E402, F401
from vllm.entrypoints.cli.main import main  # noqa: E402


def serve(arguments, environment, log):
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number, path in enumerate([os.devnull, log, log]):
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, number)
        os.close(opened)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = arguments
    os.write(ANSWERS, f"{os.getpid()}\n".encode())
    os.close(ANSWERS)
    main()


# Nobody waits for an instance that has ended.
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
gc.freeze()
for line in sys.stdin:
    if os.fork() == 0:
        serve(*json.loads(line))
        break
