"""The patch set, on a small tree that has what vLLM Ascend's has where it matters."""

import re
import subprocess
import sys

import pytest

from tools.patch_set import E2E_TESTS, GUIDE, PACKAGE, PROJECT, REGISTERS, STATE, UNIT_TESTS

FILES = {
    "setup.py": "",
    "vllm_ascend/__init__.py": f"def register_model_loader():\n    {REGISTERS}\n",
    "vllm_ascend/platform.py": "",
    f"{PACKAGE}/__init__.py": "# the old one\n",
    f"{PACKAGE}/executor/old.py": "# without a namesake\n",
    f"{UNIT_TESTS}/test_old.py": "# a test of the old one\n",
    f"{GUIDE}/netloader.md": "# the old guide\n",
    f"{GUIDE}/index.md": ":::{toctree}\nlora\nnetloader\nrfork\n:::\n",
    "requirements.txt": "pyyaml\nregex\n",
    "requirements-dev.txt": "pytest-mock\nlm-eval==0.4.12",
    "docs/requirements-docs.txt": "myst-parser\n",
    "docs/source/conf.py": 'extensions = [\n    "myst_parser",\n]\nmyst_heading_anchors = 5\n',
}
ADDED = f"{PACKAGE}/registry.py"


@pytest.fixture
def tree(tmp_path):
    tree = tmp_path / "tree"
    for path, text in FILES.items():
        file = tree / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (tree / PACKAGE / "executor/old.py").chmod(0o755)
    return tree


def files_in(tree):
    """Every path with its mode, and the bytes of files."""
    return {
        path.relative_to(tree).as_posix(): (
            path.stat().st_mode,
            path.read_bytes() if path.is_file() else None,
        )
        for path in tree.rglob("*")
    }


def run(what, tree):
    command = [sys.executable, str(PROJECT / "tools/patch_set.py"), what, str(tree)]
    return subprocess.run(command, capture_output=True, text=True)


def refused(what, tree):
    """What it says when it refuses, having left the tree as it was."""
    before = files_in(tree)
    done = run(what, tree)
    assert done.returncode == 1
    assert not done.stdout
    assert files_in(tree) == before
    return done.stderr


def test_each_kind_of_file_goes_to_its_place_and_is_listed(tree):
    done = run("apply", tree)
    assert done.returncode == 0, done.stderr
    said = re.findall(r"^(added|replaced|removed|edited) +(.*)$", done.stdout, re.M)
    kinds = {path: kind for kind, path in said}
    for path, kind in {
        f"{PACKAGE}/__init__.py": "replaced",
        f"{PACKAGE}/executor/old.py": "removed",
        f"{PACKAGE}/executor/devices/npu.py": "added",
        f"{UNIT_TESTS}/test_old.py": "removed",
        f"{UNIT_TESTS}/test_netloader_store.py": "added",
        f"{UNIT_TESTS}/conformance/faults.py": "added",
        f"{E2E_TESTS}/test_serve.py": "added",
        f"{GUIDE}/netloader.md": "replaced",
        f"{GUIDE}/index.md": "edited",
        "requirements.txt": "edited",
    }.items():
        assert kinds[path] == kind, path
        assert (tree / path).exists() == (kind != "removed")
    assert (tree / ADDED).read_bytes() == (PROJECT / ADDED).read_bytes()
    now = {path for path in files_in(tree) if (tree / path).is_file() and STATE not in path}
    assert now - FILES.keys() == {path for path, kind in kinds.items() if kind == "added"}


def test_lines_are_added_where_they_belong_and_only_once(tree):
    (tree / "requirements.txt").write_text("pyyaml\ncryptography\nxxhash==3.6\n")
    assert run("apply", tree).returncode == 0
    after = {path: (tree / path).read_text() for path in FILES if (tree / path).exists()}
    assert after["requirements.txt"] == "pyyaml\ncryptography\nxxhash==3.6\n"
    assert after["requirements-dev.txt"].split() == [
        *("pytest-mock", "hypothesis", "pytest-timeout", "lm-eval==0.4.12")
    ]
    assert after[f"{GUIDE}/index.md"].split()[1:-1] == [
        *("lora", "netloader", "netloader_configuration", "netloader_scale_out"),
        *("netloader_parallel_size", "netloader_ascend"),
        *("netloader_operations", "netloader_protocol", "rfork"),
    ]
    assert after["docs/source/conf.py"] == (
        'extensions = [\n    "myst_parser",\n    "sphinxcontrib.mermaid",\n]\n'
        'myst_heading_anchors = 5\nmyst_fence_as_directive = ["mermaid"]\n'
    )


