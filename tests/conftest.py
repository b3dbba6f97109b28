import logging

import pytest

# By its name, as not every environment of the tests has what the package imports.
logger = logging.getLogger("vllm.netloader")


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
