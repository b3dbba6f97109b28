"""What ``make bench`` runs: NetLoader beside raw TCP, gloo and vLLM's own loaders."""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from tools.vllm_server import clean_up_when_interrupted

from . import storage, transfer, worker

PARTS = ("transfer", "storage", "worker", "view")


def main() -> int:
    """Measure, print the tables, write the JSON object and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="of the data plane alone")
    parser.add_argument("--starts", type=int, default=3, help="of vLLM with each loader")
    parser.add_argument("--only", choices=PARTS, help="measure only this part")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    clean_up_when_interrupted()
    figures: dict[str, Any] = {}
    try:
        if arguments.only in (None, "transfer"):
            figures = transfer.measure(arguments.rounds)
            transfer.show(figures)
        if arguments.only in (None, "storage"):
            figures["storage"] = storage.measure(min(arguments.rounds, 3))
            storage.show(figures["storage"])
        if arguments.only in (None, "worker"):
            with tempfile.TemporaryDirectory(prefix="netloader-bench-") as folder:
                figures["worker"] = worker.measure(arguments.starts, Path(folder))
            worker.show(figures["worker"])
        if arguments.only in (None, "view"):
            from . import view  # imports vLLM, which the other parts are measured without

            figures["view"] = view.measure(min(arguments.rounds, 3))
            view.show(figures["view"])
    except KeyboardInterrupt:
        print("\ninterrupted; no process is left")
        return 130
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
