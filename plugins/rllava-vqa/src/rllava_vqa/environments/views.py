"""What the agent of `zoom` sees of an image: an overview without its details, and crops with all of them."""

from __future__ import annotations

import PIL.Image

from rllava_core.mdp.images import Image
from rllava_vqa.boxes import Box


def overview_of(image: Image, overview_size: int, view_size: int | None) -> Image:
    """The image reduced to a longer side of `overview_size` pixels, and shown at `view_size` if that is more.

    Every pixel of the reduced image is the mean of the area that it stands for. It is enlarged as squares, since any
    smoother filter would suggest details that are not there. An image that is no larger than that is left as it is.
    """
    picture = image.to_pil()
    if max(picture.size) > overview_size:
        picture = picture.resize(_scaled(picture.size, overview_size), PIL.Image.Resampling.BOX)
    return _enlarged(picture, view_size, PIL.Image.Resampling.NEAREST, f"{image.source}, overview")


def crop_of(image: Image, box: Box, view_size: int | None) -> Image:
    """The region at full resolution, enlarged (bicubic) to a longer side of `view_size` pixels if it has fewer."""
    picture = image.to_pil().crop(box)
    return _enlarged(picture, view_size, PIL.Image.Resampling.BICUBIC, f"{image.source}, crop {list(box)}")


def _enlarged(picture: PIL.Image.Image, view_size: int | None, filter_: PIL.Image.Resampling, source: str) -> Image:
    if view_size is not None and max(picture.size) < view_size:
        picture = picture.resize(_scaled(picture.size, view_size), filter_)
    return Image.from_pil(picture, source)


def _scaled(size: tuple[int, int], longer: int) -> tuple[int, int]:
    width, height = size
    scale = longer / max(width, height)
    return max(1, round(width * scale)), max(1, round(height * scale))
