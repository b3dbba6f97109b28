"""`--model-loader-extra-config`, parsed and validated once and immutable after."""

import ipaddress
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from enum import Enum
from pathlib import Path
from typing import Any

from pydantic import ByteSize, TypeAdapter, ValidationError

from .errors import ConfigError
from .utils import MAX_PORT, MIN_PORT, Address, parse_address

MIB = 1 << 20
MAX_CHUNK_MIB = 64
MAX_MODEL_NAME_BYTES = 512  # a JOIN, which carries the name, stays under 1,024 bytes
# JSON can say half of a surrogate pair; no message and no file name can.
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_RATE = re.compile(r"([0-9]+(?:\.[0-9]+)? ?[A-Za-z]*)(?:/s)?", re.ASCII)
_MAX_RATE = 2**53
_byte_size = TypeAdapter(ByteSize)


class Int8Cache(Enum):
    """Where int8 parameters that post-processing alters are kept as they were before."""

    NO = "no"
    HBM = "hbm"
    DRAM = "dram"


@dataclass(frozen=True)
class NetLoaderConfig:
    """What an operator chose. Each field is the JSON key of its name in capitals.

    Attributes:
        source: global rank -> where it can get its weights, in order of preference.
        model: model name for the consistency check; None: the `--model` argument.
        listen_host: address to listen on; None: all of them.
        listen_port: base port, the rank is added to it; None: the system chooses; a value outside
            1024-65535: no server.
        int8_cache: whether and where altered int8 parameters are kept.
        int8_cache_name: parts of parameter names that `int8_cache` applies to; None: all.
        output_prefix: a rank writes its address to `{output_prefix}{rank}.txt`.
        max_sessions: clients fed at once.
        max_send_rate: bytes per second that a rank sends to all its clients together; None: as fast
            as it goes.
        max_sources: sources pulled from at once.
        chunk_mib: size of a chunk in MiB, the unit of transfer, verification and retry.
        verify: whether a client checks the digest of every chunk.
        hccl_buffer_size: memory in MB that HCCL takes for each direction of a session, on NPUs.
        connect_timeout: seconds to reach a source.
        handshake_timeout: seconds for the answer to a JOIN and for building the process group.
        progress_timeout: seconds without a completed chunk after which a peer counts as lost.
    """

    source: Mapping[int, tuple[Address, ...]]
    model: str | None = None
    listen_host: str | None = None
    listen_port: int | None = None
    int8_cache: Int8Cache = Int8Cache.NO
    int8_cache_name: tuple[str, ...] | None = None
    output_prefix: str | None = None
    max_sessions: int = 4
    max_send_rate: int | None = None
    max_sources: int = 4
    chunk_mib: int = 4
    verify: bool = True
    hccl_buffer_size: int = 16
    connect_timeout: float = 5.0
    handshake_timeout: float = 10.0
    progress_timeout: float = 10.0

    @property
    def chunk_bytes(self) -> int:
        """The chunk size in bytes."""
        return min(self.chunk_mib * MIB, self.max_chunk_bytes)

    @property
    def max_chunk_bytes(self) -> int:
        """The largest chunk in bytes that `max_send_rate` lets a source send.

        When all its sessions share the rate, each completes a chunk in half of `progress_timeout`.
        """
        if self.max_send_rate is None:
            return MAX_CHUNK_MIB * MIB
        return min(MAX_CHUNK_MIB, int(self.max_send_rate / self._least_send_rate)) * MIB

    @property
    def _least_send_rate(self) -> float:
        """Bytes per second at which chunks of 1 MiB still come in time."""
        return 2 * self.max_sessions * MIB / self.progress_timeout

    @property
    def announced_host(self) -> str | None:
        """The address that others are told: `listen_host` unless that stands for all of them."""
        try:
            everywhere = ipaddress.ip_address(self.listen_host or "::").is_unspecified
        except ValueError:  # a host name, or an address with a zone
            everywhere = False
        return None if everywhere else self.listen_host

    def port_for(self, rank: int) -> int | None:
        """Return the port a rank listens on (0: the system chooses), or None for no server."""
        if self.listen_port is None:
            return 0
        if not MIN_PORT <= self.listen_port <= MAX_PORT - rank:
            return None
        return self.listen_port + rank

    def with_model(self, model: str) -> "NetLoaderConfig":
        """Return this configuration with MODEL set to `model` where it was absent.

        Raises:
            ConfigError: `model` is too long to travel in a JOIN.
        """
        return self if self.model is not None else replace(self, model=_model(model))


