"""What is asked about a test, and which grids the answers elect."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seal_engine.domains.few_shot.arc import Example, Task, read_tasks
from seal_engine.domains.few_shot.arc_tasks import apply_to_task
from seal_engine.domains.few_shot.augmentations import IDENTITY, Chain, Mirror, Scale, Turn
from seal_engine.domains.few_shot.voting import TRANSFORMS, Query, queries, score, vote

SHARED = Path(__file__).parents[3] / "shared/data/arc"
published = pytest.mark.skipif(not SHARED.is_dir(), reason="the published files are not on this machine")
A, B, C = ((1,),), ((2,),), ((3, 3),)
ANSWER = ((1, 2, 3), (4, 5, 6))


def task(count: int) -> Task:
    """Demonstrations that are told apart by their first colour, and two tests."""
    train = tuple(Example(((i, 8, 7), (6, 5, 9)), ((i, 9),)) for i in range(count))
    return Task("t", train, (Example(((3, 8, 7), (6, 5, 4)), ANSWER), Example(((1,),), None)))


def first(query: Query) -> list[int]:
    """The demonstrations of a query on a task as it is."""
    return [example.input[0][0] for example in query.task.train]


@given(count=st.integers(1, 5), seed=st.integers(0, 2**31))
def test_queries(count, seed):
    made = queries(task(count), seed=seed)
    assert made == queries(task(count), seed=seed)
    assert len({query.task for query in made}) == len(made)
    assert all(query.task.tests[0].output is None for query in made)  # it is not there to be looked at
    plain = [query for query in made if query.undo == IDENTITY]
    assert made[: len(plain)] == plain
    left = {frozenset(first(query)) for query in plain}
    whole = frozenset(range(count))
    assert left == ({whole - {i} for i in range(count)} if count > 1 else {whole})
    assert len(plain) <= 3 * count
    turned = made[len(plain) :]
    assert [query.undo for query in turned] == [transform.inverse for transform in TRANSFORMS]
    for query in turned:
        assert apply_to_task(query.undo, query.task) in {query.task for query in plain}


def test_the_number_of_queries():
    """Three demonstrations: 3 pairs in both orders, 5 transforms. Two: 2 of one demonstration. One: it stays."""
    assert [len(queries(task(count))) for count in (3, 2, 1)] == [6 + 5, 2 + 5, 1 + 5]
    assert len(queries(task(3), leave=0, orders=0, transforms=())) == 1
    assert len(queries(task(4), leave=1, orders=0, transforms=())) == 4
    assert len(queries(task(4), leave=2, orders=0, transforms=())) == 6
    assert len(queries(task(1), leave=2, orders=0, transforms=())) == 1


def test_the_second_test():
    assert {query.task.tests for query in queries(task(3), test=1)} == {(Example(((1,),), None),)}


def test_nothing_is_asked_twice():
    square = Example(((0, 0), (0, 0)), ((0,),))
    made = queries(Task("t", (square, square), (square,)))
    assert len(made) == 1  # whatever is left out, and however it is turned
    assert made[0].undo == IDENTITY


def test_what_does_not_fit_is_not_asked():
    short = queries(task(3), fits=lambda one: len(one.train) < 2)
    assert {len(query.task.train) for query in short} == {1}
    assert queries(task(3), fits=lambda one: False) == []
    large = queries(task(2), transforms=(Scale(11, 1), Scale(1, 11)), orders=0)
    assert len(large) == 2 + 1  # 33 columns are too many


@pytest.mark.parametrize("transform", [*TRANSFORMS, Chain((Turn("rotate 270"), Mirror("up")))], ids=lambda t: t.name)
def test_answers_are_turned_back(transform):
    query = Query(apply_to_task(transform, task(1)), transform.inverse)
    assert query.prediction(transform.apply(ANSWER)) == ANSWER
    assert query.prediction(None) is None


def test_an_answer_that_cannot_be_turned_back():
    assert Query(task(1), Scale(2, 2).inverse).prediction(ANSWER) is None
    assert Query(task(1), Scale(16, 1)).prediction(ANSWER) is None  # 32 rows


@pytest.mark.parametrize(
    ("predictions", "attempts"),
    [
        ([], []),
        ([None, None], []),
        ([A], [A]),
        ([A, A, None], [A]),
        ([A, B, B], [B, A]),
        ([A, B, C], [A, B]),  # of equals the first
        ([C, B, A, A], [A, C]),
        ([None, C, B, B, C, A], [C, B]),
        ([A, ((1, 1),), ((1, 1),), ((1,), (1,))], [((1, 1),), A]),
    ],
)
def test_vote(predictions, attempts):
    assert vote(predictions) == attempts


def test_other_numbers_of_attempts():
    assert vote([A, B, C, C], attempts=1) == [C]
    assert vote([A, B, C, C], attempts=5) == [C, A, B]


@given(st.lists(st.sampled_from([None, A, B, C]), max_size=12))
def test_any_vote(predictions):
    made = vote(predictions)
    counts = [predictions.count(grid) for grid in made]
    assert len(set(made)) == len(made) == min(2, len({*predictions} - {None}))
    assert counts == sorted(counts, reverse=True)
    rest = [predictions.count(grid) for grid in (A, B, C) if grid not in made]
    assert all(count <= min(counts, default=0) for count in rest)


def test_score():
    solved = Task("t", (), (Example(A, B), Example(A, C), Example(B, None)))
    assert score(solved, [[A, B], [A, B], [A]]) == [1.0, 0.0, None]
    assert score(solved, [[B], [], []]) == [1.0, 0.0, None]
    with pytest.raises(ValueError, match="zip"):
        score(solved, [[A]])


@published
def test_published_tasks():
    """Whoever answers every query rightly solves every test."""
    name = "arc-agi_training_{}_filtered_1B_training_set.json"
    for one in read_tasks(SHARED / name.format("challenges"), SHARED / name.format("solutions")):
        elected = []
        for i, test in enumerate(one.tests):
            assert test.output is not None
            asked = queries(one, i)
            assert len(asked) <= 3 * len(one.train) + 5
            elected.append(vote([query.prediction(undone(query, test.output)) for query in asked]))
        assert elected == [[test.output] for test in one.tests]
        assert score(one, elected) == [1.0] * len(one.tests)


def undone(query: Query, output):
    """The right answer to a query."""
    return query.undo.inverse.apply(output)
