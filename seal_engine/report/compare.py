"""Several runs on one page: their tables side by side, accuracy by round in one figure, settings that differ."""

import os
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from seal_engine.files import replace_file
from seal_engine.loop.ledger import Ledger
from seal_engine.loop.restem import SELF_EDITS
from seal_engine.report import plots
from seal_engine.report.claim import certainty, claim, is_over
from seal_engine.report.data import RunData
from seal_engine.report.html import NONE, date, document, figure, percent, table
from seal_engine.report.self_edits import judged_rounds
from seal_engine.report.settings import known_defaults, shown_value
from seal_engine.runs import Row, is_continual, rows
from seal_engine.svg import clean
from seal_engine.types import InputError, require

MOST_RUNS = len(plots.LOOKS)  # lines that can be told apart


class ComparedRun:
    """A run, by a name that no other of the compared ones has."""

    def __init__(self, name: str, directory: Path):
        """Raises InputError where there is no run that goes in rounds."""
        self.name, self.directory = name, directory
        with Ledger.read(directory) as ledger:
            if is_continual(ledger):
                accepted = "runs that go in rounds: knowledge, few-shot and their miniatures"
                raise InputError(f"{directory}: found a run of {ledger.config['task']}; accepted: {accepted}")
            self.data, self.rows = RunData(ledger), {row.name: row for row in rows(ledger)}


def compare(directories: Sequence[Path]) -> list[ComparedRun]:
    """The runs to compare. InputError for too many, for one that is named twice, or where there is no run."""
    require(2 <= len(directories) <= MOST_RUNS, "directories", len(directories), f"2 to {MOST_RUNS} runs to compare")
    paths = [Path(os.path.realpath(directory)) for directory in directories]
    require(len(set(paths)) == len(paths), "directories", [str(d) for d in directories], "different runs")
    return [ComparedRun(name, path) for name, path in zip(_short_names(paths), paths, strict=True)]


def comparison(runs: Sequence[ComparedRun]) -> list[tuple[str, list[Row | None]]]:
    """Method -> its line in each run's table, None where a run has none; in the order of the first run."""
    names = dict.fromkeys(name for run in runs for name in run.rows)
    return [(name, [run.rows.get(name) for run in runs]) for name in names]


def comparison_table(runs: Sequence[ComparedRun]) -> str:
    """The same as text: mean accuracy in percent, and the last run's less the first's."""
    heads, lines = _cells(runs)
    widths = [max(len(line[i]) for line in [heads, *lines]) for i in range(len(heads))]
    return "\n".join(
        "  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in pairs).rstrip()
        for pairs in (enumerate(zip(line, widths, strict=True)) for line in [heads, *lines])
    )


def write_comparison(runs: Sequence[ComparedRun], file: Path) -> Path:
    """Write the page of the comparison; equal runs give equal bytes."""
    heads, lines = _cells(runs)
    written = {run.name: run.data.by_round(SELF_EDITS) for run in runs}
    num_seeds = {run.name: run.data.num_seeds for run in runs}
    baselines = {
        name: {0: fmean(row.mean for row in found if row is not None)}
        for name, found in comparison(runs)
        if name in runs[0].data.baselines and None not in found
    }
    num_seeds |= dict.fromkeys(baselines, 1)
    picture = figure(plots.accuracy(written, baselines, num_seeds, "Accuracy of self-edits by round, in percent"))
    note = (
        "Mean accuracy on held-out contexts in percent (sd over seeds). In the figure, baselines are means over runs."
    )
    sections = [
        "".join(_said(run) for run in runs),
        f'<div class="beside">{picture}<div>{table(heads, lines, range(1, len(heads)))}'
        f'<p class="note">{note}</p></div></div>',
        f"<h2>Settings that differ</h2>\n{_settings(runs)}",
        f"<h2>Environments that differ</h2>\n{_environments(runs)}",
    ]
    title = " and ".join(run.name for run in runs)
    return replace_file(file, document(title, sections).encode("utf-8", "replace"))


def _cells(runs: Sequence[ComparedRun]) -> tuple[list[str], list[list[str]]]:
    """Heads and lines of the table."""
    lines = []
    for name, found in comparison(runs):
        first, last = found[0], found[-1]
        change = NONE if first is None or last is None else f"{100 * (last.mean - first.mean):+.1f}"
        lines.append([name, *map(_accuracy, found), change])
    return ["method", *(run.name for run in runs), "change"], lines


def _accuracy(row: Row | None) -> str:
    if row is None:
        return NONE
    return percent(row.mean) + ("" if row.deviation is None else f" ({percent(row.deviation)})")


def _said(run: ComparedRun) -> str:
    """A run's finding, how sure it is, and whether the run is over."""
    data = run.data
    state = "over" if is_over(data) else "not over"
    return (
        f"<h2>{clean(run.name)}: {clean(claim(data, judged_rounds(data)))}</h2>\n<p>{certainty(data)}</p>\n"
        f'<p class="note">{clean(str(run.directory))}, begun {date(data.started)}, {state}.</p>\n'
    )


def _settings(runs: Sequence[ComparedRun]) -> str:
    """Settings, defaults included, that are not the same in all runs; digests of files beside their settings."""
    configs = [known_defaults(run.data.config) | run.data.config for run in runs]
    digests = [config.pop("sha256", {}) for config in configs]
    for config, digest in zip(configs, digests, strict=True):
        config |= {f"sha256 of {name}": value for name, value in digest.items()}
    return _differences(runs, [{name: shown_value(value) for name, value in config.items()} for config in configs])


def _environments(runs: Sequence[ComparedRun]) -> str:
    """The latest environments."""
    return _differences(runs, [run.data.environments[-1] if run.data.environments else {} for run in runs])


def _differences(runs: Sequence[ComparedRun], values: Sequence[dict[str, str]]) -> str:
    """A table of what is not the same in all runs."""
    names = dict.fromkeys(name for one in values for name in one)
    lines = [(name, *(one.get(name, NONE) for one in values)) for name in names]
    different = [line for line in lines if len(set(line[1:])) > 1]
    return table(("", *(run.name for run in runs)), different) if different else "<p>None.</p>\n"


def _short_names(paths: Sequence[Path]) -> list[str]:
    """The last parts of paths that tell them apart."""
    for count in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]
