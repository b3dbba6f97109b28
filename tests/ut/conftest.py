import pytest

from .forks import Forks


@pytest.fixture(scope="session")
def forks(tmp_path_factory):
    """What runs code where vLLM is imported already."""
    forks = Forks(tmp_path_factory.mktemp("forks"))
    yield forks
    forks.end()
