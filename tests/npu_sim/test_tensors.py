import pytest

from .simulator import case_names

SCRIPT = "tensors.py"
OF_EXPERTS = "experts.py"


@pytest.fixture(scope="module")
def child(module_simulator):
    return module_simulator.run(SCRIPT)


@pytest.fixture(scope="module")
def of_experts(module_simulator):
    return module_simulator.run(OF_EXPERTS)


@pytest.mark.parametrize("name", case_names(SCRIPT))
def test_tensors(child, name):
    child.check_case(name)


@pytest.mark.parametrize("name", case_names(OF_EXPERTS))
def test_operators_of_experts(of_experts, name):
    of_experts.check_case(name)


def test_the_processes_end_well(child, of_experts):
    child.check()
    of_experts.check()


def test_newer_cann_converts_formats_by_another_way(simulator):
    newer = simulator.run(SCRIPT, env={"NPU_SIM_CANN_VERSION": "9.1.0"})
    for name in ("format_of_floats", "format_of_int8", "format_in_place", "matmul_with_nz_weight"):
        newer.check_case(name)
