# Sourced by the sections' launchers, which are lists of runs: the settings they share, `registered`, which asks the
# registry for keys, `run`, which remembers a failure and lets the others go on, and `finish`, which prints the table and
# says what failed.
export VLMCLASSIFIER_OUTPUTS=${OUTPUTS:-${VLMCLASSIFIER_OUTPUTS:-outputs}}
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}

registered() { # which registry, then filters: models --kind vlm --paper
    local also=()
    [ "$1" != models ] || [ -z "${MODELS:-}" ] || also=(--also $MODELS)
    "$PYTHON" scripts/list_registry.py --keys "$@" "${also[@]}"
}

given() { # paths in a setting start in the user's folder, which the launcher has left
    local item items=()
    for item in $1; do
        if [[ $item != /* && -e $OLDPWD/$item ]]; then items+=("$OLDPWD/$item"); else items+=("$item"); fi
    done
    echo "${items[*]}"
}

[ -z "${MODELS:-}" ] || MODELS=$(given "$MODELS")
[ -z "${BENCHMARKS:-}" ] || BENCHMARKS=$(given "$BENCHMARKS")
[ -z "${CLASSES:-}" ] || CLASSES=$(given "$CLASSES")
read -ra BENCHMARKS <<< "${BENCHMARKS:-$(registered benchmarks --paper)}"
COMMON=(${CLASSES:+--classes "$CLASSES"} ${LIMIT:+--limit "$LIMIT"} ${SPLIT:+--split "$SPLIT"} ${BATCH_SIZE:+--batch-size "$BATCH_SIZE"})
# APIs cost money: they run where MODELS names them. The ids of the paper's are retired: API_ARGS="--model-id ID" names
# another, --base-url another server, --prices what it costs.
read -ra API_ARGS <<< "${API_ARGS:-}"
API_COMMON=(${CLASSES:+--classes "$CLASSES"} ${LIMIT:+--limit "$LIMIT"} ${SPLIT:+--split "$SPLIT"} "${API_ARGS[@]}")
failed=()

with_images() { # leaves the benchmarks whose images are here; the others are reported once, now
    local found
    found=$(registered data --benchmarks "${BENCHMARKS[@]}" ${CLASSES:+--classes "$CLASSES"}) || exit 1
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
        echo "error: MODELS: $model is none of $*; the scripts themselves take any other" >&2
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
