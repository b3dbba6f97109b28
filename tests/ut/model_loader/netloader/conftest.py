import logging
import os
import threading

import hypothesis
import pytest
import torch

from vllm_ascend.model_loader.netloader.utils import logger

# torch's TCPStore asks the DNS for the name of every address it connects to. Where the DNS loses a
# packet now and then, that is five seconds each time; like this it is one second, once: torch asks
# no more after a failure.
os.environ["RES_OPTIONS"] = "timeout:1 attempts:1"

# Threads of their own only get in each other's way: the tests bring enough of them.
torch.set_num_threads(1)

# The same examples every time, without deadlines: a busy machine is no failure.
hypothesis.settings.register_profile(
    "netloader", deadline=None, derandomize=True, database=None, max_examples=60
)
hypothesis.settings.load_profile("netloader")


@pytest.fixture(autouse=True, scope="session")
def _no_session_at_the_end():
    """A thread that waits inside torch while the interpreter shuts down ends it with an abort."""
    yield
    for thread in threading.enumerate():
        if thread.name.startswith("netloader-"):
            thread.join(30)


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
