"""Prints the tensors of a checkpoint folder that cannot be seen through a source, as JSON."""

import json
import sys
from pathlib import Path

# Last: the installed vllm_ascend is all of it, and the repository's is not.
sys.path.append(str(Path(__file__).parents[3]))
from tests.e2e.views import not_seen_through

print(json.dumps(not_seen_through(sys.argv[1], Path(sys.argv[2]))))
