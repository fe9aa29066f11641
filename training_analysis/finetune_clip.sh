#!/usr/bin/env bash
# Table 3, right, of CLIP: features of both splits, the linear layer on them, and with FULL=1 the visual tower too (of the
# reference code); then the table.
#   bash training_analysis/finetune_clip.sh
#   MODELS="clip-vit-l-336" BENCHMARKS="flowers" FULL=1 bash training_analysis/finetune_clip.sh
# Settings: MODELS (clip-vit-l-336 eva-clip-g), BENCHMARKS, FULL, EPOCHS, ROWS (train images; default: all), LIMIT (test
# images), OUTPUTS, PYTHON.
set -euo pipefail
if [[ "${1:-}" =~ ^(-h|--help)$ ]]; then sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; exit 0; fi
cd "$(dirname "$0")/.."
source scripts/launcher.bash
with_images

features=$VLMCLASSIFIER_OUTPUTS/feature_analysis
for benchmark in "${BENCHMARKS[@]}"; do
    for model in ${MODELS:-clip-vit-l-336 eva-clip-g}; do
        name=$features/$model-$benchmark-features
        extract=(feature_analysis/extract_features.py --kind clip --model "$model" --benchmark "$benchmark")
        run "$model/$benchmark/train" "${extract[@]}" --split train ${ROWS:+--limit "$ROWS"} --out "$name-train"
        run "$model/$benchmark/test" "${extract[@]}" "${COMMON[@]}" --out "$name-test"
        for train in linear ${FULL:+full}; do
            run "$model/$benchmark/$train" training_analysis/finetune_clip.py --train "$train" --model "$model" \
                --benchmark "$benchmark" --features "$name-train" --test-features "$name-test" \
                ${EPOCHS:+--epochs "$EPOCHS"}
        done
    done
done
finish training_analysis/table.py
