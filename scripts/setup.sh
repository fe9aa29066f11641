#!/usr/bin/env bash
# Make .venv with the pinned versions of constraints.txt: about 3 minutes and 6.5 GB. A second call returns at once.
#   bash scripts/setup.sh              PYTHON=python3.12 bash scripts/setup.sh
#   ACTIVE=1 bash scripts/setup.sh     installs into the active conda or virtual environment instead
set -euo pipefail
if [[ "${1:-}" =~ ^(-h|--help)$ ]]; then sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; exit 0; fi
cd "$(dirname "$0")/.."
source scripts/environment.bash

stamp=$environment/vlmclassifier-installed
want="$PWD $(cat pyproject.toml constraints.txt scripts/setup.sh | cksum)"
if [ -x "$environment/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$want" ]; then
    exit 0
fi

if [ -n "${ACTIVE:-}" ]; then
    "$environment/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        { echo "error: the active environment $environment has no Python 3.11 or newer: make another one" >&2; exit 1; }
else
    [ -z "$active" ] || [ "$active" -ef .venv ] ||
        echo "The environment $active is active and stays as it is; ACTIVE=1 installs into it instead of .venv."
    for python in ${PYTHON:-} python3 python3.13 python3.12 python3.11 ""; do
        if [ -z "$python" ]; then
            echo "error: no Python 3.11 or newer found: install one, or name it: PYTHON=... bash scripts/setup.sh" >&2
            exit 1
        fi
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
    done
    .venv/bin/python -c '' 2>/dev/null || "$python" -m venv --clear .venv  # a working one is brought up to date
fi
echo "Setting up $environment with $("$environment/bin/python" --version): about 3 minutes, 6.5 GB"
"$environment/bin/python" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
echo "$want" > "$stamp"
[ -n "${ACTIVE:-}" ] || echo "Ready: source .venv/bin/activate"
