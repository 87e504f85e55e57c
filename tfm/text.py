"""What people and their programs read: tables, the name that may have been meant, numbers as JSON has them."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any


def aligned(rows: Sequence[Sequence[str]], left: int = 0) -> str:
    """Rows of cells as lines; the first `left` columns begin at their left edge, all others end at their right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = zip(row, widths, strict=True)
        lines.append("  ".join(c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(cells)).rstrip())
    return "\n".join(lines)


def near(name: str, known: Collection[str], prefix: str = "", otherwise: str = "") -> str:
    """The end of a message about a name unknown: `; did you mean PREFIX…?`, or `otherwise` where none is like it.

    A field named without its section comes first, and then the closest spelling.
    """
    alike = [full for full in known if full.rpartition(".")[2] == name] or difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {prefix}{alike[0]}?" if alike else otherwise


def finite(value: Any) -> Any:
    """A number, or lists and dictionaries of them, with null in the place of NaN and infinity, which JSON has not."""
    if isinstance(value, Mapping):
        return {key: finite(its) for key, its in value.items()}
    if isinstance(value, list | tuple):
        return [finite(its) for its in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
