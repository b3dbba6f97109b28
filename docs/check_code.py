"""Fails when tables, log lines or the protocol in the docs are not those of the code."""

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, fields
from enum import Enum
from pathlib import Path

import msgspec.inspect

ROOT = Path(__file__).parent.parent
PAGES = ROOT / "docs/source/user_guide/feature_guide"
README, CONFIGURATION = ROOT / "README.md", PAGES / "netloader_configuration.md"
OPERATIONS, PROTOCOL = PAGES / "netloader_operations.md", PAGES / "netloader_protocol.md"
ASCEND = PAGES / "netloader_ascend.md"
sys.path.insert(0, str(ROOT))

from tests.npu_sim import matrix  # noqa: E402
from vllm_ascend.model_loader.netloader import config, identity  # noqa: E402
from vllm_ascend.model_loader.netloader.config import _PARSERS, NetLoaderConfig  # noqa: E402
from vllm_ascend.model_loader.netloader.errors import ConfigError, SourceBusy  # noqa: E402
from vllm_ascend.model_loader.netloader.executor.chunks import blocks, manifest  # noqa: E402
from vllm_ascend.model_loader.netloader.interaction import api, server  # noqa: E402

VARIES = "…"
KEYS_IN_README = 6
# Bodies that have no table: a base class, and those without fields.
NO_TABLE = {"Struct", "Noted", "Check"}


def main() -> int:
    """Check everything and return the exit status."""
    texts = fragments()
    lines = [row[0] for row in rows_of(OPERATIONS, "log lines")]
    samples = [line for page in (README, *sorted(PAGES.glob("*.md"))) for line in sampled(page)]
    table = rows_of(CONFIGURATION, "config table")
    problems = [
        *wrong_in_readme(rows_of(README, "config table"), table),
        *wrong_in_config(table),
        *wrong_chunk_size(table),
        *(f"the code says nothing like {line}" for line in lines if not is_said(line, texts)),
        *(f"the code logs nothing like {line}" for line in samples if not is_logged(line, texts)),
        *wrong_in_protocol(),
        *wrong_in_matrix(rows_of(ASCEND, "matrix")),
    ]
    checked = f"{len(table)} keys, {len(lines)} log lines, {len(samples)} samples, the protocol"
    print(*problems, f"{checked}: {len(problems)} problems", sep="\n")
    return 1 if problems else 0


def rows_of(path: Path, name: str) -> list[list[str]]:
    """Return the cells of the tables between two comments, without their heads."""
    text = path.read_text(encoding="utf-8")
    end = name.partition(":")[0]
    between = re.search(rf"<!-- {name}\b.*?-->\n(.*?)<!-- end of {end} -->", text, re.DOTALL)
    if between is None:
        raise SystemExit(f"{path.name} has no {name}")
    # Cells may have bars of their own, in code and escaped; none does so far.
    tables = re.findall(r"(?:^\|.*\n)+", between[1], re.MULTILINE)
    rows = [row for table in tables for row in table.splitlines()[2:]]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def wrong_in_readme(readme: list[list[str]], guide: list[list[str]]) -> Iterator[str]:
    """Say where README's keys are not some of the guide's."""
    if len(readme) != KEYS_IN_README:
        yield f"README.md has {len(readme)} keys and should have {KEYS_IN_README}"
    for row in readme:
        if row not in guide:
            yield f"README.md has another row for {row[0]} than the guide"


def wrong_in_config(table: list[list[str]]) -> Iterator[str]:
    """Say where a table is not what config.py says."""
    keys = {cell.strip("`") for cell, *_ in table}
    for key in sorted(keys ^ {*_PARSERS, "CONFIG_FILE"}):
        yield f"{key} is in the config table or in config.py, but not in both"
    defaults = {field.name.upper(): field.default for field in fields(NetLoaderConfig)}
    for key, default, allowed, _ in table:
        name = key.strip("`")
        known = defaults.get(name)
        if known not in (None, MISSING) and default.strip("`") != _shown(known):
            yield f"{name} has the default {_shown(known)}"
        if numbers := re.fullmatch(r"([\d.]+) to (\d+)", allowed):
            low, high = map(float, numbers.groups())
            below = low / 2 if low else -1.0
            for value, good in ((low, True), (high, True), (below, False), (high + 1, False)):
                if _accepts(name, int(value) if value.is_integer() else value) is not good:
                    yield f"{name} allows other values than {allowed}"
                    break


def wrong_chunk_size(table: list[list[str]]) -> Iterator[str]:
    """Say whether a table has another default for CHUNK_MIB than target.py."""
    target = ROOT / "vllm_ascend/model_loader/netloader/loading/target.py"
    code = target.read_text(encoding="utf-8")
    sizes = re.search(r"^_CHUNK_MIB, _CHUNK_MIB_GROUP = (\d+), (\d+)$", code, re.MULTILINE)
    shown = "{} over HTTP, {} in groups".format(*(sizes.groups() if sizes else ("?", "?")))
    if ["`CHUNK_MIB`", shown] not in [row[:2] for row in table]:
        yield f"CHUNK_MIB has the default {shown}"


