#!/usr/bin/env bash
# Table 3, right, of LLaVA: projector, and projector with LoRA, on the train rows of every benchmark; the answers of the
# fine-tuned models to the test split; then the table.
#   bash training_analysis/finetune_llava.sh
#   MODELS="llava-1.5-7b" BENCHMARKS="flowers" TRAIN="projector" bash training_analysis/finetune_llava.sh
# Settings: MODELS, BENCHMARKS, TRAIN (of: projector projector+lora), EPOCHS (50, ImageNet 1), GPUS (processes of accelerate
# launch), BATCH_SIZE (per process), ROWS (train images; default: all), LIMIT (test images), MORE (further options of
# finetune_vlm.py; as the paper: "--held-out 0 --evaluate-test --evaluated 1000000"), WORDING, OUTPUTS, PYTHON.
set -euo pipefail
if [[ "${1:-}" =~ ^(-h|--help)$ ]]; then sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; exit 0; fi
cd "$(dirname "$0")/.."
source scripts/launcher.bash
with_images
source training_analysis/finetune.bash

MODELS=${MODELS:-llava-1.5-7b}
for benchmark in "${BENCHMARKS[@]}"; do
    for model in $MODELS; do
        for train in ${TRAIN:-projector projector+lora}; do
            case $benchmark/$train/${TRAIN:-} in imagenet/projector+lora/) continue ;; esac  # the paper has no such run
            finetune "$model" "$benchmark" "$train"
        done
    done
done
finish training_analysis/table.py
