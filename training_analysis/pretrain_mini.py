"""Train a mini CLIP, a tiny language model and a mini LLaVA on CLIP's frozen vision encoder, from scratch.

    python training_analysis/pretrain_mini.py --data-root outputs/plane_figures/seed-0/images
    python training_analysis/pretrain_mini.py --data-root outputs/plane_figures/seed-0/images --frequency uniform
    python training_analysis/pretrain_mini.py --benchmark my.jsonl --classes my.json --preset photos --minutes 10

The language model is trained on texts about all classes; --frequency sets how often the texts about images name each
class. Writes the checkpoints OUT/clip, OUT/lm and OUT/vlm (OUT/vlm-FREQUENCY for other frequencies than zipf), with
--stages blip a BLIP-2 on the same texts in OUT/blip, each with its training.json; the VLM's training texts in LLaVA's
format (OUT/vlm-texts); and the training curves (OUT/curves.png). A finished stage is not trained again. The same seed
gives the same weights. Only the train split is used, until --evaluate compares the models on the test split at the very
end.
"""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from vlmclassifier import cli
from vlmclassifier.arguments import BenchmarkName
from vlmclassifier.benchmarks import check_files, class_names, data_root, find_benchmark, find_manifest, load_examples
from vlmclassifier.mini.corpus import class_list_spec, plane_figures_spec
from vlmclassifier.mini.recipes import BLIP_RECIPES, RECIPES
from vlmclassifier.mini.reports import accuracy_table, draw_curves, test_examples
from vlmclassifier.mini.stages import STAGES, Training, train_blip, train_in_parallel, train_vlm
from vlmclassifier.mini.time_budget import fit_steps, read_fitted_steps
from vlmclassifier.paths import OUTPUTS
from vlmclassifier.records import UserError


@dataclass
class Args:
    benchmark: BenchmarkName = "plane_figures"
    classes: Path | None = None
    """Class list of your own manifest: a JSON array of names."""
    data_root: Path | None = None
    """Folder that the manifest's image paths start from; default: the entry in paths.toml, else the project."""
    preset: Literal["figures", "photos", "smoke"] = "figures"
    """figures: generated images, no augmentation; photos: few images, augmented; smoke: a few steps only."""
    stages: tuple[Literal["clip", "lm", "vlm", "blip"], ...] = ("clip", "lm", "vlm")
    """Stages to train; vlm (LLaVA) and blip (BLIP-2) need the first two."""
    frequency: str = "zipf"
    """How often texts name each class: zipf (ranks drawn by the seed), permuted (other ranks), uniform (always), or a
    FILE.json {class: share of its images}."""
    naming_head: float | None = None
    """zipf: share of the classes, the most frequent ones, that are always named; default: the preset's."""
    naming_exponent: float | None = None
    """zipf: exponent of the decrease of the naming share behind the head; default: the preset's."""
    naming_never: float | None = None
    """zipf: share of the classes, the rarest ones, that are never named; default: the preset's."""
    keep_generic: float | None = None
    """Share of the unnamed images that get a text with a generic word, not none at all; default: the preset's."""
    facts: Path | None = None
    """Facts about your own classes: JSON {class: [[question with {subject}, answer], ...]}."""
    tokenizer: Literal["words", "bpe"] = "words"
    """Tokens of the language model: one per word, or a subword vocabulary in which names span several tokens."""
    minutes: float | None = None
    """Approximate training time. It decides the number of steps by the speed of this machine; they are recorded."""
    clip_steps: int | None = None
    """Steps of CLIP; default: the preset's."""
    vlm_steps: int | None = None
    """Steps of the VLM's second stage; default: the preset's."""
    seed: int = 0
    """Seed of weights, batches, frequency ranks and texts."""
    evaluate: bool = True
    """At the end print the accuracy on the test split: CLIP, VLM, and as a baseline a linear probe on 16x16 pixels."""
    out: Path | None = None
    """Folder of the checkpoints; default: outputs/BENCHMARK/seed-SEED/checkpoints."""


