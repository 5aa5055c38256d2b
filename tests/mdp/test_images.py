"""What pictures become, and which are refused by name."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from rllava_core.errors import DataError
from rllava_core.mdp.images import MAX_PIXELS, Image, ImageFile


def encode(picture: PIL.Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def gradient(width: int = 32, height: int = 24) -> PIL.Image.Image:
    rows, columns = np.mgrid[0:height, 0:width]
    return PIL.Image.fromarray(np.stack([rows * 8, columns * 7, rows + columns], axis=2).astype(np.uint8))


def write(folder: Path, content: bytes, name: str = "picture.png") -> ImageFile:
    path = folder / name
    path.write_bytes(content)
    return ImageFile(path, source="train.jsonl:12")


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has next to no data behind it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def test_a_good_file_keeps_its_pixels(tmp_path: Path) -> None:
    image = write(tmp_path, encode(gradient(), "PNG")).load()
    assert image.size == (32, 24)
    np.testing.assert_array_equal(image.pixels, np.asarray(gradient()))
    assert image.to_pil().tobytes() == gradient().tobytes()


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP"])
@pytest.mark.parametrize("kept", [0.95, 0.5, 0.1])
def test_a_truncated_file_is_refused_by_line_and_path(tmp_path: Path, form: str, kept: float) -> None:
    noise = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    content = encode(noise, form)
    file = write(tmp_path, content[: int(len(content) * kept)])
    with pytest.raises(DataError, match=r"train\.jsonl:12: image .*picture\.png: (truncated or damaged|not an image)"):
        file.load()


@pytest.mark.parametrize("content", [b"", b"I am a text file\n" * 50], ids=["zero bytes", "text"])
def test_what_is_no_image_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(DataError, match=r"picture\.png: not an image that Pillow can read"):
        write(tmp_path, content).load()


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damage_of_any_kind_is_a_data_error(tmp_path: Path) -> None:
    """Pillow's decoders raise TypeError, struct.error, NotImplementedError and more for files such as these."""
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    originals = [
        encode(gradient(), "TIFF"),
        encode(gradient(), "TIFF", compression="tiff_deflate"),
        encode(gradient(), "JPEG", exif=exif),
        encode(gradient(), "DDS"),
        encode(gradient(), "PNG"),
    ]
    generator = np.random.default_rng(0)
    refused = 0
    for trial in range(2000):
        content = bytearray(originals[trial % len(originals)])
        for place in generator.integers(0, min(200, len(content)), size=generator.integers(1, 6)):
            content[place] = generator.choice([0, 255, 7])
        try:
            write(tmp_path, bytes(content)).load()
        except DataError:
            refused += 1
    assert refused > 500


def test_a_missing_file_and_a_folder_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        ImageFile(tmp_path / "absent.png").load()
    with pytest.raises(DataError, match="cannot be read"):
        ImageFile(tmp_path).load()


@pytest.mark.parametrize(
    ("width", "height"), [(60_000, 60_000), (MAX_PIXELS // 9_000 + 1, 9_000)], ids=["Pillow's limit", "ours"]
)
def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path: Path, width: int, height: int) -> None:
    with pytest.raises(DataError, match=r"more than 89,478,485 pixels"):
        write(tmp_path, png_header(width, height)).load()


def test_a_sliver_is_refused() -> None:
    with pytest.raises(DataError, match=r"strip: 1x10000, an aspect ratio beyond 200:1"):
        Image.from_array(np.zeros((10_000, 1), np.uint8), source="strip")
    assert Image.from_array(np.zeros((200, 1), np.uint8)).size == (1, 200)


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (0, 0, 3)])
def test_a_side_of_zero_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match="empty"):
        Image.from_array(np.zeros(shape, np.uint8))


@pytest.mark.parametrize(
    "pixels",
    [np.zeros((8, 8), np.float32), np.zeros((8, 8, 4), np.uint8), np.zeros((8,), np.uint8), np.zeros((8, 8), np.int64)],
    ids=["float", "four channels", "one dimension", "int64"],
)
def test_arrays_that_are_no_picture_are_refused(pixels: Any) -> None:
    with pytest.raises(DataError, match="expected uint8 pixels"):
        Image.from_array(pixels)


def test_grey_becomes_three_equal_channels(tmp_path: Path) -> None:
    grey = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5
    expected = np.stack([grey] * 3, axis=2)
    np.testing.assert_array_equal(Image.from_array(grey).pixels, expected)
    np.testing.assert_array_equal(write(tmp_path, encode(PIL.Image.fromarray(grey), "PNG")).load().pixels, expected)


def test_one_bit_pictures_are_black_and_white(tmp_path: Path) -> None:
    image = write(tmp_path, encode(PIL.Image.new("1", (4, 4), 1), "PNG")).load()
    assert np.unique(image.pixels).tolist() == [255]


def test_cmyk_jpeg_becomes_rgb(tmp_path: Path) -> None:
    red = PIL.Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    image = write(tmp_path, encode(red, "JPEG", quality=95), "red.jpg").load()
    assert image.pixels.shape == (16, 16, 3)
    np.testing.assert_allclose(image.pixels[8, 8], [255, 0, 0], atol=3)


