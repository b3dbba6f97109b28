import contextlib
import os
import threading

import pytest
import torch

from .sides import Process, end_clients
from .ways import Way

CPU_WAYS = "http stream"

# Threads of their own only get in each other's way: the tests bring enough of them.
torch.set_num_threads(1)


def pytest_generate_tests(metafunc):
    marks = metafunc.definition.iter_markers("parametrize")
    if "way" in metafunc.fixturenames and not any("way" in mark.args[0] for mark in marks):
        mark = metafunc.definition.get_closest_marker("ways")
        chosen = mark.args if mark else tuple(Way)
        metafunc.parametrize("way", chosen, ids=[way.value for way in chosen], scope="session")


def pytest_collection_modifyitems(config, items):
    """Run the ways of CONFORMANCE_WAYS; of CONFORMANCE_SHARE "1/4" every fourth of their cases."""
    chosen = os.environ.get("CONFORMANCE_WAYS", CPU_WAYS).split()
    mine = [item for item in items if item.path.parent.name == "conformance"]
    kept = [one for one in mine if "way" in one.fixturenames and _way(one).value in chosen]
    first, _, of = os.environ.get("CONFORMANCE_SHARE", "0/1").partition("/")
    kept = kept[int(first) :: int(of)]
    others = [item for item in items if item not in mine]
    config.hook.pytest_deselected(items=[one for one in mine if one not in kept])
    items[:] = others + kept


def _way(item):
    return item.callspec.params["way"]


@pytest.fixture(autouse=True, scope="session")
def _nothing_at_the_end():
    """A thread that waits inside torch while the interpreter shuts down ends it with an abort."""
    yield
    end_clients()
    for thread in threading.enumerate():
        if thread.name.startswith("netloader-"):
            thread.join(30)


@pytest.fixture
def over():
    """Set when whatever stalls may go on: after the load, and before anything is stopped."""
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def started():
    """Starts processes, and ends them with the test."""
    with contextlib.ExitStack() as stack:

        def start(index, **environment):
            process = Process(index, **environment)
            stack.callback(process.end)
            return process

        yield start
