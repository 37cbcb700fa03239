#!/usr/bin/env bash
# Evaluates the base model, SFT and DFT on the five benchmarks: average accuracy of 16 answers of up to 4,096 tokens,
# sampled at temperature 1, as in the paper (section 4.1).
#
#   scripts/paper/evaluate.sh                         # flags are passed on to scripts/evaluate.py
#   SAMPLES=1 scripts/paper/evaluate.sh --batch_size 8
set -euo pipefail

FOLDER=${FOLDER:-runs/paper}
MODEL=${MODEL:-Qwen/Qwen2.5-Math-1.5B}
SAMPLES=${SAMPLES:-16}

. "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"
help_of "${BASH_SOURCE[0]}" "$@"
cd "$ROOT"

models=("base=$MODEL")
for method in sft dft; do
    [[ ! -f $FOLDER/$method/config.json ]] || models+=("$method=$FOLDER/$method")
done
data=()
for name in math500 minerva olympiad aime24 amc23; do data+=("$FOLDER/data/$name.jsonl"); done
"$PYTHON" scripts/evaluate.py --model "${models[@]}" --data "${data[@]}" --output "$FOLDER/evaluation" \
    --samples "$SAMPLES" --temperature 1 --top_p 1 --max_new_tokens 4096 "$@"
"$PYTHON" scripts/paper/table.py "$FOLDER/evaluation/results.json"
