#!/usr/bin/env bash
# Table 2, lower part, Figure 6: all names ranked by log-probability on the whole test set, and on images of the train
# split, where t of the guidance is chosen; then the tables. Finished runs are skipped.
#   bash inference_analysis/rank_labels.sh
#   MODELS="llava-1.5-7b" BENCHMARKS="flowers" LIMIT=1000 bash inference_analysis/rank_labels.sh
# Settings: MODELS, BENCHMARKS, LIMIT (images), TRAIN (images of the train split, 1000; 0: none), SPLIT, BATCH_SIZE,
# OUTPUTS, PYTHON.
set -euo pipefail
if [[ "${1:-}" =~ ^(-h|--help)$ ]]; then sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; exit 0; fi
cd "$(dirname "$0")/.."
source scripts/launcher.bash

VLMS=(llava-1.5-7b blip2-2.7b)  # the rows of the paper's Table 2
[ -z "${MODELS:-}" ] || read -ra VLMS <<< "$(registered models --kind vlm)"
check_models "${VLMS[@]}"
with_images
TRAIN=${TRAIN:-1000}

for benchmark in "${BENCHMARKS[@]}"; do
    for model in "${VLMS[@]}"; do
        is_selected "$model" || continue
        rank=(inference_analysis/rank_labels.py --model "$model" --benchmark "$benchmark")
        run "$model/$benchmark/ranking" "${rank[@]}" "${COMMON[@]}"
        [ "$TRAIN" -eq 0 ] || run "$model/$benchmark/train" "${rank[@]}" ${BATCH_SIZE:+--batch-size "$BATCH_SIZE"} \
            --split train --limit "$TRAIN"
    done
done
finish inference_analysis/table.py
