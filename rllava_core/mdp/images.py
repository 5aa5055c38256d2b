"""Images: decoded once to 8-bit RGB, identified by their content, and refused by name when they cannot be used.

What is converted: grey, palette, CMYK, 16-bit and float pictures to 8-bit RGB; transparency is laid on white; the
orientation that a camera noted is applied. What is refused: files that are truncated or no image, animations and
several pages, sides of zero, aspect ratios beyond 200:1, pictures of more than 89 million pixels (a decompression
bomb), and deep pictures of values that are no brightness.
"""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
from numpy.typing import NDArray

from rllava_core.errors import DataError

MAX_PIXELS = 89_478_485
"""Pillow's own warning threshold (a quarter of a GiB as 24-bit RGB)."""

MAX_ASPECT_RATIO = 200
"""Beyond this, patch-based vision towers cannot keep both sides at one patch or more within a sane budget."""


@dataclass(frozen=True, eq=False)
class Image:
    """One RGB picture.

    pixels: [height, width, 3] uint8, read-only.
    source: where it came from, for messages.
    """

    pixels: NDArray[np.uint8]
    source: str = "image"

    @cached_property
    def digest(self) -> str:
        """SHA-256 of shape and pixels: equal pictures have equal digests, wherever they came from."""
        header = f"{self.pixels.shape}".encode()
        return hashlib.sha256(header + np.ascontiguousarray(self.pixels).tobytes()).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Image) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # NumPy forgets on the way from another process, or in a deep copy, that pixels are read-only.
        self.__dict__.update(state)
        self.pixels.flags.writeable = False

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return int(self.pixels.shape[1]), int(self.pixels.shape[0])

    def load(self) -> Image:
        """Itself; `ImageFile.load` reads a file."""
        return self

    def to_pil(self) -> PIL.Image.Image:
        return PIL.Image.fromarray(self.pixels)

    @classmethod
    def from_array(cls, pixels: NDArray[np.uint8], source: str = "array") -> Image:
        """From [height, width] grey or [height, width, 3] RGB, uint8. Raises DataError for anything else."""
        if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] != 3):
            raise DataError(
                f"{source}: expected uint8 pixels of shape [H, W] or [H, W, 3], got {pixels.dtype} {pixels.shape}"
            )
        if pixels.ndim == 2:
            pixels = np.repeat(pixels[:, :, None], 3, axis=2)
        _check_size(pixels.shape[1], pixels.shape[0], source)
        pixels = np.ascontiguousarray(pixels)
        if pixels.flags.writeable:
            pixels = pixels.copy()
            pixels.flags.writeable = False
        return cls(pixels, source)

    @classmethod
    def from_pil(cls, picture: PIL.Image.Image, source: str = "PIL image") -> Image:
        """Convert any PIL picture to RGB. Raises DataError for several frames or a size or values that are refused."""
        _check_size(*picture.size, source)
        frames = getattr(picture, "n_frames", 1)
        # Phones save MPO: an ordinary JPEG photograph with a smaller copy or a depth map behind it.
        if frames > 1 and picture.format != "MPO":
            raise DataError(f"{source}: holds {frames} frames; save the one you mean as an image of its own")
        return cls.from_array(_to_rgb(PIL.ImageOps.exif_transpose(picture), source), source)


@dataclass(frozen=True)
class ImageFile:
    """An image on disk that is decoded when it is needed, so that a large data set need not fit in memory."""

    path: Path
    source: str = ""

    def load(self) -> Image:
        """Decode the file. Raises DataError that names `source` and the path."""
        where = f"{self.source}: image {self.path}" if self.source else f"image {self.path}"
        try:
            with warnings.catch_warnings():
                # Our own limit, the same number, is an error below.
                warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
                with PIL.Image.open(self.path) as picture:
                    return Image.from_pil(picture, where)
        except FileNotFoundError:
            raise DataError(f"{where}: no such file") from None
        except PIL.UnidentifiedImageError:
            raise DataError(f"{where}: not an image that Pillow can read") from None
        except PIL.Image.DecompressionBombError:
            raise DataError(f"{where}: more than {MAX_PIXELS:,} pixels, refused as a decompression bomb") from None
        except (IsADirectoryError, PermissionError) as error:
            raise DataError(f"{where}: cannot be read ({error.strerror})") from None
        except DataError:
            raise
        except Exception as error:  # noqa: BLE001 - for damaged files Pillow's decoders raise whatever they stumble on
            raise DataError(f"{where}: truncated or damaged ({error})") from None


ImageSource = Image | ImageFile


def _check_size(width: int, height: int, source: str) -> None:
    if width < 1 or height < 1:
        raise DataError(f"{source}: empty, {width}x{height} pixels")
    if width * height > MAX_PIXELS:
        raise DataError(f"{source}: {width}x{height} is more than {MAX_PIXELS:,} pixels, refused")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise DataError(f"{source}: {width}x{height}, an aspect ratio beyond {MAX_ASPECT_RATIO}:1; crop it first")


def _to_rgb(picture: PIL.Image.Image, source: str) -> NDArray[np.uint8]:
    if picture.mode.startswith("I") or picture.mode == "F":
        return _scaled_to_8_bit(np.asarray(picture, dtype=np.float64), picture.mode, source)
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        background = PIL.Image.new("RGBA", picture.size, "white")
        picture = PIL.Image.alpha_composite(background, picture)
    return np.asarray(picture.convert("RGB"))


def _scaled_to_8_bit(values: NDArray[np.float64], mode: str, source: str) -> NDArray[np.uint8]:
    """Deep grey scales keep their contrast (Pillow's own conversion clips at 255).

    Integers are 16-bit whatever their largest value, or a dark picture would turn out brighter than a light one. Floats
    reach to 1, to 255 or to 65535, whichever holds them all.
    """
    if not np.isfinite(values).all() or values.min() < 0 or values.max() > 65535:
        raise DataError(
            f"{source}: values from {values.min():g} to {values.max():g} in mode {mode}; expected a brightness from 0 "
            "to at most 65535"
        )
    top = next(top for top in (1.0, 255.0, 65535.0) if values.max() <= top) if mode == "F" else 65535.0
    return np.round(values / top * 255.0).astype(np.uint8)
