"""Grids, puzzles, ARC's JSON files, and grids as text.

A puzzle (here a task, as in ARC) shows by a few demonstrations how an input grid becomes an output grid, and asks for
the outputs of further inputs. A grid has 1 to 30 rows of 1 to 30 colours, integers 0 to 9, 0 being the background.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seal_engine.domains.knowledge.passages import Record, read_document, refuse
from seal_engine.files import show, strict_json
from seal_engine.types import InputError, is_integer

Grid = tuple[tuple[int, ...], ...]  # rows of colours, all of one length
COLOURS = 10
LARGEST = 30  # rows, and columns
DIGITS = frozenset("0123456789")


@dataclass(frozen=True)
class Example:
    """An input grid and what it becomes; None: unknown."""

    input: Grid
    output: Grid | None


@dataclass(frozen=True)
class Task:
    """A puzzle: demonstrations, whose outputs are all known, and tests, whose outputs may not be."""

    name: str
    train: tuple[Example, ...]
    tests: tuple[Example, ...]

    @property
    def grids(self) -> list[Grid]:
        """All grids that are known, demonstrations first."""
        pairs = [(example.input, example.output) for example in (*self.train, *self.tests)]
        return [grid for pair in pairs for grid in pair if grid is not None]

    @property
    def within_limits(self) -> bool:
        """True if no grid is over 30 x 30."""
        return all(is_size(len(grid), len(grid[0])) for grid in self.grids)


def is_size(rows: int, columns: int) -> bool:
    """True for the size of a grid."""
    return 1 <= rows <= LARGEST and 1 <= columns <= LARGEST


def check_grid(value: Any, place: str) -> Grid:
    """The grid in a list of lists, as JSON has it. InputError naming the row, or the row and column, at fault."""
    accepted = f"1 to {LARGEST} rows of 1 to {LARGEST} colours each"
    if not isinstance(value, list) or not value:
        refuse(place, value, accepted)
    if len(value) > LARGEST:
        raise InputError(f"{place}: found {len(value)} rows; accepted: {accepted}")
    for r, row in enumerate(value):
        if not isinstance(row, list) or not row:
            refuse(f"{place}[{r}]", row, f"a row of 1 to {LARGEST} colours")
        if len(row) > LARGEST:
            raise InputError(f"{place}[{r}]: found {len(row)} columns; accepted: {accepted}")
        if len(row) != len(value[0]):
            raise InputError(f"{place}[{r}]: found {len(row)} columns; accepted: {len(value[0])}, as the first row has")
        for c, colour in enumerate(row):
            if not is_integer(colour) or not 0 <= colour < COLOURS:
                refuse(f"{place}[{r}][{c}]", colour, f"a colour: an integer 0 to {COLOURS - 1}")
    return tuple(map(tuple, value))


def read_tasks(challenges: str | Path, solutions: str | Path | None = None) -> list[Task]:
    """The tasks of ARC's files, in their order.

    challenges: a JSON file that maps names to tasks; one that holds a single task, which is named after the file; or a
    directory of those. Outputs of tests may be in it, or come from solutions: a JSON file that maps names to lists of
    grids, which may know more tasks. Raises InputError naming the file, task, example and field that is not right.
    """
    tasks = [task for file in _files(challenges) for task in _read_file(file)]
    seen: set[str] = set()
    for task in tasks:
        if task.name in seen:
            raise InputError(f"{challenges}: found the task {task.name} twice; accepted: each name once")
        seen.add(task.name)
    if solutions is None:
        return tasks
    known = Record(read_document(solutions), str(solutions))
    return [_solved(task, known) for task in tasks]


def _files(path: str | Path) -> list[str] | list[str | Path]:
    if not isinstance(path, str | Path) or not os.path.isdir(path):
        return [path]  # to read, or to refuse
    names = sorted(name for name in os.listdir(path) if name.endswith(".json"))
    if not names:
        raise InputError(f"{path}: found no JSON file in this directory; accepted: one file for each task")
    return [os.path.join(path, name) for name in names]


def _read_file(file: str | Path) -> Iterator[Task]:
    document = read_document(file)
    if not isinstance(document, dict) or not document:
        refuse(str(file), document, "an object of tasks by name, or one task with train and test")
    alone = isinstance(document.get("train"), list) or isinstance(document.get("test"), list)
    for name, value in ({Path(file).stem: document} if alone else document).items():
        record = Record(value, f"{file}: {name}")
        train = tuple(_example(one, solved=True) for one in record.records("train"))
        yield Task(name, train, tuple(_example(one, solved=False) for one in record.records("test")))


def _example(record: Record, solved: bool) -> Example:
    given = check_grid(record["input"], record.at("input"))
    if not solved and "output" not in record:
        return Example(given, None)
    return Example(given, check_grid(record["output"], record.at("output")))


def _solved(task: Task, solutions: Record) -> Task:
    """The task with the outputs of its tests."""
    place = f"{solutions.place}: {task.name}"
    outputs = solutions[task.name]
    accepted = f"{len(task.tests)} grids, one for each test"
    if not isinstance(outputs, list):
        refuse(place, outputs, accepted)
    if len(outputs) != len(task.tests):
        raise InputError(f"{place}: found {len(outputs)} grids; accepted: {accepted}")
    tests = []
    for i, (test, value) in enumerate(zip(task.tests, outputs, strict=True)):
        output = check_grid(value, f"{place}[{i}]")
        if test.output not in (None, output):
            raise InputError(f"{place}[{i}]: found another grid than the test's own output; accepted: the same")
        tests.append(Example(test.input, output))
    return Task(task.name, task.train, tuple(tests))


class GridTextError(ValueError):
    """A text that is not a grid's; the message says why."""


