"""Sources and clients of NetLoader on simulated NPUs, in processes of their own."""

import pytest

from .simulator import case_names

GROUPS = ("tensors", "models", "clients", "failures", "endurance")
# The strictest of what is known of CANN (see README.md): nobody notices that a peer has died, and
# an operation that fails stops the device.
ENVIRONMENT = {
    "NPU_SIM_DEVICES": "4",
    "NPU_SIM_ON_FAILURE": "device",
    "NPU_SIM_PEER_GONE": "wait",
}

# The first one waits for all.
pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def child(module_simulator, request):
    # All run in one go, as importing torch_npu takes far longer than most of them.
    names = {
        item.callspec.params["name"] for item in request.session.items if item.path == request.path
    }
    return module_simulator.run("transfer.py", *sorted(names), env=ENVIRONMENT, timeout=300)


@pytest.mark.parametrize(
    ("group", "name"),
    [(group, name) for group in GROUPS for name in case_names(f"transfer_{group}.py")],
)
def test_transfer(child, group, name):
    child.check_case(name)
