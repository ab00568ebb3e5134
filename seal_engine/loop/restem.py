"""ReST^EM (arXiv 2312.06585) over self-edits, as in SEAL (arXiv 2506.10943), algorithm 1.

A round is an E-step and an M-step. E-step: sample k self-edits for each context from the policy; train an adapter on
each, several times; ask each adapter the context's questions; its reward is its accuracy. M-step: fine-tune the policy
on the self-edits that are kept. What contexts, self-edits and questions are, is the Domain's; what has been done is the
Ledger's, so that a run which was killed goes on from there.

A unit of work is recorded whole or not at all, and what it computes depends on the configuration and on the units
before it alone. So a run that was interrupted ends like one that was not: on a CPU with the same bits, provided that
memory is not what bounds how many adapters are trained at once.
"""

import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from time import perf_counter

from seal_engine.engine import Engine
from seal_engine.loop.domain import Attempt, Domain, LoopConfig, RefusedError, Writer
from seal_engine.loop.ledger import Ledger, Policy, SelfEdit, Trial
from seal_engine.model.adapters import Adapter
from seal_engine.sampling.requests import Completion, SamplingParams
from seal_engine.training.jobs import TrainJob, TrainResult, TrainSequence
from seal_engine.types import require

WRITTEN = "self-edits"  # the method whose self-edits the policy writes
TOGETHER = "self-edits, one adapter for all"
NOT_HAD = "could not be had"  # of a self-edit by another writer: left out, as a grade that could not be had


class RunError(RuntimeError):
    """A run cannot go on; what was finished before is recorded."""


class UngradedError(RunError):
    """What could not be had, a grade or a self-edit, is left out of every mean; with too much of it a run stops."""


@dataclass(frozen=True)
class Entry:
    """An attempt that the ledger knows by its context and index."""

    context: str
    index: int
    attempt: Attempt


