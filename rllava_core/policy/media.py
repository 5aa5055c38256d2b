"""Preprocessed images: made once an image, kept on the host, used by rollout and update alike."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from threading import Lock

from rllava_core.mdp.images import Image
from rllava_core.policy.adapter import Features, ModelAdapter


class MediaStore:
    """Features by content hash, the least recently used dropped beyond a limit of bytes.

    Trajectories keep their images, so an entry that was dropped is made again from the same pixels: the limit bounds
    memory and changes no result. Threads may ask at the same time.
    """

    def __init__(self, adapter: ModelAdapter, limit_bytes: int = 2**30) -> None:
        self._adapter = adapter
        self._limit = limit_bytes
        self._entries: OrderedDict[str, Features] = OrderedDict()
        self._bytes = 0
        self._lock = Lock()

    def features(self, images: Sequence[Image]) -> list[Features]:
        """The features of each image, in order. Raises DataError for an image that the model cannot take."""
        with self._lock:
            return [self._get(image) for image in images]

    def _get(self, image: Image) -> Features:
        entry = self._entries.get(image.digest)
        if entry is None:
            entry = self._adapter.preprocess(image)
            self._entries[image.digest] = entry
            self._bytes += _size(entry)
            while self._bytes > self._limit and len(self._entries) > 1:
                _, dropped = self._entries.popitem(last=False)
                self._bytes -= _size(dropped)
        else:
            self._entries.move_to_end(image.digest)
        return entry


def _size(features: Features) -> int:
    return sum(tensor.nbytes for tensor in features.values())
