"""Classify a benchmark with CLIP: the class whose caption is nearest to the picture (section 2, Table 1).

    python main_results/classify_clip.py --model clip-vit-l-336 --benchmark flowers
    python main_results/classify_clip.py --model ViT-B-32/laion2b_s34b_b79k --benchmark cars --candidates 20
    python main_results/classify_clip.py --model clip-vit-l-336 --weights clip.safetensors --benchmark caltech

Writes outputs/main_results/NAME/{run.json, predictions.jsonl, scores.csv}. Stop it whenever you like: the same command
goes on where it stopped. Start it several times, or under `accelerate launch`, and the processes share the work.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vlmclassifier import cli
from vlmclassifier.benchmarks import Evaluation, load_evaluation
from vlmclassifier.images import open_image, prefetch
from vlmclassifier.models import find_model, is_miniature
from vlmclassifier.prompts import CAPTION, draw_candidates, parse_candidates, setting_name
from vlmclassifier.records import Example, Prediction, UserError
from vlmclassifier.runs import Run, fingerprint, open_run
from vlmclassifier.tables import OUTPUTS, write_scores

if TYPE_CHECKING:
    from torch import Tensor

    from vlmclassifier.clip import CLIP


@dataclass
class Args:
    model: str = "clip-vit-l-336"
    """A key of vlmclassifier/models.py, any open_clip NAME/TAG, or a folder as --weights takes it."""
    weights: Path | None = None
    """Local weights: a file for the architecture, a folder with open_clip_config.json, or one of a transformers CLIP or
    SigLIP; without it paths.toml, then open_clip's download."""
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
    candidates: str = "all"
    """Which classes may win: all, or K candidates drawn per picture, the same that a VLM is given."""
    seed: int = 0
    """Seed of the candidate lists; each is drawn from (seed, picture) alone."""
    batch_size: int = 64
    """Pictures per forward pass; the rankings do not depend on it."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N. auto: this process's GPU, else the CPU."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: bfloat16 on a GPU, float32 on the CPU."""
    out: Path | None = None
    """Run folder; without it outputs/main_results/MODEL-BENCHMARK-SETTING."""


def main(args: Args) -> None:
    """Check everything, classify what is pending, score."""
    cli.check_positive(limit=args.limit, batch_size=args.batch_size)
    spec = find_model(args.model, "clip")
    if args.candidates == "none":
        raise UserError("CLIP always chooses among class names: use --candidates all or a number.")
    task = load_evaluation(args.benchmark, args.classes, args.data_root, args.split, args.limit)
    parse_candidates(args.candidates, task.names)

    from vlmclassifier.clip import checkpoint_path  # seconds of torch
    from vlmclassifier.devices import resolve_device, resolve_dtype

    weights = checkpoint_path(spec, args.weights)
    config = {
        "script": "classify_clip", "kind": "clip", "model": spec.key, "miniature": is_miniature(weights),
        "checkpoint": fingerprint(weights), "dtype": resolve_dtype(args.dtype, resolve_device(args.device)),
        "benchmark": task.benchmark.key, "manifest": task.manifest_hash, "split": task.split, "limit": args.limit,
        "candidates": args.candidates, "caption": CAPTION, "seed": args.seed, "classes": list(task.names),
    }  # fmt: skip
    setting = setting_name(args.candidates, seed=args.seed if args.candidates != "all" else 0)
    out = args.out or OUTPUTS / "main_results" / f"{spec.key}-{task.benchmark.key}-{setting}"
    run = open_run(out, config, [example.id for example in task.examples])
    if not run.complete:
        classify(args, task, weights, run, f"{spec.key} on {task.benchmark.title}, {setting}")
    run.finish()
    if cli.is_main_process():
        cli.report(out, write_scores(out, "main_results", "table1"), "python main_results/table.py")


def classify(args: Args, task: Evaluation, weights: Path, run: Run, title: str) -> None:
    """Rank the classes for every pending picture, batch by batch."""
    from vlmclassifier.clip import load_clip
    from vlmclassifier.devices import Halving

    clip = load_clip(args.model, weights, args.device, args.dtype)
    names = list(dict.fromkeys(task.names))  # a name that two classes share stands for the first
    class_index = [task.names.index(name) for name in names]
    column = {name: place for place, name in enumerate(names)}
    class_features = clip.class_features(names)  # [names, width], once per run
    count = None if args.candidates == "all" else parse_candidates(args.candidates, task.names)
    examples = {example.id: example for example in task.examples}

    def load(ids: list[str]) -> object:
        return clip.prepare([open_image(examples[i].image, task.root, examples[i].row) for i in ids])

    def row(example: Example, choices: tuple[str, ...] | None, best: list[int]) -> Prediction:
        ranking, name = tuple(class_index[place] for place in best), names[best[0]]
        return Prediction(example.id, example.label, example.class_index, CAPTION, choices, name, name, ranking)

    halving = Halving()
    with cli.progress(run, title) as advance:
        for ids, pixel_values in prefetch(run.pending(args.batch_size), load):
            batch, choices, allowed = [examples[i] for i in ids], [None] * len(ids), None
            if count is not None:
                choices = [draw_candidates(example, task.names, count, seed=args.seed) for example in batch]
                allowed = [[column[name] for name in drawn] for drawn in choices]
            rankings = halving(partial(rank, clip, class_features, pixel_values, allowed), range(len(batch)))
            run.append(list(map(row, batch, choices, rankings)))
            advance()


def rank(
    clip: "CLIP", class_features: "Tensor", pixel_values: "Tensor", allowed: list[list[int]] | None, part: range
) -> list[list[int]]:
    """The rankings of some pictures of a batch."""
    some = None if allowed is None else [allowed[place] for place in part]
    return clip.classify(pixel_values[part.start : part.stop], class_features, some)


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
