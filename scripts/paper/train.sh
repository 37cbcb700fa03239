#!/usr/bin/env bash
# Trains with SFT and with DFT in the paper's settings (arXiv 2508.05629, section 4.1.1): AdamW with betas 0.9 and 0.95,
# weight decay 0.01, gradients clipped at 1, learning rate 5e-5, 256 conversations per step, 2,048 tokens, cosine
# with a warm-up of 0.1, one epoch, bfloat16.
#
#   scripts/paper/train.sh                                 # both methods
#   METHODS=dft PER_DEVICE=8 scripts/paper/train.sh
#   scripts/paper/train.sh --max_train_samples 1000        # flags given here override those below
set -euo pipefail

FOLDER=${FOLDER:-runs/paper} # has data/train.jsonl from prepare.py; sft/ and dft/ are written here
MODEL=${MODEL:-Qwen/Qwen2.5-Math-1.5B}
METHODS=${METHODS:-sft dft}
PER_DEVICE=${PER_DEVICE:-4} # conversations per micro-batch on each GPU; gradient accumulation makes up the batch
BATCH=${BATCH:-256} # conversations per optimizer step

. "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"
help_of "${BASH_SOURCE[0]}" "$@"
cd "$ROOT"

# The number of processes that scripts/train.sh will start.
gpus=$(visible_gpus)
if [[ -n ${GPU_IDS:-} ]]; then
    processes=$(($(tr -dc , <<<"$GPU_IDS" | wc -c) + 1))
elif [[ ${NUM_GPUS:-auto} =~ ^[1-9][0-9]*$ ]]; then
    processes=$NUM_GPUS
elif [[ -n $gpus && ${NUM_GPUS:-auto} != 0 ]]; then
    processes=$(($(tr -dc , <<<"$gpus" | wc -c) + 1))
else
    processes=2
fi
at_once=$((processes * PER_DEVICE))
((BATCH % at_once == 0)) ||
    fail "$processes processes x PER_DEVICE=$PER_DEVICE do not divide $BATCH conversations per step; choose another PER_DEVICE"

for method in $METHODS; do
    case $method in
        sft) alpha=0 ;;
        dft) alpha=1 ;;
        *) fail "METHODS=$METHODS: $method is neither sft nor dft" ;;
    esac
    MODEL=$MODEL OUTPUT_DIR=$FOLDER/$method REPORT_TO=${REPORT_TO:-none} scripts/train.sh \
        --data_files "$FOLDER/data/train.jsonl" --validation_split_percentage 0 --eval_strategy no \
        --dft_alpha $alpha --optim adamw_torch --adam_beta1 0.9 --adam_beta2 0.95 --weight_decay 0.01 \
        --max_grad_norm 1.0 --learning_rate 5e-5 --lr_scheduler_type cosine --warmup_ratio 0.1 \
        --num_train_epochs 1 --max_length 2048 --bf16 True --torch_dtype bfloat16 \
        --per_device_train_batch_size "$PER_DEVICE" --gradient_accumulation_steps $((BATCH / at_once)) \
        --enable_gradient_checkpointing True --save_strategy no "$@"
done
