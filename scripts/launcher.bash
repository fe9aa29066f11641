# Sourced by the sections' launchers, which are lists of runs: the settings they share, `run`, which remembers a failure
# and lets the others go on, and `finish`, which prints the table and says what failed.
export VLMCLASSIFIER_OUTPUTS=${OUTPUTS:-${VLMCLASSIFIER_OUTPUTS:-outputs}}
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
read -ra BENCHMARKS <<< "${BENCHMARKS:-imagenet flowers cars caltech}"
COMMON=(${LIMIT:+--limit "$LIMIT"} ${SPLIT:+--split "$SPLIT"} ${BATCH_SIZE:+--batch-size "$BATCH_SIZE"})
PAPERS=(llava-1.5-7b llava-1.5-13b llava-next-vicuna-7b llava-next-mistral-7b blip2-2.7b instructblip-7b instructblip-13b)
TODAYS=(qwen2.5-vl-7b qwen3-vl-8b internvl3-8b llava-onevision-7b smolvlm2-2.2b paligemma2-3b gemma3-4b idefics3-8b
    pixtral-12b)
APIS=(gpt-4-turbo gemini-pro-vision claude-3-opus)  # the paper's: they cost money and run where MODELS names them
# Their ids are retired: API_ARGS="--model-id ID" names another, --base-url another server, --prices what it costs.
read -ra API_ARGS <<< "${API_ARGS:-}"
API_COMMON=(${LIMIT:+--limit "$LIMIT"} ${SPLIT:+--split "$SPLIT"} "${API_ARGS[@]}")
failed=()

known() { # the launcher's models: those that MODELS names must be among them
    local model
    for model in ${MODELS:-}; do
        [[ " $* " == *" $model "* ]] && continue
        echo "error: MODELS: $model is none of $*; the scripts themselves take any other" >&2
        exit 1
    done
}

wanted() { # a model
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

finish() { # the script of the table
    "$PYTHON" "$1"
    if [ ${#failed[@]} -gt 0 ]; then
        echo "error: ${#failed[@]} runs failed (${failed[*]}): see above, mend, and run the same command again." >&2
        exit 1
    fi
}
