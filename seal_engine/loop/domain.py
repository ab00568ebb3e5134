"""What the loop asks of a task (Domain), and the errors of self-edits and grades."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from seal_engine.errors import RunError
from seal_engine.sampling.requests import LogitsHook, SamplingParams
from seal_engine.training.jobs import TrainJob

Prompt = str | list[int]
AGGREGATES = ("mean", "max")


class InvalidSelfEditError(Exception):
    """A self-edit that nothing can be trained on; the message says why.

    retryable: whether the policy samples another one in its place.
    """

    def __init__(self, reason: str, retryable: bool = True):
        super().__init__(reason)
        self.retryable = retryable


class UngradedError(RunError):
    """Too many grades or self-edits are missing.

    Missing values are excluded from means; above `max_ungraded` the run stops before it records the step.
    """


@dataclass(frozen=True)
class Candidate:
    """A candidate to evaluate on one context: the LoRA job to train first (None: evaluate the base model) and the
    prompts to answer afterwards."""

    context: str
    job: TrainJob | None
    questions: Sequence[Prompt]
    index: int = 0  # tells the candidates of one context apart
    rejected: str | None = None  # why its self-edit is invalid: no adapter, and every answer counts as wrong


@dataclass(frozen=True)
class SelfEditSource:
    """A source of self-edits other than the policy: a file, an endpoint, a template.

    write(contexts, sampling parameters) returns for each context its self-edits, any number of them, with None for one
    that the source failed to give. aggregate: a context's accuracy is the "mean" or the "max" over its self-edits.
    """

    write: Callable[[Sequence[str], SamplingParams], Sequence[Sequence[str | None]]]
    aggregate: str = "mean"


class Domain(Protocol):
    """What a task provides. A context goes by its name, which is unique over both splits."""

    answer_params: SamplingParams  # how questions are answered

    def contexts(self, split: str) -> Sequence[str]:
        """Names of the contexts to learn from ("train"), or to measure on ("held out")."""
        ...

    def prompt(self, context: str) -> Prompt:
        """The prompt that the policy continues with a self-edit."""
        ...

    def logits_hook(self, max_tokens: int) -> LogitsHook | None:
        """A hook that keeps the policy to valid self-edits of at most so many tokens; None: it writes freely."""
        ...

    def job(self, context: str, self_edit: str) -> TrainJob:
        """The job that a self-edit asks for; the caller sets its seed. Raises InvalidSelfEditError."""
        ...

    def questions(self, context: str) -> Sequence[Prompt]:
        """The prompts that each adapter answers."""
        ...

    def grade(self, answered: Sequence[tuple[str, Sequence[str]]]) -> list[list[float | None]]:
        """For each (context, its answers) the grades, 0 to 1; None: not gradable. As many for each candidate."""
        ...

    def baselines(self) -> Mapping[str, Callable[[str], Sequence[Candidate]]]:
        """Name -> the candidates of a context, for the methods that the table shows beside self-edits."""
        ...

    def sources(self) -> Mapping[str, SelfEditSource]:
        """Name -> other sources of self-edits."""
        ...


class PassageDomain(Domain, Protocol):
    """A task whose contexts are passages, as the continual experiment needs it.

    contexts("probe"): passages that are never shown, whose questions ask what the model knew before.
    """

    def title(self, context: str) -> str:
        """What the passage is about, as questions name it."""
        ...

    def reading(self, context: str) -> Sequence[Prompt]:
        """The questions with the passage before them."""
        ...
