"""Pictures of the continual experiment, as SVG: matrices side by side, gain by age, costs."""

from collections.abc import Sequence

from seal_engine.loop.continual_results import MethodResult
from seal_engine.loop.forgetting import mean_matrix
from seal_engine.svg import (
    LINE,
    WIDTH,
    axis_step,
    bar,
    cut_name,
    dot,
    element,
    line,
    picture,
    spread,
    words,
)

COLUMNS = 4  # matrices side by side
COLOURS = ("blue", "orange", "gold", "grey", "sky")
DASHES = ("", " dash")  # of the first methods with these colours, and of the next ones


def draw_continual(methods: Sequence[MethodResult]) -> dict[str, str]:
    """Name -> SVG of each picture for which there is something to show."""
    measured = [m for m in methods if m.kept is not None]
    if not measured:
        return {}
    return {"forgetting": _matrices(measured), "age": _ages(measured), "cost": _costs(measured)}


def _matrices(methods: Sequence[MethodResult]) -> str:
    """A heat map per method, all on one scale: nothing at 0%, the full colour at 100%."""
    parts = [words(0, 14, "Accuracy on each passage after each edit, mean over sequences", "bold")]
    parts.append(words(0, 31, "down: edits so far; across: passages; 0%", "muted small"))
    for i in range(6):
        parts.append(
            element("rect", "f-blue", x=206 + 16 * i, y=22, width=16, height=10, fill_opacity=max(0.02, i / 5))
        )
    parts.append(words(306, 31, "100%", "muted small"))
    room, upper = WIDTH / COLUMNS, 40.0
    for first in range(0, len(methods), COLUMNS):
        shown = [(m, mean_matrix(m.matrices)) for m in methods[first : first + COLUMNS]]
        height = 0.0
        for column, (method, cells) in enumerate(shown):
            size = min(20.0, (room - 10) / len(cells[0]))
            left, height = column * room, max(height, size * len(cells))
            parts.append(words(left, upper + 14, cut_name(method.name, 17), "small bold", method.name))
            for t, row in enumerate(cells):
                for j, value in enumerate(row):
                    parts.append(_cell(method.name, t, j, value, left + j * size, upper + 20 + t * size, size))
        upper += height + 30
    return picture(upper, "Heat maps of accuracy by edits so far and passage, one per method", parts)


def _cell(name: str, t: int, j: int, value: float | None, x: float, y: float, size: float) -> str:
    """A cell of a matrix; an empty frame where nothing was measured."""
    side = size - 1
    if value is None:
        return element("rect", "s-edge", x=x, y=y, width=side, height=side, fill="none", stroke_width=0.5)
    hover = f"{name}, passage {j + 1}, {f'after {t} edits' if t else 'untrained'}: {value:.0%}"
    return element("rect", "f-blue", hover, x=x, y=y, width=side, height=side, fill_opacity=max(0.02, value))


def _ages(methods: Sequence[MethodResult]) -> str:
    """Gain over the untrained model by how many edits came after; lines are named at their ends."""
    gains = [gain for m in methods for gain in m.ages if gain is not None]
    high, low = 100 * max([*gains, 0.05]), 100 * min([*gains, 0.0])
    left, right, upper = 34, 286, 30
    lower = upper + max(190, LINE * len(methods))
    count = max(len(m.ages) for m in methods)

    def x(age: int) -> float:
        return left + 8 + age * (right - left - 16) / max(1, count - 1)

    def y(gain: float) -> float:
        return lower - (100 * gain - low) / (high - low) * (lower - upper)

    parts = [words(0, 14, "Gain over the untrained model by age of the edit, in points", "bold")]
    step = axis_step(high - low)
    for i in range(int(low // step) + 1 if low else 0, int(high / step + 1e-9) + 1):
        parts.append(line(left, y(i * step / 100), right, y(i * step / 100), f"thin s-{'edge' if i else 'ink'}"))
        parts.append(words(left - 6, y(i * step / 100) + 4, f"{i * step:g}", "end muted small"))
    for age in range(0, count, -(-count // 8)):
        parts.append(words(x(age), lower + 16, str(age), "mid muted small"))
    parts.append(words((left + right) / 2, lower + 31, "edits since", "mid muted small"))
    ends = []
    for i, method in enumerate(methods):
        colour, dash = COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)]
        known = [(age, gain) for age, gain in enumerate(method.ages) if gain is not None]
        if not known:
            continue
        points = " ".join(f"{x(age):.1f},{y(gain):.1f}" for age, gain in known)
        parts.append(element("polyline", f"line s-{colour}{dash}", method.name, points=points))
        for age, gain in known:
            hover = f"{method.name}, {age} edits since: {100 * gain:+.1f} points"
            parts.append(dot(x(age), y(gain), 3, f"f-{colour}", hover))
        ends.append((x(known[-1][0]), y(known[-1][1]), f"{100 * known[-1][1]:+.1f} {method.name}", colour, dash))
    ends.sort(key=lambda end: end[1])
    places = spread([end[1] for end in ends], 13, upper, lower + 26)
    for place, (last_x, last_y, name, colour, dash) in zip(places, ends, strict=True):
        parts.append(line(last_x + 4, last_y, right + 10, place, "s-edge thin"))
        parts.append(line(right + 12, place, right + 28, place, f"s-{colour}{dash}"))
        parts.append(words(right + 33, place + 4, cut_name(name, 20), "small", name))
    return picture(lower + 36, "Gain over the untrained model by how many edits came after", parts)


def _costs(methods: Sequence[MethodResult]) -> str:
    """Tokens trained, and bytes kept."""
    most_tokens = max([m.tokens for m in methods] + [1])
    most_bytes = max([m.bytes_kept or 0 for m in methods] + [1])
    left, middle, room = 92, 282, 112
    parts = [words(0, 14, "What each method costs", "bold"), words(left, 31, "thousand tokens trained", "muted small")]
    parts.append(words(middle, 31, "KiB kept per sequence", "muted small"))
    for row, method in enumerate(methods):
        y, kept = 38 + 18 * row, (method.bytes_kept or 0) / 1024
        parts.append(words(left - 8, y + 11, cut_name(method.name, 15), "end small", method.name))
        parts.append(bar(left, y, room * method.tokens / most_tokens, 13, "f-blue"))
        tokens = f"{method.tokens / 1000:,.3g}" if method.tokens < 1e6 else f"{method.tokens / 1000:,.0f}"
        parts.append(words(left + room * method.tokens / most_tokens + 4, y + 11, tokens, "small"))
        parts.append(bar(middle, y, room * 1024 * kept / most_bytes, 13, "f-gold"))
        parts.append(words(middle + room * 1024 * kept / most_bytes + 4, y + 11, f"{kept:,.0f}", "small"))
    return picture(38 + 18 * len(methods) + 4, "Tokens trained and bytes kept, by method", parts)
