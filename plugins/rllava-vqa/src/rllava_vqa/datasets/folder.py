"""A folder with one sub-folder of images for each answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rllava_core.errors import DataError
from rllava_core.mdp.examples import Example, Split
from rllava_core.mdp.images import ImageFile
from rllava_vqa.config import ClassFolderConfig
from rllava_vqa.datasets.held_out import held_out_indices
from rllava_vqa.datasets.problems import raise_problems

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


class ClassFolder:
    """Images sorted into sub-folders; the sub-folder's name is the answer.

    Hidden files are passed over. Anything else that is not an image where one is expected is refused by name, for it
    may be an image that would be missed. Every sub-folder contributes to both splits.

    Raises DataError that names the folder or file.
    """

    def __init__(self, config: ClassFolderConfig) -> None:
        self._config = config
        self._examples: dict[Split, list[Example]] = {"train": [], "held_out": []}
        root = Path(config.path).expanduser()
        problems: list[str] = []
        classes = _classes(root, problems)
        if config.classes_as_choices and len(classes) == 1:
            problems.append(f"{root}: one sub-folder alone leaves nothing to choose from; it needs two at least")
        choices = tuple(folder.name for folder in classes) if config.classes_as_choices else None
        for folder in classes:
            files = _images(folder, config, problems)
            held_out = held_out_indices([file.name for file in files], config.held_out_fraction)
            for index, file in enumerate(files):
                example = Example(
                    name=f"{folder.name}/{file.name}",
                    fields={"question": config.question},
                    images=(ImageFile(file),),
                    answer=folder.name,
                    choices=choices,
                )
                self._examples["held_out" if index in held_out else "train"].append(example)
        raise_problems(problems, str(root))

    def examples(self, split: Split) -> Sequence[Example]:
        """By class, then by file name. Raises DataError for the held-out examples if none were to be held out."""
        if split == "held_out" and not self._examples["held_out"]:
            raise DataError(
                f"{self._config.path}: nothing is held out to evaluate on; set the data set's held_out_fraction above 0"
            )
        return tuple(self._examples[split])


def _classes(root: Path, problems: list[str]) -> list[Path]:
    if not root.exists():
        raise DataError(f"{root}: no such folder (from {Path.cwd()})")
    if not root.is_dir():
        raise DataError(f"{root}: not a folder; expected one with a sub-folder of images for each answer")
    entries = _visible(root)
    classes = [entry for entry in entries if entry.is_dir()]
    if not classes:
        raise DataError(f"{root}: no sub-folders; put the images of each answer into a sub-folder of that name")
    problems.extend(
        f"{entry}: not in a sub-folder, so it has no answer; move it" for entry in entries if not entry.is_dir()
    )
    return classes


def _images(folder: Path, config: ClassFolderConfig, problems: list[str]) -> list[Path]:
    """The image files of one class; what is wrong with it is added to `problems`."""
    images = []
    for entry in _visible(folder):
        if entry.is_dir():
            problems.append(f"{entry}: a folder inside the sub-folder of an answer; move its images up")
        elif entry.suffix.lower() not in SUFFIXES:
            problems.append(f"{entry}: not an image; remove it (images end in {', '.join(SUFFIXES)})")
        else:
            images.append(entry)
    if not images:
        problems.append(f"{folder}: no image in this sub-folder; add some or remove it")
    elif len(images) == 1 and config.held_out_fraction > 0:
        problems.append(
            f"{folder}: one image cannot be both trained on and held out; add another or set held_out_fraction to 0"
        )
    if config.verify_images:
        problems.extend(problem for file in images if (problem := _damage(file)))
    return images


def _damage(file: Path) -> str | None:
    try:
        ImageFile(file).load()
    except DataError as error:
        return str(error)
    return None


def _visible(folder: Path) -> list[Path]:
    return sorted((entry for entry in folder.iterdir() if not entry.name.startswith(".")), key=lambda entry: entry.name)
