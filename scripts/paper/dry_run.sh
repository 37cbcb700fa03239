#!/usr/bin/env bash
# Runs the whole recipe, from the data to the table, on small local stand-ins with two CPU processes.
#
#   scripts/paper/dry_run.sh [FOLDER]      # default: runs/dry; takes up to a few minutes
set -euo pipefail

. "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"
help_of "${BASH_SOURCE[0]}" "$@"
folder=$(realpath -m "${1:-$ROOT/runs/dry}")
cd "$ROOT"
if ! has_gpu; then export DS_ACCELERATOR=cpu; fi

"$PYTHON" scripts/paper/stand_ins.py "$folder"
sources=(--train "$folder/sources/train.parquet")
for name in math500 minerva olympiad aime24 amc23; do sources+=("--$name" "$folder/sources/$name.jsonl"); done
"$PYTHON" scripts/paper/prepare.py "$folder/data" "${sources[@]}" --count 256
export FOLDER=$folder MODEL=$folder/model
# A model this small needs smaller batches, more steps and a larger learning rate than in the paper to learn anything.
BATCH=16 PER_DEVICE=8 SHOW_LOG=1 scripts/paper/train.sh --learning_rate 5e-3 --num_train_epochs 4 --preprocessing_num_workers 2 \
    --torch_dtype float32 --bf16 False --overwrite_output_dir True
SAMPLES=2 scripts/paper/evaluate.sh --max_new_tokens 32
echo
echo "Data and model are stand-ins: the figures on the right only show that every step ran."
