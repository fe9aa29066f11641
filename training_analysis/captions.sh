#!/usr/bin/env bash
# Table 4: a caption with the class name for every train image, by an API or by a local model; the projector on them;
# captions of the test images (right where they contain the class name); then the table.
#   bash training_analysis/captions.sh
#   CAPTIONER="llava-1.5-7b" BENCHMARKS="flowers" bash training_analysis/captions.sh
# Settings: MODELS, BENCHMARKS (flowers cars caltech), CAPTIONER (gpt-4-turbo, or a VLM), CAPTION_ARGS (further options of
# make_captions.py: "--model-id ID --base-url URL"), EPOCHS (50), GPUS, BATCH_SIZE, ROWS (train images), LIMIT (test
# images), MORE (options of finetune_vlm.py), OUTPUTS, PYTHON.
set -euo pipefail
if [[ "${1:-}" =~ ^(-h|--help)$ ]]; then sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; exit 0; fi
cd "$(dirname "$0")/.."
BENCHMARKS=${BENCHMARKS:-flowers cars caltech}
source scripts/launcher.bash
with_images
source training_analysis/finetune.bash

MODELS=${MODELS:-llava-1.5-7b}
read -ra CAPTION_ARGS <<< "${CAPTION_ARGS:-}"
for benchmark in "${BENCHMARKS[@]}"; do
    captions=$home/$benchmark-captions.jsonl
    run "$benchmark/captions" training_analysis/make_captions.py --model "${CAPTIONER:-gpt-4-turbo}" \
        --benchmark "$benchmark" --out "$captions" ${ROWS:+--limit "$ROWS"} "${CAPTION_ARGS[@]}"
    [ -f "$captions" ] || continue
    for model in $MODELS; do
        NAME=captions WORDING= ANSWER_WORDING=caption finetune "$model" "$benchmark" projector --captions "$captions"
    done
done
finish training_analysis/table.py
