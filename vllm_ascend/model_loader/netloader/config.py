"""`--model-loader-extra-config`, parsed and validated once and immutable after."""

import contextlib
import ipaddress
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ByteSize, TypeAdapter, ValidationError

from .credentials import Files
from .errors import ConfigError
from .utils import MAX_PORT, MIN_PORT, Address, Name, parse_address, parse_name

MIB = 1 << 20
E = TypeVar("E", bound=Enum)

MAX_CHUNK_MIB = 64
SECRET_FILE_VARIABLE = "NETLOADER_SECRET_FILE"  # of the environment
MAX_MODEL_NAME_BYTES = 512  # of JSON, in joins and logs
# JSON can say half of a surrogate pair; no message and no file name can.
_SURROGATE = re.compile(r"[\ud800-\udfff]")
# int() alone takes other scripts' digits, underscores, and more digits than it can turn into text
_WHOLE = re.compile(r"-?[0-9]{1,1000}")
_DECIMAL = re.compile(r"[0-9]{1,1000}(\.[0-9]{1,1000})?")
_RATE = re.compile(r"([0-9]+(?:\.[0-9]+)? ?[A-Za-z]*)(?:/s)?", re.ASCII)
_MAX_RATE = 2**53
_DIGEST = re.compile("[a-z0-9_]{1,32}:[0-9a-f]{32}")
_SOURCE = (
    '"HOST:PORT", "dns+NAME:PORT", "dnssrv+NAME", "file+PREFIX" or a list of them for all ranks, '
    'or a list of {"device_id": RANK, "sources": ["IP:port", ...]}'
)
_ENTRY_KEYS = {"device_id", "sources"}
_byte_size = TypeAdapter(ByteSize)


class Int8Cache(Enum):
    """Where int8 parameters that post-processing alters are kept as they were before."""

    NO = "no"
    HBM = "hbm"
    DRAM = "dram"


class Transport(Enum):
    """How the bytes of blocks travel."""

    AUTO = "auto"
    HTTP = "http"


@dataclass(frozen=True)
class Sources:
    """Where a rank can get its weights.

    Attributes:
        addresses: the sources, in order of preference, and names of instances that are sources.
        malformed: what is wrong with each entry that is neither.
    """

    addresses: tuple[Address | Name, ...] = ()
    malformed: tuple[str, ...] = ()

    def __add__(self, other: "Sources") -> "Sources":
        # the same source twice gives nothing but a second connection to it
        return Sources(
            tuple(dict.fromkeys(self.addresses + other.addresses)),
            tuple(dict.fromkeys(self.malformed + other.malformed)),
        )


