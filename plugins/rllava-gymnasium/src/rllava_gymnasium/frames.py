"""What an environment rendered, as an image of the size that the config asks for."""

from __future__ import annotations

import numpy as np
import PIL.Image

from rllava_core.errors import ConfigError
from rllava_core.mdp.images import Image


def image_of(rendered: object, size: tuple[int, int] | None, source: str) -> Image:
    """An image of a frame, a copy that later renderings do not change.

    rendered: [height, width, 3] uint8. Raises ConfigError for anything else.
    size: (width, height) in pixels; None: as rendered.
    source: where it comes from, for messages.
    """
    if not isinstance(rendered, np.ndarray):
        raise ConfigError(f"task.environment: {source}: rendered {_kind(rendered)}; expected {_EXPECTED}")
    if rendered.dtype != np.uint8 or rendered.ndim != 3 or rendered.shape[2] != 3 or not rendered.size:
        shape = list(rendered.shape)
        raise ConfigError(f"task.environment: {source}: rendered {rendered.dtype} {shape}; expected {_EXPECTED}")
    height, width = rendered.shape[:2]
    if size is None or size == (width, height):
        return Image.from_array(rendered, source)
    picture = PIL.Image.fromarray(np.ascontiguousarray(rendered))
    # The mean over the area of each new pixel: exact for whole factors, no ringing at the hard edges of drawn frames.
    return Image.from_array(np.asarray(picture.resize(size, PIL.Image.Resampling.BOX)), source)


_EXPECTED = "an array of uint8 [height, width, 3]"


def _kind(rendered: object) -> str:
    if rendered is None:
        return "nothing (None)"
    return f"a list of {len(rendered)} frames" if isinstance(rendered, list) else f"a {type(rendered).__name__}"