def fragments() -> set[str]:
    """Return the texts in the code."""
    files = (ROOT / "vllm_ascend").rglob("*.py")
    nodes = [node for path in files for node in ast.walk(ast.parse(path.read_text()))]
    values = [node.value for node in nodes if isinstance(node, ast.Constant)]
    return {value for value in values if isinstance(value, str)}


def is_said(line: str, texts: set[str]) -> bool:
    """Return whether each literal part of a log line is in some text of the code."""
    parts = {part for text in texts for part in _PLACEHOLDER.split(text)}
    return all(_is_part(part, parts) for part in line.strip("`").split(VARIES))


def _is_part(part: str, texts: set[str]) -> bool:
    part = part.strip(" :;,()")
    if any(part in text for text in texts):
        return True
    left, colon, right = part.partition(": ")  # one text put in front of another
    return bool(colon) and _is_part(left, texts) and _is_part(right, texts)


def sampled(page: Path) -> list[str]:
    """Return the sample lines of a log on a page."""
    found = re.findall(r"^(?: *|\w+: )(NetLoader rank .*)$", page.read_text("utf-8"), re.MULTILINE)
    return [line.replace(" (not checked)", "") for line in found]


def is_logged(line: str, texts: set[str]) -> bool:
    """Return whether a line is what one of the code's log calls can write."""
    return any(
        re.fullmatch(".+".join(map(re.escape, _PLACEHOLDER.split(text))), line)
        for text in texts
        if text.startswith("NetLoader rank %d: ") and text != "NetLoader rank %d: %s"
    )


def wrong_in_protocol() -> Iterator[str]:
    """Say where the protocol page is not what the code says."""
    paths = {path.strip("`"): method for method, path, *_ in rows_of(PROTOCOL, "paths")}
    if paths != api.METHODS:
        yield f"the paths differ: {sorted(paths.items() ^ api.METHODS.items())}"
    codes = [[cell.strip("`") for cell in row] for row in rows_of(PROTOCOL, "codes")]
    expected = [
        [code.text, str(code.status.value), _what_the_client_does(code), code.about]
        for code in api.Code
    ]
    for row in [row for row in expected + codes if row not in codes or row not in expected]:
        yield f"the table of codes or api.Code has {row}, but not both"
    yield from _wrong_in_bodies()
    yield from _wrong_in_limits()


def _what_the_client_does(code: api.Code) -> str:
    if code is api.Code.ASK_OTHERS:
        return "other blocks"
    return "asks again later" if code.error is SourceBusy else "next source"


def _wrong_in_bodies() -> Iterator[str]:
    kinds = {
        name: kind
        for module in (api, manifest, identity)
        for name, kind in vars(module).items()
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct)
    }
    page = PROTOCOL.read_text(encoding="utf-8")
    tables = set(re.findall(r"<!-- body: (\w+) -->", page))
    for name in sorted(tables ^ (kinds.keys() - NO_TABLE)):
        yield f"{name} is a body in the code or on the page, but not in both"
    for name in sorted(tables & kinds.keys()):
        here = [(row[0].strip("`"), row[1] == "yes") for row in rows_of(PROTOCOL, f"body: {name}")]
        there = [
            (field.encode_name, field.required) for field in msgspec.structs.fields(kinds[name])
        ]
        if here != there:
            yield f"{name} has other fields: {here} on the page, {there} in the code"


def _wrong_in_limits() -> Iterator[str]:
    known: dict[str, float] = {"BLOCK_BYTES": blocks.BLOCK_BYTES}
    for module in (api, server, identity, manifest):
        known |= {name: value for name, value in vars(module).items() if name.startswith("MAX_")}
    known["MAX_MODEL_NAME_BYTES"] = config.MAX_MODEL_NAME_BYTES
    known |= dict(_longest_lists())
    page = {
        name.strip("`"): float(value.split()[0].replace(",", ""))
        for name, value, _ in rows_of(PROTOCOL, "limits")
    }
    if page != known:
        yield f"the limits differ: {sorted(page.items() ^ known.items())}"


def _longest_lists() -> Iterable[tuple[str, float]]:
    for kind in (api.Joined, api.StoreSet, api.StoreValues, api.SendRuns, api.Problem):
        for field in msgspec.inspect.type_info(kind).fields:
            limit = getattr(field.type, "max_length", None)
            if limit is not None and isinstance(field.type, msgspec.inspect.ListType):
                yield f"{kind.__name__}.{field.name}", limit


def wrong_in_matrix(page: list[list[str]]) -> Iterator[str]:
    """Say where the table of models is not that of the tests."""
    expected = matrix.table()
    for row in page + expected:
        if row not in page or row not in expected:
            yield f"{ASCEND.name} or python -m tests.npu_sim.matrix has {row}, but not both"


def _accepts(key: str, value: object) -> bool:
    try:
        _PARSERS[key](value)
    except ConfigError:
        return False
    return True


def _shown(value: object) -> str:
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


_PLACEHOLDER = re.compile(r"%[-\d.]*[sdfrg]")

if __name__ == "__main__":
    sys.exit(main())
