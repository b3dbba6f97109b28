"""The conformance suite (tests/conformance) on simulated NPUs, in processes that share it out."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# The strictest of what is known of CANN (see README.md): nobody notices that a peer has died, and
# an operation that fails stops the device.
ENVIRONMENT = {
    "NPU_SIM_DEVICES": "4",
    "NPU_SIM_ON_FAILURE": "device",
    "NPU_SIM_PEER_GONE": "wait",
    "CONFORMANCE_WAYS": "hccl npu_http",
}
# Most cases wait, for deadlines.
SHARES = 3

# The first one waits for all.
pytestmark = pytest.mark.timeout(1500)


@pytest.fixture(scope="module")
def children(module_simulator):
    return [
        module_simulator.start_module(
            ["pytest", "-q", "-W", "ignore", "tests/conformance"],
            ROOT,
            ENVIRONMENT | {"CONFORMANCE_SHARE": f"{share}/{SHARES}"},
        )
        for share in range(SHARES)
    ]


@pytest.mark.parametrize("share", range(SHARES))
def test_conformance(children, share):
    children[share].wait(1480).check()
