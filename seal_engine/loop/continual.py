"""One edit after another: what is learned, what is forgotten, by every method on the same sequences of passages.

    for each step t of K, all methods and sequences side by side:
        the current system writes a self-edit for passage t     _write
        the method learns it                                     _learn: Method.job, engine.train, Method.block, adopt
        it answers the questions of passages 1 .. t              _ask: Method.route, engine.generate
    then probes: what else has changed                           ContinualProbes

A sequence's matrix of accuracies follows from the trials (`matrices`). A step is recorded whole or not at all, with the
adapters that it added in a file beside the ledger, and what it computes depends on the configuration and the steps
before it alone, so that a run which was killed ends with the same numbers.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from time import perf_counter, process_time
from typing import Any

from seal_engine.engine import Engine
from seal_engine.errors import RunError
from seal_engine.loop.adapter_store import AdapterStore
from seal_engine.loop.continual_config import ContinualConfig
from seal_engine.loop.continual_data import SharedTexts
from seal_engine.loop.continual_methods import Block, Lesson, Method, make_method
from seal_engine.loop.continual_probes import UNTRAINED, probe_methods
from seal_engine.loop.domain import PassageDomain, UngradedError
from seal_engine.loop.forgetting import Matrix, last_row
from seal_engine.loop.inner import InnerLoop, derive_seed
from seal_engine.loop.ledger import Ledger
from seal_engine.loop.records import SelfEdit, Trial
from seal_engine.loop.steps import sample_self_edits
from seal_engine.progress import write_line
from seal_engine.sampling.requests import SamplingParams
from seal_engine.training.jobs import TrainResult
from seal_engine.types import require

BASE_SAMPLES = "base samples"
PARTS = ("preparing", "training", "keeping", "asking")  # of a step that is learned, in their order
PREFIX_TOKENS = 2  # of a self-edit's lines, at most: what the base continues for a sample
Key = tuple[int, int]  # (number of the method, number of the sequence)


def _now() -> tuple[float, float]:
    """Seconds of the clock, and CPU seconds of this process."""
    return perf_counter(), process_time()


def phase_of(step: int, method: str) -> str:
    """The phase of a method's self-edits and trials in a step, as the ledger names it."""
    return f"step {step}, {method}"


def validate_continual(domain: PassageDomain, config: ContinualConfig) -> None:
    """InputError for settings that the domain cannot serve: before anything is trained or written."""
    count = len(domain.contexts("held out"))
    require(config.passages <= count, "passages", config.passages, f"at most {count}: there are no more held out")
    train = len(domain.contexts("train"))
    probes = config.probe_contexts + config.probe_writing
    require(train > 0 or not probes, "probe_contexts", config.probe_contexts, "0: there are no training passages")


def draw_sequences(contexts: Sequence[str], count: int, length: int, seed: int) -> list[list[str]]:
    """`count` sequences of `length` contexts: disjoint if there are enough contexts, else each drawn by itself."""
    draw = random.Random(derive_seed(seed, "sequences"))
    if count * length <= len(contexts):
        order = draw.sample(list(contexts), count * length)
        return [order[i * length : (i + 1) * length] for i in range(count)]
    return [draw.sample(list(contexts), length) for _ in range(count)]


def matrices(trials: Sequence[Trial], sequences: Sequence[Sequence[str]], seed: int, method: str) -> list[Matrix]:
    """A method's matrix of each sequence (see forgetting.py), as far as it is measured."""
    K = len(sequences[0])
    found: list[Matrix] = [[[None] * K for _ in range(K + 1)] for _ in sequences]
    columns = [{context: j for j, context in enumerate(own)} for own in sequences]
    rows = {UNTRAINED: 0, **{phase_of(t, method): t for t in range(1, K + 1)}}
    for trial in trials:
        if trial.seed != seed or trial.phase not in rows:
            continue
        for s in range(len(sequences)) if trial.phase == UNTRAINED else [trial.index]:
            if trial.context in columns[s]:
                found[s][rows[trial.phase]][columns[s][trial.context]] = trial.accuracy
    return found


