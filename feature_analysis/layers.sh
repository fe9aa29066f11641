#!/usr/bin/env bash
# The layer map: probes on the last token, the mean of all tokens and the mean of the image's tokens of every layer, of the
# trained model and of an untrained control (language model and projector at initialisation), then the table.
#   bash feature_analysis/layers.sh
#   MODELS="llava-1.5-7b" BENCHMARKS="flowers" METHOD=centroid bash feature_analysis/layers.sh
# Settings: MODELS, BENCHMARKS (flowers), LIMIT (test images), TRAIN (train images; default: all), SPLIT, METHOD (logistic,
# neighbours, centroid or paper), BATCH_SIZE, OUTPUTS, PYTHON.
set -euo pipefail
if [[ "${1:-}" =~ ^(-h|--help)$ ]]; then sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; exit 0; fi
cd "$(dirname "$0")/.."
BENCHMARKS=${BENCHMARKS:-flowers}
source scripts/launcher.bash

ROWS=(llava-1.5-7b blip2-2.7b)
[ -z "${MODELS:-}" ] || read -ra ROWS <<< "$(registered models --kind vlm)"
check_models "${ROWS[@]}"
with_images
home=$VLMCLASSIFIER_OUTPUTS/feature_analysis

for benchmark in "${BENCHMARKS[@]}"; do
    for model in "${ROWS[@]}"; do
        is_selected "$model" || continue
        for control in trained random; do
            extract=(feature_analysis/extract_features.py --model "$model" --benchmark "$benchmark" --layers all
                ${BATCH_SIZE:+--batch-size "$BATCH_SIZE"})
            [ $control = trained ] || extract+=(--control $control)
            name=$home/$model-$benchmark-layers-$control
            run "$model/$benchmark/$control/train" "${extract[@]}" --split train ${TRAIN:+--limit "$TRAIN"} \
                --out "$name-train"
            run "$model/$benchmark/$control/test" "${extract[@]}" ${SPLIT:+--split "$SPLIT"} \
                ${LIMIT:+--limit "$LIMIT"} --out "$name-test"
            run "$model/$benchmark/$control/probe" feature_analysis/probe.py --train "$name-train" --test "$name-test" \
                --features layers --method "${METHOD:-logistic}" --out "$name-probe"
        done
    done
done
finish feature_analysis/table.py
