#!/usr/bin/env bash
# Table 13: general benchmarks from a folder with their official files, before and after fine-tuning, then the table.
#   SOURCES=vqa bash imagewikiqa/others.sh
#   SOURCES=vqa MODELS="llava-1.5-7b" ADAPTERS="outputs/training_analysis/RUN/best" TASKS="textvqa pope_popular" bash imagewikiqa/others.sh
# SOURCES holds textvqa.json, textvqa_ocr.json, pope_popular.json, pope_adversarial.json, ai2d/, docvqa.json, mmvet.json, and the
# images of each in a folder of its name (textvqa/, pope/, ai2d/, docvqa/, mmvet/).
# Settings: SOURCES, MODELS (llava-1.5-7b), ADAPTERS, TASKS, JUDGE (of MM-Vet, an API model), LIMIT (questions), BATCH_SIZE, MORE
# (further options of other_benchmarks.py), OUTPUTS, PYTHON.
set -euo pipefail
if [[ "${1:-}" =~ ^(-h|--help)$ ]]; then sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; exit 0; fi
cd "$(dirname "$0")/.."
source scripts/launcher.bash

read -ra MORE <<< "${MORE:-}"
sources=${SOURCES:?the folder of the official files}
ask() { # a model, a task, then further options
    local source=$sources/$2.json images=$sources/${2%%_*} options=()
    [ "$2" != ai2d ] || source=$sources/ai2d
    [ "$2" != textvqa ] || options=(--ocr "$sources/textvqa_ocr.json")
    [ "$2" != mmvet ] || options=(${JUDGE:+--judge "$JUDGE"})
    run "$1/$2" imagewikiqa/other_benchmarks.py --model "$1" --benchmark "$2" --source "$source" --image-root "$images" \
        ${LIMIT:+--limit "$LIMIT"} ${BATCH_SIZE:+--batch-size "$BATCH_SIZE"} "${options[@]}" "${@:3}" "${MORE[@]}"
}
for model in ${MODELS:-llava-1.5-7b}; do
    for task in ${TASKS:-textvqa pope_popular pope_adversarial ai2d docvqa mmvet}; do
        ask "$model" "$task"
        for adapter in ${ADAPTERS:-}; do
            ask "$model" "$task" --adapter "$adapter"
        done
    done
done
finish imagewikiqa/table.py