class Continual:
    """The experiment over one engine, domain and ledger. `run` does all that the ledger does not have yet."""

    def __init__(
        self,
        engine: Engine,
        domain: PassageDomain,
        config: ContinualConfig,
        ledger: Ledger,
        log: Callable[[str], None] = write_line,
        progress: bool = True,
        inner_loop: InnerLoop | None = None,
    ):
        """log: takes one line of text on what has been measured. progress: bars for what takes over a second.
        inner_loop: where trials are computed; None: over the engine."""
        self.engine, self.domain, self.config, self.ledger = engine, domain, config, ledger
        self.log, self.progress = log, progress
        self.inner_loop = inner_loop or InnerLoop(engine, domain.answer_params, domain.grade, log, progress)
        self.make_job = cache(domain.job)

    def run(self) -> None:
        """All seeds, each with all methods side by side."""
        validate_continual(self.domain, self.config)
        for directory in self.config.policies:
            self.engine.merge(self.engine.load_adapter(directory))
        for seed in self.config.seeds:
            if not self.ledger.finished(f"seed {seed}, probes"):
                self._run_seed(seed)

    def is_finished(self) -> bool:
        """Whether all seeds are through all steps."""
        return all(self.ledger.finished(f"seed {seed}, probes") for seed in self.config.seeds)

    def _run_seed(self, seed: int) -> None:
        config = self.config
        contexts = self.domain.contexts("held out")
        sequences = draw_sequences(contexts, config.sequences, config.passages, seed)
        self._once(f"seed {seed}, {UNTRAINED}", lambda: self._ask_untrained(seed, sequences))
        methods: list[Method] = []
        for step in range(1, config.passages + 1):
            self._once(f"seed {seed}, step {step}, writing", partial(self._write, seed, step, sequences, methods))
            if step == 1:
                self._once(f"seed {seed}, {BASE_SAMPLES}", lambda: self._sample_base(seed))
                shared = SharedTexts(self.engine, config, seed, self.base_samples(seed)[::2], self.domain.prompt)
                methods = [make_method(name, shared, config.sequences) for name in config.methods]
            lessons = self._lessons(seed, step, sequences)
            store = AdapterStore(self.ledger.directory, seed, step)
            if self.ledger.finished(f"seed {seed}, step {step}"):
                self._restore(store, methods, lessons)
            else:
                self._learn(seed, step, sequences, methods, lessons, store)
            self._report(seed, step, sequences)
        texts = self.base_samples(seed)[1::2]
        self._once(f"seed {seed}, probes", lambda: probe_methods(self, seed, methods, sequences, texts))

    def _once(self, step: str, compute: Callable[[], dict[str, Any]]) -> None:
        if not self.ledger.finished(step):
            self.ledger.finish(step, **compute())

    def base_samples(self, seed: int) -> list[list[int]]:
        """Token ids of the texts that the untrained model wrote."""
        edits = self.ledger.self_edits(seed, BASE_SAMPLES)
        return [list(edit.token_ids) for edit in sorted(edits, key=lambda edit: edit.index)]

    def _ask_untrained(self, seed: int, sequences: Sequence[Sequence[str]]) -> dict[str, Any]:
        contexts = list(dict.fromkeys(context for own in sequences for context in own))
        return {"trials": self.ask(seed, UNTRAINED, [(context, 0, None) for context in contexts])}

    def _write(
        self, seed: int, step: int, sequences: Sequence[Sequence[str]], methods: Sequence[Method]
    ) -> dict[str, Any]:
        """A self-edit for every method and sequence by its current system; equal systems write equal ones, once."""
        edits: list[SelfEdit] = []
        known: dict[tuple[int, int | None], SelfEdit] = {}  # (sequence, uid of the writer)
        for m, name in enumerate(self.config.methods):
            changed = methods and self.config.edit_writer == "system"
            writers = [methods[m].writer(s) if changed else None for s in range(len(sequences))]
            keys = [(s, None if writer is None else writer.uid) for s, writer in enumerate(writers)]
            due = {(sequences[s][step - 1], s): writers[s] for s, uid in keys if (s, uid) not in known}
            for edit in self.sample(seed, f"step {step}", due):
                known[keys[edit.index]] = edit
            edits += [replace(known[key], phase=phase_of(step, name)) for key in keys]
        rejected = sum(edit.rejected is not None for edit in edits)
        if step == 1 and rejected == len(edits):
            raise RunError(f"step 1: every self-edit was rejected, the first one as: {edits[0].rejected}")
        if rejected:
            self.log(f"seed {seed}, step {step}: {rejected} of {len(edits)} self-edits were rejected")
        return {"self_edits": edits, "metrics": {"seed": seed, "step_number": step, "rejected": rejected}}

    def sample(self, seed: int, phase: str, writers: Mapping[tuple[str, int], Any]) -> list[SelfEdit]:
        """A self-edit for each (context, index) by its writer; see sample_self_edits."""
        config = self.config
        sampling = config.sampling_params, config.resamples
        parts = self.engine, self.domain, *sampling
        return sample_self_edits(*parts, seed, phase, writers, self.make_job, self.progress)

    def _sample_base(self, seed: int) -> dict[str, Any]:
        """Texts of the untrained model: it goes on from the first tokens of lines of its own self-edits."""
        edits = self.ledger.self_edits(seed, phase_of(1, self.config.methods[0]))
        lines = [line for edit in edits for line in edit.text.splitlines() if line.strip()]
        draw = random.Random(derive_seed(seed, BASE_SAMPLES))
        prompts = []
        for _ in range(self.config.base_samples):
            ids = self.engine.tokenizer.encode(draw.choice(lines))
            prompts.append(ids[: draw.randint(1, PREFIX_TOKENS)])
        params = [
            SamplingParams(temperature=1.0, max_tokens=self.config.base_sample_tokens, seed=derive_seed(seed, i))
            for i in range(len(prompts))
        ]
        outputs = self.engine.generate(prompts, params, None, progress=self.progress)
        samples = []
        for i, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
            ids = (*prompt, *output.outputs[0].token_ids)
            text = self.engine.tokenizer.decode(ids, skip_special_tokens=True)
            samples.append(SelfEdit(seed, BASE_SAMPLES, f"sample {i}", i, text, ids, derive_seed(seed, i), 1, None))
        return {"self_edits": samples}

    def _lessons(self, seed: int, step: int, sequences: Sequence[Sequence[str]]) -> dict[Key, Lesson]:
        """What is learned in a step, by (method, sequence); rejected self-edits teach nothing."""
        lessons = {}
        for m, name in enumerate(self.config.methods):
            for edit in self.ledger.self_edits(seed, phase_of(step, name)):
                if edit.rejected is None:
                    job = replace(self.make_job(edit.context, edit.text), seed=derive_seed(seed, "step", step))
                    lessons[m, edit.index] = Lesson(edit.context, self.domain.title(edit.context), edit.text, job)
        return lessons

    def _restore(self, store: AdapterStore, methods: Sequence[Method], lessons: Mapping[Key, Lesson]) -> None:
        """A recorded step: its blocks are read, not trained."""
        loras = {(m, s): methods[m].lora(lesson) for (m, s), lesson in lessons.items()}
        for (m, s), block in store.load(self.engine, loras).items():
            methods[m].adopt(s, lessons[m, s], block)

    def _learn(
        self,
        seed: int,
        step: int,
        sequences: Sequence[Sequence[str]],
        methods: Sequence[Method],
        lessons: Mapping[Key, Lesson],
        store: AdapterStore,
    ) -> None:
        """Train, keep and ask, all methods and sequences at once; then record the step."""
        times = [_now()]
        jobs = {(m, s): methods[m].job(s, lesson) for (m, s), lesson in lessons.items()}
        times.append(_now())
        results = dict(zip(jobs, self.inner_loop.train(list(jobs.values())), strict=True))
        times.append(_now())
        blocks: dict[Key, Block] = {}
        for (m, s), result in results.items():
            block = methods[m].block(s, lessons[m, s], result) if result is not None else None
            if block is not None:
                blocks[m, s] = block
        if lessons and not blocks:
            errors = [result.error for result in results.values() if result is not None]
            raise RunError(f"step {step}: none of {len(errors)} adapters could be trained; the first: {errors[0]}")
        for (m, s), block in blocks.items():
            methods[m].adopt(s, lessons[m, s], block)
        times.append(_now())
        trials = []
        keys = [(m, s) for m in range(len(methods)) for s in range(len(sequences))]
        asked = [(m, s, context) for m, s in keys for context in sequences[s][:step]]
        answered = self.inner_loop.answer([self.question(methods[m], s, c, c) for m, s, c in asked])
        for (m, s, context), (answers, grades) in zip(asked, answered, strict=True):
            new = context == sequences[s][step - 1]
            result = results.get((m, s)) if new else None
            trials.append(self._trial(seed, phase_of(step, methods[m].name), context, s, answers, grades, result))
        self.validate_grades(f"step {step}", trials)
        times.append(_now())
        metrics: dict[str, Any] = {"seed": seed, "step_number": step, "adapters": len(jobs)}
        for name, (start, cpu_start), (end, cpu_end) in zip(PARTS, times[:-1], times[1:], strict=True):
            metrics |= {f"{name}_seconds": end - start, f"{name}_cpu_seconds": cpu_end - cpu_start}
        for m, method in enumerate(methods):
            own = [result for (n, _), result in results.items() if n == m and result is not None]
            factors = [block.factor for (n, _), block in blocks.items() if n == m]
            metrics[f"{method.name}: tokens"] = sum(result.num_tokens for result in own)
            metrics[f"{method.name}: factor"] = sum(factors) / len(factors) if factors else None
            metrics[f"{method.name}: bytes"] = method.bytes_kept
        store.save(blocks)
        self.ledger.finish(f"seed {seed}, step {step}", trials=trials, metrics=metrics)

    def question(self, method: Method, sequence: int, context: str, about: str) -> tuple[str, Sequence, list]:
        """(context, prompts, the adapter that answers each), as InnerLoop.answer takes it."""
        prompts = self.domain.questions(context)
        return context, prompts, method.route(sequence, about, [self.text(prompt) for prompt in prompts])

    def text(self, prompt: Any) -> str:
        """A prompt as text, for a retriever."""
        return prompt if isinstance(prompt, str) else self.engine.tokenizer.decode(prompt, skip_special_tokens=True)

    def ask(self, seed: int, phase: str, asked: Sequence[tuple[str, int, Any]]) -> list[Trial]:
        """Trials of (context, index, the adapter that answers all its questions)."""
        questions = []
        for context, _, adapter in asked:
            prompts = self.domain.questions(context)
            questions.append((context, prompts, [adapter] * len(prompts)))
        answered = self.inner_loop.answer(questions)
        trials = [
            self._trial(seed, phase, context, index, answers, grades)
            for (context, index, _), (answers, grades) in zip(asked, answered, strict=True)
        ]
        self.validate_grades(phase, trials)
        return trials

    def _trial(
        self, seed: int, phase: str, context: str, index: int, answers: Sequence[str], grades: Sequence,
        result: TrainResult | None = None,
    ) -> Trial:  # fmt: skip
        """A trial's record. An edit that could not be trained is no error here: the system answered without it."""
        loss = result.losses[-1] if result and result.losses else None
        steps, tokens = (0, 0) if result is None else (result.num_steps, result.num_tokens)
        return Trial(seed, phase, context, index, 0, 0, steps, tokens, loss, None, tuple(answers), tuple(grades), 0.0)

    def validate_grades(self, where: str, trials: Sequence[Trial]) -> None:
        """UngradedError where too many grades are missing."""
        grades = [grade for trial in trials for grade in trial.grades]
        missing, most = grades.count(None), self.config.max_ungraded
        if grades and missing / len(grades) > most:
            found = f"{missing} of {len(grades)} answers could not be graded"
            raise UngradedError(f"{where}: {found}; accepted: a share of at most {most:g} (max_ungraded)")

    def _report(self, seed: int, step: int, sequences: Sequence[Sequence[str]]) -> None:
        """A line of the log: just learned, and all so far, of each method."""
        parts = []
        for name in self.config.methods:
            trials = self.ledger.trials(seed, phase_of(step, name))
            found = matrices(trials, [own[:step] for own in sequences], seed, name)
            new, every = (_mean([measure(m) for m in found]) for measure in (_newest, last_row))
            parts.append(f"{name} {new} {every}")
        self.log(f"seed {seed}, step {step}, accuracy in % on the new passage and on all so far: {', '.join(parts)}")


def _newest(matrix: Matrix) -> float | None:
    return matrix[-1][-1]


def _mean(values: Sequence[float | None]) -> str:
    numbers = [value for value in values if value is not None]
    return f"{100 * sum(numbers) / len(numbers):.1f}" if numbers else "-"
