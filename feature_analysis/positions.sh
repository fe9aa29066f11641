#!/usr/bin/env bash
# Table 10: a probe on single tokens of the prompt, with the system sentence of LLaVA's own code, then the table.
#   bash feature_analysis/positions.sh
#   BENCHMARKS="caltech" TRAIN=500 LIMIT=500 bash feature_analysis/positions.sh
# Settings: MODELS, BENCHMARKS (flowers), LIMIT (test images), TRAIN (train images; default: all), SPLIT, POSITIONS,
# BATCH_SIZE, EPOCHS, OUTPUTS, PYTHON.
set -euo pipefail
if [[ "${1:-}" =~ ^(-h|--help)$ ]]; then sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; exit 0; fi
cd "$(dirname "$0")/.."
BENCHMARKS=${BENCHMARKS:-flowers}
source scripts/launcher.bash

ROWS=(llava-1.5-7b)
[ -z "${MODELS:-}" ] || read -ra ROWS <<< "$(registered models --kind vlm)"
check_models "${ROWS[@]}"
with_images
read -ra POSITIONS <<< "${POSITIONS:-0 100 200 300 400 500 600 -3 -2 -1}"
home=$VLMCLASSIFIER_OUTPUTS/feature_analysis

for benchmark in "${BENCHMARKS[@]}"; do
    for model in "${ROWS[@]}"; do
        is_selected "$model" || continue
        extract=(feature_analysis/extract_features.py --model "$model" --benchmark "$benchmark" --template llava-v1
            --positions "${POSITIONS[@]}" ${BATCH_SIZE:+--batch-size "$BATCH_SIZE"})
        run "$model/$benchmark/train" "${extract[@]}" --split train ${TRAIN:+--limit "$TRAIN"} \
            --out "$home/$model-$benchmark-positions-train"
        run "$model/$benchmark/test" "${extract[@]}" ${SPLIT:+--split "$SPLIT"} ${LIMIT:+--limit "$LIMIT"} \
            --out "$home/$model-$benchmark-positions-test"
        run "$model/$benchmark/probe" feature_analysis/probe.py --train "$home/$model-$benchmark-positions-train" \
            --test "$home/$model-$benchmark-positions-test" --features avg_token "${POSITIONS[@]/#/position_}" \
            --out "$home/$model-$benchmark-positions-probe" ${EPOCHS:+--epochs "$EPOCHS"}
    done
done
finish feature_analysis/table.py
