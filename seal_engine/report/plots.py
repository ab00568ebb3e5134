"""The pictures of a report, as PNG bytes that depend on the data alone. Needs the extra `plot`."""

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from statistics import fmean, median, stdev
from typing import Any

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter

from seal_engine.report.data import PARTS, Pairs, Round

# Okabe and Ito's colours, which are told apart with any kind of colour blindness; their lightness differs in print.
BLUE, SKY, ORANGE, VERMILION, GREY, LIGHT = "#0072B2", "#56B4E9", "#E69F00", "#D55E00", "#8C8C8C", "#C8C8C8"
LOOKS = ((BLUE, "o", 0.0), (VERMILION, "s", 0.04))  # of lines: colour, marker, how far aside
DASHES = ((0, (6, 2)), (0, (2, 2)), (0, (6, 2, 1, 2)), (0, (1, 1)), (0, (8, 2, 2, 2, 2, 2)))
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that pictures are the same everywhere
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#E2E2E2",
    "legend.frameon": False,
    "text.parse_math": False,  # names are plain text, dollar signs included
}
NAMED_CONTEXTS = 60  # with more, names would overlap
NAMED_ROUNDS = 8  # with more, numbers would
SHOWN_ROUNDS = 8


def draw(
    written: Mapping[str, Mapping[int, Sequence[float]]],
    baselines: Mapping[str, Sequence[float]],
    pairs: Pairs | None,
    rounds: Sequence[Round],
    seconds: Mapping[str, Mapping[str, float]],
) -> dict[str, bytes]:
    """Name -> PNG of each picture for which there is something to show.

    written: method -> round -> accuracies over seeds. baselines: name -> the same. seconds: stage -> part -> seconds.
    """
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()  # whatever the user's own style is
        matplotlib.rcParams.update(STYLE)
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # names may be in any script
        pictures: dict[str, bytes] = {}
        if any(written.values()) or baselines:
            pictures["accuracy"] = png(_accuracy(written, baselines))
        if pairs is not None and pairs.changes:
            pictures["contexts"] = png(_contexts(pairs))
        if any(r.kept_rewards or r.other_rewards for r in rounds):
            pictures["kept"] = png(_kept(rounds))
        if any(sum(parts.values()) > 0 for parts in seconds.values()):
            pictures["time"] = png(_time(seconds))
        return pictures


def png(figure: Figure) -> bytes:
    """The figure as a PNG, the same bytes for the same figure."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=150, metadata={"Software": None})
    return stream.getvalue()


def _figure(height: float, title: str, handles: Sequence[Artist]) -> Figure:
    """A figure with its title and legend above all axes, where they cover nothing."""
    figure = Figure(figsize=(8, height), layout="constrained")
    # The title is the legend's own, as the layout makes room for a legend or for a title, but not for both.
    figure.legend(
        handles=handles, loc="outside upper left", ncols=5, columnspacing=1.6, handlelength=1.8, borderaxespad=0.2,
        title=title, title_fontproperties={"weight": "bold", "size": 10.5}, alignment="left",
    )  # fmt: skip
    return figure


def _key(colour: str, label: str, marker: str = "", face: str | None = None, dashed: bool = False) -> Line2D:
    """A legend's entry: a line, or a line with markers, or with `face` a marker alone."""
    line = "none" if face is not None else "--" if dashed else "-"
    return Line2D([], [], color=colour, label=label, linestyle=line, linewidth=2, marker=marker,
                  markerfacecolor=face or colour)  # fmt: skip


