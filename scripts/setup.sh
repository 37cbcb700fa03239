#!/usr/bin/env bash
# Installs what this project needs. Running it again checks and does what is missing.
#
#   bash scripts/setup.sh [--dev] [--build-flash-attn]
#
#   --dev               also what scripts/test.sh needs
#   --build-flash-attn  build flash-attn from source where it has no prebuilt wheel: needs nvcc, can take an hour
#
# Uses the active virtual or conda environment, else .venv in this repository, made with python3 or $PYTHON_FOR_VENV.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

help_of "${BASH_SOURCE[0]}" "$@"

dev=false
build_flash_attn=false
for argument in "$@"; do
    case $argument in
        --dev) dev=true ;;
        --build-flash-attn) build_flash_attn=true ;;
        *) fail "unknown argument $argument (--dev and --build-flash-attn are known)" ;;
    esac
done

is_recent() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null
}

# A Python that can make a virtual environment: python3 if it is recent enough, else a newer one beside it.
find_python() {
    local candidate
    for candidate in ${PYTHON_FOR_VENV:-python3 python3.14 python3.13 python3.12 python3.11 python3.10}; do
        if command -v "$candidate" >/dev/null && is_recent "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    local found
    found=$("${PYTHON_FOR_VENV:-python3}" --version 2>&1 || true)
    fail "Python 3.10 or newer is needed, found: ${found:-none}. Install one (Debian, Ubuntu: apt-get install" \
        "python3 python3-venv), or name one: PYTHON_FOR_VENV=/path/to/python bash scripts/setup.sh"
}

make_environment() {
    local python
    python=$(find_python)
    # Debian packs ensurepip apart from Python; without it venv leaves an environment without pip behind.
    "$python" -c 'import ensurepip, venv' 2>/dev/null || fail "$python cannot make virtual environments." \
        "Debian, Ubuntu: apt-get install $("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"
    "$python" -m venv "$ENVIRONMENT"
    echo "environment: made $ENVIRONMENT with $("$PYTHON" --version)"
}

check_environment() {
    [[ -x $PYTHON ]] || fail "$ENVIRONMENT is not a Python environment: it has no bin/python. Deactivate it, or" \
        "remove the folder"
    "$PYTHON" -c '' 2>/dev/null || fail "$PYTHON does not start; remove $ENVIRONMENT and run this again"
    is_recent "$PYTHON" || fail "$ENVIRONMENT has $("$PYTHON" --version), and Python 3.10 or newer is needed." \
        "Activate another environment, or deactivate this one to have .venv made"
    [[ -w $ENVIRONMENT ]] || fail "$ENVIRONMENT cannot be written to. Deactivate it to have .venv made"
}

pip_install() {
    # Environments made by uv come without pip.
    "$PYTHON" -m pip --version >/dev/null 2>&1 || "$PYTHON" -m ensurepip >/dev/null 2>&1 ||
        fail "$ENVIRONMENT has no pip; install it there (uv pip install pip, conda install pip)"
    PIP_REQUIRE_VIRTUALENV=0 "$PYTHON" -m pip install -qq --disable-pip-version-check --no-input "$@"
}

install_requirements() {
    local missing files=() file
    missing=$("$PYTHON" "$ROOT/scripts/check_requirements.py" "$@")
    [[ -n $missing ]] || return 0
    echo "installing: ${missing//$'\n'/ }"
    for file in "$@"; do files+=(-r "$file"); done
    pip_install "${files[@]}" || fail "pip could not install $(basename -a "$@" | paste -sd' ')"
    installed=true
}

flash_attn_imports() {
    "$PYTHON" -c 'import flash_attn' >/dev/null 2>&1
}

without_flash_attn() {
    echo "flash-attn: $1; attention runs through torch's sdpa. bash scripts/setup.sh --build-flash-attn builds it" \
        "from source (needs nvcc, can take an hour)"
}

try_flash_attn_wheel() {
    local pin=$1 url
    url=$("$PYTHON" "$ROOT/scripts/flash_attn_wheel.py" "${pin#*==}") || return 1
    # An index or folder that pip is configured with comes first: clusters keep wheels of their own.
    pip_install --only-binary flash-attn "$pin" >/dev/null 2>&1 && flash_attn_imports && return
    pip_install --retries 1 "$url" >/dev/null 2>&1 && flash_attn_imports
}

install_flash_attn() {
    local pin tried=$ENVIRONMENT/.no-flash-attn-wheel
    pin=$("$PYTHON" "$ROOT/scripts/check_requirements.py" "$ROOT/requirements-gpu.txt")
    [[ -n $pin ]] || return 0
    if $build_flash_attn; then
        command -v nvcc >/dev/null || [[ -x ${CUDA_HOME:-/usr/local/cuda}/bin/nvcc ]] ||
            fail "--build-flash-attn needs CUDA's compiler nvcc on PATH, or CUDA_HOME set; it is not part of torch"
        echo "flash-attn: building $pin from source, which can take an hour"
        pip_install packaging psutil ninja wheel setuptools
        FLASH_ATTENTION_FORCE_BUILD=TRUE pip_install --no-build-isolation "$pin" || fail "flash-attn did not build"
        flash_attn_imports || fail "flash-attn was built but cannot be imported: $PYTHON -c 'import flash_attn'"
        echo "flash-attn: built"
    elif [[ -f $tried && $(<"$tried") == "$pin" ]] && ! $installed; then
        without_flash_attn "no prebuilt wheel was found before (remove $tried to look again)"
    elif try_flash_attn_wheel "$pin"; then
        echo "flash-attn: installed $pin from a prebuilt wheel"
    else
        # A wheel for another torch installs and then fails to import, which transformers takes for installed.
        "$PYTHON" -m pip uninstall --quiet --yes flash-attn >/dev/null 2>&1 || true
        echo "$pin" >"$tried"
        without_flash_attn "no prebuilt wheel of $pin for this Python, torch and CUDA could be installed"
    fi
}

# PyPI's torch is built for a recent CUDA; with an older driver it would train on the CPU without a word.
check_cuda() {
    local problem
    problem=$("$PYTHON" -W ignore -c 'import torch
if not torch.cuda.is_available():
    print(f"torch {torch.__version__} (CUDA {torch.version.cuda}) cannot use it")')
    [[ -z $problem ]] || echo "warning: there is an NVIDIA GPU, but $problem; update the driver," \
        "or install a build of the same torch for the CUDA that nvidia-smi names" >&2
}

installed=false
[[ -e $ENVIRONMENT || -n ${VIRTUAL_ENV:-${CONDA_PREFIX:-}} ]] || make_environment
check_environment
requirements=("$ROOT/requirements.txt")
if $dev; then requirements+=("$ROOT/requirements-dev.txt"); fi
install_requirements "${requirements[@]}"
if has_gpu; then
    install_flash_attn
    if $installed; then check_cuda; fi
elif $build_flash_attn; then
    fail "--build-flash-attn: there is no NVIDIA GPU here (nvidia-smi finds none)"
fi
echo "environment ready: $ENVIRONMENT"
