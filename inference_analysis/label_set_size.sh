#!/usr/bin/env bash
# Table 9, Figures 2 and 4: candidate lists of 2, 5, 20 and 100 names; then the tables. Finished runs are skipped.
#   bash inference_analysis/label_set_size.sh
#   MODELS="llava-1.5-7b clip-vit-l-336" BENCHMARKS="flowers" LIMIT=1000 bash inference_analysis/label_set_size.sh
# Settings: MODELS (of the APIs too), BENCHMARKS, SIZES (2 5 20 100; all is a size too), LIMIT (images), SPLIT,
# BATCH_SIZE, API_ARGS, OUTPUTS, PYTHON.
set -euo pipefail
if [[ "${1:-}" =~ ^(-h|--help)$ ]]; then sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; exit 0; fi
cd "$(dirname "$0")/.."
source scripts/launcher.bash

VLMS=(llava-1.5-7b blip2-2.7b)  # the rows of the paper's Table 9
CLIPS=(clip-vit-l-336)
[ -z "${MODELS:-}" ] || read -ra VLMS <<< "$(registered models --kind vlm)"
[ -z "${MODELS:-}" ] || read -ra CLIPS <<< "$(registered models --kind clip)"
read -ra APIS <<< "$(registered models --kind api)"
check_models "${VLMS[@]}" "${CLIPS[@]}" "${APIS[@]}"
with_images
read -ra SIZES <<< "${SIZES:-2 5 20 100}"

for benchmark in "${BENCHMARKS[@]}"; do
    for model in "${VLMS[@]}"; do
        ! is_selected "$model" || run "$model/$benchmark/sizes" main_results/classify_vlm.py --model "$model" \
            --benchmark "$benchmark" --candidates "${SIZES[@]}" "${COMMON[@]}"
    done
    for model in "${CLIPS[@]}"; do
        ! is_selected "$model" || run "$model/$benchmark/sizes" main_results/classify_clip.py --model "$model" \
            --benchmark "$benchmark" --candidates "${SIZES[@]}" "${COMMON[@]}"
    done
    [ -n "${MODELS:-}" ] || continue
    for model in "${APIS[@]}"; do
        ! is_selected "$model" || run "$model/$benchmark/sizes" main_results/classify_api.py --model "$model" \
            --benchmark "$benchmark" --candidates "${SIZES[@]}" "${API_COMMON[@]}"
    done
done
finish inference_analysis/table.py