def test_the_tests_import_nothing_that_is_not_carried(tree):
    assert run("apply", tree).returncode == 0
    for file in [*(tree / UNIT_TESTS).rglob("*.py"), *(tree / E2E_TESTS).rglob("*.py")]:
        text = file.read_text()
        for name in re.findall(r"(?:from|import|\"-m\", \")\s*((?:tests|tools)\.[\w.]+)", text):
            assert (tree / name.replace(".", "/")).with_suffix(".py").exists(), (file, name)
        for name in re.findall(r"^\s*from \.(\w+) import", text, re.M):
            assert (file.parent / f"{name}.py").exists() or name == "model_loader", (file, name)
        assert not re.search(r"^\s*from \.\.", text, re.M), file


def test_undo_restores_every_byte_and_leaves_nothing(tree):
    before = files_in(tree)
    assert run("apply", tree).returncode == 0
    for folder in (PACKAGE, UNIT_TESTS, f"{UNIT_TESTS}/conformance"):  # as after a run of the tests
        (tree / folder / "__pycache__").mkdir()
        (tree / folder / "__pycache__/module.pyc").touch()
    done = run("undo", tree)
    assert done.returncode == 0, done.stderr
    after = files_in(tree)
    for folder in (PACKAGE, UNIT_TESTS):
        after = {path: what for path, what in after.items() if f"{folder}/__py" not in path}
    assert after == before


def test_it_can_be_applied_again_after_an_undo(tree):
    for what in ("apply", "undo", "apply"):
        assert run(what, tree).returncode == 0


def test_a_file_of_somebody_else_in_a_new_folder_stays(tree):
    assert run("apply", tree).returncode == 0
    theirs = tree / E2E_TESTS / "test_theirs.py"
    theirs.touch()
    assert run("undo", tree).returncode == 0
    assert [path.name for path in theirs.parent.iterdir()] == [theirs.name]


def test_a_file_that_has_gone_does_not_stop_undo(tree):
    before = files_in(tree)
    assert run("apply", tree).returncode == 0
    for path in (ADDED, f"{GUIDE}/netloader.md"):
        (tree / path).unlink()
    assert run("undo", tree).returncode == 0
    assert files_in(tree) == before


@pytest.mark.parametrize("path", [ADDED, f"{GUIDE}/netloader.md", f"{PACKAGE}/executor/old.py"])
def test_undo_refuses_to_lose_what_was_changed_since(tree, path):
    assert run("apply", tree).returncode == 0
    (tree / path).write_text("# new work\n")
    said = refused("undo", tree)
    assert said.endswith(f"save them elsewhere, remove them and undo again:\n  {path}\n")
    (tree / path).unlink()
    assert run("undo", tree).returncode == 0


def test_apply_twice_and_undo_without_apply_are_refused(tree):
    said = refused("undo", tree)
    assert f"{tree} does not have the patch set: there is no {STATE}/files.json" in said
    assert run("apply", tree).returncode == 0
    assert f"{tree} has the patch set already; undo it first" in refused("apply", tree)


@pytest.mark.parametrize("path", ["setup.py", "vllm_ascend/platform.py"])
def test_another_tree_is_refused(tree, path):
    (tree / path).unlink()
    said = refused("apply", tree)
    assert said == f"patch_set: {tree} is no source tree of vLLM Ascend: it has no {path}\n"


def test_a_tree_that_registers_no_netloader_is_refused(tree):
    (tree / "vllm_ascend/__init__.py").write_text("")
    assert "vllm_ascend/__init__.py does not register NetLoader" in refused("apply", tree)


def test_a_tree_without_the_place_for_a_line_is_refused(tree):
    (tree / "requirements.txt").write_text("regex\n")
    said = refused("apply", tree)
    assert "requirements.txt has no line 'pyyaml' to add others after" in said
    (tree / "requirements.txt").unlink()
    assert f"{tree} has no requirements.txt, to which lines" in refused("apply", tree)
