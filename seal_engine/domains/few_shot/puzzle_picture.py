"""Held-out puzzles as a picture: what is shown, what is asked, and what was answered before training and after."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seal_engine.domains.few_shot.arc import COLOURS, Grid, Task
from seal_engine.domains.few_shot.task import FewShot
from seal_engine.files import replace_file
from seal_engine.loop.ledger import Ledger
from seal_engine.loop.records import Trial

PICTURE = "puzzles.png"
# ARC's own colours, by number.
PALETTE = ("#000000", "#0074D9", "#FF4136", "#2ECC40", "#FFDC00", "#AAAAAA", "#F012BE", "#FF851B", "#7FDBFF", "#870C25")
DEMONSTRATIONS = 3  # of a puzzle that are shown
OF_EACH = 2  # puzzles that were gained, that were solved before, that are not solved, that were lost
RIGHT, WRONG = "#2E7D32", "#C62828"


@dataclass(frozen=True)
class Answered:
    """A puzzle and the first grid that each method elected for its first test; None: no grid."""

    task: Task
    elected: Mapping[str, Grid | None]


def write_puzzles(domain: FewShot, ledger: Ledger) -> None:
    """Draw puzzles of the first seed into the run's directory; nothing without matplotlib, or without an evaluation."""
    chosen = choose(domain, ledger)
    if not chosen:
        return
    try:
        picture = draw(chosen)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "matplotlib":
            raise
        return
    replace_file(ledger.directory / PICTURE, picture)


def choose(domain: FewShot, ledger: Ledger) -> list[Answered]:
    """Some puzzles of each outcome: the first ones that were gained, solved all along, never solved, or lost."""
    seed, *_ = ledger.config["seeds"]
    last = max((policy.round for policy in ledger.policies(seed)), default=0)
    phases = {"in context": "in context", "before any round": "evaluation 0, self-edits"}
    if last:
        phases[f"after round {last}"] = f"evaluation {last}, self-edits"
    found = {title: _first_trials(ledger.trials(seed, phase)) for title, phase in phases.items()}
    if not any(found.values()):
        return []
    made: dict[tuple[bool, bool], list[Answered]] = {}
    for context in domain.contexts("held out"):
        task, elected = domain.tasks[context], {}
        for title, trials in found.items():
            trial = trials.get(context)
            answers = trial.answers if trial is not None else ()
            grids = domain.attempts(context, answers)[0] if answers else []
            elected[title] = grids[0] if grids else None
        solved = [grid == task.tests[0].output for grid in elected.values()]
        made.setdefault((solved[1], solved[-1]), []).append(Answered(task, elected))
    outcomes = ((False, True), (True, True), (False, False), (True, False))
    return [one for outcome in outcomes for one in made.get(outcome, ())[:OF_EACH]]


def _first_trials(trials: Sequence[Trial]) -> dict[str, Trial]:
    return {trial.context: trial for trial in reversed(trials)}


def draw(puzzles: Sequence[Answered]) -> bytes:
    """The picture as a PNG, a row for each puzzle. Needs matplotlib."""
    import matplotlib
    from matplotlib.figure import Figure

    shown = max(min(DEMONSTRATIONS, len(one.task.train)) for one in puzzles)
    heads = ["shown" if i == 0 else "" for i in range(2 * shown)] + ["asked", "wanted", *puzzles[0].elected]
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"font.family": "DejaVu Sans", "font.size": 8, "text.parse_math": False})
        figure = Figure(figsize=(len(heads), 1.15 * len(puzzles) + 0.3), layout="constrained")
        axes = figure.subplots(len(puzzles), len(heads), squeeze=False)
        for row, (one, own) in enumerate(zip(puzzles, axes, strict=True)):
            test, cells = one.task.tests[0], list[tuple[Grid | None, str]]()
            for example in one.task.train[:shown]:
                cells += [(example.input, "black"), (example.output, "black")]
            cells += [(None, "")] * (2 * shown - len(cells))
            cells += [(test.input, "black"), (test.output, "black")]
            cells += [(grid, RIGHT if grid == test.output else WRONG) for grid in one.elected.values()]
            for i, (axis, (grid, colour)) in enumerate(zip(own, cells, strict=True)):
                _draw_grid(axis, grid, colour, marked=i >= 2 * shown + 2)
                if row == 0:
                    axis.set_title(heads[i], fontsize=8)
            own[0].set_ylabel(one.task.name.partition(" ")[2] or one.task.name, fontsize=7)
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=150, metadata={"Software": None})
    return stream.getvalue()


def _draw_grid(axis: Any, grid: Grid | None, colour: str, marked: bool) -> None:
    """A grid in a frame; marked: an answer, with a sign whether it is right."""
    from matplotlib.colors import ListedColormap

    axis.set(xticks=[], yticks=[])
    if not colour:
        axis.set_axis_off()
        return
    if grid is None:
        axis.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
        axis.text(0.5, 0.5, "no grid", ha="center", va="center", color=colour)
    else:
        axis.imshow(grid, cmap=ListedColormap(PALETTE), vmin=0, vmax=COLOURS - 1)
        axis.set_xticks([x - 0.5 for x in range(1, len(grid[0]))], minor=True)
        axis.set_yticks([y - 0.5 for y in range(1, len(grid))], minor=True)
        axis.grid(which="minor", color="white", linewidth=0.6)
        axis.tick_params(which="minor", length=0)
    axis.spines[:].set(color=colour, linewidth=2.5 if marked else 0.8)
    if marked:
        axis.set_xlabel("✓" if colour == RIGHT else "✗", color=colour, fontsize=9, labelpad=1)


def saved(directory: Path) -> bytes | None:
    """The picture of a run, if it has one."""
    file = directory / PICTURE
    return file.read_bytes() if file.exists() else None
