"""Ask a vision-language model what each picture of a benchmark shows (section 2, Table 1).

    python main_results/classify_vlm.py --model llava-1.5-7b --benchmark flowers
    python main_results/classify_vlm.py --model llava-1.5-7b --benchmark flowers --candidates all
    python main_results/classify_vlm.py --model blip2-2.7b --benchmark my.jsonl --classes my_classes.json --limit 100

Writes outputs/main_results/NAME/{run.json, predictions.jsonl, scores.csv}. Stop it whenever you like: the same command
goes on where it stopped. Start it several times, or under `accelerate launch`, and the processes share the work.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from PIL.Image import Image

from vlmclassifier import cli
from vlmclassifier.benchmarks import Evaluation, load_evaluation
from vlmclassifier.images import image_sizes, open_image, prefetch
from vlmclassifier.models import checkpoint_folder, find_model, is_miniature
from vlmclassifier.prompts import build_question, new_tokens, parse_candidates, setting_name
from vlmclassifier.records import ContextError, Example, Prediction, Question
from vlmclassifier.runs import Run, fingerprint, open_run
from vlmclassifier.tables import OUTPUTS, write_scores

if TYPE_CHECKING:
    from vlmclassifier.vlm import VLM


@dataclass
class Args:
    model: str = "llava-1.5-7b"
    """A key of vlmclassifier/models.py, any other hub id OWNER/NAME, or a checkpoint folder."""
    weights: Path | None = None
    """Local checkpoint folder; without it paths.toml, then the hub."""
    benchmark: str = "flowers"
    """imagenet, flowers, cars, caltech, plane_figures, or a manifest FILE.jsonl of your own (with --classes)."""
    classes: Path | None = None
    """Class list of your own manifest: a JSON array of names."""
    data_root: Path | None = None
    """Folder that the manifest's image paths start from; without it paths.toml, then the project."""
    split: str | None = None
    """Split to evaluate, or "all"; without it the benchmark's test split."""
    limit: int | None = None
    """Only the first N pictures of the evaluation order; a larger N later continues the same run."""
    candidates: str = "none"
    """The world: none (open), all (every class name listed), or K candidates, the true one among them."""
    order: Literal["random", "fixed"] = "random"
    """Order of the candidates: random per picture, or that of the class list."""
    wording: Literal["base", "alternative_1", "alternative_2", "alternative_3"] = "base"
    """Wording of the question (vlmclassifier/prompts.py)."""
    chain_of_thought: bool = False
    """Let the model think step by step before it answers."""
    max_new_tokens: int | None = None
    """Longest answer; without it 64, with chain of thought 512."""
    seed: int = 0
    """Seed of the candidate lists; each is drawn from (seed, picture) alone."""
    batch_size: int = 8
    """Pictures per forward pass; the answers do not depend on it."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N. auto: this process's GPU, all GPUs where the model is larger than one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: bfloat16 on a GPU, float32 on the CPU."""
    out: Path | None = None
    """Run folder; without it outputs/main_results/MODEL-BENCHMARK-SETTING."""


def main(args: Args) -> None:
    """Check everything, answer what is pending, score."""
    cli.check_positive(limit=args.limit, batch_size=args.batch_size, max_new_tokens=args.max_new_tokens)
    spec = find_model(args.model, "vlm")
    task = load_evaluation(args.benchmark, args.classes, args.data_root, args.split, args.limit)
    parse_candidates(args.candidates, task.names)
    folder = checkpoint_folder(spec, args.weights)
    max_new_tokens = args.max_new_tokens or new_tokens(args.chain_of_thought)

    from vlmclassifier.devices import resolve_device, resolve_dtype  # seconds of torch

    config = {
        "script": "classify_vlm", "kind": "vlm", "model": spec.key, "miniature": is_miniature(folder),
        "checkpoint": fingerprint(folder), "dtype": resolve_dtype(args.dtype, resolve_device(args.device)),
        "benchmark": task.benchmark.key, "manifest": task.manifest_hash, "split": task.split, "limit": args.limit,
        "candidates": args.candidates, "order": args.order, "wording": args.wording, "seed": args.seed,
        "chain_of_thought": args.chain_of_thought, "max_new_tokens": max_new_tokens, "classes": list(task.names),
    }  # fmt: skip
    setting = setting_name(args.candidates, args.wording, args.order, args.chain_of_thought, args.seed)
    out = args.out or OUTPUTS / "main_results" / f"{spec.key}-{task.benchmark.key}-{setting}"
    run = open_run(out, config, [example.id for example in task.examples])
    if not run.complete:
        try:
            answer(args, task, folder, run, f"{spec.key} on {task.benchmark.title}, {setting}")
        except ContextError as error:
            run.not_applicable(str(error))  # for the tables
            raise
    run.finish()
    if cli.is_main_process():
        cli.report(out, write_scores(out, "main_results", "table1"), "python main_results/table.py")


def answer(args: Args, task: Evaluation, folder: Path, run: Run, title: str) -> None:
    """Ask the model about every pending picture, batch by batch."""
    from vlmclassifier.devices import Halving
    from vlmclassifier.vlm import load_vlm

    vlm = load_vlm(args.model, folder, args.device, args.dtype)
    max_new_tokens = args.max_new_tokens or new_tokens(args.chain_of_thought)
    count = parse_candidates(args.candidates, task.names)
    examples = {example.id: example for example in task.examples}

    def ask(example: Example) -> tuple[Question, str]:
        question = build_question(example, task.names, count, args.wording, args.order, args.seed)
        return question, vlm.prompt(question.text, args.chain_of_thought)

    def load(ids: list[str]) -> tuple[list[Question], list[tuple[Image, str]], dict]:
        images = [open_image(examples[i].image, task.root, examples[i].row) for i in ids]
        questions, prompts = zip(*(ask(examples[i]) for i in ids), strict=True)
        return questions, list(zip(images, prompts, strict=True)), vlm.prepare(images, prompts)

    check_context(vlm, [ask(example)[1] for example in varying(args, task)], max_new_tokens, task)
    halving = Halving()
    with cli.progress(run, title) as advance:
        for ids, (questions, asked, inputs) in prefetch(run.pending(args.batch_size), load):
            answers = halving(partial(generate, vlm, inputs, len(ids), max_new_tokens), asked)
            rows = zip([examples[i] for i in ids], questions, asked, answers, strict=True)
            run.append(
                [
                    Prediction(e.id, e.label, e.class_index, p, q.choices, text, None, None)
                    for e, q, (_, p), text in rows
                ]
            )
            advance()


def generate(vlm: "VLM", inputs: dict, count: int, max_new_tokens: int, part: Sequence[tuple[Image, str]]) -> list[str]:
    """Answers to (picture, prompt) pairs; `inputs`: prepared ahead for all `count` pairs of the batch."""
    if len(part) < count:  # the batch did not fit into the memory as a whole
        inputs = vlm.prepare(*zip(*part, strict=True))
    return vlm.generate(inputs, max_new_tokens)


def varying(args: Args, task: Evaluation) -> Sequence[Example]:
    """The examples whose prompts have different words: all with K candidates each, else one stands for all."""
    return task.examples if args.candidates not in ("none", "all") else task.examples[:1]


def check_context(vlm: "VLM", prompts: list[str], max_new_tokens: int, task: Evaluation) -> None:
    """Before the first picture: does the longest prompt fit? Raises ContextError."""
    longest = sorted(prompts, key=len)[-16:]
    sizes = image_sizes([e.image for e in task.examples]) if vlm.image_size_matters(longest[-1]) else []
    vlm.check_context(longest, max_new_tokens, sizes)


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
