"""Installs the loader and announces it to vLLM's plugin system.

vLLM itself is no requirement: which build of it fits (CPU, NPU, CUDA) only the machine's owner
knows, and pip would pick the CUDA one.
"""

from setuptools import find_packages, setup

setup(
    name="vllm-ascend-netloader",
    version="0.1.0",
    description="A vLLM model loader that pulls weights from a running vLLM instance",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["vllm_ascend", "vllm_ascend.*"]),
    package_data={"vllm_ascend": ["py.typed"]},
    install_requires=["xxhash>=3.5"],
    extras_require={
        "dev": [
            "hypothesis==6.170.15",
            "mypy==2.4.1",
            "pytest==9.2.0",
            "pytest-timeout==2.4.0",
            "ruff==0.17.5",
        ]
    },
    entry_points={
        "vllm.general_plugins": ["ascend_model_loader = vllm_ascend:register_model_loader"]
    },
)
