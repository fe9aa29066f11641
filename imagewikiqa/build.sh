#!/usr/bin/env bash
# Build knowledge questions about the images of a benchmark, from Wikipedia or from texts of your own.
#   CONTACT=me@example.org MODEL=openai/gpt-4.1 bash imagewikiqa/build.sh
#   BENCHMARKS=flowers ARTICLES=articles/ MODEL=Qwen/Qwen3-8B MORE="--base-url http://localhost:8000/v1" bash imagewikiqa/build.sh
# Settings: BENCHMARKS (imagenet), MODEL (gpt-4-turbo), ARTICLES (wikipedia), CONTACT (which Wikipedia asks for), MORE (further
# options of build_questions.py, such as --dry-run), OUTPUTS, PYTHON.
set -euo pipefail
if [[ "${1:-}" =~ ^(-h|--help)$ ]]; then sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; exit 0; fi
cd "$(dirname "$0")/.."
BENCHMARKS=${BENCHMARKS:-imagenet}
source scripts/launcher.bash

read -ra MORE <<< "${MORE:-}"
for benchmark in "${BENCHMARKS[@]}"; do
    run "$benchmark" imagewikiqa/build_questions.py --benchmark "$benchmark" --articles "${ARTICLES:-wikipedia}" \
        --contact "${CONTACT:-}" --model "${MODEL:-gpt-4-turbo}" "${MORE[@]}"
done
finish
