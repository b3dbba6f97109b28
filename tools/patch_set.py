"""Puts NetLoader into a source tree of vLLM Ascend, and takes it out again.

usage: python tools/patch_set.py apply TREE
       python tools/patch_set.py undo TREE

The package, its unit tests, its end-to-end tests and its guide go where vLLM Ascend keeps such
things. What they replace stays in TREE/.netloader_patch until `undo`. Python alone is enough.
"""

import argparse
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

PROJECT = Path(__file__).parents[1]
PACKAGE = "vllm_ascend/model_loader/netloader"
UNIT_TESTS = "tests/ut/model_loader/netloader"
# Some of them start instances with two ranks.
E2E_TESTS = "tests/e2e/pull_request/two_card/netloader"
GUIDE = "docs/source/user_guide/feature_guide"
CHINESE = "docs/source/locale/zh_CN/LC_MESSAGES/user_guide/feature_guide"

# Pattern of files here -> the folder there.
COPIED = {
    f"{PACKAGE}/**/*.py": PACKAGE,
    f"{UNIT_TESTS}/*.py": UNIT_TESTS,
    "tests/certificates.py": UNIT_TESTS,
    "tests/checkpoints.py": UNIT_TESTS,
    "tests/conftest.py": "tests/ut/model_loader",
    "tests/identity.py": UNIT_TESTS,
    "tests/name_server.py": UNIT_TESTS,
    "tools/make_model.py": UNIT_TESTS,
    **{
        f"tests/conformance/{name}.py": f"{UNIT_TESTS}/conformance"
        for name in ("__init__", "faults", "models", "sides", "ways")
    },
    **{
        f"tests/e2e/{name}.py": E2E_TESTS
        for name in (
            *("__init__", "conftest", "support", "test_serve"),
            *("forking", "forks", "hub_process", "killing_proxy"),
            *("loading", "ranks", "ranks_process", "views"),
        )
    },
    "tools/netloader_view.py": E2E_TESTS,
    "tools/vllm_server.py": E2E_TESTS,
    f"{GUIDE}/netloader*.md": GUIDE,
    f"{CHINESE}/netloader*.po": CHINESE,
}
# Whole folders that are NetLoader's there, too: what is left of the old one is removed.
OWN = (PACKAGE, UNIT_TESTS)
# Modules of the tests that have another name there.
MODULES = {
    "tests.certificates": "tests.ut.model_loader.netloader.certificates",
    "tests.checkpoints": "tests.ut.model_loader.netloader.checkpoints",
    "tests.identity": "tests.ut.model_loader.netloader.identity",
    "tests.name_server": "tests.ut.model_loader.netloader.name_server",
    "tests.conformance": "tests.ut.model_loader.netloader.conformance",
    "tests.e2e": "tests.e2e.pull_request.two_card.netloader",
    "tools.make_model": "tests.ut.model_loader.netloader.make_model",
    "tools.netloader_view": "tests.e2e.pull_request.two_card.netloader.netloader_view",
    "tools.vllm_server": "tests.e2e.pull_request.two_card.netloader.vllm_server",
}
# Files there, a line of each, and the lines that come after that one.
LINES = (
    ("requirements.txt", "pyyaml", ("cryptography>=42", "xxhash>=3.5")),
    ("requirements-dev.txt", "pytest-mock", ("hypothesis", "pytest-timeout")),
    ("docs/requirements-docs.txt", "myst-parser", ("sphinxcontrib-mermaid",)),
    ("docs/source/conf.py", '    "myst_parser",', ('    "sphinxcontrib.mermaid",',)),
    ("docs/source/conf.py", "myst_heading_anchors", ('myst_fence_as_directive = ["mermaid"]',)),
    (
        f"{GUIDE}/index.md",
        "netloader",
        (
            *("netloader_configuration", "netloader_scale_out", "netloader_parallel_size"),
            *("netloader_ascend", "netloader_operations", "netloader_protocol"),
        ),
    ),
)
REGISTERS = "from .model_loader.netloader import register_netloader"
STATE = ".netloader_patch"


class PatchError(Exception):
    """Nothing was done, for this reason."""


@dataclass(frozen=True)
class Change:
    """What becomes of a file.

    Attributes:
        path: in the tree.
        old: its bytes before; nothing if there was no such file.
        new: its bytes after; nothing if it is removed.
    """

    path: str
    old: bytes | None
    new: bytes | None

    @property
    def kind(self) -> str:
        if self.old is None:
            return "added"
        if self.new is None:
            return "removed"
        return "edited" if any(self.path == path for path, *_ in LINES) else "replaced"


def apply(tree: Path) -> list[Change]:
    """Puts everything into a tree and returns what has changed."""
    _check_is_vllm_ascend(tree)
    if (tree / STATE).exists():
        raise PatchError(f"{tree} has the patch set already; undo it first")
    changes = list(_planned(tree))
    _record(tree, changes)
    for change in changes:
        _write(tree / change.path, change.new)
    return changes


