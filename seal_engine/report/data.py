"""What a report says of a run, from its ledger alone: pure data, for the page and its pictures."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean, stdev
from typing import Any

from seal_engine.cluster.shares import read_workers
from seal_engine.domains.knowledge.context_texts import read_contexts
from seal_engine.environment import read_environments
from seal_engine.loop.ledger import Ledger
from seal_engine.loop.records import BASELINE, EVALUATION, ROUND, Phase, SelfEdit, Step, Trial
from seal_engine.loop.restem import CONTINUED_PRETRAINING, SELF_EDITS

PARTS = ("writing", "training and asking", "policy update", "the rest")


def finite(values: Iterable[float | None]) -> list[float]:
    """Those that are numbers."""
    return [value for value in values if value is not None and math.isfinite(value)]


def mean(values: Iterable[float | None]) -> float | None:
    """Of those that are numbers; None: there are none."""
    numbers = finite(values)
    return fmean(numbers) if numbers else None


def deviation(values: Iterable[float | None]) -> float | None:
    """Sample standard deviation of those that are numbers; None: there is at most one."""
    numbers = finite(values)
    return stdev(numbers) if len(numbers) > 1 else None


@dataclass(frozen=True)
class Pairs:
    """Accuracy of self-edits on each held-out context before and after: means over the seeds that have both."""

    last: int  # the round that "after" means
    seeds: list[int]
    before: dict[str, float]
    after: dict[str, float]
    missing: int  # contexts without a pair: every self-edit before, or after, was rejected or not graded

    @cached_property
    def changes(self) -> dict[str, float]:
        """After less before, the greatest gain first."""
        # Rounded, as equal means of other numbers may differ in their last bits.
        changes = {name: round(self.after[name] - self.before[name], 9) for name in self.before}
        return dict(sorted(changes.items(), key=lambda item: (-item[1], item[0])))


@dataclass(frozen=True)
class FinishedStep:
    """A checkpointed step that is recorded."""

    name: str
    finished: str  # UTC, ISO 8601
    seconds: float
    cpu_seconds: float | None  # None: recorded before CPU time was
    stage: str  # "baselines", "round 1", "evaluation 1"
    part: str  # one of PARTS


class RunData:
    """All that a run's directory holds, read once, so that the report is of one moment."""

    def __init__(self, ledger: Ledger):
        self.contexts = read_contexts(ledger.directory)
        self.workers = read_workers(ledger.directory)
        self.environments = read_environments(ledger.directory)
        self.config = ledger.config
        self.metrics = ledger.metrics()
        self.policies = ledger.policies()
        self.trials: dict[tuple[int, str], list[Trial]] = defaultdict(list)
        for trial in ledger.trials():
            self.trials[trial.seed, trial.phase].append(trial)
        self.edits: dict[tuple[int, str], list[SelfEdit]] = defaultdict(list)
        for edit in ledger.self_edits():
            self.edits[edit.seed, edit.phase].append(edit)
        self.started = ledger.started
        self.steps = [
            FinishedStep(name, finished, seconds, cpu_seconds, *_stage_and_part(name))
            for name, finished, seconds, cpu_seconds in ledger.steps()
        ]

    @cached_property
    def accuracies(self) -> dict[str, dict[int, float]]:
        """Phase -> seed -> accuracy on held-out contexts, of what has been measured to its end."""
        found: dict[str, dict[int, float]] = {}
        for entry in self.metrics:
            phase = Phase.parse(str(entry.get("phase")))
            if "trials" in entry and phase.stage != ROUND and finite([entry["accuracy"]]):
                found.setdefault(entry["phase"], {})[entry["seed"]] = entry["accuracy"]
        return found

    def by_round(self, method: str) -> dict[int, dict[int, float]]:
        """Round -> seed -> accuracy of what the policy of that round wrote; 0: before any round."""
        found = {}
        for text, of_seed in self.accuracies.items():
            phase = Phase.parse(text)
            if phase.stage == EVALUATION and phase.method == method:
                found[phase.round] = of_seed
        return dict(sorted(found.items()))

    @property
    def baselines(self) -> dict[str, dict[int, float]]:
        """All else that was measured -> seed -> accuracy."""
        by_the_policy = (SELF_EDITS, CONTINUED_PRETRAINING)
        return {
            phase: found for phase, found in self.accuracies.items() if Phase.parse(phase).method not in by_the_policy
        }

    @cached_property
    def pairs(self) -> Pairs | None:
        """Before against after; None until there is an "after"."""
        found = self.by_round(SELF_EDITS)
        last = max(found, default=0)
        seeds = sorted(found.get(0, {}).keys() & found.get(last, {}).keys())
        if last == 0 or not seeds:
            return None
        phases = [str(Phase(EVALUATION, r)) for r in (0, last)]
        before, after = [self._by_context(str(Phase(EVALUATION, r, SELF_EDITS)), seeds) for r in (0, last)]
        pairs: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for key in before:
            if key in after:
                pairs[key[1]].append((before[key], after[key]))
        means = [{name: fmean(pair[i] for pair in own) for name, own in sorted(pairs.items())} for i in (0, 1)]
        known = {edit.context for seed in seeds for phase in phases for edit in self.edits.get((seed, phase), [])}
        return Pairs(last, seeds, *means, missing=len(known - pairs.keys()))

    def _by_context(self, phase: str, seeds: Sequence[int]) -> dict[tuple[int, str], float]:
        """(Seed, context) -> mean accuracy of its trials."""
        found: dict[tuple[int, str], list[float]] = defaultdict(list)
        for seed in seeds:
            for trial in self.trials.get((seed, phase), []):
                for accuracy in finite([trial.accuracy]):
                    found[seed, trial.context].append(accuracy)
        return {key: fmean(own) for key, own in found.items()}

    @property
    def rejections(self) -> dict[str, Counter[str]]:
        """Reason -> phase -> self-edits that nothing could be trained on, the most frequent reason first."""
        found: dict[str, Counter[str]] = defaultdict(Counter)
        for (_, phase), edits in self.edits.items():
            for edit in edits:
                if edit.rejected is not None:
                    found[edit.rejected][phase] += 1
        return dict(sorted(found.items(), key=lambda item: (-item[1].total(), item[0])))

    @property
    def failures(self) -> Counter[str]:
        """Why adapters could not be trained, with how many trials that cost."""
        trials = (trial for own in self.trials.values() for trial in own if not self._edit(trial, "rejected"))
        return Counter(trial.error for trial in trials if trial.error is not None)

    def _edit(self, trial: Trial, field: str) -> str | None:
        """A field of the self-edit that the trial is of; None where it is of none."""
        phase = Phase.parse(trial.phase)
        written = str(replace(phase, method="")) if phase.method == SELF_EDITS else trial.phase
        edit = self._edits.get((trial.seed, written, trial.context, trial.index))
        return None if edit is None else getattr(edit, field)

    @cached_property
    def _edits(self) -> dict[Any, SelfEdit]:
        return {(e.seed, e.phase, e.context, e.index): e for own in self.edits.values() for e in own}

    @cached_property
    def adapters(self) -> list[Trial]:
        """One trial for each adapter of the inner loop: the loop trains equal jobs once, so we count them once."""
        found: dict[Any, Trial] = {}
        for (seed, phase), own in self.trials.items():
            joint = Phase.parse(phase).method == CONTINUED_PRETRAINING
            for trial in own:
                if (trial.num_steps or trial.error is not None) and not self._edit(trial, "rejected"):
                    what = self._edit(trial, "text")
                    one = None if joint else (trial.context, trial.index if what is None else what)
                    found.setdefault((seed, phase, trial.repeat, one), trial)
        return list(found.values())

    @cached_property
    def adapter_losses(self) -> dict[str, list[tuple[float, ...]]]:
        """Round -> loss curve of each adapter that was trained on one of its self-edits, and stayed finite."""
        phases = [(Phase.parse(trial.phase), trial) for trial in self.adapters]
        return _curves((phase.round, t.losses) for phase, t in phases if phase.stage == ROUND and not phase.method)

    @cached_property
    def policy_losses(self) -> dict[str, list[tuple[float, ...]]]:
        """Round -> loss curve of each seed's policy update."""
        return _curves((policy.round, policy.losses) for policy in self.policies)

    @property
    def unfinished_rounds(self) -> list[str]:
        """Names of the rounds with losses that not every seed has ended: a round ends with its policy update."""
        ended = Counter(f"round {policy.round}" for policy in self.policies)
        return [name for name in {**self.adapter_losses, **self.policy_losses} if ended[name] < self.num_seeds]

    @property
    def seconds_by_stage(self) -> dict[str, dict[str, float]]:
        """Stage -> part -> seconds over seeds, stages in the order in which a seed goes through them."""
        found: dict[str, dict[str, float]] = {}
        for step in self.steps:
            parts = found.setdefault(step.stage, dict.fromkeys(PARTS, 0.0))
            parts[step.part] += step.seconds
        return dict(sorted(found.items(), key=lambda item: _stage_order(item[0])))

    @property
    def cpu_seconds_by_stage(self) -> dict[str, float | None]:
        """Stage -> CPU seconds over seeds; None where a step of the stage lacks them."""
        found: dict[str, list[float | None]] = {stage: [] for stage in self.seconds_by_stage}
        for step in self.steps:
            found[step.stage].append(step.cpu_seconds)
        return {stage: None if None in own else sum(finite(own)) for stage, own in found.items()}

    @property
    def num_seeds(self) -> int:
        """Seeds that the run is to have; those that it has where the configuration does not say."""
        seeds = self.config.get("seeds")
        return (
            len(seeds)
            if isinstance(seeds, list)
            else len({trial.seed for own in self.trials.values() for trial in own})
        )

    @property
    def done(self) -> tuple[int, int] | None:
        """Phases that are done, and how many there will be; None where the configuration does not say."""
        seeds, rounds = self.config.get("seeds"), self.config.get("rounds")
        if not isinstance(seeds, list) or not isinstance(rounds, int):
            return None
        phases = [Phase(ROUND, r) for r in range(1, rounds + 1)] + [Phase(EVALUATION, r) for r in range(rounds + 1)]
        names = {step.name for step in self.steps}
        return sum(str(Step(s, phase)) in names for s in seeds for phase in phases), len(seeds) * len(phases)


def _curves(losses: Iterable[tuple[int, tuple[float, ...]]]) -> dict[str, list[tuple[float, ...]]]:
    """The name of a round -> its curves, rounds in their order."""
    found: dict[int, list[tuple[float, ...]]] = defaultdict(list)
    for number, curve in losses:
        if curve and len(finite(curve)) == len(curve):
            found[number].append(curve)
    return {f"round {number}": own for number, own in sorted(found.items())}


def _stage_and_part(name: str) -> tuple[str, str]:
    """Stage and part of a step, from the name that the loop gives it."""
    step = Step.parse(name)
    if step is None:
        return BASELINE, PARTS[3]
    phase = step.phase
    stage = phase.stage if phase.stage == BASELINE else f"{phase.stage} {phase.round}"
    ends_round = PARTS[2] if phase.stage == ROUND else PARTS[3]
    return stage, {"writing": PARTS[0], "trials": PARTS[1], "accuracy": PARTS[3], "": ends_round}[step.part]


def _stage_order(stage: str) -> tuple[int, int]:
    phase = Phase.parse(stage)
    return (-1, 0) if phase.stage == BASELINE else (phase.round, int(phase.stage == EVALUATION))
