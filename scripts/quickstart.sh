#!/usr/bin/env bash
# Makes the environment if there is none, then distils the embedded digits teacher, generates, evaluates and reports:
# under five minutes on two CPU cores after installation.
#   bash scripts/quickstart.sh [KEY=VALUE ...]      for example divergence=forward-kl
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
export HF_HUB_OFFLINE=1
run="runs/quickstart-$(date +%Y%m%d-%H%M%S)"
started=$SECONDS
say() { printf '\n== %s\n   $ %s\n' "$1" "${*:2}"; "${@:2}"; }
say "distil the teacher into a student of one evaluation" \
    fdistill distill digits "$@" --output "$run"
say "1,797 images from the student: one evaluation each" \
    fdistill generate "$run" --num-images 1797 --seed 1 --output "$run/images/student"
say "1,797 images from the teacher: 35 evaluations each" \
    fdistill generate digits --num-images 1797 --seed 1 --steps 18 --output "$run/images/teacher"
say "score the student" \
    fdistill evaluate "$run/images/student" --reference digits --output "$run/scores/student.json"
say "score the teacher" \
    fdistill evaluate "$run/images/teacher" --reference digits --output "$run/scores/teacher.json"
say "report" \
    python scripts/quickstart_report.py "$run" --seconds $((SECONDS - started))
