#!/usr/bin/env bash
# Table 11 and Appendix B.6: every run of the main results, the ranking and the probes against the counts of count.sh (by
# our rules and by the reference's), with CLIP's accuracy as the reference, then the table.
#   bash data_analysis/count.sh && bash data_analysis/correlate.sh
#   BENCHMARKS="imagenet" RUNS="outputs/main_results/llava-1.5-7b-imagenet-open_world" bash data_analysis/correlate.sh
# Settings: RUNS (folders; default: all runs of the benchmarks), REFERENCE (a model of main_results, clip-vit-l-336),
# BENCHMARKS, OUTPUTS, PYTHON.
set -euo pipefail
if [[ "${1:-}" =~ ^(-h|--help)$ ]]; then sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; exit 0; fi
cd "$(dirname "$0")/.."
source scripts/launcher.bash

shopt -s nullglob
REFERENCE=${REFERENCE:-clip-vit-l-336}
for benchmark in "${BENCHMARKS[@]}"; do
    reference=$VLMCLASSIFIER_OUTPUTS/main_results/$REFERENCE-$benchmark-closed_world
    if [ -n "${RUNS:-}" ]; then
        read -ra folders <<< "$RUNS"
    else
        folders=("$VLMCLASSIFIER_OUTPUTS"/main_results/*-"$benchmark"{,-split_*}-{open_world,closed_world}
            "$VLMCLASSIFIER_OUTPUTS"/inference_analysis/*-"$benchmark"-ranking*
            "$VLMCLASSIFIER_OUTPUTS"/feature_analysis/*-"$benchmark"-probe-last_token)
    fi
    for counts in "$VLMCLASSIFIER_OUTPUTS"/data_analysis/{,reference/}"$benchmark".csv; do
        [ -f "$counts" ] || continue
        for folder in "${folders[@]}"; do
            given=(--reference "$reference")
            [ -d "$reference" ] && [ "$folder" != "$reference" ] || given=()
            run "$(basename "$folder")" data_analysis/correlate.py --frequency "$counts" --accuracy "$folder" \
                "${given[@]}"
        done
    done
done
finish data_analysis/table.py
