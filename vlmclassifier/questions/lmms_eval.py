"""Tasks for lmms-eval: the paper's classification benchmarks in the open world, by the paper's metric."""

import json
from pathlib import Path

from vlmclassifier.benchmarks import PAPER_BENCHMARKS, load_evaluation
from vlmclassifier.prompts import WORDINGS
from vlmclassifier.records import UserError

TASK = """# {title}, open world, as in "Why are Visually-Grounded Language Models Bad at Image Classification?"
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
task: vlmclassifier_{key}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: !function utils.doc_to_text
doc_to_target: label
process_results: !function utils.process_results
generation_kwargs:
  max_new_tokens: 64
  do_sample: false
metric_list:
  - metric: contains
    aggregation: mean
    higher_is_better: true
  - metric: exact
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""
UTILS = '''"""What lmms-eval asks about an image, and how an answer is judged."""

from PIL import Image

QUESTION = {question!r}


def doc_to_visual(doc):
    """The image of a row."""
    return [Image.open(doc["image"]).convert("RGB")]


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    """The question."""
    options = lmms_eval_specific_kwargs or {{}}
    return f"{{options.get('pre_prompt', '')}}{{QUESTION}}{{options.get('post_prompt', '')}}"


def process_results(doc, results):
    """contains: the label is a part of the answer (the paper's metric); exact: it is the answer."""
    answer, label = results[0].strip().lower(), doc["label"].lower()
    return {{"contains": float(label in answer), "exact": float(label == answer.removesuffix("."))}}
'''


def export_tasks(out: Path, model: str, weights: Path | None) -> str:
    """Write a task folder for every benchmark of the paper whose images are here; returns what to run.

    Raises UserError where there are none.
    """
    written, missing = [], []
    for key in PAPER_BENCHMARKS:
        try:
            task = load_evaluation(key)
        except UserError as error:
            missing.append(f"{key}: {error}")
            continue
        folder = out / key
        folder.mkdir(parents=True, exist_ok=True)
        rows = folder / "rows.jsonl"
        lines = [json.dumps({"image": str(Path(one.image).resolve()), "label": one.label}, ensure_ascii=False)
                 for one in task.examples]  # fmt: skip
        rows.write_text("\n".join(lines) + "\n", encoding="utf-8")
        text = TASK.format(title=task.benchmark.title, key=key, rows=json.dumps(str(rows.resolve())))
        (folder / f"{key}.yaml").write_text(text, encoding="utf-8")
        (folder / "utils.py").write_text(UTILS.format(question=WORDINGS["base"]), encoding="utf-8")
        written.append(f"vlmclassifier_{key}")
    if not written:
        raise UserError(f"No benchmark's images are here ({'; '.join(missing)}).")
    absent = f"\nNot written: {'; '.join(missing)}" if missing else ""
    checkpoint = weights or "MERGED_CHECKPOINT"
    name = "llava_hf" if model.startswith("llava-") else "MODEL_OF_LMMS_EVAL"
    return (
        f"Written: {out}{absent}\nNext, with lmms-eval installed, for {model}: python -m lmms_eval --model {name} "
        f"--model_args pretrained={checkpoint} --tasks {','.join(written)} --include_path {out} --batch_size 1"
    )
