"""What a run shows, in one line, and how sure one can be of it."""

import math
from collections.abc import Sequence
from statistics import fmean

from seal_engine.loop.restem import SELF_EDITS
from seal_engine.report.data import RunData, deviation
from seal_engine.report.self_edits import RoundRewards

SURE = 1.96  # standard errors each way: an interval that covers 95%
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def is_over(data: RunData) -> bool:
    """Whether all rounds and evaluations of all seeds are recorded."""
    return data.done is not None and data.done[0] == data.done[1]


def claim(data: RunData, rounds: Sequence[RoundRewards]) -> str:
    """The finding. Whatever chance would give as well is no finding."""
    before = data.by_round(SELF_EDITS).get(0, {})
    values = [edit.reward for one in rounds for edit in one.edits if edit.reward is not None]
    if values and not any(values):
        return f"Nothing was learned: all {len(values)} rewards are 0"
    if data.pairs is None or not data.pairs.changes:
        if before:
            return f"Before any round, self-edits answer {fmean(before.values()):.0%}"
        return "The run has begun: nothing to compare yet"
    by_round, pairs = data.by_round(SELF_EDITS), data.pairs
    first, last = (fmean(by_round[r][seed] for seed in pairs.seeds) for r in (0, pairs.last))
    rounds_said = NUMBERS[pairs.last] if pairs.last < len(NUMBERS) else str(pairs.last)
    span = f"{first:.0%} to {last:.0%} in {rounds_said} round{'' if pairs.last == 1 else 's'}"
    so_far = "" if is_over(data) else " so far"
    if data.config.get("shuffle_rewards"):
        return f"A control, rewards shuffled: {span}{so_far}"
    low, high = change_interval(list(pairs.changes.values()))
    if low > 0:
        return f"Reward taught the writer: {span}{so_far}"
    return f"The writer got worse: {span}{so_far}" if high < 0 else f"No clear change: {span}{so_far}"


def change_interval(changes: Sequence[float]) -> tuple[float, float]:
    """A 95% interval of the mean change, from its spread over contexts; endless for a single context."""
    sd = deviation(changes)
    error = math.inf if sd is None else SURE * sd / math.sqrt(len(changes))
    return fmean(changes) - error, fmean(changes) + error


def certainty(data: RunData) -> str:
    """How many contexts got better, and how far the mean change may be due to chance; "" without a comparison."""
    pairs = data.pairs
    if pairs is None or not pairs.changes:
        return ""
    changes = list(pairs.changes.values())
    better, worse = sum(c > 0 for c in changes), sum(c < 0 for c in changes)
    low, high = change_interval(changes)
    mean = f"mean change {100 * fmean(changes):+.1f} points"
    if math.isfinite(low):
        mean += f", with 95% confidence {100 * low:+.1f} to {100 * high:+.1f} (from the spread over contexts)"
    counts = f"{better} better, {worse} worse, {len(changes) - better - worse} the same"
    missing = (
        f" {pairs.missing} contexts are left out, as they lack an accuracy before or after." if pairs.missing else ""
    )
    control = ""
    if low > 0 and not data.config.get("shuffle_rewards"):
        control = (
            " Not shown here: how much of that comes from training on texts of its own, whatever their rewards; a run "
            "with --shuffle-rewards is that control."
        )
    return f"{len(changes)} held-out contexts, {seeds_said(pairs.seeds)}: {counts}; {mean}.{missing}{control}"


def seeds_said(seeds: Sequence[int]) -> str:
    """One seed by its number, several by how many they are."""
    return f"seed {seeds[0]} alone" if len(seeds) == 1 else f"mean of {len(seeds)} seeds"
