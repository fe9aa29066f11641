"""Open a photograph safely: orientation, modes, bombs, and nothing outside the data root."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from threading import Semaphore, Thread
from typing import TypeVar

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from vlmclassifier.records import UserError

# Pillow warns above this many pixels and refuses above twice as many; here the warning is the limit.
MAX_PIXELS = 89_478_485
# Formats of photographs only: some of Pillow's other readers start external programs.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")

T = TypeVar("T")
U = TypeVar("U")


def open_image(path: str | Path, root: str | Path | None = None, row: str = "") -> Image.Image:
    """Open a picture as upright RGB.

    EXIF rotation is applied (a malformed EXIF block is ignored), transparency is laid over white, CMYK, palette,
    16-bit and grey pictures are converted. `root`: refuse a file that lies, links followed, outside this folder.
    `row`: where the path came from, for the error. Raises UserError for anything that is not a whole picture.
    """
    where = f"{path} ({row})" if row else str(path)
    if root is not None and not Path(path).resolve().is_relative_to(Path(root).resolve()):
        raise UserError(f"{where} lies outside the data root {root}: move the picture below it or set --data-root.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # malformed metadata and Pillow's own warning about size
            with Image.open(path, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise UserError(
                        f"{where} has {image.width} x {image.height} pixels, more than the limit of {MAX_PIXELS:,}: "
                        "shrink it or remove its row."
                    )
                image.load()
                return _to_rgb(_upright(image))
    except FileNotFoundError:
        raise UserError(f"{where} does not exist: check the data root and the manifest's image path.") from None
    except Image.DecompressionBombError:
        raise UserError(f"{where} is too large to open safely: shrink it or remove its row.") from None
    except UnidentifiedImageError:
        raise UserError(f"{where} is not a picture in a known format: replace it or remove its row.") from None
    except (OSError, SyntaxError, ValueError) as error:  # Pillow's words for broken data
        raise UserError(f"{where} cannot be decoded ({error}): replace the file or remove its row.") from None


def image_size(path: str | Path) -> tuple[int, int] | None:
    """Width and height of the upright picture from the file's head alone; None where it cannot be read.

    `open_image` says what is wrong with such a file.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=FORMATS) as image:
                turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
                return (image.height, image.width) if turned else image.size
    except Exception:  # Pillow raises many kinds on a broken head or EXIF block
        return None


def image_sizes(paths: Sequence[str | Path]) -> list[tuple[int, int]]:
    """Widths and heights of those pictures whose heads can be read."""
    with ThreadPoolExecutor(16) as pool:
        return [size for size in pool.map(image_size, paths) if size]


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # Pillow raises many kinds on a broken EXIF block, which says nothing about the pixels
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: `convert` to 8 bits would clip at 255
        image = image.convert("I").point(lambda value: value / 256).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def prefetch(items: Iterator[T], load: Callable[[T], U]) -> Iterator[tuple[T, U]]:
    """Yield (item, load(item)) while a background thread already loads the next.

    `items` is advanced in that thread too, one ahead of the caller, so an iterator that waits does not hold up the work
    in hand. The thread is a daemon: an error in the caller ends the process even while `items` waits.
    """
    ready: Queue = Queue()
    ahead = Semaphore(1)

    def fill() -> None:
        try:
            while ahead.acquire() and (item := next(items, ready)) is not ready:
                ready.put((item, load(item)))
            ready.put(None)
        except BaseException as error:  # raised again in the caller's thread
            ready.put(error)

    Thread(target=fill, daemon=True).start()
    while (got := ready.get()) is not None:
        if isinstance(got, BaseException):
            raise got
        ahead.release()
        yield got
