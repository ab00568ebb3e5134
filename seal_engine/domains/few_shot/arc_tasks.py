"""What an adapter is trained on to solve a puzzle: tasks made from its demonstrations, and their text form.

The published recipe (SEAL's, after arXiv 2411.07279): every demonstration in turn is the test of a task that has the
others, or the others but one, as its demonstrations. So N demonstrations give N + N (N - 1) = N^2 tasks. Each is
augmented in every way that the directive chooses; each of all these has a copy with other colours and with its
demonstrations in another order. No task is there twice, none has a grid over 30 x 30, and 250 are kept at most.

Text is made of templates. An example is written by one with {input} and {output}: what stands before {output} is the
question, and the answer is {output} and the rest. So a loss on the answer needs no search for where it begins.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import combinations
from random import Random
from typing import Any, Protocol

from seal_engine.domains.few_shot.arc import Example, Grid, GridText, Task
from seal_engine.domains.few_shot.augmentations import (
    BASIC,
    CHAIN,
    IDENTITY,
    REPEAT,
    SIZE,
    Augmentation,
    random_recolouring,
    random_translation,
)
from seal_engine.domains.few_shot.directive import Directive
from seal_engine.domains.templating import fill, read_template, strip_fence
from seal_engine.training.jobs import TrainSequence
from seal_engine.types import InputError, require

LIMIT = 250  # training tasks
MAX_STEPS = 375
MAX_TOKENS = 8192  # of a training task


class TextTokenizer(Protocol):
    """What is needed of a tokenizer, the engine's or another."""

    @property
    def encode(self) -> Callable[..., list[int]]:
        """Of a text; with add_special_tokens=False without what the tokenizer puts around it."""
        ...

    @property
    def apply_chat_template(self) -> Callable[..., Any]:
        """Of messages, to text with tokenize=False; with add_generation_prompt=True up to where an answer begins."""
        ...


def leave_out(task: Task, count: int) -> list[Task]:
    """Each demonstration as the test of those that are left when it and count - 1 others are taken out."""
    made = []
    for i, test in enumerate(task.train):
        others = task.train[:i] + task.train[i + 1 :]
        kept = len(others) - (count - 1)
        if kept >= 0:
            made += [Task(task.name, train, (test,)) for train in combinations(others, kept)]
    return made


def apply_to_task(augmentation: Augmentation, task: Task) -> Task:
    """The task with all its grids augmented, inputs and outputs, whatever their size becomes."""

    def example(one: Example) -> Example:
        return Example(augmentation.apply(one.input), None if one.output is None else augmentation.apply(one.output))

    return replace(task, train=tuple(map(example, task.train)), tests=tuple(map(example, task.tests)))


def shuffled(task: Task, random: Random) -> Task:
    """The task with its demonstrations in another order, if they have one."""
    order = list(task.train)
    while len(set(order)) > 1 and tuple(order) == task.train:
        random.shuffle(order)
    return replace(task, train=tuple(order))


def training_tasks(
    task: Task, directive: Directive, seed: int = 0, leave: Iterable[int] = (1, 2), recolour: bool = True
) -> list[Task]:
    """Every task that the recipe builds, in a fixed order, each with one test and its output. No limit is applied.

    leave: how many demonstrations are taken out. recolour: colours are permuted in the copies; without any
    augmentation they never are. Translations and colours are drawn anew for each task, and are the same for all its
    grids.
    """
    random = Random(seed)
    fixed = [
        *(BASIC if directive.use_basic_augmentations else ()),
        *(SIZE if directive.use_size_augmentations else ()),
        *(CHAIN if directive.use_chain_augmentations else ()),
        *(REPEAT if directive.use_repeat_augmentations else ()),
    ]
    made = [one for count in leave for one in leave_out(task, count)]
    for one in tuple(made):
        drawn = [random_translation(one, random)] if directive.use_basic_augmentations else []
        new = (apply_to_task(augmentation, one) for augmentation in (*fixed, *drawn))
        made += [one for one in new if one.within_limits]
    made = list(dict.fromkeys(made))
    for one in tuple(made):
        colours = random_recolouring(random) if recolour and fixed else IDENTITY
        made.append(shuffled(apply_to_task(colours, one), random))
    return list(dict.fromkeys(made))


def skip_reason(directive: Directive, count: int, batch_size: int = 2, most: int = MAX_STEPS) -> str | None:
    """Why nothing is trained on `count` tasks, None if something is: the recipe's bound on optimizer steps."""
    if not count:
        return "no training task"
    steps = directive.num_train_epochs * count / batch_size
    if steps <= most:
        return None
    return f"{directive.num_train_epochs} epochs x {count} tasks / {batch_size} are {steps:g} steps, more than {most}"


