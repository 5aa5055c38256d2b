"""The page of config keys is the one that the code writes."""

from __future__ import annotations

import runpy
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_of_config_keys_is_current() -> None:
    page = runpy.run_path(str(DOCS / "make_config.py"))["page"]()
    assert (DOCS / "config.md").read_text(encoding="utf-8") == page, "run: uv run python docs/make_config.py"


def test_every_key_has_a_meaning() -> None:
    rows = [line for line in (DOCS / "config.md").read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    assert rows
    assert [row for row in rows if row.endswith("|  |")] == []
