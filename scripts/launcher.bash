# Sourced by the sections' launchers, which are lists of runs: the settings they share, `registered`, which asks the
# registry for keys, `run`, which remembers a failure and lets the others go on, and `finish`, which prints the table and
# says what failed.
if [ $# -gt 0 ]; then
    echo "error: $0 takes no arguments ($*), only settings: bash $0 --help lists them" >&2
    exit 1
fi
case "${OUTPUTS:-/}" in /*) ;; *) OUTPUTS=$OLDPWD/$OUTPUTS ;; esac  # it starts in the user's folder
export VLMCLASSIFIER_OUTPUTS=${OUTPUTS:-${VLMCLASSIFIER_OUTPUTS:-outputs}}
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}

registered() { # which registry, then filters: models --kind vlm --paper
    local also=()
    [ "$1" != models ] || [ -z "${MODELS:-}" ] || also=(--also $MODELS)
    "$PYTHON" scripts/list_registry.py --keys "$@" "${also[@]}"
}

given() { # -d or -f, a setting: its folders or files start in the user's folder, which the launcher has left
    local item items=()
    for item in $2; do
        if [[ $item != /* ]] && test "$1" "$OLDPWD/$item"; then items+=("$OLDPWD/$item"); else items+=("$item"); fi
    done
    echo "${items[*]}"
}

[ -z "${MODELS:-}" ] || MODELS=$(given -d "$MODELS")
[ -z "${BENCHMARKS:-}" ] || BENCHMARKS=$(given -f "$BENCHMARKS")
[ -z "${CLASSES:-}" ] || CLASSES=$(given -f "$CLASSES")
[ -z "${DATA_ROOT:-}" ] || DATA_ROOT=$(given -d "$DATA_ROOT")
for setting in LIMIT ROWS BATCH_SIZE EPOCHS; do
    value=${!setting:-}
    [[ $value =~ ^[0-9]*$ ]] && [ "$setting/$value" != LIMIT/0 ] ||
        { echo "error: $setting=$value is no whole number from 1 on" >&2; exit 1; }
done
case "${SPLIT:-all}" in all|train|valid|test) ;; *) echo "error: SPLIT=$SPLIT is none of train valid test all" >&2; exit 1 ;; esac
OWN=(${CLASSES:+--classes "$CLASSES"} ${DATA_ROOT:+--data-root "$DATA_ROOT"}
    ${SKIP_BROKEN_IMAGES:+--skip-broken-images})  # for every script that reads images
read -ra BENCHMARKS <<< "${BENCHMARKS:-$(registered benchmarks --paper)}"
COMMON=("${OWN[@]}" ${LIMIT:+--limit "$LIMIT"} ${SPLIT:+--split "$SPLIT"} ${BATCH_SIZE:+--batch-size "$BATCH_SIZE"})
# APIs cost money: they run where MODELS names them. The ids of the paper's are retired: API_ARGS="--model-id ID" names
# another, --base-url another server, --prices what it costs.
read -ra API_ARGS <<< "${API_ARGS:-}"
API_COMMON=("${OWN[@]}" ${LIMIT:+--limit "$LIMIT"} ${SPLIT:+--split "$SPLIT"} "${API_ARGS[@]}")
failed=()

with_images() { # leaves the benchmarks whose images are here; the others are reported once, now
    local found
    found=$(registered data --benchmarks "${BENCHMARKS[@]}" ${CLASSES:+--classes "$CLASSES"} \
        ${DATA_ROOT:+--data-root "$DATA_ROOT"}) || exit 1
    read -ra BENCHMARKS <<< "$found"
}

check_words() { # the name of a setting, its value, the words that it may have
    local name=$1 value=$2 word
    shift 2
    for word in $value; do
        [[ " $* " == *" $word "* ]] && continue
        echo "error: $name: $word is none of $*" >&2
        exit 1
    done
}

check_models() { # the launcher's models: those that MODELS names must be among them
    local model
    for model in ${MODELS:-}; do
        [[ " $* " == *" $model "* ]] && continue
        if [[ $model == */* && ! -d $model ]]; then
            echo "error: MODELS: $model is no folder, and no hub id of a model that this launcher runs" >&2
        elif [ -d "$model" ]; then
            echo "error: MODELS: $model is of a kind that this launcher does not run" >&2
        else
            echo "error: MODELS: $model is none of $* (names are separated by spaces; a folder or hub id may stand for one)" >&2
        fi
        exit 1
    done
}

is_selected() { # a model
    [ -z "${MODELS:-}" ] || [[ " $MODELS " == *" $1 "* ]]
}

run() { # a name for the message, then a script with its arguments
    local name=$1 code=0
    shift
    "$PYTHON" "$@" || code=$?
    case $code in
        0) ;;
        3) echo "N/A: of $name what does not fit the model's context" ;;
        130) exit 130 ;;
        *) failed+=("$name") ;;
    esac
}

finish() { # the script of the table, where there is one
    [ $# -eq 0 ] || "$PYTHON" "$1"
    if [ ${#failed[@]} -gt 0 ]; then
        echo "error: ${#failed[@]} runs failed (${failed[*]}): see above, fix them, and run the same command again." >&2
        exit 1
    fi
}
