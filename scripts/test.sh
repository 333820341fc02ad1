#!/usr/bin/env bash
# Makes the environment if there is none, then checks format, lint and types, and runs the tests: offline, without a GPU.
#   bash scripts/test.sh [PYTEST ARGUMENTS]
# A nightly run adds -m "", which runs the thorough tests as well, and sets FDISTILL_FUZZ=500: tests/commands/test_odd_files.py then throws as many odd files at the commands,
# and test_damaged_files.py damages as many checkpoints, records, configs and data. It also kills 25 runs,
# scripts/kill_loop.py --count 25.
# Two test files at a time, one thread each: most of them wait for imports, files and other processes.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
unset PYTHONDONTWRITEBYTECODE # a hundred processes would compile the package again, a second each
echo "== ruff"
ruff format --check .
ruff check .
echo "== mypy, pytest"
mypy & # uses a core for a minute, in which pytest's processes begin
types=$!
python -m pytest --numprocesses 2 --dist loadfile "$@"
wait "$types"
