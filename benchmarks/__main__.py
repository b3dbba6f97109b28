"""What ``make bench`` runs: NetLoader beside raw gloo, per-tensor sends and vLLM's own loaders."""

import argparse
import json
from pathlib import Path

from . import transfer


def main() -> None:
    """Measure, print the tables and write the JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    figures = transfer.measure(arguments.rounds)
    transfer.show(figures)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
