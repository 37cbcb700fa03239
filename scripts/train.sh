#!/usr/bin/env bash
# Fine-tunes a model with the DFT loss. Edit the variables, then:
#
#   nohup scripts/train.sh &              # in the background; the log is under logs/
#   scripts/train.sh                      # in the terminal
#   scripts/train.sh --learning_rate 1e-6 # flags given here override those below
#   MODEL=Qwen/Qwen2.5-7B scripts/train.sh
#
# Relative paths count from the repository. Two runs at a time need different GPUs and an OUTPUT_DIR each.
# Ctrl-C, SIGTERM and SIGUSR1 end the run with a checkpoint and exit code 75: the same command goes on, given
# --resume_from_checkpoint auto. A second one ends it at once. All flags: python train_dft.py --help
set -euo pipefail

NUM_GPUS=${NUM_GPUS:-auto} # auto: all that CUDA_VISIBLE_DEVICES leaves; 0: CPU
GPU_IDS=${GPU_IDS:-}       # e.g. 0,2,3 to choose them; NUM_GPUS is then not used

MODEL=${MODEL:-/path/to/model} # a folder, or a name on the hub
DATA_FILES=(
    /path/to/train.jsonl
    # more are merged; folders, globs, .gz, .zst, .parquet and hub datasets (owner/name:split) too
)
EVAL_DATA_FILES=(
    # files to evaluate on; if there are none, VALIDATION_PERCENT of DATA_FILES is held out
)
VALIDATION_PERCENT=${VALIDATION_PERCENT:-2.0}
DFT_ALPHA=${DFT_ALPHA:-0.7} # 1 is the DFT of the paper, 0 is plain SFT; only for an --objective that has it
OUTPUT_DIR=${OUTPUT_DIR:-outputs/dft}
LOGGING_DIR=${LOGGING_DIR:-} # where trackers write; logs in the output folder unless set
DS_CONFIG=${DS_CONFIG:-./ds_config/zero3.json} # zero3_offload.json where GPU memory is too small
REPORT_TO=${REPORT_TO:-swanlab}                # swanlab, wandb, tensorboard, several ("swanlab wandb"), none
MAX_RESTARTS=${MAX_RESTARTS:-0}                # after a crash, go on from the newest checkpoint, so often at most
GRACE=${GRACE:-1800}                           # seconds that a run may take to save when it is asked to stop

flags=(
    --model_name_or_path "$MODEL"
    --torch_dtype bfloat16
    --bf16 True
    --attn_implementation auto # flash_attention_2 where it is installed, else sdpa
    --trust_remote_code False
    --max_length 8192
    --packing False # True: rows of max_length, filled with several whole conversations
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
    --save_only_model True # False also keeps the optimizer, to go on with --resume_from_checkpoint auto
    --logging_steps 10
    --report_to $REPORT_TO
    --deepspeed "$DS_CONFIG"
    --output_dir "$OUTPUT_DIR"
    --remove_unused_columns False
    --ddp_find_unused_parameters False
    # --eval_on_start True # what the untouched model says, for the report's before and after
    # --log_per_file True
    # --max_eval_samples 1000
    # --dataloader_num_workers 8
    # --debug_data_processing True # prints the first sequences with their supervised parts marked
    # --disable_tqdm False         # a progress bar, also in the log
)

# Below here nothing needs editing.
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
help_of "${BASH_SOURCE[0]}" "$@"
cd "$ROOT"
# What scripts/train.slurm reads: srun tells it one code for all machines.
[[ -z ${CODE_FILE:-} ]] || trap 'echo $? >"$CODE_FILE"' EXIT

given() {
    local flag=$1 word
    shift
    for word in "$@"; do [[ $word == "$flag" || $word == "$flag="* ]] && return; done
    return 1
}