def _accuracy(written: Mapping[str, Mapping[int, Sequence[float]]], baselines: Mapping[str, Sequence[float]]) -> Figure:
    """Accuracy by round with its spread over seeds; baselines as lines, named on the right."""
    lines = [(m, found, *look) for (m, found), look in zip(written.items(), LOOKS, strict=False) if found]
    lines.sort(key=lambda line: -fmean(map(fmean, line[1].values())))  # the highest first
    every = [value for found in written.values() for values in found.values() for value in values]
    several = any(len(values) > 1 for found in written.values() for values in found.values())
    title = "Accuracy by round" + (
        ": means, bars of one sd each way, and seeds" if several else ", one seed" * bool(every)
    )
    figure = _figure(4.4, title, [_key(colour, m, marker) for m, _, colour, marker, _ in lines])
    axes = figure.add_subplot()
    numbers = sorted({number for found in written.values() for number in found}) or [0]
    levels = {name: fmean(values) for name, values in baselines.items()}
    top = 1.15 * max([*every, *levels.values(), 0.05])
    for i, value in enumerate(levels.values()):
        axes.axhline(value, color="#555555", linestyle=DASHES[i % len(DASHES)], linewidth=1.1, zorder=2)
    for i, (_, found, colour, marker, aside) in enumerate(lines):
        means = [fmean(values) for values in found.values()]
        axes.plot([n + aside for n in found], means, color=colour, marker=marker, linewidth=2, markersize=7, zorder=4)
        for n, values in found.items():
            mean, error = fmean(values), stdev(values) if len(values) > 1 else 0.0
            if error:
                axes.errorbar(n + aside, mean, error, color=colour, elinewidth=1.5, capsize=5, zorder=3)
            if len(values) > 1:
                axes.plot([n + aside] * len(values), values, "o", color=colour, markersize=4, alpha=0.45, zorder=3)
            if len(numbers) > NAMED_ROUNDS and n not in (numbers[0], numbers[-1]):
                continue
            # Values stand above the upper line and below the lower one, beyond all that belongs to the point.
            end = min([mean - error, *values]) if i else max([mean + error, *values])
            axes.annotate(
                f"{100 * mean:.1f}", (n + aside, end), (0, -6 if i else 6), textcoords="offset points", ha="center",
                va="top" if i else "bottom", color=colour, weight="bold", zorder=6, annotation_clip=False,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 0.6},
            )  # fmt: skip
    axes.set(
        xlim=(numbers[0] - 0.4, numbers[-1] + 0.4), ylim=(-0.02 * top, top), ylabel="accuracy on held-out contexts"
    )
    if not lines:
        numbers = []  # without self-edits there are no rounds to name
    words = ["before\nany round" if n == 0 else f"after\nround {n}" for n in numbers]
    step = max(1, math.ceil(len(numbers) / 10))
    axes.set_xticks(numbers[::step], words[::step])
    between = next((b for b in (0.01, 0.02, 0.05, 0.1) if top / b <= 8), 0.2)
    axes.set_yticks([i * between for i in range(1 + int(min(top, 1.0001) / between))])
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid(axis="y")
    _names_on_the_right(axes, levels, top)
    return figure


def _names_on_the_right(axes: Axes, levels: Mapping[str, float], top: float) -> None:
    """Names beside their lines' right ends, moved apart where they would overlap."""
    least, places = 0.06 * top, []
    ordered = sorted(levels.items(), key=lambda item: item[1])
    for _, value in ordered:
        places.append(max(value, places[-1] + least) if places else value)
    ceiling = top
    for i in reversed(range(len(places))):  # those pushed above the top push the ones below them down
        places[i] = min(places[i], ceiling)
        ceiling = places[i] - least
    where = axes.get_yaxis_transform()
    for (name, value), place in zip(ordered, places, strict=True):
        axes.annotate(
            f"{_cut(name, 34)}  {100 * value:.1f}", (1, value), (1.04, place), xycoords=where, textcoords=where,
            va="center", color="#333333", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": "#999999", "linewidth": 0.7, "shrinkA": 1, "shrinkB": 0,
                        "relpos": (0, 0.5)},
        )  # fmt: skip


def _contexts(pairs: Pairs) -> Figure:
    """A line for each context from before to after, the greatest gain at the top."""
    changes, named = pairs.changes, len(pairs.changes) <= NAMED_CONTEXTS
    better, worse = sum(c > 0 for c in changes.values()), sum(c < 0 for c in changes.values())
    over = "one seed" if len(pairs.seeds) == 1 else f"means over {len(pairs.seeds)} seeds"
    figure = _figure(
        1.5 + (0.23 * len(changes) if named else min(9.0, 0.06 * len(changes))),
        f"Each held-out context before any round and after round {pairs.last}, {over}",
        [
            _key(GREY, "before", "o", "white"), _key(GREY, "after", "o", GREY), _key(BLUE, f"better: {better}"),
            _key(VERMILION, f"worse: {worse}"), _key(GREY, f"the same: {len(changes) - better - worse}"),
        ],
    )  # fmt: skip
    axes = figure.add_subplot()
    size, width = (6.5, 1.4) if named else (3.0, 0.8)
    for row, (name, change) in enumerate(changes.items()):
        before, after = pairs.before[name], pairs.after[name]
        colour = GREY if change == 0 else BLUE if change > 0 else VERMILION
        axes.plot([before, after], [row, row], color=colour, linewidth=1.4 * width, zorder=2)
        axes.plot(after, row, "o", color=colour, markersize=size, zorder=3)
        ring = size if change or not named else size + 3.5  # around the dot where both are at one place
        axes.plot(before, row, "o", markerfacecolor="white" if change else "none", markeredgecolor=colour,
                  markeredgewidth=width if change else 0.9, markersize=ring, zorder=4)  # fmt: skip
    right = min(1.03, 1.1 * max([*pairs.before.values(), *pairs.after.values(), 0.1]))
    axes.set(xlim=(-0.03 * right, right), ylim=(len(changes) - 0.3, -0.7), xlabel="accuracy of self-edits")
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid(axis="x")
    if named:
        axes.set_yticks(range(len(changes)), [_cut(name, 40) for name in changes])
        axes.tick_params(axis="y", length=0)
    else:
        axes.set(yticks=[], ylabel=f"{len(changes)} held-out contexts, the greatest gain at the top")
    return figure


