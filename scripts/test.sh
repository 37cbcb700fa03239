#!/usr/bin/env bash
# Lints and tests everything, after setting up what is missing. Arguments go to pytest:
#
#   bash scripts/test.sh
#   bash scripts/test.sh tests/loss -k gradient
set -euo pipefail
scripts=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
bash "$scripts/setup.sh" --dev
. "$scripts/environment.sh"
cd "$ROOT"

# Tests make their own models and data; whatever reaches for the network is a mistake and should fail at once.
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1

ruff check .
exec "$PYTHON" -m pytest -m "not slow" "$@"
