"""The pictures of a report, as PNG bytes that depend on the data alone. Needs the extra `plot`."""

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from statistics import fmean, median, stdev

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from seal_engine.report_data import PARTS, Pairs, Round

# Okabe and Ito's colours, which are told apart with any kind of colour blindness; their lightness differs in print.
BLUE, SKY, ORANGE, VERMILION, GREY = "#0072B2", "#56B4E9", "#E69F00", "#D55E00", "#8C8C8C"
DASHES = ((0, (6, 2)), (0, (2, 2)), (0, (6, 2, 1, 2)), (0, (1, 1)), (0, (8, 2, 2, 2, 2, 2)))
STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that pictures are the same everywhere
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#E2E2E2",
    "legend.frameon": False,
    "text.parse_math": False,  # names are plain text, dollar signs included
}
NAMED_CONTEXTS = 60  # with more, names would overlap
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
            pictures["accuracy"] = _png(_accuracy(written, baselines))
        if pairs is not None and pairs.changes:
            pictures["contexts"] = _png(_contexts(pairs))
        if any(r.kept_rewards or r.other_rewards for r in rounds):
            pictures["kept"] = _png(_kept(rounds))
        if any(sum(parts.values()) > 0 for parts in seconds.values()):
            pictures["time"] = _png(_time(seconds))
        return pictures


def _png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=150, metadata={"Software": None})
    return stream.getvalue()


def _accuracy(written: Mapping[str, Mapping[int, Sequence[float]]], baselines: Mapping[str, Sequence[float]]) -> Figure:
    """Accuracy by round with its spread over seeds; baselines as lines, named on the right."""
    figure = Figure(figsize=(8, 4.4), layout="constrained")
    axes = figure.add_subplot()
    numbers = sorted({number for found in written.values() for number in found}) or [0]
    styles = zip(written.items(), ((BLUE, "o", 0.0), (VERMILION, "s", 0.04)), strict=False)
    several = False
    for (name, found), (colour, marker, aside) in styles:
        x = [number + aside for number in found]
        means = [fmean(values) for values in found.values()]
        spread = [stdev(values) if len(values) > 1 else 0.0 for values in found.values()]
        several = several or any(len(values) > 1 for values in found.values())
        axes.plot(x, means, color=colour, marker=marker, linewidth=2, markersize=7, label=f"{name}: mean", zorder=4)
        if several:
            axes.errorbar(x, means, spread, fmt="none", ecolor=colour, elinewidth=1.5, capsize=5, zorder=3)
            for place, values in zip(x, found.values(), strict=True):
                axes.plot([place] * len(values), values, "o", color=colour, markersize=3.5, alpha=0.45, zorder=3)
        for place, value in zip(x, means, strict=True):
            axes.annotate(
                f"{100 * value:.1f}", (place, value), (9, 0), textcoords="offset points", ha="left", va="center",
                color=colour, weight="bold", zorder=6,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 0.8},
            )  # fmt: skip
    levels = {name: fmean(values) for name, values in baselines.items()}
    for i, value in enumerate(levels.values()):
        axes.axhline(value, color="#444444", linestyle=DASHES[i % len(DASHES)], linewidth=1.1, zorder=2)
    low, high = numbers[0] - 0.35, numbers[-1] + 0.5
    tops = [value for found in written.values() for values in found.values() for value in values]
    top = min(1.02, 1.15 * max([*tops, *levels.values(), 0.05]))
    axes.set(xlim=(low, high), ylim=(min(-0.01, -0.02 * top), top), ylabel="accuracy on held-out contexts")
    words = ["before\nany round", *(f"after\nround {number}" for number in numbers[1:])]
    step = math.ceil(len(numbers) / 12)
    axes.set_xticks(numbers[::step], words[::step])
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid(axis="y")
    _names_on_the_right(axes, {f"{_cut(name, 34)}  {100 * v:.1f}": v for name, v in levels.items()}, top)
    axes.set_title("Accuracy by round" + (" (dots: seeds; bars: one sd each way)" if several else " (one seed)"), pad=28)
    if any(written.values()):
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2)
    return figure


