#!/usr/bin/env bash
# Builds the wheel and the sdist, installs each into an empty environment, and tries the commands there, outside the checkout.
#   bash scripts/check_packages.sh [PYTHON[:TORCH] ...]      for example python3.10:2.8.0 python3.13
# Without arguments it tries every Python from 3.10 to 3.13 that it finds on PATH, in pyenv or with uv: the oldest with
# torch 2.8, which is the oldest that is supported, the others with the newest torch that pip finds. It needs a package
# index, and for each environment 6 GB of disk and about three minutes; an environment is deleted before the next one.
# The rows that it prints are those of the table in docs/compatibility.md. It ends with an error if one of them says "fails".
set -euo pipefail
checkout="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
unset PYTHONPATH # or the commands would run the checkout's code
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"
work="$(mktemp -d "${TMPDIR:-/tmp}/fdistill-packages.XXXXXX")"
trap 'rm -rf "$work"' EXIT
mkdir "$work/elsewhere"

find_python() { # VERSION -> the path of such an interpreter that runs, if there is one
    local candidate
    for candidate in "$(command -v "python$1" || true)" \
        "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/python \
        "$(command -v uv >/dev/null && uv python find "$1" 2>/dev/null || true)"; do
        if [ -x "$candidate" ] && [ "$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>&1)" = "$1" ]; then
            echo "$candidate"
            return
        fi
    done
}

targets=("$@")
if [ $# -eq 0 ]; then
    for version in 3.10 3.11 3.12 3.13; do
        python="$(find_python "$version")"
        if [ -z "$python" ]; then
            echo "skipped: there is no Python $version here"
        elif [ ${#targets[@]} -eq 0 ]; then
            targets+=("$python:2.8.0")
        else
            targets+=("$python")
        fi
    done
fi
[ ${#targets[@]} -gt 0 ] || { echo "error: no Python from 3.10 to 3.13 was found; name one" >&2; exit 1; }

try_commands() { # FOLDER of an environment
    local bin="$1/bin" run="$work/elsewhere/run"
    rm -rf "$run"
    cd "$work/elsewhere" &&
        "$bin/python" -m pip check &&
        "$bin/fdistill" --help &&
        "$bin/fdistill" configs >configs.txt && grep digits-t2i configs.txt &&
        "$bin/fdistill" distill digits iterations=2 --output "$run" &&
        "$bin/fdistill" generate "$run" --num-images 4 --output "$run/images" &&
        "$bin/fdistill" evaluate "$run/images" --reference digits --num-images 4 --metrics class_accuracy &&
        "$bin/python" -c "
import evaluation, fdistill, sys
for package in (fdistill, evaluation):
    assert package.__file__.startswith(sys.prefix), package.__file__"
}

try_package() { # PYTHON TORCH PACKAGE -> a row
    local environment="$work/environment" log="$work/log" torch="torch${2:+==$2}" outcome=works versions
    rm -rf "$environment"
    if ! { "$1" -m venv "$environment" &&
        "$environment/bin/python" -m pip install --quiet --disable-pip-version-check --no-cache-dir "$torch" "$3" &&
        (try_commands "$environment"); } >"$log" 2>&1; then
        outcome=fails
        failed=1
        tail -n 30 "$log" >&2
    fi
    versions="$("$environment/bin/python" -c "
import importlib.metadata as m, platform
print(platform.python_version(), *map(m.version, ('torch', 'diffusers', 'transformers')), sep=' | ')")" || versions="$1 | ${2:-newest} | |"
    echo "| $versions | ${3##*.} | $outcome, $(date +%F) |" | sed 's/| whl |/| wheel |/; s/| gz |/| sdist |/'
    rm -rf "$environment"
}

failed=0
echo "== building the wheel and the sdist"
"${targets[0]%%:*}" -m venv "$work/build"
"$work/build/bin/python" -m pip install --quiet --disable-pip-version-check "build>=1.2"
"$work/build/bin/python" -m build --outdir "$work/dist" "$checkout" >"$work/log" 2>&1 || { tail -n 30 "$work/log" >&2; exit 1; }
ls "$work/dist"
echo "| Python | torch | diffusers | transformers | package | outcome |"
echo "|---|---|---|---|---|---|"
for target in "${targets[@]}"; do
    torch="${target#*:}"
    [ "$torch" != "$target" ] || torch=""
    try_package "${target%%:*}" "$torch" "$work"/dist/*.whl
done
# Once is enough: pip makes a wheel of the sdist, so that nothing but the files in the sdist is tried here.
target="${targets[0]}"
torch="${target#*:}"
[ "$torch" != "$target" ] || torch=""
try_package "${target%%:*}" "$torch" "$work"/dist/*.tar.gz
exit "$failed"