edit_first() {
    local variable=$1 flag=$2 value
    shift 2
    for value in "$@"; do
        [[ $value != /path/to/* ]] ||
            fail "$variable is still $value: set it at the top of scripts/train.sh, or give $flag"
    done
}

given --model_name_or_path "$@" || edit_first MODEL --model_name_or_path "$MODEL"
if ! given --data_files "$@"; then
    ((${#DATA_FILES[@]})) || fail "DATA_FILES is empty: name the training files at the top of scripts/train.sh"
    edit_first DATA_FILES --data_files "${DATA_FILES[@]}"
    flags+=(--data_files "${DATA_FILES[@]}")
fi
if ! given --eval_data_files "$@" && ! given --validation_split_percentage "$@"; then
    if ((${#EVAL_DATA_FILES[@]})); then
        edit_first EVAL_DATA_FILES --eval_data_files "${EVAL_DATA_FILES[@]}"
        flags+=(--eval_data_files "${EVAL_DATA_FILES[@]}")
    else
        flags+=(--validation_split_percentage "$VALIDATION_PERCENT")
    fi
fi
[[ -x $ENVIRONMENT/bin/deepspeed ]] || fail "deepspeed is not installed in $ENVIRONMENT; run bash scripts/setup.sh"

[[ $NUM_GPUS =~ ^(auto|[0-9]+)$ ]] || fail "NUM_GPUS=$NUM_GPUS: auto or a number; GPU_IDS chooses by index"
LAUNCHER=${LAUNCHER:-deepspeed} # what scripts/train_multinode.sh sets
gpus=$(visible_gpus)
per_node=0
if [[ $LAUNCHER == hostfile ]]; then
    devices=(--hostfile "$HOSTFILE") # which says how many each machine has
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
    # Each rank would take every core for itself, and two of them would wait for each other.
    export DS_ACCELERATOR=cpu OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}
    echo "no GPU is used: $ranks process(es) on the CPU"
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
        # torchrun knows no choice of devices but this one.
        [[ -z $GPU_IDS ]] || export CUDA_VISIBLE_DEVICES=$GPU_IDS
        ;;
    *) unset CUDA_VISIBLE_DEVICES ;; # the choice is made; deepspeed would warn that it ignores the variable
esac

# The value of a flag, which the last word about it decides.
value_of() {
    local flag=$1 value=$2
    shift 2
    while (($#)); do
        case $1 in
            "$flag") value=${2-} ;;
            "$flag="*) value=${1#*=} ;;
        esac
        shift
    done
    echo "$value"
}

# An objective without an alpha refuses one, and the default above is nothing that the user asked for.
objective=$(value_of --objective "" "${flags[@]}" "$@") config=$(value_of --config "" "${flags[@]}" "$@")
[[ -n $objective || ! -f $config ]] ||
    objective=$(sed -n "s/^objective:[[:space:]]*['\"]\{0,1\}\([a-z]*\).*/\1/p" "$config")
case ${objective:-dft} in
    dft | asft) flags+=(--dft_alpha "$DFT_ALPHA") ;;
esac
output_dir=$(value_of --output_dir "$OUTPUT_DIR" "$@")
flags+=(--logging_dir "${LOGGING_DIR:-$output_dir/logs}")
[[ $MAX_RESTARTS =~ ^[0-9]+$ ]] || fail "MAX_RESTARTS=$MAX_RESTARTS: a number"
[[ $GRACE =~ ^[0-9]+$ ]] || fail "GRACE=$GRACE: a number of seconds"
if ((MAX_RESTARTS)); then
    case $(value_of --save_only_model "" "${flags[@]}" "$@") in
        [Ff]alse) ;;
        *) fail "MAX_RESTARTS=$MAX_RESTARTS needs checkpoints to go on from: set --save_only_model False" ;;
    esac
    given --resume_from_checkpoint "${flags[@]}" "$@" || given --overwrite_output_dir "$@" ||
        flags+=(--resume_from_checkpoint auto)
fi

# The step of the newest checkpoint; a folder has that name only when all of it is there.
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
[[ ! -e $log ]] || log=${log%.log}_$$.log
echo "log: $log"
if ((${NODE_RANK:-0})); then
    echo "machine 1 reports on the run, in its own log"
else
    echo "follow it: tail -f $log"
fi

# To the terminal, and at the end of the log, below what launchers say of a rank that ended.
tell() {
    echo "$*" | tee -a "$log" >&2
}

job= asked= forced=

end_all() {
    kill -TERM -- "-$job" 2>/dev/null || true
    for _ in {1..50}; do
        kill -0 -- "-$job" 2>/dev/null || return 0
        sleep 0.1
    done
    kill -KILL -- "-$job" 2>/dev/null || true
}

# To the ranks themselves, which are the children of torchrun, and of deepspeed's child: a launcher would give them
# half a minute to save, and then kill them. Fails where there are none yet.
signal_ranks() {
    "$PYTHON" -c '
import sys, psutil
try:
    ranks = psutil.Process(int(sys.argv[1])).children()
    if sys.argv[3] != "torchrun":
        ranks = [rank for one in ranks for rank in one.children()]
    for rank in ranks:
        rank.send_signal(int(sys.argv[2]))
except psutil.NoSuchProcess:
    ranks = []
sys.exit(not ranks)' "$job" "$(kill -l "$1")" "$LAUNCHER"
}

