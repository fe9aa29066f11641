"""Write generated stand-in pictures for the four benchmarks: coloured figures under real class names.

    python scripts/make_pictures.py --out outputs/generated

They let the main job run where no photographs are at hand; nothing can be learned from them. Each picture depends on
(seed, benchmark, number) alone. Writes OUT/BENCHMARK.jsonl and OUT/BENCHMARK/NUMBER.jpg.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from vlmclassifier import cli
from vlmclassifier.benchmarks import PAPER_BENCHMARKS, class_names


@dataclass
class Args:
    out: Path
    """Folder for the manifests and pictures."""
    count: int = 50
    """Pictures per benchmark."""
    seed: int = 0
    """Seed of the figures and of the classes they stand for."""


def draw(rng: random.Random) -> Image.Image:
    """One picture: six figures of random kind, place and colour on a plain ground."""
    colour = lambda: tuple(rng.randrange(256) for _ in range(3))  # noqa: E731
    size = (rng.randrange(100, 300), rng.randrange(100, 300))
    image = Image.new("RGB", size, colour())
    pen = ImageDraw.Draw(image)
    for _ in range(6):
        x, y, width, height = (rng.randrange(side) for side in (*size, *size))
        figure = rng.choice([pen.ellipse, pen.rectangle, pen.rounded_rectangle])
        figure((x - width // 2, y - height // 2, x + width // 2, y + height // 2), fill=colour())
    return image


def main(args: Args) -> None:
    for benchmark in PAPER_BENCHMARKS.values():
        folder = args.out / benchmark.key
        folder.mkdir(parents=True, exist_ok=True)
        names, rows = class_names(benchmark), []
        for number in range(args.count):
            rng = random.Random(f"{args.seed}:{benchmark.key}:{number}")
            index = rng.randrange(len(names))
            file = folder / f"{number:04}.jpg"
            draw(rng).save(file)
            path = file.relative_to(args.out).as_posix()
            rows.append({"image": path, "label": names[index], "label_idx": index, "split": benchmark.test_split})
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (args.out / f"{benchmark.key}.jsonl").write_text(text, encoding="utf-8")
        print(f"{benchmark.title}: {args.count} pictures in {folder}")


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
