# Sourced by the other scripts: makes .venv once, installs the package with its development tools, and activates it.
# Needs python3 (3.10 or newer) with venv; no root. PYTHON=python3.12 picks another interpreter.
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
python="${PYTHON:-python3}"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "error: $python is $("$python" --version 2>&1); Python 3.10 or newer is needed (set PYTHON to one)" >&2
    exit 1
}
# A new environment or a changed pyproject.toml means an install; otherwise this takes no time.
stamp=".venv/.installed"
if [ ! -f "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then
    if [ ! -x .venv/bin/pip ]; then
        echo "== making .venv with $("$python" --version)"
        "$python" -m venv --clear .venv || {
            rm -rf .venv
            echo "error: $python cannot make virtual environments; install its venv module (Debian: python3-venv)" >&2
            exit 1
        }
    fi
    echo "== installing fdistill and its dependencies into .venv (torch is several GB; about two minutes)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
    touch "$stamp"
fi
# shellcheck disable=SC1091
source .venv/bin/activate
