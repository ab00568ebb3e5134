"""Pieces of a page: whatever text goes in is escaped here, and numbers that are missing are shown as such."""

import base64
import html
import math
from collections.abc import Iterable, Sequence

NONE = "-"
STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2, h3 { line-height: 1.2; overflow-wrap: anywhere; } h2 { margin-top: 2.5rem; } h3 { margin-top: 2rem; }
table { border-collapse: collapse; margin: 1rem 0; max-width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem 1rem .2rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #8886; }
td { overflow-wrap: anywhere; } th.n, td.n { text-align: right; } td.n { white-space: nowrap; }
figure { margin: 1rem 0; } figcaption, .note { opacity: .75; font-size: .9rem; }
img { max-width: 100%; height: auto; background: white; border: 1px solid #8886; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .3rem 0; font: .85rem/1.4 ui-monospace, monospace; }
.pair { table-layout: fixed; width: 100%; } .pair ol { padding-left: 1.6rem; margin: .3rem 0; }
summary { cursor: pointer; }
@media print { body { margin: 0; max-width: none; } figure, tr { break-inside: avoid; } }
"""
# Should escaping ever fail, a browser still runs and fetches nothing.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def document(title: str, sections: Iterable[str]) -> str:
    """The whole page; empty sections are left out."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{text(title)}</h1>\n"
        + "\n".join(filter(None, sections))
        + "\n</body>\n</html>\n"
    )


def figure(picture: bytes, alternative: str, caption: str) -> str:
    """A PNG inside the page."""
    data = base64.b64encode(picture).decode()
    below = f"<figcaption>{text(caption)}</figcaption>" if caption else ""
    return f'<figure><img alt="{text(alternative)}" src="data:image/png;base64,{data}">{below}</figure>'


def table(heads: Sequence[str], lines: Iterable[Sequence[str]], numbers: Iterable[int] = ()) -> str:
    """A table of texts. numbers: the columns that are flush right. No line of heads if all are empty."""
    right = set(numbers)
    kinds = [' class="n"' if i in right else "" for i in range(len(heads))]

    def row(cells: Sequence[str], tag: str) -> str:
        return "".join(f"<{tag}{kind}>{text(cell)}</{tag}>" for cell, kind in zip(cells, kinds, strict=True))

    head = f"<thead><tr>{row(heads, 'th')}</tr></thead>\n" if any(heads) else ""
    body = "".join(f"<tr>{row(line, 'td')}</tr>\n" for line in lines)
    return f"<table>\n{head}<tbody>\n{body}</tbody>\n</table>\n"


def fold(title: str, content: str) -> str:
    """HTML that is hidden until it is asked for."""
    return f"<details><summary>{text(title)}</summary>\n{content}</details>\n"


def text(plain: str) -> str:
    """Any text as HTML that shows it; control characters, which HTML cannot hold, as a sign that one was there."""
    shown = "".join(c if c in "\n\t" or not (ord(c) < 32 or 127 <= ord(c) < 160) else "\ufffd" for c in plain)
    return html.escape(shown)


def preformatted(plain: str, length: int) -> str:
    """A text as it was written, cut."""
    return f'<pre dir="auto">{text(cut(plain, length))}</pre>' if plain.strip() else '<p class="note">(empty)</p>'


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