def _kept(rounds: Sequence[Round]) -> Figure:
    """For each round: rewards of all self-edits and of those kept; lengths of those kept and of the others."""
    half = SHOWN_ROUNDS // 2
    shown = rounds if len(rounds) <= SHOWN_ROUNDS else [*rounds[:half], *rounds[-half:]]
    title = "Self-edits by round" + (f" (the first and last {half} rounds)" if len(shown) < len(rounds) else "")
    handles = [
        Patch(color=LIGHT, label="all"), Patch(color=BLUE, label="kept"),
        Patch(edgecolor="black", facecolor="none", linewidth=1.3, label="not kept"),
        _key("black", "mean without adapter", dashed=True),
    ]  # fmt: skip
    figure = _figure(0.8 + 2.1 * len(shown), title, handles)
    grid = figure.subplots(len(shown), 2, squeeze=False, sharex="col")
    lengths = [length for one in shown for length in (*one.kept_tokens, *one.other_tokens)]
    shortest, width = min(lengths, default=0), math.ceil((max(lengths, default=0) - min(lengths, default=0) + 1) / 20)
    edges = [shortest - 0.5 + width * b for b in range(21)]
    bins = [(b - 0.5) / 20 for b in range(22)]  # so that 0 and 100% have bars of their own
    for one, (left, right) in zip(shown, grid, strict=True):
        left.hist([*one.kept_rewards, *one.other_rewards], bins, color=LIGHT, edgecolor="white", linewidth=0.5)
        left.hist(one.kept_rewards, bins, color=BLUE, edgecolor="white", linewidth=0.5)
        if one.base:
            left.axvline(fmean(one.base), color="black", linestyle="--", linewidth=1.3)
        left.set_title(f"Round {one.number}: {len(one.kept_tokens)} kept of {len(one.kept_tokens + one.other_tokens)}")
        left.set(ylabel="self-edits")
        left.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        left.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        medians = []
        for values, name, options in (
            (one.kept_tokens, "kept", {"color": BLUE, "histtype": "stepfilled", "alpha": 0.6}),
            (one.other_tokens, "not", {"color": "black", "histtype": "step", "linewidth": 1.3}),
        ):
            if values:
                right.hist(values, edges, weights=[1 / len(values)] * len(values), **options)
                medians.append(f"{median(values):g} if {name}")
        right.set_title(f"Round {one.number}: median {', '.join(medians)}" if medians else f"Round {one.number}")
        right.set(ylabel="share of kept, of not kept")
        right.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        right.yaxis.set_major_locator(MaxNLocator(4))
    grid[-1][0].set(xlabel="reward: accuracy after training on the self-edit")
    grid[-1][1].set(xlabel="length of the self-edit in tokens")
    return figure


def _time(seconds: Mapping[str, Mapping[str, float]]) -> Figure:
    """Seconds of each stage, by what they were spent on."""
    whole = sum(sum(parts.values()) for parts in seconds.values())
    longest = max(sum(parts.values()) for parts in seconds.values())
    unit, divisor = next(
        (u, d) for u, d in (("hours", 3600), ("minutes", 60), ("seconds", 1)) if longest >= 2 * d or d == 1
    )
    sums = {part: sum(parts[part] for parts in seconds.values()) for part in PARTS}
    looks = dict(zip(PARTS, ((SKY, ""), (BLUE, ""), (ORANGE, "//"), (LIGHT, "")), strict=True))
    handles = [
        Patch(facecolor=colour, hatch=hatch, edgecolor="white", label=f"{part}: {100 * sums[part] / whole:.0f}%")
        for part, (colour, hatch) in looks.items()
    ]
    figure = _figure(1.5 + 0.34 * len(seconds), "Time by stage and part", handles)
    axes = figure.add_subplot()
    ends = [0.0] * len(seconds)
    for part, (colour, hatch) in looks.items():
        widths = [parts[part] / divisor for parts in seconds.values()]
        axes.barh(list(seconds), widths, left=ends, color=colour, hatch=hatch, edgecolor="white", linewidth=0.5)
        ends = [end + width for end, width in zip(ends, widths, strict=True)]
    for stage, end in zip(seconds, ends, strict=True):
        axes.annotate(f"{end:.3g}", (end, stage), (4, 0), textcoords="offset points", va="center")
    axes.invert_yaxis()
    axes.set(xlabel=f"{unit}, all seeds together", xlim=(0, 1.1 * longest / divisor))
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    return figure


def _cut(name: str, length: int) -> str:
    """One line of at most `length` characters."""
    name = " ".join("".join(c if c.isprintable() else " " for c in name).split())
    return name if len(name) <= length else name[: length - 1] + "…"