def undo(tree: Path) -> list[str]:
    """Restores a tree and returns the paths of the files that were restored or removed."""
    file = tree / STATE / "files.json"
    if not file.is_file():
        raise PatchError(f"{tree} does not have the patch set: there is no {STATE}/files.json")
    digests = json.loads(file.read_text())
    olds = {path: _read(tree / STATE / "replaced" / path) for path in digests}
    changed = [
        path
        for path, digest in digests.items()
        if _digest(_read(tree / path)) not in (digest, _digest(olds[path]), None)
    ]
    if changed:
        raise PatchError(
            "these files have changed since the patch set was applied; save them elsewhere, remove "
            "them and undo again:\n" + "\n".join(f"  {path}" for path in changed)
        )
    for path, old in olds.items():
        if old is None:
            _write(tree / path, None)
            _remove_empty_folders(tree, tree / path)
        else:
            _copy(tree / STATE / "replaced" / path, tree / path)
    shutil.rmtree(tree / STATE)
    return list(digests)


def _check_is_vllm_ascend(tree: Path) -> None:
    for name in ("setup.py", "vllm_ascend/__init__.py", "vllm_ascend/platform.py"):
        if not (tree / name).is_file():
            raise PatchError(f"{tree} is no source tree of vLLM Ascend: it has no {name}")
    if REGISTERS not in (tree / "vllm_ascend/__init__.py").read_text():
        raise PatchError(
            f"{tree}/vllm_ascend/__init__.py does not register NetLoader; a tree in which it says "
            f"'{REGISTERS}' is needed"
        )


def _planned(tree: Path) -> Iterator[Change]:
    placed = dict(_placed())
    for path, new in placed.items():
        old = _read(tree / path)
        if old != new:
            yield Change(path, old, new)
    for folder in OWN:
        for file in sorted((tree / folder).rglob("*")):
            path = file.relative_to(tree).as_posix()
            if file.is_file() and path not in placed and "__pycache__" not in file.parts:
                yield Change(path, file.read_bytes(), None)
    for path in dict.fromkeys(path for path, *_ in LINES):
        old = _read(tree / path)
        if old is None:
            raise PatchError(f"{tree} has no {path}, to which lines are to be added")
        new = _with_lines(path, old)
        if new != old:
            yield Change(path, old, new)


def _with_lines(path: str, old: bytes) -> bytes:
    here = old.decode().splitlines(keepends=True)
    for after, lines in [(after, lines) for name, after, lines in LINES if name == path]:
        names = [_name(line) for line in here]
        missing = [f"{line}\n" for line in lines if _name(line) not in names]
        if not missing:
            continue
        if _name(after) not in names:
            raise PatchError(f"{path} has no line {after.strip()!r} to add others after")
        where = names.index(_name(after)) + 1
        here[where:where] = missing
    return "".join(here).encode()


def _name(line: str) -> str:
    """Returns what a requirement or an assignment is of, and any other line as it is."""
    return re.split(r"\s*[<>=~!]=?", line, maxsplit=1)[0].strip()


def _placed() -> Iterator[tuple[str, bytes]]:
    """Yields where a file goes, and its bytes there."""
    names = re.compile(rf"\b({'|'.join(map(re.escape, MODULES))})\b")
    for pattern, folder in COPIED.items():
        files = sorted(PROJECT.glob(pattern))
        if not files:
            raise PatchError(f"{PROJECT} has no {pattern}")
        base = PROJECT / pattern.partition("/*")[0]
        for file in files:
            below = file.relative_to(base) if base.is_dir() else PurePosixPath(file.name)
            data = file.read_bytes()
            if folder.startswith("tests/"):
                data = names.sub(lambda found: MODULES[found[0]], data.decode()).encode()
            yield f"{folder}/{below.as_posix()}", data


def _record(tree: Path, changes: list[Change]) -> None:
    """Writes what undo needs before anything else changes."""
    state = tree / STATE
    for change in changes:
        if change.old is not None:
            _copy(tree / change.path, state / "replaced" / change.path)
    _write(state / ".gitignore", b"*\n")
    digests = {change.path: _digest(change.new) for change in changes}
    _write(state / "files.json", json.dumps(digests, indent=1).encode())


def _read(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() else None


def _write(file: Path, data: bytes | None) -> None:
    if data is None:
        file.unlink(missing_ok=True)
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)


def _copy(file: Path, to: Path) -> None:
    """Copies a file with its mode and its time."""
    to.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(file, to)


def _remove_empty_folders(tree: Path, path: Path) -> None:
    """Removes the folders above a file in which nothing but bytecode is left."""
    for folder in path.parents:
        if folder == tree or not folder.is_dir():
            continue
        if any(each.name != "__pycache__" for each in folder.iterdir()):
            return
        shutil.rmtree(folder)


def _digest(data: bytes | None) -> str | None:
    return None if data is None else hashlib.sha256(data).hexdigest()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=("apply", "undo"))
    parser.add_argument("tree", type=Path, metavar="TREE", help="a source tree of vLLM Ascend")
    given = parser.parse_args(arguments)
    try:
        if given.what == "undo":
            restored = undo(given.tree)
            print(f"patch_set: {given.tree} is as it was: {len(restored)} files")
            return 0
        changes = apply(given.tree)
    except PatchError as error:
        print(f"patch_set: {error}", file=sys.stderr)
        return 1
    for change in changes:
        print(f"{change.kind:8}  {change.path}")
    undone = f"python tools/patch_set.py undo {given.tree}"
    print(
        f"patch_set: {len(changes)} files; what was replaced is in {STATE}; undo it with {undone}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
