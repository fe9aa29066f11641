"""Evaluate a model on general benchmarks, for what fine-tuning costs other abilities (section 4, Table 13).

    python imagewikiqa/other_benchmarks.py --benchmark textvqa --source TextVQA_0.5.1_val.json \
        --ocr TextVQA_Rosetta_OCR_v0.2_val.json --image-root train_images --model llava-1.5-7b
    python imagewikiqa/other_benchmarks.py --benchmark pope_popular --source coco_pope_popular.json --image-root val2014
    python imagewikiqa/other_benchmarks.py --benchmark ai2d --source FOLDER_OF_PARQUET_FILES --adapter RUN/best
    python imagewikiqa/other_benchmarks.py --benchmark mmvet --source mm-vet.json --image-root images \
        --judge openai/gpt-4.1
    python imagewikiqa/other_benchmarks.py --export lmms-eval --weights MERGED --model llava-1.5-7b --out lmms

TextVQA (VQA accuracy; with the OCR words that the published 58.2 needs, and without), POPE (F1, precision, recall,
share of yes), AI2D (letters), DocVQA (ANLS) and MM-Vet (a model judges; its id is in the table), from official files or
the hub's parquet files, by their official definitions. Prompts are those of LLaVA's evaluation. --export lmms-eval
writes tasks with which lmms-eval evaluates the paper's classification benchmarks, and the command for a checkpoint.
Writes outputs/imagewikiqa/NAME/{run.json, predictions.jsonl, scores.csv}; the same command continues.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vlmclassifier import cli
from vlmclassifier.arguments import RunArgs
from vlmclassifier.asking import AnswerArgs, Asking, load_model
from vlmclassifier.benchmarks import Benchmark, Evaluation
from vlmclassifier.class_lists import JsonList
from vlmclassifier.models import find_api
from vlmclassifier.paths import OUTPUTS
from vlmclassifier.questions.items import image_file
from vlmclassifier.questions.lmms_eval import export_tasks
from vlmclassifier.questions.stages import Stage
from vlmclassifier.questions.vqa_data import VQA_BENCHMARKS, VqaQuestion, VqaSetting, load_vqa
from vlmclassifier.records import Prediction, UserError
from vlmclassifier.runs import open_run
from vlmclassifier.runs.record import replace_file
from vlmclassifier.scoring.runs import score_run
from vlmclassifier.scoring.vqa import JUDGE_PROMPT, parse_judged
from vlmclassifier.tables import label
from vlmclassifier.thoughts import final_answer

JUDGE_TRIES = 3


@dataclass
class Args(RunArgs, AnswerArgs):
    """Arguments."""

    benchmark: Literal[tuple(VQA_BENCHMARKS)] = "textvqa"
    """Which benchmark."""
    source: Path | None = None
    """Its official file (AI2D: folder), or a parquet file or folder of the hub's data set (lmms-lab)."""
    image_root: Path | None = None
    """Folder of the images of an official file; default: beside it. Those of parquet files are written to
    outputs/imagewikiqa/images."""
    ocr: Path | None = None
    """TextVQA's official file of OCR words (Rosetta). Parquet files have their own."""
    use_ocr: bool = True
    """Give TextVQA's OCR words in the prompt, as LLaVA's evaluation does."""
    judge: str | None = None
    """The API model that judges MM-Vet; the official one is gpt-4-0613."""
    judge_url: str | None = None
    """Another server with OpenAI's interface for the judge."""
    judge_key_variable: str | None = None
    """Environment variable with the judge's key."""
    limit: int | None = None
    """Only the first N questions."""
    export: Literal["lmms-eval"] | None = None
    """Write lmms-eval's tasks for the classification benchmarks to --out instead."""


