#!/usr/bin/env bash
# Does this repository reproduce the paper? For users with a GPU and the checkpoints (hub or paths.toml): the first 1,000
# test images of every cell of Table 1 that an open model fills, each compared with the published number.
#   bash scripts/verify_paper.sh
#   bash scripts/verify_paper.sh --model llava-1.5-7b --benchmark flowers caltech
# All arguments go to scripts/verify_paper.py (--help). Exit code 0: every cell agrees or does not fit.
set -euo pipefail
if [[ "${1:-}" =~ ^(-h|--help)$ ]]; then sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; exit 0; fi
root=$(cd "$(dirname "$0")/.." && pwd)
PYTHON=${PYTHON:-$([ -x "$root/.venv/bin/python" ] && echo "$root/.venv/bin/python" || echo python)}
exec "$PYTHON" "$root/scripts/verify_paper.py" "$@"
