# Sourced by the other scripts: the Python environment of this project, first on PATH, and what they all ask.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# An active environment is the user's choice; .venv is ours.
ENVIRONMENT=${VIRTUAL_ENV:-${CONDA_PREFIX:-$ROOT/.venv}}
PYTHON=$ENVIRONMENT/bin/python
PATH=$ENVIRONMENT/bin:$PATH

# Like train_dft.py: the same command would end in the same way.
fail() {
    echo "error: $*" >&2
    exit 2
}

# Prints the comment at the top of a script and ends, where --help is among the words.
help_of() {
    local script=$1 word
    shift
    for word in "$@"; do
        [[ $word != -h && $word != --help ]] || { awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$script" && exit; }
    done
}

# Whether there is an NVIDIA GPU and a driver that answers; nvidia-smi also exists where neither does.
has_gpu() {
    # Not grep -q: it stops reading at the first of several GPUs, which pipefail takes for a failure of nvidia-smi.
    command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep '^GPU ' >/dev/null
}

# Indices of the GPUs to use, as 0,1,2; nothing where there is none. CUDA_VISIBLE_DEVICES narrows them.
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