def main(args: Args) -> None:
    """Check everything, answer what is pending, judge, score."""
    # ---- check
    if args.export:
        out = args.out or OUTPUTS / "imagewikiqa" / "lmms-eval"
        print(export_tasks(out, args.model, args.weights))
        return
    cli.check_positive(limit=args.limit, batch_size=args.batch_size, max_new_tokens=args.max_new_tokens,
                       concurrency=args.concurrency, max_side=args.max_side)  # fmt: skip
    if args.source is None:
        raise UserError(f"--source is missing: the official file of {args.benchmark}, or a folder of parquet files.")
    setting = VqaSetting(VQA_BENCHMARKS[args.benchmark], args.use_ocr)
    images = OUTPUTS / "imagewikiqa" / "images" / args.benchmark
    questions = load_vqa(args.benchmark, args.source, args.ocr, images)[: args.limit]
    if setting.name == "official" and args.benchmark == "textvqa" and not any(one.ocr for one in questions):
        raise UserError("No question has OCR words: give --ocr FILE, or --no-use-ocr for the setting without them.")
    is_hub = args.source.suffix == ".parquet" or (args.source.is_dir() and any(args.source.rglob("*.parquet")))
    root = images if is_hub else args.image_root or (args.source if args.source.is_dir() else args.source.parent)
    for question in questions:
        image_file(root, question)
    model, task = load_model(args), evaluation(setting, questions, root)

    # ---- answer
    folder = args.run_folder("imagewikiqa", model.name(task), setting.name)
    config = model.config(task, setting, limit=args.limit, metric=setting.benchmark.metric)
    config["ocr"] = hashlib.sha256(args.ocr.read_bytes()).hexdigest() if args.ocr else None
    labels = {question.id: setting.label(question) for question in questions}
    run = open_run(folder, config, list(labels), labels=labels)
    numbers = {image: number for number, image in enumerate(dict.fromkeys(one.image for one in questions))}
    groups = {question.id: numbers[question.image] for question in questions}
    if not run.complete:
        model.answer(run, Asking(setting, questions, groups, root), args.batch_size)
    rows = run.finish()
    if not cli.is_main_process():
        return

    # ---- judge and score
    if setting.benchmark.metric == "judge":
        if args.judge is None:
            print(f"{len(rows)} answers in {folder}; MM-Vet needs a judge: the same command with --judge MODEL.")
            return
        judge_answers(args, folder, rows, questions)
    report(folder, rows)


def evaluation(setting: VqaSetting, questions: Sequence[VqaQuestion], root: Path) -> Evaluation:
    """The questions as what a run evaluates."""
    benchmark = setting.benchmark
    lines = [json.dumps([one.id, one.question, one.answers, one.options, one.ocr]) for one in questions]
    count = len(questions)
    tags = () if count == benchmark.rows else (f"{count:,} of {benchmark.rows:,} questions",)
    digest = hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()
    return Evaluation(Benchmark(benchmark.key, benchmark.title, JsonList(root)), (), root, "test", digest, [], tags)


def judge_answers(args: Args, folder: Path, rows: Sequence[Prediction], questions: Sequence[VqaQuestion]) -> None:
    """Let a model judge every answer, once. Raises UserError where it gives no number, and for another judge's file."""
    from vlmclassifier.api import Settings, load_api
    from vlmclassifier.api.concurrency import results_in_threads

    spec = find_api(str(args.judge), None, args.judge_url)
    api = load_api(spec, Settings(16, temperature=0.0), args.judge_url, args.judge_key_variable)
    record = folder / "judge.json"
    if record.exists() and json.loads(record.read_text(encoding="utf-8"))["model"] != spec.source:
        raise UserError(f"{folder} was judged by another model: move judge.json and judge.jsonl away.")
    replace_file(record, json.dumps({"model": spec.source, "base_url": args.judge_url}) + "\n")
    of_id = {one.id: one for one in questions}
    answer_of = {row.example_id: final_answer(row.output, row.prompt)[0] for row in rows}

    def work(key: str) -> float:
        question = of_id[key]
        truth = question.answers[0].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
        prompt = JUDGE_PROMPT.format(question=question.question, truth=truth, prediction=answer_of[key])
        score, text = None, ""
        for _ in range(JUDGE_TRIES):
            text, _ = api.ask(None, prompt)
            if (score := parse_judged(text)) is not None:
                break
        if score is None:
            raise UserError(f"The judge {spec.source} answers {text[:60]!r} about {key}, which is no score from 0 to "
                            "1: choose another --judge.")  # fmt: skip
        return score

    def results(keys: Sequence[str]):  # noqa: ANN202 - as Stage.run takes it
        for key, score in results_in_threads(keys, work, args.concurrency):
            yield key, score if isinstance(score, Exception) else {"score": score}

    failures = Stage(folder / "judge.jsonl", [row.example_id for row in rows]).run(results, f"judged by {spec.source}")
    if failures:
        raise UserError(f"{len(failures)} answers are not judged, such as: {failures[0]}; run the same command again.")


def report(folder: Path, rows: Sequence[Prediction]) -> None:
    """Print the scores and what comes next."""
    for score in score_run(folder, rows).scores:
        print(f"{label(score.model, ', '.join(score.tags))}, {score.dataset}, {score.setting}: {score.metric} "
              f"{score.value:.1f} [{score.low:.1f}, {score.high:.1f}], n={score.n}")  # fmt: skip
    print(f"Rows: {folder / 'predictions.jsonl'}. Next: python imagewikiqa/table.py")


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