def test_16_bit_png_keeps_its_contrast(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    image = write(tmp_path, encode(PIL.Image.fromarray(values), "PNG")).load()
    np.testing.assert_array_equal(image.pixels[..., 0], np.round(values / 257))


def test_a_dark_16_bit_png_stays_dark(tmp_path: Path) -> None:
    image = write(tmp_path, encode(PIL.Image.fromarray(np.full((8, 8), 200, np.uint16)), "PNG")).load()
    assert image.pixels.max() == 1


@pytest.mark.parametrize("top", [1.0, 255.0, 65535.0])
def test_float_pictures_are_scaled_by_the_range_that_holds_them(tmp_path: Path, top: float) -> None:
    values = np.array([[0.0, 0.5, 1.0]] * 3, dtype=np.float32) * top
    image = write(tmp_path, encode(PIL.Image.fromarray(values), "TIFF"), "float.tif").load()
    assert image.pixels[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 1e6])
def test_float_values_that_are_no_brightness_are_refused(value: float) -> None:
    values = np.array([[0.0, value]], dtype=np.float32)
    with pytest.raises(DataError, match="expected a brightness"):
        Image.from_pil(PIL.Image.fromarray(values))


def test_transparency_is_laid_on_white() -> None:
    picture = PIL.Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    picture.putpixel((1, 0), (0, 0, 0, 0))
    assert Image.from_pil(picture).pixels[0].tolist() == [[255, 0, 0], [255, 255, 255]]
    half = PIL.Image.new("LA", (1, 1), (0, 128))
    assert Image.from_pil(half).pixels[0, 0].tolist() == [127, 127, 127]


def test_a_palette_with_transparency_is_laid_on_white(tmp_path: Path) -> None:
    picture = PIL.Image.new("P", (2, 1))
    picture.putpalette([10, 20, 30, 40, 50, 60])
    picture.putpixel((1, 0), 1)
    image = write(tmp_path, encode(picture, "PNG", transparency=0)).load()
    assert image.pixels[0].tolist() == [[255, 255, 255], [40, 50, 60]]


def test_rgb_with_a_transparent_colour_is_laid_on_white(tmp_path: Path) -> None:
    picture = PIL.Image.new("RGB", (2, 1), (1, 2, 3))
    picture.putpixel((1, 0), (9, 9, 9))
    image = write(tmp_path, encode(picture, "PNG", transparency=(9, 9, 9))).load()
    assert image.pixels[0].tolist() == [[1, 2, 3], [255, 255, 255]]


@pytest.mark.parametrize(("form", "name"), [("GIF", "a.gif"), ("PNG", "a.png"), ("WEBP", "a.webp"), ("TIFF", "a.tif")])
def test_several_frames_are_refused(tmp_path: Path, form: str, name: str) -> None:
    other = PIL.Image.new("RGB", (32, 24), "red")
    content = encode(gradient(), form, save_all=True, append_images=[other])
    with pytest.raises(DataError, match="holds 2 frames"):
        write(tmp_path, content, name).load()


def test_a_gif_of_one_frame_is_a_picture(tmp_path: Path) -> None:
    assert write(tmp_path, encode(PIL.Image.new("RGB", (4, 4), "red"), "GIF")).load().pixels[0, 0, 0] == 255


def test_a_phone_photograph_with_a_second_picture_behind_it_is_one_picture(tmp_path: Path) -> None:
    content = encode(gradient(), "MPO", save_all=True, append_images=[PIL.Image.new("RGB", (32, 24), "red")])
    image = write(tmp_path, content, "photo.jpg").load()
    np.testing.assert_allclose(image.pixels, np.asarray(gradient()), atol=40)


def test_the_camera_orientation_is_applied(tmp_path: Path) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # the top of the scene is at the right: turn by 90 degrees clockwise
    image = write(tmp_path, encode(gradient(), "PNG", exif=exif)).load()
    assert image.size == (24, 32)
    np.testing.assert_array_equal(image.pixels, np.rot90(np.asarray(gradient()), -1))


def test_equal_pixels_have_equal_digests(tmp_path: Path) -> None:
    array = np.asarray(gradient())
    one = Image.from_array(array, source="one")
    other = write(tmp_path, encode(gradient(), "PNG")).load()
    assert one.digest == other.digest
    assert one == other
    assert len({one, other}) == 1
    changed = array.copy()
    changed[0, 0, 0] ^= 1
    assert Image.from_array(changed) != one
    assert Image.from_array(np.zeros((2, 8), np.uint8)) != Image.from_array(np.zeros((8, 2), np.uint8))
    assert one != "an image"


def test_pixels_are_read_only_and_apart_from_the_array_they_came_from() -> None:
    array = np.zeros((4, 4, 3), np.uint8)
    image = Image.from_array(array)
    digest = image.digest
    array[:] = 255
    assert image.pixels.max() == 0
    assert image.digest == digest
    with pytest.raises(ValueError, match="read-only"):
        image.pixels[0, 0, 0] = 1
    assert not Image.from_pil(gradient()).pixels.flags.writeable


def test_loading_an_image_is_the_image() -> None:
    image = Image.from_pil(gradient())
    assert image.load() is image
