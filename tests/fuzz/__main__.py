"""The command: `python -m tests.fuzz --count 100000`."""

import argparse
import sys
import tempfile
import time

from .cases import KINDS, fuzz


def main():
    """Run, and return the exit status."""
    parser = argparse.ArgumentParser(prog="tests.fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=100_000, help="requests; others go with it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=KINDS, help="all of the count is of this kind")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    given = parser.parse_args()
    kinds = [given.only] if given.only else [*KINDS]
    share = {name: 1000 if given.only else KINDS[name].share for name in kinds}
    counts = {name: max(1, given.count * share[name] // 1000) for name in kinds}
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="netloader-fuzz-") as folder:
        tallies, faults = fuzz(given.seed, counts, given.first, folder)
    for name, tally in tallies.items():
        print(f"{KINDS[name].what}: {tally.tried} tried, {tally.accepted} accepted")
        faults += tally.faults
    for fault in faults:
        print(f"FAULT {fault}")
    tried = sum(tally.tried for tally in tallies.values())
    print(
        f"seed {given.seed}, {time.monotonic() - started:.0f} s: "
        + ", ".join(
            f"{tally.tried} {KINDS[name].what} ({tally.accepted} accepted)"
            for name, tally in tallies.items()
        )
        + f"; {tried} tried, {len(faults)} faults"
    )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
