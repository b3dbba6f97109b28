"""The patch set in the source distribution of the released vLLM Ascend."""

import subprocess
import sys
import tarfile

import pytest

from tools import patch_set

from .simulator import CACHE, environment

pytestmark = pytest.mark.timeout(600)

RELEASE = "0.23.0.post1"
NAME = f"vllm_ascend-{RELEASE}"
# All of them take minutes and run in "make test-ut": these are some that import much, and some with
# the modules that have other names there.
SOME = ("api", "compat", "config", "identity", "registry", "store")


def run(*arguments, cwd, **changes):
    """Runs Python with NPUs that only who asks for them sees, as a test of vLLM Ascend's does."""
    # Each of the tests says itself where its tensors are.
    changes |= {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "SOC_VERSION": "ascend910b1"}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=cwd, env=environment(changes), capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    file = CACHE / f"{NAME}.tar.gz"
    if not file.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        download = ("-m", "pip", "download", "-q", "--no-deps", "--no-build-isolation")
        release = ("--no-binary", "vllm-ascend", f"vllm-ascend=={RELEASE}")
        done = run(*download, "-d", str(CACHE), *release, cwd=CACHE)
        if not file.exists():
            pytest.skip(f"pip gives no source distribution of vLLM Ascend: {done.stderr[-500:]}")
    folder = tmp_path_factory.mktemp("release")
    with tarfile.open(file) as archive:
        archive.extractall(folder, filter="data")
    return folder / NAME


def files_in(tree):
    """All but what Python and hypothesis leave where tests ran."""
    return {
        path.relative_to(tree).as_posix(): path.read_bytes()
        for path in tree.rglob("*")
        if path.is_file() and not {"__pycache__", ".hypothesis"} & {*path.parts}
    }


def test_unit_tests_pass_inside_the_tree_and_undo_restores_it(tree):
    before = files_in(tree)
    changes = patch_set.apply(tree)
    shipped = f"{patch_set.PACKAGE}/netloader.py"
    assert {change.path: change.kind for change in changes}[shipped] == "replaced"
    assert not [change for change in changes if change.kind == "edited" and change.new is None]

    tests = patch_set.UNIT_TESTS
    some = [f"{tests}/test_netloader_{name}.py" for name in SOME]
    # Its conftest.py mocks torch_npu and needs a tree that was built; these tests need neither.
    options = ("-q", "-p", "no:cacheprovider", "--confcutdir=tests/ut/model_loader")
    done = run("-m", "pytest", *options, *some, cwd=tree, PYTHONPATH=str(tree))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    where = "import vllm_ascend.model_loader.netloader.registry as r; print(r.__file__)"
    found = run("-c", where, cwd=tree, PYTHONPATH=str(tree))
    assert found.stdout.strip() == str(tree / patch_set.PACKAGE / "registry.py"), found.stderr

    # All of the other tests are found as well, and what they import.
    collect = (*options, "--collect-only", tests)
    collected = run("-m", "pytest", *collect, cwd=tree, PYTHONPATH=str(tree))
    assert collected.returncode == 0, collected.stdout[-3000:] + collected.stderr[-1000:]

    patch_set.undo(tree)
    assert files_in(tree) == before
