#!/usr/bin/env bash
# Check a GPU, offline: answers against the CPU, throughput and memory of LLaVA-1.5-7B's true architecture. JSON out.
#   bash scripts/gpu_check.sh
#   bash scripts/gpu_check.sh --batch-sizes 1 8 32 --out outputs/gpu_check.json
#   bash scripts/gpu_check.sh --smoke           the same steps on the CPU with a miniature
# Nothing is installed or downloaded: without .venv the `python` at hand is used (torch 2.11, transformers 5.17 or newer).
set -euo pipefail
if [[ "${1:-}" =~ ^(-h|--help)$ ]]; then sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; exit 0; fi
root=$(cd "$(dirname "$0")/.." && pwd)
PYTHON=${PYTHON:-$([ -x "$root/.venv/bin/python" ] && echo "$root/.venv/bin/python" || echo python)}
export HF_HUB_OFFLINE=1 PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
exec "$PYTHON" "$root/scripts/gpu_check.py" "$@"
