#!/usr/bin/env bash
# What a machine without a GPU cannot show, in ten minutes on one GPU, unattended: kernels against torch, an update that
# never waits for the GPU, the benchmark of docs/kernels.md, and a short digits run in bfloat16 with its score.
#   bash scripts/gpu_check.sh [OUTPUT_DIR]
# Uses the python3 on PATH (PYTHON=... picks another) with torch and Triton; WHEELS=DIR installs the project's other
# dependencies from wheels in DIR, without a network, into a temporary folder. Every part runs whatever became of the
# others; the exit status says whether all of them passed.
set -uo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
out="${1:-$root/runs/gpu-check}"
mkdir -p "$out" && out="$(cd "$out" && pwd)" || exit 1
cd "$root" || exit 1
python="${PYTHON:-python3}"
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
if [ -n "${WHEELS:-}" ]; then
    site="$(mktemp -d)"
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$WHEELS"/*.whl || exit 1
    export PYTHONPATH="$PYTHONPATH:$site"
fi
"$python" - <<'PROBE' || exit 1
import sys
import torch
if not torch.cuda.is_available():
    sys.exit(f"no CUDA GPU is visible to torch {torch.__version__}: nothing to check here")
import triton, shutil, importlib.util
missing = [name for name in ("pytest", "diffusers", "torch_fidelity", "pydantic", "ruamel", "typer") if not importlib.util.find_spec(name)]
if missing or not (shutil.which("gcc") or shutil.which("clang")):
    sys.exit(f"missing here: {', '.join(missing) or 'a C compiler, which Triton needs'}; see docs/kernels.md, 'Running the check'")
print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, python {sys.version.split()[0]}")
PROBE

failed=()
part() { # NAME SECONDS COMMAND...
    local name="$1" limit="$2" began=$SECONDS
    shift 2
    printf '\n== %s\n' "$name"
    timeout "$limit" "$@" 2>&1 | tee "$out/$name.log"
    local status=${PIPESTATUS[0]}
    [ "$status" -eq 0 ] || failed+=("$name ($status)")
    printf -- '-- %s: status %s, %s s\n' "$name" "$status" "$((SECONDS - began))"
}
digits() { # ITERATIONS
    local run="$out/digits"
    rm -rf "$run"
    "$python" -m fdistill distill digits device=cuda precision=bf16 iterations="$1" log.tracker=none --output "$run" &&
        "$python" -m fdistill generate "$run" --num-images 1797 --seed 1 --output "$run/images" &&
        "$python" -m fdistill evaluate "$run/images" --reference digits --output "$out/digits.json"
}
export -f digits
export python out
part parity 180 "$python" -m pytest -q --maxfail=20 tests/kernels/test_kernels.py
part step 50 "$python" scripts/gpu_step.py --output "$out/step.json"
part digits 90 bash -c 'digits 350'
part benchmark 270 "$python" scripts/bench_kernels.py --output "$out/kernels.json"
if [ ${#failed[@]} -gt 0 ]; then
    printf '\nfailed: %s\n' "${failed[*]}"
    exit 1
fi
printf '\nall parts passed; results are in %s\n' "$out"
