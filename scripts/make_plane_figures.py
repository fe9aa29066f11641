"""Draw PlaneFigures, the embedded benchmark: pictures of named curves and figures, with their manifest.

    python scripts/make_plane_figures.py --out outputs/plane_figures/seed-0/pictures
    python scripts/make_plane_figures.py --out figures224 --size 224 --train 0

Each picture depends on (seed, class, number) alone. Writes OUT/SPLIT/NUMBER/CLASS.png, OUT/contact_sheet.png and, when
all of them are there, OUT/plane_figures.jsonl. The same command again does nothing.
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
    """Folder for the manifest and the pictures."""
    train: int = 240
    """Pictures per class in the train split."""
    test: int = 20
    """Pictures per class in the test split."""
    seed: int = 0
    """Seed of the pictures; test pictures never share a number with train pictures."""
    size: int = 48
    """Side of a picture in pixels."""
    processes: int = 2
    """Processes that draw; the pictures do not depend on it."""


def main(args: Args) -> None:
    """Draw everything, then write the manifest."""
    cli.check_positive(test=args.test, size=args.size, processes=args.processes)
    if args.seed < 0 or args.train < 0:
        raise UserError(f"--seed {args.seed} and --train {args.train} must not be negative: give other numbers.")
    settings = {key: value for key, value in asdict(args).items() if key not in ("out", "processes")}
    manifest, record = args.out / "plane_figures.jsonl", args.out / "settings.json"
    if manifest.exists():
        if not record.exists() or json.loads(record.read_text(encoding="utf-8")) != settings:
            raise UserError(f"{args.out} holds pictures with other settings: choose another --out or move it away.")
        print(f"PlaneFigures: all pictures are in {args.out}")
        return

    from tqdm import tqdm

    from vlmclassifier.plane_figures.dataset import contact_sheet, draw_number, manifest_rows
    from vlmclassifier.plane_figures.figures import FIGURES

    args.out.mkdir(parents=True, exist_ok=True)
    counts = {"train": args.train, "test": args.test}
    total = sum(counts.values()) * len(FIGURES)
    with (
        tqdm(total=total, desc="PlaneFigures", unit="pic") as bar,
        ProcessPoolExecutor(args.processes, initializer=cli.end_with_parent) as pool,
    ):
        for split, count in counts.items():
            draw = partial(draw_number, args.out, split, seed=args.seed, size=args.size)
            for drawn in pool.map(draw, range(count)):
                bar.update(drawn)
    contact_sheet(args.seed).save(args.out / "contact_sheet.png")
    record.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    rows = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in manifest_rows(counts, args.seed, args.size))
    manifest.with_suffix(".part").write_text(rows, encoding="utf-8")
    manifest.with_suffix(".part").rename(manifest)
    print(f"Manifest: {manifest}; all classes at a glance: {args.out / 'contact_sheet.png'}")
    print(f"Next: python training_analysis/pretrain_mini.py --benchmark plane_figures --data-root {args.out}")


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
