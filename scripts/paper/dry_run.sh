#!/usr/bin/env bash
# The whole recipe on small local stand-ins, by the same scripts: from data to table, on two CPU processes.
#
#   scripts/paper/dry_run.sh [FOLDER]      # default runs/dry; a few minutes, or less
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
# Smaller steps, more of them and a larger learning rate than the paper's, or so small a model would learn nothing.
BATCH=16 PER_DEVICE=8 SHOW_LOG=1 scripts/paper/train.sh --learning_rate 5e-3 --num_train_epochs 4 --preprocessing_num_workers 2 \
    --torch_dtype float32 --bf16 False --overwrite_output_dir True
SAMPLES=2 scripts/paper/evaluate.sh --max_new_tokens 32
echo
echo "These are stand-ins, of the data and of the model: the figures on the right mean nothing but that every step ran."
