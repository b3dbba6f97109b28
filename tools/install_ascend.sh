#!/usr/bin/env bash
# Makes a virtual environment with the released vLLM Ascend and the real torch_npu, for the tests that
# run them on the simulated CANN of tests/npu_sim.
#
# usage: tools/install_ascend.sh VENV [PYTHON]
#
# This project is not installed: the Makefile puts it over vLLM Ascend's files, after each change. As in
# install.sh, it always starts from scratch and writes VENV/installed last.
set -euo pipefail

venv=${1:?usage: tools/install_ascend.sh VENV [PYTHON]}
base_python=${2:-python3}
torch=torch==2.13.0+cpu
vllm=0.23.0
vllm_ascend=0.23.0.post1
sim=$(cd "$(dirname "$0")/../tests/npu_sim" && pwd)
pytorch_index=https://download.pytorch.org/whl/cpu

# Once torch_npu is installed, a plain "import torch" loads it and fails where there is no CANN.
export TORCH_DEVICE_BACKEND_AUTOLOAD=0
unset NPUSIM_LIB PYTHONPATH

fail() {
    [[ -s ${errors-} ]] && cat "$errors" >&2
    echo "install_ascend: $*" >&2
    exit 1
}

"$base_python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "Python 3.11 or newer is needed and '$base_python' is not; name one with PYTHON=..."
"$base_python" -m venv --clear "$venv" ||
    fail "cannot make $venv (on Debian and Ubuntu, the package python3-venv may be missing)"
python=$venv/bin/python
errors=$venv/errors.txt

# All is pinned, so nothing is left to resolve. What a test never imports need not be compiled.
pip_install() {
    "$python" -m pip install -qq --disable-pip-version-check --no-input --no-deps --no-compile "$@" \
        2>"$errors"
}

echo "install_ascend: $torch, torch_npu and the packages around them into $venv (minutes)"
if ! pip_install "$torch"; then
    echo "install_ascend: the configured package index has no $torch; asking PyTorch's as well"
    pip_install --extra-index-url "$pytorch_index" "$torch" ||
        fail "pip could not install $torch; the reason is above"
fi
pip_install -r "$sim/requirements.txt" ||
    fail "pip could not install $sim/requirements.txt; the reason is above"

# vLLM's wheel is the CUDA build; its source distribution for the target "empty" has no kernels.
echo "install_ascend: vLLM $vllm and vLLM Ascend $vllm_ascend from source, without kernels"
VLLM_TARGET_DEVICE=empty VLLM_VERSION_OVERRIDE=$vllm \
    pip_install --no-build-isolation --no-binary vllm "vllm==$vllm" ||
    fail "pip could not install vLLM $vllm; the reason is above"
COMPILE_CUSTOM_KERNELS=0 SOC_VERSION=ascend910b1 \
    pip_install --no-build-isolation --no-binary vllm-ascend "vllm-ascend==$vllm_ascend" ||
    fail "pip could not install vLLM Ascend $vllm_ascend; the reason is above"

# "make overlay-npu" puts another NetLoader over that of vLLM Ascend, and tests let the two meet.
site_packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
mkdir "$venv/released"
cp -r "$site_packages/vllm_ascend/model_loader/netloader" "$venv/released/netloader"

# Every Python process of "vllm serve" needs the hooks, before anything imports torch_npu. A link,
# not a copy, so that a change in the hooks needs no installation.
ln -s "$sim/npusim_vllm" "$site_packages/npusim_vllm"
echo "import os; os.environ.get('NPUSIM_LIB') and __import__('npusim_vllm.boot')" \
    >"$site_packages/npusim_vllm.pth"

rm -f "$errors"
date >"$venv/installed"
echo "install_ascend: done"