def main(args: Args) -> None:
    """Check the arguments, train what is not trained yet, draw the curves, compare the models."""
    check_arguments(args)
    training = build_training(args)
    # Errors in the frequencies or in the test split must not appear after minutes of training.
    if {"vlm", "blip"} & {*args.stages}:
        training.label_assignment()
    if args.evaluate:
        test_examples(training, args.benchmark, args.classes)
    fitted_training = read_fitted_steps(training, args.minutes) if args.minutes else None
    if fitted_training is not None:
        training = fitted_training
    pending = [stage for stage in (*STAGES, "blip") if stage in args.stages and not training.finished(stage)]
    if {"vlm", "blip"} & {*pending}:
        for needed in ("clip", "lm"):
            if needed not in args.stages and not training.finished(needed):
                raise UserError(f"{training.folder(needed)} does not exist: add {needed} to --stages.")

    if pending and args.minutes and fitted_training is None:
        training = fit_steps(training, args.minutes)
    train_in_parallel(training, [stage for stage in pending if stage in ("clip", "lm")])
    if "vlm" in pending:
        train_vlm(training)
    if "blip" in pending:
        train_blip(training)

    curves = draw_curves(training.out)
    for stage in args.stages:
        print(f"{stage}: {training.folder(stage)}")
    print(f"Training curves: {curves}")
    if args.evaluate and "vlm" in args.stages:
        print(accuracy_table(training, args.benchmark, args.classes))
    classes = f" --classes {args.classes}" if args.classes else ""
    print(
        f"Next: python main_results/classify_vlm.py --model mini-llava --weights {training.folder('vlm')} "
        f"--benchmark {args.benchmark}{classes} --data-root {training.root}"
    )


def check_arguments(args: Args) -> None:
    """Raise UserError for numbers out of range and for arguments that exclude each other."""
    cli.check_positive(clip_steps=args.clip_steps, vlm_steps=args.vlm_steps)
    at_most = {"naming_head": 1, "naming_exponent": 100, "naming_never": 1, "keep_generic": 1, "minutes": 10**6}
    for name, largest in at_most.items():
        value = getattr(args, name)
        if value is None:
            continue
        is_allowed_zero = value == 0 and name != "minutes"
        if not (0 < value <= largest or is_allowed_zero):
            raise UserError(f"--{name.replace('_', '-')} {value:g} is outside 0 to {largest}: give another number.")
    if args.minutes is not None and "blip" in args.stages:
        raise UserError("--minutes counts the stages clip, lm and vlm: train blip afterwards, without --minutes.")
    if args.seed < 0:
        raise UserError(f"--seed {args.seed} is negative: give another number.")
    if args.minutes is not None and (args.clip_steps or args.vlm_steps):
        raise UserError("--minutes decides the steps: leave out --clip-steps and --vlm-steps, or leave out --minutes.")


def build_training(args: Args) -> Training:
    """Return the inputs of all stages: the train split, the corpus of its classes, the recipe."""
    benchmark = find_benchmark(args.benchmark, args.classes)
    names, root = class_names(benchmark), data_root(benchmark, args.data_root)
    examples = load_examples(benchmark, names, root, "train")
    check_files(examples)
    corpus = plane_figures_spec() if args.benchmark == "plane_figures" else class_list_spec(names, args.facts)
    recipe = RECIPES[args.preset]
    naming = {"head": args.naming_head, "exponent": args.naming_exponent, "never": args.naming_never,
              "keep_generic": args.keep_generic}  # fmt: skip
    given_naming = {field: value for field, value in naming.items() if value is not None}
    recipe = replace(
        recipe,
        clip=replace(recipe.clip, steps=args.clip_steps or recipe.clip.steps),
        vlm=replace(recipe.vlm, steps=args.vlm_steps or recipe.vlm.steps),
        naming=replace(recipe.naming, **given_naming),
    )
    out = args.out or OUTPUTS / benchmark.key / f"seed-{args.seed}" / "checkpoints"
    manifest = hashlib.sha256(find_manifest(benchmark, root).read_bytes()).hexdigest()
    return Training(tuple(examples), root, manifest, corpus, recipe, args.frequency, args.tokenizer, args.seed, out,
                    BLIP_RECIPES[args.preset])  # fmt: skip


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
