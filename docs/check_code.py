"""Fails when the configuration tables or the log lines in the docs are not those of the code."""

import ast
import re
import sys
from collections.abc import Iterable
from dataclasses import MISSING, fields
from enum import Enum
from pathlib import Path

ROOT = Path(__file__).parent.parent
GUIDE = ROOT / "docs/source/user_guide/feature_guide/netloader.md"
sys.path.insert(0, str(ROOT))

from vllm_ascend.model_loader.netloader.config import _PARSERS, NetLoaderConfig  # noqa: E402
from vllm_ascend.model_loader.netloader.errors import ConfigError  # noqa: E402

VARIES = "…"


def main() -> int:
    """Check everything and return the exit status."""
    tables = {
        path.name: rows_of(path, "config table", "end of config table")
        for path in (GUIDE, ROOT / "README.md")
    }
    problems = []
    if len(set(map(str, tables.values()))) > 1:
        problems.append(f"the config tables in {' and '.join(tables)} differ")
    problems += wrong_in_config(tables[GUIDE.name])
    texts = fragments()
    lines = [row[0] for row in rows_of(GUIDE, "log lines", "end of log lines")]
    problems += [f"the code says nothing like {line}" for line in lines if not is_said(line, texts)]
    checked = f"{len(tables[GUIDE.name])} keys and {len(lines)} log lines"
    print(*problems, f"{checked}, {len(problems)} problems", sep="\n")
    return 1 if problems else 0


def rows_of(path: Path, begin: str, end: str) -> list[list[str]]:
    """Return the cells of the table between two comments, without its head."""
    text = path.read_text(encoding="utf-8")
    table = text.partition(f"<!-- {begin}")[2].partition(f"<!-- {end}")[0].splitlines()
    rows = [line for line in table if line.startswith("|")][2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def wrong_in_config(table: list[list[str]]) -> Iterable[str]:
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
            integer = "." not in numbers[1] and isinstance(known, int)
            for value, good in ((low, True), (high, True), (low / 2, False), (high + 1, False)):
                if _accepts(name, int(value) if integer else value) is not good:
                    yield f"{name} allows other values than {allowed}"
                    break


def fragments() -> set[str]:
    """Return the literal parts of all texts in the code."""
    files = (ROOT / "vllm_ascend").rglob("*.py")
    nodes = [node for path in files for node in ast.walk(ast.parse(path.read_text()))]
    values = [node.value for node in nodes if isinstance(node, ast.Constant)]
    texts = [value for value in values if isinstance(value, str)]
    return {part for text in texts for part in re.split(r"%[-\d.]*[sdfrg]", text)}


def is_said(line: str, texts: set[str]) -> bool:
    """Return whether each literal part of a log line is in some text of the code."""
    return all(_is_part(part, texts) for part in line.strip("`").split(VARIES))


def _is_part(part: str, texts: set[str]) -> bool:
    part = part.strip(" :;,()")
    if any(part in text for text in texts):
        return True
    left, colon, right = part.partition(": ")  # one text put in front of another
    return bool(colon) and _is_part(left, texts) and _is_part(right, texts)


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


if __name__ == "__main__":
    sys.exit(main())