def _names_on_the_right(axes: Axes, levels: Mapping[str, float], top: float) -> None:
    """Names beside their lines' right ends, moved apart where they would overlap."""
    least = 0.06 * top
    places: list[float] = []
    for value in sorted(levels.values()):
        places.append(max(value, places[-1] + least) if places else value)
    over = max(0.0, places[-1] - top) if places else 0.0
    for i in reversed(range(len(places))):  # those pushed above the top push the ones below them down
        ceiling = places[i + 1] - least if i + 1 < len(places) else places[i] - over
        places[i] = min(places[i], ceiling)
    for (name, value), place in zip(sorted(levels.items(), key=lambda item: item[1]), places, strict=True):
        axes.annotate(
            name, (1, value), (1.04, place), xycoords=axes.get_yaxis_transform(), textcoords=axes.get_yaxis_transform(),
            va="center", color="#333333", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": "#999999", "linewidth": 0.7, "shrinkA": 1, "shrinkB": 0},
        )  # fmt: skip


def _contexts(pairs: Pairs) -> Figure:
    """A line for each context from before to after, the greatest gain at the top."""
    names, named = list(pairs.changes), len(pairs.changes) <= NAMED_CONTEXTS
    height = 1.5 + (0.23 * len(names) if named else min(9.0, 0.12 * len(names)))
    figure = Figure(figsize=(8, height), layout="constrained")
    axes = figure.add_subplot()
    size = 6.5 if named else 3.0
    for row, name in enumerate(names):
        before, after, change = pairs.before[name], pairs.after[name], pairs.changes[name]
        colour = GREY if change == 0 else BLUE if change > 0 else VERMILION
        axes.plot([before, after], [row, row], color=colour, linewidth=2 if named else 1, zorder=2)
        axes.plot(after, row, "o", color=colour, markersize=size, zorder=3)
        # The ring stays visible around the dot where nothing has changed.
        ring = size + (3 if change == 0 else 0)
        axes.plot(before, row, "o", markerfacecolor="white" if change else "none", markeredgecolor=colour,
                  markeredgewidth=1.4 if named else 0.8, markersize=ring, zorder=4 if change == 0 else 3)  # fmt: skip
    axes.set(xlim=(-0.03, 1.03), ylim=(len(names) - 0.3, -0.7), xlabel="accuracy of self-edits")
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid(axis="x")
    if named:
        axes.set_yticks(range(len(names)), [_cut(name, 40) for name in names])
        axes.tick_params(axis="y", length=0)
    else:
        axes.set(yticks=[], ylabel=f"{len(names)} held-out contexts, the greatest gain at the top")
    over = "one seed" if len(pairs.seeds) == 1 else f"mean over {len(pairs.seeds)} seeds"
    axes.set_title(f"Each held-out context, before any round and after round {pairs.last} ({over})", pad=28)
    axes.title.set_position((0, 1))
    counts = [sum(sign(c) for c in pairs.changes.values()) for sign in (lambda c: c > 0, lambda c: c < 0)]
    figure.align_titles()
    handles = [
        _key(GREY, "before", "o", "white"), _key(GREY, "after", "o", GREY),
        _key(BLUE, f"better: {counts[0]}"), _key(VERMILION, f"worse: {counts[1]}"),
        _key(GREY, f"the same: {len(names) - sum(counts)}"),
    ]  # fmt: skip
    axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=5, borderaxespad=0.2, columnspacing=1.4)
    return figure


def _key(colour: str, label: str, marker: str | None = None, face: str = "none") -> Line2D:
    line = "none" if marker else "-"
    return Line2D([], [], color=colour, marker=marker, markerfacecolor=face, linestyle=line, linewidth=2.5, label=label)


