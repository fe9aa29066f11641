"""Opening images safely: upright RGB, a limit on the number of pixels, no files outside the data root; prefetching."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from threading import Semaphore, Thread
from typing import TypeVar

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from vlmclassifier.records import UserError

# Pillow warns above this many pixels and raises an error above twice as many; here the lower number is the limit.
MAX_PIXELS = 89_478_485
# Only formats for images: some of Pillow's other readers start external programs.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
ROTATED_ORIENTATIONS = (5, 6, 7, 8)  # EXIF orientations that swap width and height

T = TypeVar("T")
U = TypeVar("U")


def open_image(path: str | Path, root: str | Path | None = None, row: str = "") -> Image.Image:
    """Open an image file as an upright RGB image.

    The EXIF rotation is applied (a malformed EXIF block is ignored), transparent images are composited over white, and
    CMYK, palette, 16-bit and grayscale images are converted. `root`: the folder that must contain the file, after
    symbolic links are resolved. `row`: the manifest row of the path, for error messages.

    Raises UserError when the file is missing, outside `root`, too large, truncated or not an image.
    """
    source = f"{path} ({row})" if row else str(path)
    if root is not None and not Path(path).resolve().is_relative_to(Path(root).resolve()):
        raise UserError(f"{source} is outside the data root {root}: move the image into it or change --data-root.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # malformed metadata, and Pillow's own warning about the size
            with Image.open(path, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise UserError(
                        f"{source} has {image.width} x {image.height} pixels, more than the limit of {MAX_PIXELS:,}: "
                        "resize it or remove its row."
                    )
                image.load()
                return _to_rgb(_upright(image))
    except FileNotFoundError:
        raise UserError(f"{source} does not exist: check the data root and the image path in the manifest.") from None
    except Image.DecompressionBombError:
        raise UserError(f"{source} is too large to open safely: resize it or remove its row.") from None
    except UnidentifiedImageError:
        raise UserError(f"{source} is not an image in a supported format: replace it or remove its row.") from None
    except (OSError, SyntaxError, ValueError) as error:  # the exceptions that Pillow raises for corrupt data
        raise UserError(f"{source} cannot be decoded ({error}): replace the file or remove its row.") from None


def image_size(path: str | Path) -> tuple[int, int] | None:
    """Width and height in pixels of the upright image, read from the file header; None if the header is unreadable.

    `open_image` reports what is wrong with such a file.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=FORMATS) as image:
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


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grayscale: `convert` to 8 bits would clip at 255
        image = image.convert("I").point(lambda value: value / 256).convert("L")
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
