"""NetLoader as an operator sees it: what to put into the extra config, what the log then says."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Load:
    """What a rank logs after it got its weights over the network."""

    rank: int
    tensors: int
    megabytes: float
    seconds: float
    gigabytes_per_second: float
    source: str
    digest: str


@dataclass(frozen=True)
class Sent:
    """What a rank logs after it gave its weights away."""

    rank: int
    megabytes: float
    digest: str
    end: str


_LOAD = re.compile(
    r"NetLoader rank (\d+): loaded (\d+) tensors, ([\d.]+) MB in ([\d.]+) s \(([\d.]+) GB/s\) "
    r"from (.+), digest (.+)$",
    re.MULTILINE,
)
_SENT = re.compile(
    r"NetLoader rank (\d+): sent ([\d.]+) MB .+ to \S+, digest (\w+): (.+)$", re.MULTILINE
)


def find_loads(log: str) -> list[Load]:
    """Returns the loads over the network that a log tells of, ordered by rank."""
    loads = [
        Load(int(m[1]), int(m[2]), float(m[3]), float(m[4]), float(m[5]), m[6], m[7])
        for m in _LOAD.finditer(log)
    ]
    return sorted(loads, key=lambda load: load.rank)


def find_sent(log: str) -> list[Sent]:
    """Returns the sessions in which a source gave weights away, in order."""
    return [Sent(int(m[1]), float(m[2]), m[3], m[4]) for m in _SENT.finditer(log)]


def source_list(addresses: Mapping[int, Iterable[str]]) -> list[dict[str, Any]]:
    """Returns the value of ``SOURCE`` for each rank's source addresses."""
    return [{"device_id": rank, "sources": list(each)} for rank, each in addresses.items()]


def read_address(prefix: Path, rank: int = 0) -> str:
    """Returns the address that a running source's rank wrote below its ``OUTPUT_PREFIX``."""
    return Path(f"{prefix}{rank}.txt").read_text().strip()
