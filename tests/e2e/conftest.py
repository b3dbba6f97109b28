import socket
from functools import cache

import pytest

from tools.make_model import copy_without_weights, make_model
from tools.netloader_view import source_list
from tools.vllm_server import clean_up_when_interrupted

from .support import Model, running


def pytest_configure():
    clean_up_when_interrupted()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("netloader")


@pytest.fixture(scope="session")
def model(folder):
    """Returns a random model of an architecture; the same one each time."""

    @cache
    def make(arch, seed=0):
        made = Model(folder / f"{arch}-{seed}", folder / f"{arch}-{seed}-bare")
        make_model(made.full, arch, "tiny", seed)
        copy_without_weights(made.full, made.bare)
        return made

    return make


@pytest.fixture(scope="session")
def llama(model):
    return model("llama")


@pytest.fixture(scope="session")
def dead_address():
    """An address that refuses connections for as long as the tests run."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{held.getsockname()[1]}"


# Starting an instance takes half a minute, so those below are shared by all tests that need no more
# than an instance that runs. A test must leave them as they were.


@pytest.fixture(scope="session")
def seed(folder, llama):
    """Has its weights from disk."""
    with running(folder / "seed", llama.full, {"MODEL": "llama"}) as instance:
        yield instance


@pytest.fixture(scope="session")
def said(seed):
    """What the seed says; varied enough for a wrong weight to show."""
    completions = seed.say()
    assert all(len(set(completion.tokens)) >= 8 for completion in completions)
    return completions


@pytest.fixture(scope="session")
def client(folder, llama, seed):
    """Has its weights from the seed, and no weight file."""
    config = {"MODEL": "llama", "SOURCE": source_list({0: [seed.address()]})}
    with running(folder / "client", llama.bare, config) as instance:
        yield instance


@pytest.fixture
def wedged_client(client):
    """The client, stopped where it is: it accepts connections and never answers."""
    client.server.pause()
    yield client
    client.server.resume()