def _json_grid(text: str) -> Grid | None:
    try:
        return check_grid(strict_json(text), "grid")
    except (ValueError, RecursionError):  # InputError, too
        return None


class GridText:
    """Grids as text, in the way in which `template` writes the grid of the rows 0 1 and 2 3."""

    def __init__(self, template: str):
        self.template = template
        parts = re.fullmatch(r"([^0-9]*)0([^0-9]*)1([^0-9]+)2([^0-9]*)3([^0-9]*)", template)
        if parts is None or parts[2] != parts[4]:
            refuse("grid template", template, "how the rows 0 1 and 2 3 are written, such as [[0, 1], [2, 3]]")
        self.start, self.cell, self.row, _, self.end = parts.groups()
        self.is_json = _json_grid(template) is not None
        for grid in (((0, 1), (2, 3)), ((0, 1, 2),), ((0,), (1,), (2,))):
            try:
                read = self.read(self.write(grid))
            except GridTextError:
                read = None
            if read != grid:
                refuse("grid template", template, "one that tells the end of a colour from the end of a row")

    def write(self, grid: Grid) -> str:
        """The grid's text."""
        return self.start + self.row.join(self.cell.join(map(str, row)) for row in grid) + self.end

    def read(self, text: str) -> Grid:
        """The grid whose text it is, or, where the template is JSON, any spelling of that JSON. GridTextError else."""
        if self.is_json and (grid := _json_grid(text)) is not None:
            return grid
        rows = text.removeprefix(self.start).removesuffix(self.end).split(self.row)
        cells = [row.split(self.cell) if self.cell else list(row) for row in rows]
        digits = all(cell in DIGITS for row in cells for cell in row)
        grid = tuple(tuple(map(int, row)) for row in cells) if digits else ()
        if not grid or self.write(grid) != text:
            raise GridTextError(f"found {show(text)}; accepted: a grid written like {self.template}")
        if len(set(map(len, grid))) > 1:
            raise GridTextError(f"found rows of {sorted(set(map(len, grid)))} colours; accepted: of one length")
        if not is_size(len(grid), len(grid[0])):
            raise GridTextError(f"found {len(grid)} rows of {len(grid[0])}; accepted: 1 to 30 rows of 1 to 30 colours")
        return grid
