"""Held-out puzzles as a picture: what is shown, what is asked, and what was answered before training and after."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from seal_engine.domains.few_shot.arc import Grid, Task
from seal_engine.domains.few_shot.task import FewShot
from seal_engine.files import replace_file
from seal_engine.loop.ledger import Ledger
from seal_engine.loop.records import Trial
from seal_engine.svg import WIDTH, element, embedded, picture, standalone, words

PICTURE = "puzzles.svg"
# ARC's own colours, by number.
PALETTE = ("#000000", "#0074D9", "#FF4136", "#2ECC40", "#FFDC00", "#AAAAAA", "#F012BE", "#FF851B", "#7FDBFF", "#870C25")
DEMONSTRATIONS = 3  # of a puzzle that are shown
OF_EACH = 2  # puzzles that were gained, that were solved before, that are not solved, that were lost
COLUMNS, SIDE, ROW = 5, 54, 80  # of a row: grids that have room at least; of a grid: its longer side, room down


@dataclass(frozen=True)
class Answered:
    """A puzzle and the first grid that each method elected for its first test; None: no grid."""

    task: Task
    elected: Mapping[str, Grid | None]


def write_puzzles(domain: FewShot, ledger: Ledger) -> None:
    """Draw puzzles of the first seed into the run's directory; nothing without an evaluation."""
    chosen = choose(domain, ledger)
    if chosen:
        replace_file(ledger.directory / PICTURE, standalone(draw(chosen)))


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


def draw(puzzles: Sequence[Answered]) -> str:
    """The picture as SVG. Of each puzzle what is shown in one row, and below it what is asked, wanted and answered."""
    parts, upper = [], 0.0
    for one in puzzles:
        parts.append(words(0, upper + 14, one.task.name.partition(" ")[2] or one.task.name, "bold"))
        shown = one.task.train[:DEMONSTRATIONS]
        pairs = [(example.input, example.output) for example in shown]
        parts += _row(upper + 20, [part for pair in pairs for part in ((pair[0], "shown", ""), (pair[1], "", ""))])
        test = one.task.tests[0]
        cells = [(test.input, "asked", ""), (test.output, "wanted", "")]
        for title, grid in one.elected.items():
            right = grid == test.output
            cells.append(
                (grid, f"{title.removesuffix(' any round')} {'✓' if right else '✗'}", "blue" if right else "orange")
            )
        parts += _row(upper + 20 + ROW, cells)
        upper += 20 + 2 * ROW + 10
    return picture(upper, "Held-out puzzles with the answers before and after", parts)


def _row(upper: float, cells: Sequence[tuple[Grid | None, str, str]]) -> list[str]:
    """Grids side by side, each with its words above and a frame in its colour; an arrow from what is given."""
    parts = []
    for i, (grid, title, colour) in enumerate(cells):
        left = i * WIDTH / max(COLUMNS, len(cells))
        look = f"small t-{colour}" if colour else "small muted"
        parts.append(words(left, upper + 12, title, look))
        parts += _draw_grid(left, upper + 18, grid, colour)
        if title in ("shown", "asked"):
            parts.append(words(left + SIDE + 3, upper + 18 + SIDE / 2, "→", "muted"))
    return parts


def _draw_grid(left: float, upper: float, grid: Grid | None, colour: str) -> list[str]:
    """A grid in a frame: for each colour of it one path of all its runs."""
    frame = f"line s-{colour}" if colour else "line thin s-edge"
    if grid is None:
        empty = element("rect", frame, x=left, y=upper, width=SIDE, height=SIDE, fill="none")
        return [empty, words(left + SIDE / 2, upper + SIDE / 2 + 4, "no grid", "mid small muted")]
    size = SIDE / max(len(grid), len(grid[0]))
    runs: dict[int, list[str]] = {}
    for r, row in enumerate(grid):
        start = 0
        for value, cells in groupby(row):
            length = len(list(cells))
            x, y, width = (f"{n:.2f}" for n in (left + start * size, upper + r * size, length * size))
            runs.setdefault(value, []).append(f"M{x} {y}h{width}v{size:.2f}h-{width}z")
            start += length
    parts = [element("path", fill=PALETTE[value], d="".join(own)) for value, own in sorted(runs.items())]
    width, height = size * len(grid[0]), size * len(grid)
    return [*parts, element("rect", frame, x=left, y=upper, width=width, height=height, fill="none")]


def saved(directory: Path) -> str | None:
    """The picture of a run, if it has one, as part of a page."""
    file = directory / PICTURE
    return embedded(file.read_bytes()) if file.exists() else None
