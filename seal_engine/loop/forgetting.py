"""Measures of forgetting, from matrices of accuracies.

A sequence's matrix has K + 1 rows and K columns: row t is measured after t edits, column j is the passage of edit j+1.
Row 0 is the untrained model, on all passages; later rows have the passages learned so far, None where there is nothing.
"""

import random
from collections.abc import Sequence
from statistics import fmean

Matrix = list[list[float | None]]
DRAWS = 10_000  # of the bootstrap


def diagonal(matrix: Matrix) -> float | None:
    """Mean accuracy just after learning: row j + 1, column j."""
    return mean([matrix[j + 1][j] for j in range(len(matrix) - 1)])


def last_row(matrix: Matrix) -> float | None:
    """Mean accuracy at the end."""
    return mean(matrix[-1])


def backward_transfer(matrix: Matrix) -> float | None:
    """Mean change of a passage's accuracy from just after its own edit to the end, but for the last passage.

    Lopez-Paz and Ranzato's BWT (arXiv 1706.08840): negative where later edits destroy earlier ones. None for a single
    passage.
    """
    columns = range(len(matrix) - 2)
    return mean([difference(matrix[-1][j], matrix[j + 1][j]) for j in columns])


def gain_by_age(matrix: Matrix) -> list[float | None]:
    """Mean gain over the untrained model of edits that are followed by 0, 1, ... K - 1 others, over all rows."""
    K = len(matrix) - 1
    ages: list[list[float | None]] = [[] for _ in range(K)]
    for t in range(1, K + 1):
        for j in range(t):
            ages[t - 1 - j].append(difference(matrix[t][j], matrix[0][j]))
    return [mean(own) for own in ages]


def difference(a: float | None, b: float | None) -> float | None:
    """a - b, None if one is missing."""
    return None if a is None or b is None else a - b


def mean(values: Sequence[float | None]) -> float | None:
    """Of those that are there; None: there are none."""
    numbers = [value for value in values if value is not None]
    return fmean(numbers) if numbers else None


def mean_matrix(matrices: Sequence[Matrix]) -> Matrix:
    """Cell by cell, over sequences."""
    return [[mean([m[t][j] for m in matrices]) for j in range(len(row))] for t, row in enumerate(matrices[0])]


def deviation_matrix(matrices: Sequence[Matrix]) -> Matrix:
    """Cell by cell, the standard deviation over sequences, of the population as SEAL's files have it."""
    means = mean_matrix(matrices)
    spread: Matrix = [[None] * len(row) for row in means]
    for t, row in enumerate(means):
        for j, centre in enumerate(row):
            distances = [difference(m[t][j], centre) for m in matrices]
            square = mean([None if distance is None else distance**2 for distance in distances])
            spread[t][j] = None if square is None else square**0.5
    return spread


def paired_interval(
    first: Sequence[float | None], second: Sequence[float | None], seed: int = 0
) -> tuple[float, float, float] | None:
    """(mean, low, high) of first - second over sequences: the percentile bootstrap's 95% interval of pairs drawn anew.

    None without pairs.
    """
    pairs = [difference(a, b) for a, b in zip(first, second, strict=True)]
    differences = [d for d in pairs if d is not None]
    if not differences:
        return None
    draw = random.Random(seed)
    means = sorted(fmean(draw.choices(differences, k=len(differences))) for _ in range(DRAWS))
    return fmean(differences), means[int(0.025 * DRAWS)], means[int(0.975 * DRAWS) - 1]
