#!/usr/bin/env bash
# Calibration (beyond the paper): the scores of all names by a VLM's ranking and by CLIP, on the whole test set and on
# images of the train split, where the temperature is chosen; then the tables. Finished runs are skipped.
#   bash inference_analysis/calibrate.sh
#   MODELS="llava-1.5-7b clip-vit-l-336" BENCHMARKS="flowers" LIMIT=1000 bash inference_analysis/calibrate.sh
# Settings: MODELS, BENCHMARKS, LIMIT (images), TRAIN (images of the train split, 1000), SPLIT, BATCH_SIZE, OUTPUTS,
# PYTHON.
set -euo pipefail
if [[ "${1:-}" =~ ^(-h|--help)$ ]]; then sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; exit 0; fi
cd "$(dirname "$0")/.."
source scripts/launcher.bash

VLMS=(llava-1.5-7b blip2-2.7b)
CLIPS=(clip-vit-l-336)
[ -z "${MODELS:-}" ] || { read -ra VLMS <<< "$(registered models --kind vlm)"; read -ra CLIPS <<< "$(registered models --kind clip)"; }
check_models "${VLMS[@]}" "${CLIPS[@]}"
with_images
ON_TRAIN=(${BATCH_SIZE:+--batch-size "$BATCH_SIZE"} --split train --limit "${TRAIN:-1000}")

for benchmark in "${BENCHMARKS[@]}"; do
    for model in "${VLMS[@]}" "${CLIPS[@]}"; do
        is_selected "$model" || continue
        if [[ " ${CLIPS[*]} " == *" $model "* ]]; then
            scores=(main_results/classify_clip.py --save-scores --model "$model" --benchmark "$benchmark")
        else
            scores=(inference_analysis/rank_labels.py --model "$model" --benchmark "$benchmark")
        fi
        run "$model/$benchmark/scores" "${scores[@]}" "${COMMON[@]}"
        run "$model/$benchmark/train" "${scores[@]}" "${ON_TRAIN[@]}"
    done
done
finish inference_analysis/calibrate.py
