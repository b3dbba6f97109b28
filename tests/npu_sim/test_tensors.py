import pytest

from .simulator import case_names

SCRIPT = "tensors.py"


@pytest.fixture(scope="module")
def child(module_simulator):
    return module_simulator.run(SCRIPT)


@pytest.mark.parametrize("name", case_names(SCRIPT))
def test_tensors(child, name):
    child.check_case(name)


def test_the_process_ends_well(child):
    child.check()


def test_newer_cann_converts_formats_by_another_way(simulator):
    newer = simulator.run(SCRIPT, env={"NPU_SIM_CANN_VERSION": "9.1.0"})
    for name in ("format_of_floats", "format_of_int8", "format_in_place", "matmul_with_nz_weight"):
        newer.check_case(name)
