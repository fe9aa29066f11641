"""Ask a vision-language model what each picture of a benchmark shows (section 2, Table 1).

    python main_results/classify_vlm.py --model llava-1.5-7b --benchmark flowers
    python main_results/classify_vlm.py --model llava-1.5-7b --benchmark flowers --candidates all
    python main_results/classify_vlm.py --model llava-1.5-7b --benchmark flowers --candidates none 2 5 20 all
    python main_results/classify_vlm.py --model blip2-2.7b --benchmark my.jsonl --classes my_classes.json --limit 100

Writes outputs/main_results/NAME/{run.json, predictions.jsonl, scores.csv}. Stop it whenever you like: the same command
goes on where it stopped. Start it several times, or under `accelerate launch`, and the processes share the work.
"""

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
from vlmclassifier.models import checkpoint_folder, find_model, is_miniature, template_of
from vlmclassifier.prompts import Way, build_question, new_tokens, parse_candidates, ways
from vlmclassifier.provenance import fingerprint
from vlmclassifier.records import ContextError, Example, Prediction, Question
from vlmclassifier.runs import Run, open_run, pending_together
from vlmclassifier.tables import run_folder, write_scores

if TYPE_CHECKING:
    from vlmclassifier.devices import Halving
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
        "template": template_of(spec), "candidates": "", "order": "", "wording": "", "seed": args.seed,
        "chain_of_thought": args.chain_of_thought,
        "max_new_tokens": args.max_new_tokens or new_tokens(args.chain_of_thought), "classes": list(task.names),
        **task.marks,
    }  # fmt: skip
    several = map(cli.several, (args.candidates, args.order, args.wording))
    asked = ways(*several, task.names, args.chain_of_thought, args.seed)
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


def answer(
    args: Args, task: Evaluation, folder: Path, asked: dict[str, Way], runs: dict[str, Run], title: str
) -> dict[str, str]:
    """Ask the model about every pending picture, batch by batch, in every way; what does not fit is returned."""
    from vlmclassifier.devices import Halving
    from vlmclassifier.vlm import load_vlm

    interview = Interview(args, task, load_vlm(args.model, folder, args.device, args.dtype), asked, runs)
    interview.check_context()
    if not interview.runs:
        return interview.absent
    waiting, halving = list(interview.runs.values()), Halving()
    with cli.progress(waiting, f"{title}, {', '.join(interview.runs)}") as advance:
        for _, (images, batches) in prefetch(pending_together(waiting, args.batch_size), interview.load):
            seen = interview.features(images, batches, halving)
            for setting, batch in batches.items():
                interview.answer(setting, batch, images, seen, halving)
                advance()
    return interview.absent


class Interview:
    """One model and the ways in which it is asked about the same pictures."""

    def __init__(
        self, args: Args, task: Evaluation, vlm: "VLM", asked: dict[str, Way], runs: dict[str, Run]
    ) -> None:  # fmt: skip
        self.args, self.task, self.vlm, self.asked, self.runs = args, task, vlm, asked, dict(runs)
        self.max_new_tokens = args.max_new_tokens or new_tokens(args.chain_of_thought)
        self.examples = {example.id: example for example in task.examples}
        self.absent: dict[str, str] = {}  # setting -> why it does not fit

    @contextmanager
    def fits(self, setting: str) -> Iterator[None]:
        """What does not fit the context is noted for the tables, and the other ways go on."""
        try:
            yield
        except ContextError as error:
            self.absent[setting] = str(error)
            self.runs[setting].not_applicable(str(error))

    def ask(self, example: Example, way: Way) -> tuple[Question, str]:
        """The question about one picture, and the whole prompt."""
        count = parse_candidates(way.candidates, self.task.names)
        question = build_question(example, self.task.names, count, way.wording, way.order, self.args.seed)
        return question, self.vlm.prompt(question.text, self.args.chain_of_thought)

    def check_context(self) -> None:
        """Before the first picture: ways whose longest prompt does not fit are left out."""
        sizes = None
        for setting in self.runs:
            way = self.asked[setting]
            # All names, or none, make one prompt for all pictures; K candidates make one each.
            examples = self.task.examples if way.candidates not in ("none", "all") else self.task.examples[:1]
            longest = sorted((self.ask(example, way)[1] for example in examples), key=len)[-16:]
            if sizes is None and self.vlm.image_size_matters(longest[-1]):
                sizes = image_sizes([example.image for example in self.task.examples])
            with self.fits(setting):
                self.vlm.check_context(longest, self.max_new_tokens, sizes or ())
        self.runs = {setting: run for setting, run in self.runs.items() if setting not in self.absent}

    def load(self, lists: list[list[str]]) -> tuple[dict[str, Image], dict[str, Batch]]:
        """The pictures of a lease, and by setting what is asked about those that it still wants."""
        ids, batches = dict.fromkeys(i for some in lists for i in some), {}
        images = {i: open_image(self.examples[i].image, self.task.root, self.examples[i].row) for i in ids}
        for setting, some in zip(self.runs, lists, strict=True):
            if some:
                asked = [self.ask(self.examples[i], self.asked[setting]) for i in some]
                questions, prompts = zip(*asked, strict=True)
                inputs = self.vlm.prepare([images[i] for i in some], prompts)
                batches[setting] = Batch(some, questions, prompts, inputs)
        return images, batches

    def features(self, images: dict[str, Image], batches: dict[str, Batch], halving: "Halving") -> dict[str, object]:
        """What the language model is given of each picture, encoded once for all ways; none for a single way."""
        if len(self.runs) == 1:
            return {}
        prompt = next(prompt for batch in batches.values() for prompt in batch.prompts)

        def encode(part: Sequence[str]) -> list[object]:  # None where it cannot be shared
            return self.vlm.encode([images[i] for i in part], prompt) or [None] * len(part)

        return dict(zip(images, halving(encode, list(images)), strict=True))

    def answer(
        self, setting: str, batch: Batch, images: dict[str, Image], seen: dict[str, object], halving: "Halving"
    ) -> None:
        """Answer one batch in one way and record it."""
        if setting in self.absent:
            return
        asking = [(images[i], prompt, seen.get(i)) for i, prompt in zip(batch.ids, batch.prompts, strict=True)]
        with self.fits(setting):
            answers = halving(partial(generate, self.vlm, batch, self.max_new_tokens), asking)
            rows = zip([self.examples[i] for i in batch.ids], batch.questions, batch.prompts, answers, strict=True)
            self.runs[setting].append([
                Prediction(e.id, e.label, e.class_index, prompt, question.choices, text, None, None)
                for e, question, prompt, text in rows
            ])  # fmt: skip


def generate(
    vlm: "VLM", batch: Batch, max_new_tokens: int, part: Sequence[tuple[Image, str, object]]
) -> list[str]:  # fmt: skip
    """Answers to (picture, prompt, features or None); the batch's inputs are for all of it."""
    images, prompts, seen = zip(*part, strict=True)
    whole = len(part) == len(batch.ids)  # else it did not fit into the memory
    inputs = batch.inputs if whole else vlm.prepare(images, prompts)
    return vlm.generate(inputs, max_new_tokens, None if None in seen else seen)


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
