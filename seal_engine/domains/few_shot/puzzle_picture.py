"""Held-out puzzles as a picture: what is shown, what is asked, and what was answered before training and after."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from seal_engine.domains.few_shot.arc import Example, Grid, Task
from seal_engine.domains.few_shot.task import FewShot
from seal_engine.files import replace_file
from seal_engine.loop.ledger import Ledger
from seal_engine.loop.records import Trial
from seal_engine.svg import element, picture, words

FILE = "puzzles.json"  # in a run's directory
# ARC's own colours, by number.
PALETTE = ("#000000", "#0074D9", "#FF4136", "#2ECC40", "#FFDC00", "#AAAAAA", "#F012BE", "#FF851B", "#7FDBFF", "#870C25")
DEMONSTRATIONS = 3  # of a puzzle that are shown
OF_EACH = 2  # puzzles that were gained, that were solved before, that are not solved, that were lost
LEFT, PAIR = 74, 126  # right of the words of a row; from one pair of grids to the next
SIDE, ROW = 44, 54  # of a grid: its longer side, room down


@dataclass(frozen=True)
class Answered:
    """A puzzle and the first grid that each method elected for its first test; None: no grid."""

    task: Task
    elected: Mapping[str, Grid | None]


def write_puzzles(domain: FewShot, ledger: Ledger) -> None:
    """Write puzzles of the first seed, to be drawn, into the run's directory; nothing without an evaluation."""
    chosen = choose(domain, ledger)
    if chosen:
        replace_file(ledger.directory / FILE, (json.dumps([asdict(one) for one in chosen]) + "\n").encode())


def read_puzzles(file: Path) -> list[Answered]:
    """The puzzles that write_puzzles has chosen; none where there is no such file."""
    return [_answered(**one) for one in json.loads(file.read_text())] if file.exists() else []


def _answered(task: dict[str, Any], elected: dict[str, Grid | None]) -> Answered:
    """From JSON, in which grids are lists of lists."""
    train, tests = (tuple(Example(**example) for example in task[part]) for part in ("train", "tests"))
    return Answered(Task(task["name"], train, tests), elected)


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
    """The picture as SVG. Of each puzzle three rows: what is shown, what is asked, and what was answered."""
    parts, upper = [], 0.0
    for one in puzzles:
        test = one.task.tests[0]
        right = {title: grid == test.output for title, grid in one.elected.items()}
        parts.append(
            words(0, upper + 14, f"{one.task.name.partition(' ')[2] or one.task.name}: {_outcome(right)}", "bold")
        )
        for row, (title, note) in enumerate(
            (("shown", "examples"), ("asked", "and wanted"), ("answered", "one by one"))
        ):
            middle = upper + 22 + ROW * row + SIDE / 2
            parts += [words(0, middle, title, "small bold"), words(0, middle + 13, note, "small muted")]
        shown = [(example.input, example.output) for example in one.task.train[:DEMONSTRATIONS]]
        for row, pairs in enumerate((shown, [(test.input, test.output)])):
            for i, (before, after) in enumerate(pairs):
                left, top = LEFT + i * PAIR, upper + 22 + ROW * row
                parts += _draw_grid(left, top, before, "")
                parts.append(words(left + SIDE + 10, top + SIDE / 2 + 4, "→", "mid"))
                parts += _draw_grid(left + SIDE + 20, top, after, "")
        for i, (title, grid) in enumerate(one.elected.items()):
            look, top = "blue" if right[title] else "orange", upper + 22 + 2 * ROW
            parts += _draw_grid(LEFT + i * PAIR, top, grid, look)
            said = f"{'✓' if right[title] else '✗'} {title.removesuffix(' any round')}"
            parts.append(words(LEFT + i * PAIR, top + SIDE + 13, said, f"small t-{look}"))
        upper += 22 + 3 * ROW + 30
    return picture(
        upper - 10, "Held-out puzzles: what is shown, what is asked, and the answers before and after", parts
    )


def _outcome(right: Mapping[str, bool]) -> str:
    """What became of a puzzle, from whether each method solved it, the last of them after all rounds."""
    before, after = right.get("before any round", False), [*right.values()][-1]
    if before != after:
        return "solved only after training" if after else "solved before, lost in training"
    return "solved before and after" if after else "not solved"


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