@dataclass(frozen=True)
class NetLoaderConfig(Files):
    """What an operator chose. Each field but `disk` is the JSON key of its name in capitals.

    Attributes:
        source: global rank -> where it can get its weights; None: what is the same for all ranks.
        model: model name for the consistency check; None: the `--model` argument.
        listen_host: address to listen on; None: all of them.
        listen_port: base port, the worker's number is added to it; None: the system chooses; a
            value outside 1024-65535: no server.
        int8_cache: whether and where altered int8 parameters are kept.
        int8_cache_name: parts of parameter names that `int8_cache` applies to; None: all.
        output_prefix: a worker writes its address to `{output_prefix}{its number}.txt`.
        max_sessions: connections of clients that are fed at once.
        max_send_rate: bytes per second that a rank sends to all its clients together; None: as fast
            as it goes.
        max_sources: sources pulled from at once.
        source_wait: seconds to wait for sources that cannot serve yet; 0: not at all.
        fallback: whether vLLM's default loader is tried when no source gave the weights.
        weights_digest: the only weights that are taken from a source, by their weights digests, or
            by the digests of instances that have them; None: any.
        transport: `auto`: what the devices have (HCCL, NCCL), HTTP where they have nothing or
            where no group can be formed; `http`: HTTP everywhere.
        connections: connections to one source, over HTTP.
        chunk_mib: size of one request or message in MiB; None: what suits the transport.
        verify: whether a client checks the digest of every block.
        hccl_buffer_size: memory in MB that HCCL takes for each direction of a session, on NPUs.
        connect_timeout: seconds to reach a source.
        handshake_timeout: seconds for the answer to a join, for a request to arrive, and for
            forming a group.
        progress_timeout: seconds without progress after which a peer counts as lost.
        disk: the keys of vLLM's default loader, for loading from disk.
        secret_file: and five more: see `credentials.Files`.
    """

    source: Mapping[int | None, Sources]
    model: str | None = None
    listen_host: str | None = None
    listen_port: int | None = None
    int8_cache: Int8Cache = Int8Cache.NO
    int8_cache_name: tuple[str, ...] | None = None
    output_prefix: str | None = None
    max_sessions: int = 4
    max_send_rate: int | None = None
    max_sources: int = 8
    source_wait: float = 300.0
    fallback: bool = True
    weights_digest: tuple[str, ...] | None = None
    transport: Transport = Transport.AUTO
    connections: int = 1
    chunk_mib: int | None = None
    verify: bool = True
    hccl_buffer_size: int = 16
    connect_timeout: float = 5.0
    handshake_timeout: float = 10.0
    progress_timeout: float = 10.0
    disk: Mapping[str, Any] = field(default_factory=dict)

    @property
    def max_message_bytes(self) -> int:
        """The most bytes that `max_send_rate` lets a source send at once.

        When all its sessions share the rate, each completes a message in half of
        `progress_timeout`.
        """
        if self.max_send_rate is None:
            return MAX_CHUNK_MIB * MIB
        return min(MAX_CHUNK_MIB, int(self.max_send_rate / self._least_send_rate)) * MIB

    @property
    def _least_send_rate(self) -> float:
        """Bytes per second at which messages of 1 MiB still come in time."""
        return 2 * self.max_sessions * MIB / self.progress_timeout

    @property
    def announced_host(self) -> str | None:
        """The address that others are told: `listen_host` unless that stands for all of them."""
        try:
            everywhere = ipaddress.ip_address(self.listen_host or "::").is_unspecified
        except ValueError:  # a host name, or an address with a zone
            everywhere = False
        return None if everywhere else self.listen_host

    def sources_of(self, rank: int) -> Sources:
        """Return where a rank can get its weights."""
        return self.source.get(rank) or self.source.get(None) or Sources()

    def port_for(self, worker: int) -> int | None:
        """Return the port a worker listens on (0: the system chooses), or None for no server.

        Args:
            worker: its number: data-parallel rank times ranks of a replica, plus rank inside of it.
        """
        if self.listen_port is None:
            return 0
        if not MIN_PORT <= self.listen_port <= MAX_PORT - worker:
            return None
        return self.listen_port + worker

    def with_model(self, model: str) -> "NetLoaderConfig":
        """Return this configuration with MODEL set to `model` where it was absent.

        Raises:
            ConfigError: `model` is too long.
        """
        return self if self.model is not None else replace(self, model=_model(model))


def parse_config(
    extra_config: object, where: str = "--model-loader-extra-config"
) -> NetLoaderConfig:
    """Parse the extra config, and the file it names.

    A null counts as not given. Keys in lower case are those of vLLM's default loader, which checks
    them itself.

    Args:
        extra_config: the JSON object given.
        where: the option that it was given as, for errors.

    Raises:
        ConfigError: names the key, the value and what is allowed.
    """
    values = _given(extra_config, where, KEYS)
    path = values.pop("CONFIG_FILE", None)
    if path is not None:
        # What the file says goes first; what stands beside it fills the gaps.
        values |= _config_file(path)
    secret_file = os.environ.get(SECRET_FILE_VARIABLE)
    if secret_file is not None and "SECRET_FILE" not in values:
        if not secret_file:  # not as if there were none: whoever set it wants no open port
            raise _wrong(SECRET_FILE_VARIABLE, secret_file, "the path of a file; or unset it")
        values["SECRET_FILE"] = secret_file
    disk = {key: value for key, value in values.items() if key not in _PARSERS}
    parsed: dict[str, Any] = {"source": {}, "disk": disk}
    for key in values.keys() - disk.keys():
        parsed[key.lower()] = _PARSERS[key](values[key])
    config = NetLoaderConfig(**parsed)
    if config.max_message_bytes == 0:
        raise _wrong(
            "MAX_SEND_RATE",
            values["MAX_SEND_RATE"],
            f"{math.ceil(config._least_send_rate)} bytes per second and more, so that each of "
            f"MAX_SESSIONS {config.max_sessions} clients gets 1 MiB within half of "
            f"PROGRESS_TIMEOUT {config.progress_timeout:g} s",
        )
    _ = config.credentials  # an error in them is one of the start
    return config


