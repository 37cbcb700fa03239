#!/usr/bin/env bash
# Runs on a GPU machine what a CPU cannot show, in order of value, and writes each result as soon as it is there.
#
#   bash scripts/gpu_check.sh OUT [--minutes 10] [--model FOLDER] [--gsm8k TRAIN TEST] [--full]
#   bash scripts/gpu_check.sh OUT --cpu      # a dry run on the CPU with tiny sizes
#
#   OUT             folder of the results: summary.txt, and a log of each check
#   --minutes N     time for all checks, 0 to 1440 (default 10). A check that takes more than its share of it is ended,
#                   and those that would begin later are skipped
#   --model FOLDER  a pretrained model, as scripts/get_model.py makes it, for the study and for GSM8K. Its
#                   model.safetensors may be in pieces, for machines that take only small files:
#                   split -b 60M model.safetensors model.safetensors.part- && rm model.safetensors
#   --gsm8k A B     conversations of GSM8K to train on and to test with
#   --full          the full study instead of the small one
#
# Needs no network. What is not installed is skipped, with one line. The exit code is 1 if a check failed.
set -euo pipefail
scripts=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$scripts/environment.sh"
help_of "${BASH_SOURCE[0]}" "$@"

# values COUNT FLAG VALUE...: fails unless as many values follow the flag.
values() {
    local count=$1 flag=$2 word
    shift 2
    (($# >= count)) || fail "$flag: a value is missing"
    for word in "${@:1:count}"; do
        [[ -n $word && $word != --* ]] || fail "$flag: a value is missing"
    done
}

SECONDS=0
out= minutes=10 model= train= test= cpu= study=small
while (($#)); do
    case $1 in
        --minutes) values 1 "$@" && minutes=$2 && shift ;;
        --model) values 1 "$@" && model=$2 && shift ;;
        --gsm8k) values 2 "$@" && train=$2 && test=$3 && shift 2 ;;
        --cpu) cpu=true study=quick ;;
        --full) study=full ;;
        -*) fail "unknown argument $1" ;;
        *) [[ -z $out ]] && out=$1 || fail "unexpected argument $1" ;;
    esac
    shift
