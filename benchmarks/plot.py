"""Plots of what is recorded under results/: python benchmarks/plot.py [DIRECTORY]. Needs the extra `plot`."""

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

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


def _save(figure: Any, file: Path, title: str, where: str) -> None:
    figure.suptitle(f"{title}\n{where}", fontsize=9)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})
    print(file)


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else measure.RESULTS
    for plot, benchmark in ((scaling, "bench_scaling"), (cost_of_adapters, "bench_sample")):
        for kind in ("cpu", "cuda"):
            if (target / f"{benchmark}_{kind}.json").exists():
                plot(target, kind)
