import socket

import pytest

from .simulator import case_names

SCRIPT = "collectives.py"
RANKS = 3


@pytest.fixture(scope="module")
def children(module_simulator):
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        port = chosen.getsockname()[1]
    ranks = [module_simulator.start(SCRIPT, rank, RANKS, port) for rank in range(RANKS)]
    return [child.wait() for child in ranks]


@pytest.mark.parametrize("name", case_names(SCRIPT))
def test_collectives(children, name):
    for child in children:
        child.check_case(name)


def test_the_processes_end_well(children):
    for child in children:
        child.check()
