#!/usr/bin/env bash
# Set up, then run the whole study in small, from scratch, on two CPU cores: pictures, trainings, every section, findings.
#   bash scripts/quickstart.sh            bash scripts/quickstart.sh --seed 2 --seeds 3 --full
#   bash scripts/quickstart.sh --smoke    everything at toy size
# All arguments go to scripts/study.py (--help there); what is done already is not done again.
set -euo pipefail
if [[ "${1:-}" =~ ^(-h|--help)$ ]]; then sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; exit 0; fi
cd "$(dirname "$0")/.."
bash scripts/setup.sh
exec .venv/bin/python scripts/study.py "$@"
