"""Ask a vision-language model what each picture of a benchmark shows (section 2, Table 1).

    python main_results/classify_vlm.py --model llava-1.5-7b --benchmark flowers
    python main_results/classify_vlm.py --model llava-1.5-7b --benchmark flowers --candidates all
    python main_results/classify_vlm.py --model llava-1.5-7b --benchmark flowers --candidates none 2 5 20 all
    python main_results/classify_vlm.py --model blip2-2.7b --benchmark my.jsonl --classes my_classes.json --limit 100

Writes outputs/main_results/NAME/{run.json, predictions.jsonl, scores.csv}. Stop it whenever you like: the same command
goes on where it stopped. Start it several times, or under `accelerate launch`, and the processes share the work.
"""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
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
from vlmclassifier.runs import Run, fingerprint, open_run, pending_together
from vlmclassifier.tables import run_folder, write_scores

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
    candidates: tuple[str, ...] = ("none",)
    """The world: none (open), all (every class name listed), or K candidates, the true one among them. Several values,
    here and in the next two: a run for every combination, with each picture encoded once."""
    order: tuple[Literal["random", "fixed"], ...] = ("random",)
    """Order of the candidates: random per picture, or that of the class list."""
    wording: tuple[Literal["base", "alternative_1", "alternative_2", "alternative_3"], ...] = ("base",)
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
    """Run folder, with -SETTING behind it where there are several; without it outputs/main_results/MODEL-BENCHMARK."""


@dataclass(frozen=True)
class Way:
    """One way of asking."""

    candidates: str
    order: str
    wording: str


@dataclass(frozen=True)
class Batch:
    """The pictures that one run still wants of a lease, and what is asked about them."""

    ids: list[str]
    questions: Sequence[Question]
    prompts: Sequence[str]
    inputs: dict  # what `VLM.prepare` made of them


def main(args: Args) -> None:
    """Check everything, answer what is pending, score."""
    cli.check_positive(limit=args.limit, batch_size=args.batch_size, max_new_tokens=args.max_new_tokens)
    spec = find_model(args.model, "vlm")
    task = load_evaluation(args.benchmark, args.classes, args.data_root, args.split, args.limit)
    folder = checkpoint_folder(spec, args.weights)

    from vlmclassifier.devices import resolve_device, resolve_dtype  # seconds of torch

    config = {
        "script": "classify_vlm", "kind": "vlm", "model": spec.key, "miniature": is_miniature(folder),
        "checkpoint": fingerprint(folder), "dtype": resolve_dtype(args.dtype, resolve_device(args.device)),
        "benchmark": task.benchmark.key, "manifest": task.manifest_hash, "split": task.split, "limit": args.limit,
        "candidates": "", "order": "", "wording": "", "seed": args.seed, "chain_of_thought": args.chain_of_thought,
        "max_new_tokens": args.max_new_tokens or new_tokens(args.chain_of_thought), "classes": list(task.names),
    }  # fmt: skip
    asked = settings(args, task)
    order, runs = [example.id for example in task.examples], {}
    for setting, way in asked.items():
        out = run_folder(args.out, "main_results", f"{spec.key}-{task.benchmark.key}", setting, len(asked) > 1)
        runs[setting] = open_run(out, config | asdict(way), order)
    pending = {setting: run for setting, run in runs.items() if not run.complete}
    absent = answer(args, task, folder, asked, pending, f"{spec.key} on {task.benchmark.title}") if pending else {}
    for setting, run in runs.items():
        if setting in absent:
            continue
        run.finish()
        if cli.is_main_process():
            scores = write_scores(run.folder, "main_results", "table1")
            cli.report(run.folder, scores, "python main_results/table.py")
    if absent:
        raise ContextError("; ".join(f"{setting}: {reason}" for setting, reason in absent.items()))


def settings(args: Args, task: Evaluation) -> dict[str, Way]:
    """Every combination of candidates, order and wording that was asked for, by its name."""
    asked = {}
    for candidates, order, wording in itertools.product(*map(cli.several, (args.candidates, args.order, args.wording))):
        parse_candidates(candidates, task.names)
        name = setting_name(candidates, wording, order, args.chain_of_thought, args.seed)
        asked.setdefault(name, Way(candidates, order, wording))  # the order does not matter where nothing is listed
    return asked


