#!/usr/bin/env bash
# Installs what is missing, then runs the linters and all tests. Arguments are passed to pytest:
#
#   bash scripts/test.sh
#   bash scripts/test.sh tests/loss -k gradient
#   bash scripts/test.sh -n 0 tests/data        # in one process instead of one per core
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
help_of "${BASH_SOURCE[0]}" "$@"
bash "$ROOT/scripts/setup.sh" --dev
cd "$ROOT"

# Tests create their own models and data. Network access is a mistake and should fail at once.
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1
# Models of this size are fastest on one thread, and other test processes use the other cores.
export OMP_NUM_THREADS=1

ruff check .
ruff format --check .
# The linters that take long run beside the tests; what they print follows.
lint_log=$(mktemp)
trap 'rm -f "$lint_log"' EXIT
(lint-imports && mypy) >"$lint_log" 2>&1 &
linters=$!
status=0
# Tests of one file share trained models, so they run in the same process.
"$PYTHON" -m pytest -m "not slow" -n auto --maxprocesses 4 --dist loadfile "$@" || status=$?
wait "$linters" || status=1
cat "$lint_log"
exit "$status"
