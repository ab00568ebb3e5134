"""Pieces of a page: whatever text goes in is escaped here, and numbers that are missing are shown as such."""

import base64
import hashlib
import math
from collections.abc import Iterable, Sequence

from seal_engine.svg import STYLE as SVG_STYLE
from seal_engine.svg import THEME, clean

NONE = "-"
STYLE = (
    THEME
    + SVG_STYLE
    + """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; color: var(--ink);
  background: var(--paper); }
h1, h2, h3, h4 { line-height: 1.2; overflow-wrap: anywhere; } h1 { font-size: 1.9rem; margin-bottom: .5rem; }
h2 { margin-top: 3rem; } h3 { margin: 2rem 0 .5rem; }
h4 { margin: .5rem 0 .2rem; font-size: .9rem; color: var(--muted); }
a { color: var(--blue); } small { font-weight: 400; color: var(--muted); }
.note, figcaption { color: var(--muted); font-size: .9rem; } .lead { font-size: 1.1rem; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .25rem 1rem .25rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--edge); }
td { overflow-wrap: break-word; } th { white-space: nowrap; } th.n, td.n { text-align: right; white-space: nowrap; }
.beside { display: flex; flex-wrap: wrap; gap: 0 2rem; } .beside > * { flex: 1 1 18rem; min-width: 0; }
figure { margin: 1rem 0; max-width: 34rem; }
figure svg { display: block; width: 100%; height: auto; overflow: visible; }
figure a { cursor: pointer; }
pre, .passage { white-space: pre-wrap; overflow-wrap: anywhere; margin: .3rem 0; font-size: .88rem; line-height: 1.45;
  background: var(--wash); border-radius: 6px; padding: .6rem .8rem; }
pre { font-family: ui-monospace, monospace; } mark { background: var(--mark); color: inherit; border-radius: 3px; }
u { text-decoration: underline dotted; text-underline-offset: 3px; }
.example { border: 1px solid var(--edge); border-radius: 8px; padding: .2rem 1rem .4rem; margin: 1.2rem 0; }
.example h3 { margin-top: .8rem; } .right { color: var(--blue); } .wrong { color: var(--orange); }
.right, .wrong { font-weight: 600; }
summary { cursor: pointer; padding: .15rem 0; } details details { margin-left: 1rem; }
.edits { max-height: 38rem; overflow-y: auto; border-left: 3px solid var(--edge); padding-right: .5rem; }
#filter { display: flex; flex-wrap: wrap; gap: .5rem 1.2rem; margin: 1rem 0; } #filter[hidden] { display: none; }
#filter input, #filter select { font: inherit; max-width: 11rem; } #filter input[type=number] { width: 4.2rem; }
@media (max-width: 600px) {
  .answers thead { display: none; }
  .answers tr { display: block; border-bottom: 1px solid var(--edge); padding: .3rem 0; }
  .answers td { display: block; border: 0; padding: 0; } .answers td:first-child { font-weight: 600; }
  .answers td:not(:first-child)::before { content: attr(data-label) ": "; color: var(--muted); }
}
@media print { body { margin: 0; max-width: none; } figure, tr { break-inside: avoid; } }
"""
)
# Should escaping ever fail, a browser still runs nothing but this script, and fetches nothing.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def document(title: str, sections: Iterable[str], script: str = "", heading: str = "") -> str:
    """The whole page; empty sections are left out. script: what runs in it. heading: in place of the title."""
    policy = POLICY.format(digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode())
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{clean(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{clean(heading or title)}</h1>\n"
        + "\n".join(filter(None, sections))
        + (f"\n<script>{script}</script>" if script else "")
        + "\n</body>\n</html>\n"
    )


def figure(svg: str, caption: str = "") -> str:
    """A picture, with what is to be known about it below."""
    below = f"<figcaption>{clean(caption)}</figcaption>" if caption else ""
    return f"<figure>\n{svg}\n{below}</figure>\n"


def table(heads: Sequence[str], lines: Iterable[Sequence[str]], numbers: Iterable[int] = ()) -> str:
    """A table of texts, in a box in which it scrolls. numbers: the columns that are flush right. No line of heads if
    all are empty."""
    return table_of([*map(clean, heads)], ([*map(clean, line)] for line in lines), numbers)


def table_of(heads: Sequence[str], lines: Iterable[Sequence[str]], numbers: Iterable[int] = (), kind: str = "") -> str:
    """The same of cells that are HTML. kind "answers": cells stand below each other where there is little room."""
    right = set(numbers)
    kinds = [' class="n"' if i in right else "" for i in range(len(heads))]
    labels = [f' data-label="{head}"' if kind else "" for head in heads]

    def row(cells: Sequence[str], tag: str) -> str:
        looks = zip(cells, kinds, labels if tag == "td" else [""] * len(cells), strict=True)
        return "".join(f"<{tag}{look}{label}>{cell}</{tag}>" for cell, look, label in looks)

    opening = f'<table class="{kind}">' if kind else "<table>"
    head = f"<thead><tr>{row(heads, 'th')}</tr></thead>\n" if any(heads) else ""
    body = "".join(f"<tr>{row(line, 'td')}</tr>\n" for line in lines)
    return f'<div class="scroll">{opening}\n{head}<tbody>\n{body}</tbody>\n</table></div>\n'


def fold(title: str, content: str) -> str:
    """HTML that is hidden until it is asked for."""
    return f"<details><summary>{clean(title)}</summary>\n{content}</details>\n"


def preformatted(plain: str, length: int) -> str:
    """A text as it was written, cut."""
    return f'<pre dir="auto">{clean(cut(plain, length))}</pre>' if plain.strip() else '<p class="note">(empty)</p>'


def cut(plain: str, length: int) -> str:
    """At most `length` characters, and a note where there were more."""
    return plain if len(plain) <= length else f"{plain[:length]} … (cut: {length:,} of {len(plain):,} characters)"


def percent(value: float | None) -> str:
    """Of 1, without the sign."""
    return NONE if value is None else f"{100 * value:.1f}"


def number(value: float | None) -> str:
    """Four digits of it."""
    return NONE if value is None else f"{value:.4g}" if math.isfinite(value) else "not finite"


def rate(count: int, seconds: float) -> str:
    """A second."""
    return f"{count / seconds:,.0f}" if 0 < seconds * 100 < count else f"{count / seconds:.3g}" if seconds > 0 else NONE


def date(iso: str) -> str:
    """A time of the ledger's, which are UTC, to the second."""
    return f"{iso[:19].replace('T', ' ')} UTC"


def duration(seconds: float) -> str:
    """With the units that fit."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
