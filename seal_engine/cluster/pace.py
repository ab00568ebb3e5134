"""How fast a worker is: a straight line through what its batches took, so many seconds each and so many per cost."""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean, median

MIN_SPREAD = 0.01  # of batches' costs, their variance by their squared mean: below, a line through them says nothing


@dataclass
class Pace:
    """Sums over the batches of one kind that a worker has done; x is a batch's cost, y its seconds."""

    n: int = 0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0

    def add(self, cost: float, seconds: float) -> None:
        """A batch is done. cost and seconds: above 0."""
        self.n, self.x, self.y = self.n + 1, self.x + cost, self.y + seconds
        self.xx, self.xy = self.xx + cost * cost, self.xy + cost * seconds

    def fixed(self) -> float:
        """Seconds per batch, by least squares; 0 while batches were all of about one size."""
        spread = self.n * self.xx - self.x**2
        return 0.0 if spread < MIN_SPREAD * self.x**2 else (self.y * self.xx - self.x * self.xy) / spread


def paces(known: Mapping[int, Pace | None]) -> tuple[float, dict[int, float]]:
    """(seconds per batch, the median of workers; seconds per cost of each worker). Unknown ones are as others are."""
    measured = {i: pace for i, pace in known.items() if pace is not None}
    if not measured:
        return 0.0, dict.fromkeys(known, 1.0)
    fixed = max(0.0, median(pace.fixed() for pace in measured.values()))
    # At least half of a batch's time is its work's: one wrong line must not make a worker look infinitely fast.
    slopes = {i: max(pace.y - pace.n * fixed, pace.y / 2) / pace.x for i, pace in measured.items()}
    usual = fmean(slopes.values())
    return fixed, {i: slopes.get(i, usual) for i in known}


def water_level(backlogs: Mapping[int, float], slopes: Mapping[int, float], work: float) -> float:
    """Seconds until all workers are done, if `work` (a cost) goes to those that are done first. backlogs: seconds.

    Work poured into vessels as wide as workers are fast, each filled up to its backlog before, stands at this level.
    """
    width = 0.0
    for i in sorted(backlogs, key=backlogs.__getitem__):
        if width and backlogs[i] >= work / width:
            break
        width, work = width + 1 / slopes[i], work + backlogs[i] / slopes[i]
    return work / width
