#!/usr/bin/env bash
# Distils the embedded text-to-image teacher, scores teacher and student, and draws them side by side: under ten minutes
# on two CPU cores after installation.
#   bash scripts/text_to_image.sh [KEY=VALUE ...]      for example iterations=400
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
export HF_HUB_OFFLINE=1
run="runs/digits-t2i-$(date +%Y%m%d-%H%M%S)"
started=$SECONDS
fdistill distill digits-t2i "$@" --output "$run"
seconds=$((SECONDS - started))
fdistill evaluate "$run" --protocol digits-t2i --output "$run/scores/student.json"
for guidance in 1 2; do
    fdistill evaluate digits-t2i --protocol digits-t2i --guidance-scale "$guidance" --output "$run/scores/teacher-$guidance.json"
done
python scripts/text_to_image_report.py "$run" --seconds "$seconds"
