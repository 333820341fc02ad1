#!/usr/bin/env bash
# What docs/memory.md, scaling.md, cluster.md and speed.md count or measure on CPUs, on one GPU, in ten minutes, unattended.
#   bash scripts/gpu_scaling.sh [OUTPUT_DIR]
# PYTHON and WHEELS are as in gpu_parts.sh; bitsandbytes among the wheels lets the parts with few bits run.
set -uo pipefail
out="${1:-$(dirname "${BASH_SOURCE[0]}")/../runs/gpu-scaling}"
# shellcheck disable=SC1091
source "$(dirname "${BASH_SOURCE[0]}")/gpu_parts.sh"
step() { # NAME CONFIG ARGUMENTS...
    local name="$1"
    shift
    "$python" scripts/bench_step.py "$@" --output "$out/$name.json"
}
peaks() { # counted beside measured: the plan's total, and the most that an update allocates
    for settings in "digits batch_size=8192" "digits-t2i batch_size=1024" "digits batch_size=8192 precision=bf16 frozen_precision=bf16"; do
        # shellcheck disable=SC2086
        "$python" -m fdistill plan $settings --output "$out/plan-${settings//[ =]/-}.json" > /dev/null &&
            "$python" scripts/bench_step.py $settings device=cuda --repeats 3 --output "$out/peak-${settings//[ =]/-}.json"
    done
}
export -f step peaks
part step-edm-w128 120 bash -c 'step edm-w128 edm-w128 batch_size=128 device=cuda precision=bf16 --profile "$out/edm-w128"'
part step-edm-w128-fp32 60 bash -c 'step edm-w128-fp32 edm-w128 batch_size=128 device=cuda --repeats 3'
part offload 120 bash -c 'step offload edm-w128 batch_size=128 device=cuda precision=bf16 --against offload_frozen=true,offload_optimizers=true --repeats 3'
part peaks 150 bash -c peaks
part saving 60 bash -c '"$python" scripts/bench_saving.py edm-w128 batch_size=128 device=cuda precision=bf16 --iterations 20 | tee "$out/saving.json"'
part few-bits 60 "$python" -m pytest -q tests/adapters/test_quantised_layers.py tests/training/test_small_gpus.py
finished