ask_to_stop() {
    if [[ -n $asked ]]; then
        echo "again: ending all processes at once" >&2
        forced="at once, as asked by a second signal"
        end_all
        return
    fi
    asked=$1
    [[ -n $job ]] || exit "$((128 + $(kill -l "$asked")))"
    echo "SIG$asked: the run finishes its step, saves and ends, within $GRACE s; a second signal ends it at once" >&2
    # SIGHUP means nothing to a rank; without ranks nothing is trained yet.
    signal_ranks "${asked/HUP/TERM}" || end_all
}
trap 'ask_to_stop INT' INT
trap 'ask_to_stop TERM' TERM
trap 'ask_to_stop HUP' HUP
trap 'ask_to_stop USR1' USR1

# Runs training once; `status` is its exit code, `seen` the length of the log before.
attempt() {
    local port follower=
    # A fixed port would make a second run on this machine join, or fail on, the first.
    port=${MASTER_PORT:-$("$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')}
    local launcher=(deepspeed "${devices[@]}" --master_port "$port" --log_level error)
    [[ $LAUNCHER != hostfile || -z ${MASTER_ADDR:-} ]] || launcher+=(--master_addr "$MASTER_ADDR")
    [[ $LAUNCHER != torchrun ]] || launcher=(
        "$PYTHON" scripts/torchrun.py --nnodes "$NNODES" --node_rank "$NODE_RANK" --nproc_per_node "$per_node"
        --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT"
    )
    local command=("${launcher[@]}" train_dft.py "${flags[@]}" "$@")
    { printf '%q ' "${command[@]}" && echo; } >>"$log"
    seen=$(stat -c %s "$log" 2>/dev/null || stat -f %z "$log")
    # Job control gives the launcher and its ranks a process group of their own, which can be ended as a whole.
    set -m
    "${command[@]}" >>"$log" 2>&1 </dev/null &
    job=$!
    if [[ -t 1 || -n ${SHOW_LOG:-} ]]; then
        tail -c "+$((seen + 1))" -f -s 0.2 --pid "$job" "$log" &
        follower=$!
    fi
    set +m
    while true; do
        status=0
        wait "$job" || status=$?
        kill -0 "$job" 2>/dev/null || break # else a signal has ended the wait
        local deadline=$((SECONDS + GRACE))
        while kill -0 "$job" 2>/dev/null; do
            ((SECONDS < deadline)) || { forced="after $GRACE s, in which it did not save" && end_all; }
            sleep 0.2
        done
    done
    if kill -0 -- "-$job" 2>/dev/null; then
        ((status)) || status=1 # a launcher that is killed says 0, and leaves its processes behind
        end_all
    fi
    [[ -z $follower ]] || wait "$follower" || true
}

restarts=0 stuck=0 before=$(newest_step)
while true; do
    attempt "$@"
    ((status)) || break
    if [[ -n $asked ]]; then
        if ((status == 75)); then
            tell "stopped: everything is saved, the same command with --resume_from_checkpoint auto goes on"
        else
            newest=$(newest_step)
            ((newest < 0)) && newest="there is no checkpoint" || newest="the newest checkpoint is checkpoint-$newest"
            tell "ended ${forced:-by SIG$asked before training began, or by an error in $log}; $newest"
            status=$((128 + $(kill -l "$asked")))
        fi
        exit "$status"
    fi
    reason=$(tail -c "+$((seen + 1))" "$log" | grep -aE '^(\[rank [0-9]+\] )?error: ' | tail -n 1 || true)
    [[ -z $reason ]] || tell "$reason"
    tell "error: training ended with exit code $status; see $log"
    if ((status == 76)); then # a smaller batch was noted, of which there are only so many
        (($(newest_step) < 0)) || set -- "$@" --resume_from_checkpoint auto --overwrite_output_dir False
        echo "again, with the smaller batch" | tee -a "$log"
        continue
    fi
    # 75: a rank was asked to stop, by whom it concerns. 2: what was given is wrong, and will be again.
    ((status != 75 && status != 2 && restarts < MAX_RESTARTS)) || exit "$status"
    now=$(newest_step)
    ((now > before)) && stuck=0 || stuck=$((stuck + 1))
    if ((stuck > 1)); then
        echo "error: two attempts in a row without a new checkpoint; MAX_RESTARTS gives up" >&2
        exit "$status"
    fi
    before=$now restarts=$((restarts + 1))
    set -- "$@" --resume_from_checkpoint auto --overwrite_output_dir False
    echo "restart $restarts of $MAX_RESTARTS, from $( ((now < 0)) && echo the start || echo "checkpoint-$now")" | tee -a "$log"
done
echo "done: $log"
