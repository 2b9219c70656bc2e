"""Tables of text: columns as wide as their widest cell."""

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = (), indent: str = "") -> str:
    """Rows of cells as lines, two spaces between columns.

    Args:
        rows: all of the same length, the heading first.
        right: numbers of the columns that are aligned to the right; the others are to the left.
        indent: put before each line.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if place in right else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append((indent + "  ".join(cells)).rstrip())
    return "\n".join(lines)


def figures_table(rows: Sequence[Sequence[str]]) -> str:
    """A table of names, in the first column, and figures."""
    return table(rows, right=range(1, len(rows[0])))
