"""The tutorial does what it says: its files are written, its commands run, and what it shows is what they print."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

from rllava_core.cli import rllava

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "plugins.md"

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks() -> list[tuple[str, str]]:
    """Language and text of every code block of the page."""
    return [(match[1], match[2]) for match in BLOCK.finditer(PAGE.read_text(encoding="utf-8"))]


class Reader:
    """Somebody who does what the page says, in a folder of their own."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.patch = patch
        patch.chdir(folder)

    def write(self, text: str) -> None:
        """A block whose first line names a file."""
        path = self.folder / text.splitlines()[0].removeprefix("# ")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.partition("\n")[2], encoding="utf-8")

    def type(self, text: str) -> None:
        """A block of commands, each with what it prints below; `…` stands for anything."""
        for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
            command, _, expected = part.partition("\n")
            output = self._run(shlex.split(command))
            for line in filter(None, map(str.strip, expected.splitlines())):
                pattern = ".*".join(re.escape(piece.strip()) for piece in line.split("…"))
                found = [shown for shown in output.splitlines() if re.fullmatch(rf"\s*{pattern}\s*", shown)]
                assert found or line == "…", f"`{command}` does not print {line!r} but:\n{output}"

    def _run(self, command: list[str]) -> str:
        if command[:3] == ["pip", "install", "-e"]:
            self._install(self.folder / command[3].removesuffix("[test]"))
            return ""
        if command[0] == "rllava":
            small = ["training.steps=2", "training.prompts_per_step=2", "training.eval_episodes=4"]
            arguments = [*command[1:], *(small if command[1] == "train" else [])]
            result = CliRunner().invoke(rllava, arguments, catch_exceptions=False)
            assert result.exit_code == 0, f"`{shlex.join(command)}` failed:\n{result.output}"
            return result.stdout
        assert command[0] == "pytest"
        program = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        done = subprocess.run(
            [*program, *command[1:]], cwd=self.folder, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, f"`{shlex.join(command)}` failed:\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def _install(self, package: Path) -> None:
        """What an editable installation leaves: metadata, and the sources on the path. Tests may not need pip."""
        project = tomllib.loads((package / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        source = package / "src"
        info = source / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
        info.mkdir()
        header = ["Metadata-Version: 2.1", f"Name: {project['name']}", f"Version: {project['version']}"]
        header += [f"Requires-Dist: {line}" for line in project["dependencies"]]
        info.joinpath("METADATA").write_text("\n".join(header) + "\n", encoding="utf-8")
        lines = [f"{name} = {value}" for name, value in project["entry-points"]["rllava"].items()]
        info.joinpath("entry_points.txt").write_text("\n".join(["[rllava]", *lines]) + "\n", encoding="utf-8")
        self.patch.syspath_prepend(str(source))
        path = os.environ.get("PYTHONPATH", "")
        self.patch.setenv("PYTHONPATH", os.pathsep.join([str(source), path]))


@pytest.fixture
def reader(tmp_path: Path, toy_config: Path, monkeypatch: pytest.MonkeyPatch) -> Reader:
    # The page trains on digits, which needs other packages; the toy's config stands for any.
    toy_config.rename(tmp_path / "digits.yaml")
    return Reader(tmp_path, monkeypatch)


def test_following_the_page_gives_plugins_that_work(reader: Reader) -> None:
    for language, text in blocks():
        if language == "console":
            reader.type(text)
        elif re.match(r"# [\w./-]+\n", text):
            reader.write(text)

    rewards = (reader.folder / "logged" / "rewards.csv").read_text(encoding="utf-8").splitlines()
    assert [row.split(",")[0] for row in rewards] == ["1", "2"]


def test_what_is_not_executed_at_least_is_python() -> None:
    import ast

    fragments = [text for language, text in blocks() if language == "python" and not text.startswith("# rllava-")]
    assert fragments
    for text in fragments:
        ast.parse(text)


def test_every_link_leads_somewhere() -> None:
    for target, anchor in re.findall(r"\]\(([\w./-]*)(?:#([\w-]+))?\)", PAGE.read_text(encoding="utf-8")):
        page = (ROOT / "docs" / target) if target else PAGE
        assert page.exists(), target
        headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
        anchors = {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
        assert not anchor or anchor in anchors, f"{target}#{anchor}"


def test_every_status_and_variable_is_explained() -> None:
    from typing import get_args

    from rllava_core.plugins import Status
    from rllava_core.plugins.selection import ALLOW, DISABLE, STRICT

    text = PAGE.read_text(encoding="utf-8")
    assert all(f"| {status} |" in text for status in get_args(Status) if status != "unloaded")
    assert all(f"`{variable}=" in text for variable in (ALLOW, DISABLE, STRICT))
