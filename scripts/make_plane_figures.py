"""Draw PlaneFigures, the embedded data set: images of named curves and figures, with their manifest.

    python scripts/make_plane_figures.py --out outputs/plane_figures/seed-0/images
    python scripts/make_plane_figures.py --out figures224 --size 224 --train 0

Each image depends only on (seed, class, number). Writes OUT/SPLIT/NUMBER/CLASS.png, OUT/contact_sheet.png and, after
all images, OUT/plane_figures.jsonl. The same command again does nothing.
"""

import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from vlmclassifier import cli
from vlmclassifier.records import UserError


@dataclass
class Args:
    out: Path
    """Folder for the manifest and the images."""
    train: int = 240
    """Images per class in the train split."""
    test: int = 20
    """Images per class in the test split."""
    seed: int = 0
    """Seed of the images; test images never share a number with train images."""
    size: int = 48
    """Side of an image in pixels."""
    processes: int = 2
    """Processes that draw in parallel; the images do not depend on it."""


def main(args: Args) -> None:
    """Draw all images, then write the manifest."""
    cli.check_positive(test=args.test, size=args.size, processes=args.processes)
    if args.seed < 0 or args.train < 0:
        raise UserError(f"--seed {args.seed} and --train {args.train} must not be negative: give other numbers.")
    settings = asdict(args)
    for name in ("out", "processes"):  # these do not change the images
        del settings[name]
    manifest, settings_file = args.out / "plane_figures.jsonl", args.out / "settings.json"
    if manifest.exists():
        if not settings_file.exists() or json.loads(settings_file.read_text(encoding="utf-8")) != settings:
            raise UserError(f"{args.out} contains images with other settings: choose another --out or move it away.")
        print(f"PlaneFigures: all images are in {args.out}")
        return

    from tqdm import tqdm

    from vlmclassifier.plane_figures.dataset import contact_sheet, draw_images, manifest_rows
    from vlmclassifier.plane_figures.figures import FIGURES

    args.out.mkdir(parents=True, exist_ok=True)
    counts = {"train": args.train, "test": args.test}
    total = sum(counts.values()) * len(FIGURES)
    with (
        tqdm(total=total, desc="PlaneFigures", unit="img") as bar,
        ProcessPoolExecutor(args.processes, initializer=cli.end_with_parent) as pool,
    ):
        for split, count in counts.items():
            draw = partial(draw_images, args.out, split, seed=args.seed, size=args.size)
            for image_count in pool.map(draw, range(count)):
                bar.update(image_count)
    contact_sheet(args.seed).save(args.out / "contact_sheet.png")
    settings_file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    unfinished = manifest.with_suffix(".part")
    with open(unfinished, "w", encoding="utf-8") as stream:
        for row in manifest_rows(counts, args.seed, args.size):
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
    unfinished.rename(manifest)
    print(f"Manifest: {manifest}; one image of every class: {args.out / 'contact_sheet.png'}")
    print(f"Next: python training_analysis/pretrain_mini.py --benchmark plane_figures --data-root {args.out}")


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
