"""The frame of a page: one file that holds all it needs, for light and dark, wide and narrow screens.

plotly writes drawings, and neither headings nor tables nor colours that follow the reader's settings. Here a page is
text, tables and drawings in one HTML file that fetches nothing: plotly's script stands in it once, a few lines of
script give the drawings the colours that the page has, and what a drawing shows is said by a table, too, for those who
do not see it. What a script's author has named is escaped wherever it stands.
"""

import html
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from packlight.serial import write_whole

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
<script>{plotly}</script>
</head>
<body>
{body}
<script>{script}</script>
</body>
</html>
"""

STYLE = """
:root { --page: #ffffff; --text: #1b1f24; --soft: #57606a; --line: #d0d7de; --card: #f6f8fa; --link: #0550ae; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14171c; --text: #e6e9ed; --soft: #a2abb6; --line: #3a424d; --card: #1e2329; --link: #7cb7ff; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 90rem; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 0.25rem; }
h2 { font-size: 1.2rem; margin: 2rem 0 0.5rem; }
h3 { font-size: 1rem; margin: 0.75rem 0 0.25rem; }
p { margin: 0.25rem 0 0.75rem; max-width: 60rem; }
.soft { color: var(--soft); }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: 0.5rem; margin: 1rem 0; }
.cards div { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: 0.5rem 0.75rem; }
.cards dt { color: var(--soft); font-size: 0.85rem; }
.cards dd { margin: 0; font-size: 1.2rem; font-weight: 600; }
.keys { display: flex; flex-wrap: wrap; gap: 0.15rem 1rem; list-style: none; margin: 0.25rem 0; padding: 0;
  font-size: 0.9rem; }
.keys span { display: inline-block; width: 0.8rem; height: 0.8rem; border-radius: 2px; margin-right: 0.35rem; }
.beside { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 34rem), 1fr)); gap: 0 1.5rem; }
.beside > * { min-width: 0; }
.scroll { overflow-x: auto; max-height: 34rem; overflow-y: auto; border: 1px solid var(--line); border-radius: 6px;
  margin-bottom: 0.75rem; }
.scroll:focus-visible, button:focus-visible, summary:focus-visible { outline: 3px solid var(--link); }
table { border-collapse: collapse; width: 100%; font-size: 0.9rem; overflow-wrap: normal; }
caption { text-align: left; padding: 0.4rem 0.6rem; color: var(--soft); }
th, td { text-align: left; padding: 0.25rem 0.6rem; border-top: 1px solid var(--line); vertical-align: top; }
thead th { position: sticky; top: 0; background: var(--card); border-top: 0; white-space: nowrap; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
button { font: inherit; font-size: 0.85rem; color: var(--text); background: var(--card);
  border: 1px solid var(--line); border-radius: 6px; padding: 0.15rem 0.6rem; margin: 0 0.25rem 0.25rem 0;
  cursor: pointer; }
summary { cursor: pointer; margin: 0.5rem 0; }
pre { white-space: pre-wrap; background: var(--card); border: 1px solid var(--line); border-radius: 6px;
  padding: 0.75rem; font-size: 0.85rem; }
"""

SCRIPT = """
const dark = matchMedia('(prefers-color-scheme: dark)');
function paint() {
  const style = getComputedStyle(document.documentElement);
  const colour = name => style.getPropertyValue(name).trim();
  for (const drawing of document.querySelectorAll('.plotly-graph-div')) {
    const change = {'font.color': colour('--text'), 'paper_bgcolor': 'rgba(0,0,0,0)', 'plot_bgcolor': 'rgba(0,0,0,0)',
      'hoverlabel.bgcolor': colour('--card'), 'hoverlabel.bordercolor': colour('--line'),
      'hoverlabel.font.color': colour('--text'), 'modebar.bgcolor': 'rgba(0,0,0,0)',
      'modebar.color': colour('--soft'), 'modebar.activecolor': colour('--link')};
    for (const axis of ['xaxis', 'yaxis'])
      for (const part of ['gridcolor', 'zerolinecolor', 'linecolor']) change[axis + '.' + part] = colour('--line');
    Plotly.relayout(drawing, change);
  }
}
dark.addEventListener('change', paint);
for (const button of document.querySelectorAll('button[data-drawing]'))
  button.addEventListener('click', () => Plotly.relayout(button.dataset.drawing,
    {'xaxis.range': [Number(button.dataset.start), Number(button.dataset.end)]}));
if (window.Plotly) paint();
"""
"""Colours follow the reader's; buttons show a part of a drawing, for those who do not use a mouse."""


def escaped(text: object) -> str:
    """Return text as HTML."""
    return html.escape(str(text))


def drawn(figure: Any, name: str, *, described: str) -> str:
    """Return a figure as HTML, for a page.

    Args:
        figure: plotly's.
        name: the element's.
        described: what it shows, in a sentence, for those who do not see it.
    """
    figure.update_layout(template="none", font={"size": 12, "family": "system-ui, sans-serif"}, autosize=True)
    settings = {"displaylogo": False, "responsive": True, "modeBarButtonsToRemove": ["select2d", "lasso2d"]}
    told = figure.to_html(full_html=False, include_plotlyjs=False, div_id=name, config=settings)
    return f'<div role="img" aria-label="{escaped(described)}">{told}</div>'


def tabled(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Sequence[int] = ()) -> str:
    """Return a table that scrolls by itself where it is wider than the page.

    Args:
        title: its caption.
        columns: their heads; none where all are empty.
        rows: cells, as text.
        numbers: which columns hold numbers.
    """

    def cell(tag: str, at: int, text: str) -> str:
        kind = ' class="number"' if at in numbers else ""
        return f"<{tag}{kind}>{escaped(text)}</{tag}>"

    def line(tag: str, cells: Sequence[str]) -> str:
        return f"<tr>{''.join(cell(tag, at, text) for at, text in enumerate(cells))}</tr>"

    head = f"<thead>{line('th', columns)}</thead>" if any(columns) else ""
    body = "\n".join(line("td", cells) for cells in rows)
    label = escaped(title or "facts")
    caption = f"<caption>{label}</caption>" if title else ""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table>{caption}'
        f"{head}<tbody>\n{body}\n</tbody></table></div>"
    )


def as_html(table: Table) -> str:
    """Return a table that was made for the terminal as HTML."""
    columns = [str(column.header) for column in table.columns]
    rows = zip(*([str(cell) for cell in column.cells] for column in table.columns), strict=True)
    numbers = [at for at, column in enumerate(table.columns) if column.justify == "right"]
    return tabled(str(table.title or ""), columns, rows, numbers=numbers)


def write_page(path: str | os.PathLike[str], *, title: str, body: str) -> None:
    """Write a page; the file appears whole or not at all.

    Args:
        path: of the page (5 MB of it draws).
        title: as text.
        body: as HTML.
    """
    from plotly.offline import get_plotlyjs

    page = PAGE.format(title=escaped(title), style=STYLE, plotly=get_plotlyjs(), body=body, script=SCRIPT)
    write_whole(Path(path), page)