def _kept(rounds: Sequence[Round]) -> Figure:
    """For each round: rewards of all self-edits and of those kept; lengths of those kept and of the others."""
    half = SHOWN_ROUNDS // 2
    shown = rounds if len(rounds) <= SHOWN_ROUNDS else [*rounds[:half], *rounds[-half:]]
    figure = Figure(figsize=(8, 0.5 + 2.4 * len(shown)), layout="constrained")
    grid = figure.subplots(len(shown), 2, squeeze=False, sharex="col")
    longest = max([length for r in shown for length in (*r.kept_tokens, *r.other_tokens)], default=1)
    for i, (one, (left, right)) in enumerate(zip(shown, grid, strict=True)):
        bins = [b / 20 for b in range(21)]
        for values, colour, label in (
            ([*one.kept_rewards, *one.other_rewards], "#C8C8C8", "all"), (one.kept_rewards, BLUE, "kept"),
        ):  # fmt: skip
            left.hist(values, bins, color=colour, edgecolor="white", linewidth=0.5, label=f"{label}: {len(values)}")
        if one.base:
            left.axvline(fmean(one.base), color="black", linestyle="--", linewidth=1.2, label="without adapter: mean")
        left.set_title(f"Round {one.number}: rewards")
        left.set(ylabel="self-edits")
        left.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        left.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        edges = [longest * b / 20 for b in range(21)]
        for values, options, label in (
            (one.kept_tokens, {"color": BLUE, "histtype": "stepfilled", "alpha": 0.55}, "kept"),
            (one.other_tokens, {"color": "black", "histtype": "step", "linewidth": 1.3}, "not kept"),
        ):
            if values:
                name = f"{label}: median {median(values):g}"
                right.hist(values, edges, weights=[1 / len(values)] * len(values), label=name, **options)
        right.set_title(f"Round {one.number}: lengths")
        right.set(ylabel="share of each")
        right.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        right.yaxis.set_major_locator(MaxNLocator(4))
        if i == len(shown) - 1:
            left.set(xlabel="reward: accuracy after training on the self-edit")
            right.set(xlabel="tokens of a self-edit")
        for axes in (left, right):
            axes.set_ylim(0, axes.get_ylim()[1] * 1.45)  # room for the legend
            axes.legend(loc="upper left", fontsize=8, ncols=2, handlelength=1.4, columnspacing=1.0)
    return figure


def _time(seconds: Mapping[str, Mapping[str, float]]) -> Figure:
    """Seconds of each stage, by what they were spent on."""
    unit, divisor = next(
        (u, d) for u, d in (("hours", 3600), ("minutes", 60), ("seconds", 1)) if d == 1 or _longest(seconds) >= 2 * d
    )
    figure = Figure(figsize=(8, 1.5 + 0.34 * len(seconds)), layout="constrained")
    axes = figure.add_subplot()
    left = dict.fromkeys(seconds, 0.0)
    whole = sum(sum(parts.values()) for parts in seconds.values())
    for part, colour, hatch in zip(PARTS, (SKY, BLUE, ORANGE, "#BBBBBB"), ("", "", "//", ""), strict=True):
        widths = [parts[part] / divisor for parts in seconds.values()]
        share = f"{100 * sum(widths) * divisor / whole:.0f}%"
        axes.barh(list(seconds), widths, left=list(left.values()), color=colour, hatch=hatch, edgecolor="white",
                  linewidth=0.5, label=f"{part}: {share}")  # fmt: skip
        left = {stage: start + width for (stage, start), width in zip(left.items(), widths, strict=True)}
    for stage, end in left.items():
        axes.annotate(f"{end:.3g}", (end, stage), (4, 0), textcoords="offset points", va="center")
    axes.invert_yaxis()
    axes.margins(x=0.08)
    axes.set(xlabel=f"{unit}, all seeds together", xlim=(0, None))
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    axes.set_title("Time by stage and part", pad=28)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, borderaxespad=0.2, columnspacing=1.4)
    return figure


def _longest(seconds: Mapping[str, Mapping[str, float]]) -> float:
    return max(sum(parts.values()) for parts in seconds.values())


def _cut(name: str, length: int) -> str:
    """One line of at most `length` characters."""
    name = " ".join("".join(c if c.isprintable() else " " for c in name).split())
    return name if len(name) <= length else name[: length - 1] + "…"