def _config_file(path: object) -> dict[str, Any]:
    if not isinstance(path, str) or not path:
        raise _wrong("CONFIG_FILE", path, "the path of a JSON file")
    where = f"CONFIG_FILE {path!r}"

    def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = Counter(key for key, _ in pairs)
        if twice := [key for key, count in keys.items() if count > 1]:
            raise ConfigError(f"{where} has the key {_shown(twice[0])} twice in one object")
        return dict(pairs)

    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{where} does not exist") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{where} cannot be read: {error}") from None
    try:
        content = json.loads(text, object_pairs_hook=object_of)
    except ConfigError:
        raise
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not valid JSON: {error}") from None
    return _given(content, where, tuple(_PARSERS))


def _given(value: object, where: str, known: Sequence[str]) -> dict[str, Any]:
    """Return those keys of an object that are not null."""
    if not isinstance(value, dict):
        raise ConfigError(f"{where} is {_shown(value)}; it must be a JSON object")
    unknown = sorted(map(str, value.keys() - set(known)))
    if wrong := [_corrected(key, known) for key in unknown if not _is_disk_key(key, known)]:
        raise ConfigError(
            f"{where} has unknown keys {', '.join(wrong)}; known keys: "
            f"{', '.join(sorted(known))}, and in lower case those of vLLM's default loader"
        )
    return {key: content for key, content in value.items() if content is not None}


def _is_disk_key(key: str, known: Sequence[str]) -> bool:
    return key.islower() and key.upper() not in known


def _corrected(key: str, known: Sequence[str]) -> str:
    return f"{key!r} (should be {key.upper()!r})" if key.upper() in known else repr(key)


def _shown(value: object) -> str:
    return "null" if value is None else _cut(repr(value))


def _cut(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}..."


def _wrong(key: str, value: object, allowed: str) -> ConfigError:
    return ConfigError(f"{key} is {_shown(value)}; allowed: {allowed}")


def _text(value: object) -> str:
    """Return a text without blanks around it, and nothing for anything else."""
    return value.strip() if isinstance(value, str) else ""


def _whole(value: object) -> int | None:
    """Return a whole number, which may be in a text; None if it is none."""
    if _WHOLE.fullmatch(_text(value)):
        return int(_text(value))
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _source(value: object) -> Mapping[int | None, Sources]:
    if isinstance(value, str):
        return {None: _sources([value], parse_name)}
    if not isinstance(value, list):
        raise _wrong("SOURCE", value, _SOURCE)
    if value and all(isinstance(entry, str) for entry in value):
        return {None: _sources(value, parse_name)}
    if {str, dict} <= {*map(type, value)}:
        raise _wrong("SOURCE", value, f"texts or objects, which cannot be mixed: {_SOURCE}")
    by_rank: dict[int | None, Sources] = {}
    for index, entry in enumerate(value):
        where = f"SOURCE[{index}]"
        if not isinstance(entry, dict) or not {"device_id"} <= entry.keys() <= _ENTRY_KEYS:
            raise _wrong(where, entry, "an object with device_id and sources, and no other keys")
        rank, texts = _whole(entry["device_id"]), entry.get("sources")
        if rank is None or rank < 0:
            allowed = "a global rank, an integer from 0"
            raise _wrong(f"{where}.device_id", entry["device_id"], allowed)
        if not isinstance(texts, list | None):
            raise _wrong(f"{where}.sources", texts, 'a list of strings like "IP:port"')
        by_rank[rank] = by_rank.get(rank, Sources()) + _sources(texts or (), parse_address)
    return by_rank


def _sources(texts: Sequence[object], parse: Callable[[str], Address | Name]) -> Sources:
    """Return what was given: one bad entry is not to cost the load."""
    sources = Sources()
    for text in texts:
        if not isinstance(text, str):
            sources += Sources(malformed=(f"{_shown(text)}: not a text like 'IP:port'",))
            continue
        try:
            sources += Sources((parse(text),))
        except ValueError as error:
            sources += Sources(malformed=(_cut(str(error)),))
    return sources


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


def _host(key: str, allowed: str) -> Callable[[object], str]:
    def parse(value: object) -> str:
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                return parse_address(f"[{value}]:1" if ":" in value else f"{value}:1").host
        raise _wrong(key, value, allowed)

    return parse


def _one_of(key: str, kind: type[E], allowed: str) -> Callable[[object], E]:
    def parse(value: object) -> E:
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                return kind(value.lower())
        raise _wrong(key, value, allowed)

    return parse


def _listen_port(value: object) -> int:
    port = _whole(value)
    if port is None:
        raise _wrong("LISTEN_PORT", value, f"an integer; {MIN_PORT} to {MAX_PORT} opens a server")
    return port


