"""`rllava train` begins with a heap whose holes fit what is allocated next; nobody's own tunables are touched."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rllava_core.cli import heap

GLIBC = heap._is_glibc()


@pytest.fixture(autouse=True)
def began(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str], str]]:
    """What would have been begun anew: program, arguments, tunables."""
    found: list[tuple[str, list[str], str]] = []
    monkeypatch.setattr(os, "execv", lambda path, words: found.append((path, words, os.environ["GLIBC_TUNABLES"])))
    monkeypatch.setattr(os, "confstr", lambda _: "glibc 2.36", raising=False)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-X", "dev", "-m", "rllava_core", "train", "task.yaml"])
    for name in [name for name in os.environ if name == "GLIBC_TUNABLES" or name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    return found


@pytest.mark.parametrize("arguments", [["train", "task.yaml"], ["--debug", "train", "task.yaml"]])
def test_a_command_that_learns_begins_anew_as_it_was_begun(began: list[object], arguments: list[str]) -> None:
    heap.begin_with_whole_holes(arguments)

    words = [sys.executable, "-X", "dev", "-m", "rllava_core", "train", "task.yaml"]
    assert began == [(sys.executable, words, heap.TUNABLES)]


@pytest.mark.parametrize("arguments", [[], ["--version"], ["eval", "train"], ["plugins"]])
def test_no_other_command_does(began: list[object], arguments: list[str]) -> None:
    heap.begin_with_whole_holes(arguments)

    assert began == []
    assert "GLIBC_TUNABLES" not in os.environ


def test_it_does_so_once_and_what_it_starts_is_not_told(began: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLIBC_TUNABLES", heap.TUNABLES)

    heap.begin_with_whole_holes(["train"])

    assert began == []
    assert "GLIBC_TUNABLES" not in os.environ


@pytest.mark.parametrize(
    ("name", "value"),
    [("GLIBC_TUNABLES", ""), ("GLIBC_TUNABLES", "glibc.malloc.check=3"), ("MALLOC_MMAP_THRESHOLD_", "131072")],
)
def test_what_somebody_has_told_glibc_stays(
    began: list[object], monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    before = {**os.environ, name: value}
    monkeypatch.setenv(name, value)

    heap.begin_with_whole_holes(["train"])

    assert began == []
    assert dict(os.environ) == before


def test_another_c_library_is_left_alone(began: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(name: str) -> str:
        raise ValueError(name)

    monkeypatch.setattr(os, "confstr", unknown, raising=False)

    heap.begin_with_whole_holes(["train"])

    assert began == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_process_that_trains_was_begun_with_them(tmp_path: Path) -> None:
    """As the system sees it; the process keeps its number, so that whoever started it can still stop it."""
    script = "import os; print(os.getpid(), flush=True); from rllava_core.cli import main; main()"
    with subprocess.Popen(
        [sys.executable, "-c", f"{script}\n", "train", "missing.yaml"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        output, errors = process.communicate(timeout=60)

    assert process.returncode == 2
    assert "missing.yaml: no such file" in errors
    assert output.split() == [str(process.pid)] * (2 if GLIBC else 1)