class TextForm:
    """Tasks as text, by templates: files, or the shipped ones where a path is "". The last newline of one is dropped.

    prompt: what is asked, with {demonstrations} and {query}, a question. example: a question and its answer, with
    {input} and then {output}; each takes a line, or more, of its own. grid: see GridText. self_edit: what the policy
    is asked, with {demonstrations}. chat: send prompts as a user's turn of the model's chat template.
    """

    def __init__(self, prompt: str = "", example: str = "", grid: str = "", self_edit: str = "", chat: bool = False):
        self._prompt = _template(prompt, "few_shot_prompt.txt", "{demonstrations}", "{query}")
        example = _template(example, "few_shot_example.txt", "{input}", "{output}")
        self._question, _, self._rest = example.partition("{output}")
        require("{input}" in self._question, "example template", example, "{input} before {output}")
        self._grids = GridText(_template(grid, "few_shot_grid.txt").strip())  # as answers are
        self._self_edit = _template(self_edit, "few_shot_self_edit.txt", "{demonstrations}")
        self.chat = chat

    def question(self, grid: Grid) -> str:
        """An example up to its output."""
        return fill(self._question, {"input": self._grids.write(grid)})

    def answer(self, grid: Grid) -> str:
        """An example from its output on."""
        return self._grids.write(grid) + self._rest + "\n"

    def read_answer(self, text: str) -> Grid:
        """The grid in an answer, with or without what follows it in an example. GridTextError with the reason.

        A Markdown fence around it is tolerated and, where the grid template is JSON, any spelling of that JSON.
        """
        return self._grids.read(strip_fence(strip_fence(text).removesuffix(self._rest.strip())))

    def check_stop(self, stop: str) -> None:
        """InputError for a stop text that is part of grids: no answer could be right."""
        accepted = f"a text that is not part of a grid such as {self._grids.write(((0, 1), (2, 3)))!r}"
        require(stop not in self._grids.write(((0, 1), (2, 3))), "answer_stop", stop, accepted)

    def demonstrations(self, task: Task) -> str:
        """The task's demonstrations."""
        pairs = ((example.input, example.output) for example in task.train)
        return "".join(self.question(given) + self.answer(output) for given, output in pairs if output is not None)

    def prompt(self, task: Task) -> str:
        """The demonstrations and the question of the task's first test."""
        query = self.question(task.tests[0].input)
        return fill(self._prompt, {"demonstrations": self.demonstrations(task), "query": query})

    def self_edit_prompt(self, task: Task) -> str:
        """What the policy continues with a self-edit: the tests are not in it."""
        return fill(self._self_edit, {"demonstrations": self.demonstrations(task)})

    def ask(self, task: Task, tokenizer: TextTokenizer) -> list[int]:
        """The prompt's token ids."""
        return self._encode(self.prompt(task), tokenizer)

    def ask_self_edit(self, task: Task, tokenizer: TextTokenizer) -> list[int]:
        """The policy's prompt's token ids."""
        return self._encode(self.self_edit_prompt(task), tokenizer)

    def sequence(self, task: Task, tokenizer: TextTokenizer, all_tokens: bool) -> TrainSequence:
        """The prompt with its answer. The answer is encoded by itself, as it will be sampled: it begins a new token."""
        prompt, (test, *_) = self.prompt(task), task.tests
        if test.output is None:
            raise InputError(f"{task.name}: found a test without its output; accepted: one with it, to train on")
        ids, answer = self._encode(prompt, tokenizer), self.answer(test.output)
        if self.chat:
            asked, answered = self._chat(prompt, None, tokenizer), self._chat(prompt, answer, tokenizer)
            if not answered.startswith(asked):
                raise InputError("chat template: found prompts that no chat begins with; accepted: chat off")
            answer = answered.removeprefix(asked)
        rest = tokenizer.encode(answer, add_special_tokens=False)
        return TrainSequence([*ids, *rest], None if all_tokens else [0] * len(ids) + [1] * len(rest))

    def sequences(
        self,
        tasks: Sequence[Task],
        tokenizer: TextTokenizer,
        all_tokens: bool,
        seed: int = 0,
        limit: int = LIMIT,
        max_tokens: int = MAX_TOKENS,
    ) -> list[TrainSequence]:
        """At most `limit` of the tasks that are no longer than `max_tokens`, chosen at random, in their order."""
        order = list(range(len(tasks)))
        Random(seed).shuffle(order)
        kept: dict[int, TrainSequence] = {}
        for i in order:
            if len(kept) == limit:
                break
            sequence = self.sequence(tasks[i], tokenizer, all_tokens)
            if len(sequence.token_ids) <= max_tokens:
                kept[i] = sequence
        return [kept[i] for i in sorted(kept)]

    def _encode(self, text: str, tokenizer: TextTokenizer) -> list[int]:
        if self.chat:
            return tokenizer.encode(self._chat(text, None, tokenizer), add_special_tokens=False)
        return tokenizer.encode(text)

    def _chat(self, prompt: str, answer: str | None, tokenizer: TextTokenizer) -> str:
        turns = [{"role": "user", "content": prompt}]
        if answer is None:
            return tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        return tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": answer}], tokenize=False)


def _template(path: str, shipped: str, *names: str) -> str:
    text = read_template(path, shipped)
    for name in names:
        require(text.count(name) == 1, f"{path or shipped}: {name}", text.count(name), "once")
    return text