def _path(key: str) -> Callable[[object], str]:
    def parse(value: object) -> str:
        if not isinstance(value, str) or not value or "\0" in value or _SURROGATE.search(value):
            raise _wrong(key, value, "the path of a file")
        return value

    return parse


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
        if isinstance(value, bool):
            return value
        if (text := _text(value).lower()) not in ("true", "false"):
            raise _wrong(key, value, "true or false")
        return text == "true"

    return parse


def _integer(key: str, low: int, high: int) -> Callable[[object], int]:
    def parse(value: object) -> int:
        number = _whole(value)
        if number is None or not low <= number <= high:
            raise _wrong(key, value, f"an integer from {low} to {high}")
        return number

    return parse


def _weights_digest(value: object) -> tuple[str, ...]:
    given = value if isinstance(value, list) and value else [value]
    if not all(isinstance(one, str) and _DIGEST.fullmatch(one) for one in given):
        allowed = (
            "weights digests and instance digests as in the log, one or a list, such as "
            "'xxh3_128:' or 'instance:' and 32 hex digits"
        )
        raise _wrong("WEIGHTS_DIGEST", value, allowed)
    return tuple(map(str, given))


def _rate(value: object) -> int:
    match = _RATE.fullmatch(_text(value))
    try:
        rate = int(_byte_size.validate_python(match[1] if match else _whole(value)))
    except ValidationError:
        rate = 0
    if not 1 <= rate <= _MAX_RATE:
        raise _wrong(
            "MAX_SEND_RATE",
            value,
            "bytes per second, from 1 to 2**53, with or without a unit as in '2GiB/s' or '500MB/s'",
        )
    return rate


def _seconds(key: str, low: float = 0.1, high: float = 3600) -> Callable[[object], float]:
    def parse(value: object) -> float:
        number: object = float(_text(value)) if _DECIMAL.fullmatch(_text(value)) else value
        if not isinstance(number, int | float) or isinstance(number, bool):
            number = math.nan
        if not low <= number <= high:
            raise _wrong(key, value, f"seconds, from {low:g} to {high:g}")
        return float(number)

    return parse


_PARSERS: dict[str, Callable[[object], Any]] = {
    "SOURCE": _source,
    "MODEL": _model,
    "LISTEN_HOST": _host("LISTEN_HOST", "an IP address or a host name"),
    "LISTEN_PORT": _listen_port,
    "INT8_CACHE": _one_of("INT8_CACHE", Int8Cache, "'hbm', 'dram' or 'no'"),
    "INT8_CACHE_NAME": _int8_cache_name,
    "OUTPUT_PREFIX": _output_prefix,
    "MAX_SESSIONS": _integer("MAX_SESSIONS", 1, 256),
    "MAX_SEND_RATE": _rate,
    "MAX_SOURCES": _integer("MAX_SOURCES", 1, 64),
    "SOURCE_WAIT": _seconds("SOURCE_WAIT", 0, 86400),
    "FALLBACK": _bool("FALLBACK"),
    "WEIGHTS_DIGEST": _weights_digest,
    "TRANSPORT": _one_of("TRANSPORT", Transport, "'auto' or 'http'"),
    "CONNECTIONS": _integer("CONNECTIONS", 1, 16),
    "CHUNK_MIB": _integer("CHUNK_MIB", 1, MAX_CHUNK_MIB),
    "VERIFY": _bool("VERIFY"),
    "HCCL_BUFFER_SIZE": _integer("HCCL_BUFFER_SIZE", 1, 4096),
    "CONNECT_TIMEOUT": _seconds("CONNECT_TIMEOUT"),
    "HANDSHAKE_TIMEOUT": _seconds("HANDSHAKE_TIMEOUT"),
    "PROGRESS_TIMEOUT": _seconds("PROGRESS_TIMEOUT"),
    "SECRET_FILE": _path("SECRET_FILE"),
    "TLS_CERT": _path("TLS_CERT"),
    "TLS_KEY": _path("TLS_KEY"),
    "TLS_CA": _path("TLS_CA"),
    "TLS_SERVER_NAME": _host(
        "TLS_SERVER_NAME", "the name or IP address in the sources' certificates"
    ),
    "TOKEN_FILE": _path("TOKEN_FILE"),
}
assert {*map(str.lower, _PARSERS), "disk"} == {field.name for field in fields(NetLoaderConfig)}
KEYS = sorted((*_PARSERS, "CONFIG_FILE"))
