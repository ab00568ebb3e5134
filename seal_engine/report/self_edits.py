"""The self-edits of a run with their rewards, and what became of them."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from seal_engine.loop.records import EVALUATION, ROUND, Phase, SelfEdit, Trial
from seal_engine.loop.restem import NO_ADAPTER, SELF_EDITS
from seal_engine.report.data import RunData, finite, mean

KEPT, NOT_KEPT, REJECTED, UNDECIDED, MEASURED = "kept", "not kept", "rejected", "not decided yet", "held out"


@dataclass(frozen=True)
class JudgedEdit:
    """A self-edit, its adapters' trials, and what they came to."""

    anchor: str  # its place in the page
    edit: SelfEdit
    trials: tuple[Trial, ...]
    status: str

    @property
    def reward(self) -> float | None:
        """Mean accuracy of its adapters; None: not measured yet, or not graded."""
        return mean(trial.accuracy for trial in self.trials)

    @property
    def hover(self) -> str:
        """In one line."""
        shown = "no reward" if self.reward is None else f"{self.reward:.0%}"
        return f"{shown}, {self.status}: {self.edit.context}, seed {self.edit.seed}"


@dataclass(frozen=True)
class RoundRewards:
    """The self-edits of a round, or of an evaluation on held-out contexts, all seeds together."""

    phase: Phase
    edits: Sequence[JudgedEdit]
    base: float | None  # mean accuracy on the same contexts without an adapter
    num_updates: int  # seeds whose policy the round has updated

    @property
    def number(self) -> int:
        """Rounds begun."""
        return self.phase.round

    @property
    def title(self) -> str:
        """What the self-edits were written for."""
        if self.phase.stage == ROUND:
            return f"Round {self.number}"
        return f"Held out, after round {self.number}" if self.number else "Held out, before any round"

    @property
    def rewarded(self) -> list[JudgedEdit]:
        """Those with a reward that something could be trained on."""
        return [edit for edit in self.edits if edit.status != REJECTED and edit.reward is not None]

    def with_status(self, status: str) -> list[JudgedEdit]:
        """Those of which this became."""
        return [edit for edit in self.edits if edit.status == status]

    @property
    def mean(self) -> float | None:
        """Mean reward of those with a reward."""
        return mean(edit.reward for edit in self.rewarded)

    @property
    def summary(self) -> str:
        """In a few words."""
        shown = "no reward yet" if self.mean is None else f"mean {self.mean:.1%}"
        undecided = len(self.with_status(UNDECIDED))
        if undecided:
            return f"unfinished, {len(self.rewarded)} of {len(self.edits)} have a reward, {shown}"
        return f"{len(self.with_status(KEPT))} kept of {len(self.edits)}, {shown}"


def judged_rounds(data: RunData, stage: str = ROUND) -> list[RoundRewards]:
    """The rounds, or with stage EVALUATION the evaluations, that have self-edits, finished or not."""
    found: dict[int, list[JudgedEdit]] = defaultdict(list)
    kept = {(policy.seed, policy.round): set(policy.kept) for policy in data.policies}
    bases: dict[int, list[float]] = defaultdict(list)
    for (seed, text), edits in data.edits.items():
        phase = Phase.parse(text)
        if phase.stage != stage or phase.method:
            continue
        measured = replace(phase, method=SELF_EDITS) if stage == EVALUATION else phase
        trials: dict[tuple[str, int], list[Trial]] = defaultdict(list)
        for trial in data.trials.get((seed, str(measured)), []):
            trials[trial.context, trial.index].append(trial)
        for edit in edits:
            key = edit.context, edit.index
            status = _status(edit, None if stage == EVALUATION else kept.get((seed, phase.round)), stage)
            anchor = f"e{stage[0]}{phase.round}-{len(found[phase.round])}"
            found[phase.round].append(JudgedEdit(anchor, edit, tuple(trials[key]), status))
        base = data.trials.get((seed, str(replace(phase, method=NO_ADAPTER))), [])
        bases[phase.round] += finite(trial.accuracy for trial in base)
    return [
        RoundRewards(
            Phase(stage, number),
            found[number],
            fmean(bases[number]) if bases[number] else None,
            sum(policy.round == number for policy in data.policies),
        )
        for number in sorted(found)
    ]


def _status(edit: SelfEdit, kept: set[tuple[str, int]] | None, stage: str) -> str:
    if edit.rejected is not None:
        return REJECTED
    if stage == EVALUATION:
        return MEASURED
    if kept is None:
        return UNDECIDED
    return KEPT if (edit.context, edit.index) in kept else NOT_KEPT


def is_right(grade: float | None) -> bool | None:
    """Whether an answer is right; None: it has no grade."""
    return None if grade is None or not math.isfinite(grade) else grade >= 0.5
