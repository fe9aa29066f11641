"""Classify a benchmark with CLIP: the class whose caption is nearest to the image (section 2, Table 1).

    python main_results/classify_clip.py --model clip-vit-l-336 --benchmark flowers
    python main_results/classify_clip.py --model ViT-B-32/laion2b_s34b_b79k --benchmark cars --candidates 20
    python main_results/classify_clip.py --model clip-vit-l-336 --benchmark cars --candidates 2 5 20 100 all
    python main_results/classify_clip.py --model clip-vit-l-336 --weights clip.safetensors --benchmark caltech

Writes outputs/main_results/NAME/{run.json, predictions.jsonl, scores.csv}. It can be stopped at any time: the same
command continues. Start it several times, or under `accelerate launch`, and the processes share the work.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vlmclassifier import cli
from vlmclassifier.arguments import DataArgs, ModelArgs, RunArgs, run_config, run_name, values_of
from vlmclassifier.benchmarks import Evaluation
from vlmclassifier.class_lists import indistinct_warning, same_for_model
from vlmclassifier.images import open_image, prefetch
from vlmclassifier.models import find_model
from vlmclassifier.prompts import CAPTION, PromptSetting, clip_settings
from vlmclassifier.records import Example, Prediction, UserError, images_named
from vlmclassifier.runs import Run, open_run, pending_together
from vlmclassifier.scoring.runs import score_run

if TYPE_CHECKING:
    from vlmclassifier.clip import CLIP


@dataclass
class Args(RunArgs, DataArgs, ModelArgs):
    """Arguments."""

    model: str = "clip-vit-l-336"
    """A key of vlmclassifier/models.py, any open_clip NAME/TAG, or a folder as --weights takes it."""
    weights: Path | None = None
    """Local weights: a file for the architecture, a folder with open_clip_config.json, or one of a transformers CLIP or
    SigLIP; default: the entry in paths.toml, else open_clip's download."""
    candidates: tuple[str, ...] = ("all",)
    """Which classes may win: all, or K candidates drawn per image, the same that a VLM is given. Several values: one
    run each, with each image encoded once."""
    seed: int = 0
    """Seed of the candidates; they are drawn from (seed, image) alone."""
    save_scores: bool = False
    """With --candidates all: keep the scaled similarity of every name, as inference_analysis/calibrate.py reads it."""
    batch_size: int = 64
    """Images per forward pass; the rankings do not depend on it."""


def main(args: Args) -> None:
    """Check everything, classify what is pending, score."""
    # ---- check
    cli.check_positive(limit=args.limit, batch_size=args.batch_size)
    spec = find_model(args.model, "clip")
    task = args.load_evaluation()
    settings = clip_settings(task.names, values_of(args.candidates), args.seed)
    if args.save_scores and all(setting.candidates != "all" for setting in settings):
        raise UserError("--save-scores keeps the scores of all names: add all to --candidates.")

    from vlmclassifier.clip import checkpoint_path, load_clip  # seconds of torch
    from vlmclassifier.devices import resolve_device, resolve_dtype

    # ---- open one run per setting
    checkpoint = checkpoint_path(spec, args.weights)
    device = resolve_device(args.device)
    dtype = resolve_dtype(args.dtype, device)
    runs = {}
    for setting in settings:
        has_scores = args.save_scores and setting.candidates == "all"
        config = run_config(
            "classify_clip", "clip", spec, task, args.limit, checkpoint=checkpoint, setting=setting, caption=CAPTION,
            default_dtype=resolve_dtype("auto", device), dtype=dtype, **({"scores": True} if has_scores else {}),
        )  # fmt: skip
        name = setting.name + ("-scores" if has_scores and args.out is None else "")  # beside a run without them
        folder = args.run_folder("main_results", run_name(spec, task, checkpoint), name, len(settings) > 1)
        width = len(set(task.names)) if has_scores else 0
        runs[setting] = open_run(folder, config, task.order, width, labels=task.labels, batch_size=args.batch_size)

    # ---- classify
    pending = {setting: run for setting, run in runs.items() if not run.complete}
    if pending:
        classify(load_clip(args.model, checkpoint, args.device, args.dtype), task, pending, args.batch_size)

    # ---- score
    for run in runs.values():
        rows = run.finish()
        if cli.is_main_process():
            cli.report(score_run(run.folder, rows))


def classify(clip: "CLIP", task: Evaluation, pending: dict[PromptSetting, Run], batch_size: int) -> None:
    """Rank the names for every pending image; an image's features are computed once for all settings."""
    examples = {example.id: example for example in task.examples}
    names = list(dict.fromkeys(task.names))  # a name that two classes share stands for the first
    column = {name: place for place, name in enumerate(names)}
    class_features = clip.class_features(names)  # [names, width], once per run
    if (groups := same_for_model(names, clip.token_keys(names))) and cli.is_main_process():
        print(indistinct_warning(groups, clip.spec.key), file=sys.stderr)

    def load(leases: list[list[str]]) -> tuple[list[str], object]:
        ids = list(dict.fromkeys(i for lease in leases for i in lease))  # that any of the runs needs
        images = [open_image(examples[i].image, task.root, examples[i].row) for i in ids]
        with images_named([examples[i].place for i in ids]):
            return ids, clip.prepare(images)

    title = f"{clip.spec.key} on {task.benchmark.title}, {', '.join(setting.name for setting in pending)}"
    with cli.progress(list(pending.values()), title) as update:
        leases_together = pending_together(list(pending.values()), batch_size)
        for leases, (ids, pixel_values) in prefetch(leases_together, load):
            with images_named([examples[i].place for i in ids]):
                features = clip.encode_images(pixel_values)  # [images, width]
            row_of = {i: row for row, i in enumerate(ids)}
            for (setting, run), lease in zip(pending.items(), leases, strict=True):
                if not lease:
                    continue
                batch = [examples[i] for i in lease]
                choices = [None if setting.candidates == "all" else setting.choices(example) for example in batch]
                allowed = [[column[name] for name in drawn] for drawn in choices if drawn is not None] or None
                own = features[[row_of[i] for i in lease]]  # [lease, width]
                rankings = clip.rank(own, class_features, allowed)
                scores = clip.scores(own, class_features).cpu().numpy() if run.width else None  # [lease, names]
                run.append([
                    prediction(example, drawn, [names[place] for place in best], task.names)
                    for example, drawn, best in zip(batch, choices, rankings, strict=True)
                ], scores)  # fmt: skip
            update()


def prediction(
    example: Example, choices: tuple[str, ...] | None, best: Sequence[str], names: Sequence[str]
) -> Prediction:  # fmt: skip
    """The row to record; `best`: the names with the largest similarity."""
    ranking = tuple(names.index(name) for name in best)
    return Prediction(example.id, example.label, example.class_index, CAPTION, choices, best[0], ranking)


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
