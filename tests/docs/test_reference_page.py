"""The reference is the one that the code writes, and leaves nothing out."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

from rllava_core import hookspecs
from rllava_core.specs import KINDS

DOCS = Path(__file__).parents[2] / "docs"


def test_the_reference_is_current() -> None:
    page = re.sub(r"\n{3,}", "\n\n", runpy.run_path(str(DOCS / "make_reference.py"))["page"]())
    assert (DOCS / "reference.md").read_text(encoding="utf-8") == page, "run: uv run python docs/make_reference.py"


def test_every_hook_and_kind_is_there() -> None:
    text = (DOCS / "reference.md").read_text(encoding="utf-8")
    for name in vars(hookspecs):
        if name.startswith("rllava_"):
            assert f"### `{name}`" in text
    for kind in KINDS:
        assert f"### {kind}\n" in text
