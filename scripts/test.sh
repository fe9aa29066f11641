#!/usr/bin/env bash
# Set up, check the style, run the tests: offline, on the CPU. Arguments go to pytest: bash scripts/test.sh -k runs
# Leaves out the tests marked slow (kills, several processes, whole trainings); SLOW=1 bash scripts/test.sh runs all.
# VLMCLASSIFIER_REALDATA=DIR adds the tests on real images (the four manifests and their images).
set -euo pipefail
if [[ "${1:-}" =~ ^(-h|--help)$ ]]; then sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; exit 0; fi
cd "$(dirname "$0")/.."
bash scripts/setup.sh
source scripts/environment.bash
"$environment/bin/ruff" format --check .
"$environment/bin/ruff" check .
# Processes of one thread each: the tests' own, and those of scripts, which tests/warm_server.py forks.
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
selection=(-m "not slow")
[ -z "${SLOW:-}" ] || selection=()
"$environment/bin/python" -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder "${selection[@]}" "$@"
[ -n "${SLOW:-}" ] || echo "Left out: the tests marked slow. SLOW=1 bash scripts/test.sh runs all of them."
