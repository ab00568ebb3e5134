"""The few-shot task: solve a puzzle (ARC) from its demonstrations, after training on what is made of them.

A self-edit is a directive (see directive): one JSON object that chooses augmentations and hyper-parameters. An adapter
is trained on the tasks that it makes of the demonstrations (see arc_tasks), asked the test in several ways, and its
answers vote (see voting).
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice, product

from seal_engine.domains.few_shot.arc import Grid, GridTextError, Task, read_tasks
from seal_engine.domains.few_shot.arc_tasks import LIMIT, MAX_STEPS, TextForm, skip_reason, training_tasks
from seal_engine.domains.few_shot.directive import STRATEGIES, Directive, DirectiveError, NoJSONError, parse
from seal_engine.domains.few_shot.directive_grammar import DirectiveGrammar
from seal_engine.domains.few_shot.voting import TRANSFORMS, Query, queries, score, vote
from seal_engine.engine import Engine
from seal_engine.loop.domain import Candidate, InvalidSelfEditError, Prompt, SelfEditSource
from seal_engine.sampling.requests import LogitsHook, SamplingParams
from seal_engine.training.jobs import SCHEDULERS, TrainJob
from seal_engine.types import LoraConfig, is_integer, renamed_errors, require, require_integers, setting

log = logging.getLogger("seal_engine")
# What the published recipe sets otherwise than for the knowledge task: see LoopConfig.
PUBLISHED = {
    "contexts": 12, "self_edits": 15, "repeats": 1, "rounds": 1, "temperature": 0.8, "top_p": 1.0, "max_tokens": 128,
    "keep": "gain", "keep_reward": 1.0, "policy_rank": 16, "policy_alpha": 16.0, "policy_learning_rate": 5e-5,
    "policy_lr_scheduler": "cosine", "policy_epochs": 8, "policy_batch_size": 5,
}  # fmt: skip


@dataclass(frozen=True)
class FewShotConfig:
    """Puzzles, prompts, the inner loop and voting. Defaults are those of the published recipe."""

    challenges: str = setting("", "ARC's JSON of puzzles, or a directory of them: what to learn from")
    solutions: str = setting("", "JSON of the puzzles' solutions, if they are in another file")
    held_out_challenges: str = setting("", "ARC's JSON of puzzles, or a directory of them: what to measure on")
    held_out_solutions: str = setting("", "JSON of the puzzles' solutions, if they are in another file")
    few_shot_prompt_template: str = setting("", "file: template of a puzzle's prompt")
    example_template: str = setting("", "file: template of one example")
    grid_template: str = setting("", "file: template of a grid")
    directive_template: str = setting("", "file: template of the prompt that the policy continues with a directive")
    chat: bool = setting(False, "send prompts as a user's turn of the model's chat template")
    grammar: bool = setting(False, "let the policy write nothing but valid directives")
    rank: int = setting(128, "LoRA rank r of each adapter")
    alpha: float = setting(16.0, "lora_alpha of each adapter")
    targets: tuple[str, ...] = setting(
        ("q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"), "adapted projections, or all-linear"
    )
    lr_scheduler: str = setting("cosine", "learning-rate schedule of each adapter", SCHEDULERS)
    warmup_steps: int = setting(11, "warm-up steps of each adapter's learning rate")
    batch_size: int = setting(2, "training tasks per optimizer step")
    max_tasks: int = setting(LIMIT, "training tasks per puzzle at most")
    max_steps: int = setting(MAX_STEPS, "optimizer steps at most; a directive that asks for more is invalid")
    max_sequence_tokens: int = setting(8192, "tokens of a training task at most; longer ones are left out")
    recolour: bool = setting(True, "copies of training tasks have other colours")
    leave: tuple[int, ...] = setting((1, 2), "demonstrations that are taken out to make training tasks")
    vote_leave: int = setting(1, "demonstrations that each question is without")
    vote_orders: int = setting(2, "further orders of the demonstrations of each question")
    vote_transforms: bool = setting(True, "ask the puzzle turned and flipped, too")
    attempts: int = setting(2, "grids that count as an answer: those with the most votes")
    answer_tokens: int = setting(1024, "maximum length of an answer, in tokens")
    answer_stop: str = setting("auto", "text that ends an answer; auto: a newline, in a chat the end of the turn")
    fixed_directive: str = setting("", "a directive as JSON: the baseline 'fixed directive'")
    grid_learning_rates: tuple[float, ...] = setting((), "with grid_epochs: the oracle tries all directives with these")
    grid_epochs: tuple[int, ...] = setting((), "with grid_learning_rates: the oracle tries all directives with these")

    def __post_init__(self):
        if self.answer_stop == "auto":  # recorded as what it means
            object.__setattr__(self, "answer_stop", "" if self.chat else "\n")
        require_integers(
            self,
            max_tasks=1,
            max_steps=1,
            max_sequence_tokens=2,
            vote_leave=0,
            vote_orders=0,
            attempts=1,
            answer_tokens=1,
        )
        valid = bool(self.leave) and all(is_integer(n) and n >= 1 for n in self.leave)
        require(valid, "leave", self.leave, "integers >= 1")
        if self.fixed_directive:
            parse(self.fixed_directive)
        for directive in self.grid():
            parse(directive.to_json())
        with renamed_errors({"lora.r": "rank", "lora.lora_alpha": "alpha", "lora.target_modules": "targets"}):
            self.job([[0, 0]], 1e-4, 1).check()

    @property
    def lora(self) -> LoraConfig:
        """Of each adapter."""
        targets = "all-linear" if self.targets == ("all-linear",) else self.targets
        return LoraConfig(self.rank, self.alpha, target_modules=targets)

    def job(self, sequences: Sequence, learning_rate: float, epochs: int) -> TrainJob:
        """The inner loop on some training sequences."""
        return TrainJob(
            sequences,
            self.lora,
            learning_rate,
            self.lr_scheduler,
            warmup_steps=self.warmup_steps,
            num_epochs=epochs,
            batch_size=self.batch_size,
        )

    def grid(self) -> list[Directive]:
        """All directives with the oracle's learning rates and epochs."""
        return [
            Directive(basic, size, chain, repeat, strategy, rate, epochs)
            for basic, size, chain, repeat in product((True, False), repeat=4)
            for strategy, rate, epochs in product(STRATEGIES, self.grid_learning_rates, self.grid_epochs)
        ]


