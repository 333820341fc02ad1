#!/usr/bin/env bash
# What docs/speed.md has to say about GPUs, in ten minutes on one of them, unattended: an update of EDM's CIFAR-10 network
# and of Stable Diffusion 1.5's, in plain torch beside everything that makes it faster, and beside channels last alone; the
# share of the matrix peak, waits and idle time; and how near `fdistill generate` comes to the network's own speed.
# A trace of updates is what gpu_scaling.sh leaves.
#   bash scripts/gpu_speed.sh [OUTPUT_DIR]
# PYTHON and WHEELS are as in gpu_parts.sh.
set -uo pipefail
out="${1:-$(dirname "${BASH_SOURCE[0]}")/../runs/gpu-speed}"
# shellcheck disable=SC1091
source "$(dirname "${BASH_SOURCE[0]}")/gpu_parts.sh"
against() { # NAME WORK BATCH PLAIN FASTER
    "$python" scripts/bench_step.py "$2" "batch_size=$3" device=cuda precision=bf16 critic_steps=1 "$4" \
        --against "$5" --repeats 5 --output "$out/$1.json"
}
all=backend=auto,speed.channels_last=true,speed.compile=true
export -f against
export all
part edm-all 150 bash -c 'against edm-all edm-w128 128 backend=reference "$all"'
part edm-channels-last 60 bash -c 'against edm-channels-last edm-w128 128 backend=auto speed.channels_last=true'
part sd15-all 210 bash -c 'against sd15-all sd15 8 backend=reference "$all"'
part sd15-channels-last 90 bash -c 'against sd15-channels-last sd15 8 backend=auto speed.channels_last=true'
part generate 60 "$python" scripts/bench_generate.py edm-w128 --steps 1 --num-images 8192 --batch-size 512 \
    --precision bf16 --device cuda --output "$out/generate.json"
finished
