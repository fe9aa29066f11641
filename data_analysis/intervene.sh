#!/usr/bin/env bash
# Does frequency cause accuracy? 15 mini VLMs with designed naming frequencies, on a small study that scripts/study.py has
# run (about 20 minutes of two cores).
#   bash data_analysis/intervene.sh
#   SEED=3 bash data_analysis/intervene.sh
# Settings: SEED (0), OUTPUTS, PYTHON.
set -euo pipefail
if [[ "${1:-}" =~ ^(-h|--help)$ ]]; then sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; exit 0; fi
cd "$(dirname "$0")/.."
source scripts/launcher.bash

SEED=${SEED:-0}
run "seed $SEED" data_analysis/intervene.py --root "$VLMCLASSIFIER_OUTPUTS/plane_figures/seed-$SEED" --seed "$SEED"
finish
