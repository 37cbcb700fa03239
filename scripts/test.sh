#!/usr/bin/env bash
# Lints and tests everything, after setting up what is missing. Arguments go to pytest:
#
#   bash scripts/test.sh
#   bash scripts/test.sh tests/loss -k gradient
#   bash scripts/test.sh -n 0 tests/data        # in one process, not one per core
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
help_of "${BASH_SOURCE[0]}" "$@"
bash "$ROOT/scripts/setup.sh" --dev
cd "$ROOT"

# Tests make their own models and data; whatever reaches for the network is a mistake and should fail at once.
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1
# Models of this size are faster on one thread, and other tests have the other cores.
export OMP_NUM_THREADS=1

ruff check .
lint-imports
# The tests of a file share what they have trained, so they stay together.
exec "$PYTHON" -m pytest -m "not slow" -n auto --maxprocesses 4 --dist loadfile "$@"
