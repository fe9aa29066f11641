#!/usr/bin/env bash
# Table 1: every model on every benchmark in the open and the closed world, then the table. Finished runs are skipped.
#   bash main_results/table1.sh
#   MODELS="llava-1.5-7b clip-vit-l-336" BENCHMARKS="flowers cars" LIMIT=1000 bash main_results/table1.sh
# Settings: MODELS, BENCHMARKS, WORLDS (of VLMs: open closed), LIMIT (pictures), SPLIT, BATCH_SIZE, OUTPUTS, PYTHON.
set -euo pipefail
if [[ "${1:-}" =~ ^(-h|--help)$ ]]; then sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; exit 0; fi
cd "$(dirname "$0")/.."

VLMS=(llava-1.5-7b llava-1.5-13b llava-next-vicuna-7b llava-next-mistral-7b blip2-2.7b instructblip-7b instructblip-13b)
# Not in the paper: run where MODELS names them, each by its key.
[ -z "${MODELS:-}" ] || VLMS+=(qwen2.5-vl-7b qwen3-vl-8b internvl3-8b llava-onevision-7b smolvlm2-2.2b paligemma2-3b
    gemma3-4b idefics3-8b pixtral-12b)
CLIPS=(clip-vit-l-336 eva-clip-g)
SUPERVISED=vit-b-16  # ImageNet only, where MODELS names it
for model in ${MODELS:-}; do
    [[ " ${VLMS[*]} ${CLIPS[*]} $SUPERVISED " == *" $model "* ]] && continue
    echo "error: MODELS: $model is none of ${VLMS[*]} ${CLIPS[*]} $SUPERVISED; classify_vlm.py takes others" >&2
    exit 1
done
read -ra BENCHMARKS <<< "${BENCHMARKS:-imagenet flowers cars caltech}"
WORLDS=${WORLDS:-open closed}
export VLMCLASSIFIER_OUTPUTS=${OUTPUTS:-${VLMCLASSIFIER_OUTPUTS:-outputs}}
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
COMMON=(${LIMIT:+--limit "$LIMIT"} ${SPLIT:+--split "$SPLIT"} ${BATCH_SIZE:+--batch-size "$BATCH_SIZE"})

failed=()
run() { # script, model, benchmark, candidates
    [ -z "${MODELS:-}" ] || [[ " $MODELS " == *" $2 "* ]] || return 0
    local code=0
    "$PYTHON" "main_results/classify_$1.py" --model "$2" --benchmark "$3" --candidates "$4" \
        "${COMMON[@]}" || code=$?
    case $code in
        0) ;;
        3) echo "N/A: $2 on $3 with candidates $4 (does not fit the model's context)" ;;
        130) exit 130 ;;
        *) failed+=("$2/$3/$4") ;;
    esac
}

for benchmark in "${BENCHMARKS[@]}"; do
    [[ -z "${MODELS:-}" || $benchmark != imagenet ]] || run clip "$SUPERVISED" imagenet all
    for model in "${CLIPS[@]}"; do
        run clip "$model" "$benchmark" all
    done
    for model in "${VLMS[@]}"; do
        [[ $WORLDS != *open* ]] || run vlm "$model" "$benchmark" none
        # The 998 names of ImageNet exceed the context of every model here: N/A in the paper too.
        [[ $WORLDS != *closed* || $benchmark = imagenet ]] || run vlm "$model" "$benchmark" all
    done
done

"$PYTHON" main_results/table.py
if [ ${#failed[@]} -gt 0 ]; then
    echo "error: ${#failed[@]} runs failed (${failed[*]}): see above, mend, and run the same command again." >&2
    exit 1
fi
