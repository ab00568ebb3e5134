"""Pictures of the continual experiment, as SVG: matrices side by side, gain by age, costs."""

from collections.abc import Mapping, Sequence

from seal_engine.loop.continual_results import MethodResult
from seal_engine.loop.forgetting import Matrix, mean_matrix
from seal_engine.report.line_chart import line_chart
from seal_engine.svg import WIDTH, bar, cut_name, element, picture, words

COLUMNS = 4  # matrices side by side
VALUES = 13  # units of a cell's side from which on there is room for its value


def draw_continual(methods: Sequence[MethodResult]) -> dict[str, str]:
    """Name -> SVG of each picture for which there is something to show."""
    measured = [m for m in methods if m.kept is not None]
    if not measured:
        return {}
    return {
        "forgetting": matrices({m.name: mean_matrix(m.matrices) for m in measured}),
        "age": ages({m.name: m.ages for m in measured}),
        "cost": costs({m.name: (m.tokens, m.bytes_kept) for m in measured}),
    }


def matrices(
    cells: Mapping[str, Matrix],
    title: str = "Accuracy on each passage after each edit, mean over sequences",
    width: int = WIDTH,
    columns: int = COLUMNS,
) -> str:
    """A heat map per method, all on one scale: nothing at 0%, full colour at 100%. Large cells have their values."""
    parts = [words(0, 14, title, "bold"), words(0, 31, "down: edits so far; across: passages; 0%", "muted small")]
    for i in range(6):
        parts.append(
            element("rect", "f-blue", x=206 + 16 * i, y=22, width=16, height=10, fill_opacity=max(0.02, i / 5))
        )
    parts.append(words(306, 31, "100%", "muted small"))
    room, upper, names = width / columns, 40.0, list(cells)
    for first in range(0, len(names), columns):
        height = 0.0
        for column, name in enumerate(names[first : first + columns]):
            size = min(20.0, (room - 10) / len(cells[name][0]))
            left, height = column * room, max(height, size * len(cells[name]))
            parts.append(words(left, upper + 14, cut_name(name, int(room / 6.5)), "small bold", name))
            for t, row in enumerate(cells[name]):
                for j, value in enumerate(row):
                    parts += _cell(name, t, j, value, left + j * size, upper + 20 + t * size, size)
        upper += height + 30
    return picture(upper, "Heat maps of accuracy by edits so far and passage, one per method", parts, width)


def _cell(name: str, t: int, j: int, value: float | None, x: float, y: float, size: float) -> list[str]:
    """A cell of a matrix; an empty frame where nothing was measured."""
    side = size - 1
    if value is None:
        return [element("rect", "s-edge", x=x, y=y, width=side, height=side, fill="none", stroke_width=0.5)]
    hover = f"{name}, passage {j + 1}, {f'after {t} edits' if t else 'untrained'}: {value:.0%}"
    parts = [element("rect", "f-blue", hover, x=x, y=y, width=side, height=side, fill_opacity=max(0.02, value))]
    if size >= VALUES:
        # Between the two the colour is light in the light theme and dark in neither, so the text is dark in both.
        look = "" if value < 0.55 else " t-half" if value < 0.82 else " t-paper"
        parts.append(words(x + side / 2, y + side / 2 + 3.5, f"{100 * value:.0f}", f"mid tiny{look}", hover))
    return parts


def ages(
    gains: Mapping[str, Sequence[float | None]],
    title: str = "Gain over the untrained model by age of the edit, in points",
    width: int = WIDTH,
) -> str:
    """Gain over the untrained model by how many edits came after."""
    lines = {
        name: {float(age): gain for age, gain in enumerate(own) if gain is not None} for name, own in gains.items()
    }
    count = max(map(len, gains.values()))
    return line_chart(
        title,
        lines,
        {float(age): str(age) for age in range(0, count, -(-count // 8))},
        "edits since",
        lambda gain: f"{100 * gain:+.1f}",
        lambda name, age, gain: f"{name}, {age:g} edits since: {100 * gain:+.1f} points",
        scale=100,
        width=width,
    )


def costs(spent: Mapping[str, tuple[int, float | None]], title: str = "What each method costs") -> str:
    """Name -> tokens trained, and bytes kept."""
    most_tokens = max([tokens for tokens, _ in spent.values()] + [1])
    most_bytes = max([size or 0 for _, size in spent.values()] + [1])
    left, middle, room = 92, 282, 112
    parts = [words(0, 14, title, "bold"), words(left, 31, "thousand tokens trained", "muted small")]
    parts.append(words(middle, 31, "KiB kept per sequence", "muted small"))
    for row, (name, (trained, size)) in enumerate(spent.items()):
        y, kept = 38 + 18 * row, (size or 0) / 1024
        parts.append(words(left - 8, y + 11, cut_name(name, 15), "end small", name))
        parts.append(bar(left, y, room * trained / most_tokens, 13, "f-blue"))
        tokens = f"{trained / 1000:,.3g}" if trained < 1e6 else f"{trained / 1000:,.0f}"
        parts.append(words(left + room * trained / most_tokens + 4, y + 11, tokens, "small"))
        parts.append(bar(middle, y, room * 1024 * kept / most_bytes, 13, "f-gold"))
        parts.append(words(middle + room * 1024 * kept / most_bytes + 4, y + 11, f"{kept:,.0f}", "small"))
    return picture(38 + 18 * len(spent) + 4, "Tokens trained and bytes kept, by method", parts)
