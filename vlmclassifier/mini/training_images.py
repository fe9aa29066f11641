"""Training images in memory: decoded once and kept as bytes; augmentation of batches."""

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

CHUNK = 256  # images that a process decodes at a time


def load_pixels(examples: Sequence[Example], root: Path, size: int, cache: Path) -> np.ndarray:
    """Return all images as uint8 [images, size, size, 3], resized to squares without keeping the aspect ratio.

    The images are decoded once; later calls map the array from a file in the folder `cache`.
    Raises UserError for an image that cannot be opened.
    """
    key = "\n".join(f"{example.image} {Path(example.image).stat().st_mtime_ns}" for example in examples)
    file = cache / f"pixels-{size}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.npy"
    if not file.exists():
        cache.mkdir(parents=True, exist_ok=True)
        chunks = [examples[start : start + CHUNK] for start in range(0, len(examples), CHUNK)]
        decode = partial(_decode, root=root, size=size)
        decoded = []
        with (
            ProcessPoolExecutor(2, initializer=end_with_parent) as pool,
            tqdm(total=len(examples), desc="decoding", unit="img") as bar,
        ):
            for chunk in pool.map(decode, chunks):
                decoded.append(chunk)
                bar.update(len(chunk))
        unfinished = file.with_suffix(".part.npy")
        np.save(unfinished, np.concatenate(decoded))
        unfinished.rename(file)
    return np.load(file, mmap_mode="r")


def _decode(examples: Sequence[Example], root: Path, size: int) -> np.ndarray:
    """Decode some images: uint8 [images, size, size, 3]."""
    pixels = []
    for example in examples:
        image = open_image(example.image, root, example.row)
        pixels.append(np.asarray(image.resize((size, size))))  # bicubic
    return np.stack(pixels)


class TrainingImages:
    """Labelled images of one size, with the mean and standard deviation of the image processor (one per channel)."""

    def __init__(self, pixels: np.ndarray, labels: Sequence[int], mean: Sequence[float], std: Sequence[float]) -> None:
        self.pixels = torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2)  # [images, 3, size, size]
        self.labels = torch.tensor(labels)
        self.mean = torch.tensor(mean)[:, None, None]
        self.std = torch.tensor(std)[:, None, None]

    def pixel_values(self, rows: Tensor | slice) -> Tensor:
        """Return the normalised pixels of some images: [rows, 3, size, size]."""
        return ((self.pixels[rows].float() / 255 - self.mean) / self.std).contiguous()

    def split(self, share: float, seed: int) -> tuple[Tensor, Tensor]:
        """Return the rows to train on and the rows held out.

        Held out is `share` of every class of at least three images, at least one image, drawn by `seed`.
        """
        train, held_out = [], []
        for label in self.labels.unique():
            rows = (self.labels == label).nonzero()[:, 0]
            rows = rows[torch.randperm(len(rows), generator=keyed_generator(f"split:{seed}:{int(label)}"))]
            count = max(1, round(share * len(rows))) if share and len(rows) > 2 else 0
            held_out.append(rows[:count])
            train.append(rows[count:])
        return torch.cat(train).sort().values, torch.cat(held_out).sort().values

    def training_order(self, rows: Tensor, count: int, balanced: bool, seed: int) -> Tensor:
        """Return `count` of the given rows in the order in which they are trained on.

        `balanced`: draw rows with weight (class size)^-1/2; otherwise shuffled epochs follow each other.
        """
        generator = keyed_generator(f"order:{seed}")
        if balanced:
            weights = torch.bincount(self.labels[rows])[self.labels[rows]].float() ** -0.5
            return rows[torch.multinomial(weights, count, replacement=True, generator=generator)]
        epochs = [torch.randperm(len(rows), generator=generator) for _ in range(math.ceil(count / len(rows)))]
        return rows[torch.cat(epochs)[:count]]


def keyed_generator(key: str) -> torch.Generator:
    """Return a random generator seeded by a hash of `key`, one for each purpose.

    A number composed of several seeds would not do: `manual_seed` keeps only 32 bits of it.
    """
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big"))


def augment(pixel_values: Tensor, generator: torch.Generator) -> Tensor:
    """Apply a random crop, flip, small rotation, colour change and erasing to each image: [images, 3, size, size]."""
    count, _, size, _ = pixel_values.shape

    def draw(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    # The order of the draws is part of the trained weights.
    scale = draw(0.6, 1.0).sqrt()  # the crop is 0.6 to 1 of the area
    angle = draw(-0.2, 0.2)  # radians
    flip = torch.where(draw(0, 1) < 0.5, -1.0, 1.0)
    matrix = torch.stack(
        [scale * angle.cos() * flip, -scale * angle.sin(), scale * angle.sin() * flip, scale * angle.cos()], dim=1
    ).view(count, 2, 2)
    shift = draw(-1, 1, 2) * (1 - scale)[:, None]
    grid = F.affine_grid(torch.cat([matrix, shift[..., None]], dim=2), list(pixel_values.shape), align_corners=False)
    out = F.grid_sample(pixel_values, grid, padding_mode="reflection", align_corners=False)
    out = out * draw(0.7, 1.3, 1, 1, 1) + draw(-0.3, 0.3, 3, 1, 1)
    corner = draw(0, size, 2)  # lower right corner of the erased square, in pixels
    side = draw(0, 0.35) * size * (draw(0, 1) < 0.5)  # half of the images keep everything
    erased = []
    for axis in (0, 1):
        end = corner[:, axis]
        index = torch.arange(size)
        erased.append((index >= (end - side)[:, None]) & (index < end[:, None]))  # [images, size]
    erased_rows, erased_columns = erased
    return out.masked_fill((erased_rows[:, :, None] & erased_columns[:, None, :])[:, None], 0.0)


def mix(pixel_values: Tensor, targets: Tensor, generator: torch.Generator, share: float = 0.4) -> tuple[Tensor, Tensor]:
    """Mix a share of the images with the previous image of the batch, by MixUp or CutMix with equal probability.

    `pixel_values`: [images, 3, size, size]; `targets`: [images, classes], mixed in the same proportions.
    """
    count, _, size, _ = pixel_values.shape
    draw = torch.rand(3, count, generator=generator)
    is_mixed, is_cutmix = draw[0] < share, draw[1] < 0.5
    weight = draw[2]  # of the other image
    columns = torch.arange(size)[None] < (weight * size).round()[:, None]  # CutMix replaces a strip from the left
    strip = columns[:, None, None, :].expand(-1, 1, size, -1).float()
    target_weight = torch.where(is_cutmix, columns.float().mean(1), weight) * is_mixed
    mask = torch.where(is_cutmix[:, None, None, None], strip, weight[:, None, None, None])
    mask = mask * is_mixed[:, None, None, None]
    other, other_targets = pixel_values.roll(1, 0), targets.roll(1, 0)
    mixed = pixel_values * (1 - mask) + other * mask
    return mixed, targets * (1 - target_weight)[:, None] + other_targets * target_weight[:, None]
