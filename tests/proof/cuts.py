"""Proves, model by model, that a source fills instances that are cut in another way than it is.

``python -m tests.proof.cuts [NAME ...]``: ranks without engines, as vLLM cannot run pipelines on a
CPU. Instances of one rank run in this process, those of two in two others. Each line is a source
and a client, which has no weight files. What the client's ranks then offer has the digests of an
instance that was cut in the same way and loaded from disk, or it refused the source and says why.
"""

import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import vllm

from tests.e2e.loading import load, make_config
from tests.e2e.ranks import Pair, status_at
from tools.make_model import copy_without_weights
from tools.netloader_view import read_address

from .rows import ROWS, Row

CUTS: dict[str, dict[str, Any]] = {
    "TP 1": {},
    "TP 2": {"tp": 2},
    "PP 2": {"pp": 2},
    "EP 2": {"tp": 2, "engine": {"enable_expert_parallel": True}},
}
WAYS = [("TP 1", "TP 2"), ("TP 2", "TP 1"), ("TP 1", "PP 2")]
WAYS_OF_EXPERTS = [("TP 2", "EP 2"), ("EP 2", "TP 2")]
EXPERTS = ("Qwen3-MoE", "Mixtral", "DeepSeek-V2, MLA")


class Refused(Exception):
    """An instance got no weights."""


# Has an instance load from a folder, with arguments of `make_config`. Returns the address of its
# first rank, and what all of its ranks have.
Start = Callable[[Path, Mapping[str, Any]], tuple[str, Any]]


class OnCpu:
    """Starts instances of one row.

    Args:
        folder: for their addresses.
        pair: the processes of instances of two ranks.
    """

    def __init__(self, folder: Path, pair: Pair) -> None:
        self._folder = folder
        self._pair = pair
        self._alive: list[Any] = []

    def __call__(self, path: Path, how: Mapping[str, Any]) -> tuple[str, Mapping[int, str]]:
        """See `Start`: what ranks have is their weights digests."""
        if how.get("tp", 1) * how.get("pp", 1) == 1:
            prefix = self._folder / f"one{len(self._alive)}-"
            try:
                config = make_config(path, MODEL="m", OUTPUT_PREFIX=str(prefix), **how)
                self._alive.append(load(config))
            except Exception as error:
                raise Refused(f"{type(error).__name__}: {error}") from None
            address = read_address(prefix)
        else:
            outcome = self._pair.load(path, **how)
            if failed := [error for error in outcome.errors if error]:
                raise Refused(failed[0])
            address = outcome.address(0)
        return address, digests_at(address)


def digests_at(address: str) -> Mapping[int, str]:
    """Return the weights digests of all ranks of an instance."""
    status = status_at(address)
    assert status.weights, status.reason
    return status.ranks or {0: status.weights}


class Proof:
    """One model, and the instances that have it.

    Args:
        row: the model.
        folder: has it in `full`, and in `bare` without weights.
        start: see `Start`.
    """

    def __init__(self, row: Row, folder: Path, start: Start) -> None:
        self._row = row
        self._folder = folder
        self._start = start
        self._from_disk: dict[str, tuple[str, Any]] = {}

    def prove(self, there: str, here: str) -> str:
        """Return what has come of a load by an instance cut in one way from one cut in another.

        Raises:
            AssertionError: it has got something else than from disk.
        """
        try:
            address, _ = self._disk(there)
            _, expected = self._disk(here)
        except Refused as error:
            return f"not from disk either: {error}"
        try:
            _, got = self._load("bare", here, SOURCE=[address], FALLBACK=False)
        except Refused as error:
            assert str(error).startswith("LoadFailed"), error
            return f"refused: {error}"
        assert got == expected, f"the weights are {got}, and {expected} from disk"
        return "equal"

    def _disk(self, cut: str) -> tuple[str, Any]:
        if cut not in self._from_disk:
            self._from_disk[cut] = self._load("full", cut)
        return self._from_disk[cut]

    def _load(self, name: str, cut: str, **extra: Any) -> tuple[str, Any]:
        how = {**CUTS[cut], **extra}
        how["engine"] = {**self._row.engine, **how.get("engine", {})}
        return self._start(self._folder / name, how)


def main(names: list[str]) -> int:
    """Prove the rows of these names, or all, and print a table."""
    print_head()
    wrong = 0
    with tempfile.TemporaryDirectory() as place:
        pair = Pair(Path(place))
        try:
            for number, row in enumerate(row for row in ROWS if row.name in names or not names):
                if not row.lacks:
                    folder = Path(place, f"row{number}")
                    make(row, folder)
                    proof = Proof(row, folder, OnCpu(folder, pair))
                    wrong += prove(proof, row.name, ways_of(row))
        finally:
            pair.close()
    return 1 if wrong else 0


def print_head() -> None:
    """Print what is above the lines of all rows."""
    print(f"vLLM {vllm.__version__}", flush=True)
    print(
        f"| {'model':16} | there -> here | {'s':>5} | load |\n| --- | --- | --- | --- |", flush=True
    )


def make(row: Row, folder: Path) -> None:
    """Make a row's model."""
    row.make(folder / "full", 0)
    copy_without_weights(folder / "full", folder / "bare")


def ways_of(row: Row) -> list[tuple[str, str]]:
    """Return what instances a row has: how the source is cut, and how the client."""
    return WAYS + (WAYS_OF_EXPERTS if row.name in EXPERTS else [])


def prove(proof: Proof, name: str, ways: Sequence[tuple[str, str]]) -> int:
    """Print the lines of a row; return how many of them are wrong."""
    wrong = 0
    for there, here in ways:
        started = time.monotonic()
        try:
            said = proof.prove(there, here)
        except Exception as error:
            traceback.print_exc()
            said = f"FAILED: {type(error).__name__}: {error}"
            wrong += 1
        seconds = time.monotonic() - started
        said = " ".join(said.split())
        print(f"| {name:16} | {there} -> {here}  | {seconds:5.1f} | {said} |", flush=True)
    return wrong


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