done
[[ -n $out ]] || fail "name the folder of the results: bash scripts/gpu_check.sh OUT"
# 10# because bash takes a number with a leading zero as octal.
[[ $minutes =~ ^[0-9]{1,6}$ ]] && minutes=$((10#$minutes)) && ((minutes <= 1440)) ||
    fail "--minutes $minutes: must be a whole number from 0 to 1440"
for file in "$train" "$test"; do
    [[ -z $file || -f $file ]] || fail "--gsm8k: $file is not a file"
done
[[ -z $model || -f $model/config.json ]] || fail "--model: $model/config.json does not exist"
[[ -z $train ]] || { train=$(realpath "$train") && test=$(realpath "$test"); }
[[ -z $model ]] || model=$(realpath "$model")
[[ -n $cpu ]] || has_gpu || fail "no GPU is visible (nvidia-smi -L); --cpu makes a dry run"
mkdir -p -- "$out" || fail "$out: cannot be made; name another folder"
out=$(realpath "$out")
summary=$out/summary.txt
{ : >"$summary"; } || fail "$summary: cannot be written; name another folder"
cd "$ROOT"
failed=0 child=
[[ -z $cpu ]] || export DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1

say() {
    echo "$*" | tee -a "$summary"
}

installed() {
    "$PYTHON" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"
}

# Ends the running check with this script. timeout passes the signal on to its whole process group.
stop() {
    trap - INT TERM HUP
    [[ -z $child ]] || { kill "$child" && wait "$child"; } 2>/dev/null || true
    say "stopped  by $1; results in $out"
    exit "$2"
}
trap 'stop SIGINT 130' INT
trap 'stop SIGTERM 143' TERM
trap 'stop SIGHUP 129' HUP

# check NAME PERCENT COMMAND...: runs a command for at most this share of the minutes, with its output in OUT/NAME.log,
# and shows the end of it.
check() {
    local name=$1 start=$SECONDS code=0 limit=$((60 * minutes * $2 / 100)) remaining=$((60 * minutes - SECONDS))
    shift 2
    ((remaining > 0)) || { skip "$name" "the $minutes minutes are over" && return; }
    ((limit >= 60)) || limit=60
    ((limit < remaining)) || limit=$remaining
    # In the background, because bash handles signals only between commands and during wait.
    timeout --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1 </dev/null &
    child=$!
    wait "$child" || code=$?
    child=
    if ((code == 0)); then
        say "passed   $name ($((SECONDS - start)) s)"
    elif ((code == 124 || code == 137)) && ((SECONDS - start >= limit)); then
        say "ended    $name: it was still running after its $limit s"
    else
        failed=1
        say "FAILED   $name, exit code $code ($((SECONDS - start)) s)"
    fi
    tail -n 40 "$out/$name.log" | sed 's/^/    /'
}

skip() {
    say "skipped  $1: $2"
}

check environment 5 "$PYTHON" scripts/bench/check_gpu.py environment

if [[ -z $cpu ]]; then
    if installed pytest; then
        check head-exact 20 "$PYTHON" -m pytest -q -p no:cacheprovider tests/loss/test_cuda.py
        check waits-exact 5 "$PYTHON" -m pytest -q -p no:cacheprovider tests/training/test_host_waits.py
    else
        skip head-exact "pytest is not installed"
        skip waits-exact "pytest is not installed"
    fi
    check waits 10 "$PYTHON" scripts/bench/bench_waits.py
else
    skip head-exact "tests/loss/test_cuda.py needs a GPU"
    skip waits-exact "its tests of a GPU need one"
    skip waits "counted on a CPU: python scripts/bench/bench_waits.py"
fi
check attention 10 "$PYTHON" scripts/bench/check_gpu.py attention
check precision 20 "$PYTHON" scripts/bench/check_gpu.py precision
if [[ -n $cpu ]] || ! installed bitsandbytes || ! installed peft; then
    skip qlora "needs a GPU, bitsandbytes and peft"
else
    check qlora 20 "$PYTHON" scripts/bench/check_gpu.py qlora
fi

shapes=() vocabularies=() rounds=$((minutes < 30 ? 1 : 3))
[[ -z $cpu ]] || { shapes=(--shapes 64,0.5,32,256 --dtypes float32 --contenders floor ours) && rounds=1; }
installed trl || skip "TRL in the benchmarks" "trl is not installed"
check bench-head 15 "$PYTHON" scripts/bench/bench_head.py --rounds "$rounds" "${shapes[@]}"
check profile-head 10 "$PYTHON" scripts/bench/bench_head.py --contenders floor ours eaft deft asft "floor with base" \
    "${shapes[@]}" --profile
if [[ -n $train ]]; then
    contenders=(bare flat floor ours compiled)
    if installed liger_kernel; then contenders+=(liger); fi
    if installed trl; then contenders+=(trl); fi
    if [[ -n $cpu ]]; then vocabularies=(--vocabularies 4096 --batches unpacked) contenders=(bare ours); fi
    check bench-train 25 "$PYTHON" scripts/bench/bench_train.py --corpus "$train" --rounds "$rounds" \
        --contenders "${contenders[@]}" "${vocabularies[@]}"
else
    skip bench-train "no --gsm8k"
fi
if [[ -z $cpu ]]; then
    check plan 20 "$PYTHON" scripts/bench/bench_plan.py
else
    skip plan "takes minutes on a CPU: python scripts/bench/bench_plan.py"
fi

# Makes the model whole if its weights are in pieces.
if [[ -n $model ]] && compgen -G "$model/model.safetensors.part-*" >/dev/null; then
    # shellcheck disable=SC2016  # expanded by the inner shell
    check join-model 20 bash -euc 'mkdir -p "$2" && find "$1" -maxdepth 1 -type f ! -name "model.safetensors*" -exec cp -t "$2" {} + &&
        cat "$1"/model.safetensors.part-* >"$2/model.safetensors"' join "$model" "$out/model"
    model=$out/model
fi

if [[ -z $model ]]; then
    skip gsm8k "no --model"
elif [[ -z $train || -z $test ]]; then
    skip gsm8k "no --gsm8k"
else
    check gsm8k 40 "$PYTHON" scripts/bench/check_gpu.py gsm8k --model "$model" --train "$train" --test "$test" \
        --folder "$out/gsm8k"
fi
if [[ -z $model ]]; then
    skip study "no --model"
elif ! installed reasoning_gym; then
    skip study "reasoning-gym is not installed (requirements-real.txt)"
else
    texts=()
    [[ -z $test ]] || texts=(--gsm8k "$test")
    check study 100 "$PYTHON" scripts/study/real_study.py "$out/study" --model "$model" --size "$study" "${texts[@]}"
fi
say "results in $out"
exit "$failed"
