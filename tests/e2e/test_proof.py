"""The proof that `make proof` prints: every row ends as it should."""

import re
import subprocess
import sys

import pytest

from ..proof.rows import ROWS

pytestmark = pytest.mark.timeout(900)


def test_every_row_of_the_proof_is_equal_or_refused_by_name():
    command = [sys.executable, "-m", "tests.proof"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    print(done.stdout)
    rows = re.findall(r"^\| (.+?) +\| +[\d.]+ \| (.+?) +\| (.+?) +\| (.+) \|$", done.stdout, re.M)
    assert done.returncode == 0
    assert [name for name, *_ in rows] == [row.name for row in ROWS]
    for row, (_, _, load, reload) in zip(ROWS, rows, strict=True):
        assert load == "equal", row.name
        assert reload.startswith("refused: " if row.reload else "equal"), row.name
