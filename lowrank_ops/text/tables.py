"""Tables as text that fits the terminal, in ASCII, and as HTML for notebooks."""

from __future__ import annotations

import io
import shutil
import sys
from typing import Any

from rich.box import Box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

# Width where there is no terminal and COLUMNS is not set, and of HTML, which a notebook scrolls.
_WIDTH, HTML_WIDTH = 120, 160

# One rule below the headings and one above the totals. ASCII alone: any file or pipe takes it.
_BOX = Box("    \n    \n -- \n    \n    \n -- \n    \n    \n", ascii=True)


def new_table(title: str, **options: Any) -> Table:
    """A table in the house's style, without columns yet."""
    title_text = Text(title, style="not italic")
    return Table(title=title_text, title_justify="left", box=_BOX, show_edge=False, padding=(0, 1, 0, 0), **options)


def figure(value: float) -> str:
    """Four digits, or all of a number above: 5150 and 11,760, never 1.176e+04."""
    return f"{value:.4g}" if value < 9999.5 else f"{value:,.0f}"


def terminal_width() -> int:
    """Columns of the terminal; COLUMNS overrides it."""
    return shutil.get_terminal_size((_WIDTH, 24)).columns


def fits(table: Table, width: int) -> bool:
    """Whether no word of the table has to be broken, and no cell of a column that must not wrap."""
    console = _console(10_000)
    needed = -2  # a column is followed by two spaces, but for the last one
    for column in table.columns:
        sizes = [Measurement.get(console, console.options, cell) for cell in (column.header, *column.cells)]
        needed += 2 + max(size.maximum if column.no_wrap else size.minimum for size in sizes)
    return needed <= width


def as_text(*parts: Table | str, width: int | None = None) -> str:
    """Tables and lines below each other, folded to `width` columns (default: the terminal's).

    What stdout's encoding does not have, as in a layer's name, is written as an escape: `print` never fails.
    """
    console = _console(width or terminal_width())
    with console.capture() as captured:
        for part in parts:
            console.print(part)
    text = "\n".join(line.rstrip() for line in captured.get().splitlines()).strip("\n")
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def as_html(*parts: Table | str) -> str:
    """The same for a notebook's `_repr_html_`."""
    console = _console(HTML_WIDTH)
    for part in parts:
        console.print(part)
    return console.export_html(inline_styles=True, code_format='<pre style="line-height: normal">{code}</pre>')


def _console(width: int) -> Console:
    """Prints into memory, what it is given to the letter."""
    return Console(
        file=io.StringIO(),
        width=width,
        record=True,
        force_terminal=False,
        force_jupyter=False,
        color_system=None,
        markup=False,
        emoji=False,
        highlight=False,
    )
