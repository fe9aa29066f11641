"""Training pictures in memory: decoded once, kept as bytes; augmentation of batches."""

import hashlib
import math
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from vlmclassifier.cli import end_with_parent
from vlmclassifier.images import open_image
from vlmclassifier.records import Example

CHUNK = 256


def load_pixels(examples: Sequence[Example], root: Path, size: int, cache: Path) -> np.ndarray:
    """All pictures, squeezed to a square: uint8 [pictures, size, size, 3], decoded once and mapped from `cache`.

    Raises UserError for a picture that cannot be opened.
    """
    rows = "\n".join(f"{example.image} {Path(example.image).stat().st_mtime_ns}" for example in examples)
    file = cache / f"pixels-{size}-{hashlib.sha256(rows.encode()).hexdigest()[:12]}.npy"
    if not file.exists():
        cache.mkdir(parents=True, exist_ok=True)
        chunks = [examples[start : start + CHUNK] for start in range(0, len(examples), CHUNK)]
        with (
            ProcessPoolExecutor(2, initializer=end_with_parent) as pool,
            tqdm(total=len(examples), desc="decoding", unit="pic") as bar,
        ):
            parts = []
            for part in pool.map(partial(_decode, root=root, size=size), chunks):
                parts.append(part)
                bar.update(len(part))
        unfinished = file.with_suffix(".part.npy")
        np.save(unfinished, np.concatenate(parts))
        unfinished.rename(file)
    return np.load(file, mmap_mode="r")


def _decode(examples: Sequence[Example], root: Path, size: int) -> np.ndarray:
    images = [open_image(example.image, root, example.row) for example in examples]
    return np.stack([np.asarray(image.resize((size, size))) for image in images])  # bicubic


class Pictures:
    """Labelled pictures of one size, with the normalisation of the image processor."""

    def __init__(self, pixels: np.ndarray, labels: Sequence[int], mean: Sequence[float], std: Sequence[float]) -> None:
        self.pixels = torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2)  # [pictures, 3, size, size]
        self.labels = torch.tensor(labels)
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in (mean, std))

    def values(self, rows: Tensor | slice) -> Tensor:
        """Normalised pixel_values: [rows, 3, size, size]."""
        return ((self.pixels[rows].float() / 255 - self.mean) / self.std).contiguous()

    def split(self, share: float, seed: int) -> tuple[Tensor, Tensor]:
        """Rows to train on and rows held out: `share` of every class of at least three pictures, drawn by `seed`."""
        kept, held_out = [], []
        for label in self.labels.unique():
            rows = (self.labels == label).nonzero()[:, 0]
            rows = rows[torch.randperm(len(rows), generator=keyed_generator(f"split:{seed}:{int(label)}"))]
            count = max(1, round(share * len(rows))) if share and len(rows) > 2 else 0
            held_out.append(rows[:count])
            kept.append(rows[count:])
        return torch.cat(kept).sort().values, torch.cat(held_out).sort().values

    def order(self, rows: Tensor, count: int, balanced: bool, seed: int) -> Tensor:
        """`count` rows to train on one after the other: shuffled epochs, or drawn with weights count^-1/2 by class."""
        generator = keyed_generator(f"order:{seed}")
        if balanced:
            weights = torch.bincount(self.labels[rows])[self.labels[rows]].float() ** -0.5
            return rows[torch.multinomial(weights, count, replacement=True, generator=generator)]
        epochs = [torch.randperm(len(rows), generator=generator) for _ in range(math.ceil(count / len(rows)))]
        return rows[torch.cat(epochs)[:count]]


def keyed_generator(key: str) -> torch.Generator:
    """A generator for one purpose; torch itself would drop all but 32 bits of a composed number."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big"))


def augment(pixel_values: Tensor, generator: torch.Generator) -> Tensor:
    """Crop, flip, small rotation, colour and erasing, drawn for each picture: [pictures, 3, size, size]."""
    count, _, size, _ = pixel_values.shape

    def draw(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    scale, angle = draw(0.6, 1.0).sqrt(), draw(-0.2, 0.2)  # share of the area; radians
    flip = torch.where(draw(0, 1) < 0.5, -1.0, 1.0)
    matrix = torch.stack(
        [scale * angle.cos() * flip, -scale * angle.sin(), scale * angle.sin() * flip, scale * angle.cos()], dim=1
    ).view(count, 2, 2)
    shift = draw(-1, 1, 2) * (1 - scale)[:, None]
    grid = F.affine_grid(torch.cat([matrix, shift[..., None]], dim=2), list(pixel_values.shape), align_corners=False)
    out = F.grid_sample(pixel_values, grid, padding_mode="reflection", align_corners=False)
    out = out * draw(0.7, 1.3, 1, 1, 1) + draw(-0.3, 0.3, 3, 1, 1)
    place, side = draw(0, size, 2), draw(0, 0.35) * size * (draw(0, 1) < 0.5)
    index = torch.arange(size)
    inside = [(index >= (place[:, k] - side)[:, None]) & (index < (place[:, k])[:, None]) for k in (0, 1)]
    return out.masked_fill((inside[0][:, :, None] & inside[1][:, None, :])[:, None], 0.0)


def mix(pixel_values: Tensor, targets: Tensor, generator: torch.Generator, share: float = 0.4) -> tuple[Tensor, Tensor]:
    """MixUp or CutMix of some pictures with the next ones of the batch; targets [pictures, classes] are mixed alike."""
    count, _, size, _ = pixel_values.shape
    draw = torch.rand(3, count, generator=generator)
    chosen, cut, weight = draw[0] < share, draw[1] < 0.5, draw[2]  # weight: what the other picture contributes
    columns = torch.arange(size)[None] < (weight * size).round()[:, None]  # a strip from the left
    strip = columns[:, None, None, :].expand(-1, 1, size, -1).float()
    area = torch.where(cut, columns.float().mean(1), weight) * chosen
    mask = torch.where(cut[:, None, None, None], strip, weight[:, None, None, None]) * chosen[:, None, None, None]
    other, other_targets = pixel_values.roll(1, 0), targets.roll(1, 0)
    mixed = pixel_values * (1 - mask) + other * mask
    return mixed, targets * (1 - area)[:, None] + other_targets * area[:, None]
