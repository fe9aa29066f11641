"""PlaneFigures as files: images, manifest, contact sheet."""

import re
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from vlmclassifier.plane_figures.figures import FIGURES
from vlmclassifier.plane_figures.rendering import SIZE, render

# The index of each split's first image. The distances are so large that no two splits share an image.
FIRST_INDEX = {"train": 0, "valid": 1_000_000, "test": 2_000_000}


def image_path(split: str, name: str, number: int) -> str:
    """Return the path of an image below the data root, in ASCII so that it is the same on every file system."""
    ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return f"{split}/{number:04}/{re.sub('[^A-Za-z0-9]+', '_', ascii_name)}.png"


def manifest_rows(counts: Mapping[str, int], seed: int, size: int = SIZE) -> Iterator[dict]:
    """Yield the rows of a manifest with `counts[split]` images per class.

    Seed and size are in every row so that manifests of other images have another hash.
    """
    for split, count in counts.items():
        for number in range(count):
            for name in FIGURES:
                yield {
                    "image": image_path(split, name, number),
                    "label": name,
                    "split": split,
                    "seed": seed,
                    "size": size,
                }


def draw_images(root: Path, split: str, number: int, seed: int, size: int = SIZE) -> int:
    """Write image `number` of every class of a split and return how many images these are."""
    for name in FIGURES:
        file = root / image_path(split, name, number)
        file.parent.mkdir(parents=True, exist_ok=True)
        render(name, seed, FIRST_INDEX[split] + number, size).save(file, compress_level=0)  # noise does not compress
    return len(FIGURES)


def contact_sheet(seed: int, columns: int = 12, size: int = 96) -> Image.Image:
    """Return a grid with one image of every class and its name below it. `size`: side of an image in pixels."""
    import matplotlib

    height, rows = size + 26, -(-len(FIGURES) // columns)
    sheet = Image.new("RGB", (columns * (size + 8) + 8, rows * height + 8), "white")
    # Pillow's own font lacks letters of Lévy and Sierpiński; a font of matplotlib has them.
    font_file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    draw, font = ImageDraw.Draw(sheet), ImageFont.truetype(str(font_file), 9)
    for number, name in enumerate(FIGURES):
        x, y = 8 + number % columns * (size + 8), 8 + number // columns * height
        sheet.paste(render(name, seed, FIRST_INDEX["valid"], size), (x, y))
        lines = [""]
        for word in name.split():
            longer_line = f"{lines[-1]} {word}".strip()
            if draw.textlength(longer_line, font) > size and lines[-1]:
                lines.append(word)
            else:
                lines[-1] = longer_line
        for line_number, line in enumerate(lines):
            draw.text((x + size / 2, y + size + 11 * line_number), line, fill="black", font=font, anchor="ma")
    return sheet
