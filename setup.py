"""Builds one of two wheels; which one depends on whether vLLM Ascend is in the environment.

Plain: NetLoader for a vLLM without vLLM Ascend. It brings a package `vllm_ascend` of its own and
announces itself to vLLM's plugin system.

Overlay, with NETLOADER_OVERLAY=1: NetLoader for vLLM Ascend, which has a package `vllm_ascend`
already. It holds the folder of NetLoader and nothing else, and takes the place of the NetLoader
that vLLM Ascend has in it; vLLM Ascend's own plugin hook finds it there.

vLLM itself is no requirement: which build of it fits (CPU, NPU, CUDA) only the machine's owner
knows, and pip would pick the CUDA one.
"""

import os
import re
import tempfile
from pathlib import Path

from setuptools import find_packages, setup

NETLOADER = "vllm_ascend.model_loader.netloader"
COMMAND = f"netloader = {NETLOADER}.__main__:main"

overlay = os.environ.get("NETLOADER_OVERLAY", "")
if overlay not in ("", "0", "1"):
    raise SystemExit(
        f"NETLOADER_OVERLAY is {overlay!r}; allowed: 1 for the wheel that goes over vLLM Ascend, "
        "0 or nothing for the one that needs no vLLM Ascend"
    )

said = Path(__file__).parent.joinpath(*NETLOADER.split("."), "version.py").read_text()
version = re.search(r'^__version__ = "(.+)"$', said, re.MULTILINE)
if version is None:
    raise SystemExit(f"{NETLOADER}.version has no line __version__ = ...")

plain = {
    "name": "vllm-ascend-netloader",
    "description": "A vLLM model loader that pulls weights from a running vLLM instance",
    "packages": find_packages(include=["vllm_ascend", "vllm_ascend.*"]),
    "entry_points": {
        "console_scripts": [COMMAND],
        "vllm.general_plugins": ["ascend_model_loader = vllm_ascend:register_model_loader"],
    },
    "extras_require": {
        "dev": [
            "hypothesis==6.170.15",
            "kubernetes-validate==1.37.0",
            "mypy==2.4.1",
            "pytest==9.2.0",
            "pytest-timeout==2.4.0",
            "pytest-xdist==3.8.0",
            "ruff==0.17.5",
        ]
    },
}
over_vllm_ascend = {
    "name": "vllm-ascend-netloader-overlay",
    "description": "Replaces the NetLoader of vLLM Ascend",
    "packages": find_packages(include=[NETLOADER, f"{NETLOADER}.*"]),
    "entry_points": {"console_scripts": [COMMAND]},
}

# Built in a fresh folder: whatever lies in ./build from another build, of the other wheel or of
# older sources, would go into this wheel as well.
with tempfile.TemporaryDirectory() as build_folder:
    setup(
        **(over_vllm_ascend if overlay == "1" else plain),
        version=version[1],
        license="Apache-2.0",
        python_requires=">=3.11",
        install_requires=["cryptography>=42", "xxhash>=3.5"],
        options={"build": {"build_base": build_folder}, "egg_info": {"egg_base": build_folder}},
    )
