"""Classify a benchmark with CLIP: the class whose caption is nearest to the picture (section 2, Table 1).

    python main_results/classify_clip.py --model clip-vit-l-336 --benchmark flowers
    python main_results/classify_clip.py --model ViT-B-32/laion2b_s34b_b79k --benchmark cars --candidates 20
    python main_results/classify_clip.py --model clip-vit-l-336 --benchmark cars --candidates 2 5 20 100 all
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
from vlmclassifier.provenance import fingerprint
from vlmclassifier.records import Example, Prediction, UserError
from vlmclassifier.runs import Run, open_run, pending_together
from vlmclassifier.tables import run_folder, write_scores

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
    candidates: tuple[str, ...] = ("all",)
    """Which classes may win: all, or K candidates drawn per picture, the same that a VLM is given; several: a run each,
    with each picture encoded once."""
    seed: int = 0
    """Seed of the candidate lists; each is drawn from (seed, picture) alone."""
    batch_size: int = 64
    """Pictures per forward pass; the rankings do not depend on it."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N. auto: this process's GPU, else the CPU."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: bfloat16 on a GPU, float32 on the CPU."""
    out: Path | None = None
    """Run folder, with -SETTING behind it where there are several; without it outputs/main_results/MODEL-BENCHMARK."""


def main(args: Args) -> None:
    """Check everything, classify what is pending, score."""
    cli.check_positive(limit=args.limit, batch_size=args.batch_size)
    spec = find_model(args.model, "clip")
    asked = cli.several(args.candidates)
    if "none" in asked:
        raise UserError("CLIP always chooses among class names: use --candidates all or a number.")
    task = load_evaluation(args.benchmark, args.classes, args.data_root, args.split, args.limit)
    for candidates in asked:
        parse_candidates(candidates, task.names)

    from vlmclassifier.clip import checkpoint_path  # seconds of torch
    from vlmclassifier.devices import resolve_device, resolve_dtype

    weights = checkpoint_path(spec, args.weights)
    config = {
        "script": "classify_clip", "kind": "clip", "model": spec.key, "miniature": is_miniature(weights),
        "checkpoint": fingerprint(weights), "dtype": resolve_dtype(args.dtype, resolve_device(args.device)),
        "benchmark": task.benchmark.key, "manifest": task.manifest_hash, "split": task.split, "limit": args.limit,
        "candidates": "all", "caption": CAPTION, "seed": args.seed, "classes": list(task.names),
        **task.marks,
    }  # fmt: skip
    order, runs = [example.id for example in task.examples], {}
    for candidates in asked:
        setting = setting_name(candidates, seed=args.seed if candidates != "all" else 0)
        out = run_folder(args.out, "main_results", f"{spec.key}-{task.benchmark.key}", setting, len(asked) > 1)
        runs[candidates] = open_run(out, config | {"candidates": candidates}, order)
    if pending := {candidates: run for candidates, run in runs.items() if not run.complete}:
        classify(args, task, weights, pending, f"{spec.key} on {task.benchmark.title}, {', '.join(pending)} candidates")
    for run in runs.values():
        run.finish()
        if cli.is_main_process():
            cli.report(run.folder, write_scores(run.folder, "main_results", "table1"), "python main_results/table.py")


def classify(args: Args, task: Evaluation, weights: Path, runs: dict[str, Run], title: str) -> None:
    """Rank the classes for every pending picture, batch by batch, with each kind of candidate list."""
    from torch import stack

    from vlmclassifier.clip import load_clip
    from vlmclassifier.devices import Halving

    clip = load_clip(args.model, weights, args.device, args.dtype)
    names = list(dict.fromkeys(task.names))  # a name that two classes share stands for the first
    class_index = [task.names.index(name) for name in names]
    column = {name: place for place, name in enumerate(names)}
    class_features = clip.class_features(names)  # [names, width], once per run
    examples = {example.id: example for example in task.examples}

    def load(lists: list[list[str]]) -> object:
        ids = every(lists)
        return clip.prepare([open_image(examples[i].image, task.root, examples[i].row) for i in ids])

    def row(example: Example, choices: tuple[str, ...] | None, best: list[int]) -> Prediction:
        ranking, name = tuple(class_index[place] for place in best), names[best[0]]
        return Prediction(example.id, example.label, example.class_index, CAPTION, choices, name, name, ranking)

    halving = Halving()
    with cli.progress(list(runs.values()), title) as advance:
        for lists, pixel_values in prefetch(pending_together(list(runs.values()), args.batch_size), load):
            encoded = halving(partial(encode, clip, pixel_values), range(len(pixel_values)))
            features = dict(zip(every(lists), encoded, strict=True))  # picture -> [width]
            for (candidates, run), ids in zip(runs.items(), lists, strict=True):
                if not ids:
                    continue
                batch, choices, allowed = [examples[i] for i in ids], [None] * len(ids), None
                if candidates != "all":
                    count = parse_candidates(candidates, task.names)
                    choices = [draw_candidates(example, task.names, count, seed=args.seed) for example in batch]
                    allowed = [[column[name] for name in drawn] for drawn in choices]
                rankings = clip.rank(stack([features[i] for i in ids]), class_features, allowed)
                run.append(list(map(row, batch, choices, rankings)))
            advance()


def every(lists: list[list[str]]) -> list[str]:
    """The pictures that any of the runs still wants."""
    return list(dict.fromkeys(i for ids in lists for i in ids))


def encode(clip: "CLIP", pixel_values: "Tensor", part: range) -> "Tensor":
    """Image features [part, width] of some pictures of a batch."""
    return clip.encode_images(pixel_values[part.start : part.stop])


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