def parse_config(extra_config: object) -> NetLoaderConfig:
    """Parse the extra config, and the file it names.

    Args:
        extra_config: the JSON object given as `--model-loader-extra-config`.

    Raises:
        ConfigError: names the key, the value and what is allowed.
    """
    given = _json_object(extra_config, "--model-loader-extra-config", (*_PARSERS, "CONFIG_FILE"))
    values = dict(given)
    path = values.pop("CONFIG_FILE", None)
    if path is not None:
        # What the file says goes first; what stands beside it fills the gaps.
        values |= _config_file(path)
    parsed: dict[str, Any] = {"source": {}}
    for key, value in values.items():
        if value is None:
            raise ConfigError(f"{key} is null; leave the key out instead")
        parsed[key.lower()] = _PARSERS[key](value)
    config = NetLoaderConfig(**parsed)
    if config.max_chunk_bytes == 0:
        raise _wrong(
            "MAX_SEND_RATE",
            values["MAX_SEND_RATE"],
            f"{math.ceil(config._least_send_rate)} bytes per second and more, so that each of "
            f"MAX_SESSIONS {config.max_sessions} clients gets 1 MiB within half of "
            f"PROGRESS_TIMEOUT {config.progress_timeout:g} s",
        )
    return config


def _config_file(path: object) -> dict[str, Any]:
    if not isinstance(path, str) or not path:
        raise _wrong("CONFIG_FILE", path, "the path of a JSON file")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"CONFIG_FILE {path!r} does not exist") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"CONFIG_FILE {path!r} cannot be read: {error}") from None
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"CONFIG_FILE {path!r} is not valid JSON: {error}") from None
    return _json_object(content, f"CONFIG_FILE {path!r}", tuple(_PARSERS))


