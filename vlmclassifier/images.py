"""Opening images safely: upright RGB, a limit on the number of pixels, no files outside the data root; prefetching."""

import io
import math
import os
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from threading import Semaphore, Thread
from typing import TypeVar

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from vlmclassifier.paths import trusted_roots
from vlmclassifier.records import RowError, UserError, first_line

# Pillow warns above this many pixels and raises an error above twice as many; here the lower number is the limit.
MAX_PIXELS = 89_478_485
# Only formats for images: some of Pillow's other readers start external programs.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "JPEG2000")
SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jp2", ".j2k",
)  # fmt: skip
ROTATED_ORIENTATIONS = (5, 6, 7, 8)  # EXIF orientations that swap width and height
GREY_RANGES = (255, 4095, 65535)  # the largest value of 8, 12 and 16 bits
RESAMPLING_SLACK = 0.1
SKIPPED_PNG_CHUNKS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")  # texts and colour profiles, which do not change the pixels
BROKEN_REMEDY = "replace the file, remove its row, or add --skip-broken-images"
MAX_ASPECT = 20  # see `crop_elongated`
UNPROCESSABLE = (ValueError, TypeError, RuntimeError, ZeroDivisionError, LookupError)  # what processors raise

T = TypeVar("T")
U = TypeVar("U")


def open_image(path: str | Path, root: str | Path | None = None, row: str = "") -> Image.Image:
    """Open an image file as an upright RGB image.

    The EXIF rotation is applied (a malformed EXIF block is ignored), transparent images are composited over white, and
    CMYK, palette and grayscale images are converted; `_eight_bits` says how other ranges of grey are scaled. `root`:
    the folder that must contain the file, after symbolic links are resolved, unless one of paths.toml's trusted roots
    does. `row`: the manifest row of the path, for error messages.

    Raises UserError when the file is missing, outside `root`, too large, truncated or not an image.
    """
    source = f"{path} ({row})" if row else str(path)
    if root is not None:
        check_location(path, root, source)
    try:
        try:
            return _decode(path, source)
        except ValueError as error:
            if "Decompressed data too large" not in str(error):
                raise
            return _decode(_without_texts(path), source)
    except FileNotFoundError:
        raise UserError(f"{source} does not exist: check the data root and the image path in the manifest.") from None
    except Image.DecompressionBombError:
        raise UserError(f"{source} is too large to open safely: resize it or remove its row.") from None
    except UnidentifiedImageError:
        raise UserError(f"{source} is not an image in a supported format: {BROKEN_REMEDY}.") from None
    except (OSError, SyntaxError, ValueError) as error:  # the exceptions that Pillow raises for corrupt data
        raise UserError(f"{source} cannot be decoded ({error}): {BROKEN_REMEDY}.") from None


def as_images(images: object) -> list[Image.Image]:
    """A list of images from one image or path, or from a sequence of them. Raises UserError for anything else."""
    several = images if isinstance(images, list | tuple) else [images]
    found = []
    for one in several:
        if isinstance(one, str | Path):
            found.append(open_image(one))
        elif isinstance(one, Image.Image):
            found.append(_to_rgb(one, "image"))  # as from a file: transparency over white
        else:
            raise UserError(f"{type(one).__name__} is no image: give a path, a PIL image, or a list of them.")
    return found


def check_location(path: str | Path, root: str | Path, source: str) -> None:
    """Raise UserError for a file outside the data root and the trusted roots, after links are resolved."""
    target = Path(path).resolve()
    if any(target.is_relative_to(Path(trusted).resolve()) for trusted in (root, *trusted_roots())):
        return
    what = f"is a link to {target}, which is" if target != Path(os.path.abspath(path)) else "is"
    raise UserError(
        f"{source} {what} outside the data root {root}: add its folder to [trusted_roots] in paths.toml if you trust "
        "what lies there, move the image into the data root, or change --data-root."
    )


