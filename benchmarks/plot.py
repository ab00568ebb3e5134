"""The pictures of README.md and docs, from the records in results/: python benchmarks/plot.py draws all of them anew.

They are drawn by what draws a run's report, as SVG that follows the theme of whoever shows it. Titles say the finding,
with figures from the record, so that a new record cannot leave an old claim behind.
"""

import re
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from math import log2
from pathlib import Path
from statistics import fmean
from typing import Any

from seal_engine.domains.few_shot.puzzle_picture import draw, read_puzzles
from seal_engine.report import plots
from seal_engine.report.continual_plots import ages, costs, matrices
from seal_engine.report.line_chart import line_chart
from seal_engine.svg import WIDE, axis_step, bar, line, picture, standalone, words
from tables import RESULTS, SEEDS, pick, read

PARTS = {"sampling": "f-sky", "training": "f-blue", "asking": "f-gold", "updating": "f-grey"}
WRITTEN = re.compile(r"self-edits, (?:before any round|after round (\d+))")
README_METHODS = ("merge", "replay", "consolidate", "bank")  # whose matrices README shows
Rows = Sequence[Mapping[str, Any]]


def demo_knowledge_accuracy() -> str:
    """The demo by round, beside its control and baselines."""
    rows, _ = read("bench_demo_cpu")
    written = {name: _by_round(rows, kind) for name, kind in (("self-edits", "own"), ("rewards shuffled", "shuffled"))}
    first, last = (
        sum(own.values()) / len(own) for own in (written["self-edits"][0], [*written["self-edits"].values()][-1])
    )
    title = f"Reward taught the writer: {first:.0%} to {last:.0%} in {max(written['self-edits'])} rounds"
    return _accuracy(rows, written, title, "accuracy on held-out people; small dots are seeds, lines their means")


def demo_real_accuracy() -> str:
    """The demo with a real language model."""
    rows, _ = read("bench_demo_real_cpu")
    whole = pick(rows, rewards="own", method="the whole run")
    chance = "; chance explains the change" if whole["change_low"] <= 0 <= whole["change_high"] else ""
    written = {name: _by_round(rows, kind) for name, kind in (("self-edits", "own"), ("rewards shuffled", "shuffled"))}
    first, last = (fmean(written["self-edits"][number].values()) for number in (0, 1))
    title = f"SmolLM2-135M: self-edits {first:.0%} before, {last:.0%} after a round"
    return _accuracy(rows, written, title, f"accuracy on held-out passages, {SEEDS[whole['seeds']]} seeds{chance}")


def _by_round(rows: Rows, rewards: str) -> dict[int, dict[int, float]]:
    """Round -> seed -> accuracy of the policy's self-edits."""
    found = {}
    for row in rows:
        match = WRITTEN.fullmatch(row["method"])
        if match and row["rewards"] == rewards:
            found[int(match[1] or 0)] = _by_seed(row)
    return found


def _by_seed(row: Mapping[str, Any]) -> dict[int, float]:
    """Seed -> accuracy; the mean alone where a record does not tell seeds apart."""
    return dict(enumerate(row.get("accuracies", [row["accuracy"]])))


def _accuracy(rows: Rows, written: Mapping[str, Mapping[int, Mapping[int, float]]], title: str, subtitle: str) -> str:
    """Accuracy by round, with every other method of the record as a baseline."""
    others = [row for row in rows if row["rewards"] == "own" and not WRITTEN.fullmatch(row["method"])]
    baselines = {row["method"]: _by_seed(row) for row in others if "accuracy" in row}
    num_seeds = {name: len(own[0]) for name, own in written.items()}
    num_seeds |= {name: len(own) for name, own in baselines.items()}
    return plots.accuracy(written, baselines, num_seeds, title, subtitle)


def demo_puzzles() -> str:
    """One puzzle of each outcome."""
    puzzles = read_puzzles(RESULTS / "demo_few-shot_puzzles_cpu.json")
    return draw(puzzles[::2])  # of the two of each outcome, the first


def forgetting_readme() -> str:
    """Four methods, for README."""
    own = _continual("policy")
    merge, spared = ([f"{own[name][what]:.0%}" for what in ("learned", "kept")] for name in ("merge", "consolidate"))
    title = (
        f"Merged edits destroy each other: {merge[0]} learned, {merge[1]} kept. "
        f"Sparing what is known: {spared[0]}, {spared[1]}"
    )
    return matrices(_named_matrices({name: own[name] for name in README_METHODS}), title, WIDE)


def forgetting_all() -> str:
    """All methods, each with what it keeps in the end."""
    own = _continual("policy")
    best = max((name for name in own if name not in ("bank", "oracle")), key=lambda name: own[name]["kept"])
    title = f"Of {len(own)} ways to learn eight edits a bank of adapters keeps most, and of one model {best}"
    return matrices(_named_matrices(own), title, WIDE, columns=5)


