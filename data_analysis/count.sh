#!/usr/bin/env bash
# Counts of the class names of all four benchmarks in LLaVA's training texts (paths.toml, [texts]), by our rules and by the
# reference's.
#   bash data_analysis/count.sh
#   TEXTS="pretrain=captions.json.gz" BENCHMARKS="imagenet" bash data_analysis/count.sh
# Settings: TEXTS (STAGE=FILE ...), BENCHMARKS, PROCESSES, OUTPUTS, PYTHON.
set -euo pipefail
if [[ "${1:-}" =~ ^(-h|--help)$ ]]; then sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; exit 0; fi
cd "$(dirname "$0")/.."
source scripts/launcher.bash

home=$VLMCLASSIFIER_OUTPUTS/data_analysis
read -ra TEXTS <<< "${TEXTS:-}"
count=(data_analysis/count_classes.py --benchmarks "${BENCHMARKS[@]}" ${TEXTS:+--texts "${TEXTS[@]}"}
    ${PROCESSES:+--processes "$PROCESSES"})
run "our rules" "${count[@]}" --out "$home"
mkdir -p "$home/reference"
ln -sfn ../tokens "$home/reference/tokens"  # the tokens are the same
run "the reference's rules" "${count[@]}" --reference-rules --out "$home/reference"
finish
