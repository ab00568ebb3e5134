"""Small grid puzzles, and the directives that a model writes on them before it has learned which are good.

A rule moves the cells of a grid, or recolours the cells of one area of it. What decides is the recolouring: each of the
90 ordered pairs of different colours belongs either to known rules, of which pretraining is made, or to new ones. So
the model has never seen one colour become another as a new rule wants it, and has to be trained to.

New puzzles are of two kinds. In those named "top" only the top row is recoloured, so turned and flipped copies follow
another rule and mislead. In those named "upside down" all is, but demonstrations have their colours in other rows than
tests do, so such copies are just what they lack.
"""

import random
from dataclasses import dataclass
from pathlib import Path

from seal_engine.domains.few_shot.arc import COLOURS, Example, Grid, Task
from seal_engine.domains.few_shot.arc_tasks import TextForm
from seal_engine.domains.few_shot.augmentations import TURNS, Augmentation, Translate, Turn
from seal_engine.domains.few_shot.directive import STRATEGIES, Directive

TEMPLATES = Path(__file__).parent
PUZZLE_MODEL = TEMPLATES / "puzzle_model"  # a Hugging Face checkpoint, made by `pretrain_puzzles.train_puzzle_model`
PROMPT = TEMPLATES / "puzzle_prompt.txt"  # {demonstrations} and {query}: the answer follows
SELF_EDIT = TEMPLATES / "puzzle_self_edit.txt"  # {demonstrations}: a directive follows

TRANSLATIONS = (Translate(1, 0), Translate(-1, 0), Translate(0, 1), Translate(0, -1))
MOVES: tuple[Augmentation | None, ...] = (None, *map(Turn, TURNS), *TRANSLATIONS)
AREAS = ("all", "top", "bottom", "left", "right", "rim", "inside")
NEW_KINDS = ("top", "upside down")  # of puzzles of new rules, in turn
NO_CHANGE = tuple(range(COLOURS))
# The menu of what is written before any reward: basic and repeat augmentations, learning rates, epochs; any strategy.
DATA = ((False, False), (True, False), (False, True), (True, True))
LEARNING_RATES = (5e-4, 5e-3, 2e-2)
EPOCHS = (2, 4)
TESTS = 3  # of a puzzle of a new rule
TRIES = 30  # for demonstrations that show everything


@dataclass(frozen=True)
class Rule:
    """Cells move, then those of an area are recoloured."""

    move: Augmentation | None
    area: str  # one of AREAS
    colours: tuple[int, ...]  # in place of 0 to 9

    @property
    def name(self) -> str:
        """What it does, in a few words."""
        words = [] if self.move is None else [self.move.name]
        if self.colours != NO_CHANGE:
            words.append(f"{self.area} to {''.join(map(str, self.colours))}")
        return ", ".join(words) or "as it is"

    def apply(self, grid: Grid) -> Grid:
        """The output for an input."""
        grid = grid if self.move is None else self.move.apply(grid)
        within = area_cells(self.area, len(grid), len(grid[0]))
        return tuple(
            tuple(self.colours[colour] if (r, c) in within else colour for c, colour in enumerate(row))
            for r, row in enumerate(grid)
        )

    def shown(self, grid: Grid) -> set[int]:
        """The colours that the area has in the output for an input."""
        made = self.apply(grid)
        return {made[r][c] for r, c in area_cells(self.area, len(made), len(made[0]))}


def area_cells(area: str, rows: int, columns: int) -> set[tuple[int, int]]:
    """The rows and columns of an area's cells."""
    cells = {(r, c) for r in range(rows) for c in range(columns)}
    edges = {
        "top": {(r, c) for r, c in cells if r == 0},
        "bottom": {(r, c) for r, c in cells if r == rows - 1},
        "left": {(r, c) for r, c in cells if c == 0},
        "right": {(r, c) for r, c in cells if c == columns - 1},
    }
    rim = set[tuple[int, int]]().union(*edges.values())
    return {**edges, "all": cells, "rim": rim, "inside": cells - rim}[area]


class Puzzles:
    """Known and new rules, and puzzles of them. The same seed makes the same.

    known: recolourings that pretraining uses. New ones have not a single pair of colours in common with those.
    """

    def __init__(self, seed: int = 0, known: int = 24):
        rng = random.Random(f"{seed} pairs")
        order = list(range(COLOURS))
        rng.shuffle(order)
        # In this order, known pairs go one to four places on, and new ones five to nine.
        self.targets = [
            {order[i]: [order[(i + k) % COLOURS] for k in steps] for i in range(COLOURS)}
            for steps in (range(1, 5), range(5, COLOURS))
        ]
        self.known = [self.recolouring(rng, new=False) for _ in range(known)]

    def recolouring(self, rng: random.Random, new: bool) -> tuple[int, ...]:
        """Every colour becomes another, by pairs that are all new or all known."""
        return tuple(rng.choice(self.targets[new][colour]) for colour in range(COLOURS))

    def puzzle(
        self,
        rule: Rule,
        rng: random.Random,
        demonstrations: int = 3,
        size: tuple[int, int] = (3, 3),
        palette: int = 4,
        tests: int = 1,
        upside_down: bool = False,
        name: str = "",
    ) -> Task:
        """A puzzle of a rule. Its demonstrations show what becomes of every colour, if they can.

        upside_down: each row has two colours, other ones further down in demonstrations, further up in tests.
        """
        colours = rng.sample(range(COLOURS), palette)
        rows, columns = size

        def grid(turned: bool = False) -> Grid:
            made = []
            for row in range(rows):
                first = round(row * (palette - 2) / max(rows - 1, 1))
                own = colours[first : first + 2] if upside_down else colours
                made.append(tuple(rng.choice(own) for _ in range(columns)))
            return tuple(reversed(made)) if turned else tuple(made)

        asked, grids = [grid(upside_down) for _ in range(tests)], []
        wanted = {rule.colours[colour] for colour in colours}
        for _ in range(TRIES):
            grids = [grid() for _ in range(demonstrations)]
            if wanted <= {colour for one in grids for colour in rule.shown(one)}:
                break
        train, test = (tuple(Example(one, rule.apply(one)) for one in own) for own in (grids, asked))
        return Task(name or rule.name, train, test)

    def puzzles(self, split: str, count: int, seed: int = 0) -> list[Task]:
        """Puzzles of new rules: "train" ones to learn directives from, or "heldout" ones to measure on."""
        if split not in ("train", "heldout"):
            raise ValueError(f"split: found {split!r}; accepted: train, heldout")
        rng, made = random.Random(f"{split} {seed}"), []
        for i in range(count):
            kind, colours = NEW_KINDS[i % len(NEW_KINDS)], self.recolouring(rng, new=True)
            upside_down = kind != "top"
            rule, palette = Rule(None, "all" if upside_down else "top", colours), 4 if upside_down else 3
            name = f"{i} {kind}"  # a line shows three colours well enough
            made.append(self.puzzle(rule, rng, palette=palette, tests=TESTS, upside_down=upside_down, name=name))
        return made


def text_form() -> TextForm:
    """How these puzzles are written."""
    return TextForm(prompt=str(PROMPT), self_edit=str(SELF_EDIT))


def write_directive(rng: random.Random) -> Directive:
    """A directive of the menu, all equally likely."""
    basic, repeat = rng.choice(DATA)
    return Directive(
        basic, False, False, repeat, rng.choice(STRATEGIES), rng.choice(LEARNING_RATES), rng.choice(EPOCHS)
    )
