"""The `vllm_ascend` namespace of NetLoader: the hook that vLLM's plugin system calls.

It is for a vLLM without vLLM Ascend, which has a package of this name itself and cannot work when
this one is in its place. Then whatever vLLM asks for is answered with what happened and how to
repair it, as nothing else of vLLM Ascend would be there to say so.
"""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def register_model_loader() -> None:
    """Make `--load-format netloader` known to vLLM.

    vLLM calls this in each of its processes, possibly more than once.

    Raises:
        RuntimeError: This package is in the place of vLLM Ascend's; vLLM does not start then.
    """
    if conflict := _conflict_with_vllm_ascend():
        raise RuntimeError(conflict)
    from vllm_ascend.model_loader.netloader import register_netloader

    register_netloader()


def __getattr__(name: str) -> object:
    # vLLM logs what an entry point raises while it is looked up. An exception in the call that
    # follows would be lost for a platform, which is what vLLM asks vLLM Ascend for first.
    missing = f"module {__name__!r} has no attribute {name!r}"
    conflict = None if name.startswith("__") else _conflict_with_vllm_ascend()
    raise AttributeError(f"{missing}: {conflict}" if conflict else missing)


def _conflict_with_vllm_ascend() -> str | None:
    folder = Path(__file__).parent
    replaced = (folder / "platform.py").exists()
    try:
        installed = version("vllm-ascend")
    except PackageNotFoundError:
        if not replaced:
            return None
        installed = "VERSION"
    if replaced:
        return (
            "the wheel vllm-ascend-netloader was installed over vLLM Ascend and has replaced its "
            f"{__file__}, so vLLM Ascend cannot work. Repair it and install the overlay wheel, "
            "which is made for vLLM Ascend:\n"
            "    pip uninstall vllm-ascend-netloader\n"
            f"    pip install --force-reinstall --no-deps vllm-ascend=={installed}\n"
            "    NETLOADER_OVERLAY=1 pip wheel --no-deps -w dist .    # in a clone of NetLoader\n"
            "    pip install dist/vllm_ascend_netloader_overlay-*.whl"
        )
    return (
        f"vllm_ascend was imported from {folder}, which is NetLoader's for a vLLM without vLLM "
        f"Ascend, and hides that of the installed vLLM Ascend {installed}. Either the current "
        "folder or PYTHONPATH is a clone of NetLoader, then start vLLM without it; or the wheel "
        "vllm-ascend-netloader is installed, then\n"
        "    pip uninstall vllm-ascend-netloader\n"
        "and install the overlay wheel over vLLM Ascend, as NetLoader's guide says."
    )
