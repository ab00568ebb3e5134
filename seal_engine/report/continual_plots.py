"""Pictures of the continual experiment: matrices side by side, gain by age, costs. Needs the extra `plot`."""

import warnings
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from seal_engine.loop.continual_results import MethodResult
from seal_engine.loop.forgetting import mean_matrix
from seal_engine.report.plots import BLUE, GREY, ORANGE, SKY, STYLE, VERMILION, png

COLUMNS = 5  # matrices side by side
NAMED_CELLS = 10  # with more rows, numbers in the cells would overlap
COLOURS = (VERMILION, BLUE, ORANGE, SKY, "#009E73", "#CC79A7", "#000000", GREY)
MARKERS = "osv^D<>*"


def draw_continual(methods: Sequence[MethodResult]) -> dict[str, bytes]:
    """Name -> PNG of each picture for which there is something to show."""
    measured = [m for m in methods if m.kept is not None]
    if not measured:
        return {}
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        return {
            "forgetting": png(_matrices(measured)),
            "age": png(_ages(measured)),
            "cost": png(_costs(measured)),
        }


def _matrices(methods: Sequence[MethodResult]) -> Figure:
    """A heat map per method, all on one colour scale from 0 to 100%."""
    rows = -(-len(methods) // COLUMNS)
    figure = Figure(figsize=(9, 0.9 + 2.0 * rows), layout="constrained")
    figure.suptitle("Accuracy (%) on each passage after each edit, mean over sequences", weight="bold", size=10.5)
    grid = figure.subplots(rows, COLUMNS, squeeze=False)
    image = None
    for axes in grid.flat[len(methods) :]:
        axes.set_visible(False)
    for method, axes in zip(methods, grid.flat, strict=False):
        cells = mean_matrix(method.matrices)
        values = np.array([[np.nan if cell is None else 100 * cell for cell in row] for row in cells])
        image = axes.imshow(values, cmap="viridis", vmin=0, vmax=100, aspect="auto")
        axes.set_title(method.name)
        axes.spines[:].set_visible(False)
        axes.set_xticks([0, values.shape[1] - 1], ["1", str(values.shape[1])])
        axes.set_yticks([0, len(values) - 1], ["0", str(len(values) - 1)])
        if len(values) <= NAMED_CELLS:
            for t, j in np.argwhere(~np.isnan(values)):
                dark = "white" if values[t, j] < 60 else "black"
                axes.annotate(f"{values[t, j]:.0f}", (j, t), ha="center", va="center", color=dark, size=5.5)
    for axes in grid[:, 0]:
        axes.set_ylabel("edits so far")
    if image is not None:
        figure.colorbar(image, ax=grid, shrink=0.6, label="accuracy (%)")
    return figure


def _ages(methods: Sequence[MethodResult]) -> Figure:
    """Gain over the untrained model by how many edits came after."""
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for i, method in enumerate(methods):
        gains = [np.nan if gain is None else gain for gain in method.ages]
        (line,) = axes.plot(range(len(gains)), gains, "-" if i < len(COLOURS) else "--", label=method.name)
        line.set(color=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)], markersize=5)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(xlabel="edits since", ylabel="gain over the untrained model")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid(axis="y")
    figure.legend(loc="outside right center", title="Gain by age of the edit")
    return figure


def _costs(methods: Sequence[MethodResult]) -> Figure:
    """Tokens trained, beside what is lost on the probes."""
    figure = Figure(figsize=(8, 1.1 + 0.3 * len(methods)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    names = [method.name for method in methods]
    left.barh(names, [method.tokens / 1000 for method in methods], color=BLUE)
    left.set(xlabel="thousand tokens trained")
    left.invert_yaxis()
    right.barh(names, [(method.bytes_kept or 0) / 1024 for method in methods], color=ORANGE)
    right.set(xlabel="KiB kept per sequence, beside one set of weights")
    for axes in (left, right):
        axes.grid(axis="x")
        axes.tick_params(axis="y", length=0)
    return figure
