"""Runs the cases of all scripts named transfer_*.py, or only those that are named."""

import sys

import transfer_clients  # noqa: F401
import transfer_endurance  # noqa: F401
import transfer_failures  # noqa: F401
import transfer_models  # noqa: F401
import transfer_tensors  # noqa: F401
from transfer_support import run_cases

run_cases(set(sys.argv[1:]))
