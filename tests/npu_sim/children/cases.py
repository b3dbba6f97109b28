"""A child script made of cases: each runs and is reported, whatever the others do."""

import json
import os
import signal
import sys
import time
import traceback

_cases = []


def case(function):
    """Marks a case."""
    _cases.append(function)
    return function


def run_cases():
    """Runs all."""
    for function in _cases:
        _report(function.__name__, _run(function))


def run_cases_apart(timeout=20.0):
    """Runs each in a process of its own, forked from this one, which spares it the imports.

    This works for torch_npu as long as the script itself does not touch a device.
    """
    for function in _cases:
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            error = _run(function)
            _report(function.__name__, error)
            os._exit(0)
        deadline = time.monotonic() + timeout
        while not (ended := os.waitpid(child, os.WNOHANG))[0]:
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                _report(function.__name__, f"did not end in {timeout} s")
                break
            time.sleep(0.01)
        else:
            if ended[1]:
                code = os.waitstatus_to_exitcode(ended[1])
                _report(function.__name__, f"its process ended with {code}")


def _run(function):
    try:
        function()
    except Exception:
        return traceback.format_exc()
    return None


def _report(name, error):
    """Prints what Result.check_case of simulator.py reads."""
    print("\n" + json.dumps({"case": name, "error": error}), flush=True)
