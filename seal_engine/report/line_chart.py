"""Lines over one axis, each named at its end."""

from collections.abc import Callable, Mapping

from seal_engine.svg import LINE, WIDTH, axis_step, cut_name, dot, element, line, picture, spread, words

COLOURS = ("blue", "orange", "gold", "grey", "sky")
DASHES = ("", " dash")  # of the first lines with these colours, and of the next ones
NAME_ROOM = 172  # to the right of the last point


def line_chart(
    title: str,
    lines: Mapping[str, Mapping[float, float]],
    ticks: Mapping[float, str],
    x_title: str,
    shown: Callable[[float], str],
    hover: Callable[[str, float, float], str],
    subtitle: str = "",
    scale: float = 1,
    unit: str = "",
    width: int = WIDTH,
) -> str:
    """The picture as SVG. The axis of values has 0, whether values are above it, below it or both.

    lines: name -> x -> value. ticks: x -> text. shown: a value as it stands at a line's end. hover: the text of a
    point, from its line's name, x and value. scale: what values are multiplied by on the axis, unit: what stands after.
    """
    lines = {name: points for name, points in lines.items() if points}
    values = [scale * value for points in lines.values() for value in points.values()]
    high, low = max([*values, 0.05 * scale]), min([*values, 0.0])
    left, right, upper = 38, width - NAME_ROOM, 47 if subtitle else 30
    lower = upper + max(190, LINE * len(lines))
    last_x = max([*ticks, *(x for points in lines.values() for x in points)])

    def place_x(x: float) -> float:
        return left + 8 + x * (right - left - 16) / max(1, last_x)

    def place_y(value: float) -> float:
        return lower - (value - low) / (high - low) * (lower - upper)

    parts = [words(0, 14, title, "bold"), words(0, 31, subtitle, "muted small")]
    step = axis_step(high - low)
    for i in range(int(low // step) + 1 if low else 0, int(high / step + 1e-9) + 1):
        y = place_y(i * step)
        parts.append(line(left, y, right, y, f"thin s-{'edge' if i else 'ink'}"))
        parts.append(words(left - 6, y + 4, f"{i * step:g}{unit}", "end muted small"))
    parts += [words(place_x(x), lower + 16, text, "mid muted small") for x, text in ticks.items()]
    parts.append(words((left + right) / 2, lower + 31, x_title, "mid muted small"))
    ends = []
    for i, (name, points) in enumerate(lines.items()):
        look = f"s-{COLOURS[i % len(COLOURS)]}{DASHES[i // len(COLOURS) % len(DASHES)]}"
        places = [(place_x(x), place_y(scale * value)) for x, value in sorted(points.items())]
        shape = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(element("polyline", f"line {look}", name, points=shape))
        for (x, y), (at, value) in zip(places, sorted(points.items()), strict=True):
            parts.append(dot(x, y, 3, f"f-{COLOURS[i % len(COLOURS)]}", hover(name, at, value)))
        ends.append((places[-1][1], places[-1][0], f"{shown(points[max(points)])} {name}", look))
    ends.sort()
    names = spread([end[0] for end in ends], 13, upper, lower + 26)
    for place, (y, x, text, look) in zip(names, ends, strict=True):
        parts.append(line(x + 4, y, right + 10, place, "s-edge thin"))
        parts.append(line(right + 12, place, right + 28, place, look))
        parts.append(words(right + 33, place + 4, cut_name(text, 24), "small", text))
    return picture(lower + 36, f"{title}: {'; '.join(text for _, _, text, _ in ends)}", parts, width)
