"""Answers on disk, found again by what was asked: what was paid for once is never asked for again."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rllava_core.errors import ConfigError, TrainingError
from rllava_openai.completions import Completion

FORMAT = 1
"""Part of every key, so that a change of what is asked or kept never meets older answers."""


def key_of(request: Mapping[str, Any], revision: str) -> str:
    """SHA-256 of a request that has the digests of images in their places, and of the revision of the model. Where it
    is sent, and with which key, makes no difference."""
    whole = {"format": FORMAT, "revision": revision, "request": request}
    text = json.dumps(whole, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


class AnswerCache:
    """One file an answer, there whole or not at all, in a folder that several runs may share.

    Raises ConfigError if the folder cannot be written to, which is better known before anything is paid for.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise ConfigError(f"cache {folder}: answers cannot be kept there ({error.strerror})") from error

    def get(self, key: str) -> Completion | None:
        """The answer, or None. A file that is damaged is no answer: it is asked for again, and replaced."""
        try:
            entry = json.loads(self._path(key).read_text(encoding="utf-8"))
            asked, answer = entry["key"], Completion(**entry["answer"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        whole = isinstance(answer.text, str) and isinstance(answer.finish_reason, str) and asked == key
        return answer if whole else None

    def put(self, key: str, request: Mapping[str, Any], answer: Completion) -> None:
        """Keep an answer, with what was asked, for people. Raises TrainingError if it cannot be written."""
        path = self._path(key)
        text = json.dumps({"key": key, "request": request, "answer": asdict(answer)}, ensure_ascii=True, indent=1)
        try:
            path.parent.mkdir(exist_ok=True)
            # A name of its own, since another run may be writing the same answer.
            descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
            try:
                with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                    file.write(text)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, path)
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise
        except OSError as error:
            raise TrainingError(f"cache {self.folder}: an answer could not be written ({error.strerror})") from error

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"
