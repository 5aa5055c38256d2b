"""Files that are written whole or not. Imports nothing heavy."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from rllava_core.errors import TrainingError


def write_text(path: Path, text: str) -> None:
    """Replace a file at once: a reader, or a crash, sees the old text or the new, never a part."""
    temporary = unfinished(path)
    try:
        # Half a surrogate pair, which a file's name may hold, is no UTF-8: written as an escape.
        with temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def unfinished(path: Path) -> Path:
    """The name of a file while `write_text` writes it."""
    return path.with_name(f".{path.name}.writing")


def flush(path: Path) -> None:
    """Flush one file, or the names in one directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def writing(what: str) -> Iterator[None]:
    """Turn a failure to write (a full disk, a missing permission) into one clear TrainingError."""
    try:
        yield
    except Exception as error:
        # Tokenizers raise nothing more specific than Exception where there is no space left.
        if not isinstance(error, (OSError, SafetensorError)) and type(error) is not Exception:
            raise
        raise TrainingError(f"{what} could not be written: {error}") from error
