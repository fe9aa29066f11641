#!/usr/bin/env bash
# Set up and run the main job end to end with miniature models: pictures -> answers -> Table 1, in about 10 minutes.
#   bash scripts/quickstart.sh           bash scripts/quickstart.sh --smoke   (3 pictures per benchmark, open world)
# The pictures are the photographs of VLMCLASSIFIER_REALDATA (a folder with the manifests of the four benchmarks) where it
# is set, generated ones otherwise. The models are random: the numbers only show that the whole path works.
set -euo pipefail
if [[ "${1:-}" =~ ^(-h|--help)$ ]]; then sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; exit 0; fi
cd "$(dirname "$0")/.."

case "${1:-}" in
    "") narrow=() ;;
    --smoke) narrow=(LIMIT=3 WORLDS=open) ;;
    *) echo "usage: bash scripts/quickstart.sh [--smoke]" >&2; exit 2 ;;
esac

bash scripts/setup.sh
python=.venv/bin/python
models="llava-1.5-7b blip2-2.7b clip-vit-l-336"

if [ -n "${VLMCLASSIFIER_REALDATA:-}" ]; then
    out=outputs/quickstart/photographs
    pictures=$(cd "$VLMCLASSIFIER_REALDATA" && pwd)
else
    out=outputs/quickstart/generated
    pictures=$PWD/$out/pictures
    [ -f "$pictures/caltech.jsonl" ] || $python scripts/make_pictures.py --out "$pictures"
fi

# One paths.toml names the miniatures and the pictures, just as a user's names real checkpoints and benchmarks.
mkdir -p "$out"
echo "[models]" > "$out/paths.toml"
for model in $models; do
    weights=$PWD/outputs/quickstart/checkpoints/$model
    [ -d "$weights" ] || $python scripts/make_tiny_model.py --model "$model" --out "$weights"
    echo "'$model' = '$weights'" >> "$out/paths.toml"
done
echo "[benchmarks]" >> "$out/paths.toml"
for benchmark in imagenet flowers cars caltech; do
    echo "$benchmark = '$pictures'" >> "$out/paths.toml"
done

# The picture that the README's three lines of Python open.
first=$($python -c "import json; print(json.loads(open('$pictures/flowers.jsonl').readline())['image'])")
cp -f "$pictures/$first" outputs/quickstart/picture.jpg

env "${narrow[@]}" PYTHON="$python" VLMCLASSIFIER_PATHS="$out/paths.toml" MODELS="$models" SPLIT=all OUTPUTS="$out" \
    bash main_results/table1.sh
echo "Next: name your checkpoints and pictures in paths.toml and run bash main_results/table1.sh"
