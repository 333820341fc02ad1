#!/usr/bin/env bash
# A teacher and three one-step students of a copy of CIFAR-10, trained and measured on one GPU in ten minutes, unattended and
# without a network. What it does and what its numbers are: docs/cifar10.md.
#   bash scripts/gpu_cifar10.sh OUTPUT_DIR [STAGE ...] [--quick]
# CIFAR10 names the JPEG copy's training file (the test file lies beside it), WORK the folder for what is made on the way:
# where a call may not last ten minutes, call `data features teacher`, `students` and `report` one after another, with the same
# WORK. Uses the python3 on PATH (PYTHON=... picks another) with torch; WHEELS=DIR installs other dependencies from wheels in
# DIR into a temporary folder, as for scripts/gpu_check.sh. A call ends after LIMIT seconds, 590 unless it is set; the
# stages that were done by then stay in WORK, and the next call goes on with the others.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
[ $# -gt 0 ] || { echo "usage: bash scripts/gpu_cifar10.sh OUTPUT_DIR [STAGE ...] [--quick]" >&2; exit 2; }
mkdir -p "$1" && out="$(cd "$1" && pwd)"
shift
cifar10="$(realpath -m "${CIFAR10:-$root/data/cifar10-train-jpeg.npz}")"
work="$(realpath -m "${WORK:-$root/runs/gpu-cifar10}")"
cd "$root"
python="${PYTHON:-python3}"
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
if [ -n "${WHEELS:-}" ]; then
    site="$(mktemp -d)"
    trap 'rm -rf "$site"' EXIT
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$WHEELS"/*.whl
    export PYTHONPATH="$PYTHONPATH:$site"
fi
case " $* " in
*" --quick "*) export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" ;; # tiny networks: more threads are slower
*)
    "$python" -c 'import sys, torch; torch.cuda.is_available() or sys.exit("no CUDA GPU is visible to torch: add --quick to try this out here")'
    [ -f "$cifar10" ] || { echo "$cifar10: no such file; set CIFAR10 to the JPEG copy's training file" >&2; exit 1; }
    ;;
esac
limit="${LIMIT:-590}"
status=0
timeout "$limit" "$python" scripts/gpu_cifar10.py "$@" --output "$out" --work "$work" --cifar10 "$cifar10" 2>&1 | tee -a "$out/log.txt" || status=$?
[ "$status" -ne 124 ] || echo "stopped after $limit s; the same command, with the same WORK, goes on with the stages that are left" >&2
exit "$status"