def number(*parts: object) -> int:
    """A seed, below 2**31, that depends on all parts and nothing else."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4]) >> 1


def check(domain: Domain, config: LoopConfig) -> None:
    """InputError for settings that the domain cannot serve: before anything is trained or written."""
    writers = ["", *domain.writers()]
    require(config.writer in writers, "writer", config.writer, f"one of {writers}")
    count, known = config.contexts, len(domain.contexts("train"))
    require(count <= known or not config.rounds, "contexts", count, f"at most {known}: there are no more")
    for split in ("train", "held out"):
        for context in domain.contexts(split)[:1]:
            domain.prompt(context)
            domain.questions(context)
    domain.logits_hook(config.max_tokens)


class ReSTEM:
    """The loop over one engine, domain and ledger. `run` does all that the ledger does not have yet."""

    def __init__(
        self,
        engine: Engine,
        domain: Domain,
        config: LoopConfig,
        ledger: Ledger,
        say: Callable[[str], None] = print,
        progress: bool = True,
    ):
        """say: takes a line on what has been measured. progress: bars, of what takes over a second."""
        self.engine = engine
        self.domain = domain
        self.config = config
        self.ledger = ledger
        self.say = say
        self.progress = progress
        self.policy: Adapter | None = None  # what writes self-edits, beside the base
        self.seed = config.seeds[0]

    def run(self) -> None:
        """All seeds: measure, then in each round improve the policy and measure again."""
        check(self.domain, self.config)
        for i, seed in enumerate(self.config.seeds):
            self.seed = seed
            if all(self.ledger.finished(self._unit(phase)) for phase in self._phases()):
                continue
            if i:
                self.engine.reload()
            self.policy = None
            self.evaluate(0)
            for round_number in range(1, self.config.rounds + 1):
                self.e_step(round_number)
                self.m_step(round_number)
                self.evaluate(round_number)

    def _phases(self) -> list[str]:
        rounds = range(self.config.rounds + 1)
        return [f"round {r}" for r in rounds if r] + [f"evaluation {r}" for r in rounds]

    def e_step(self, round_number: int) -> None:
        """Self-edits of all training contexts, and the reward of each."""
        phase, known, count = f"round {round_number}", self.domain.contexts("train"), self.config.contexts
        contexts = [known[i % len(known)] for i in range((round_number - 1) * count, round_number * count)]
        if self.ledger.finished(self._unit(phase)):
            return
        plain = [Entry(c, 0, Attempt(None, self.domain.questions(c))) for c in contexts]
        self.measure(f"{phase}, no adapter", plain, 1)
        writer = self.domain.writers()[self.config.writer] if self.config.writer else None
        self.measure(phase, self.write(phase, contexts, self.config.self_edits, writer), self.config.repeats)

    def m_step(self, round_number: int) -> None:
        """Fine-tune the policy on the self-edits that are kept, and go on from there."""
        phase, directory = f"round {round_number}", self.ledger.policy_directory(self.seed, round_number)
        if not self.ledger.finished(self._unit(phase)):
            start = perf_counter()
            chosen = self.select(round_number)
            kept, job = self._policy_job(round_number, chosen)
            if len(kept) < len(chosen):
                self.say(f"{phase}: {len(chosen) - len(kept)} kept self-edits are left out: longer than the model")
            losses: list[float] = []
            if job is not None:
                (result,) = self.engine.train([job], progress=self.progress)
                if result.adapter is None:
                    raise RunError(f"{phase}: the policy's update failed: {result.error}")
                self.ledger.replace_directory(directory, result.adapter.save)
                losses = result.losses
            path = None if job is None else str(directory.relative_to(self.ledger.directory))
            names = tuple((edit.context, edit.index) for edit in kept)
            policy = Policy(
                self.seed, round_number, path, names, len(losses), losses[-1] if losses else None,
                perf_counter() - start,
            )  # fmt: skip
            rewards = [reward for reward in self.rewards(phase).values() if reward is not None]
            metrics = {"seed": self.seed, "phase": phase, "reward": fmean(rewards) if rewards else None}
            self.ledger.finish(self._unit(phase), policy=policy, metrics={**metrics, "kept": len(kept)})
            shown = "no reward" if not rewards else f"mean reward {fmean(rewards):.3f}"
            self.say(f"seed {self.seed}, {phase}: {shown}, kept {len(kept)} self-edits")
        shutil.rmtree(self._checkpoint(round_number), ignore_errors=True)
        done = next(p for p in self.ledger.policies(self.seed) if p.round == round_number)
        if done.path is None:
            return  # nothing was kept, so the policy is what it was
        adapter = self.engine.load_adapter(directory)
        if self.config.policy_update == "merge":
            self.engine.merge(adapter)
        else:
            self.policy = adapter

    def _policy_job(self, round_number: int, chosen: Sequence[SelfEdit]) -> tuple[list[SelfEdit], TrainJob | None]:
        """The chosen self-edits that fit the model after their prompt, and the fine-tuning on them; None if none do.

        Those that the policy sampled do; another writer's may not.
        """
        kept, sequences = [], []
        for edit in chosen:
            prompt = self.engine.inputs.token_ids(self.domain.prompt(edit.context), "prompt")
            if len(prompt) + len(edit.token_ids) > self.engine.config.max_position_embeddings:
                continue
            kept.append(edit)
            mask = [0] * len(prompt) + [1] * len(edit.token_ids)
            sequences.append(TrainSequence([*prompt, *edit.token_ids], mask))
        if not kept:
            return [], None
        return kept, replace(
            self.config.policy_job(sequences),
            seed=number(self.seed, round_number, "policy"),
            init_from=self.policy,
            checkpoint_dir=self._checkpoint(round_number),
        )

    def _checkpoint(self, round_number: int) -> Path:
        return self.ledger.directory / f"checkpoint of seed {self.seed}, round {round_number}"

    def select(self, round_number: int) -> list[SelfEdit]:
        """The self-edits of a round that the policy is to learn from."""
        config, phase = self.config, f"round {round_number}"
        edits = {(e.context, e.index): e for e in self.ledger.self_edits(self.seed, phase) if e.refused is None}
        rewards = {key: r for key, r in self.rewards(phase).items() if r is not None and key in edits}
        if config.shuffle_rewards:
            order = sorted(rewards, key=lambda key: number(self.seed, phase, key))
            rewards = dict(zip(rewards, (rewards[key] for key in order), strict=True))
        before = {t.context: t.accuracy for t in self.ledger.trials(self.seed, f"{phase}, no adapter")}
        enough = [key for key in rewards if rewards[key] >= config.keep_reward]
        ranked = sorted(enough, key=lambda key: -rewards[key])  # equal ones stay in the order in which they were drawn
        if config.keep == "gain":
            base = {context: accuracy for context, accuracy in before.items() if accuracy is not None}
            kept = [key for key in enough if key[0] in base and rewards[key] > base[key[0]]]
        elif config.keep == "top":
            kept = ranked[: round(config.keep_fraction * len(edits))]
        else:
            kept = list({context: (context, index) for context, index in reversed(ranked)}.values())
        return [edits[key] for key in sorted(kept)]

    def rewards(self, phase: str) -> dict[tuple[str, int], float | None]:
        """The mean accuracy of each self-edit's adapters by (context, index); None where none could be graded."""
        rewards: dict[tuple[str, int], list[float]] = {}
        for trial in self.ledger.trials(self.seed, phase):
            given = [] if trial.accuracy is None else [round(trial.accuracy, 4)]  # as published, which decides ties
            rewards.setdefault((trial.context, trial.index), []).extend(given)
        return {key: fmean(values) if values else None for key, values in rewards.items()}

    def evaluate(self, round_number: int) -> None:
        """Measure the policy on held-out contexts; before the first round the baselines, too."""
        config, phase, contexts = self.config, f"evaluation {round_number}", self.domain.contexts("held out")
        if self.ledger.finished(self._unit(phase)):
            return
        if round_number == 0:
            for name, attempts in self.domain.baselines().items():
                entries = [Entry(c, i, attempt) for c in contexts for i, attempt in enumerate(attempts(c))]
                trained = any(entry.attempt.job is not None for entry in entries)
                self.measure(name, entries, config.held_out_repeats if trained else 1)
            for name, writer in self.domain.writers().items():
                self.measure(name, self.write(name, contexts, 0, writer), config.held_out_repeats, writer.best)
        written = self.write(phase, contexts, max(config.held_out_self_edits, config.together))
        own = [entry for entry in written if entry.index < config.held_out_self_edits]
        accuracy = self.measure(f"{phase}, {WRITTEN}", own, config.held_out_repeats)
        if config.together:
            joint = _together([entry for entry in written if entry.index < config.together])
            self.measure(f"{phase}, {TOGETHER}", joint, config.held_out_repeats)
        self.ledger.finish(self._unit(phase), metrics={"seed": self.seed, "phase": phase, "accuracy": accuracy})

    def write(self, phase: str, contexts: Sequence[str], count: int, writer: Writer | None = None) -> list[Entry]:
        """Self-edits for each context, `count` by the policy or what the writer gives, as what is to be trained."""
        unit = self._unit(f"{phase}, writing")
        if not self.ledger.finished(unit):
            edits = self._sampled(phase, contexts, count) if writer is None else self._given(phase, contexts, writer)
            lost, refused = (sum(map(test, edits)) for test in (_is_lost, lambda edit: edit.refused is not None))
            if edits and lost / len(edits) > self.config.max_ungraded:
                raise UngradedError(
                    f"{phase}: {lost} of {len(edits)} self-edits could not be had; accepted: a share of at most "
                    f"{self.config.max_ungraded:g} (max_ungraded); nothing of this unit has been recorded"
                )
            if edits and refused == len(edits):
                raise RunError(f"{phase}: every self-edit was refused, the first one as: {edits[0].refused}")
            metrics = {"seed": self.seed, "phase": phase, "self_edits": len(edits), "refused": refused}
            self.ledger.finish(unit, self_edits=edits, metrics=metrics)
            if refused:
                self.say(f"seed {self.seed}, {phase}: {refused} of {len(edits)} self-edits were refused")
        entries = []
        for edit in self.ledger.self_edits(self.seed, phase):
            if edit.refused is None:
                attempt = Attempt(self.domain.job(edit.context, edit.text), self.domain.questions(edit.context))
            else:
                attempt = Attempt(None, self.domain.questions(edit.context), edit.refused)
            if not _is_lost(edit):
                entries.append(Entry(edit.context, edit.index, attempt))
        order = {context: i for i, context in enumerate(contexts)}
        return sorted(entries, key=lambda entry: (order[entry.context], entry.index))

    def _sampled(self, phase: str, contexts: Sequence[str], count: int) -> list[SelfEdit]:
        """`count` self-edits of the policy for each context; those refused are drawn again, within a bound."""
        due = [(context, index) for context in contexts for index in range(count)]
        done: dict[tuple[str, int], SelfEdit] = {}
        params, attempt = replace(self._sampling(), logits_hook=self.domain.logits_hook(self.config.max_tokens)), 0
        while due and attempt <= self.config.resamples:
            attempt += 1
            seeds = [number(self.seed, phase, *key, attempt) for key in due]
            prompts = [self.domain.prompt(context) for context, _ in due]
            own = [replace(params, seed=seed) for seed in seeds]
            outputs = self.engine.generate(prompts, own, self.policy, progress=self.progress)
            again = []
            for (context, index), seed, output in zip(due, seeds, outputs, strict=True):
                sample = output.outputs[0] if output.outputs else Completion(index)
                refused, final = (output.error, True) if output.error else self._refusal(context, sample.text)
                done[context, index] = SelfEdit(
                    self.seed, phase, context, index, sample.text, tuple(sample.token_ids), seed, attempt, refused
                )
                again += [] if final else [(context, index)]
            due = again
        return list(done.values())

    def _sampling(self) -> SamplingParams:
        """How self-edits are sampled."""
        config = self.config
        return SamplingParams(temperature=config.temperature, top_p=config.top_p, max_tokens=config.max_tokens)

    def _given(self, phase: str, contexts: Sequence[str], writer: Writer) -> list[SelfEdit]:
        edits, end = [], self.engine.stop_token_ids[:1]  # a policy that learns from them learns to end, too
        for context, texts in zip(contexts, writer.write(contexts, self._sampling()), strict=True):
            for index, text in enumerate(texts or [None]):
                ids = [] if text is None else self.engine.tokenizer.encode(text, add_special_tokens=False)
                refused = NOT_HAD if text is None else self._refusal(context, text)[0]
                edits.append(SelfEdit(self.seed, phase, context, index, text or "", (*ids, *end), None, 1, refused))
        return edits

    def _refusal(self, context: str, text: str) -> tuple[str | None, bool]:
        """Why nothing can be trained on a self-edit, None if something can; and whether that is the last word."""
        try:
            self.domain.job(context, text)
        except RefusedError as error:
            return str(error), error.final
        return None, True

    def measure(self, phase: str, entries: Sequence[Entry], repeats: int, best: bool = False) -> float | None:
        """Train, ask and grade all entries, `repeats` times each; the mean accuracy over contexts that could be."""
        for i, unit in enumerate(_units(entries, repeats, self.config.trials_a_unit)):
            name = self._unit(f"{phase}, trials {i}")
            if not self.ledger.finished(name):
                self.ledger.finish(name, trials=self._trials(phase, unit))
        trials = self.ledger.trials(self.seed, phase)
        missing = sum(grade is None for trial in trials for grade in trial.grades)
        accuracy = mean_accuracy(trials, best)
        notes = ["nothing could be graded" if accuracy is None else f"{accuracy:.3f}"]
        refused = repeats * sum(entry.attempt.refused is not None for entry in entries)
        failed = sum(trial.error is not None for trial in trials) - refused
        trained = [trial for trial in trials if trial.num_tokens]
        if trained:
            tokens, seconds = sum(t.num_tokens for t in trained), sum(t.seconds for t in trials)
            notes.append(f"{len(trained)} adapters, {tokens} tokens in {seconds:.1f} s")
        notes += [f"{missing} answers without a grade"] * bool(missing) + [f"{failed} failed to train"] * bool(failed)
        self.say(f"seed {self.seed}, {phase}: {', '.join(notes)}")
        unit = self._unit(phase + ", accuracy")
        if not self.ledger.finished(unit):
            contexts = len({trial.context for trial in trials if trial.accuracy is not None})
            metrics = {"seed": self.seed, "phase": phase, "accuracy": accuracy, "trials": len(trials)}
            metrics |= {"contexts": contexts, "refused": refused, "failed": failed, "ungraded": missing}
            self.ledger.finish(unit, metrics=metrics)
        return accuracy

    def _trials(self, phase: str, unit: Sequence[tuple[Entry, int]]) -> list[Trial]:
        """Train the unit's jobs all at once, ask all their questions at once, grade them at once."""
        start = perf_counter()
        # The seed of a repeat is that of every job in it: what they differ by is the self-edit, not the luck.
        seeds = {repeat: number(self.seed, phase, repeat) for _, repeat in unit}
        results = self._train(unit, seeds)
        tried = [result for (entry, _), result in zip(unit, results, strict=True) if entry.attempt.job is not None]
        if tried and not any(result.num_steps for result in tried):
            raise RunError(f"{phase}: none of {len(tried)} adapters could be trained; the first: {tried[0].error}")
        answers = self._ask(phase, unit, results)
        grades = self._grade(phase, unit, answers)
        seconds = (perf_counter() - start) / len(unit)
        return [
            Trial(
                self.seed, phase, entry.context, entry.index, repeat, seeds[repeat],
                result.num_steps, result.num_tokens, result.losses[-1] if result.losses else None, result.error,
                tuple(answers.get(i, ())), tuple(grades.get(i, ())), seconds,
            )
            for i, ((entry, repeat), result) in enumerate(zip(unit, results, strict=True))
        ]  # fmt: skip

    def _train(self, unit: Sequence[tuple[Entry, int]], seeds: Mapping[int, int]) -> list[TrainResult]:
        """What came of each trial's job; nothing, where it has none.

        Equal jobs (the same self-edit drawn twice, or one adapter for many contexts) are trained once.
        """
        numbers: dict[str, int] = {}
        jobs: list[TrainJob] = []
        places: list[int | None] = []
        for entry, repeat in unit:
            job = entry.attempt.job
            if job is None:
                places.append(None)
                continue
            job = replace(job, seed=seeds[repeat])
            place = numbers.setdefault(repr(job), len(jobs))
            places.append(place)
            if place == len(jobs):
                jobs.append(job)
        results = self.engine.train(jobs, progress=self.progress) if jobs else []
        return [
            TrainResult(None, [], 0, entry.attempt.refused) if place is None else results[place]
            for (entry, _), place in zip(unit, places, strict=True)
        ]

    def _ask(
        self, phase: str, unit: Sequence[tuple[Entry, int]], results: Sequence[TrainResult]
    ) -> dict[int, list[str]]:
        """The answers of every trial (by its place in the unit) that has not failed."""
        asked = [i for i, result in enumerate(results) if result.error is None]
        prompts = [prompt for i in asked for prompt in unit[i][0].attempt.questions]
        adapters = [results[i].adapter for i in asked for _ in unit[i][0].attempt.questions]
        if not prompts:
            return {i: [] for i in asked}
        params = self.domain.answer_params
        outputs = self.engine.generate(prompts, params, adapters, progress=self.progress)
        failed = [output.error for output in outputs if output.error]
        if failed:
            self.say(f"{phase}: {len(failed)} of {len(outputs)} questions could not be asked, so wrong: {failed[0]}")
        texts = iter("" if output.error else output.outputs[0].text for output in outputs)
        return {i: [next(texts) for _ in unit[i][0].attempt.questions] for i in asked}

    def _grade(
        self, phase: str, unit: Sequence[tuple[Entry, int]], answers: Mapping[int, Sequence[str]]
    ) -> dict[int, list[float | None]]:
        """The grades of every trial that was asked. Raises UngradedError where too many are missing."""
        found = self.domain.grade([(unit[i][0].context, own) for i, own in answers.items()])
        grades = dict(zip(answers, found, strict=True))
        given = [grade for own in found for grade in own]
        missing = sum(grade is None for grade in given)
        if given and missing / len(given) > self.config.max_ungraded:
            raise UngradedError(
                f"{phase}: {missing} of {len(given)} answers could not be graded; accepted: a share of at most "
                f"{self.config.max_ungraded:g} (max_ungraded); nothing of this unit has been recorded"
            )
        return grades

    def _unit(self, name: str) -> str:
        return f"seed {self.seed}, {name}"


