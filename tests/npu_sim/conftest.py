import ctypes
import socket

import pytest

from tools.vllm_server import clean_up_when_interrupted

from .serving import Fleet, make_models
from .simulator import Simulator, why_not


@pytest.fixture(scope="session", autouse=True)
def _needs_torch_npu():
    if reason := why_not():
        pytest.skip(reason)


_PR_SET_TIMERSLACK = 29


@pytest.fixture(scope="session", autouse=True)
def _children_rest():
    """Let what children wait for come a millisecond late.

    torch_npu has a thread in each process that looks for work again after a microsecond, as the
    kernel lets it, 15,000 times a second. With a dozen processes that takes a core.
    """
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1_000_000, 0, 0, 0)


@pytest.fixture
def simulator(tmp_path):
    """Runs Python processes that have NPUs; each test's end at its end."""
    made = Simulator(tmp_path)
    yield made
    made.kill_all()


@pytest.fixture(scope="module")
def module_simulator(tmp_path_factory):
    """The same for a fixture that runs children for several tests."""
    made = Simulator(tmp_path_factory.mktemp("npu"))
    yield made
    made.kill_all()


# Instances


@pytest.fixture(scope="session")
def _ends_all_instances_when_interrupted():
    clean_up_when_interrupted()


@pytest.fixture
def fleet(tmp_path, _ends_all_instances_when_interrupted):
    with Fleet(tmp_path) as instances:
        yield instances


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def dead_address():
    """An address that refuses connections for as long as the tests run."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{held.getsockname()[1]}"
