import gc

import pytest

from .forks import Forks

gc.disable()  # a quarter of the time that imports take


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Let one worker of xdist run all that need what has imported vLLM."""
    for item in items:
        if "forks" in item.fixturenames:
            item.add_marker(pytest.mark.xdist_group("forks"))


@pytest.fixture(scope="session", autouse=True)
def frozen():
    """Look through what was imported no more: it stays, and a load looks for garbage each time."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def forks(tmp_path_factory):
    """What runs code where vLLM is imported already."""
    forks = Forks(tmp_path_factory.mktemp("forks"))
    yield forks
    forks.end()