def _json_object(value: object, where: str, known: Sequence[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{where} is {_shown(value)}; it must be a JSON object")
    if unknown := sorted(str(key) for key in value.keys() - set(known)):
        raise ConfigError(
            f"{where} has unknown keys {', '.join(map(repr, unknown))}; known keys: "
            f"{', '.join(sorted(known))}"
        )
    return value


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _wrong(key: str, value: object, allowed: str) -> ConfigError:
    return ConfigError(f"{key} is {_shown(value)}; allowed: {allowed}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _source(value: object) -> Mapping[int, tuple[Address, ...]]:
    if not isinstance(value, list):
        allowed = 'a list of {"device_id": RANK, "sources": ["IP:port", ...]}'
        raise _wrong("SOURCE", value, allowed)
    by_rank: dict[int, tuple[Address, ...]] = {}
    for index, entry in enumerate(value):
        where = f"SOURCE[{index}]"
        if not isinstance(entry, dict) or entry.keys() != {"device_id", "sources"}:
            raise _wrong(where, entry, "an object with exactly the keys device_id and sources")
        rank, texts = entry["device_id"], entry["sources"]
        if not _is_int(rank) or rank < 0:
            raise _wrong(f"{where}.device_id", rank, "a global rank, an integer from 0")
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise _wrong(f"{where}.sources", texts, 'a list of strings like "IP:port"')
        try:
            addresses = tuple(parse_address(text) for text in texts)
        except ValueError as error:
            raise ConfigError(f"{where}.sources: {error}") from None
        # the same source twice gives nothing but a second connection to it
        by_rank[rank] = tuple(dict.fromkeys(by_rank.get(rank, ()) + addresses))
    return by_rank


def _model(value: object) -> str:
    if (
        not isinstance(value, str)
        or not value
        or _SURROGATE.search(value)
        or len(json.dumps(value)) - 2 > MAX_MODEL_NAME_BYTES
    ):
        allowed = f"a name of 1 to {MAX_MODEL_NAME_BYTES} bytes (as JSON)"
        raise _wrong("MODEL", value, allowed)
    return value


def _listen_host(value: object) -> str:
    if not isinstance(value, str):
        raise _wrong("LISTEN_HOST", value, "an IP address or a host name")
    try:
        return parse_address(f"[{value}]:1" if ":" in value else f"{value}:1").host
    except ValueError:
        raise _wrong("LISTEN_HOST", value, "an IP address or a host name") from None


def _listen_port(value: object) -> int:
    if not _is_int(value):
        raise _wrong("LISTEN_PORT", value, f"an integer; {MIN_PORT} to {MAX_PORT} opens a server")
    assert isinstance(value, int)
    return value


def _int8_cache(value: object) -> Int8Cache:
    if isinstance(value, str):
        for member in Int8Cache:
            if member.value == value.lower():
                return member
    raise _wrong("INT8_CACHE", value, "'hbm', 'dram' or 'no'")


def _int8_cache_name(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(part, str) and part for part in value):
        raise _wrong("INT8_CACHE_NAME", value, "a list of (parts of) parameter names")
    return tuple(value)


def _output_prefix(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise _wrong("OUTPUT_PREFIX", value, "a path prefix, as in /run/netloader/rank_")
    if re.search(r'[\x00-\x1f\x7f<>:"|?*]', value) or _SURROGATE.search(value):
        raise _wrong("OUTPUT_PREFIX", value, 'a path without control characters and <>:"|?*')
    folder = os.path.dirname(value) or "."
    if not os.path.isdir(folder):
        raise _wrong("OUTPUT_PREFIX", value, f"a prefix in an existing folder; {folder!r} is none")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise _wrong(
            "OUTPUT_PREFIX", value, f"a prefix in a folder that can be written to: {folder!r}"
        )
    return value


def _bool(key: str) -> Callable[[object], bool]:
    def parse(value: object) -> bool:
        if not isinstance(value, bool):
            raise _wrong(key, value, "true or false")
        return value

    return parse


def _integer(key: str, low: int, high: int) -> Callable[[object], int]:
    def parse(value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise _wrong(key, value, f"an integer from {low} to {high}")
        return value

    return parse


def _rate(value: object) -> int:
    match = _RATE.fullmatch(value) if isinstance(value, str) else None
    try:
        rate = int(_byte_size.validate_python(match[1] if match else value))
    except ValidationError:
        rate = 0
    if not (match or _is_int(value)) or not 1 <= rate <= _MAX_RATE:
        raise _wrong(
            "MAX_SEND_RATE",
            value,
            "bytes per second, from 1 to 2**53, with or without a unit as in '2GiB/s' or '500MB/s'",
        )
    return rate


def _seconds(key: str) -> Callable[[object], float]:
    def parse(value: object) -> float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0.1 <= value <= 3600:  # type: ignore[operator]
            raise _wrong(key, value, "seconds, from 0.1 to 3600")
        return float(value)  # type: ignore[arg-type]

    return parse


_PARSERS: dict[str, Callable[[object], Any]] = {
    "SOURCE": _source,
    "MODEL": _model,
    "LISTEN_HOST": _listen_host,
    "LISTEN_PORT": _listen_port,
    "INT8_CACHE": _int8_cache,
    "INT8_CACHE_NAME": _int8_cache_name,
    "OUTPUT_PREFIX": _output_prefix,
    "MAX_SESSIONS": _integer("MAX_SESSIONS", 1, 256),
    "MAX_SEND_RATE": _rate,
    "MAX_SOURCES": _integer("MAX_SOURCES", 1, 64),
    "CHUNK_MIB": _integer("CHUNK_MIB", 1, MAX_CHUNK_MIB),
    "VERIFY": _bool("VERIFY"),
    "HCCL_BUFFER_SIZE": _integer("HCCL_BUFFER_SIZE", 1, 4096),
    "CONNECT_TIMEOUT": _seconds("CONNECT_TIMEOUT"),
    "HANDSHAKE_TIMEOUT": _seconds("HANDSHAKE_TIMEOUT"),
    "PROGRESS_TIMEOUT": _seconds("PROGRESS_TIMEOUT"),
}
assert {key.lower() for key in _PARSERS} == {field.name for field in fields(NetLoaderConfig)}
