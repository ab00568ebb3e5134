"""What an adapter is asked about a test of a puzzle, and the grids that its answers elect.

The published recipe: the test is asked with each demonstration left out in turn, and again with the demonstrations that
are left in other orders; and some of these tasks are asked turned as a whole, the answers being turned back. All
answers are greedy, and each has a vote. The two grids with the most votes are the two attempts that ARC allows.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from random import Random

from seal_engine.domains.few_shot.arc import Grid, Task, is_size
from seal_engine.domains.few_shot.arc_tasks import apply_to_task, shuffled
from seal_engine.domains.few_shot.augmentations import IDENTITY, Augmentation, NoImageError, Turn

ATTEMPTS = 2
TRANSFORMS: tuple[Augmentation, ...] = tuple(
    map(Turn, ("transpose", "flip up-down", "flip left-right", "rotate 90", "rotate 180"))
)


@dataclass(frozen=True)
class Query:
    """A task to ask, with one test and no output, and what an answer has to go through."""

    task: Task
    undo: Augmentation = IDENTITY

    def prediction(self, answer: Grid | None) -> Grid | None:
        """What the answer says of the test itself; None if it says nothing."""
        if answer is None:
            return None
        try:
            grid = self.undo.apply(answer)
        except NoImageError:
            return None
        return grid if is_size(len(grid), len(grid[0])) else None


def queries(
    task: Task,
    test: int = 0,
    seed: int = 0,
    leave: int = 1,
    orders: int = 2,
    transforms: Sequence[Augmentation] = TRANSFORMS,
    fits: Callable[[Task], bool] = lambda task: True,
) -> list[Query]:
    """What is asked about a test: the untransformed first, and nothing twice.

    leave: how many demonstrations each task is without, all ways; at least one stays. orders: further orders of the
    demonstrations of each. transforms: each is applied to one of those tasks, chosen at random. fits: where no query
    does, one demonstration more is left out, too, as long as there are any.
    """
    own = replace(task, tests=(replace(task.tests[test], output=None),))
    most = max(0, len(task.train) - 1)
    for count in range(min(leave, most), most + 1):
        made = [query for query in _queries(own, seed, count, orders, transforms) if fits(query.task)]
        if made:
            return made
    return []


def _queries(task: Task, seed: int, leave: int, orders: int, transforms: Sequence[Augmentation]) -> list[Query]:
    random = Random(seed)
    tasks = []
    for train in combinations(task.train, len(task.train) - leave):
        kept = replace(task, train=train)
        tasks += [kept, *(shuffled(kept, random) for _ in range(orders))]
    tasks = list(dict.fromkeys(tasks))
    made = {one: Query(one) for one in tasks}
    for transform in transforms:
        one = apply_to_task(transform, random.choice(tasks))
        if one.within_limits:
            made.setdefault(one, Query(one, transform.inverse))
    return list(made.values())


def vote(predictions: Sequence[Grid | None], attempts: int = ATTEMPTS) -> list[Grid]:
    """At most `attempts` different grids, those with the most votes first.

    Of grids with equally many the one predicted first goes first: with the order of `queries`, the one that more
    likely comes from a task as it is. None has no vote.
    """
    return [grid for grid, _ in Counter(grid for grid in predictions if grid is not None).most_common(attempts)]


def score(task: Task, attempts: Sequence[Sequence[Grid]]) -> list[float | None]:
    """For each test 1.0 if one of its attempts is its output, else 0.0; None where the output is unknown."""
    pairs = zip(task.tests, attempts, strict=True)
    return [None if test.output is None else float(test.output in made) for test, made in pairs]
