"""Runs `vllm serve` again and again, from one process that has imported what each would import.

Their engines and workers are forked, too: vLLM's platform for CPUs insists on spawning them, and
each would then import all of vLLM again, which is most of an instance's start.

Its arguments are modules to import. A line of standard input is JSON: the arguments, the
environment and the log file of an instance, which writes its process ID to standard output and
first runs the Python code in its variable RUN_FIRST. At the end of the input the parent ends, and
they go on.
"""

import gc
import importlib
import json
import multiprocessing.context
import os
import signal
import sys


def serve(answers, arguments, environment, log):
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number, path in enumerate([os.devnull, log, log]):
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, number)
        os.close(opened)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = arguments
    exec(environment.get("RUN_FIRST", ""))
    os.write(answers, f"{os.getpid()}\n".encode())
    os.close(answers)
    sys.modules["vllm.entrypoints.cli.main"].main()


if __name__ == "__main__":
    # What is imported logs to standard output.
    answers = os.dup(1)
    os.dup2(2, 1)
    for module in ["vllm.entrypoints.cli.main", *sys.argv[1:]]:
        importlib.import_module(module)
    started_by = multiprocessing.context._concrete_contexts
    started_by["spawn"] = started_by["fork"]
    # Nobody waits for an instance that has ended.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    gc.freeze()
    for line in sys.stdin:
        if os.fork() == 0:
            serve(answers, *json.loads(line))
            break
