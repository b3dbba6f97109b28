import pytest

from .simulator import case_names

SCRIPT = "faults.py"
# torch_npu's own handling of errors would end the process.
ENVIRONMENT = {"TORCH_HCCL_ASYNC_ERROR_HANDLING": "0"}


@pytest.fixture(scope="module")
def child(module_simulator):
    environment = ENVIRONMENT | {"TMPDIR": str(module_simulator.folder)}
    return module_simulator.run(SCRIPT, env=environment, timeout=100)


@pytest.mark.parametrize("name", case_names(SCRIPT))
def test_fault(child, name):
    child.check_case(name)