def _named_matrices(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {f"{name} ({row['kept']:.0%})": row["matrix"] for name, row in rows.items()}


def forgetting_age() -> str:
    """Gain by age."""
    own = _continual("policy")
    first, last = own["merge"]["ages"][0], own["merge"]["ages"][-1]
    title = f"A merged edit is worth {100 * first:+.0f} points at first and {100 * last:+.0f} seven edits later"
    return ages({name: row["ages"] for name, row in own.items()}, title, WIDE)


def forgetting_cost() -> str:
    """Costs."""
    own = _continual("policy")
    joint, consolidated = (own[name]["tokens"] / own["merge"]["tokens"] for name in ("joint", "consolidate"))
    title = f"Joint training costs {joint:.1f} times merge's tokens, consolidation {consolidated:.1f}"
    return costs({name: (int(row["tokens"]), row["bytes_kept"]) for name, row in own.items()}, title)


def _continual(case: str) -> dict[str, Mapping[str, Any]]:
    """Method -> its row."""
    return {row["method"]: row for row in read("bench_continual_cpu")[0] if row["case"] == case and "learned" in row}


def seal_round() -> str:
    """A round with the base of 97M parameters: floor, ours, and PEFT's, by part."""
    rows, _ = read("bench_seal_round_cpu")
    who = {"floor": "the hardware's floor", "seal_engine": "seal_engine", "peft, one at a time": "PEFT, one at a time"}
    bars = [(dtype, key, name) for dtype in ("float32", "bfloat16") for key, name in who.items()]
    minutes = {
        (dtype, key, part): pick(rows, shape="97m", dtype=dtype, who=key, part=part)["seconds"] / 60
        for dtype, key, _ in bars
        for part in (*PARTS, "round")
    }
    ours, theirs = (minutes["float32", key, "round"] for key in ("seal_engine", "peft, one at a time"))
    padded = [
        pick(rows, shape="97m", dtype=d, who="peft, padded to 2048", part="round") for d in ("float32", "bfloat16")
    ]
    left, right, upper, row_height = 128, WIDE - 124, 62, 24
    longest = max(minutes.values())
    parts = [
        words(0, 14, f"A round takes {ours:.0f} minutes where PEFT takes {theirs:.0f}, one adapter at a time", "bold")
    ]
    parts.append(words(0, 31, "97M base on two CPU cores, 5 passages, minutes; PEFT's are extrapolated", "muted small"))
    for i, (part, look) in enumerate(PARTS.items()):
        parts += [bar(left + 82 * i, 41, 10, 10, look), words(left + 82 * i + 15, 50, part, "small")]
    step, lower = axis_step(longest), upper + row_height * len(bars) + 22
    for i in range(int(longest / step) + 1):
        x = left + i * step / longest * (right - left)
        parts.append(line(x, upper - 4, x, lower, "s-edge thin"))
        parts.append(words(x, lower + 13, f"{i * step:g}{' min' if i == 0 else ''}", "mid muted small"))
    for i, (dtype, key, name) in enumerate(bars):
        y, x = upper + row_height * i + (22 if dtype == "bfloat16" else 0), left
        if key == "floor":
            parts.append(words(0, y + 12, dtype, "small bold"))
        parts.append(
            words(
                left - 6,
                y + 12,
                name.removeprefix("the hardware's "),
                f"end small{' bold' if key == 'seal_engine' else ''}",
            )
        )
        for part, look in PARTS.items():
            width = minutes[dtype, key, part] / longest * (right - left)
            parts.append(
                bar(x, y, width, 16, look, f"{dtype}, {name}, {part}: {minutes[dtype, key, part]:.1f} minutes")
            )
            x += width
        whole, times = (
            minutes[dtype, key, "round"],
            minutes[dtype, key, "round"] / minutes[dtype, "seal_engine", "round"],
        )
        shown = f"{whole:.1f} min" + (f", {times:.1f} times" if key.startswith("peft") else "")
        parts.append(words(x + 5, y + 12, shown, "small"))
    hours = " and ".join(f"{row['seconds'] / 3600:.1f} hours ({row['dtype']})" for row in padded)
    parts.append(
        words(
            0,
            lower + 32,
            f"Padded to 2,048 tokens as published, PEFT takes {hours}: too long for this axis.",
            "small muted",
        )
    )
    return picture(
        lower + 38,
        "Minutes of a round by part: " + "; ".join(f"{d}, {n}: {minutes[d, k, 'round']:.1f}" for d, k, n in bars),
        parts,
        WIDE,
    )


def seal_round_floor() -> str:
    """Each part's floor over its time."""
    rows, _ = read("bench_seal_round_cpu")
    cases = {
        "97M, float32": ("97m", "float32"),
        "97M, bfloat16": ("97m", "bfloat16"),
        "miniature, float32": ("miniature", "float32"),
    }
    share = {
        (name, part): pick(rows, shape=shape, dtype=dtype, who="seal_engine", part=part)["percent_of_floor"]
        for name, (shape, dtype) in cases.items()
        for part in (*PARTS, "round")
    }
    training = share["97M, float32", "training"]
    parts = [words(0, 14, f"Training a 97M base in float32 runs at {training:.0f}% of what the machine allows", "bold")]
    parts.append(
        words(
            0,
            31,
            "floor over measured time, percent; the full width is 100%: as fast as FLOPs and bytes allow",
            "muted small",
        )
    )
    left, room = 62, 118
    for column, name in enumerate(cases):
        start = left + column * 196
        parts.append(words(start, 54, name, "small bold"))
        for row, part in enumerate((*PARTS, "round")):
            y, value = 62 + 20 * row, share[name, part]
            if column == 0:
                parts.append(words(left - 8, y + 11, part, f"end small{' bold' if part == 'round' else ''}"))
            parts.append(bar(start, y, room, 14, "f-wash"))
            parts.append(bar(start, y, room * value / 100, 14, "f-blue", f"{name}, {part}: {value:.1f}%"))
            parts.append(words(start + room + 5, y + 11, f"{value:.0f}%", "small"))
    said = "; ".join(f"{name}: {share[name, 'round']:.0f}%" for name in cases)
    return picture(168, f"Share of the floor, whole rounds: {said}", parts, WIDE)


def train_scaling() -> str:
    """Throughput of many adapters at once, of one adapter's."""
    rows, _ = read("bench_scaling_cpu")
    lines: dict[str, dict[float, float]] = defaultdict(dict)
    for row in rows:
        what = "q and v" if row["projections"] == 2 else "all seven"
        lines[f"{row['shape'].upper()} r{row['rank']}, {what}"][log2(row["adapters"])] = row["of_one_adapter"]
    at_64 = [points[6] for points in lines.values() if 6 in points]
    title = f"64 adapters at once train at {min(at_64):.0%} to {max(at_64):.0%} of one adapter's speed"
    subtitle = "tokens/s, of one adapter's with the same tokens a step; base, rank r, projections"
    hover = lambda name, x, value: f"{name}, {2**x:g} adapters: {value:.0%}"  # noqa: E731
    ticks = {log2(count): str(count) for count in (1, 8, 64, 512)}
    return line_chart(title, lines, ticks, "adapters", "{:.0%}".format, hover, subtitle, 100, "%", WIDE)


def sample_adapters() -> str:
    """Sampling with distinct adapters, of the base's throughput."""
    rows, _ = read("bench_sample_cpu")
    speeds: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for row in rows:
        if "percent_on_top" in row:
            speeds[f"{row['shape'].upper()} base"].append((row["adapters"], row["tokens_per_s"]))
    counts = [count for count, _ in next(iter(speeds.values()))]
    lines = {name: {float(i): speed / own[0][1] for i, (_, speed) in enumerate(own)} for name, own in speeds.items()}
    lost = " and ".join(f"{1 - [*points.values()][-1]:.0%} ({name})" for name, points in lines.items())
    hover = lambda name, i, value: f"{name}, {counts[int(i)]} adapters: {value:.0%}"  # noqa: E731
    ticks = {float(i): str(count) if count else "none" for i, count in enumerate(counts)}
    title, subtitle = f"64 distinct adapters cost {lost} of sampling speed", "tokens/s, of the base's without adapters"
    return line_chart(
        title, lines, ticks, "distinct adapters over 64 requests", "{:.0%}".format, hover, subtitle, 100, "%", WIDE
    )


PICTURES: dict[str, Callable[[], str]] = {  # file -> what draws it
    "demo_knowledge_accuracy_cpu": demo_knowledge_accuracy,
    "demo_real_accuracy_cpu": demo_real_accuracy,
    "demo_few-shot_puzzles_cpu": demo_puzzles,
    "continual_short_cpu": forgetting_readme,
    "continual_policy_forgetting_cpu": forgetting_all,
    "continual_policy_age_cpu": forgetting_age,
    "continual_policy_cost_cpu": forgetting_cost,
    "seal_round_cpu": seal_round,
    "seal_round_floor_cpu": seal_round_floor,
    "train_scaling_cpu": train_scaling,
    "sample_adapters_cpu": sample_adapters,
}


def draw_all(directory: Path) -> list[Path]:
    """Write each picture; returns those that have changed."""
    changed = []
    for name, drawn in PICTURES.items():
        file, content = directory / f"{name}.svg", standalone(drawn())
        if not file.exists() or file.read_bytes() != content:
            file.write_bytes(content)
            changed.append(file)
    return changed


if __name__ == "__main__":
    changed = [file.name for file in draw_all(RESULTS)]
    sys.exit(f"{', '.join(changed)} changed" if changed else None)
