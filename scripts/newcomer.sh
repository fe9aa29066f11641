#!/usr/bin/env bash
# A new user's first day with images and models of their own, offline, at toy size: the README's commands one by one,
# with an interruption in between. CI runs it.
#   bash scripts/newcomer.sh
# Settings: WORK (folder for everything that is written; default: a temporary one, removed at the end), PYTHON.
set -euo pipefail
if [[ "${1:-}" =~ ^(-h|--help)$ ]]; then sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; exit 0; fi
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
python() { "$PYTHON" "$@"; }
if [ -z "${WORK:-}" ]; then
    WORK=$(mktemp -d)
    trap 'rm -rf "$WORK"' EXIT
fi
mkdir -p "$WORK"
export HF_HUB_OFFLINE=1 VLMCLASSIFIER_OUTPUTS=$WORK/outputs OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

echo "== images in a folder for each class, and two checkpoints in folders (here generated, and of random weights)"
python scripts/make_images.py --out "$WORK/pictures" --classes fox "sea lion" heron --count 20
python scripts/make_tiny_model.py --model llava-1.5-7b --out "$WORK/my_llava"
python scripts/make_tiny_model.py --model clip-vit-l-336 --out "$WORK/my_clip"
cp tests/data/chat_template.jinja "$WORK/my_llava/chat_template.jinja"  # every released checkpoint has one

echo "== a manifest, and Table 1 on it"
python scripts/prepare_data.py animals --folder "$WORK/pictures"
MODELS="$WORK/my_llava $WORK/my_clip" BENCHMARKS="$WORK/pictures/animals.jsonl" LIMIT=6 bash main_results/table1.sh
grep -q "| my_clip (miniature) " "$WORK/outputs/main_results/table1.md"

echo "== the notebook and the report"
"$(dirname "$PYTHON")/jupyter" execute main_results/plot.ipynb
[ -s "$WORK/outputs/main_results/table1.pdf" ]
python scripts/report.py --data-root "$WORK/pictures"
[ -s "$WORK/outputs/report/index.html" ]

echo "== a run that is interrupted with Ctrl-C, and goes on"
classify=(main_results/classify_vlm.py --model "$WORK/my_llava" --benchmark "$WORK/pictures/animals.jsonl" --batch-size 1)
set -m  # a process group of its own, which can be interrupted
"$PYTHON" "${classify[@]}" --out "$WORK/stopped" &
running=$!
until ls "$WORK"/stopped/part-*.jsonl > /dev/null 2>&1 && [ -s "$(ls "$WORK"/stopped/part-*.jsonl | head -n 1)" ]; do
    kill -0 "$running" || { echo "error: the run ended before it could be interrupted" >&2; exit 1; }
    sleep 0.01
done
kill -INT -- "-$running"
code=0
wait "$running" || code=$?
set +m
[ "$code" -eq 130 ] || { echo "error: the interrupted run ended with $code in place of 130" >&2; exit 1; }
python "${classify[@]}" --out "$WORK/stopped"
python "${classify[@]}" --out "$WORK/whole"
cmp "$WORK/stopped/predictions.jsonl" "$WORK/whole/predictions.jsonl"
echo "All of it works: the interrupted run has the bytes of the uninterrupted one."
