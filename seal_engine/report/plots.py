"""The pictures of a report, as SVG (see svg.py) that depends on the data alone."""

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import pairwise
from statistics import fmean, stdev

from seal_engine.report.data import PARTS, Pairs
from seal_engine.report.self_edits import KEPT, JudgedEdit, RoundRewards
from seal_engine.svg import (
    WIDTH,
    axis_step,
    bar,
    cut_name,
    dot,
    element,
    line,
    num_shared_words,
    picture,
    spread,
    words,
)

LOOKS = ("blue", "orange", "gold", "grey")  # of the lines of the picture of accuracies
NAMED_CONTEXTS = 40  # with more, rows are thin and have no names
MOST_TICKS = 8  # rounds that are named, and values that stand at their points
BINS = 20  # of rewards from 0 to 1


def accuracy(
    written: Mapping[str, Mapping[int, Mapping[int, float]]],
    baselines: Mapping[str, Mapping[int, float]],
    num_seeds: Mapping[str, int],
    title: str = "Accuracy on held-out contexts by round, in percent",
    subtitle: str = "",
) -> str:
    """Accuracy by round, a point for each seed and a line through their means; baselines as dashed lines.

    written: name of a line -> round -> seed -> accuracy. baselines: name -> seed -> accuracy. num_seeds: by name,
    how many seeds there will be. A mean over fewer is hollow, and the line to it dashed.
    """
    lines = {name: rounds for name, rounds in written.items() if rounds}
    every = [value for rounds in lines.values() for own in rounds.values() for value in own.values()]
    levels = {name: fmean(own.values()) for name, own in baselines.items() if own}
    top = 100 * min(1.0, 1.12 * max([*every, *levels.values(), 0.04]))
    left, right, upper, lower = 38, 256, (54 if subtitle else 38), (252 if subtitle else 236)
    numbers = sorted({number for rounds in lines.values() for number in rounds})
    gap = (right - left - 30) / max(1, len(numbers) - 1)
    x = {number: left + 16 + i * gap for i, number in enumerate(numbers)}

    def y(value: float) -> float:
        return lower - 100 * value / top * (lower - upper)

    parts = [words(0, 14, title, "bold"), words(0, 31, subtitle, "muted small")]
    step = axis_step(top)
    for i in range(int(top / step + 1e-9) + 1):
        parts.append(line(left, y(i * step / 100), right, y(i * step / 100), "s-edge thin"))
        parts.append(words(left - 6, y(i * step / 100) + 4, f"{i * step:g}%", "muted end small"))
    every_tick = -(-len(numbers) // MOST_TICKS)
    for i, number in enumerate(numbers):
        if i % every_tick == 0 or i == len(numbers) - 1:
            label = f"round {number}" if len(numbers) <= 4 else f"{number}"
            parts.append(words(x[number], lower + 16, "before" if number == 0 else label, "muted mid small"))
    labels = []
    for name, level in levels.items():
        hover = f"{name}: {100 * level:.1f}%{_over(baselines[name], num_seeds[name])}"
        parts.append(line(left, y(level), right, y(level), "s-grey dash thin", hover))
        labels.append((y(level), name, level, "", hover))
    highest = max(lines, key=lambda name: fmean(lines[name][max(lines[name])].values()), default="")
    for (name, rounds), colour in zip(lines.items(), LOOKS, strict=False):
        parts += _line_of_means(rounds, x, y, colour, num_seeds[name], label_below=name != highest)
        last = rounds[max(rounds)]
        level = fmean(last.values())
        hover = f"{name}: {100 * level:.1f}%{_over(last, num_seeds[name])}"
        labels.append((y(level), name, level, f"bold t-{colour}", hover))
    labels.sort(key=lambda label: label[0])
    places = spread([label[0] for label in labels], 15, upper, lower)
    for place, (wanted, name, level, classes, hover) in zip(places, labels, strict=True):
        parts.append(line(right + 2, wanted, right + 12, place, "s-edge thin"))
        shown = cut_name(name, 23 if classes else 25)  # bold letters are wider
        parts.append(words(right + 15, place + 4, f"{100 * level:.1f} {shown}", f"{classes} small", hover))
    return picture(lower + 26, f"{title}: {_spoken(lines, levels)}", parts)


def _line_of_means(
    rounds: Mapping[int, Mapping[int, float]],
    x: Mapping[int, float],
    y: Callable[[float], float],
    colour: str,
    num_seeds: int,
    label_below: bool,
) -> list[str]:
    """Means with what they are means of."""
    parts, before = [], None
    for number, own in sorted(rounds.items()):
        mean, whole = fmean(own.values()), len(own) >= num_seeds
        if before is not None:
            dashed = "" if whole and before[2] else " dash"
            parts.append(line(before[0], before[1], x[number], y(mean), f"s-{colour}{dashed}"))
        before = (x[number], y(mean), whole)
    for number, own in sorted(rounds.items()):
        mean, whole = fmean(own.values()), len(own) >= num_seeds
        when = f"after round {number}" if number else "before any round"
        if len(own) > 1:
            error = stdev(own.values())
            parts.append(line(x[number], y(mean - error), x[number], y(min(1.0, mean + error)), f"s-{colour} thin"))
            for seed, value in own.items():
                parts.append(dot(x[number] + 5, y(value), 1.8, f"f-{colour}", f"seed {seed}, {when}: {value:.1%}"))
        fill = f"f-{colour}" if whole else "f-paper"
        hover = f"{when}: {mean:.1%}{_over(own, num_seeds)}"
        parts.append(dot(x[number], y(mean), 4.5, f"{fill} s-{colour} line", hover))
        if len(rounds) <= MOST_TICKS or number in (min(rounds), max(rounds)):
            farthest = min(own.values()) if label_below else max(own.values())
            place = y(farthest) + (18 if label_below and y(farthest) < y(0) - 8 else -8)
            parts.append(words(x[number], place, f"{100 * mean:.1f}", f"mid bold t-{colour}"))
    return parts


def _over(own: Mapping[int, float], num_seeds: int) -> str:
    """How many seeds a mean is over."""
    if len(own) < num_seeds:
        return f", of {len(own)} of {num_seeds} seeds so far"
    return "" if len(own) == 1 else f", mean of {len(own)} seeds, sd {100 * stdev(own.values()):.1f}"


def _spoken(lines: Mapping[str, Mapping[int, Mapping[int, float]]], levels: Mapping[str, float]) -> str:
    """A picture of accuracies in words."""
    said = [
        f"{name}: " + ", ".join(f"{fmean(own.values()):.1%}" for _, own in sorted(rounds.items()))
        for name, rounds in lines.items()
    ]
    return "; ".join(said + [f"{name} {level:.1%}" for name, level in levels.items()])


def contexts(pairs: Pairs) -> str:
    """A line for each context from before to after, the greatest gain at the top."""
    changes, named = pairs.changes, len(pairs.changes) <= NAMED_CONTEXTS
    shared = num_shared_words(list(changes))
    better, worse = sum(c > 0 for c in changes.values()), sum(c < 0 for c in changes.values())
    same = len(changes) - better - worse
    left, right, upper = (158 if named else 34), WIDTH - 12, 56
    row_height = 15 if named else max(2.0, min(6.0, 500 / len(changes)))
    lower = upper + row_height * len(changes)
    largest = min(1.0, 1.1 * max([*pairs.before.values(), *pairs.after.values(), 0.1]))

    def x(value: float) -> float:
        return left + value / largest * (right - left)

    title = f"Each held-out context before any round and after round {pairs.last}"
    parts = [words(0, 14, title, "bold"), dot(6, 28, 4, "f-paper s-grey line"), words(15, 32, "before", "small")]
    parts += [dot(66, 28, 4, "f-grey s-grey line"), words(75, 32, "after", "small")]
    parts += [
        words(118, 32, f"{better} better", "bold small t-blue"),
        words(182, 32, f"{worse} worse", "bold small t-orange"),
    ]
    parts.append(words(242, 32, f"{same} the same", "small"))
    step = axis_step(100 * largest) / 100
    for i in range(int(largest / step + 1e-9) + 1):
        parts.append(line(x(i * step), upper - 6, x(i * step), lower, "s-edge thin"))
        parts.append(words(x(i * step), upper - 9, f"{100 * i * step:g}%", "mid muted small"))
    for row, (name, change) in enumerate(changes.items()):
        before, after, middle = pairs.before[name], pairs.after[name], upper + row_height * (row + 0.5)
        colour = "grey" if change == 0 else "blue" if change > 0 else "orange"
        hover = f"{name}: {before:.1%} to {after:.1%}"
        radius = 4 if named else min(3.0, row_height / 2)
        if named:
            parts.append(
                words(left - 10, middle + 4, cut_name(" ".join(name.split(" ")[shared:]), 25), "end small", name)
            )
        parts.append(line(x(before), middle, x(after), middle, f"s-{colour}", hover))
        parts.append(dot(x(before), middle, radius, f"f-paper s-{colour} line", hover))
        parts.append(dot(x(after), middle, radius if change else radius / 2, f"f-{colour} s-{colour} line", hover))
    return picture(lower + 4, f"{title}: {better} better, {worse} worse, {same} the same", parts)


def rewards(rounds: Sequence[RoundRewards]) -> str:
    """A dot for each self-edit that has a reward, on one scale for all rounds; each leads to its self-edit."""
    left, right = 12, WIDTH - 22
    width = (right - left) / (BINS + 1)

    def x(reward: float) -> float:  # a bin's middle is a multiple of 1 / BINS, so that 0 and 1 have bins of their own
        return left + width / 2 + reward * BINS * width

    parts = [words(0, 14, "Rewards of self-edits by round", "bold")]
    parts += [dot(6, 28, 3.5, "f-blue s-blue thin"), words(14, 32, "kept", "small")]
    parts += [dot(52, 28, 3.5, "f-paper s-grey thin"), words(60, 32, "not kept", "small")]
    parts += [line(118, 20, 118, 34, "s-ink"), words(123, 32, "mean", "small")]
    parts += [line(164, 20, 164, 34, "s-ink dash"), words(169, 32, "mean without an adapter", "small")]
    lower = 40.0
    for one in rounds:
        bins: list[list[JudgedEdit]] = [[] for _ in range(BINS + 1)]
        for edit in sorted(one.rewarded, key=lambda edit: edit.status != KEPT):
            bins[round(min(1.0, max(0.0, edit.reward or 0.0)) * BINS)].append(edit)
        fullest, used = max(map(len, bins)), [b for b, own in enumerate(bins) if own]
        room = width * min([3, *(after - before for before, after in pairwise(used))]) - 4  # of a bin's column
        size = next((s for s in (6.0, 5.0, 4.0, 3.0, 2.0) if -(-fullest // int(room / s)) * s <= 130), 1.5)
        across = int(room / size)
        height = max(34.0, -(-fullest // across) * size)
        upper, lower = lower + 22, lower + 22 + height
        parts.append(words(left, upper - 6, f"Round {one.number}: {one.summary}", "small"))
        for b, own in enumerate(bins):
            first = x(b / BINS) - min(len(own), across) * size / 2
            for i, edit in enumerate(own):
                look = "f-blue s-blue" if edit.status == KEPT else "f-paper s-grey"
                place = first + (i % across + 0.5) * size, lower - (i // across + 0.5) * size
                mark = dot(*place, 0.42 * size, f"{look} thin", edit.hover)
                parts.append(element("a", content=mark, href=f"#{edit.anchor}"))
        for mean, dashed, what in ((one.mean, "", "mean reward"), (one.base, " dash", "mean without an adapter")):
            if mean is not None:
                parts.append(line(x(mean), upper - 2, x(mean), lower, f"s-ink{dashed}", f"{what}: {mean:.1%}"))
        parts.append(line(left, lower, right, lower, "s-edge thin"))
    for i in range(6):
        parts.append(words(x(i / 5), lower + 14, f"{20 * i}%", "mid muted small"))
    said = "; ".join(f"round {one.number}: {one.summary}" for one in rounds)
    return picture(lower + 20, f"Rewards of self-edits by round: {said}", parts)


def losses(
    adapters: Mapping[str, Sequence[Sequence[float]]],
    policy: Mapping[str, Sequence[Sequence[float]]],
    unfinished: Collection[str] = (),
) -> str:
    """Training losses over the course of a training, of the adapters of each round and of the policy's updates.

    Name of a line -> curves of any lengths (see loss_curve). A line goes through medians; most curves are in its band.
    unfinished: names of lines that more curves will belong to; they are dashed.
    """
    panels = [("adapters", adapters), ("the policy", policy)]
    drawn = [_loss_panel(30 + 222 * i, title, lines, unfinished) for i, (title, lines) in enumerate(panels) if lines]
    parts = [words(0, 14, "Training loss from the first step to the last, nats per token", "bold")]
    return picture(212, "Training losses of adapters and of the policy", [*parts, *(p for own in drawn for p in own)])


def _loss_panel(
    left: float, title: str, lines: Mapping[str, Sequence[Sequence[float]]], unfinished: Collection[str]
) -> list[str]:
    """Lines on a scale of their own, from a loss of 0 to the top of the highest band; the first and the last ones."""
    right, upper, lower, labels = left + 104, 48, 190, []
    names = [*lines][:1] + [*lines][1:][1 - len(LOOKS) :]
    bands = {name: [_quantiles(lines[name], share) for share in (0.1, 0.5, 0.9)] for name in names}
    top = 1.05 * max([1e-3, *(max(high) for _, _, high in bands.values())])

    def points(losses: Sequence[float]) -> list[str]:
        gap = (right - left) / max(1, len(losses) - 1)
        return [f"{left + i * gap:.1f},{lower - loss / top * (lower - upper):.1f}" for i, loss in enumerate(losses)]

    parts, step = [words(left, upper - 14, title, "small")], axis_step(top)
    for i in range(int(top / step + 1e-9) + 1):
        y = lower - i * step / top * (lower - upper)
        parts.append(line(left, y, right, y, "s-edge thin"))
        parts.append(words(left - 6, y + 4, f"{i * step:g}", "muted end small"))
    parts += [words(left, lower + 16, "first", "muted small"), words(right, lower + 16, "last", "muted end small")]
    for colour, (name, (low, middle, high)) in zip(LOOKS, bands.items(), strict=False):
        so_far, dashed = (" so far", " dash") if name in unfinished else ("", "")
        hover = f"{name}: {middle[0]:.3g} to {middle[-1]:.3g}, median of {len(lines[name])}{so_far}"
        band = " ".join([*points(high), *reversed(points(low))])
        parts.append(element("polygon", f"f-{colour}", hover, points=band, fill_opacity=0.15))
        parts.append(element("polyline", f"line s-{colour}{dashed}", hover, points=" ".join(points(middle))))
        end = lower - middle[-1] / top * (lower - upper)
        labels.append((end, f"{middle[-1]:.2f} {name}", f"bold small t-{colour}", hover))
    labels.sort()
    places = spread([label[0] for label in labels], 14, upper, lower)
    for place, (_, text, classes, hover) in zip(places, labels, strict=True):
        parts.append(words(right + 6, place + 4, text, classes, hover))
    return parts


def _quantiles(curves: Sequence[Sequence[float]], share: float) -> list[float]:
    """The quantile of the curves at each point of the longest one; the others are stretched to its length."""
    length = max(map(len, curves))
    points = []
    for i in range(length):
        values = sorted(curve[i * len(curve) // length] for curve in curves)
        points.append(values[round(share * (len(values) - 1))])
    return points


def time(seconds: Mapping[str, Mapping[str, float]], cpu_seconds: Mapping[str, float | None]) -> str:
    """Seconds of each stage, by what they were spent on, and CPU seconds below, where they are known."""
    looks = dict(zip(PARTS, ("f-sky", "f-blue", "f-gold", "f-grey"), strict=True))
    whole = sum(sum(parts.values()) for parts in seconds.values())
    known = {stage: cpu for stage, cpu in cpu_seconds.items() if cpu is not None}
    longest = max([*(sum(parts.values()) for parts in seconds.values()), *known.values()])
    unit, divisor = next(
        (u, d) for u, d in (("hours", 3600), ("minutes", 60), ("seconds", 1)) if longest >= 2 * d or d == 1
    )
    parts, start = [words(0, 14, f"Time by stage and part, {unit}", "bold")], 0.0
    left, right, upper, row_height = 84, WIDTH - 40, (78 if known else 62), (25 if known else 20)
    for i, (part, look) in enumerate(looks.items()):
        share = sum(own[part] for own in seconds.values()) / whole
        column, row = i % 2, i // 2
        parts.append(bar(column * 210, 22 + 16 * row, 10, 10, look))
        parts.append(words(column * 210 + 15, 31 + 16 * row, f"{part} {share:.0%}", "small"))
    if known:
        wall = sum(sum(seconds[stage].values()) for stage in known)
        cores = f"{sum(known.values()) / wall:.2g} cores" if wall else "no time"
        parts += [bar(0, 58, 10, 4, "f-ink"), words(15, 63, f"CPU time of this process, {cores} on average", "small")]
    for row, (stage, own) in enumerate(seconds.items()):
        start, place = left, upper + row_height * row
        parts.append(words(left - 8, place + 11, stage, "end small"))
        for part, look in looks.items():
            width = own[part] / longest * (right - left)
            if width > 0:
                hover = f"{stage}, {part}: {own[part] / divisor:.3g} {unit}"
                parts.append(bar(start, place, width, 14, look, hover))
            start += width
        parts.append(words(start + 5, place + 11, f"{sum(own.values()) / divisor:.3g}", "small"))
        if stage in known:
            hover = f"{stage}: {known[stage] / divisor:.3g} {unit} of CPU time"
            parts.append(bar(left, place + 15, known[stage] / longest * (right - left), 4, "f-ink", hover))
    return picture(upper + row_height * len(seconds) + 4, f"Time by stage: {whole / divisor:.3g} {unit} in all", parts)
