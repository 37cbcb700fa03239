# Sourced by the other scripts: puts the Python environment of this project first on PATH and defines shared functions.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# An active environment is used as it is; .venv is created by scripts/setup.sh.
ENVIRONMENT=${VIRTUAL_ENV:-${CONDA_PREFIX:-$ROOT/.venv}}
PYTHON=$ENVIRONMENT/bin/python
PATH=$ENVIRONMENT/bin:$PATH

# Exit code 2, as of train_dft.py: invalid input, which a restart would not change.
fail() {
    echo "error: $*" >&2
    exit 2
}

# Prints the comment at the top of a script and exits if --help is among the arguments.
help_of() {
    local script=$1 word
    shift
    for word in "$@"; do
        [[ $word != -h && $word != --help ]] || { awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$script" && exit; }
    done
}

# Creates the only folder that a script takes and sets `folder` to its path.
#   use_folder USAGE DEFAULT [FOLDER]
use_folder() {
    local usage=$1 path=${3:-$2}
    shift 2
    [[ $path != -* ]] || fail "unknown argument $path; usage: $usage (a folder of that name: ./$path)"
    (($# <= 1)) || fail "unexpected argument $2; usage: $usage"
    mkdir -p -- "$path" && folder=$(cd -- "$path" && pwd) || fail "FOLDER $path cannot be used; usage: $usage"
}

# Succeeds if there is an NVIDIA GPU with a working driver. The command nvidia-smi alone proves neither.
has_gpu() {
    # Not grep -q: it exits at the first match, nvidia-smi gets SIGPIPE, and pipefail reports a failure.
    command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep '^GPU ' >/dev/null
}

# Prints the number of processes that the quickstarts train with: one per GPU in $1 (see visible_gpus), or two on the CPU.
count_processes() {
    local commas=${1//[^,]/}
    [[ -n $1 ]] && echo $((${#commas} + 1)) || echo 2
}

# Prints the indices of the GPUs to use, such as 0,1,2, or nothing. Respects CUDA_VISIBLE_DEVICES.
visible_gpus() {
    has_gpu || return 0
    if [[ -z ${CUDA_VISIBLE_DEVICES+set} ]]; then
        nvidia-smi -L | sed -n 's/^GPU \([0-9]*\):.*/\1/p' | paste -sd,
    elif [[ $CUDA_VISIBLE_DEVICES =~ ^[0-9]+(,[0-9]+)*$ ]]; then
        echo "$CUDA_VISIBLE_DEVICES"
    elif [[ -n $CUDA_VISIBLE_DEVICES && $CUDA_VISIBLE_DEVICES != -1 ]]; then
        fail "CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES: the deepspeed launcher needs indices such as 0,1"
    fi
}
