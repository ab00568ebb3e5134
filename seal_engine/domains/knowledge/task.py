"""The knowledge task: learn a passage so well that questions about it are answered without it.

A self-edit is text about the passage, cut into training sequences (see self_edits). Prompts are templates: files in
which {title}, {context} and {question} stand for themselves.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from seal_engine.domains.knowledge.endpoint import Endpoint, complete, count_errors, first_error, read_key
from seal_engine.domains.knowledge.grading import GRADERS, Grader, make_grader
from seal_engine.domains.knowledge.passages import Passage
from seal_engine.domains.knowledge.results import Article, Asked, Judged, Result
from seal_engine.domains.knowledge.seal_files import read_passages
from seal_engine.domains.knowledge.self_edits import split
from seal_engine.domains.templating import fill, read_template
from seal_engine.engine import Engine
from seal_engine.files import strict_json
from seal_engine.loop.domain import Candidate, InvalidSelfEditError, Prompt, SelfEditSource
from seal_engine.loop.ledger import Ledger
from seal_engine.loop.records import SelfEdit, Trial
from seal_engine.sampling.requests import SamplingParams
from seal_engine.training.jobs import SCHEDULERS, TrainJob
from seal_engine.types import InputError, LoraConfig, renamed_errors, require, require_integers, setting

# Fields of a TrainJob -> the settings that they come from.
JOB_SETTINGS = {
    "num_epochs": "epochs", "lora.r": "rank", "lora.lora_alpha": "alpha", "lora.lora_dropout": "dropout",
    "lora.target_modules": "targets",
}  # fmt: skip


@dataclass(frozen=True)
class KnowledgeConfig:
    """Data, prompts, the inner loop and grading. Defaults are those of the published recipe, but for the grader."""

    data: str = setting("", "JSON of passages with questions, as SEAL publishes them")
    held_out_data: str = setting("", "passages to measure on, as data; default: the last ones of data")
    held_out_contexts: int = setting(50, "passages to measure on")
    probe_data: str = setting("", "passages whose questions probe what the model knew before any edit, as data")
    prompt_template: str = setting("", "file: template of the prompt that the policy continues with a self-edit")
    question_template: str = setting("", "file: template of the question prompt")
    reading_template: str = setting("", "file: template of the question prompt with the passage in it")
    chat: bool = setting(False, "send prompts as a user's turn of the model's chat template")
    split_newlines: bool = setting(True, "a self-edit's lines are training sequences of their own")
    with_title: bool = setting(True, "training sequences begin with the passage's title")
    with_passage: bool = setting(True, "the passage itself is a training sequence, too")
    max_sequences: int = setting(0, "training sequences per self-edit at most (0: all)")
    append_eos: bool = setting(False, "training sequences end with the end token")
    rank: int = setting(32, "LoRA rank r of each adapter")
    alpha: float = setting(64, "lora_alpha of each adapter")
    dropout: float = setting(0.0, "lora_dropout of each adapter")
    targets: tuple[str, ...] = setting(("q_proj", "v_proj"), "adapted projections, or all-linear")
    learning_rate: float = setting(1e-3, "learning rate of each adapter")
    lr_scheduler: str = setting("linear", "learning-rate schedule of each adapter", SCHEDULERS)
    epochs: int = setting(10, "epochs over a self-edit's training sequences")
    batch_size: int = setting(1, "training sequences per microbatch")
    gradient_accumulation_steps: int = setting(1, "microbatches per optimizer step")
    passage_copies: int = setting(8, "copies of the passage in the baseline 'passage only, N times'")
    answer_tokens: int = setting(64, "maximum length of an answer, in tokens")
    answer_stop: str = setting("", "text that ends an answer")
    grader: str = setting("contains", "how answers are graded", GRADERS)
    grade_template: str = setting("", "file: template of the prompt of a model that grades")
    self_edits_file: str = setting("", "JSON with completions: self-edits to compare with, source 'file'")
    endpoint: str = setting("", "base URL of an OpenAI-compatible endpoint, for grader or source 'endpoint'")
    endpoint_model: str = setting("", "name of the model at the endpoint")
    endpoint_key_variable: str = setting("OPENAI_API_KEY", "environment variable that holds the endpoint's key")
    endpoint_self_edits: int = setting(0, "self-edits per context that the endpoint writes, for source 'endpoint'")
    endpoint_concurrency: int = setting(8, "requests to the endpoint at once")
    endpoint_timeout: float = setting(120.0, "seconds that a request to the endpoint may take")
    endpoint_fields: str = setting("", "JSON: fields to add to each endpoint request, or null to leave one out")

    def __post_init__(self):
        require_integers(
            self, held_out_contexts=0, max_sequences=0, passage_copies=0, answer_tokens=1, endpoint_self_edits=0
        )
        require(self.grader in GRADERS, "grader", self.grader, f"one of {list(GRADERS)}")
        needs = self.grader == "endpoint" or self.endpoint_self_edits > 0
        require(bool(self.endpoint) or not needs, "endpoint", self.endpoint, "a URL, as grader or self-edits need one")
        self._endpoint_fields()
        with renamed_errors(JOB_SETTINGS):
            self.job(["text"]).check()

    @property
    def lora(self) -> LoraConfig:
        """Of each adapter."""
        targets = "all-linear" if self.targets == ("all-linear",) else self.targets
        return LoraConfig(self.rank, self.alpha, self.dropout, targets)

    def job(self, sequences: Sequence[str]) -> TrainJob:
        """The inner loop on some training sequences."""
        return TrainJob(
            sequences,
            self.lora,
            self.learning_rate,
            self.lr_scheduler,
            num_epochs=self.epochs,
            batch_size=self.batch_size,
            append_eos=self.append_eos,
            gradient_accumulation_steps=self.gradient_accumulation_steps,
        )

    def make_endpoint(self) -> Endpoint | None:
        """The endpoint, if there is one."""
        if not self.endpoint:
            return None
        return Endpoint(
            self.endpoint,
            self.endpoint_model,
            self.endpoint_key_variable,
            self.endpoint_concurrency,
            self.endpoint_timeout,
            fields=self._endpoint_fields(),
        )

    def _endpoint_fields(self) -> dict[str, Any]:
        accepted = 'a JSON object, such as {"max_tokens": null, "max_completion_tokens": 512}'
        try:
            fields = strict_json(self.endpoint_fields or "{}")
        except ValueError as error:
            raise InputError(f"endpoint_fields: not JSON: {error}; accepted: {accepted}") from None
        require(isinstance(fields, dict), "endpoint_fields", self.endpoint_fields, accepted)
        return fields


log = logging.getLogger("seal_engine")


class Knowledge:
    """Passages as a Domain (see loop/domain.py)."""

    def __init__(
        self,
        config: KnowledgeConfig,
        engine: Engine,
        train: Sequence[Passage] | None = None,
        held_out: Sequence[Passage] | None = None,
        probe: Sequence[Passage] = (),
    ):
        """train, held_out, probe: in place of config's files."""
        self.config = config
        self.engine = engine
        if train is None or held_out is None:
            train, held_out = _read_data(config)
        # Titles repeat, so a context's name has its number.
        if config.probe_data:
            probe = read_passages(config.probe_data)
        splits = {"train": train, "held out": held_out, "probe": probe}
        self.splits = {name: _named(name, passages) for name, passages in splits.items()}
        self.passages = {name: passage for split in self.splits.values() for name, passage in split.items()}
        self.answer_params = SamplingParams(
            temperature=0, max_tokens=config.answer_tokens, stop=config.answer_stop or None
        )
        needs = {
            "prompt_template": ["context"],
            "question_template": ["question"],
            "reading_template": ["context", "question"],
        }
        self.templates = {k: read_template(getattr(config, k), f"{k}.txt", *names) for k, names in needs.items()}
        endpoint = config.make_endpoint()
        if endpoint is not None:
            read_key(endpoint.key_variable)  # a key that is not there is missed now
        self.grader: Grader = make_grader(
            config.grader, engine, endpoint, read_template(config.grade_template, "grade.txt"), config.chat
        )
        self._sources: dict[str, SelfEditSource] = {}
        if config.self_edits_file:
            known = {(p.title, p.context): p.completions for p in read_passages(config.self_edits_file)}
            self._sources["file"] = SelfEditSource(lambda contexts, _: [known.get(self._key(c), ()) for c in contexts])
        if config.endpoint_self_edits:
            self._sources["endpoint"] = SelfEditSource(self._ask_endpoint)

    def contexts(self, split: str) -> Sequence[str]:
        """Names of the split's passages: its number and title."""
        return list(self.splits[split])

    def prompt(self, context: str) -> Prompt:
        """What the policy continues with a self-edit."""
        return self._fill("prompt_template", context)

    def logits_hook(self, max_tokens: int) -> None:
        """Self-edits are free text."""

    def prompt_text(self, context: str) -> str:
        """The same as text, outside a chat."""
        return self._text("prompt_template", context)

    def job(self, context: str, self_edit: str) -> TrainJob:
        """The inner loop on the pieces of a self-edit. Raises InvalidSelfEditError where there is none."""
        passage = self.passages[context]
        pieces = split(self_edit, passage.title, None, self.config.split_newlines)[: self.config.max_sequences or None]
        if not pieces:
            raise InvalidSelfEditError("no text to train on")
        job = self._job(passage, [*pieces, *self._passage_sequences(passage, int(self.config.with_passage))])
        longest = self.engine.config.max_position_embeddings - int(self.config.append_eos)
        kept = [text for text in job.sequences if self._fits(str(text), longest)]
        if len(kept) < len(job.sequences):
            count = len(job.sequences) - len(kept)
            log.warning("%s: %d training sequences are left out: longer than %d tokens", context, count, longest)
        if not kept:
            raise InvalidSelfEditError(f"no training sequence of at most {longest} tokens")
        return replace(job, sequences=kept)

    def _fits(self, text: str, longest: int) -> bool:
        """Whether a text has at most so many tokens; a token of any tokenizer is at least a byte."""
        special = 8  # more than a tokenizer puts around a text
        return (
            len(text.encode("utf-8", "replace")) + special <= longest
            or len(self.engine.tokenizer.encode(text)) <= longest
        )

    def questions(self, context: str) -> Sequence[Prompt]:
        """The passage's questions, without the passage."""
        return [self._fill("question_template", context, q.question) for q in self.passages[context].questions]

    def grade(self, answered: Sequence[tuple[str, Sequence[str]]]) -> list[list[float | None]]:
        """All answers through one call of the grader."""
        asked = [
            (question.question, question.answer, answer)
            for context, answers in answered
            for question, answer in zip(self.passages[context].questions, answers, strict=True)
        ]
        grades = iter(self.grader(asked))
        return [[next(grades) for _ in answers] for _, answers in answered]

    def baselines(self) -> Mapping[str, Callable[[str], Sequence[Candidate]]]:
        """No adapter; the passage in the prompt; the passage alone, once and passage_copies times."""
        made = {
            "no adapter": lambda c: [Candidate(c, None, self.questions(c))],
            "passage in the prompt": lambda c: [Candidate(c, None, self.reading(c))],
            "passage only": partial(self._passage_candidate, 1),
        }
        copies = self.config.passage_copies
        if copies:
            made[f"passage only, {copies} times"] = partial(self._passage_candidate, copies)
        return made

    def sources(self) -> Mapping[str, SelfEditSource]:
        """Self-edits from a file, from an endpoint, and the sources that were added."""
        return self._sources

    def add_source(self, name: str, writer: SelfEditSource) -> None:
        """Add a source whose self-edits are measured, too."""
        self._sources[name] = writer

    def _passage_candidate(self, copies: int, context: str) -> list[Candidate]:
        passage = self.passages[context]
        job = self._job(passage, self._passage_sequences(passage, copies))
        return [Candidate(context, job, self.questions(context))]

    def _passage_sequences(self, passage: Passage, copies: int) -> list[str]:
        return split("", passage.title, passage.context) * copies

    def _job(self, passage: Passage, sequences: Sequence[str]) -> TrainJob:
        title = f"{passage.title}\n"
        return self.config.job(sequences if self.config.with_title else [s.removeprefix(title) for s in sequences])

    def title(self, context: str) -> str:
        """The passage's title."""
        return self.passages[context].title

    def reading(self, context: str) -> list[Prompt]:
        """The passage's questions, with the passage."""
        return [self._fill("reading_template", context, q.question) for q in self.passages[context].questions]

    def _text(self, template: str, context: str, question: str = "") -> str:
        passage = self.passages[context]
        values = {"title": passage.title, "context": passage.context, "question": question}
        return fill(self.templates[template], values)

    def _fill(self, template: str, context: str, question: str = "") -> Prompt:
        text = self._text(template, context, question)
        if not self.config.chat:
            return text
        turn = [{"role": "user", "content": text}]
        return self.engine.tokenizer.apply_chat_template(turn, add_generation_prompt=True)

    def _key(self, context: str) -> tuple[str, str]:
        passage = self.passages[context]
        return passage.title, passage.context

    def _ask_endpoint(self, contexts: Sequence[str], params: SamplingParams) -> list[list[str | None]]:
        endpoint, count = self.config.make_endpoint(), self.config.endpoint_self_edits
        if endpoint is None:
            raise InputError("endpoint: found nothing; accepted: a URL")
        prompts = [self.prompt_text(context) for context in contexts for _ in range(count)]
        endpoint = replace(endpoint, fields={"top_p": params.top_p, **endpoint.fields})
        found = complete(endpoint, prompts, params.max_tokens, params.temperature)
        for reason, failed in count_errors(found).items():
            log.warning("%d of %d self-edits could not be had: %s%s", failed, len(found), reason, first_error(found))
        replies = iter(found)
        return [[next(replies).text for _ in range(count)] for _ in contexts]

    def result(self, ledger: Ledger, seed: int, round_number: int) -> Result:
        """What a round's E-step measured, as SEAL's result files have it. Trials that failed answered nothing."""
        phase, c = f"round {round_number}", self.config
        before = {trial.context: trial for trial in ledger.trials(seed, f"{phase}, no adapter")}
        trials = {(trial.context, trial.index, trial.repeat): trial for trial in ledger.trials(seed, phase)}
        edits: dict[str, list[SelfEdit]] = {}
        for edit in ledger.self_edits(seed, phase):
            edits.setdefault(edit.context, []).append(edit)
        repeats = range(int(ledger.config.get("repeats", 1)))
        articles = []
        for context, written in edits.items():
            passage, judged = self.passages[context], []
            for edit in written:
                own = (_asked(passage, r, before[context], trials.get((context, edit.index, r))) for r in repeats)
                judged.append(Judged(edit.text, tuple(chain.from_iterable(own))))
            prompt = self.prompt_text(context)
            articles.append(Article(passage.title, passage.context, tuple(judged), prompt))
        lora = {
            "rank": c.rank,
            "alpha": c.alpha,
            "dropout": c.dropout,
            "epochs": c.epochs,
            "lr": c.learning_rate,
            "batch_size": c.batch_size,
            "grad_accum_steps": c.gradient_accumulation_steps,
        }
        model = Path(str(ledger.config.get("model", ""))).name
        finished = {step: when for step, when, *_ in ledger.steps()}.get(f"seed {seed}, {phase}", ledger.started)
        stamp = datetime.fromisoformat(finished).strftime("%m%d_%H%M%S")
        count = max(map(len, edits.values()), default=0)
        return Result(tuple(articles), stamp, model, c.data, c.split_newlines, count, len(repeats), lora)


