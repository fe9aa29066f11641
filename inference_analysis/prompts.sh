#!/usr/bin/env bash
# Table 2, upper part, and Table 12: wordings, order of the candidates, chain of thought; then the tables. Finished runs
# are skipped. APIs run where MODELS names them.
#   bash inference_analysis/prompts.sh
#   MODELS="llava-1.5-7b" BENCHMARKS="flowers caltech" LIMIT=1000 bash inference_analysis/prompts.sh
#   MODELS="gpt-4-turbo" API_ARGS="--model-id gpt-4.1" LIMIT=100 bash inference_analysis/prompts.sh
# Settings: MODELS, BENCHMARKS, LIMIT (images), SPLIT, BATCH_SIZE, API_ARGS, OUTPUTS, PYTHON.
set -euo pipefail
if [[ "${1:-}" =~ ^(-h|--help)$ ]]; then sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; exit 0; fi
cd "$(dirname "$0")/.."
source scripts/launcher.bash

VLMS=(llava-1.5-7b blip2-2.7b)  # the rows of the paper's Table 2
[ -z "${MODELS:-}" ] || read -ra VLMS <<< "$(registered models --kind vlm)"
read -ra APIS <<< "$(registered models --kind api)"
read -ra WORDINGS <<< "$(registered wordings)"
check_models "${VLMS[@]}" "${APIS[@]}"
with_images

for benchmark in "${BENCHMARKS[@]}"; do
    for model in "${VLMS[@]}"; do
        is_selected "$model" || continue
        classify=(main_results/classify_vlm.py --model "$model" --benchmark "$benchmark" "${COMMON[@]}")
        run "$model/$benchmark/wordings" "${classify[@]}" --wording "${WORDINGS[@]}"
        run "$model/$benchmark/orders" "${classify[@]}" --candidates all --order random fixed
        run "$model/$benchmark/thought" "${classify[@]}" --candidates all --chain-of-thought
    done
    [ -n "${MODELS:-}" ] || continue
    for model in "${APIS[@]}"; do
        is_selected "$model" || continue
        classify=(main_results/classify_api.py --model "$model" --benchmark "$benchmark" "${API_COMMON[@]}")
        run "$model/$benchmark/wordings" "${classify[@]}" --wording "${WORDINGS[@]}"
        run "$model/$benchmark/orders" "${classify[@]}" --candidates all --order random fixed
        run "$model/$benchmark/thought" "${classify[@]}" --candidates all --chain-of-thought
    done
done
finish inference_analysis/table.py
