#!/usr/bin/env bash
# Makes the environment if there is none, then checks format, lint and types, and runs the tests: offline, without a GPU.
#   bash scripts/test.sh [PYTEST ARGUMENTS]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
export HF_HUB_OFFLINE=1
echo "== ruff"
ruff format --check .
ruff check .
echo "== mypy"
mypy
echo "== pytest"
python -m pytest "$@"
