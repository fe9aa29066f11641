"""Protects: every image opens upright and in RGB, and files that are not images are refused with a clear message."""

import json
import os
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from vlmclassifier.benchmarks import parse_row
from vlmclassifier.images import crop_elongated, image_size, open_image, prefetch
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


def test_a_link_to_a_trusted_root_is_followed(tmp_path, monkeypatch):
    """Images on a data disk that paths.toml trusts; the message of an untrusted one names the link and the remedy."""
    root, disk = tmp_path / "root", tmp_path / "disk"
    root.mkdir()
    disk.mkdir()
    Image.new("RGB", (4, 4)).save(disk / "a.png")
    os.symlink(disk / "a.png", root / "a.png")
    with pytest.raises(UserError, match=r"is a link to .*disk/a.png, which is outside .*\[trusted_roots\]"):
        open_image(root / "a.png", root)
    paths = tmp_path / "paths.toml"
    paths.write_text(f'[trusted_roots]\ndisk = "{disk}"\n')
    monkeypatch.setenv("VLMCLASSIFIER_PATHS", str(paths))
    assert open_image(root / "a.png", root).size == open_image(disk / "a.png", root).size == (4, 4)
    row = json.dumps({"image": str(disk / "a.png"), "label": "cat", "split": "test"})
    assert parse_row(row, "row 1", [disk])["image"] == str(disk / "a.png")
    with pytest.raises(UserError, match="leaves the data root"):
        parse_row(row, "row 1", [root])


def save_tiff(file, values, orientation=None):
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    Image.fromarray(values).save(file, exif=exif)


GREY = np.arange(64, dtype=np.float64).reshape(8, 8) * 4  # 0 to 252


@pytest.mark.parametrize(
    "values",
    [
        (GREY / 255).astype(np.float32),  # 0 to 1
        GREY.astype(np.float32),
        GREY.astype(np.int32),
        (GREY * 16).astype(np.uint16),  # 12 bits in 16
        (GREY * 257).astype(np.uint16),
        (GREY * 257).astype(np.int32),
    ],
    ids=["float 0 to 1", "float 0 to 255", "int32 0 to 255", "12 bits in 16", "16 bits", "int32 0 to 65535"],
)
def test_grey_values_of_every_range_look_alike(values, tmp_path):
    save_tiff(tmp_path / "a.tif", values)
    assert np.abs(np.asarray(open_image(tmp_path / "a.tif"))[..., 0] - GREY).max() <= 1


@pytest.mark.parametrize(
    "values", [GREY - 300, GREY * 1000, np.full((8, 8), np.inf)], ids=["negative", "large", "infinite"]
)
def test_grey_values_of_an_unknown_range_are_refused(values, tmp_path):
    save_tiff(tmp_path / "a.tif", values.astype(np.float32))
    with pytest.raises(UserError, match=r"a.tif \(m row 1\) has grey values from .* convert it to 8 bits"):
        open_image(tmp_path / "a.tif", None, "m row 1")


def test_floats_that_an_interpolation_has_overshot_keep_their_range(tmp_path):
    values = (GREY / 250).astype(np.float32)  # up to 1.008
    values[0, 0] = -0.01
    save_tiff(tmp_path / "a.tif", values)
    grey = np.asarray(open_image(tmp_path / "a.tif"))[..., 0]
    assert grey.max() == 255 and grey[0, 0] == 0 and grey[4, 0] == 131


def test_inputs_of_bug_reports_open(realdata):
    """The same photograph in forms that were black, or refused."""
    folder = realdata.parent / "bugs" / "images"
    plain = np.asarray(open_image(folder / "plain.jpg").convert("L"), dtype=float)
    for name in ("float_0_1.tif", "int32_0_255.tif", "12_bits_in_16.png"):
        grey = np.asarray(open_image(folder / name))[..., 0]
        assert np.abs(grey - plain).mean() < 4, name
    for name in ("avif_named.jpg", "photo.jfif", "photo.tif", "large_text_chunk.png"):
        assert open_image(folder / name).size == (160, 120)


def test_a_large_text_behind_the_pixels_is_skipped_too(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add(b"zTXt", b"note\0\0" + zlib.compress(b"x" * 2_000_000), after_idat=True)
    Image.new("RGB", (5, 4), (1, 2, 3)).save(tmp_path / "a.png", pnginfo=info)
    Image.new("RGB", (5, 4), (1, 2, 3)).save(tmp_path / "b.png", icc_profile=b"\0" * 2_000_000)
    for name in ("a.png", "b.png"):
        assert open_image(tmp_path / name).getpixel((0, 0)) == (1, 2, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["tif", "jpg"])
def test_image_size_is_that_of_the_opened_image(orientation, suffix, tmp_path):
    save_tiff(tmp_path / f"a.{suffix}", np.zeros((20, 40, 3), dtype=np.uint8), orientation)
    assert image_size(tmp_path / f"a.{suffix}") == open_image(tmp_path / f"a.{suffix}").size


def test_only_elongated_images_are_cropped_to_their_middle():
    image = Image.fromarray(np.arange(4000, dtype=np.float32)[None].repeat(2, axis=0))
    assert crop_elongated(image.crop((0, 0, 40, 2))).size == (40, 2)
    cropped = crop_elongated(image)
    assert cropped.size == (40, 2) and cropped.getpixel((0, 0)) == 1980
    assert crop_elongated(image.transpose(Image.Transpose.ROTATE_90)).size == (2, 40)


def test_prefetch_keeps_the_order_and_raises_errors_in_the_caller():
    assert list(prefetch(iter(range(20)), str)) == [(i, str(i)) for i in range(20)]
    with pytest.raises(ZeroDivisionError):
        list(prefetch(iter([1, 0, 2]), lambda value: 1 // value))
