"""The two wheels, what happens when the wrong one is installed, and the command that says it."""

import functools
import json
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser

import pytest

from vllm_ascend.model_loader import netloader

from .forks import PROJECT, inherited

NETLOADER = "vllm_ascend/model_loader/netloader"
VERSION = netloader.__version__
DIST_INFO = {"METADATA", "RECORD", "WHEEL", "top_level.txt", "licenses/LICENSE"}
SCRIPTS = ["[console_scripts]", f"netloader = {NETLOADER.replace('/', '.')}.__main__:main"]
CHECK = ("-P", "-m", "vllm_ascend.model_loader.netloader")

# What vLLM Ascend's own package does, as far as it matters here. Libraries below Python write to
# stdout as well.
ASCEND_INIT = """
import os

def register():
    return None

def register_model_loader():
    os.write(1, b"noise\\n")
    from .model_loader.netloader import register_netloader
    register_netloader()
"""
ASCEND_ENTRY_POINTS = """
[vllm.general_plugins]
ascend_model_loader = vllm_ascend:register_model_loader
[vllm.platform_plugins]
ascend = vllm_ascend:register
"""


def run(*arguments, cwd, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=inherited() | environment,
        capture_output=True,
        text=True,
    )


def build(tree, **environment):
    """Do what `pip wheel` does, in the only process of it that matters here."""
    code = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    return run("-c", code, cwd=tree, **environment)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the project in which both wheels were built, after builds of something else."""
    tree = tmp_path_factory.mktemp("project")
    for name in ("LICENSE", "pyproject.toml", "setup.py"):
        shutil.copy(PROJECT / name, tree)
    shutil.copytree(
        PROJECT / "vllm_ascend",
        tree / "vllm_ascend",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    stale = tree / "build/lib" / NETLOADER
    stale.mkdir(parents=True)
    (stale / "removed_long_ago.py").touch()
    for switch in ("1", "0", "1"):
        built = build(tree, NETLOADER_OVERLAY=switch)
        assert built.returncode == 0, built.stderr
    return tree


def wheel(tree, name):
    return zipfile.ZipFile(tree / f"dist/{name}-{VERSION}-py3-none-any.whl")


@pytest.fixture
def plain(tree):
    return wheel(tree, "vllm_ascend_netloader")


@pytest.fixture
def overlay(tree):
    return wheel(tree, "vllm_ascend_netloader_overlay")


def sources(tree, folder):
    return {path.relative_to(tree).as_posix() for path in (tree / folder).rglob("*.py")}


def metadata(wheel):
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    return Parser().parsestr(wheel.read(name).decode())


# What is in the wheels.


def test_the_plain_wheel_is_the_whole_package_with_the_plugin(tree, plain):
    dist_info = f"vllm_ascend_netloader-{VERSION}.dist-info"
    assert set(plain.namelist()) == sources(tree, "vllm_ascend") | {
        f"{dist_info}/{name}" for name in DIST_INFO | {"entry_points.txt"}
    }
    assert f"{NETLOADER}/__main__.py" in plain.namelist()
    assert plain.read(f"{dist_info}/entry_points.txt").decode().split("\n")[:5] == [
        *SCRIPTS,
        "",
        "[vllm.general_plugins]",
        "ascend_model_loader = vllm_ascend:register_model_loader",
    ]
    said = metadata(plain)
    assert (said["Name"], said["Version"]) == ("vllm-ascend-netloader", VERSION)
    needed = [each for each in said.get_all("Requires-Dist") if "extra" not in each]
    assert needed == ["cryptography>=42", "xxhash>=3.5"]


def test_the_overlay_wheel_is_the_folder_of_netloader_without_a_plugin(tree, overlay):
    dist_info = f"vllm_ascend_netloader_overlay-{VERSION}.dist-info"
    assert set(overlay.namelist()) == sources(tree, NETLOADER) | {
        f"{dist_info}/{name}" for name in DIST_INFO | {"entry_points.txt"}
    }
    assert overlay.read(f"{dist_info}/entry_points.txt").decode().split("\n")[:2] == SCRIPTS
    said = metadata(overlay)
    assert (said["Name"], said["Version"]) == ("vllm-ascend-netloader-overlay", VERSION)
    assert said.get_all("Requires-Dist") == ["cryptography>=42", "xxhash>=3.5"]


def test_a_build_leaves_nothing_in_the_tree(tree):
    left = {path.name for path in tree.iterdir()}
    assert left == {"LICENSE", "pyproject.toml", "setup.py", "vllm_ascend", "build", "dist"}
    assert [path.name for path in (tree / "build").rglob("*.py")] == ["removed_long_ago.py"]


def test_the_switch_is_1_0_or_empty(tree):
    built = build(tree, NETLOADER_OVERLAY="yes")
    assert built.returncode != 0
    assert "NETLOADER_OVERLAY is 'yes'; allowed: 1 " in built.stderr + built.stdout


# An environment made of folders on Python's path. That of the tests themselves has this project
# installed as editable, and comes after them.


@pytest.fixture
def site(tmp_path):
    (tmp_path / "site").mkdir()
    return tmp_path / "site"


def add_ascend(folder, *, package):
    """Put what vLLM Ascend has into a folder: its metadata, and its package or not."""
    info = folder / "vllm_ascend-0.23.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm_ascend\nVersion: 0.23.0\n")
    (info / "entry_points.txt").write_text(ASCEND_ENTRY_POINTS)
    if package:
        (folder / NETLOADER).mkdir(parents=True)
        (folder / "vllm_ascend/__init__.py").write_text(ASCEND_INIT)
        (folder / "vllm_ascend/platform.py").touch()
        (folder / "vllm_ascend/model_loader/__init__.py").touch()
        (folder / NETLOADER / "__init__.py").write_text("register_netloader = print\n")


def python(site, *arguments, **environment):
    return run(*arguments, cwd=site.parent, PYTHONPATH=str(site), **environment)


# The check, after vLLM has looked for platforms.
_CHECK = """
import runpy, sys
from vllm.plugins import load_plugins_by_group
platforms = [*load_plugins_by_group("vllm.platform_plugins")]
print("platforms:", platforms, file=sys.stderr, flush=True)
runpy.run_module("vllm_ascend.model_loader.netloader", run_name="__main__")
"""


@pytest.fixture
def check(site, forks):
    return functools.partial(forks.run, _CHECK, site=site, folder=site.parent)


def last_line_of(tried):
    return tried.stderr.strip().splitlines()[-1]


REPAIR = [
    "    pip uninstall vllm-ascend-netloader",
    "    pip install --force-reinstall --no-deps vllm-ascend==0.23.0",
    "    NETLOADER_OVERLAY=1 pip wheel --no-deps -w dist .    # in a clone of NetLoader",
    "    pip install dist/vllm_ascend_netloader_overlay-*.whl",
]


def test_the_plain_wheel_alone_registers_and_has_no_other_names(site, plain):
    plain.extractall(site)
    code = (
        f"import vllm_ascend; assert vllm_ascend.__file__.startswith({str(site)!r});"
        "vllm_ascend.register_model_loader(); vllm_ascend.register"
    )
    assert last_line_of(python(site, "-c", code)) == (
        "AttributeError: module 'vllm_ascend' has no attribute 'register'"
    )


def test_the_plain_wheel_over_vllm_ascend_says_so_in_vllms_log_and_in_the_check(site, plain, check):
    add_ascend(site, package=True)
    plain.extractall(site)
    tried = check()
    assert tried.returncode == 1
    said = f"was installed over vLLM Ascend and has replaced its {site}/vllm_ascend/__init__.py"
    log, found, _ = tried.stderr.partition("\nplatforms: []\n")
    assert found
    assert f"has no attribute 'register': the wheel vllm-ascend-netloader {said}" in log
    assert f"\nRuntimeError: the wheel vllm-ascend-netloader {said}" in tried.stderr
    assert tried.stderr.splitlines()[-4:] == REPAIR
    assert "NOT active: vLLM fails to load its plugins: the wheel vllm-asc" in tried.stdout
    assert tried.stdout.splitlines()[-4:] == REPAIR


@pytest.mark.parametrize("sign", ["file", "metadata"])
def test_either_sign_of_vllm_ascend_is_enough(site, plain, sign):
    plain.extractall(site)
    if sign == "file":
        (site / "vllm_ascend/platform.py").touch()
    else:
        add_ascend(site, package=False)
    tried = python(site, "-c", "import vllm_ascend; vllm_ascend.register_model_loader()")
    assert tried.returncode == 1
    if sign == "file":
        assert "was installed over vLLM Ascend" in tried.stderr
        assert "vllm-ascend==VERSION" in tried.stderr
    else:
        assert f"RuntimeError: vllm_ascend was imported from {site}/vllm_ascend" in tried.stderr
        assert "hides that of the installed vLLM Ascend 0.23.0" in tried.stderr


def answer(tried, status):
    assert tried.returncode == status, tried.stderr
    *what, active = tried.stdout.splitlines()
    key, _, value = active.partition(": ")
    assert key == "--load-format netloader"
    return what, value


def test_the_check_finds_the_plain_wheel_active(site, plain, check):
    plain.extractall(site)
    what, active = answer(check(), 0)
    assert what[0] == f"NetLoader: {VERSION}, wheel vllm-ascend-netloader in {site}"
    assert what[1].startswith("vLLM: 0.")
    assert what[2:] == ["vLLM Ascend: not installed"]
    assert active == "active"


def test_the_check_says_whether_an_extra_config_is_valid(site, plain, check):
    plain.extractall(site)
    what, active = answer(check("check", '{"SOURCE": "10.0.0.1:28000"}'), 0)
    assert (what[-1], active) == ("extra config: valid", "active")
    for config, words in (
        ('{"PROGRESS_TIMEOUT": 0}', "PROGRESS_TIMEOUT is 0"),
        ('{"SOURCE": "10.0.0.1"}', "10.0.0.1"),
        ("{", "not JSON"),
        ('{"source": "10.0.0.1:28000"}', "should be 'SOURCE'"),
        ('{"num_treads": 2}', "'num_treads' for vLLM's default loader, which refuses it"),
    ):
        what, active = answer(check("check", config), 1)
        assert what[-1].startswith("extra config: NOT valid: ")
        assert words in what[-1]
        assert active == "active"


def test_the_check_answers_in_json(site, plain, check):
    plain.extractall(site)
    said = json.loads(check("check", "--json", "{}", VLLM_PLUGINS="other").stdout)
    assert (said["active"], said["config"]) == (False, None)
    assert said["reason"].startswith("VLLM_PLUGINS is 'other'")
    said = json.loads(check("check", "--json", "{}").stdout)
    assert (said["active"], said["reason"], said["config"]) == (True, "", "valid")
    assert said["netloader"] == VERSION


def test_the_other_commands_are_there_as_well(site, plain, check):
    plain.extractall(site)
    tried = check("status", "nonsense")
    assert tried.returncode == 2
    assert "netloader status: error" in tried.stderr


def test_the_check_finds_the_overlay_active(site, overlay, check):
    add_ascend(site, package=True)
    overlay.extractall(site)
    tried = check()
    what, active = answer(tried, 0)
    assert "platforms: ['ascend']" in tried.stderr
    assert what[0] == f"NetLoader: {VERSION}, wheel vllm-ascend-netloader-overlay in {site}"
    assert what[2:] == ["vLLM Ascend: 0.23.0"]
    assert active == "active"


def test_the_check_names_vllm_plugins_if_that_excludes_netloader(site, plain, check):
    plain.extractall(site)
    _, active = answer(check(VLLM_PLUGINS="other"), 1)
    assert active == "NOT active: VLLM_PLUGINS is 'other' and has to name ascend_model_loader"


def test_the_check_says_that_the_overlay_needs_vllm_ascend(site, overlay):
    overlay.extractall(site)
    _, active = answer(python(site, *CHECK), 1)
    assert active.startswith("NOT active: the overlay is for vLLM Ascend, which is not installed.")


def test_the_check_says_that_the_overlay_hides_an_editable_vllm_ascend(site, overlay):
    add_ascend(site, package=False)
    overlay.extractall(site)
    _, active = answer(python(site, *CHECK), 1)
    assert active.startswith(f"NOT active: there is no vllm_ascend/__init__.py in {site}, and the ")
    assert "hides vLLM Ascend 0.23.0" in active


def test_the_check_says_that_vllm_ascend_was_installed_over_the_overlay(site, overlay):
    overlay.extractall(site)
    shutil.copytree(site, site.parent / "ours")
    shutil.rmtree(site / NETLOADER)
    add_ascend(site, package=True)
    shutil.copy(site.parent / "ours" / NETLOADER / "__main__.py", site / NETLOADER)
    what, active = answer(python(site, *CHECK), 1)
    assert what[0].startswith("NetLoader: of another origin, wheel vllm-ascend-netloader-overlay")
    assert "files are not as in the wheel vllm-ascend-netloader-overlay, the first is " in active


def test_the_check_does_not_take_the_current_folder_for_what_vllm_imports(site, plain, overlay):
    plain.extractall(site)
    installed = site.parent / "installed"
    overlay.extractall(installed)
    what, active = answer(run(*CHECK[1:], cwd=site, PYTHONPATH=str(installed)), 1)
    assert what[:2] == [
        f"NetLoader: {VERSION}, wheel vllm-ascend-netloader in {site}",
        f"not in use: wheel vllm-ascend-netloader-overlay in {installed}",
    ]
    assert active.startswith(f"NOT active: this is the package in the current folder, {site}, ")
