import logging
import os

import hypothesis
import pytest

from vllm_ascend.model_loader.netloader.utils import logger

# torch's TCPStore asks the DNS for the name of every address it connects to. Where the DNS loses a
# packet now and then, that is five seconds each time; like this it is one second, once: torch asks
# no more after a failure.
os.environ["RES_OPTIONS"] = "timeout:1 attempts:1"

# The same examples every time, without deadlines: a busy machine is no failure.
hypothesis.settings.register_profile(
    "netloader", deadline=None, derandomize=True, database=None, max_examples=60
)
hypothesis.settings.load_profile("netloader")


class _Lines(logging.Handler):
    def __init__(self):
        super().__init__(logging.DEBUG)
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


@pytest.fixture
def log():
    """The log lines of NetLoader, whatever vLLM has done to its loggers."""
    handler = _Lines()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield handler.lines
    logger.setLevel(level)
    logger.removeHandler(handler)
