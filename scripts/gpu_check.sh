#!/usr/bin/env bash
# What a machine without a GPU cannot show, in ten minutes on one GPU, unattended: kernels against torch, an update that
# never waits for the GPU, the benchmark of docs/kernels.md, and a short digits run in bfloat16 with its score.
#   bash scripts/gpu_check.sh [OUTPUT_DIR]
# PYTHON and WHEELS are as in gpu_parts.sh. Every part runs whatever became of the others; the exit status says whether
# all of them passed.
set -uo pipefail
out="${1:-$(dirname "${BASH_SOURCE[0]}")/../runs/gpu-check}"
# shellcheck disable=SC1091
source "$(dirname "${BASH_SOURCE[0]}")/gpu_parts.sh"
digits() { # ITERATIONS
    local run="$out/digits"
    rm -rf "$run"
    "$python" -m fdistill distill digits device=cuda precision=bf16 iterations="$1" log.tracker=none --output "$run" &&
        "$python" -m fdistill generate "$run" --num-images 1797 --seed 1 --output "$run/images" &&
        "$python" -m fdistill evaluate "$run/images" --reference digits --output "$out/digits.json"
}
export -f digits
part parity 180 "$python" -m pytest -q --maxfail=20 tests/kernels/test_kernels.py
part step 50 "$python" scripts/gpu_step.py --output "$out/step.json"
part digits 80 bash -c 'digits 420'
part benchmark 260 "$python" scripts/bench_kernels.py --output "$out/kernels.json"
finished
