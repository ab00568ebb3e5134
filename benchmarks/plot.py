"""Plots of what is recorded under results/: python benchmarks/plot.py [DIRECTORY]. Needs the extra `plot`."""

import json
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Patch

import measure

# A CPU's peak is read from what the process holds, which is too coarse for small steps.
MEMORY = {"cuda": "peak memory beside the base, MiB", "cpu": "parameters, gradients and moments, MiB"}


def load(directory: Path, name: str) -> tuple[list[dict[str, Any]], str]:
    """A benchmark's rows, and what they were measured on."""
    found = json.loads((directory / f"{name}.json").read_text())
    where = found["machine"]
    return found["rows"], f"{where['device']}, torch {where['torch']}, {where['date']}, {where['commit']}"


def scaling(directory: Path, device: str) -> None:
    """Adapters trained at once against throughput (of one adapter's) and memory."""
    rows, where = load(directory, f"bench_scaling_{device}")
    lines = defaultdict(list)
    for row in rows:
        if "of_one_adapter" in row:
            what = "q, v" if row["projections"] == 2 else "all seven"
            key = f"{row['shape']}, rank {row['rank']}, {what}, {row['tokens_a_step']} tokens a step"
            lines[key].append((row["adapters"], row["of_one_adapter"], row["peak_mib"], row["state_mib"]))
    if not lines:
        return
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5))
    for label, points in lines.items():
        adapters, speed, peak, state = zip(*points, strict=True)
        left.plot(adapters, speed, marker="o", label=label)
        right.plot(adapters, peak if device == "cuda" else state, marker="o", label=label)
    left.axhline(0.9, color="grey", linestyle=":", linewidth=1)
    left.set(xscale="log", xlabel="adapters", ylabel="tokens/s, of one adapter's", ylim=0)
    right.set(xscale="log", yscale="log", xlabel="adapters", ylabel=MEMORY[device])
    left.legend(fontsize=7)
    _save(figure, directory / f"train_scaling_{device}.svg", "Training: adapters at once, same tokens a step", where)


def cost_of_adapters(directory: Path, device: str) -> None:
    """Distinct adapters in a decode step against tokens a second."""
    rows, where = load(directory, f"bench_sample_{device}")
    lines = defaultdict(list)
    for row in rows:
        if "percent_on_top" in row:
            lines[row["shape"]].append((row["adapters"], row["tokens_per_s"]))
    figure, axis = plt.subplots(figsize=(6, 4))
    for label, points in lines.items():
        speeds = [speed / points[0][1] for _, speed in points]
        axis.plot(range(len(points)), speeds, marker="o", label=label)
        axis.set_xticks(range(len(points)), [str(adapters) for adapters, _ in points])
    axis.set(xlabel="distinct adapters over 64 requests", ylabel="tokens/s, of the base's", ylim=0)
    axis.legend()
    _save(figure, directory / f"sample_adapters_{device}.svg", "Sampling: what distinct adapters cost", where)


PARTS = {"sampling": "C0", "training": "C1", "asking": "C2", "updating": "C3"}


def seal_round(directory: Path, device: str) -> None:
    """A round's parts, stacked, beside the floor and PEFT; and each part's share of its floor."""
    rows, where = load(directory, f"bench_seal_round_{device}")
    cases: Mapping[str, dict[tuple[str, str], dict[str, Any]]] = defaultdict(dict)
    for row in rows:
        plural = "passage" if row["passages"] == 1 else "passages"
        cases[f"{row['shape']}, {row['dtype']}, {row['passages']} {plural}"][row["who"], row["part"]] = row
    cases = {case: found for case, found in cases.items() if ("floor", "round") in found}  # the others were cut short
    if not cases:
        return
    figure, axes = plt.subplots(2, len(cases), figsize=(5 * len(cases), 6.5), squeeze=False, height_ratios=(4, 3))
    for (case, found), (whole, closer) in zip(cases.items(), axes.T, strict=True):
        whos = [who for who, part in found if part == "round" and not who.startswith("host")]
        whos.sort(key=lambda who: who != "floor")
        _bars(whole, found, whos)
        _bars(closer, found, whos[:3])
        whole.set_title(case, fontsize=10)
        closer.set_xlabel("seconds", fontsize=9)
    handles = [Patch(color=color, label=part) for part, color in PARTS.items()]
    handles.append(Patch(facecolor="white", edgecolor="grey", hatch="////", label="extrapolated"))
    axes[0, 0].legend(handles=handles, fontsize=8)
    _save(figure, directory / f"seal_round_{device}.svg", "A round of the published knowledge task", where)

    figure, axis = plt.subplots(figsize=(7, 4))
    places, width = [*PARTS, "round"], 0.8 / len(cases)
    for i, (case, found) in enumerate(cases.items()):
        shares = [found["seal_engine", part]["percent_of_floor"] for part in places]
        axis.bar([k + i * width for k in range(len(places))], shares, width, label=case)
    axis.set_xticks([k + 0.4 - width / 2 for k in range(len(places))], places)
    axis.set(ylabel="floor over measured time, %", ylim=(0, 100))
    axis.legend(fontsize=8)
    _save(figure, directory / f"seal_round_floor_{device}.svg", "How near each part of a round is to its floor", where)


def _bars(axis: Any, found: dict[tuple[str, str], dict[str, Any]], whos: list[str]) -> None:
    """A lying bar of its parts for each of whos, with its whole and how much longer than ours that is."""
    longest = 0.0
    for place, who in enumerate(reversed(whos)):
        start = 0.0
        for part, color in PARTS.items():
            row = found[who, part]
            hatch = "////" if row.get("extrapolated_from") else None
            axis.barh(place, row["seconds"], left=start, color=color, hatch=hatch, edgecolor="white", linewidth=0)
            start += row["seconds"]
            longest = max(longest, start)
        times = found[who, "round"]["seal_engine_times_faster"]
        axis.text(
            start, place, f" {start:{',.0f' if start >= 100 else '.3g'}} s ({times:.3g}x)", va="center", fontsize=8
        )
    axis.set_yticks(range(len(whos)), reversed(whos), fontsize=8)
    axis.set_xlim(0, 1.45 * longest)


def _save(figure: Any, file: Path, title: str, where: str) -> None:
    figure.suptitle(f"{title}\n{where}", fontsize=9)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})
    print(file)


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else measure.RESULTS
    for plot, benchmark in (
        (scaling, "bench_scaling"), (cost_of_adapters, "bench_sample"), (seal_round, "bench_seal_round"),
    ):  # fmt: skip
        for kind in ("cpu", "cuda"):
            if (target / f"{benchmark}_{kind}.json").exists():
                plot(target, kind)
