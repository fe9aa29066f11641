"""Train a mini CLIP, a tiny language model and a mini LLaVA on CLIP's frozen eyes, from scratch, on any manifest.

    python training_analysis/pretrain_mini.py --data-root outputs/plane_figures/seed-0/pictures
    python training_analysis/pretrain_mini.py --data-root outputs/plane_figures/seed-0/pictures --frequency uniform
    python training_analysis/pretrain_mini.py --benchmark my.jsonl --classes my.json --preset photos --minutes 10

The language model reads about all classes, but the texts about pictures name the classes as often as --frequency says.
Writes ordinary checkpoints, OUT/clip, OUT/lm and OUT/vlm (OUT/vlm-FREQUENCY for other frequencies than zipf), each with
its training.json; the texts in LLaVA's format (OUT/vlm-texts), and the training curves (OUT/curves.png). A finished
stage is not trained again. The same seed gives the same weights. Only the train split is read, until --evaluate
compares the models on the test split at the very end.
"""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from vlmclassifier import cli
from vlmclassifier.benchmarks import check_files, class_names, data_root, find_benchmark, find_manifest, load_examples
from vlmclassifier.plane_figures.texts import plane_figures_world, world_of
from vlmclassifier.pretraining.recipes import RECIPES
from vlmclassifier.pretraining.reports import accuracies, draw_curves, test_examples
from vlmclassifier.pretraining.stages import Training, fit_into, fitted, side_by_side, train_vlm
from vlmclassifier.records import UserError
from vlmclassifier.tables import OUTPUTS


@dataclass
class Args:
    benchmark: str = "plane_figures"
    """plane_figures, another benchmark, or a manifest FILE.jsonl of your own (with --classes)."""
    classes: Path | None = None
    """Class list of your own manifest: a JSON array of names."""
    data_root: Path | None = None
    """Folder that the manifest's image paths start from; without it paths.toml, then the project."""
    preset: Literal["figures", "photos", "smoke"] = "figures"
    """figures: generated pictures, no augmentation; photos: few photographs, augmented; smoke: a few steps only."""
    stages: tuple[Literal["clip", "lm", "vlm"], ...] = ("clip", "lm", "vlm")
    """What to train; vlm needs the other two."""
    frequency: str = "zipf"
    """How often texts name each class: zipf (ranks drawn by the seed), permuted (other ranks), uniform (always), or a
    FILE.json {class: share of its pictures}."""
    naming_head: float | None = None
    """zipf: this share of the classes, the most frequent, is always named; without it the preset's."""
    naming_exponent: float | None = None
    """zipf: how fast the naming falls off behind the head; without it the preset's."""
    naming_never: float | None = None
    """zipf: this share of the classes, the rarest, is never named; without it the preset's."""
    keep_generic: float | None = None
    """Share of the unnamed pictures that get a generic word instead of being left out; without it the preset's."""
    facts: Path | None = None
    """Facts about your own classes: JSON {class: [[question with {subject}, answer], ...]}."""
    tokenizer: Literal["words", "bpe"] = "words"
    """The language model's tokens: one per word, or a subword vocabulary in which names span several."""
    minutes: float | None = None
    """Train about so long: the steps of CLIP and the VLM follow from this machine's speed and are recorded."""
    clip_steps: int | None = None
    """Steps of CLIP; without it the preset's."""
    vlm_steps: int | None = None
    """Steps of the VLM's second stage; without it the preset's."""
    seed: int = 0
    """Seed of weights, batches, ranks and texts."""
    evaluate: bool = True
    """At the end print the accuracy on the test split: CLIP, VLM, and a linear probe on 16x16 pixels as the floor."""
    out: Path | None = None
    """Folder of the checkpoints; without it outputs/BENCHMARK/seed-SEED/checkpoints."""


def main(args: Args) -> None:
    """Check, train what is not there yet, draw the curves, compare."""
    check(args)
    training = training_of(args)
    if "vlm" in args.stages:
        training.naming()  # a mistake in the frequencies is said before minutes of training
    if args.evaluate:
        test_examples(training, args.benchmark, args.classes)
    found = fitted(training, args.minutes) if args.minutes else None
    training = found or training
    pending = [stage for stage in ("clip", "lm", "vlm") if stage in args.stages and not training.finished(stage)]
    if "vlm" in pending:
        for needed in ("clip", "lm"):
            if needed not in args.stages and not training.finished(needed):
                raise UserError(f"{training.folder(needed)} is not there: add {needed} to --stages.")

    if pending and args.minutes and not found:
        training = fit_into(training, args.minutes)
    side_by_side(training, [stage for stage in pending if stage != "vlm"])
    if "vlm" in pending:
        train_vlm(training)

    curves = draw_curves(training.out)
    for stage in args.stages:
        print(f"{stage}: {training.folder(stage)}")
    print(f"Training curves: {curves}")
    if args.evaluate and "vlm" in args.stages:
        print(accuracies(training, args.benchmark, args.classes))
    classes = f" --classes {args.classes}" if args.classes else ""
    print(
        f"Next: python main_results/classify_vlm.py --model mini-llava --weights {training.folder('vlm')} "
        f"--benchmark {args.benchmark}{classes} --data-root {training.root}"
    )


def check(args: Args) -> None:
    """Raise UserError for a number that makes no sense."""
    cli.check_positive(clip_steps=args.clip_steps, vlm_steps=args.vlm_steps)
    at_most = {"naming_head": 1, "naming_exponent": 100, "naming_never": 1, "keep_generic": 1, "minutes": 10**6}
    for name, largest in at_most.items():
        value = getattr(args, name)
        if value is not None and not (0 < value <= largest or (value == 0 and name != "minutes")):
            raise UserError(f"--{name.replace('_', '-')} {value:g} is outside 0 to {largest}: give another number.")
    if args.seed < 0:
        raise UserError(f"--seed {args.seed} is negative: give another number.")
    if args.minutes is not None and (args.clip_steps or args.vlm_steps):
        raise UserError("--minutes decides the steps: leave out --clip-steps and --vlm-steps, or it.")


def training_of(args: Args) -> Training:
    """The arguments as one record: the train split, the world of its classes, the recipe."""
    benchmark = find_benchmark(args.benchmark, args.classes)
    names, root = class_names(benchmark), data_root(benchmark, args.data_root)
    examples = load_examples(benchmark, names, root, "train")
    check_files(examples)
    world = plane_figures_world() if args.benchmark == "plane_figures" else world_of(names, args.facts)
    recipe = RECIPES[args.preset]
    naming = {"head": args.naming_head, "exponent": args.naming_exponent, "never": args.naming_never,
              "keep_generic": args.keep_generic}  # fmt: skip
    recipe = replace(
        recipe,
        clip=replace(recipe.clip, steps=args.clip_steps or recipe.clip.steps),
        vlm=replace(recipe.vlm, steps=args.vlm_steps or recipe.vlm.steps),
        naming=replace(recipe.naming, **{key: value for key, value in naming.items() if value is not None}),
    )
    out = args.out or OUTPUTS / benchmark.key / f"seed-{args.seed}" / "checkpoints"
    manifest = hashlib.sha256(find_manifest(benchmark, root).read_bytes()).hexdigest()
    return Training(tuple(examples), root, manifest, world, recipe, args.frequency, args.tokenizer, args.seed, out)


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
