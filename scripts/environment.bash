# Sourced by setup.sh, quickstart.sh and test.sh in the project's folder: `environment`, whose python runs everything.
# It is .venv; with ACTIVE=1 the conda or virtual environment that is active.
environment=$PWD/.venv
active=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
if [ -n "${ACTIVE:-}" ]; then
    if [ -z "$active" ]; then
        echo "error: ACTIVE=1, but no environment is active: activate one, or leave ACTIVE out" >&2
        exit 1
    fi
    environment=$active
fi
