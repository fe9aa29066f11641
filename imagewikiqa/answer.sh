#!/usr/bin/env bash
# Table 5: every model on ImageWikiQA, then the table. Finished runs are skipped.
#   QUESTIONS=imagewikiqa.jsonl bash imagewikiqa/answer.sh
#   QUESTIONS=imagewikiqa.jsonl MODELS="llava-1.5-7b" GIVEN="image text text+name text+own" LIMIT=200 bash imagewikiqa/answer.sh
#   QUESTIONS=imagewikiqa.jsonl MODELS="llava-1.5-7b" ADAPTERS="outputs/training_analysis/RUN/best" bash imagewikiqa/answer.sh
# Settings: QUESTIONS (a file), MODELS, GIVEN (image), FORM (letters), ADAPTERS (fine-tuned weights of the models), LIMIT
# (questions), BATCH_SIZE, MORE (further options of answer.py), OUTPUTS, PYTHON. Images: imagenet in paths.toml. APIs run where
# MODELS names them.
set -euo pipefail
if [[ "${1:-}" =~ ^(-h|--help)$ ]]; then sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; exit 0; fi
cd "$(dirname "$0")/.."
source scripts/launcher.bash

read -ra FORM <<< "${FORM:-letters}"
read -ra GIVEN <<< "${GIVEN:-image}"
read -ra MORE <<< "${MORE:-}"
answer() { # a model, then further options
    run "$1" imagewikiqa/answer.py --model "$1" --questions "${QUESTIONS:?the file of questions}" --form "${FORM[@]}" \
        --given "${GIVEN[@]}" ${LIMIT:+--limit "$LIMIT"} ${BATCH_SIZE:+--batch-size "$BATCH_SIZE"} "${@:2}" "${MORE[@]}"
}
for model in ${MODELS:-$(registered models --kind vlm --paper)}; do
    answer "$model"
    for adapter in ${ADAPTERS:-}; do
        answer "$model" --adapter "$adapter"
    done
done
finish imagewikiqa/table.py
