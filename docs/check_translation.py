"""Fails when the Chinese translation is not that of the English text.

usage: check_translation.py POT_FOLDER, after `sphinx-build -b gettext`
"""

import re
import sys
from pathlib import Path

from babel.messages.catalog import Catalog
from babel.messages.pofile import read_po

TRANSLATIONS = Path(__file__).parent / "source/locale/zh_CN/LC_MESSAGES"
SHOWN = 20
HINT = "run `make gettext`, then translate"
# What has to be the same in both languages: code, addresses of links, and a diagram's nodes and
# arrows, which are all that is left of it without its labels.
SAME = re.compile(r"`+[^`]+`+|\]\([^)]*\)")
LABELS = re.compile(r'"[^"]*"|(?<=: ).*|(?<=alt ).*|(?<=else ).*|(?<=loop ).*|(?<= as ).*')


def main() -> int:
    """Compare every catalog and return the exit status."""
    messages = Path(sys.argv[1])
    domains = {path.relative_to(messages).with_suffix("") for path in messages.rglob("*.pot")}
    existing = TRANSLATIONS.rglob("*.po")
    translated = {path.relative_to(TRANSLATIONS).with_suffix("") for path in existing}
    problems = [f"{domain}.po belongs to no page" for domain in sorted(translated - domains)]
    count = 0
    for domain in sorted(domains):
        template = _read(messages / f"{domain}.pot")
        path = TRANSLATIONS / f"{domain}.po"
        found = compare(template, _read(path)) if path.exists() else ["is missing"]
        problems += [f"{path.relative_to(Path(__file__).parent)}: {problem}" for problem in found]
        count += len(template)
    print(*problems[:SHOWN], f"{count} messages, {len(problems)} problems", sep="\n")
    if problems:
        print(HINT)
    return 1 if problems else 0


def compare(template: Catalog, translation: Catalog) -> list[str]:
    """Return what is wrong with a page's translation."""
    problems = []
    for message in template:
        if not message.id:
            continue
        shown = repr(message.id[:60])
        chinese = translation.get(message.id)
        if chinese is None:
            problems.append(f"{shown} is not there")
        elif not chinese.string:
            problems.append(f"{shown} is not translated")
        elif chinese.fuzzy:
            problems.append(f"{shown} is fuzzy")
        elif _fixed(message.id) != _fixed(chinese.string):
            problems.append(f"{shown} has other code, links or arrows in Chinese")
    stale = [message.id for message in translation if message.id and message.id not in template]
    problems += [f"{text[:60]!r} is no text of the page any more" for text in stale]
    return problems


def _fixed(text: str) -> list[str]:
    if text.startswith(("flowchart", "sequenceDiagram")):
        return LABELS.sub("", text).splitlines()
    return sorted(SAME.findall(text))


def _read(path: Path) -> Catalog:
    with path.open("rb") as file:
        return read_po(file)


if __name__ == "__main__":
    sys.exit(main())
