"""Tables that print well everywhere: a terminal, a notebook, Markdown, JSON."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table as RichTable

Cell = str | int | float | None


@dataclass(frozen=True)
class Table:
    """Rows under named columns.

    Attributes:
        columns: header of each column.
        rows: one sequence of cells per row; `None` prints as a dash.
        title: printed above.
        digits: decimals of float cells.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    title: str = ""
    digits: int = 1

    def texts(self) -> list[list[str]]:
        """Format every cell."""
        return [[self._text(cell) for cell in row] for row in self.rows]

    def _text(self, cell: Cell) -> str:
        if cell is None:
            return "-"
        return f"{cell:,.{self.digits}f}" if isinstance(cell, float) else str(cell)

    def _is_number(self, column: int) -> bool:
        cells = [row[column] for row in self.rows if row[column] is not None]
        return bool(cells) and all(isinstance(cell, int | float) for cell in cells)

    def to_markdown(self) -> str:
        """Return a GitHub table."""
        rule = ["--:" if self._is_number(i) else "---" for i in range(len(self.columns))]
        lines = [list(self.columns), rule, *self.texts()]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def to_text(self) -> str:
        """Return aligned columns, as wide as they need to be."""
        head, *rows = lines = [list(self.columns), *self.texts()]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        right = [self._is_number(i) for i in range(len(head))]

        def line(cells: Sequence[str]) -> str:
            padded = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right, strict=True))
            return "  ".join(padded).rstrip()

        rule = "  ".join("-" * width for width in widths)
        return "\n".join([*([self.title] if self.title else []), line(head), rule, *map(line, rows)])

    def to_dicts(self) -> list[dict[str, Cell]]:
        """Return one dict per row, keyed by column."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]

    def _repr_html_(self) -> str:
        def line(tag: str, cells: Sequence[str]) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

        caption = f"<caption>{html.escape(self.title)}</caption>" if self.title else ""
        body = "".join(line("td", row) for row in self.texts())
        return f"<table>{caption}<thead>{line('th', self.columns)}</thead><tbody>{body}</tbody></table>"

    def __rich__(self) -> RichTable:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(title=self.title or None, box=SIMPLE_HEAD, title_justify="left")
        for index, name in enumerate(self.columns):
            table.add_column(Text(name), justify="right" if self._is_number(index) else "left")
        for row in self.texts():
            table.add_row(*(Text(cell) for cell in row))
        return table


@dataclass(frozen=True)
class Report:
    """What a job returns: numbers for a script, tables for a reader.

    Attributes:
        numbers: plain values that JSON can hold.
        tables: what to show.
    """

    numbers: Mapping[str, Any] = field(default_factory=dict)
    tables: Sequence[Table] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        return dict(self.numbers)

    def _repr_html_(self) -> str:
        return "".join(table._repr_html_() for table in self.tables)


def human_bytes(count: float) -> str:
    """Write a number of bytes for people: `4.6 MB`, powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def human_count(count: float) -> str:
    """Write a number of things for people: `2.4M`."""
    for unit in ("", "k", "M", "B"):
        if abs(count) < 1000:
            return f"{count:.0f}" if not unit else f"{count:.1f}{unit}"
        count /= 1000
    return f"{count:.1f}T"