class FewShot:
    """Puzzles as a Domain (see loop/domain.py)."""

    def __init__(
        self,
        config: FewShotConfig,
        engine: Engine,
        train: Sequence[Task] | None = None,
        held_out: Sequence[Task] | None = None,
    ):
        """train, held_out: in place of config's files."""
        self.config = config
        self.engine = engine
        if train is None:
            require(bool(config.challenges), "challenges", config.challenges, "a JSON file of puzzles, or a directory")
            train = read_tasks(config.challenges, config.solutions or None)
        if held_out is None:
            known = bool(config.held_out_challenges)
            held_out = read_tasks(config.held_out_challenges, config.held_out_solutions or None) if known else []
        for task in train:
            solved = all(test.output for test in task.tests)
            require(solved, f"{task.name}: solutions", "a test without one", "one for each test to learn from")
        splits = {"train": train, "held out": held_out}
        self.splits = {name: {f"{name} {task.name}": task for task in tasks} for name, tasks in splits.items()}
        self.tasks = self.splits["train"] | self.splits["held out"]
        self.form = TextForm(
            config.few_shot_prompt_template,
            config.example_template,
            config.grid_template,
            config.directive_template,
            config.chat,
        )
        if config.answer_stop:
            self.form.check_stop(config.answer_stop)
        self.answer_params = SamplingParams(
            temperature=0, max_tokens=config.answer_tokens, stop=config.answer_stop or None
        )
        self._sources: dict[str, SelfEditSource] = {}
        self._add_directives()
        self._queries: dict[str, list[list[Query]]] = {}
        self._grammars: dict[int, DirectiveGrammar] = {}

    def contexts(self, split: str) -> Sequence[str]:
        """Names of the split's puzzles."""
        return list(self.splits[split])

    def prompt(self, context: str) -> Prompt:
        """What the policy continues with a directive."""
        return self.form.ask_self_edit(self.tasks[context], self.engine.tokenizer)

    def logits_hook(self, max_tokens: int) -> LogitsHook | None:
        """The grammar of directives, where the configuration asks for it."""
        if not self.config.grammar:
            return None
        if max_tokens not in self._grammars:  # which takes seconds with a large vocabulary
            pieces = self.engine.tokenizer.pieces(self.engine.config.vocab_size)
            self._grammars[max_tokens] = DirectiveGrammar(pieces, self.engine.stop_token_ids, max_tokens)
        return self._grammars[max_tokens]

    def job(self, context: str, self_edit: str) -> TrainJob:
        """The job that a directive asks for. InvalidSelfEditError for other text, and for one that trains nothing."""
        c, task = self.config, self.tasks[context]
        try:
            directive = parse(self_edit)
        except NoJSONError as error:
            raise InvalidSelfEditError(str(error)) from None
        except DirectiveError as error:
            raise InvalidSelfEditError(str(error), retryable=False) from None
        made = training_tasks(task, directive, leave=c.leave, recolour=c.recolour)
        longest = min(c.max_sequence_tokens, self.engine.config.max_position_embeddings)
        sequences = self.form.sequences(
            made, self.engine.tokenizer, directive.all_tokens, limit=c.max_tasks, max_tokens=longest
        )
        left_out = min(len(made), c.max_tasks) - len(sequences)
        if left_out and longest < c.max_sequence_tokens:  # else the setting says so itself
            log.warning("%s: %d training tasks are left out: longer than %d tokens", context, left_out, longest)
        reason = skip_reason(directive, len(sequences), c.batch_size, c.max_steps)
        if reason:
            raise InvalidSelfEditError(reason, retryable=False)
        return c.job(sequences, directive.learning_rate, directive.num_train_epochs)

    def queries(self, context: str) -> list[list[Query]]:
        """The queries of each test of the puzzle."""
        if context not in self._queries:
            self._queries[context] = self._make_queries(context)
        return self._queries[context]

    def _make_queries(self, context: str) -> list[list[Query]]:
        c, task, longest = self.config, self.tasks[context], self.engine.config.max_position_embeddings
        fits = lambda one: len(self._ask(one)) + c.answer_tokens <= longest  # noqa: E731
        ask = partial(queries, task, leave=c.vote_leave, orders=c.vote_orders, fits=fits)
        made = [ask(test=i, transforms=TRANSFORMS if c.vote_transforms else ()) for i in range(len(task.tests))]
        for i, own in enumerate(made):
            if not own:
                room = f"the model's {longest} tokens with {c.answer_tokens} for the answer (answer_tokens)"
                log.warning("%s: test %d does not fit %s: it counts as wrong", context, i, room)
        return made

    def _ask(self, task: Task) -> list[int]:
        return self.form.ask(task, self.engine.tokenizer)

    def questions(self, context: str) -> Sequence[Prompt]:
        """Every test, in all its ways."""
        return [self._ask(query.task) for own in self.queries(context) for query in own]

    def grade(self, answered: Sequence[tuple[str, Sequence[str]]]) -> list[list[float | None]]:
        """For each test with a known output 1.0 if one of the grids with the most votes is it, else 0.0."""
        scores = [score(self.tasks[context], self.attempts(context, answers)) for context, answers in answered]
        return [[grade for grade in own if grade is not None] for own in scores]

    def attempts(self, context: str, answers: Sequence[str]) -> list[list[Grid]]:
        """For each test the grids that count, from the answers to `questions`."""
        texts = iter(answers)
        made = []
        for own in self.queries(context):
            predictions = [q.prediction(self._read(text)) for q, text in zip(own, islice(texts, len(own)), strict=True)]
            made.append(vote(predictions, self.config.attempts))
        return made

    def _read(self, text: str) -> Grid | None:
        try:
            return self.form.read_answer(text)
        except GridTextError:
            return None

    def baselines(self) -> Mapping[str, Callable[[str], Sequence[Candidate]]]:
        """The puzzle's demonstrations in the prompt, nothing trained."""
        return {"in context": lambda c: [Candidate(c, None, self.questions(c))]}

    def sources(self) -> Mapping[str, SelfEditSource]:
        """A fixed directive, the oracle over a grid of directives, and the sources that were added."""
        return self._sources

    def add_source(self, name: str, writer: SelfEditSource) -> None:
        """Add a source whose self-edits are measured, too."""
        self._sources[name] = writer

    def _add_directives(self) -> None:
        if self.config.fixed_directive:
            text = parse(self.config.fixed_directive).to_json()
            self.add_source("fixed directive", SelfEditSource(lambda contexts, _: [[text]] * len(contexts)))
        texts = [directive.to_json() for directive in self.config.grid()]
        if texts:
            best = SelfEditSource(lambda contexts, _: [texts] * len(contexts), aggregate="max")
            self.add_source("best directive of a grid", best)
