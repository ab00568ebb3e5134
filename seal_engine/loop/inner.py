"""The inner loop of SEAL: candidates -> adapters -> answers -> grades.

What the numbers of a trial depend on: the candidate's job with the trial's training seed, the weights of the base, the
candidate's questions, and how answers are sampled. They depend neither on the other trials of a call nor on how many
there are (to float32 rounding; in a deterministic engine bit for bit), so trials can be computed in any order, on any
machine that holds the same base, and once more after a failure.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from time import perf_counter
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from seal_engine.loop.domain import Candidate, Prompt
from seal_engine.loop.records import Trial, loss_curve
from seal_engine.model.adapters import Adapter
from seal_engine.sampling.requests import RequestOutput, SamplingParams
from seal_engine.training.jobs import TrainJob, TrainResult

Grade = Callable[[Sequence[tuple[str, Sequence[str]]]], list[list[float | None]]]  # as Domain.grade


def derive_seed(*parts: object) -> int:
    """A seed, below 2**31, that depends on all parts and nothing else."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4]) >> 1


@dataclass(frozen=True)
class TrialResult:
    """The result of one candidate; the fields are those of Trial."""

    num_steps: int
    num_tokens: int
    final_loss: float | None
    error: str | None
    answers: tuple[str, ...]
    grades: tuple[float | None, ...]
    seconds: float
    losses: tuple[float, ...] = ()


class Backend(Protocol):
    """What the inner loop asks of an engine; a server's share of one offers it, too (see Engine for the contracts)."""

    tokenizer: Any  # a Tokenizer, for graders that ask in chats

    def train(self, jobs: Sequence[TrainJob], *, progress: bool = True) -> list[TrainResult]:
        """Train all jobs at once; results in job order."""
        ...

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        params: SamplingParams,
        adapters: Sequence[Adapter | None] | None = None,
        progress: bool = True,
    ) -> list[RequestOutput]:
        """Continue all prompts at once; outputs in their order."""
        ...


class InnerLoop:
    """Trains, questions and grades candidates over one engine; it keeps no state between calls."""

    def __init__(
        self,
        engine: Backend,
        answer_params: SamplingParams,
        grade: Grade,
        log: Callable[[str], None] = print,
        progress: bool = True,
    ):
        """answer_params: how questions are answered. grade: as Domain.grade. log: takes one line of text."""
        self.engine = engine
        self.answer_params = answer_params
        self.grade = grade
        self.log = log
        self.progress = progress

    def run(self, candidates: Sequence[tuple[Candidate, int]]) -> list[TrialResult]:
        """The result of each (candidate, training seed), in order: all jobs are trained at once, all questions are
        answered at once, all answers are graded at once.

        A candidate that is rejected or whose job fails has an error, no answers and no grades.
        """
        start = perf_counter()
        results = self.attempt(candidates)
        asked = [i for i, result in enumerate(results) if result.error is None]
        graded = self.grade([(candidates[i][0].context, results[i].answers) for i in asked])
        grades = {i: tuple(own) for i, own in zip(asked, graded, strict=True)}
        seconds = (perf_counter() - start) / max(1, len(candidates))
        return [replace(result, grades=grades.get(i, ()), seconds=seconds) for i, result in enumerate(results)]

    def attempt(self, candidates: Sequence[tuple[Candidate, int]]) -> list[TrialResult]:
        """`run` up to the answers: results without grades and seconds."""
        trained = self.train([_seeded(candidate, seed) for candidate, seed in candidates])
        results = [
            TrainResult(None, [], 0, candidate.rejected) if result is None else result
            for (candidate, _), result in zip(candidates, trained, strict=True)
        ]
        asked = [i for i, result in enumerate(results) if result.error is None]
        questions = []
        for i in asked:
            prompts = candidates[i][0].questions
            questions.append((prompts, [results[i].adapter] * len(prompts)))
        answers = dict(zip(asked, self.ask(questions), strict=True))
        trials = []
        for i, result in enumerate(results):
            final_loss = result.losses[-1] if result.losses else None
            numbers = result.num_steps, result.num_tokens, final_loss
            trials.append(TrialResult(*numbers, result.error, answers.get(i, ()), (), 0.0, loss_curve(result.losses)))
        return trials

    def train(self, jobs: Sequence[TrainJob | None]) -> list[TrainResult | None]:
        """The result of each job, None where there is none; all are trained at once, equal ones once."""
        keys = [None if job is None else job_key(job) for job in jobs]
        different = {key: job for key, job in zip(keys, jobs, strict=True) if key is not None and job is not None}
        trained = self.engine.train(list(different.values()), progress=self.progress) if different else []
        results = dict(zip(different, trained, strict=True))
        return [None if key is None else results[key] for key in keys]

    def answer(
        self, questions: Sequence[tuple[str, Sequence[Prompt], Sequence[Adapter | None]]]
    ) -> list[tuple[tuple[str, ...], tuple[float | None, ...]]]:
        """The answers and grades for each (context, prompts, an adapter for each prompt), all answered at once."""
        answers = self.ask([(prompts, adapters) for _, prompts, adapters in questions])
        graded = self.grade([(context, own) for (context, _, _), own in zip(questions, answers, strict=True)])
        return [(own, tuple(grades)) for own, grades in zip(answers, graded, strict=True)]

    def ask(self, questions: Sequence[tuple[Sequence[Prompt], Sequence[Adapter | None]]]) -> list[tuple[str, ...]]:
        """The answers for each (prompts, an adapter for each prompt), all answered at once."""
        prompts = [prompt for own, _ in questions for prompt in own]
        adapters = [adapter for _, own in questions for adapter in own]
        params = self.answer_params
        outputs = self.engine.generate(prompts, params, adapters, progress=self.progress) if prompts else []
        failed = [output.error for output in outputs if output.error]
        if failed:
            self.log(f"{len(failed)} of {len(outputs)} questions could not be asked and count as wrong: {failed[0]}")
        texts = iter("" if output.error else output.outputs[0].text for output in outputs)
        return [tuple(next(texts) for _ in own) for own, _ in questions]


