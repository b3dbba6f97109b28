import threading

import hypothesis
import pytest
import torch

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
        # That one waits for work, in no code of torch, and never ends.
        if thread.name.startswith("netloader-") and thread.name != "netloader-retire":
            thread.join(30)
