"""What people read: tables, and the name that they may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence


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
