"""Tables as plain text that fit the width of a terminal or log file, without control codes and without cut cells."""

import shutil
import textwrap
from collections.abc import Sequence

from rich.cells import cell_len

Row = Sequence[str]
GAP = "  "  # between columns


def print_table(header: Row, rows: Sequence[Row], title: str | None = None) -> None:
    """Print `plain_table` in the width of the terminal; in 80 columns where the output is a file or a pipe."""
    print(plain_table(header, rows, title, shutil.get_terminal_size().columns))


def plain_table(header: Row, rows: Sequence[Row], title: str | None = None, width: int = 80) -> str:
    """A table of at most `width` columns, with the first column aligned to the left and the others to the right.

    A table that is too wide is turned on its side, so that its rows become columns. If this is too wide as well, its
    columns are shown in several tables, one below the other, each with the first column of the whole. Headers are
    broken between words; cells are never cut, and a cell that is wider than the terminal stays as it is.

    Args:
        header: a name for each column.
        rows: cells of each row, as many as `header` has; a cell may have several lines.
        title: a line above the table.
        width: most characters of a line.
    """
    whole = [list(header), *map(list, rows)]
    turned = [list(column) for column in zip(*whole, strict=True)]
    if _narrowest(whole) <= width or not rows:
        pieces = [whole]
    elif _narrowest(turned) <= width:
        pieces = [turned]
    else:
        pieces = list(_split(whole, width))
    lines = textwrap.wrap(title, width) if title else []
    return "\n".join([*lines, "\n\n".join("\n".join(_lines(piece, width)) for piece in pieces)])


def _split(table: list[list[str]], width: int) -> list[list[list[str]]]:
    """The table as several ones of at most `width` characters, each with the first column and some of the others."""
    pieces: list[list[int]] = []
    for column in range(1, len(table[0])):
        longer = [*pieces[-1], column] if pieces else []
        if longer and _narrowest([[row[at] for at in longer] for row in table]) <= width:
            pieces[-1] = longer
        else:
            pieces.append([0, column])
    return [[[row[at] for at in piece] for row in table] for piece in pieces]


def _cell_width(cell: str) -> int:
    return max(map(cell_len, cell.splitlines()), default=0)


def _wrapped(header: str, width: int) -> list[str]:
    return textwrap.wrap(header, width, break_long_words=False, break_on_hyphens=False) if width else [header]


def _widths(table: list[list[str]], height: int) -> list[int]:
    """The width that each column needs for its cells, and for a header of at most `height` lines."""
    widths = []
    for header, *cells in zip(*table, strict=True):
        width = max([*map(_cell_width, cells), *map(cell_len, header.split())], default=0)
        while len(_wrapped(header, width)) > height:
            width += 1
        widths.append(width)
    return widths


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + len(GAP) * (len(widths) - 1)


def _narrowest(table: list[list[str]]) -> int:
    """The width of the table if each word of a header may have a line for itself."""
    return _total(_widths(table, max(len(header.split()) for header in table[0]) or 1))


def _lines(table: list[list[str]], width: int) -> list[str]:
    """The lines of a table, with headers of as few lines as fit."""
    most = max(len(header.split()) for header in table[0]) or 1
    widths = next((found for height in range(1, most) if _total(found := _widths(table, height)) <= width), None)
    widths = widths or _widths(table, most)
    header = ["\n".join(_wrapped(name, size)) for name, size in zip(table[0], widths, strict=True)]
    rule = ["-" * size for size in widths]
    return [line for row in (header, rule, *table[1:]) for line in _row(row, widths, bottom=row is header)]


def _row(row: Row, widths: Sequence[int], bottom: bool) -> list[str]:
    """The lines of one row; with `bottom`, cells of fewer lines are moved down."""
    cells = [cell.splitlines() or [""] for cell in row]
    height = max(map(len, cells), default=1)
    padded = [[""] * (height - len(cell)) + cell if bottom else cell + [""] * (height - len(cell)) for cell in cells]
    lines = []
    for parts in zip(*padded, strict=True):
        spaces = [" " * (size - cell_len(part)) for part, size in zip(parts, widths, strict=True)]
        first, *rest = zip(parts, spaces, strict=True)
        lines.append(GAP.join([first[0] + first[1], *(space + part for part, space in rest)]).rstrip())
    return lines
