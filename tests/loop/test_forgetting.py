"""The measures of forgetting, on matrices whose measures are worked out by hand."""

import pytest

from seal_engine.loop.continual import UNTRAINED, draw_sequences, matrices, phase_of
from seal_engine.loop.forgetting import (
    backward_transfer,
    deviation_matrix,
    diagonal,
    gain_by_age,
    last_row,
    mean_matrix,
    paired_interval,
)
from seal_engine.loop.records import Trial

# Three passages: the base has 0.1, 0.2, 0.0; each edit gives 0.8, and each later one takes 0.3 away.
MATRIX = [[0.1, 0.2, 0.0], [0.8, None, None], [0.5, 0.8, None], [0.2, 0.5, 0.8]]


def test_diagonal_and_last_row():
    assert diagonal(MATRIX) == pytest.approx(0.8)
    assert last_row(MATRIX) == pytest.approx((0.2 + 0.5 + 0.8) / 3)


def test_backward_transfer():
    """The first passage went from 0.8 to 0.2 and the second from 0.8 to 0.5; the last had no time to be forgotten."""
    assert backward_transfer(MATRIX) == pytest.approx((-0.6 - 0.3) / 2)
    assert backward_transfer([[0.1], [0.8]]) is None


def test_gain_by_age():
    """Age 0: 0.7, 0.6, 0.8; age 1: 0.5 - 0.1 and 0.5 - 0.2; age 2: 0.2 - 0.1."""
    assert gain_by_age(MATRIX) == pytest.approx([0.7, 0.35, 0.1])


def test_missing_cells_are_left_out():
    """A passage that was never measured has no part in any mean; nothing at all is None."""
    holes = [[0.1, None], [0.8, None], [0.4, None]]
    assert diagonal(holes) == pytest.approx(0.8)
    assert last_row(holes) == pytest.approx(0.4)
    assert gain_by_age(holes) == pytest.approx([0.7, 0.3])
    assert last_row([[None], [None]]) is None


def test_mean_and_deviation_over_sequences():
    """Of 0.2 and 0.6: mean 0.4, population deviation 0.2. A cell that one sequence lacks is the other's."""
    first, second = [[0.2, None], [0.2, 0.5]], [[0.6, None], [0.6, None]]
    assert mean_matrix([first, second])[1] == pytest.approx([0.4, 0.5])
    assert deviation_matrix([first, second])[0][0] == pytest.approx(0.2)
    assert deviation_matrix([first, second])[0][1] is None


def test_the_interval_is_of_pairs():
    """Sequences differ by far more than methods do: a gain of 0.1 in each pair has an interval of no width."""
    rival = [0.0, 0.5, 1.0, 0.3]
    assert paired_interval([x + 0.1 for x in rival], rival) == pytest.approx((0.1, 0.1, 0.1))
    mean, low, high = paired_interval([0.0, 1.0] * 20, [1.0, 0.0] * 20)
    assert mean == 0
    # The mean of 40 differences of +-1 has the standard error 1 / sqrt(40) = 0.158; 1.96 of it is 0.31.
    assert low == pytest.approx(-0.31, abs=0.05)
    assert high == pytest.approx(0.31, abs=0.05)
    assert paired_interval([None], [0.5]) is None
    assert paired_interval([None, 0.7], [0.5, 0.5])[0] == pytest.approx(0.2)


def trial(phase, context, index, grades):
    return Trial(0, phase, context, index, 0, 0, 1, 5, 0.1, None, tuple("x" * len(grades)), tuple(grades), 0.0)


def test_matrices_follow_from_trials():
    """Row 0 is shared by all sequences that have the passage; other seeds, methods and sequences do not mix."""
    sequences = [["a", "b"], ["b", "c"]]
    trials = [
        *(trial(UNTRAINED, context, 0, [grade]) for context, grade in (("a", 0.0), ("b", 1.0), ("c", None))),
        trial(phase_of(1, "merge"), "a", 0, [1.0, 0.0]),
        trial(phase_of(1, "merge"), "b", 1, [1.0, 1.0]),
        trial(phase_of(2, "merge"), "a", 0, [0.0, 0.0]),
        trial(phase_of(2, "merge"), "b", 0, [0.0, 1.0, None]),
        trial(phase_of(2, "merge"), "b", 1, [0.0]),
        trial(phase_of(2, "bank"), "c", 1, [1.0]),
    ]
    first, second = matrices(trials, sequences, 0, "merge")
    assert first == [[0.0, 1.0], [0.5, None], [0.0, 0.5]]
    assert second == [[1.0, None], [1.0, None], [0.0, None]]
    assert matrices(trials, sequences, 1, "merge")[0] == [[None, None]] * 3


def test_sequences_are_disjoint_if_they_can_be():
    contexts = [f"c{i}" for i in range(12)]
    disjoint = draw_sequences(contexts, 3, 4, seed=1)
    assert sorted(c for own in disjoint for c in own) == sorted(contexts)
    assert draw_sequences(contexts, 3, 4, seed=1) == disjoint
    assert draw_sequences(contexts, 3, 4, seed=2) != disjoint
    shared = draw_sequences(contexts, 5, 4, seed=1)
    assert all(len(set(own)) == 4 for own in shared)
