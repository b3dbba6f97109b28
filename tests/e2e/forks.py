"""Runs `vllm serve` again and again, from one process that has imported what each would import.

Its arguments are modules to import. A line of standard input is JSON: the arguments, the
environment and the log file of an instance, which writes its process ID to standard output. At the
end of the input it ends, and they go on.
"""

import gc
import importlib
import json
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
    os.write(answers, f"{os.getpid()}\n".encode())
    os.close(answers)
    sys.modules["vllm.entrypoints.cli.main"].main()


# What an instance spawns imports this file again.
if __name__ == "__main__":
    # What is imported logs to standard output.
    answers = os.dup(1)
    os.dup2(2, 1)
    for module in ["vllm.entrypoints.cli.main", *sys.argv[1:]]:
        importlib.import_module(module)
    # Nobody waits for an instance that has ended.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    gc.freeze()
    for line in sys.stdin:
        if os.fork() == 0:
            serve(answers, *json.loads(line))
            break
