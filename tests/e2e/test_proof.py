"""The proof that `make proof` prints: every row ends as it should."""

import re
import subprocess
import sys

import pytest
import vllm
from packaging.version import Version

from ..proof.rows import ROWS

pytestmark = [pytest.mark.core, pytest.mark.timeout(900)]

# On older vLLM only those that it makes or loads in another way: all of them take minutes.
OLDER = Version(vllm.__version__) < Version("0.28")
IN_ANOTHER_WAY = ("Llama, LoRA", "DeepSeek-V2, MLA", "reranker, tied")
EXPECTED = [row for row in ROWS if not OLDER or row.name in IN_ANOTHER_WAY]


def test_every_row_of_the_proof_is_equal_or_refused_by_name():
    command = [sys.executable, "-m", "tests.proof", *(row.name for row in EXPECTED)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    print(done.stdout)
    rows = re.findall(r"^\| (.+?) +\| +[\d.]+ \| (.+?) +\| (.+?) +\| (.+) \|$", done.stdout, re.M)
    assert done.returncode == 0
    assert [name for name, *_ in rows] == [row.name for row in EXPECTED]
    for row, (_, _, load, reload) in zip(EXPECTED, rows, strict=True):
        assert load == ("-" if row.lacks else "equal"), row.name
        expected = row.lacks or ("refused: " if row.reload else "equal")
        assert reload.startswith(expected), row.name
