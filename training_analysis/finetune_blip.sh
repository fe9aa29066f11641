#!/usr/bin/env bash
# Table 3, right, of BLIP-2: the Q-Former side on the train rows of every benchmark, and the answers to the test split.
#   bash training_analysis/finetune_blip.sh
#   BENCHMARKS="flowers" GPUS=4 bash training_analysis/finetune_blip.sh
# Settings: MODELS, BENCHMARKS, IMAGE_SIZE (364), EPOCHS (100, ImageNet 10), GPUS, BATCH_SIZE, ROWS (train images), LIMIT (test images), MORE
# (further options of finetune_vlm.py), WORDING (none: captions without a question, as in the reference code), OUTPUTS,
# PYTHON.
set -euo pipefail
if [[ "${1:-}" =~ ^(-h|--help)$ ]]; then sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; exit 0; fi
cd "$(dirname "$0")/.."
source scripts/launcher.bash
with_images
source training_analysis/finetune.bash

MODELS=${MODELS:-blip2-2.7b}
IMAGE_SIZE=${IMAGE_SIZE-364}
for benchmark in "${BENCHMARKS[@]}"; do
    case $benchmark in imagenet) epochs=10 ;; *) epochs=100 ;; esac
    for model in $MODELS; do
        EPOCHS=${EPOCHS:-$epochs} finetune "$model" "$benchmark" qformer --weight-decay 0.05 ${IMAGE_SIZE:+--image-size "$IMAGE_SIZE"} --augment
    done
done
finish training_analysis/table.py
