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
    source: str
    digest: str

    @property
    def sources(self) -> list[str]:
        """The addresses: a source may have named others that have the same weights."""
        return re.findall(r"[^\s,]+:\d+", self.source)


@dataclass(frozen=True)
class Sent:
    """What a rank logs after it gave its weights away."""

    rank: int
    megabytes: float
    digest: str
    end: str


_SIZE = r"([\d.]+) ([MG])B"
_LOAD = re.compile(
    rf"NetLoader rank (\d+): loaded (\d+) tensors, {_SIZE} in ([\d.]+) s \(.+?\) from (.+), "
    r"weights digest ([^\s,]+)",
)
_SENT = re.compile(
    rf"NetLoader rank (\d+): sent {_SIZE} of .+ to \S+, weights digest (\S+): (.+)$",
    re.MULTILINE,
)
_IN_MB = {"M": 1.0, "G": 1e3}


def find_loads(log: str) -> list[Load]:
    """Returns the loads over the network that a log tells of, ordered by rank."""
    loads = [
        Load(int(m[1]), int(m[2]), float(m[3]) * _IN_MB[m[4]], float(m[5]), m[6], m[7])
        for m in _LOAD.finditer(log)
    ]
    return sorted(loads, key=lambda load: load.rank)


def find_sent(log: str) -> list[Sent]:
    """Returns the sessions in which a source gave weights away, in order."""
    return [Sent(int(m[1]), float(m[2]) * _IN_MB[m[3]], m[4], m[5]) for m in _SENT.finditer(log)]


def source_list(addresses: Mapping[int, Iterable[str]]) -> list[dict[str, Any]]:
    """Returns the value of ``SOURCE`` for each rank's source addresses."""
    return [{"device_id": rank, "sources": list(each)} for rank, each in addresses.items()]


def read_address(prefix: Path, rank: int = 0) -> str:
    """Returns the address that a running source's rank wrote below its ``OUTPUT_PREFIX``."""
    return Path(f"{prefix}{rank}.txt").read_text().strip()
