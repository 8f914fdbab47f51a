"""Lays a card out: one HTML file that needs no other file and no network, or Markdown.

The page follows the reader's light or dark setting and prints black on white. Every text is escaped.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from megatron_emoe.sweep.card import Card
from megatron_emoe.sweep.card_table import Section, Table

STYLE = """
:root { color-scheme: light dark; --text: #1b1b1b; --page: #ffffff; --faint: #5c5c5c; --line: #d0d0d0; --row: #7f7f7f14;
  --shade: #00000033; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e8e8e8; --page: #161616; --faint: #a8a8a8; --line: #444444; --row: #7f7f7f1f;
    --shade: #ffffff40; }
}
body { margin: 2rem auto; max-width: 64rem; padding: 0 1rem; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
figure { margin: 1.5rem 0; } figcaption, .note { color: var(--faint); font-size: 0.9em; margin: 0.3rem 0; }
svg { max-width: 100%; height: auto; } svg text { fill: currentColor; }
.scroll { overflow-x: auto; scrollbar-width: thin; background:
  linear-gradient(to right, var(--page) 30%, transparent) left / 2.5rem 100% no-repeat local,
  linear-gradient(to left, var(--page) 30%, transparent) right / 2.5rem 100% no-repeat local,
  linear-gradient(to right, var(--shade), transparent) left / 0.8rem 100% no-repeat scroll,
  linear-gradient(to left, var(--shade), transparent) right / 0.8rem 100% no-repeat scroll; }
.charts { display: flex; flex-wrap: wrap; gap: 1rem; } .charts figure { flex: 1 1 26rem; margin: 0.5rem 0; }
.answer { margin: 0.3rem 0; }
table { border-collapse: collapse; margin-top: 1.2rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: 0.2rem 0; }
th, td { padding: 0.2rem 0.7rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
thead th { vertical-align: bottom; font-weight: 600; } tbody tr:nth-child(even) { background: var(--row); }
td { white-space: nowrap; } tbody th { font-weight: 400; text-align: left; overflow-wrap: break-word; }
.origin td { text-align: left; white-space: normal; overflow-wrap: anywhere; } .origin thead { display: none; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--row); padding: 0.6rem; font-size: 0.85em; }
@media print {
  :root { --text: #000000; --page: #ffffff; --faint: #333333; --line: #999999; --row: #ffffff;
    --shade: #00000000; }
  body { margin: 0; max-width: none; font-size: 8.5pt; } .scroll { overflow: visible; }
  th, td { padding: 0.1rem 0.35rem; }
  figure, tr, pre { break-inside: avoid; } h2, caption { break-after: avoid; }
}
"""


@dataclass(frozen=True)
class Figure:
    """A chart. svg: what `inline_svg` returns."""

    caption: str
    svg: str


def to_html(card: Card, figures: Sequence[Figure] = ()) -> str:
    """The page. Figures follow the first section."""
    first, *others = map(_section_html, card.sections)
    drawn = "\n".join(_figure_html(figure) for figure in figures)
    drawn = f'<div class="charts">\n{drawn}\n</div>' if figures else ""
    body = "\n".join([f"<h1>{escape(card.title)}</h1>", first, drawn, *others])
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(card.title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _figure_html(figure: Figure) -> str:
    return f"<figure>\n{figure.svg}\n<figcaption>{escape(figure.caption)}</figcaption>\n</figure>"


def _section_html(section: Section) -> str:
    said = [f'<p class="answer">{escape(line)}</p>' for line in section.lines]
    parts = [f"<section>\n<h2>{escape(section.title)}</h2>", *said, *map(_table_html, section.tables)]
    if section.command:
        parts.append(f"<pre><code>{escape(section.command)}</code></pre>")
    return "\n".join([*parts, "</section>"])


def _table_html(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in table.head)
    rows = "\n".join(f"<tr>{_row_html(row)}</tr>" for row in table.rows)
    kind = ' class="origin"' if len(table.head) == 2 and not table.head[0] else ""
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    return (
        f'<div class="scroll" tabindex="0"><table{kind}>\n<caption>{escape(table.title)}</caption>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table></div>\n{note}"
    )


def _row_html(row: Sequence[str]) -> str:
    first, *others = map(escape, row)
    return f'<th scope="row">{first}</th>' + "".join(f"<td>{text}</td>" for text in others)


def inline_svg(text: str, prefix: str) -> str:
    """An SVG file as Matplotlib writes it, made to stand in a page: it takes the page's colours.

    Black, white and Matplotlib's greys of lines become the page's. Ids that something refers to get `prefix`, so that
    several charts keep apart; the others go.
    """
    svg = text[text.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style[^>]*>\*\{stroke-linejoin[^<]*</style>", "", svg)
    used = set(re.findall(r'(?:url\(|href=")#([^")]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: f' id="{prefix}-{found[1]}"' if found[1] in used else "", svg)
    svg = re.sub(r'(url\(|href=")#', rf"\1#{prefix}-", svg)
    for fixed, own in (("#000000", "currentColor"), ("#ffffff", "var(--page)"), ("#ebebeb", "var(--line)")):
        svg = svg.replace(fixed, own)
    return svg.replace("#595959", "var(--faint)")


def to_markdown(card: Card) -> str:
    """The card without its charts."""
    return "\n\n".join([f"# {_plain(card.title)}", *map(_section_markdown, card.sections)]) + "\n"


def _section_markdown(section: Section) -> str:
    said = [_plain(line) for line in section.lines]
    parts = [f"## {_plain(section.title)}", *said, *map(_table_markdown, section.tables)]
    if section.command:
        parts.append("    " + " ".join(section.command.split()))
    return "\n\n".join(parts)


def _table_markdown(table: Table) -> str:
    lines = [table.head, ["---", *["---:"] * (len(table.head) - 1)], *table.rows]
    rows = ["| " + " | ".join(line if line is lines[1] else map(_plain, line)) + " |" for line in lines]
    note = [_plain(table.note)] if table.note else []
    return "\n\n".join([f"### {_plain(table.title)}", "\n".join(rows), *note])


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return re.sub(r"([\\`*|\[\]])", r"\\\1", escape(" ".join(text.split()), quote=False))