def _units(entries: Sequence[Entry], repeats: int, size: int) -> Iterator[list[tuple[Entry, int]]]:
    """(entry, repeat) of all entries, those of one job together, as many at a time as have `size` different jobs."""
    by_job: dict[tuple[str, int], list[tuple[Entry, int]]] = {}
    for i, entry in enumerate(entries):
        key = repr(entry.attempt.job) if entry.attempt.job is not None else str(i)
        for repeat in range(repeats):
            by_job.setdefault((key, repeat), []).append((entry, repeat))
    groups = list(by_job.values())
    for first in range(0, len(groups), size):
        yield [trial for group in groups[first : first + size] for trial in group]


def _together(entries: Sequence[Entry]) -> list[Entry]:
    """One job on the sequences of all entries (continued pretraining), asked the questions of every context."""
    jobs = [entry.attempt.job for entry in entries if entry.attempt.job is not None]
    joint = replace(jobs[0], sequences=[s for job in jobs for s in job.sequences]) if jobs else None
    refused = None if jobs else "no self-edit to train on"
    questions = {entry.context: entry.attempt.questions for entry in entries}
    return [Entry(context, 0, Attempt(joint, asked, refused)) for context, asked in questions.items()]


def _is_lost(edit: SelfEdit) -> bool:
    return edit.refused == NOT_HAD


def mean_accuracy(trials: Sequence[Trial], best: bool = False) -> float | None:
    """The mean over contexts of the mean over a context's trials (best: of its best attempt); None: nothing graded."""
    by_context: dict[str, dict[int, list[float]]] = {}
    for trial in trials:
        if trial.accuracy is not None:
            by_context.setdefault(trial.context, {}).setdefault(trial.index, []).append(trial.accuracy)
    if not by_context:
        return None
    means = [[fmean(values) for values in indices.values()] for indices in by_context.values()]
    return fmean(max(own) if best else fmean(own) for own in means)
