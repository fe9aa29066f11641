#!/usr/bin/env bash
# Table 1: every model on every benchmark in the open and the closed world, then the table. Finished runs are skipped.
#   bash main_results/table1.sh
#   MODELS="llava-1.5-7b clip-vit-l-336" BENCHMARKS="flowers cars" LIMIT=1000 bash main_results/table1.sh
# Settings: MODELS (keys, hub ids, folders), BENCHMARKS (keys, manifests with CLASSES), WORLDS (open closed), LIMIT, SPLIT, BATCH_SIZE,
# DATA_ROOT (of image paths), SKIP_BROKEN_IMAGES, OUTPUTS, PYTHON;
# for APIs, which run where MODELS names them, API_ARGS ("--model-id ID --prices IN OUT").
set -euo pipefail
if [[ "${1:-}" =~ ^(-h|--help)$ ]]; then sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; exit 0; fi
cd "$(dirname "$0")/.."
source scripts/launcher.bash

filter=(--paper)
[ -z "${MODELS:-}" ] || filter=()  # models beside the paper's run where MODELS names them
read -ra VLMS <<< "$(registered models --kind vlm "${filter[@]}")"
read -ra CLIPS <<< "$(registered models --kind clip "${filter[@]}")"
read -ra APIS <<< "$(registered models --kind api)"
check_models "${VLMS[@]}" "${CLIPS[@]}" "${APIS[@]}"
WORLDS=${WORLDS:-open closed}
check_words WORLDS "$WORLDS" open closed
with_images

classify() { # vlm, clip or api, model, benchmark, candidates
    local common=("${COMMON[@]}")
    [ "$1" != api ] || common=("${API_COMMON[@]}")
    ! is_selected "$2" || run "$2/$3/$4" "main_results/classify_$1.py" --model "$2" --benchmark "$3" \
        --candidates "$4" "${common[@]}"
}

for benchmark in "${BENCHMARKS[@]}"; do
    read -ra ABLE <<< "$(registered models --kind clip --benchmark "$benchmark")"  # a supervised model knows ImageNet only
    for model in "${CLIPS[@]}"; do
        [[ " ${ABLE[*]} " != *" $model "* ]] || classify clip "$model" "$benchmark" all
    done
    for model in "${VLMS[@]}"; do
        [[ $WORLDS != *open* ]] || classify vlm "$model" "$benchmark" none
        # The 998 names of ImageNet exceed the context of the paper's models: such a cell becomes N/A.
        [[ $WORLDS != *closed* ]] || classify vlm "$model" "$benchmark" all
    done
    [ -n "${MODELS:-}" ] || continue
    for model in "${APIS[@]}"; do
        [[ $WORLDS != *open* ]] || classify api "$model" "$benchmark" none
        [[ $WORLDS != *closed* ]] || classify api "$model" "$benchmark" all
    done
done
finish main_results/table.py
