#!/usr/bin/env bash
# Installs the packages that this project needs. Running it again installs only what is missing.
#
#   bash scripts/setup.sh [--dev] [--real] [--build-flash-attn]
#
#   --dev               also install what scripts/test.sh needs
#   --real              also install what scripts/get_model.py and scripts/make_problems.py need
#   --build-flash-attn  build flash-attn from source if there is no prebuilt wheel; needs nvcc and can take an hour
#
# Installs into the active virtual or conda environment, or else into .venv in this repository, which is created with
# python3 (or $PYTHON_FOR_VENV) if it does not exist.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

help_of "${BASH_SOURCE[0]}" "$@"

dev=false
real=false
build_flash_attn=false
for argument in "$@"; do
    case $argument in
        --dev) dev=true ;;
        --real) real=true ;;
        --build-flash-attn) build_flash_attn=true ;;
        *) fail "unknown argument $argument (expected --dev, --real or --build-flash-attn)" ;;
    esac
done

is_recent() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

# Prints the Python to create the virtual environment with: python3 if it is recent enough, else a newer one on PATH.
find_python() {
    local candidate
    for candidate in ${PYTHON_FOR_VENV:-python3 python3.14 python3.13 python3.12 python3.11}; do
        if command -v "$candidate" >/dev/null && is_recent "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    local version
    version=$("${PYTHON_FOR_VENV:-python3}" --version 2>&1 || true)
    fail "Python 3.11 or newer is required, found: ${version:-none}. Install it (Debian, Ubuntu: apt-get install" \
        "python3 python3-venv), or name an interpreter: PYTHON_FOR_VENV=/path/to/python bash scripts/setup.sh"
}

make_environment() {
    local python
    python=$(find_python)
    # Debian packages ensurepip separately; without it venv creates an environment without pip.
    "$python" -c 'import ensurepip, venv' 2>/dev/null || fail "$python cannot create virtual environments." \
        "Debian, Ubuntu: apt-get install $("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"
    "$python" -m venv "$ENVIRONMENT"
    echo "environment: created $ENVIRONMENT with $("$PYTHON" --version)"
}

check_environment() {
    [[ -x $PYTHON ]] || fail "$ENVIRONMENT is not a Python environment: it has no bin/python. Deactivate it, or" \
        "remove the folder"
    "$PYTHON" -c '' 2>/dev/null || fail "$PYTHON does not start; remove $ENVIRONMENT and run this again"
    is_recent "$PYTHON" || fail "$ENVIRONMENT has $("$PYTHON" --version), and Python 3.11 or newer is required." \
        "Activate another environment, or deactivate this one to use .venv"
    [[ -w $ENVIRONMENT ]] || fail "$ENVIRONMENT is not writable. Deactivate it to use .venv"
}

pip_install() {
    # Environments created by uv have no pip.
    "$PYTHON" -m pip --version >/dev/null 2>&1 || "$PYTHON" -m ensurepip >/dev/null 2>&1 ||
        fail "$ENVIRONMENT has no pip; install it there (uv pip install pip, conda install pip)"
    PIP_REQUIRE_VIRTUALENV=0 "$PYTHON" -m pip install --disable-pip-version-check --no-input --progress-bar off "$@"
}

count_packages() {
    find "$1" -maxdepth 1 -name '*.dist-info' | wc -l
}

# Reads the output of pip and prints one line per package, and one every $PROGRESS_INTERVAL seconds while pip
# prints nothing, as it does for up to a minute while it unpacks torch.
show_progress() {
    local line status folder before total=0 seconds=$SECONDS
    folder=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    before=$(count_packages "$folder")
    while true; do
        status=0
        IFS= read -r -t "$PROGRESS_INTERVAL" line || status=$?
        if ((status > 128)); then # pip printed nothing
            if ((total)); then
                echo "  installed $(($(count_packages "$folder") - before)) of $total packages ($((SECONDS - seconds)) s)"
            else
                echo "  downloading ($((SECONDS - seconds)) s)"
            fi
            continue
        fi
        ((status == 0)) || break
        case $line in
            *.metadata*) ;; # a few kB each, to resolve versions
            *Downloading\ * | *"Using cached "*) echo "  ${line#"${line%%[![:space:]]*}"}" ;;
            "Installing collected packages: "*)
                total=$(tr -dc , <<<"$line" | wc -c)
                total=$((total + 1))
                echo "  installing $total packages"
                ;;
        esac
    done
}

install_requirements() {
    local missing files=() file
    missing=$("$PYTHON" "$ROOT/scripts/check_requirements.py" "$@")
    [[ -n $missing ]] || return 0
    echo "installing: ${missing//$'\n'/ }"
    for file in "$@"; do files+=(-r "$file"); done
    pip_install "${files[@]}" | show_progress || fail "pip could not install $(basename -a "$@" | paste -sd' ')"
    installed=true
}

flash_attn_imports() {
    "$PYTHON" -c 'import flash_attn' >/dev/null 2>&1
}

without_flash_attn() {
    echo "flash-attn: $1; attention uses torch's sdpa. To build it from source (needs nvcc, can take an hour):" \
        "bash scripts/setup.sh --build-flash-attn"
}

try_flash_attn_wheel() {
    local pin=$1 url
    url=$("$PYTHON" "$ROOT/scripts/flash_attn_wheel.py" "${pin#*==}") || return 1
    # The index or folder that pip is configured with comes first: clusters host their own wheels.
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
        without_flash_attn "no prebuilt wheel was found earlier (remove $tried to search again)"
    elif try_flash_attn_wheel "$pin"; then
        echo "flash-attn: installed $pin from a prebuilt wheel"
    else
        # A wheel for another torch version installs but cannot be imported, and transformers considers it installed.
        "$PYTHON" -m pip uninstall --quiet --yes flash-attn >/dev/null 2>&1 || true
        echo "$pin" >"$tried"
        without_flash_attn "no prebuilt wheel of $pin for this Python, torch and CUDA could be installed"
    fi
}

# PyPI's torch is built for a recent CUDA version; with an older driver it would silently train on the CPU.
check_cuda() {
    local problem
    problem=$("$PYTHON" -W ignore -c 'import torch
if not torch.cuda.is_available():
    print(f"torch {torch.__version__} (CUDA {torch.version.cuda}) does not find it")')
    [[ -z $problem ]] || echo "warning: there is an NVIDIA GPU, but $problem; update the driver," \
        "or install the same torch version built for the CUDA version that nvidia-smi shows" >&2
}

installed=false
PROGRESS_INTERVAL=10 # seconds
[[ -e $ENVIRONMENT || -n ${VIRTUAL_ENV:-${CONDA_PREFIX:-}} ]] || make_environment
check_environment
requirements=("$ROOT/requirements.txt")
if $dev; then requirements+=("$ROOT/requirements-dev.txt"); fi
if $real; then requirements+=("$ROOT/requirements-real.txt"); fi
install_requirements "${requirements[@]}"
if has_gpu; then
    install_flash_attn
    if $installed; then check_cuda; fi
elif $build_flash_attn; then
    fail "--build-flash-attn: no NVIDIA GPU was found (nvidia-smi lists none)"
fi
echo "environment ready: $ENVIRONMENT"
