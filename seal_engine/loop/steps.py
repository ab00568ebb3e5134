"""The checkpointed steps of a run: collecting self-edits and evaluating candidates, each recorded once.

A step is recorded whole or not at all; a step that the ledger has is read from there and not computed again.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

from seal_engine.engine import Engine
from seal_engine.errors import RunError
from seal_engine.loop.config import LoopConfig
from seal_engine.loop.domain import (
    Candidate,
    Domain,
    InvalidSelfEditError,
    SelfEditSource,
    UngradedError,
)
from seal_engine.loop.inner import InnerLoop, derive_seed, job_key, mean_accuracy, standard_error
from seal_engine.loop.ledger import Ledger
from seal_engine.loop.records import Phase, SelfEdit, Step, Trial
from seal_engine.model.adapters import Adapter
from seal_engine.sampling.requests import Completion, SamplingParams
from seal_engine.training.jobs import TrainJob

MISSING = "could not be had"  # why a self-edit is rejected that its source failed to give: it counts nowhere
MakeJob = Callable[[str, str], TrainJob]  # as Domain.job


class CheckpointedSteps:
    """The steps of one seed of a run, over one engine, domain and ledger."""

    def __init__(
        self,
        engine: Engine,
        domain: Domain,
        config: LoopConfig,
        ledger: Ledger,
        inner_loop: InnerLoop,
        seed: int,
        log: Callable[[str], None] = print,
        progress: bool = True,
    ):
        """inner_loop: where trials are computed. log: takes one line of text on what has been measured. progress: bars
        for what takes over a second.
        """
        self.engine = engine
        self.domain = domain
        self.config = config
        self.ledger = ledger
        self.seed = seed
        self.log = log
        self.progress = progress
        self.inner_loop = inner_loop

    def finished(self, phase: Phase) -> bool:
        """Whether the step that ends the phase is recorded."""
        return self.ledger.finished(self._name(phase))

    def end(self, phase: Phase, compute: Callable[[], dict[str, Any]]) -> None:
        """Compute and record the step that ends the phase, once. compute: returns arguments of Ledger.finish."""
        self._once(self._name(phase), compute)

    def collect_self_edits(
        self, phase: Phase, contexts: Sequence[str], count: int, writer: Adapter | SelfEditSource | None
    ) -> list[Candidate]:
        """A candidate for each self-edit of the contexts.

        writer: an adapter, or None for the base, writes `count` self-edits for each context; a source gives its own.
        """
        make_job = cache(self.domain.job)  # a valid self-edit's job is made when it is checked, and used below
        self._once(self._name(phase, "writing"), lambda: self._write(phase, contexts, count, writer, make_job))
        order = {context: i for i, context in enumerate(contexts)}
        candidates = []
        for edit in self.ledger.self_edits(self.seed, str(phase)):
            if edit.rejected != MISSING:
                job = None if edit.rejected else make_job(edit.context, edit.text)
                questions = self.domain.questions(edit.context)
                candidates.append(Candidate(edit.context, job, questions, edit.index, edit.rejected))
        return sorted(candidates, key=lambda candidate: (order[candidate.context], candidate.index))

    def _write(
        self,
        phase: Phase,
        contexts: Sequence[str],
        count: int,
        writer: Adapter | SelfEditSource | None,
        make_job: MakeJob,
    ) -> dict[str, Any]:
        """Sample or fetch self-edits; returns what to record. Stops the run where too many are missing or invalid."""
        if isinstance(writer, SelfEditSource):
            edits = self._take(str(phase), contexts, writer, make_job)
        else:
            edits = self._sample(str(phase), contexts, count, writer, make_job)
        rejected = [edit for edit in edits if edit.rejected is not None]
        missing = sum(edit.rejected == MISSING for edit in rejected)
        self._validate_missing(phase, missing, len(edits), "self-edits could not be had")
        if edits and len(rejected) == len(edits):
            raise RunError(f"{phase}: every self-edit was rejected, the first one as: {edits[0].rejected}")
        if rejected:
            self.log(f"seed {self.seed}, {phase}: {len(rejected)} of {len(edits)} self-edits were rejected")
        metrics = {"seed": self.seed, "phase": str(phase), "self_edits": len(edits), "rejected": len(rejected)}
        return {"self_edits": edits, "metrics": metrics}

    def _sample(
        self, phase: str, contexts: Sequence[str], count: int, policy: Adapter | None, make_job: MakeJob
    ) -> list[SelfEdit]:
        """`count` self-edits of the policy for each context."""
        writers = {(context, index): policy for context in contexts for index in range(count)}
        sampling = self.config.sampling_params, self.config.resamples
        return sample_self_edits(
            self.engine, self.domain, *sampling, self.seed, phase, writers, make_job, self.progress
        )

    def _take(self, phase: str, contexts: Sequence[str], source: SelfEditSource, make_job: MakeJob) -> list[SelfEdit]:
        """The self-edits that another source gives for each context."""
        edits, engine = [], self.engine
        # The end token is part of a self-edit, so that a policy that learns from it learns to end.
        end = () if engine.end_token_id is None else (engine.end_token_id,)
        for context, texts in zip(contexts, source.write(contexts, self.config.sampling_params), strict=True):
            for index, text in enumerate(texts or [None]):
                ids = [] if text is None else engine.tokenizer.encode(text, add_special_tokens=False)
                rejected = MISSING if text is None else _check(make_job, context, text)[0]
                edits.append(SelfEdit(self.seed, phase, context, index, text or "", (*ids, *end), None, 1, rejected))
        return edits

    def evaluate(
        self, phase: Phase, candidates: Sequence[Candidate], repeats: int, aggregate: str = "mean"
    ) -> float | None:
        """The mean accuracy of all candidates over contexts, `repeats` trials each; None: nothing could be graded."""
        for i, trials in enumerate(_trials_by_step(candidates, repeats, self.config.trials_per_step)):
            self._once(self._name(phase, "trials", i), partial(self._run_trials, phase, trials))
        trials = self.ledger.trials(self.seed, str(phase))
        accuracy = mean_accuracy(trials, aggregate)
        rejected = repeats * sum(candidate.rejected is not None for candidate in candidates)
        metrics = {
            "seed": self.seed,
            "phase": str(phase),
            "accuracy": accuracy,
            "standard_error": standard_error(trials, aggregate),
            "trials": len(trials),
            "contexts": len({trial.context for trial in trials if trial.accuracy is not None}),
            "rejected": rejected,
            "failed": sum(trial.error is not None for trial in trials) - rejected,
            "ungraded": sum(grade is None for trial in trials for grade in trial.grades),
        }
        self.log(f"seed {self.seed}, {phase}: {_summary(metrics, trials)}")
        self._once(self._name(phase, "accuracy"), lambda: {"metrics": metrics})
        return accuracy

    def _run_trials(self, phase: Phase, trials: Sequence[tuple[Candidate, int]]) -> dict[str, Any]:
        """The trials of one step, (candidate, repeat) each, through the inner loop; returns what to record."""
        # All jobs of a repeat share its seed: they differ by their self-edits, not by luck.
        seeds = [derive_seed(self.seed, str(phase), repeat) for _, repeat in trials]
        results = self.inner_loop.run([(c, seed) for (c, _), seed in zip(trials, seeds, strict=True)])
        trained = [result for (c, _), result in zip(trials, results, strict=True) if c.job is not None]
        if trained and not any(result.num_steps for result in trained):
            raise RunError(f"{phase}: none of {len(trained)} adapters could be trained; the first: {trained[0].error}")
        grades = [grade for result in results for grade in result.grades]
        self._validate_missing(phase, grades.count(None), len(grades), "answers could not be graded")
        return {
            "trials": [
                Trial(self.seed, str(phase), c.context, c.index, repeat, seed, **vars(result))
                for (c, repeat), seed, result in zip(trials, seeds, results, strict=True)
            ]
        }

    def _validate_missing(self, phase: Phase, missing: int, count: int, what: str) -> None:
        if count and missing / count > self.config.max_ungraded:
            raise UngradedError(
                f"{phase}: {missing} of {count} {what}; accepted: a share of at most "
                f"{self.config.max_ungraded:g} (max_ungraded); nothing of this step has been recorded"
            )

    def _once(self, step: str, compute: Callable[[], dict[str, Any]]) -> None:
        """Compute and record a step, unless the ledger has it: what makes a run durable."""
        if not self.ledger.finished(step):
            self.ledger.finish(step, **compute())

    def _name(self, phase: Phase, part: str = "", number: int | None = None) -> str:
        return str(Step(self.seed, phase, part, number))


def sample_self_edits(
    engine: Engine,
    domain: Domain,
    params: SamplingParams,
    resamples: int,
    seed: int,
    phase: str,
    writers: Mapping[tuple[str, int], Adapter | None],
    make_job: MakeJob,
    progress: bool = True,
) -> list[SelfEdit]:
    """A self-edit for each (context, index), by the adapter that writes it, None for the base.

    Invalid ones are sampled again, `resamples` times. Which tokens are drawn depends on the writer and on a seed that
    follows from `seed`, the phase, the context, the index and the attempt.
    """
    due = list(writers)
    edits: dict[tuple[str, int], SelfEdit] = {}
    params = replace(params, logits_hook=domain.logits_hook(params.max_tokens or 0))
    for attempt in range(1, resamples + 2):
        seeds = [derive_seed(seed, phase, *key, attempt) for key in due]
        prompts = [domain.prompt(context) for context, _ in due]
        own_params = [replace(params, seed=own) for own in seeds]
        outputs = engine.generate(prompts, own_params, [writers[key] for key in due], progress=progress)
        again = []
        for (context, index), own, output in zip(due, seeds, outputs, strict=True):
            sample = output.outputs[0] if output.outputs else Completion(index)
            rejected, retryable = (output.error, False) if output.error else _check(make_job, context, sample.text)
            ids = tuple(sample.token_ids)
            edits[context, index] = SelfEdit(seed, phase, context, index, sample.text, ids, own, attempt, rejected)
            if retryable:
                again.append((context, index))
        due = again
        if not due:
            break
    return list(edits.values())


def _check(make_job: MakeJob, context: str, text: str) -> tuple[str | None, bool]:
    """Why nothing can be trained on a self-edit, None if it is valid; and whether to sample it again."""
    try:
        make_job(context, text)
    except InvalidSelfEditError as error:
        return str(error), error.retryable
    return None, False


def _summary(metrics: Mapping[str, Any], trials: Sequence[Trial]) -> str:
    """An evaluation in words: accuracy, work, and what is missing."""
    accuracy = metrics["accuracy"]
    notes = ["nothing could be graded" if accuracy is None else f"{accuracy:.3f}"]
    trained = [trial for trial in trials if trial.num_tokens]
    if trained:
        tokens, seconds = sum(t.num_tokens for t in trained), sum(t.seconds for t in trials)
        notes.append(f"{len(trained)} adapters, {tokens} tokens in {seconds:.1f} s")
    if metrics["ungraded"]:
        notes.append(f"{metrics['ungraded']} answers without a grade")
    if metrics["failed"]:
        notes.append(f"{metrics['failed']} failed to train")
    return ", ".join(notes)


def _trials_by_step(candidates: Sequence[Candidate], repeats: int, size: int) -> list[list[tuple[Candidate, int]]]:
    """(candidate, repeat) of all candidates in steps of at most `size` different jobs; equal jobs share a step."""
    by_job: dict[tuple[str, int], list[tuple[Candidate, int]]] = {}
    for i, candidate in enumerate(candidates):
        key = str(i) if candidate.job is None else job_key(candidate.job)
        for repeat in range(repeats):
            by_job.setdefault((key, repeat), []).append((candidate, repeat))
    groups = list(by_job.values())
    return [
        [trial for group in groups[first : first + size] for trial in group] for first in range(0, len(groups), size)
    ]
