"""The list behind the guide's table of models, beside the tests that pytest finds."""

import re

import pytest

from tests.npu_sim.matrix import CLASSES, NOT_RUN, ROWS

RUN = [row for row in ROWS if row.run != NOT_RUN]


_COLLECT = "import pytest, sys; sys.exit(pytest.main(sys.argv[1:]))"


@pytest.fixture(scope="module")
def collected(forks):
    """The tests in the files that the list names, below tests/."""
    files = sorted({f"tests/{row.test.partition('::')[0]}" for row in RUN})
    options = ("-q", "-p", "no:cacheprovider", "--collect-only")
    done = forks.run(_COLLECT, *options, *files, CONFORMANCE_WAYS="hccl")
    assert done.returncode == 0, done.stdout + done.stderr
    return set(re.findall(r"^tests/(.+::.+)$", done.stdout, re.M))


def test_a_row_that_was_run_has_a_test_and_the_others_have_none():
    assert all(bool(row.test) == (row.run != NOT_RUN) for row in ROWS)


def test_each_row_is_that_of_a_test_which_pytest_finds(collected):
    whole = {test.partition("[")[0] for test in collected}
    for row in RUN:
        assert row.test in (whole if row.run == CLASSES else collected), row


def test_each_case_of_a_named_test_has_its_row(collected):
    named = {row.test for row in RUN}
    functions = {row.test.partition("[")[0] for row in RUN if row.run != CLASSES}
    cases = {test for test in collected if test.partition("[")[0] in functions}
    assert cases == {test for test in named if test.partition("[")[0] in functions}


def test_a_case_that_names_its_caches_or_its_ranks_has_those_of_its_row():
    words = {"ep": "EP", "tp2": "TP 2", "draft": "draft"}
    for row in RUN:
        case = row.test.partition("[")[2].strip("]").split("-")
        caches = tuple(word for word in case if word in ("no", "hbm", "dram"))
        assert caches in ((), row.caches), row
        if "test_experts.py" in row.test:
            said = f"{row.model}, {row.parallelism}"
            assert all((word in case) == (words[word] in said) for word in words), row


def test_what_was_not_run_is_nothing_that_was():
    was = {(row.model, row.quantization, row.parallelism) for row in RUN}
    assert not [row for row in ROWS if row.run == NOT_RUN and row.cells()[:3] in map(list, was)]
