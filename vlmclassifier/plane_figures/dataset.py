"""PlaneFigures as a benchmark on disk: pictures, manifest, contact sheet."""

import re
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from vlmclassifier.plane_figures.figures import FIGURES
from vlmclassifier.plane_figures.rendering import SIZE, render

# Where each split's picture numbers begin: no two splits share a picture, whatever their sizes.
FIRST = {"train": 0, "valid": 1_000_000, "test": 2_000_000}


def picture_path(split: str, name: str, number: int) -> str:
    """Path of a picture below the data root: ASCII, the same on every file system."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return f"{split}/{number:04}/{re.sub('[^A-Za-z0-9]+', '_', plain)}.png"


def manifest_rows(counts: Mapping[str, int], seed: int, size: int = SIZE) -> Iterator[dict]:
    """Rows of a manifest with `counts[split]` pictures per class; seed and size tell manifests apart."""
    for split, count in counts.items():
        for number in range(count):
            for name in FIGURES:
                yield {
                    "image": picture_path(split, name, number),
                    "label": name,
                    "split": split,
                    "seed": seed,
                    "size": size,
                }


def draw_number(root: Path, split: str, number: int, seed: int, size: int = SIZE) -> int:
    """Write the pictures `number` of all classes of a split; return how many."""
    for name in FIGURES:
        file = root / picture_path(split, name, number)
        file.parent.mkdir(parents=True, exist_ok=True)
        render(name, seed, FIRST[split] + number, size).save(file, compress_level=0)  # noise does not compress
    return len(FIGURES)


def contact_sheet(seed: int, columns: int = 12, size: int = 96) -> Image.Image:
    """One picture of every class with its name below."""
    import matplotlib

    height, rows = size + 26, -(-len(FIGURES) // columns)
    sheet = Image.new("RGB", (columns * (size + 8) + 8, rows * height + 8), "white")
    # Pillow's own font lacks the letters of Lévy and Sierpiński; matplotlib brings one that has them.
    font_file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    pen, font = ImageDraw.Draw(sheet), ImageFont.truetype(str(font_file), 9)
    for place, name in enumerate(FIGURES):
        x, y = 8 + place % columns * (size + 8), 8 + place // columns * height
        sheet.paste(render(name, seed, FIRST["valid"], size), (x, y))
        words, lines = name.split(), [""]
        for word in words:
            longer = f"{lines[-1]} {word}".strip()
            if pen.textlength(longer, font) > size and lines[-1]:
                lines.append(word)
            else:
                lines[-1] = longer
        for number, line in enumerate(lines):
            pen.text((x + size / 2, y + size + 11 * number), line, fill="black", font=font, anchor="ma")
    return sheet
