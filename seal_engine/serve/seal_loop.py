"""SEAL's inner-loop requests: JSON in, JSON out, the work between them done by loop/inner.py over the shared worker.

A request trains one adapter on `train_sequences`, asks it and the base the `eval_questions`, and compares. Answers of
the base are kept by its version and the questions, as drivers ask for them with every request.
"""

import secrets
import shutil
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from statistics import fmean
from typing import Any

from seal_engine.domains.knowledge.grading import Grader
from seal_engine.domains.templating import fill, read_template
from seal_engine.loop.domain import Candidate
from seal_engine.loop.inner import InnerLoop
from seal_engine.sampling.requests import SamplingParams
from seal_engine.serve.backend import WorkerBackend
from seal_engine.serve.worker import Worker
from seal_engine.training.jobs import TrainJob, TrainSequence
from seal_engine.types import InputError, LoraConfig, is_integer, renamed_errors, require

MAX_SEQUENCE_TOKENS = 2048
ANSWER_PARAMS = SamplingParams(temperature=0, max_tokens=64)
KEPT_BASELINES = 4096  # sets of questions
MAX_RANK, MAX_STEPS = 4096, 1_000_000
# Fields of a TrainJob -> keys of a request.
KEYS = {
    "lora.r": "lora_rank",
    "lora.lora_alpha": "lora_alpha",
    "lora.lora_dropout": "lora_dropout",
    "num_epochs": "finetune_epochs",
    "learning_rate": "finetune_lr",
    "sequences": "train_sequences",
}
# Keys that newer drivers send and that would change the numbers; others that are unknown are tolerated.
UNSUPPORTED = ("chain_of_thought", "return_logprobs", "olora")


@dataclass(frozen=True)
class SealRequest:
    """A request that is valid. job: without token ids yet; None: only the base is asked."""

    questions: tuple[tuple[str, str], ...]  # question and right answer
    job: TrainJob | None
    end_mask_substring: str
    ask_base: bool
    seed: int


@dataclass(frozen=True)
class Answers:
    """What a model answered, and whether that is right. ungraded: answers that no grader could judge; they count as
    wrong."""

    texts: tuple[str, ...]
    correct: tuple[bool, ...]
    ungraded: int

    @property
    def accuracy(self) -> float:
        """The share of right answers."""
        return fmean(self.correct)


def read_request(message: Any, seed: int | None) -> SealRequest:
    """A message as a request. seed: of the training; None: another one each time. InputError naming the key."""
    require(isinstance(message, Mapping), "request", message, "a JSON object")
    for name in UNSUPPORTED:
        require(not message.get(name), name, message.get(name), "nothing: it is not supported")
    questions = message.get("eval_questions")
    require(isinstance(questions, list) and len(questions) > 0, "eval_questions", questions, "a list, at least one")
    asked = tuple(_question(value, f"eval_questions[{i}]") for i, value in enumerate(questions or []))
    sequences = message.get("train_sequences") or []
    valid = isinstance(sequences, list) and all(isinstance(text, str) for text in sequences)
    require(valid, "train_sequences", sequences, "a list of texts")
    substring = message.get("end_mask_substring") or ""
    require(isinstance(substring, str), "end_mask_substring", substring, "a text")
    for name in ("skip_training", "baseline_eval"):
        value = message.get(name)
        require(value is None or isinstance(value, bool), name, value, "true or false")
    wanted = message.get("seed", seed)
    require(wanted is None or (is_integer(wanted) and 0 <= wanted < 2**63), "seed", wanted, "an integer >= 0")
    trains = bool(sequences) and not message.get("skip_training")
    return SealRequest(
        asked,
        _job(message, sequences) if trains else None,
        substring,
        message.get("baseline_eval") is not False,
        secrets.randbits(31) if wanted is None else wanted,
    )


def _question(value: Any, name: str) -> tuple[str, str]:
    require(isinstance(value, Mapping), name, value, "an object with question and answer")
    for key in ("question", "answer"):
        require(isinstance(value.get(key), str), f"{name}.{key}", value.get(key), "a text")
    return value["question"], value["answer"]


def _job(message: Mapping[str, Any], sequences: list[str]) -> TrainJob:
    """The job with the server's defaults for what the message leaves out."""

    def value(name: str, default: Any) -> Any:
        sent = message.get(name)
        return default if sent is None else sent

    job = TrainJob(
        sequences,
        LoraConfig(
            r=value("lora_rank", 32), lora_alpha=value("lora_alpha", 64), lora_dropout=value("lora_dropout", 0.0)
        ),
        learning_rate=value("finetune_lr", 1e-3),
        num_epochs=value("finetune_epochs", 10),
        batch_size=value("batch_size", 1),
        gradient_accumulation_steps=value("gradient_accumulation_steps", 1),
    )
    with renamed_errors(KEYS):
        job.check()
    require(job.lora.r <= MAX_RANK, "lora_rank", job.lora.r, f"at most {MAX_RANK}")
    steps = job.num_epochs * len(sequences)
    require(steps <= MAX_STEPS, "finetune_epochs", job.num_epochs, f"at most {MAX_STEPS} sequences in all epochs")
    return job


