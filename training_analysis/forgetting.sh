#!/usr/bin/env bash
# What classification-only training destroys: projector against LoRA, learning rate x share of instruction rows, each asked
# trained and new questions about trained and new images.
#   bash training_analysis/forgetting.sh
#   MODELS="mini-llava" BENCHMARKS="plane_figures" WEIGHTS=outputs/plane_figures/seed-0/checkpoints/vlm TEXTS=... \
#       IMAGE_ROOT=outputs/plane_figures/seed-0/images bash training_analysis/forgetting.sh
# Settings: MODELS, BENCHMARKS (flowers), WEIGHTS, DATA_ROOT, TEXTS and IMAGE_ROOT (instruction rows in LLaVA's format),
# TRAIN ("projector projector+lora"), RATES (factors of the learning rates: "1 0.1"), SHARES (weights of TEXTS: "0 1"),
# STEPS (400), IMAGES (200), GPUS, BATCH_SIZE, MORE (options of finetune_vlm.py), OUTPUTS, PYTHON.
set -euo pipefail
if [[ "${1:-}" =~ ^(-h|--help)$ ]]; then sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; exit 0; fi
cd "$(dirname "$0")/.."
BENCHMARKS=${BENCHMARKS:-flowers}
source scripts/launcher.bash
source training_analysis/finetune.bash

MODELS=${MODELS:-llava-1.5-7b}
PROJECTOR_RATE=${PROJECTOR_RATE:-2e-5} LORA_RATE=${LORA_RATE:-2e-4}
for benchmark in "${BENCHMARKS[@]}"; do
    for model in $MODELS; do
        common=(--model "$model" --benchmark "$benchmark" ${WEIGHTS:+--weights "$WEIGHTS"}
            ${DATA_ROOT:+--data-root "$DATA_ROOT"})
        adapters=()
        for train in ${TRAIN:-projector projector+lora}; do
            for rate in ${RATES:-1 0.1}; do
                for share in ${SHARES:-0}; do
                    name=$home/forgetting-$model-$benchmark-$train-rate_$rate-share_$share
                    rates=($("$PYTHON" -c "print(float('$PROJECTOR_RATE') * $rate, float('$LORA_RATE') * $rate)"))
                    mix=()
                    [ "$share" = 0 ] || mix=(--mix "${TEXTS:?a LLaVA file}=$share" --image-root "${IMAGE_ROOT:?its images}")
                    start "$(basename "$name")" training_analysis/finetune_vlm.py "${common[@]}" --train "$train" \
                        --steps "${STEPS:-400}" --learning-rate "${rates[0]}" --lora-rate "${rates[1]}" --out "$name" \
                        ${BATCH_SIZE:+--batch-size "$BATCH_SIZE"} "${mix[@]}" "${MORE[@]}"
                    ! is_trained "$name" || adapters+=("$name/last")
                done
            done
        done
        run "$model/$benchmark/forgetting" training_analysis/forgetting.py "${common[@]}" --images "${IMAGES:-200}" \
            ${BATCH_SIZE:+--batch-size "$BATCH_SIZE"} --out "$home/forgetting-$model-$benchmark" --adapters "${adapters[@]}"
    done
done
finish
