#!/usr/bin/env bash
# A new user's first hour: runs every command of docs/first-hour.md in a fresh clone, and says how long each takes.
#   bash scripts/newcomer.sh [FOLDER]     FOLDER for the clone; by default a temporary one, removed in the end
# The clone has what is committed, and an environment of its own.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
folder="${1:-}"
if [ -z "$folder" ]; then
    folder="$(mktemp -d)"
    trap 'rm -rf "$folder"' EXIT
fi
git clone --quiet "$here" "$folder/fdistill"
cd "$folder/fdistill"
export HF_HUB_OFFLINE=1
times=()
# Line by line, in this shell, so that `source` lasts; standard input stays free for the commands.
while IFS= read -r command <&3; do
    printf '\n\033[1m$ %s\033[0m\n' "$command"
    started=$SECONDS
    eval "$command"
    times+=("$(printf '%5d s  %s' $((SECONDS - started)) "$command")")
done 3< <(awk '/^```bash$/ {on = 1; next} /^```$/ {on = 0} on' docs/first-hour.md)
printf '\nseconds  command\n'
printf '%s\n' "${times[@]}"
