#!/usr/bin/env bash
# Runs on a GPU machine what a CPU cannot show, in order of value, and writes each result as soon as it is there.
#
#   bash scripts/gpu_check.sh OUT [--minutes 10] [--model FOLDER] [--gsm8k TRAIN TEST] [--full]
#   bash scripts/gpu_check.sh OUT --cpu      # a dry run on the CPU with tiny sizes
#
#   OUT             folder of the results: summary.txt, and a log of each check
#   --minutes N     checks that would begin later are skipped; a check that is running then is ended (default 10)
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
cd "$ROOT" || exit 1

out= minutes=10 model= train= test= cpu= study=small
while (($#)); do
    case $1 in
        --minutes) minutes=${2-} && shift ;;
        --model) model=${2-} && shift ;;
        --gsm8k) train=${2-} test=${3-} && shift 2 ;;
        --cpu) cpu=true study=quick ;;
        --full) study=full ;;
        -*) fail "unknown argument $1" ;;
        *) [[ -z $out ]] && out=$1 || fail "unexpected argument $1" ;;
    esac
    shift || fail "a value is missing"
done
[[ -n $out ]] || fail "name the folder of the results: bash scripts/gpu_check.sh OUT"
[[ $minutes =~ ^[0-9]+$ ]] || fail "--minutes $minutes: must be a number"
[[ -n $cpu ]] || has_gpu || fail "no GPU is visible (nvidia-smi -L); --cpu makes a dry run"
mkdir -p "$out"
out=$(cd "$out" && pwd)
summary=$out/summary.txt
: >"$summary"
failed=0
[[ -z $cpu ]] || export DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1

say() {
    echo "$*" | tee -a "$summary"
}

installed() {
    "$PYTHON" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"
}

# check NAME COMMAND...: runs a command with its output in OUT/NAME.log, and shows the end of it.
check() {
    local name=$1 start=$SECONDS code=0 remaining=$((60 * minutes - SECONDS))
    shift
    ((remaining > 0)) || { say "skipped  $name: the $minutes minutes are over" && return; }
    timeout --kill-after=10 "$remaining" "$@" >"$out/$name.log" 2>&1 </dev/null || code=$?
    case $code in
        0) say "passed   $name ($((SECONDS - start)) s)" ;;
        124 | 137) say "ended    $name: it was running when the $minutes minutes were over" ;;
        *) failed=1 && say "FAILED   $name, exit code $code ($((SECONDS - start)) s)" ;;
    esac
    tail -n 40 "$out/$name.log" | sed 's/^/    /'
}

skip() {
    say "skipped  $1: $2"
}

check environment "$PYTHON" scripts/bench/check_gpu.py environment

if [[ -z $cpu ]]; then
    if installed pytest; then
        check head-exact "$PYTHON" -m pytest -q -p no:cacheprovider tests/loss/test_cuda.py
    else
        skip head-exact "pytest is not installed"
    fi
else
    skip head-exact "tests/loss/test_cuda.py needs a GPU"
fi
check attention "$PYTHON" scripts/bench/check_gpu.py attention
check precision "$PYTHON" scripts/bench/check_gpu.py precision
if [[ -n $cpu ]] || ! installed bitsandbytes || ! installed peft; then
    skip qlora "needs a GPU, bitsandbytes and peft"
else
    check qlora "$PYTHON" scripts/bench/check_gpu.py qlora
fi

shapes=() vocabularies=() rounds=3
[[ -z $cpu ]] || { shapes=(--shapes 64,0.5,32,256 --dtypes float32 --contenders floor ours) && rounds=1; }
installed trl || skip "TRL in the benchmarks" "trl is not installed"
check bench-head "$PYTHON" scripts/bench/bench_head.py --rounds "$rounds" "${shapes[@]}"
if [[ -n $train ]]; then
    contenders=(bare ours)
    if installed trl; then contenders+=(trl); fi
    if [[ -n $cpu ]]; then vocabularies=(--vocabularies 4096 --batches unpacked) contenders=(bare ours); fi
    check bench-train "$PYTHON" scripts/bench/bench_train.py --corpus "$train" --rounds "$rounds" \
        --contenders "${contenders[@]}" "${vocabularies[@]}"
else
    skip bench-train "no --gsm8k"
fi
if [[ -z $cpu ]]; then
    check plan "$PYTHON" scripts/bench/bench_plan.py
else
    skip plan "takes minutes on a CPU: python scripts/bench/bench_plan.py"
fi

# Makes the model whole if its weights are in pieces.
if [[ -n $model ]] && compgen -G "$model/model.safetensors.part-*" >/dev/null; then
    mkdir -p "$out/model"
    find "$model" -maxdepth 1 -type f ! -name '*.part-*' -exec cp {} "$out/model/" \;
    cat "$model"/model.safetensors.part-* >"$out/model/model.safetensors"
    model=$out/model
fi

if [[ -z $model ]]; then
    skip gsm8k "no --model"
elif [[ -z $train || -z $test ]]; then
    skip gsm8k "no --gsm8k"
else
    check gsm8k "$PYTHON" scripts/bench/check_gpu.py gsm8k --model "$model" --train "$train" --test "$test" \
        --folder "$out/gsm8k"
fi
if [[ -z $model ]]; then
    skip study "no --model"
elif ! installed reasoning_gym; then
    skip study "reasoning-gym is not installed (requirements-real.txt)"
else
    texts=()
    [[ -z $test ]] || texts=(--gsm8k "$test")
    check study "$PYTHON" scripts/study/real_study.py "$out/study" --model "$model" --size "$study" "${texts[@]}"
fi
say "results in $out"
exit "$failed"
