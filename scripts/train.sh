#!/usr/bin/env bash
# Fine-tunes a model with the DFT loss. Edit the variables below, then run:
#
#   nohup scripts/train.sh &              # in the background; the log is written to logs/
#   scripts/train.sh                      # in the terminal
#   scripts/train.sh --learning_rate 1e-6 # flags given here replace those below; those below override --config files
#   MODEL=Qwen/Qwen2.5-7B scripts/train.sh
#
# Relative paths are relative to the repository. Concurrent runs need different GPUs and different OUTPUT_DIRs.
# Ctrl-C, SIGTERM and SIGUSR1 save a checkpoint and end the run with exit code 75; to resume, run the same command with
# --resume_from_checkpoint auto. A second signal ends the run at once. All flags: python train_dft.py --help
set -euo pipefail

NUM_GPUS=${NUM_GPUS:-auto} # auto: all GPUs in CUDA_VISIBLE_DEVICES; 0: train on the CPU
GPU_IDS=${GPU_IDS:-}       # for example 0,2,3; if set, NUM_GPUS is ignored

MODEL=${MODEL:-/path/to/model} # a folder or a hub name
DATA_FILES=(
    /path/to/train.jsonl
    # All entries are merged. Folders, globs, .gz, .zst, .parquet and hub datasets (owner/name:split) work too.
)
EVAL_DATA_FILES=(
    # If this list is empty, VALIDATION_PERCENT of DATA_FILES is held out for evaluation.
)
VALIDATION_PERCENT=${VALIDATION_PERCENT:-2.0}
DFT_ALPHA=${DFT_ALPHA:-0.7} # 1: DFT as in the paper, 0: SFT; ignored if the --objective has no alpha
OUTPUT_DIR=${OUTPUT_DIR:-outputs/dft}
LOGGING_DIR=${LOGGING_DIR:-} # where trackers write; default: OUTPUT_DIR/logs
DS_CONFIG=${DS_CONFIG:-./ds_config/zero3.json} # zero3_offload.json if GPU memory is too small
REPORT_TO=${REPORT_TO:-swanlab}                # swanlab, wandb, tensorboard, several ("swanlab wandb") or none
MAX_RESTARTS=${MAX_RESTARTS:-0}                # how often to restart from the newest checkpoint after a crash
GRACE=${GRACE:-1800}                           # seconds a run may take to save after a stop signal

flags=(
    --model_name_or_path "$MODEL"
    --torch_dtype bfloat16
    --bf16 True
    --attn_implementation auto # flash_attention_2 if it is installed, else sdpa
    --trust_remote_code False
    --max_length 8192
    --packing False # True: pack several whole conversations into each row of max_length tokens
    --preprocessing_num_workers 8
    --enable_gradient_checkpointing True
    --num_train_epochs 1
    --per_device_train_batch_size 1
    --per_device_eval_batch_size 1
    --gradient_accumulation_steps 16
    --learning_rate 2e-6
    --lr_scheduler_type cosine
    --warmup_ratio 0.05
    --weight_decay 0.01
    --eval_strategy steps
    --eval_steps 200
    --save_strategy steps
    --save_steps 200
    --save_total_limit 3
    --save_only_model True # False: also save the optimizer, to allow --resume_from_checkpoint auto
    --logging_steps 10
    --report_to $REPORT_TO
    --deepspeed "$DS_CONFIG"
    --output_dir "$OUTPUT_DIR"
    --remove_unused_columns False
    --ddp_find_unused_parameters False
    # --eval_on_start True # evaluate the untouched model first, for the before/after comparison in the report
    # --log_per_file True
    # --max_eval_samples 1000
    # --dataloader_num_workers 8
    # --debug_data_processing True # print the first sequences with their supervised tokens marked
    # --disable_tqdm False         # show a progress bar (also written to the log)
)

# Nothing below this line needs editing.
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
help_of "${BASH_SOURCE[0]}" "$@"
cd "$ROOT"
# scripts/train.slurm reads the exit code of each machine from this file; srun reports one code for all machines.
[[ -z ${CODE_FILE:-} ]] || trap 'echo $? >"$CODE_FILE"' EXIT

