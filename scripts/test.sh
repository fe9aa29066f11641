#!/usr/bin/env bash
# Set up, check the style, run the tests: offline, on the CPU. Arguments go to pytest: bash scripts/test.sh -k runs
# VLMCLASSIFIER_REALDATA=DIR adds the tests on real photographs (the four manifests and their pictures).
set -euo pipefail
if [[ "${1:-}" =~ ^(-h|--help)$ ]]; then sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; exit 0; fi
cd "$(dirname "$0")/.."
bash scripts/setup.sh
.venv/bin/ruff format --check .
.venv/bin/ruff check .
# Three processes of one thread each, on two cores: most tests start processes of their own and wait for them.
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
.venv/bin/python -m pytest --numprocesses 3 --dist loadfile "$@"
