"""Write generated stand-in images for the paper's four benchmarks: coloured figures under real class names.

    python scripts/make_images.py --out outputs/generated
    python scripts/make_images.py --out pictures --classes fox "sea lion" heron --count 12

They let the main job run where no real images are at hand; nothing can be learnt from them. Each image depends on
(seed, benchmark, number) alone. Writes OUT/BENCHMARK.jsonl and OUT/BENCHMARK/NUMBER.jpg; with --classes folders of
images as one has them oneself, OUT/CLASS/NUMBER.jpg.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

from vlmclassifier import cli
from vlmclassifier.benchmarks import PAPER_BENCHMARKS, class_names
from vlmclassifier.generated_images import generated_image


@dataclass
class Args:
    out: Path
    """Folder for the manifests and images."""
    count: int = 50
    """Images per benchmark, or per class with --classes."""
    classes: tuple[str, ...] = ()
    """Names of classes of your own, instead of the benchmarks."""
    seed: int = 0
    """Seed of the figures and of the classes they stand for."""


def main(args: Args) -> None:
    """Write the images and manifests."""
    cli.check_positive(count=args.count)
    for name in args.classes:
        folder = args.out / name
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(args.count):
            generated_image(random.Random(f"{args.seed}:{name}:{number}")).save(folder / f"{number:04}.jpg")
    if args.classes:
        print(f"{len(args.classes)} folders of {args.count} images in {args.out}\n"
              f"Next: python scripts/prepare_data.py NAME --folder {args.out}")  # fmt: skip
        return
    for benchmark in PAPER_BENCHMARKS.values():
        folder = args.out / benchmark.key
        folder.mkdir(parents=True, exist_ok=True)
        names, rows = class_names(benchmark), []
        for number in range(args.count):
            rng = random.Random(f"{args.seed}:{benchmark.key}:{number}")
            index = rng.randrange(len(names))
            file = folder / f"{number:04}.jpg"
            generated_image(rng).save(file)
            path = file.relative_to(args.out).as_posix()
            rows.append({"image": path, "label": names[index], "label_idx": index, "split": benchmark.test_split})
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (args.out / f"{benchmark.key}.jsonl").write_text(text, encoding="utf-8")
        print(f"{benchmark.title}: {args.count} images in {folder}")
    print(f"Next: python main_results/classify_clip.py --benchmark flowers --data-root {args.out}")


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