# Sets `name` to the flag of a word such as --max_length or --max-length=8, written with underscores, or to nothing.
name_of() {
    name=
    [[ $1 == --* ]] || return 0
    name=${1%%=*} name=${name:2}
    name=--${name//-/_}
}

is_given() {
    local flag=$1 word name
    shift
    for word in "$@"; do
        name_of "$word"
        [[ $name != "$flag" ]] || return 0
    done
    return 1
}

# Sets `defaults` to the flags above that the arguments do not replace. --config adds to those above, because
# train_dft.py reads the files of all --config flags.
select_defaults() {
    local word name keep=true
    defaults=()
    for word in "${flags[@]}"; do
        if [[ $word == --* ]]; then
            keep=true
            name_of "$word"
            if [[ $name != --config ]] && is_given "$name" "$@"; then keep=false; fi
        fi
        if $keep; then defaults+=("$word"); fi
    done
}

require_edited() {
    local variable=$1 flag=$2 value
    shift 2
    for value in "$@"; do
        [[ $value != /path/to/* ]] ||
            fail "$variable is still $value: set it at the top of scripts/train.sh, or pass $flag"
    done
}

is_given --model_name_or_path "$@" || require_edited MODEL --model_name_or_path "$MODEL"
if ! is_given --data_files "$@"; then
    ((${#DATA_FILES[@]})) || fail "DATA_FILES is empty: list the training files at the top of scripts/train.sh"
    require_edited DATA_FILES --data_files "${DATA_FILES[@]}"
    flags+=(--data_files "${DATA_FILES[@]}")
fi
if ! is_given --eval_data_files "$@" && ! is_given --validation_split_percentage "$@"; then
    if ((${#EVAL_DATA_FILES[@]})); then
        require_edited EVAL_DATA_FILES --eval_data_files "${EVAL_DATA_FILES[@]}"
        flags+=(--eval_data_files "${EVAL_DATA_FILES[@]}")
    else
        flags+=(--validation_split_percentage "$VALIDATION_PERCENT")
    fi
fi
[[ -x $ENVIRONMENT/bin/deepspeed ]] || fail "deepspeed is not installed in $ENVIRONMENT; run bash scripts/setup.sh"

[[ $NUM_GPUS =~ ^(auto|[0-9]+)$ ]] || fail "NUM_GPUS=$NUM_GPUS: must be auto or a number; use GPU_IDS to select GPUs by index"
LAUNCHER=${LAUNCHER:-deepspeed} # set by scripts/train_multinode.sh
gpus=$(visible_gpus)
per_node=0
if [[ $LAUNCHER == hostfile ]]; then
    devices=(--hostfile "$HOSTFILE") # lists the number of GPUs of each machine
    [[ $NUM_GPUS != 0 ]] || flags+=(--use_cpu True)
elif [[ -n $GPU_IDS ]]; then
    per_node=$(($(tr -dc , <<<"$GPU_IDS" | wc -c) + 1))
    devices=(--include "localhost:$GPU_IDS")
elif [[ -z $gpus && $NUM_GPUS =~ ^[1-9] ]]; then
    fail "NUM_GPUS=$NUM_GPUS, but no GPU is visible here (nvidia-smi -L, CUDA_VISIBLE_DEVICES)"
elif [[ -z $gpus || $NUM_GPUS == 0 ]]; then
    ranks=${CPU_RANKS:-2}
    per_node=$ranks
    devices=(--num_accelerators "$ranks")
    flags+=(--use_cpu True)
    cores=$(nproc)
    # By default each rank starts one thread per core, and the ranks slow each other down.
    export DS_ACCELERATOR=cpu OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}
    echo "training on the CPU with $ranks process(es)"
elif [[ $NUM_GPUS == auto ]]; then
    devices=(--include "localhost:$gpus")
else
    available=${gpus//[^,]/}
    ((NUM_GPUS <= ${#available} + 1)) || fail "NUM_GPUS=$NUM_GPUS, but the visible GPUs are $gpus"
    devices=(--num_gpus "$NUM_GPUS")
    if [[ -n ${CUDA_VISIBLE_DEVICES:-} ]]; then
        devices=(--include "localhost:$(cut -d, -f"1-$NUM_GPUS" <<<"$gpus")")
    fi
fi
case $LAUNCHER in
    torchrun)
        if ((!per_node)); then
            per_node=$NUM_GPUS
            [[ $NUM_GPUS != auto ]] || per_node=$(($(tr -dc , <<<"$gpus" | wc -c) + 1))
        fi
        # torchrun has no option to select devices.
        [[ -z $GPU_IDS ]] || export CUDA_VISIBLE_DEVICES=$GPU_IDS
        ;;
    *) unset CUDA_VISIBLE_DEVICES ;; # passed as --include; deepspeed would warn that it ignores the variable
esac

# Prints the value of a flag; the last occurrence counts.
value_of() {
    local flag=$1 value=$2 name
    shift 2
    while (($#)); do
        name_of "$1"
        if [[ $name == "$flag" ]]; then
            [[ $1 == *=* ]] && value=${1#*=} || value=${2-}
        fi
        shift
    done
    echo "$value"
}

# Prints the objective in the files of --config; the last file that has one counts.
objective_of_files() {
    local word file name reading=false
    for word in "$@"; do
        file=
        if [[ $word == --* ]]; then
            name_of "$word"
            reading=false
            if [[ $name == --config && $word == *=* ]]; then
                file=${word#*=}
            elif [[ $name == --config ]]; then
                reading=true
            fi
        elif $reading; then
            file=$word
        fi
        [[ ! -f $file ]] || sed -n "s/^objective:[[:space:]]*['\"]\{0,1\}\([a-z]*\).*/\1/p" "$file"
    done | tail -n 1
}

# Objectives without an alpha reject --dft_alpha, so the default above is passed only to objectives that have one.
objective=$(value_of --objective "" "${flags[@]}" "$@")
[[ -n $objective ]] || objective=$(objective_of_files "${flags[@]}" "$@")
if [[ -z $objective ]] || "$PYTHON" -c '
import sys
from dft.loss.objectives import OBJECTIVES, parameters_of
sys.exit(sys.argv[1] not in OBJECTIVES or "alpha" not in parameters_of(sys.argv[1]))' "$objective"; then
    flags+=(--dft_alpha "$DFT_ALPHA")
fi
output_dir=$(value_of --output_dir "$OUTPUT_DIR" "$@")
flags+=(--logging_dir "${LOGGING_DIR:-$output_dir/logs}")
[[ $MAX_RESTARTS =~ ^[0-9]+$ ]] || fail "MAX_RESTARTS=$MAX_RESTARTS: must be a number"
[[ $GRACE =~ ^[0-9]+$ ]] || fail "GRACE=$GRACE: must be a number of seconds"
if ((MAX_RESTARTS)); then
    case $(value_of --save_only_model "" "${flags[@]}" "$@") in
        [Ff]alse) ;;
        *) fail "MAX_RESTARTS=$MAX_RESTARTS needs checkpoints that can be resumed: set --save_only_model False" ;;
    esac
    is_given --resume_from_checkpoint "${flags[@]}" "$@" || is_given --overwrite_output_dir "$@" ||
        flags+=(--resume_from_checkpoint auto)
fi

# Prints the step of the newest checkpoint, or -1. Incomplete checkpoints have other names.
newest_step() {
    local folder step newest=-1
    for folder in "$output_dir"/checkpoint-*/; do
        step=${folder%/} step=${step##*checkpoint-}
        [[ ! $step =~ ^[0-9]+$ ]] || ((step <= newest)) || newest=$step
    done
    echo "$newest"
}

mkdir -p logs
log=${LOG_FILE:-$ROOT/logs/train_$(date +%Y-%m-%d_%H-%M-%S).log}
# Tested and created in one step: runs that start in the same second would share a log.
(set -C && : >"$log") 2>/dev/null || log=${log%.log}_$$.log
echo "log: $log"
if ((${NODE_RANK:-0})); then
    echo "the output of the run is in the log of the first machine"
else
    echo "to follow it: tail -f $log"
fi

# Prints to the terminal and appends to the log, after the messages of the launcher.
report() {
    echo "$*" | tee -a "$log" >&2
}

job= stop_signal= forced=

end_all() {
    kill -TERM -- "-$job" 2>/dev/null || true
    for _ in {1..50}; do
        kill -0 -- "-$job" 2>/dev/null || return 0
        sleep 0.1
    done
    kill -KILL -- "-$job" 2>/dev/null || true
}

# Signals the ranks directly, which are children of torchrun or grandchildren of deepspeed: the launchers forward a
# signal, but kill the ranks after 30 seconds. Fails if there are no ranks yet.
signal_ranks() {
    "$PYTHON" -c '
import sys, psutil
try:
    ranks = psutil.Process(int(sys.argv[1])).children()
    if sys.argv[3] != "torchrun":
        ranks = [rank for launcher in ranks for rank in launcher.children()]
    for rank in ranks:
        rank.send_signal(int(sys.argv[2]))
except psutil.NoSuchProcess:
    ranks = []
sys.exit(not ranks)' "$job" "$(kill -l "$1")" "$LAUNCHER"
}

ask_to_stop() {
    if [[ -n $stop_signal ]]; then
        echo "second signal: ending all processes at once" >&2
        forced="at once by a second signal"
        end_all
        return
    fi
    stop_signal=$1
    [[ -n $job ]] || exit "$((128 + $(kill -l "$stop_signal")))"
    echo "SIG$stop_signal: finishing the step and saving, within $GRACE s; a second signal ends the run at once" >&2
    # Without ranks, training has not begun and there is nothing to save.
    signal_ranks "$stop_signal" || end_all
}
trap 'ask_to_stop INT' INT
trap 'ask_to_stop TERM' TERM
trap 'ask_to_stop HUP' HUP
trap 'ask_to_stop USR1' USR1

# Runs training once. Sets `status` to its exit code and `log_start` to the size of the log before.
attempt() {
    local port follower= defaults
    # A fixed port would collide with another run on this machine.
    port=${MASTER_PORT:-$("$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')}
    local launcher=(deepspeed "${devices[@]}" --master_port "$port" --log_level error)
    [[ $LAUNCHER != hostfile || -z ${MASTER_ADDR:-} ]] || launcher+=(--master_addr "$MASTER_ADDR")
    [[ $LAUNCHER != torchrun ]] || launcher=(
        "$PYTHON" scripts/torchrun.py --nnodes "$NNODES" --node_rank "$NODE_RANK" --nproc_per_node "$per_node"
        --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT"
    )
    select_defaults "$@"
    local command=("${launcher[@]}" train_dft.py "${defaults[@]}" "$@")
    { printf '%q ' "${command[@]}" && echo; } >>"$log"
    log_start=$(stat -c %s "$log" 2>/dev/null || stat -f %z "$log")
    # Job control puts the launcher and its ranks into their own process group, which can be ended as a whole.
    set -m
    "${command[@]}" >>"$log" 2>&1 </dev/null &
    job=$!
    if [[ -t 1 || -n ${SHOW_LOG:-} ]]; then
        tail -c "+$((log_start + 1))" -f -s 0.2 --pid "$job" "$log" &
        follower=$!
    fi
    set +m
    while true; do
        status=0
        wait "$job" || status=$?
        kill -0 "$job" 2>/dev/null || break # otherwise a signal interrupted the wait
        local deadline=$((SECONDS + GRACE))
        while kill -0 "$job" 2>/dev/null; do
            ((SECONDS < deadline)) || { forced="after $GRACE s without a checkpoint being saved" && end_all; }
            sleep 0.2
        done
    done
    if kill -0 -- "-$job" 2>/dev/null; then
        ((status)) || status=1 # a launcher that was killed exits with 0 and leaves its processes behind
        end_all
    fi
    [[ -z $follower ]] || wait "$follower" || true
}

restarts=0 stuck=0 before=$(newest_step)
while true; do
    attempt "$@"
    ((status)) || break
    if [[ -n $stop_signal ]]; then
        if ((status == 75)); then
            report "stopped: everything is saved; to resume, run the same command with --resume_from_checkpoint auto"
        else
            newest=$(newest_step)
            ((newest < 0)) && newest="there is no checkpoint" || newest="the newest checkpoint is checkpoint-$newest"
            report "ended ${forced:-by SIG$stop_signal before training began, or by an error in $log}; $newest"
            status=$((128 + $(kill -l "$stop_signal")))
        fi
        exit "$status"
    fi
    reason=$(tail -c "+$((log_start + 1))" "$log" | grep -aE '^(\[rank [0-9]+\] )?error: ' | tail -n 1 || true)
    [[ -z $reason ]] || report "$reason"
    report "error: training ended with exit code $status; see $log"
    if ((status == 76)); then # out of memory: a smaller batch size was written to the output folder
        (($(newest_step) < 0)) || set -- "$@" --resume_from_checkpoint auto --overwrite_output_dir False
        echo "restarting with a smaller batch size" | tee -a "$log"
        continue
    fi
    # 75: a rank was signalled by somebody else to stop. 2: invalid input, which a restart would not change.
    ((status != 75 && status != 2 && restarts < MAX_RESTARTS)) || exit "$status"
    now=$(newest_step)
    ((now > before)) && stuck=0 || stuck=$((stuck + 1))
    if ((stuck > 1)); then
        echo "error: two attempts in a row without a new checkpoint; not restarting again" >&2
        exit "$status"
    fi
    before=$now restarts=$((restarts + 1))
    set -- "$@" --resume_from_checkpoint auto --overwrite_output_dir False
    echo "restart $restarts of $MAX_RESTARTS, from $( ((now < 0)) && echo the beginning || echo "checkpoint-$now")" | tee -a "$log"
done
echo "done: $log"
