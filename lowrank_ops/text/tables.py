"""Tables, as ASCII text that fits the terminal and as HTML for notebooks."""

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

# Characters per line: of text where there is no terminal and COLUMNS is not set; of HTML, which a notebook can scroll.
_WIDTH, HTML_WIDTH = 120, 160

# One rule below the headings and one above the totals, in ASCII: every encoding of a file or pipe can write it.
_BOX = Box("    \n    \n -- \n    \n    \n -- \n    \n    \n", ascii=True)


def new_table(title: str, **options: Any) -> Table:
    """A rich table without columns, in the style of this package; `options` are rich's."""
    title_text = Text(title, style="not italic")
    return Table(title=title_text, title_justify="left", box=_BOX, show_edge=False, padding=(0, 1, 0, 0), **options)


def figure(value: float) -> str:
    """Four significant digits below 10,000, otherwise the whole number: 0.1235, 5150, 11,760, never 1.176e+04."""
    return f"{value:.4g}" if value < 9999.5 else f"{value:,.0f}"


def terminal_width() -> int:
    """Characters per line of the terminal; the environment variable COLUMNS overrides it."""
    return shutil.get_terminal_size((_WIDTH, 24)).columns


def fits(table: Table, width: int) -> bool:
    """Whether the table fits `width` characters without breaking a word, or a cell of a column that must not wrap."""
    console = _console(10_000)
    needed = -2  # a column is followed by two spaces, but for the last one
    for column in table.columns:
        sizes = [Measurement.get(console, console.options, cell) for cell in (column.header, *column.cells)]
        needed += 2 + max(size.maximum if column.no_wrap else size.minimum for size in sizes)
    return needed <= width


def as_text(*parts: Table | str, width: int | None = None) -> str:
    """Tables and lines below each other, folded to `width` characters (default: the terminal's).

    Characters that stdout's encoding lacks, in a layer's name for instance, become escapes, so that `print` never
    fails.
    """
    console = _console(width or terminal_width())
    with console.capture() as captured:
        for part in parts:
            console.print(part)
    text = "\n".join(line.rstrip() for line in captured.get().splitlines()).strip("\n")
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def as_html(*parts: Table | str) -> str:
    """Tables and lines below each other as HTML, for a notebook's `_repr_html_`."""
    console = _console(HTML_WIDTH)
    for part in parts:
        console.print(part)
    return console.export_html(inline_styles=True, code_format='<pre style="line-height: normal">{code}</pre>')


def _console(width: int) -> Console:
    """A rich console that prints into memory, without colours and without interpreting markup in the text."""
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