def image_size(path: str | Path) -> tuple[int, int] | None:
    """Width and height in pixels of the upright image, read from the file header; None if the header is unreadable.

    `open_image` reports what is wrong with such a file.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=FORMATS) as image:
                if image.format == "TIFF":  # Pillow turns TIFF images itself: the size is that of the upright image
                    return image.size
                if image.getexif().get(ExifTags.Base.Orientation, 1) in ROTATED_ORIENTATIONS:
                    return (image.height, image.width)
                return image.size
    except Exception:  # Pillow raises many exception types for a corrupt header or EXIF block
        return None


def image_sizes(paths: Sequence[str | Path]) -> list[tuple[int, int]]:
    """Widths and heights in pixels of the images whose headers can be read; unreadable files are left out."""
    with ThreadPoolExecutor(16) as pool:
        return [size for size in pool.map(image_size, paths) if size]


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # Pillow raises many exception types for a corrupt EXIF block, although the pixels are valid
        return image


def _decode(file: str | Path | io.BytesIO, source: str) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # malformed metadata, and Pillow's own warning about the size
        with Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UserError(
                    f"{source} has {image.width} x {image.height} pixels, more than the limit of {MAX_PIXELS:,}: "
                    "resize it or remove its row."
                )
            image.load()
            return _to_rgb(_upright(image), source)


def _without_texts(path: str | Path) -> io.BytesIO:
    """A PNG without texts and colour profiles: Pillow refuses a file with one above 1 MB."""
    data = Path(path).read_bytes()
    kept, place = [data[:8]], 8
    while place + 8 <= len(data):
        end = place + 12 + int.from_bytes(data[place : place + 4], "big")
        if data[place + 4 : place + 8] not in SKIPPED_PNG_CHUNKS:
            kept.append(data[place:end])
        place = end
    return io.BytesIO(b"".join(kept))


def crop_elongated(image: Image.Image) -> Image.Image:
    """The middle of an image whose longer side is more than MAX_ASPECT times the shorter; others unchanged.

    For transforms that resize the shorter side and then crop the centre: of 1 x 4000 pixels they would first make an
    image of 336 x 1,344,000. They show the same middle afterwards, up to the interpolation at its border.
    """
    width, height = image.size
    longest = MAX_ASPECT * min(image.size)
    if max(image.size) <= longest:
        return image
    left, top = max(0, width - longest) // 2, max(0, height - longest) // 2
    return image.crop((left, top, left + min(width, longest), top + min(height, longest)))


def pad_square(image: Image.Image, mean: Sequence[float]) -> Image.Image:
    """The image in the middle of a square of a colour (0 to 1 per channel): LLaVA's own code pads with the mean."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), tuple(int(255 * value) for value in mean))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def random_crop(image: Image.Image, key: str, smallest: float = 0.5) -> Image.Image:
    """A random part of an image, at least `smallest` of its area, and flipped or not; decided by the key alone.

    As in the training of BLIP-2 in the reference code; the model's processor resizes it.
    """
    rng = random.Random(key)
    width, height = image.size
    area, ratio = rng.uniform(smallest, 1), math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    crop_width = min(width, max(1, round(math.sqrt(width * height * area * ratio))))
    crop_height = min(height, max(1, round(math.sqrt(width * height * area / ratio))))
    left, top = rng.randint(0, width - crop_width), rng.randint(0, height - crop_height)
    image = image.crop((left, top, left + crop_width, top + crop_height))
    return ImageOps.mirror(image) if rng.random() < 0.5 else image


def check_each(images: Sequence[Image.Image], process: Callable[[int], object]) -> None:
    """Raise RowError for the first image that a model's processor refuses; `process(row)` processes one alone."""
    for row, image in enumerate(images):
        try:
            process(row)
        except UNPROCESSABLE as error:
            raise RowError(
                f"{{image}} with {image.width} x {image.height} pixels is refused by the model's image processor "
                f"({first_line(error)}): crop or replace the image, or remove its row.",
                row,
            ) from None


def _eight_bits(image: Image.Image, source: str) -> Image.Image:
    """A grey image of integers or floats as 8 bits.

    The range is not stored reliably, so it is that of the data: floats up to 1 are scaled from 0 to 1, other numbers
    from 0 to the smallest of 8, 12 and 16 bits that holds them. Raises UserError for numbers outside of all of these.
    """
    import numpy as np

    values = np.asarray(image.convert("F") if image.mode == "F" else image.convert("I"), dtype=np.float64)
    low, high = float(values.min()), float(values.max())
    ranges = (1, *GREY_RANGES) if image.mode == "F" else GREY_RANGES
    slack = RESAMPLING_SLACK if image.mode == "F" else 0  # what an interpolation overshoots, as a share of the range
    top = next((top for top in ranges if high <= (1 + slack) * top), None)
    if not math.isfinite(low) or top is None or low < -slack * top:
        raise UserError(
            f"{source} has grey values from {low:g} to {high:g}, which are neither 0 to 1 nor of 8 to 16 bits: convert "
            "it to 8 bits or remove its row."
        )
    return Image.fromarray(np.round(values * (255 / top)).clip(0, 255).astype(np.uint8))


def _to_rgb(image: Image.Image, source: str) -> Image.Image:
    if image.mode.startswith(("I", "F")):  # `convert` to 8 bits would clip at 255
        image = _eight_bits(image, source)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def prefetch(items: Iterator[T], load: Callable[[T], U]) -> Iterator[tuple[T, U]]:
    """Yield (item, load(item)) while a background thread loads the next item.

    `items` is also advanced in that thread, one item ahead of the caller, so an iterator that blocks does not delay
    the item that the caller is processing. The thread is a daemon: an error in the caller ends the process even while
    `items` blocks. Exceptions of `items` and `load` are raised in the caller's thread.
    """
    loaded: Queue = Queue()
    free_slots = Semaphore(1)
    end = object()

    def fill_queue() -> None:
        try:
            while True:
                free_slots.acquire()
                item = next(items, end)
                if item is end:
                    loaded.put(None)
                    return
                loaded.put((item, load(item)))
        except BaseException as error:
            loaded.put(error)

    Thread(target=fill_queue, daemon=True).start()
    while True:
        entry = loaded.get()
        if entry is None:
            return
        if isinstance(entry, BaseException):
            raise entry
        free_slots.release()
        yield entry
