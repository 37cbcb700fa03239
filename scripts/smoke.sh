#!/usr/bin/env bash
# Runs every command once on a tiny model, on two CPU processes at most: whether an installation or a Python version works.
#
#   bash scripts/smoke.sh            # the environment of this repository
#   bash scripts/smoke.sh PYTHON     # another interpreter, such as /path/to/venv/bin/python
#
# Where the package is installed, its commands are run from a temporary folder, else the scripts of this repository.
# Starts fifteen processes one after the other. The merge of adapters is left out where peft is not installed.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
help_of "${BASH_SOURCE[0]}" "$@"
(($# <= 1)) || fail "unexpected argument $2; usage: bash scripts/smoke.sh [PYTHON]"
PYTHON=$(command -v "${1:-$PYTHON}") || fail "PYTHON ${1:-$PYTHON}: no such program"
bin=$(cd "$(dirname "$PYTHON")" && pwd)
PYTHON=$bin/${PYTHON##*/}
PATH=$bin:$PATH # DeepSpeed looks for ninja there

export CUDA_VISIBLE_DEVICES="" DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONSAFEPATH=1
unset PYTHONPATH
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

if [[ -x $bin/train-dft ]]; then
    source="the installed package"
    launch=(--module train_dft)
    command_of() { echo "$bin/$1"; }
else
    source="the scripts of this repository"
    launch=("$ROOT/train_dft.py")
    command_of() {
        local -A files=([train-dft]=train_dft [train-dft-evaluate]=scripts/evaluate [train-dft-report]=scripts/report
            [train-dft-merge]=scripts/merge_lora [train-dft-show-data]=scripts/show_data
            [train-dft-get-model]=scripts/get_model)
        echo "$PYTHON $ROOT/${files[$1]}.py"
    }
    unset PYTHONSAFEPATH # the entry script imports the package beside it
fi
echo "$("$PYTHON" --version), $source"

# Runs a command, prints its name and time, and its output only if it fails.
#   step NAME COMMAND...
step() {
    local name=$1 start=$SECONDS
    shift
    "$@" >log 2>&1 || {
        tail -n 60 log >&2
        fail "$name failed: $*"
    }
    echo "ok  $name ($((SECONDS - start)) s)"
}

# Runs an installed command or its script.
run() {
    local words
    IFS=' ' read -ra words <<<"$(command_of "$1")"
    "${words[@]}" "${@:2}"
}

train=(--model_name_or_path example/model --data_files example/data/train.jsonl --eval_data_files example/data/eval.jsonl
    --max_length 128 --preprocessing_num_workers 2 --use_cpu True --max_steps 2 --learning_rate 1e-3
    --eval_strategy steps --eval_steps 2)

first_line_of_help() { run train-dft --help | head -n 1 | grep 'usage: train'; }
in_two_ranks() { "$bin/deepspeed" --num_accelerators 2 "${launch[@]}" "$@"; }
same_loss() {
    "$PYTHON" -c '
import json
states = [json.load(open(f"{folder}/trainer_state.json")) for folder in ("single", "zero3")]
first, second = (state["log_history"][-2:] for state in states)
losses = [next(row["eval_loss"] for row in rows if "eval_loss" in row) for rows in (first, second)]
assert abs(losses[0] - losses[1]) < 1e-5, losses'
}

step "train-dft --version" run train-dft --version
step "train-dft --help" first_line_of_help
step "a tiny model" "$PYTHON" "$ROOT/scripts/make_example.py" example --conversations 60
head -n 4 example/data/eval.jsonl >problems.jsonl
step "train-dft-show-data" run train-dft-show-data --model_name_or_path example/model --data_files example/data/eval.jsonl
step "training, one process" run train-dft "${train[@]}" --output_dir single --per_device_train_batch_size 8
step "training, ZeRO-3 on two processes" in_two_ranks "${train[@]}" --output_dir zero3 --per_device_train_batch_size 4 \
    --deepspeed zero3
step "both have the same loss" same_loss
step "train-dft-report" run train-dft-report single zero3
step "train-dft-evaluate" run train-dft-evaluate --model single zero3 --data problems.jsonl \
    --output evaluation --samples 1 --temperature 0 --max_new_tokens 4
step "train-dft-get-model --help" run train-dft-get-model --help
if "$PYTHON" -c 'import peft' 2>/dev/null; then
    step "training of adapters" run train-dft "${train[@]}" --output_dir lora --lora_r 4
    step "train-dft-merge" run train-dft-merge lora merged
else
    echo "--  train-dft-merge: peft is not installed"
fi
echo "all commands work ($SECONDS s)"
