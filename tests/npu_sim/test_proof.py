"""The proof that `make proof-npu` prints: every row ends as it should."""

import re

import pytest

from .serving import ENVIRONMENT
from .simulator import HERE

pytestmark = pytest.mark.timeout(900)

ROWS = re.findall(r'Row\("(.+?)"', (HERE.parent / "proof/npu_rows.py").read_text())


def test_every_row_of_the_proof_is_equal_or_refused_by_name(simulator):
    one_device = ENVIRONMENT | {"NPU_SIM_DEVICES": "1"}  # torch_npu takes 32 at most
    done = simulator.run("proof.py", env=one_device, timeout=880).check()
    rows = re.findall(r"^\| (.+?) +\| +[\d.]+ \| (.+?) +\| (.+?) +\| (.+) \|$", done.output, re.M)
    assert [name for name, *_ in rows] == ROWS
    for name, _, load, reload in rows:
        assert load == "equal", name
        assert re.fullmatch(r"refused: .* only one on a CPU is; from disk: equal", reload), name