def _seeded(candidate: Candidate, seed: int) -> TrainJob | None:
    return None if candidate.job is None else replace(candidate.job, seed=seed)


def job_key(job: TrainJob) -> str:
    """A digest that equal jobs share and different ones do not, down to the last token of every sequence."""
    return hashlib.sha256(repr(_comparable(job)).encode("utf-8", "surrogatepass")).hexdigest()


def _comparable(value: Any) -> Any:
    """The value as lists, texts and numbers, whose repr, unlike a tensor's, abbreviates nothing."""
    if isinstance(value, Adapter):
        return ["adapter", value.uid, value.version]
    if isinstance(value, Tensor | np.ndarray):
        return value.tolist()
    if is_dataclass(value):
        return [[field.name, _comparable(getattr(value, field.name))] for field in fields(value)]
    if isinstance(value, Mapping):
        return [[key, _comparable(item)] for key, item in value.items()]
    if isinstance(value, Sequence) and not isinstance(value, str):
        return list(value) if value and isinstance(value[0], int) else [_comparable(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def mean_accuracy(trials: Sequence[Trial], aggregate: str = "mean") -> float | None:
    """The mean over contexts of each context's accuracy (see `context_accuracies`); None if nothing could be graded."""
    accuracies = context_accuracies(trials, aggregate)
    return fmean(accuracies.values()) if accuracies else None


def standard_error(trials: Sequence[Trial], aggregate: str = "mean") -> float | None:
    """The standard error of `mean_accuracy` over contexts; None for fewer than two."""
    accuracies = context_accuracies(trials, aggregate)
    return stdev(accuracies.values()) / math.sqrt(len(accuracies)) if len(accuracies) > 1 else None


def context_accuracies(trials: Sequence[Trial], aggregate: str = "mean") -> dict[str, float]:
    """The accuracy of each context of which anything could be graded.

    aggregate: the "mean" or the "max" over a context's candidates, each a mean over its repeats.
    """
    by_context: dict[str, dict[int, list[float]]] = {}
    for trial in trials:
        if trial.accuracy is not None:
            by_context.setdefault(trial.context, {}).setdefault(trial.index, []).append(trial.accuracy)
    combine = max if aggregate == "max" else fmean
    return {context: combine([fmean(v) for v in indices.values()]) for context, indices in by_context.items()}
