"""Runs tests/proof with vLLM Ascend; arguments are names of rows."""

import runpy
import sys
from pathlib import Path

# Last: the installed vllm_ascend is all of it, and the repository's is not.
sys.path.append(str(Path(__file__).parents[3]))
runpy.run_module("tests.proof", run_name="__main__", alter_sys=True)