def answer(
    args: Args, task: Evaluation, folder: Path, asked: dict[str, Way], runs: dict[str, Run], title: str
) -> dict[str, str]:
    """Ask the model about every pending picture, batch by batch, in every way; what does not fit is returned."""
    from vlmclassifier.devices import Halving
    from vlmclassifier.vlm import load_vlm

    vlm = load_vlm(args.model, folder, args.device, args.dtype)
    max_new_tokens = args.max_new_tokens or new_tokens(args.chain_of_thought)
    examples = {example.id: example for example in task.examples}

    def ask(example: Example, way: Way) -> tuple[Question, str]:
        count = parse_candidates(way.candidates, task.names)
        question = build_question(example, task.names, count, way.wording, way.order, args.seed)
        return question, vlm.prompt(question.text, args.chain_of_thought)

    absent: dict[str, str] = {}

    @contextmanager
    def fits(setting: str) -> Iterator[None]:  # what does not fit is noted for the tables, and the others go on
        try:
            yield
        except ContextError as error:
            absent[setting] = str(error)
            runs[setting].not_applicable(str(error))

    sizes = None
    for setting in runs:
        prompts = [ask(example, asked[setting])[1] for example in varying(asked[setting], task)]
        longest = sorted(prompts, key=len)[-16:]
        if sizes is None and vlm.image_size_matters(longest[-1]):
            sizes = image_sizes([example.image for example in task.examples])
        with fits(setting):
            vlm.check_context(longest, max_new_tokens, sizes or ())
    runs = {setting: run for setting, run in runs.items() if setting not in absent}
    if not runs:
        return absent
    waiting = list(runs.values())

    def load(lists: list[list[str]]) -> tuple[dict[str, Image], list[Batch]]:
        ids = dict.fromkeys(i for some in lists for i in some)
        images = {i: open_image(examples[i].image, task.root, examples[i].row) for i in ids}
        batches = []
        for setting, some in zip(runs, lists, strict=True):
            questions, prompts = (
                zip(*(ask(examples[i], asked[setting]) for i in some), strict=True) if some else ((), ())
            )
            inputs = vlm.prepare([images[i] for i in some], prompts) if some else {}
            batches.append(Batch(some, questions, prompts, inputs))
        return images, batches

    halving = Halving()
    with cli.progress(waiting, f"{title}, {', '.join(runs)}") as advance:
        for _, (images, batches) in prefetch(pending_together(waiting, args.batch_size), load):
            seen = halving(partial(features, vlm, batches), list(images.items())) if len(runs) > 1 else []
            seen = dict(zip(images, seen, strict=True)) if seen else {}
            for (setting, run), batch in zip(runs.items(), batches, strict=True):
                if not batch.ids or setting in absent:
                    continue
                asking = [(images[i], prompt, seen.get(i)) for i, prompt in zip(batch.ids, batch.prompts, strict=True)]
                with fits(setting):
                    answers = halving(partial(generate, vlm, batch, max_new_tokens), asking)
                    rows = zip([examples[i] for i in batch.ids], batch.questions, batch.prompts, answers, strict=True)
                    run.append([Prediction(e.id, e.label, e.class_index, prompt, q.choices, text, None, None)
                                for e, q, prompt, text in rows])  # fmt: skip
                    advance()
    return absent


def features(vlm: "VLM", batches: list[Batch], part: Sequence[tuple[str, Image]]) -> list[object]:
    """What the language model is given of each picture, encoded once for all ways; None where it cannot be shared."""
    prompt = next(prompt for batch in batches for prompt in batch.prompts)
    return vlm.encode([image for _, image in part], prompt) or [None] * len(part)


def generate(
    vlm: "VLM", batch: Batch, max_new_tokens: int, part: Sequence[tuple[Image, str, object]]
) -> list[str]:  # fmt: skip
    """Answers to (picture, prompt, features or None); the batch's inputs are for all of it."""
    images, prompts, seen = zip(*part, strict=True)
    whole = len(part) == len(batch.ids)  # else it did not fit into the memory
    inputs = batch.inputs if whole else vlm.prepare(images, prompts)
    return vlm.generate(inputs, max_new_tokens, None if None in seen else seen)


def varying(way: Way, task: Evaluation) -> Sequence[Example]:
    """The examples whose prompts have different words: all with K candidates each, else one stands for all."""
    return task.examples if way.candidates not in ("none", "all") else task.examples[:1]


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