def _asked(passage: Passage, repeat: int, before: Trial, trial: Trial | None) -> Iterator[Asked]:
    count = len(passage.questions)
    answers = trial.answers if trial and trial.answers else ("",) * count
    grades = trial.grades if trial and trial.answers else (0.0,) * count
    for i, asked in enumerate(passage.questions):
        yield Asked(repeat, asked.question, asked.answer, before.answers[i], answers[i], before.grades[i], grades[i])


def _named(split: str, passages: Sequence[Passage]) -> dict[str, Passage]:
    return {f"{split} {i:04d} {passage.title}": passage for i, passage in enumerate(passages)}


def validate_sizes(config: KnowledgeConfig, contexts: int) -> None:
    """InputError unless the data has `contexts` passages for a round and the held-out ones: with flags that work."""
    passages, held_out = read_passages(config.data), config.held_out_contexts
    count = len(passages)
    if config.held_out_data:
        held_out_count = len(read_passages(config.held_out_data))
        fits = contexts <= count and held_out <= held_out_count
        text, possible = f"{count} passages and {held_out_count} held out", (count, held_out_count)
    else:
        fits = contexts + held_out <= count
        third = min(count - 1, max(1, count // 3))
        text, possible = f"{count} passages", (count - third, third)
    if not fits:
        flags = f"--contexts {min(contexts, possible[0])} --held-out-contexts {min(held_out, possible[1])}"
        raise InputError(
            f"contexts: found {contexts}, held_out_contexts: found {held_out}; accepted: what the data has, {text}: "
            f"try {flags}"
        )


def _read_data(config: KnowledgeConfig) -> tuple[list[Passage], list[Passage]]:
    """Passages to learn from, and to measure on."""
    require(bool(config.data), "data", config.data, "a JSON file of passages with questions")
    passages, wanted = read_passages(config.data), config.held_out_contexts
    rest = read_passages(config.held_out_data) if config.held_out_data else passages
    most = len(rest) if config.held_out_data else len(rest) - 1
    accepted = f"at most {most}, as {config.held_out_data or config.data} has {len(rest)} passages"
    require(wanted <= most, "held_out_contexts", wanted, accepted)
    if config.held_out_data:
        learned = {(passage.title, passage.context) for passage in passages}
        both = next((p for p in rest[:wanted] if (p.title, p.context) in learned), None)
        found = "" if both is None else f"{both.title}: {both.context:.40}..."
        require(both is None, "held_out_data", found, "passages that are not in data")
        return passages, rest[:wanted]
    return passages[: len(passages) - wanted], passages[len(passages) - wanted :]
