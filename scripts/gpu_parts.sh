# Sourced by scripts that measure on a GPU, unattended: `out` is where results go, `part` runs one of their parts, and
# `finished` says which failed. Uses the python3 on PATH (PYTHON=... picks another) with torch and Triton; WHEELS=DIR
# installs the project's other dependencies from wheels in DIR, without a network, into a temporary folder.
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
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
finished() {
    if [ ${#failed[@]} -gt 0 ]; then
        printf '\nfailed: %s\n' "${failed[*]}"
        exit 1
    fi
    printf '\nall parts passed; results are in %s\n' "$out"
}
export python out
