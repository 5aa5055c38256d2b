"""Scanned handwritten digits that come with scikit-learn: a task that needs no download and no GPU."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rllava_core.errors import DataError
from rllava_core.mdp.examples import Example, Split
from rllava_core.mdp.images import Image
from rllava_vqa.config import DigitsConfig

HELD_OUT_EVERY = 5
"""Scan 0 and every fifth after it are held out: 360 of 1,797. The source mixes the classes."""


class Digits:
    """Which digit is it? 1,797 scans of 8×8 pixels, ten classes, from UCI's optical recognition of handwritten digits.

    Raises DataError if scikit-learn cannot be imported.
    """

    def __init__(self, config: DigitsConfig) -> None:
        try:
            from sklearn.datasets import load_digits  # type: ignore[import-untyped]
        except ImportError as error:
            raise DataError(
                f"data set 'digits': scikit-learn, which brings the scans, cannot be imported ({error}); "
                "install it with: pip install scikit-learn"
            ) from error
        scans = load_digits()
        pixels = np.round(scans.images * (255 / 16)).astype(np.uint8)  # [1797, 8, 8], of 17 levels of grey
        self._examples = [
            Example(
                name=f"digits:{index}",
                fields={"question": config.question},
                images=(Image.from_array(scan, source=f"digits:{index}"),),
                answer=str(label),
            )
            for index, (scan, label) in enumerate(zip(pixels, scans.target, strict=True))
        ]

    def examples(self, split: Split) -> Sequence[Example]:
        """360 held-out scans, or the other 1,437."""
        held_out = split == "held_out"
        return [example for index, example in enumerate(self._examples) if (index % HELD_OUT_EVERY == 0) == held_out]
