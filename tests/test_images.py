"""Protects: every image opens upright and in RGB, and files that are not images are refused with a clear message."""

import json
import os
import zlib

import numpy as np
import pytest
from PIL import Image

from vlmclassifier.images import open_image, prefetch
from vlmclassifier.records import UserError


def test_unusual_files_open_upright(realdata):
    rows = [json.loads(line) for line in (realdata / "odd" / "odd.jsonl").read_text().splitlines()]
    assert len(rows) == 18
    for row in rows:
        image = open_image(realdata / row["file"], realdata)
        size = tuple(row["size"])
        if row["exif_orientation"] in (5, 6, 7, 8):
            size = size[::-1]
        assert (image.mode, image.size) == ("RGB", size), row["file"]
        assert np.asarray(image).std() > 5, row["file"]  # the pixels are decoded, not blank


def test_images_of_all_benchmarks_open(realdata):
    for benchmark in ("imagenet", "flowers", "cars", "caltech"):
        for line in (realdata / f"{benchmark}.jsonl").read_text().splitlines()[::25]:
            assert open_image(realdata / json.loads(line)["image"], realdata).mode == "RGB"


def test_exif_rotation_is_applied(tmp_path):
    image = Image.new("RGB", (40, 20), "red")
    image.paste("blue", (0, 0, 20, 20))  # left half blue
    exif = Image.Exif()
    exif[0x0112] = 6  # to be rotated by 90 degrees clockwise: left becomes top
    image.save(tmp_path / "a.png", exif=exif)
    upright = open_image(tmp_path / "a.png")
    assert upright.size == (20, 40)
    assert upright.getpixel((10, 5)) == (0, 0, 255) and upright.getpixel((10, 35)) == (255, 0, 0)


def test_transparent_images_are_composited_over_white(tmp_path):
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "a.png")
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    palette.save(tmp_path / "p.png", transparency=0)
    for name in ("a.png", "p.png"):
        assert open_image(tmp_path / name).getpixel((1, 1)) == (255, 255, 255)


def test_16_bit_grayscale_keeps_its_range(tmp_path):
    values = np.array([[0, 32768], [65535, 256]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    Image.frombytes("I;16B", (2, 2), values.astype(">u2").tobytes()).save(tmp_path / "b.tif")
    assert np.asarray(open_image(tmp_path / "b.tif"))[..., 0].tolist() == [[0, 128], [255, 1]]
    assert np.asarray(open_image(tmp_path / "a.png"))[..., 0].tolist() == [[0, 128], [255, 1]]


def _png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    size = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size + b"\x08\x02\0\0\0") + chunk(b"IDAT", zlib.compress(b"\0" * 99))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bomb.png", _png_header(10_000, 10_000), "more than the limit"),
        ("huge.png", _png_header(30_000, 30_000), "too large"),
        ("truncated.png", _png_header(300, 300), "cannot be decoded"),
        ("text.jpg", b"this is not an image", "not an image"),
        ("empty.jpg", b"", "not an image"),
        ("drawing.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "not an image"),
        ("missing.jpg", None, "does not exist"),
        ("folder.jpg", "folder", "directory"),
    ],
)
def test_files_that_are_not_images_are_refused(tmp_path, name, content, message):
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif content == "folder":
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=message) as error:
        open_image(tmp_path / name, tmp_path, "my.jsonl row 7")
    assert name in str(error.value) and "my.jsonl row 7" in str(error.value)


def test_a_truncated_jpeg_is_refused(tmp_path):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (200, 200, 3), dtype=np.uint8)).save(tmp_path / "a.jpg")
    data = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="truncated"):
        open_image(tmp_path / "a.jpg")


def test_symbolic_links_to_files_outside_the_root_are_refused(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside.png"
    root.mkdir()
    Image.new("RGB", (4, 4)).save(outside)
    os.symlink(outside, root / "a.png")
    Image.new("RGB", (4, 4)).save(root / "b.png")
    os.symlink(root / "b.png", root / "c.png")
    with pytest.raises(UserError, match="outside the data root"):
        open_image(root / "a.png", root)
    assert open_image(root / "c.png", root).size == (4, 4)


def test_prefetch_keeps_the_order_and_raises_errors_in_the_caller():
    assert list(prefetch(iter(range(20)), str)) == [(i, str(i)) for i in range(20)]
    with pytest.raises(ZeroDivisionError):
        list(prefetch(iter([1, 0, 2]), lambda value: 1 // value))
