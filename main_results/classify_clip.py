"""Classify a benchmark with CLIP: the class whose caption is nearest to the picture (section 2, Table 1).

    python main_results/classify_clip.py --model clip-vit-l-336 --benchmark flowers
    python main_results/classify_clip.py --model ViT-B-32/laion2b_s34b_b79k --benchmark cars --candidates 20
    python main_results/classify_clip.py --model clip-vit-l-336 --weights clip.safetensors --benchmark caltech

Writes outputs/main_results/NAME/{run.json, predictions.jsonl, scores.csv}. Stop it whenever you like: the same command
goes on where it stopped. Start it several times, or under `accelerate launch`, and the processes share the work.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vlmclassifier import cli
from vlmclassifier.benchmarks import load_evaluation
from vlmclassifier.images import open_image, prefetch
from vlmclassifier.models import find_model, is_miniature
from vlmclassifier.prompts import CAPTION, draw_candidates, parse_candidates, setting_name
from vlmclassifier.records import Prediction, UserError
from vlmclassifier.runs import fingerprint, open_run
from vlmclassifier.tables import OUTPUTS, write_scores


@dataclass
class Args:
    model: str = "clip-vit-l-336"
    """A key of vlmclassifier/models.py, or any open_clip NAME/TAG."""
    weights: Path | None = None
    """Local weights: a file for the architecture, or a folder with open_clip_config.json; without it paths.toml, then
    open_clip's download."""
    benchmark: str = "flowers"
    """imagenet, flowers, cars, caltech, or a manifest FILE.jsonl of your own (with --classes)."""
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
    spec = find_model(args.model, "clip")
    if args.candidates == "none":
        raise UserError("CLIP always chooses among class names: use --candidates all or a number.")
    task = load_evaluation(args.benchmark, args.classes, args.data_root, args.split, args.limit)
    count = parse_candidates(args.candidates, task.names)
    setting = setting_name(args.candidates, seed=args.seed if args.candidates != "all" else 0)

    from vlmclassifier.clip import checkpoint_path, load_clip  # seconds of torch
    from vlmclassifier.vlm import resolve_device, resolve_dtype

    weights = checkpoint_path(spec, args.weights)
    config = {
        "script": "classify_clip", "kind": "clip", "model": spec.key, "miniature": is_miniature(weights),
        "checkpoint": fingerprint(weights), "dtype": resolve_dtype(args.dtype, resolve_device(args.device)),
        "benchmark": task.benchmark.key, "manifest": task.manifest_hash, "split": task.split, "limit": args.limit,
        "candidates": args.candidates, "caption": CAPTION, "seed": args.seed, "classes": list(task.names),
    }  # fmt: skip
    examples = {example.id: example for example in task.examples}
    out = args.out or OUTPUTS / "main_results" / f"{spec.key}-{task.benchmark.key}-{setting}"
    run = open_run(out, config, list(examples))
    if not run.complete:
        clip = load_clip(args.model, weights, args.device, args.dtype)
        names = list(dict.fromkeys(task.names))  # a name that two classes share stands for the first
        class_index = [task.names.index(name) for name in names]
        column = {name: place for place, name in enumerate(names)}
        features = clip.class_features(names)  # [names, width], once per run

        def load(ids):
            return clip.prepare([open_image(examples[i].image, task.root, examples[i].row) for i in ids])

        with cli.progress(run, f"{spec.key} on {task.benchmark.title}, {setting}") as bar:
            for ids, pixel_values in prefetch(run.pending(args.batch_size), load):
                batch, choices, allowed = [examples[i] for i in ids], [None] * len(ids), None
                if args.candidates != "all":
                    choices = [draw_candidates(e, task.names, count, seed=args.seed) for e in batch]
                    allowed = [[column[name] for name in drawn] for drawn in choices]
                rows = zip(batch, choices, clip.classify(pixel_values, features, allowed), strict=True)
                run.append(
                    [
                        Prediction(
                            e.id, e.label, e.class_index, CAPTION, drawn, names[best[0]], names[best[0]],
                            tuple(class_index[place] for place in best),
                        )
                        for e, drawn, best in rows
                    ]
                )  # fmt: skip
                bar()
    run.finish()
    if cli.is_main_process():
        cli.report(out, write_scores(out, "main_results", "table1"), "python main_results/table.py")


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
