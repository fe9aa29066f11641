#!/usr/bin/env bash
# Section 4: the projector on ImageNet's train rows mixed with LLaVA's 665k instruction rows, one epoch; answers and table.
#   bash training_analysis/mixture.sh
#   BENCHMARKS="flowers" TEXTS=llava_v1_5_mix665k.json IMAGE_ROOT=llava_images bash training_analysis/mixture.sh
# Settings: MODELS, BENCHMARKS (imagenet), TEXTS (default: instruct in paths.toml, [texts]), IMAGE_ROOT (of its images),
# EPOCHS (1), GPUS, BATCH_SIZE, ROWS (train images), LIMIT (test images), MORE (options of finetune_vlm.py), OUTPUTS, PYTHON.
set -euo pipefail
if [[ "${1:-}" =~ ^(-h|--help)$ ]]; then sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; exit 0; fi
cd "$(dirname "$0")/.."
BENCHMARKS=${BENCHMARKS:-imagenet}
source scripts/launcher.bash
with_images
source training_analysis/finetune.bash

MODELS=${MODELS:-llava-1.5-7b}
TEXTS=${TEXTS:-$("$PYTHON" -c 'from vlmclassifier.paths import local_path; print(local_path("texts", "instruct") or "")')}
if [ -z "$TEXTS" ] || [ -z "${IMAGE_ROOT:-}" ]; then
    echo "error: TEXTS (a LLaVA file; or instruct in paths.toml, [texts]) and IMAGE_ROOT (the folder of its images) are needed" >&2
    exit 1
fi
for benchmark in "${BENCHMARKS[@]}"; do
    for model in $MODELS; do
        EPOCHS=${EPOCHS:-1} NAME=mixture finetune "$model" "$benchmark" projector --mix "$TEXTS" --image-root "$IMAGE_ROOT"
    done
done
finish training_analysis/table.py
