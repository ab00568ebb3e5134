"""Pieces of pictures as SVG. Colours are variables of the theme, so that one picture is right in light and in dark.

Lengths are in units of the picture, WIDTH of which are its width: on a narrow screen text is a little smaller than on
the page around it, on a wide one a little larger.
"""

import math
from collections.abc import Iterable, Sequence
from html import escape

WIDTH = 440
WIDE = 640  # of a picture for a page that is never narrow, such as a README
FILE_SCALE = 57 / 44  # pixels per unit of a picture that is shown as a file of its own: 570 of WIDTH, 829 of WIDE
LINE = 15  # height of a line of text
# Text on paper has a contrast of 4.5 or more, marks of 3 or more.
THEME = """
:root { color-scheme: light dark; --ink: #1b1f24; --muted: #57606a; --paper: #ffffff; --edge: #d0d7de; --wash: #f3f5f8;
  --blue: #0a62a8; --sky: #5aa9dd; --orange: #a84300; --gold: #b98200; --gold-text: #7d5800;
  --grey: #7d858e; --mark: #ffe9a8; --half: #1b1f24; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --muted: #a0aab4; --paper: #12161c; --edge: #3b434c;
  --wash: #1c222a; --blue: #6cb6ff; --sky: #2f6f9f; --orange: #ff9d5c; --gold: #d0a02e; --gold-text: #e3b341;
  --grey: #8b949e; --mark: #574609; --half: #12161c; } }
"""
STYLE = """
svg { font: 12px system-ui, sans-serif; } svg text { fill: var(--ink); } svg .muted { fill: var(--muted); }
svg .small { font-size: 10.5px; } svg .tiny { font-size: 9.6px; } svg .bold { font-weight: 700; }
svg .end { text-anchor: end; } svg .mid { text-anchor: middle; }
svg .line { stroke-width: 2; } svg .thin { stroke-width: 1; } svg .dash { stroke-dasharray: 5 3; }
svg .t-blue { fill: var(--blue); } svg .t-orange { fill: var(--orange); } svg .t-gold { fill: var(--gold-text); }
svg .t-grey { fill: var(--muted); } svg .t-half { fill: var(--half); } svg .t-paper { fill: var(--paper); }
svg .f-blue { fill: var(--blue); } svg .f-sky { fill: var(--sky); } svg .f-orange { fill: var(--orange); }
svg .f-gold { fill: var(--gold); } svg .f-grey { fill: var(--grey); } svg .f-paper { fill: var(--paper); }
svg .f-ink { fill: var(--ink); } svg .f-wash { fill: var(--wash); }
svg .s-blue { stroke: var(--blue); } svg .s-orange { stroke: var(--orange); } svg .s-grey { stroke: var(--grey); }
svg .s-gold { stroke: var(--gold); } svg .s-sky { stroke: var(--sky); } svg .s-ink { stroke: var(--ink); }
svg .s-edge { stroke: var(--edge); } svg polyline { fill: none; }
"""


def element(name: str, classes: str = "", hover: str = "", content: str = "", **attributes: float | str) -> str:
    """An element; hover: text that is shown where the pointer is on it."""
    values = {"class": classes, **attributes} if classes else attributes
    shown = "".join(f' {key.replace("_", "-")}="{_attribute(value)}"' for key, value in values.items())
    inside = (f"<title>{clean(hover)}</title>" if hover else "") + content
    return f"<{name}{shown}>{inside}</{name}>" if inside else f"<{name}{shown}/>"


def clean(text: str) -> str:
    """Any text as markup that shows it; control characters, which XML cannot hold, as a sign that one was there."""
    shown = "".join(c if c in "\n\t" or not (ord(c) < 32 or 127 <= ord(c) < 160) else "\ufffd" for c in text)
    return escape(shown)


def line(x1: float, y1: float, x2: float, y2: float, classes: str, hover: str = "") -> str:
    """A straight line."""
    return element("line", f"line {classes}", hover, x1=x1, y1=y1, x2=x2, y2=y2)


def dot(x: float, y: float, radius: float, classes: str, hover: str = "") -> str:
    """A circle."""
    return element("circle", classes, hover, cx=x, cy=y, r=radius)


def bar(x: float, y: float, width: float, height: float, classes: str, hover: str = "") -> str:
    """A rectangle."""
    return element("rect", classes, hover, x=x, y=y, width=width, height=height)


def words(x: float, y: float, text: str, classes: str = "", hover: str = "") -> str:
    """One line of text, its base line at y."""
    return element("text", classes, hover, clean(text), x=x, y=y)


def picture(height: float, alternative: str, parts: Iterable[str], width: int = WIDTH) -> str:
    """The whole picture. alternative: what it shows, for those who cannot see it."""
    size = f'viewBox="0 0 {width} {_attribute(height)}"'
    head = f'<svg {size} role="img" aria-label="{clean(alternative)}">'
    return head + "\n" + "\n".join(parts) + "\n</svg>"


def standalone(svg: str) -> bytes:
    """A picture as a file of its own, which follows the scheme of the browser, and is on paper of its own: a page may
    have another theme than its browser."""
    width = round(FILE_SCALE * int(svg.partition('viewBox="0 0 ')[2].partition(" ")[0]))
    svg = svg.replace("<svg", f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}"', 1)
    return svg.replace("\n", f"\n<style>{THEME}{STYLE}svg {{ background: var(--paper); }}</style>\n", 1).encode(
        "utf-8", "replace"
    )


def axis_step(largest: float, most: int = 6) -> float:
    """1, 2 or 5 times a power of ten, so that at most so many steps reach the largest value."""
    rough = largest / most
    power = 10.0 ** math.floor(math.log10(rough))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= rough * (1 - 1e-9))


def spread(wanted: Sequence[float], distance: float, lowest: float, highest: float) -> list[float]:
    """Places near those that are wanted, ascending, at least so far apart where there is room for it."""
    places: list[float] = []
    for place in wanted:
        places.append(max(place, places[-1] + distance) if places else max(place, lowest))
    ceiling = highest
    for i in reversed(range(len(places))):
        places[i] = min(places[i], ceiling)
        ceiling = places[i] - distance
    return places


def cut_name(name: str, length: int) -> str:
    """One line of at most `length` characters."""
    name = " ".join("".join(c if c.isprintable() else " " for c in name).split())
    return name if len(name) <= length else name[: length - 1] + "…"


def num_shared_words(names: Sequence[str]) -> int:
    """With how many words all names begin, at least one more being left of each: "held out" of held-out contexts."""
    split = [name.split(" ")[:-1] for name in names]
    shared = 0
    for words_there in zip(*split, strict=False):
        if len(set(words_there)) > 1:
            break
        shared += 1
    return shared


def _attribute(value: float | str) -> str:
    return clean(value) if isinstance(value, str) else f"{round(value, 2):g}"
