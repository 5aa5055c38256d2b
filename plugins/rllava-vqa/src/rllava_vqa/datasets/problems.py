"""Problems of a data set, reported together: mending a file one error at a time is nobody's joy."""

from __future__ import annotations

from collections.abc import Sequence

from rllava_core.errors import DataError

SHOWN = 5
"""How many problems a message spells out."""


def raise_problems(problems: Sequence[str], where: str) -> None:
    """Raise one DataError of the first few problems and the count of the others; nothing if there are none."""
    if not problems:
        return
    if len(problems) == 1:
        raise DataError(problems[0])
    lines = [f"{where} has {len(problems)} problems:", *problems[:SHOWN]]
    if len(problems) > SHOWN:
        lines.append(f"and {len(problems) - SHOWN} more")
    raise DataError("\n  ".join(lines))
