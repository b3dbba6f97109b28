import gc

import pytest

from .forks import Forks


@pytest.fixture(scope="session", autouse=True)
def frozen():
    """Look through what was imported no more: it stays, and a load looks for garbage each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def forks(tmp_path_factory):
    """What runs code where vLLM is imported already."""
    forks = Forks(tmp_path_factory.mktemp("forks"))
    yield forks
    forks.end()
