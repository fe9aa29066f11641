#!/usr/bin/env bash
# Set up, then run the whole study in small, from scratch, on two CPU cores: images, trainings, every section, findings.
#   bash scripts/quickstart.sh            bash scripts/quickstart.sh --seed 2 --seeds 3 --full
#   bash scripts/quickstart.sh --smoke    everything at toy size
#   ACTIVE=1 bash scripts/quickstart.sh   in the active conda or virtual environment instead of .venv
# All arguments go to scripts/study.py: python scripts/study.py --help lists them. What is done is not done again.
set -euo pipefail
if [[ "${1:-}" =~ ^(-h|--help)$ ]]; then sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; exit 0; fi
root=$(cd "$(dirname "$0")/.." && pwd)  # the user's folder stays: paths in the arguments start there
bash "$root/scripts/setup.sh"
environment=$(cd "$root" && source scripts/environment.bash && echo "$environment")
exec "$environment/bin/python" "$root/scripts/study.py" "$@"
