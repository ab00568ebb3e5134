"""How fast workers are, from what their batches took; and how work is shared among those that are busy."""

import pytest

from seal_engine.cluster.pace import Pace, paces, water_level


def pace(*batches):
    measured = Pace()
    for cost, seconds in batches:
        measured.add(cost, seconds)
    return measured


def test_a_line_through_batches_is_split_into_its_parts():
    """2 s a batch and 0.5 s per cost, and a worker of half that speed beside it: 2 s stay the fixed part of the median
    of three."""
    line = [(cost, 2 + 0.5 * cost) for cost in (1, 4, 10)]
    fixed, slopes = paces({0: pace(*line), 1: pace(*line), 2: pace(*[(cost, 2 * s) for cost, s in line]), 3: None})
    assert fixed == pytest.approx(2)
    assert slopes[0] == slopes[1] == pytest.approx(0.5)
    assert slopes[3] == pytest.approx((0.5 + 0.5 + slopes[2]) / 3), "a worker that is not known is as others are"


@pytest.mark.parametrize("batches", [[(5.0, 3.0)], [(5.0, 3.0), (5.01, 2.0)]], ids=["one batch", "equal batches"])
def test_batches_of_one_size_have_no_fixed_part(batches):
    fixed, slopes = paces({0: pace(*batches)})
    assert fixed == 0
    assert slopes[0] == pytest.approx(sum(s for _, s in batches) / sum(cost for cost, _ in batches))


def test_a_wrong_line_makes_no_worker_infinitely_fast():
    """The smaller batch took longer by chance, so that the line says: 11 s each, and less than nothing per cost."""
    _, slopes = paces({0: pace((1.0, 10.0), (2.0, 9.0))})
    assert slopes[0] == pytest.approx(19 / 2 / 3)


@pytest.mark.parametrize(
    ("backlogs", "slopes", "work", "level"),
    [
        ((0, 0), (1, 1), 10, 5),
        ((0, 4), (1, 1), 10, 7),
        ((0, 50), (1, 1), 10, 10),
        ((0, 0), (1, 0.5), 9, 3),
        ((3,), (1,), 0, 3),
    ],
    ids=["even", "one is busy", "one is busy for long", "one twice as fast", "no work"],
)
def test_water_level(backlogs, slopes, work, level):
    """By hand: with one worker twice as fast, 3 s give the slow one 3 and the fast one 6 of 9."""
    assert water_level(dict(enumerate(backlogs)), dict(enumerate(slopes)), work) == pytest.approx(level)