class SealLoop:
    """Answers requests, from any number of threads at once."""

    def __init__(self, worker: Worker, grader: Grader, seed: int | None = None, adapters_dir: str | None = None):
        """grader: judges answers. seed: of every training that brings none. adapters_dir: where the adapter of the n-th
        trained request is written, n in the place of {n}; None: nowhere.
        """
        self.worker = worker
        self.grader = grader
        self.seed = seed
        self.adapters_dir = adapters_dir
        self.template = read_template("", "seal_question.txt", "question")
        self._trained = count()
        self._baselines: OrderedDict[tuple[Any, ...], Answers] = OrderedDict()
        self._lock = threading.Lock()

    def reply(self, request: SealRequest, backend: WorkerBackend) -> dict[str, Any]:
        """The reply, as drivers read it. Raises InputError, or what the worker raises. Takes as long as it takes."""
        base = self._kept_baseline(request)
        candidates = {}
        prompts = [fill(self.template, {"question": question}) for question, _ in request.questions]
        number = None
        if base is None and (request.ask_base or request.job is None):
            candidates["base"] = Candidate("base", None, prompts)
        if request.job is not None:
            number = next(self._trained)
            candidates["adapter"] = Candidate("adapter", self._tokenized(request, backend), prompts)
        answers = self._answers(request, candidates, backend)
        if "base" in answers:
            base = self._keep_baseline(request, answers["base"])
        adapter = answers.get("adapter", base)
        if base is None or adapter is None:  # baseline_eval: false
            base = Answers(("",) * len(prompts), (False,) * len(prompts), 0)
        reply = _reply(base, adapter or base)
        if number is not None:
            self._save(number, backend)
            reply["seed"] = request.seed
        return reply

    def _answers(
        self, request: SealRequest, candidates: Mapping[str, Candidate], backend: WorkerBackend
    ) -> dict[str, Answers]:
        """Train, ask and grade. InputError for a job that fails."""
        if not candidates:
            return {}

        def grade(answered: Sequence[tuple[str, Sequence[str]]]) -> list[list[float | None]]:
            backend.state = "grading"
            triples = [
                (*pair, text) for _, texts in answered for pair, text in zip(request.questions, texts, strict=True)
            ]
            grades = iter(self.grader(triples))
            return [[next(grades) for _ in texts] for _, texts in answered]

        loop = InnerLoop(backend, ANSWER_PARAMS, grade, progress=False)
        results = loop.run([(candidate, request.seed) for candidate in candidates.values()])
        answers = {}
        for name, result in zip(candidates, results, strict=True):
            if result.error is not None:
                raise InputError(f"training failed: {result.error}")
            correct = tuple(grade == 1 for grade in result.grades)
            answers[name] = Answers(result.answers, correct, result.grades.count(None))
        return answers

    def _tokenized(self, request: SealRequest, backend: WorkerBackend) -> TrainJob:
        """The job on token ids, cut to MAX_SEQUENCE_TOKENS, its masks up to the end of the substring."""
        assert request.job is not None
        tokenizer, longest = backend.tokenizer, backend.engine.config.max_position_embeddings
        substring = tokenizer.encode(request.end_mask_substring, add_special_tokens=False)
        sequences = []
        for i, text in enumerate(request.job.sequences):
            try:
                ids = tokenizer.encode(str(text))[: min(MAX_SEQUENCE_TOKENS, longest)]
            except InputError as error:
                raise InputError(f"train_sequences[{i}]: {error}") from None
            masked = _end_of(substring, ids)
            sequences.append(TrainSequence(ids, [0] * masked + [1] * (len(ids) - masked)))
        return TrainJob(**{**vars(request.job), "sequences": sequences})

    def _kept_baseline(self, request: SealRequest) -> Answers | None:
        with self._lock:
            key = self._key(request)
            if key in self._baselines:
                self._baselines.move_to_end(key)
            return self._baselines.get(key)

    def _keep_baseline(self, request: SealRequest, answers: Answers) -> Answers:
        """Keep the base's answers, unless a grader failed on some."""
        with self._lock:
            if not answers.ungraded:
                self._baselines[self._key(request)] = answers
            while len(self._baselines) > KEPT_BASELINES:
                self._baselines.popitem(last=False)
        return answers

    def _key(self, request: SealRequest) -> tuple[Any, ...]:
        return self.worker.engine.model.version, request.questions

    def _save(self, number: int, backend: WorkerBackend) -> None:
        """Write the adapter in the place of an earlier one, if the server keeps adapters."""
        if self.adapters_dir is None or backend.results[-1].adapter is None:
            return
        directory = Path(self.adapters_dir.format(n=number)) / "final_adapter"
        shutil.rmtree(directory, ignore_errors=True)
        backend.results[-1].adapter.save(directory)


def _end_of(substring: Sequence[int], ids: Sequence[int]) -> int:
    """Where the first occurrence of some ids in others ends; 0 if there is none."""
    size = len(substring)
    starts = range(len(ids) - size + 1) if size else ()
    return next((start + size for start in starts if list(ids[start : start + size]) == list(substring)), 0)


def _reply(base: Answers, adapter: Answers) -> dict[str, Any]:
    gains = [int(after) - int(before) for before, after in zip(base.correct, adapter.correct, strict=True)]
    reply = {
        "baseline_accuracy": round(base.accuracy, 4),
        "adapter_accuracy": round(adapter.accuracy, 4),
        "adapter_gain": round(adapter.accuracy - base.accuracy, 4),
        "baseline_texts": list(base.texts),
        "adapter_texts": list(adapter.texts),
        "baseline_correct": list(base.correct),
        "adapter_correct": list(adapter.correct),
        "gains": gains,
    }
    ungraded = base.ungraded + adapter.ungraded
    return {**reply, "ungraded": ungraded} if ungraded else reply
