"""Other puzzles of the same kind: augmentations of grids.

An augmentation turns a grid into another grid. It is a value: equal ones do the same, its name says what it does, and
nothing in it is random; what is drawn is drawn when it is made, by the caller's generator. Each has an inverse with
`inverse.apply(apply(grid)) == grid`. Rotations, flips, transpositions, translations and recolourings are one to one, so
their inverses take any grid. Those that make a grid larger do not reach every grid: their inverses raise NoImageError
where a grid is none that they make.

The recipe's sets are BASIC (with a random translation), SIZE, CHAIN and REPEAT.
"""

from abc import ABC, abstractmethod
from dataclasses import astuple, dataclass
from functools import reduce
from random import Random
from typing import Protocol

from seal_engine.domains.few_shot.arc import COLOURS, Grid, Task
from seal_engine.types import is_integer, require

# name: whether rows and columns are swapped, then up and down, then left and right
TURNS = {
    "rotate 90": (True, True, False),
    "rotate 270": (True, False, True),
    "rotate 180": (False, True, True),
    "flip up-down": (False, True, False),
    "flip left-right": (False, False, True),
    "transpose": (True, False, False),
}
SIDES = ("up", "left", "down", "right")
FARTHEST = 3  # rows and columns of a random translation, at most


class NoImageError(ValueError):
    """A grid that an augmentation cannot have made has no original."""


class Augmentation(Protocol):
    """What all augmentations have."""

    @property
    def name(self) -> str:
        """What it does, in a few words."""
        ...

    @property
    def inverse(self) -> "Augmentation":
        """What undoes it."""
        ...

    def apply(self, grid: Grid) -> Grid:
        """The augmented grid, of any size. Inverses of what enlarges raise NoImageError."""
        ...


@dataclass(frozen=True)
class Turn:
    """One of TURNS. Rotations are counter-clockwise."""

    name: str

    def __post_init__(self):
        require(self.name in TURNS, "name", self.name, f"one of {list(TURNS)}")

    @property
    def inverse(self) -> "Turn":
        return Turn({"rotate 90": "rotate 270", "rotate 270": "rotate 90"}.get(self.name, self.name))

    def apply(self, grid: Grid) -> Grid:
        transpose, up_down, left_right = TURNS[self.name]
        grid = tuple(zip(*grid, strict=True)) if transpose else grid
        grid = grid[::-1] if up_down else grid
        return tuple(row[::-1] for row in grid) if left_right else grid


@dataclass(frozen=True)
class Translate:
    """Shift down by rows and right by columns; what leaves on one side enters on the other."""

    rows: int
    columns: int

    @property
    def name(self) -> str:
        return f"translate {self.rows}, {self.columns}"

    @property
    def inverse(self) -> "Translate":
        return Translate(-self.rows, -self.columns)

    def apply(self, grid: Grid) -> Grid:
        down, right = self.rows % len(grid), self.columns % len(grid[0])
        return tuple(row[-right:] + row[:-right] for row in grid[-down:] + grid[:-down])


@dataclass(frozen=True)
class Recolour:
    """colours[c] in place of colour c. Colours are 0 to 9, each once."""

    colours: tuple[int, ...]

    def __post_init__(self):
        valid = isinstance(self.colours, tuple) and all(map(is_integer, self.colours))
        require(valid and sorted(self.colours) == list(range(COLOURS)), "colours", self.colours, "each of 0 to 9 once")

    @property
    def name(self) -> str:
        return f"recolour {''.join(map(str, self.colours))}"

    @property
    def inverse(self) -> "Recolour":
        return Recolour(tuple(self.colours.index(colour) for colour in range(COLOURS)))

    def apply(self, grid: Grid) -> Grid:
        return tuple(tuple(self.colours[colour] for colour in row) for row in grid)


@dataclass(frozen=True)
class Larger(ABC):
    """What makes a grid larger."""

    @property
    def name(self) -> str:
        return " ".join(map(str, (type(self).__name__.lower(), *astuple(self))))

    @property
    def inverse(self) -> "Undo":
        return Undo(self)

    @abstractmethod
    def apply(self, grid: Grid) -> Grid: ...

    @abstractmethod
    def original(self, grid: Grid) -> Grid:
        """What must have become `grid` if anything has. Its rows may be empty, and it may have none."""


