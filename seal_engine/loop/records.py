"""What a run records: self-edits, trials and policy updates, and the names of its phases and steps."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Self

ROUND, EVALUATION, BASELINE = "round", "evaluation", "baselines"
LOSS_POINTS = 16  # of a loss curve that is recorded
_PHASE = re.compile(rf"({ROUND}|{EVALUATION}) (\d+)(?:, (.*))?", re.DOTALL)
_STEP = re.compile(r"seed (\d+), (.*?)(?:, (writing|trials|accuracy)(?: (\d+))?)?", re.DOTALL)


@dataclass(frozen=True)
class Phase:
    """A part of a run whose self-edits and trials belong together.

    Its text names it in the ledger: "round 1" (self-edits of the training contexts), "round 1, no adapter" (the base on
    the same contexts), "evaluation 0, self-edits" (held-out contexts after so many rounds), or a baseline's own name,
    such as "passage only", which is measured on held-out contexts before the first round.
    """

    stage: str  # ROUND, EVALUATION or BASELINE
    round: int  # rounds begun; 0 for baselines
    method: str = ""  # what is measured; "" stands for the policy's self-edits in a round

    def __str__(self) -> str:
        if self.stage == BASELINE:
            return self.method
        return f"{self.stage} {self.round}" + (f", {self.method}" if self.method else "")

    @classmethod
    def parse(cls, text: str) -> Self:
        """The phase with this text."""
        match = _PHASE.fullmatch(text)
        return cls(match[1], int(match[2]), match[3] or "") if match else cls(BASELINE, 0, text)


@dataclass(frozen=True)
class Step:
    """A checkpointed step: what the ledger records whole or not at all. Its text is its name there."""

    seed: int
    phase: Phase
    part: str = ""  # "writing", "trials" or "accuracy"; "": what ends the phase, such as a policy update
    number: int | None = None  # counts the steps of trials

    def __str__(self) -> str:
        part = f", {self.part}" if self.part else ""
        return f"seed {self.seed}, {self.phase}{part}" + ("" if self.number is None else f" {self.number}")

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """The step with this text; None for a name that this loop does not give."""
        match = _STEP.fullmatch(text)
        if match is None:
            return None
        number = None if match[4] is None else int(match[4])
        return cls(int(match[1]), Phase.parse(match[2]), match[3] or "", number)


@dataclass(frozen=True)
class SelfEdit:
    """A self-edit that the policy, or another source, wrote for a context."""

    seed: int
    phase: str  # "round 1", "evaluation 0"
    context: str
    index: int  # which of the context's k self-edits
    text: str
    token_ids: tuple[int, ...]
    sampling_seed: int | None
    attempts: int  # samples drawn until one was valid
    rejected: str | None  # why nothing can be trained on it; None for a valid self-edit


@dataclass(frozen=True)
class Trial:
    """One adapter trained and questioned, or the base questioned without an adapter."""

    seed: int
    phase: str
    context: str
    index: int
    repeat: int
    train_seed: int
    num_steps: int
    num_tokens: int
    final_loss: float | None
    error: str | None
    answers: tuple[str, ...]
    grades: tuple[float | None, ...]  # one per question; None where it could not be graded
    seconds: float  # wall time, shared evenly among the trials of a step
    losses: tuple[float, ...] = ()  # see loss_curve; (): no training, or recorded before there were any

    @property
    def accuracy(self) -> float | None:
        """Mean of the grades that exist, None if there is none; 0 for a trial that failed."""
        if self.error is not None:
            return 0.0
        grades = [grade for grade in self.grades if grade is not None]
        return sum(grades) / len(grades) if grades else None


@dataclass(frozen=True)
class PolicyUpdate:
    """What a round's M-step made."""

    seed: int
    round: int
    path: str | None  # directory of the adapter, relative to the run directory; None if nothing was kept
    kept: tuple[tuple[str, int], ...]  # (context, index) of the self-edits that the policy was fine-tuned on
    num_steps: int
    final_loss: float | None
    seconds: float
    losses: tuple[float, ...] = ()  # see loss_curve


def loss_curve(losses: Sequence[float]) -> tuple[float, ...]:
    """The means of at most LOSS_POINTS equal parts of a training, in its order, to four digits.

    losses: one per optimizer step, in nats per token. Few enough numbers to be kept of every adapter of a run.
    """
    parts = min(LOSS_POINTS, len(losses))
    bounds = [len(losses) * i // parts for i in range(parts + 1)] if parts else []
    return tuple(float(f"{fmean(losses[start:end]):.4g}") for start, end in pairwise(bounds))
