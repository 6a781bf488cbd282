"""A trace's report and pictures as one self-contained HTML file."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence

__all__ = ["page"]

_STYLE = """\
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1100px; padding: 0 1em; color: #1a202c }
img { max-width: 100% } table { border-collapse: collapse; margin: 1em 0 }
th, td { padding: .2em .8em; border-bottom: 1px solid #e2e8f0; text-align: right }
th:first-child, td:first-child { text-align: left } h2 { margin-top: 2em } .note { color: #4a5568 }
"""


def page(
    title: str,
    note: str,
    tables: Sequence[tuple[str, Sequence[str], Sequence[Sequence[str]]]],
    pictures: Sequence[tuple[str, str, bytes]],
) -> str:
    """Returns the page as HTML.

    Args:
        note: a line below the title.
        tables: heading, column names and rows of each.
        pictures: heading, a line on what it shows, and a PNG file, for each.
    """
    parts = [f"<h1>{html.escape(title)}</h1>", f'<p class="note">{html.escape(note)}</p>']
    for heading, about, picture in pictures:
        encoded = base64.b64encode(picture).decode()
        parts += [
            f"<h2>{html.escape(heading)}</h2>",
            f'<p class="note">{html.escape(about)}</p>',
            f'<img alt="{html.escape(heading)}" src="data:image/png;base64,{encoded}">',
        ]
    for heading, columns, rows in tables:
        head = "".join(f"<th>{html.escape(c)}</th>" for c in columns)
        body = "".join(
            f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>\n" for row in rows
        )
        parts.append(f"<h2>{html.escape(heading)}</h2>\n<table><tr>{head}</tr>\n{body}</table>")
    content = "\n".join(parts)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        f"<style>\n{_STYLE}</style></head><body>\n{content}\n</body></html>\n"
    )