@dataclass(frozen=True)
class Scale(Larger):
    """Each cell becomes a block of so many rows and columns."""

    rows: int
    columns: int

    def apply(self, grid: Grid) -> Grid:
        wide = (tuple(colour for colour in row for _ in range(self.columns)) for row in grid)
        return tuple(row for row in wide for _ in range(self.rows))

    def original(self, grid: Grid) -> Grid:
        return tuple(row[:: self.columns] for row in grid[:: self.rows])


@dataclass(frozen=True)
class Repeat(Larger):
    """So many copies of the grid below one another, and beside one another."""

    rows: int
    columns: int

    def apply(self, grid: Grid) -> Grid:
        return tuple(row * self.columns for row in grid) * self.rows

    def original(self, grid: Grid) -> Grid:
        return tuple(row[: len(row) // self.columns] for row in grid[: len(grid) // self.rows])


@dataclass(frozen=True)
class Mirror(Larger):
    """The grid with its mirror image at one side."""

    side: str  # of SIDES

    def __post_init__(self):
        require(self.side in SIDES, "side", self.side, f"one of {SIDES}")

    def apply(self, grid: Grid) -> Grid:
        if self.side in ("up", "down"):
            return grid[::-1] + grid if self.side == "up" else grid + grid[::-1]
        return tuple(row[::-1] + row if self.side == "left" else row + row[::-1] for row in grid)

    def original(self, grid: Grid) -> Grid:
        rows, columns = len(grid) // 2, len(grid[0]) // 2
        if self.side in ("up", "down"):
            return grid[-rows:] if self.side == "up" else grid[:rows]
        return tuple(row[-columns:] if self.side == "left" else row[:columns] for row in grid)


@dataclass(frozen=True)
class Undo:
    """The inverse of what makes a grid larger."""

    inverse: Larger

    @property
    def name(self) -> str:
        return f"undo {self.inverse.name}"

    def apply(self, grid: Grid) -> Grid:
        original = self.inverse.original(grid)
        if not original or not original[0] or self.inverse.apply(original) != grid:
            raise NoImageError(f"{self.name}: found a grid that {self.inverse.name} makes of none")
        return original


@dataclass(frozen=True)
class Chain:
    """One after another."""

    steps: tuple[Augmentation, ...]

    @property
    def name(self) -> str:
        return ", ".join(step.name for step in self.steps) or "identity"

    @property
    def inverse(self) -> "Chain":
        return Chain(tuple(step.inverse for step in reversed(self.steps)))

    def apply(self, grid: Grid) -> Grid:
        return reduce(lambda made, step: step.apply(made), self.steps, grid)


IDENTITY = Chain(())
BASIC: tuple[Augmentation, ...] = (*map(Turn, TURNS), *map(Mirror, SIDES))
SIZE: tuple[Augmentation, ...] = (Scale(2, 2), Scale(2, 1), Scale(1, 2))
CHAIN: tuple[Augmentation, ...] = tuple(Chain((Turn(name), Scale(2, 2))) for name in TURNS)
REPEAT: tuple[Augmentation, ...] = (Repeat(2, 1), Repeat(1, 2), Repeat(2, 2))


def random_translation(task: Task, random: Random) -> Translate:
    """One shift for all grids of a task: 0 to 3 rows and columns, less than the largest grid has, and not none at all.

    A task of nothing but 1 x 1 grids cannot be shifted; what it gets changes nothing.
    """
    rows = min(FARTHEST, max(len(grid) for grid in task.grids) - 1)
    columns = min(FARTHEST, max(len(grid[0]) for grid in task.grids) - 1)
    shift = random.randrange((rows + 1) * (columns + 1) - 1) + 1 if rows or columns else 0
    return Translate(*divmod(shift, columns + 1))


def random_recolouring(random: Random) -> Recolour:
    """Colours 1 to 9 in a random cycle, so that none of them stays, and 0, the background, does."""
    cycle = list(range(1, COLOURS))
    random.shuffle(cycle)
    following = dict(zip(cycle, [*cycle[1:], cycle[0]], strict=True))
    return Recolour((0, *(following[colour] for colour in range(1, COLOURS))))
