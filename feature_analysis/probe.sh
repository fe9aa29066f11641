#!/usr/bin/env bash
# Table 3, left: features of the train and the test split of every model, the paper's probes on them, then the table.
#   bash feature_analysis/probe.sh
#   MODELS="llava-1.5-7b clip-vit-l-336" BENCHMARKS="flowers" bash feature_analysis/probe.sh
# Settings: MODELS, BENCHMARKS, LIMIT (test images), TRAIN (train images; default: all), SPLIT, BATCH_SIZE, EPOCHS, METHODS
# (of probe.py: paper grid logistic neighbours centroid), OUTPUTS, PYTHON. LLaVA-1.5-7B is run with both of its prompt
# templates; the table says which one matches the paper.
set -euo pipefail
if [[ "${1:-}" =~ ^(-h|--help)$ ]]; then sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; exit 0; fi
cd "$(dirname "$0")/.."
source scripts/launcher.bash

ROWS=(llava-1.5-7b blip2-2.7b clip-vit-l-336 eva-clip-g)  # the rows of the paper's Table 3
[ -z "${MODELS:-}" ] || read -ra ROWS <<< "$(registered models --kind vlm) $(registered models --kind clip)"
check_models "${ROWS[@]}"
with_images
read -ra CLIPS <<< "$(registered models --kind clip)"
read -ra METHODS <<< "${METHODS:-paper}"
home=$VLMCLASSIFIER_OUTPUTS/feature_analysis

for benchmark in "${BENCHMARKS[@]}"; do
    for model in "${ROWS[@]}"; do
        is_selected "$model" || continue
        features=(last_token avg_token)
        [[ " ${CLIPS[*]} " != *" $model "* ]] || features=(image)
        templates=("")
        [ "$model" != llava-1.5-7b ] || templates=("" llava-v1)  # the paper does not say which one its probes read
        for template in "${templates[@]}"; do
            extract=(feature_analysis/extract_features.py --model "$model" --benchmark "$benchmark"
                ${template:+--template "$template"} ${BATCH_SIZE:+--batch-size "$BATCH_SIZE"})
            name=$model-$benchmark-features${template:+-$template}
            run "$name/train" "${extract[@]}" --split train ${TRAIN:+--limit "$TRAIN"} --out "$home/$name-train"
            run "$name/test" "${extract[@]}" ${SPLIT:+--split "$SPLIT"} ${LIMIT:+--limit "$LIMIT"} \
                --out "$home/$name-test"
            run "$name/probe" feature_analysis/probe.py --train "$home/$name-train" --test "$home/$name-test" \
                --features "${features[@]}" --method "${METHODS[@]}" ${EPOCHS:+--epochs "$EPOCHS"}
        done
    done
done
finish feature_analysis/table.py
