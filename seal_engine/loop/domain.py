"""What the loop asks of a task (Domain), and how the loop itself is set (LoopConfig)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from seal_engine.sampling.requests import LogitsHook, SamplingParams
from seal_engine.training.jobs import SCHEDULERS, TrainJob, TrainSequence
from seal_engine.types import InputError, LoraConfig, is_integer, is_number, require, setting

Prompt = str | list[int]
KEEP = ("best", "gain", "top")
UPDATES = ("merge", "adapter")


class RefusedError(Exception):
    """A self-edit that nothing can be trained on; the message says why. final: it is not drawn again."""

    def __init__(self, reason: str, final: bool = False):
        super().__init__(reason)
        self.final = final


@dataclass(frozen=True)
class Attempt:
    """One way to meet a context's questions: what is trained before (None: nothing), and what is asked."""

    job: TrainJob | None
    questions: Sequence[Prompt]
    refused: str | None = None  # why nothing can be trained: a wrong answer to every question


@dataclass(frozen=True)
class Writer:
    """Someone else who writes self-edits: for each context any number of them, None where one could not be had."""

    write: Callable[[Sequence[str], SamplingParams], Sequence[Sequence[str | None]]]  # contexts, how to sample
    best: bool = False  # a context's best self-edit counts, not their mean


class Domain(Protocol):
    """What a task provides. A context goes by its name, which is unique over both splits."""

    answer_params: SamplingParams  # how questions are answered

    def contexts(self, split: str) -> Sequence[str]:
        """Names of the contexts to learn from ("train"), or to measure on ("held out")."""
        ...

    def prompt(self, context: str) -> Prompt:
        """What the policy continues with a self-edit."""
        ...

    def logits_hook(self, max_tokens: int) -> LogitsHook | None:
        """What keeps the policy to self-edits, of at most so many tokens; None: it writes freely."""
        ...

    def job(self, context: str, self_edit: str) -> TrainJob:
        """What to train on a self-edit; the seed is set by the caller. Raises RefusedError."""
        ...

    def questions(self, context: str) -> Sequence[Prompt]:
        """What each adapter is asked."""
        ...

    def grade(self, answered: Sequence[tuple[str, Sequence[str]]]) -> list[list[float | None]]:
        """For each (context, its answers) the grades, 0 to 1; None: could not be had. As many for each attempt."""
        ...

    def baselines(self) -> Mapping[str, Callable[[str], Sequence[Attempt]]]:
        """What the table shows beside self-edits: attempts for a context."""
        ...

    def writers(self) -> Mapping[str, Writer]:
        """Who else writes self-edits."""
        ...


@dataclass(frozen=True)
class LoopConfig:
    """The outer loop. Defaults are those of the published recipe (knowledge incorporation)."""

    seeds: tuple[int, ...] = setting((0,), "whole runs, one after another, for a spread")
    rounds: int = setting(2, "of E-step and M-step")
    contexts: int = setting(50, "of a round; each round takes the next ones")
    self_edits: int = setting(5, "sampled for each context and round")
    repeats: int = setting(3, "adapters trained on each self-edit, with seeds of their own")
    held_out_self_edits: int = setting(1, "sampled for each held-out context to measure")
    held_out_repeats: int = setting(1, "adapters trained on each of those")
    together: int = setting(0, "self-edits of each held-out context for one adapter on all of them; 0: none")
    temperature: float = setting(1.0, "of self-edits")
    top_p: float = setting(0.95, "of self-edits")
    max_tokens: int = setting(1024, "of a self-edit")
    resamples: int = setting(3, "further tries where a self-edit is refused")
    keep: str = setting("best", "best of each context, all that gain, or the top fraction", KEEP)
    keep_fraction: float = setting(0.2, "of all that could be trained, for keep = top")
    keep_reward: float = setting(0.0, "a kept self-edit has at least this reward")
    shuffle_rewards: bool = setting(False, "a control: every self-edit gets the reward of another")
    policy_rank: int = setting(64, "r of the policy's update")
    policy_alpha: float = setting(128, "lora_alpha of the policy's update")
    policy_learning_rate: float = setting(3e-4, "of the policy's update")
    policy_lr_scheduler: str = setting("linear", "of the policy's update", SCHEDULERS)
    policy_epochs: int = setting(2, "over the kept self-edits")
    policy_batch_size: int = setting(10, "self-edits in a step of the policy's update")
    policy_update: str = setting("merge", "merge into the base, or keep an adapter that writes only", UPDATES)
    max_ungraded: float = setting(0.1, "stop where more than this share of grades is missing")
    writer: str = setting("", "who writes the self-edits of a round, if not the policy: a name that the table shows")
    trials_a_unit: int = setting(250, "adapters trained and asked at once, then recorded")

    def __post_init__(self):
        seeds = self.seeds
        plain = isinstance(seeds, tuple) and bool(seeds) and all(is_integer(s) and 0 <= s < 2**31 for s in seeds)
        require(plain and len(set(seeds)) == len(seeds), "seeds", seeds, "different integers >= 0")
        for name, least in (
            ("rounds", 0), ("contexts", 1), ("self_edits", 1), ("repeats", 1),
            ("held_out_self_edits", 1), ("held_out_repeats", 1),
            ("together", 0), ("max_tokens", 1), ("resamples", 0), ("policy_rank", 1), ("policy_epochs", 1),
            ("policy_batch_size", 1), ("trials_a_unit", 1),
        ):  # fmt: skip
            value = getattr(self, name)
            require(is_integer(value) and value >= least, name, value, f"an integer >= {least}")
        for name in ("keep_fraction", "max_ungraded"):
            value = getattr(self, name)
            require(is_number(value) and 0 <= value <= 1, name, value, "0 to 1")
        require(is_number(self.keep_reward), "keep_reward", self.keep_reward, "a number")
        require(self.keep in KEEP, "keep", self.keep, f"one of {list(KEEP)}")
        require(self.policy_update in UPDATES, "policy_update", self.policy_update, f"one of {list(UPDATES)}")
        _ = SamplingParams(temperature=self.temperature, top_p=self.top_p, max_tokens=self.max_tokens)
        try:
            self.policy_job([TrainSequence([0, 0])]).check()
        except InputError as error:
            raise InputError(f"policy_{str(error).removeprefix('lora.')}") from None

    def policy_job(self, sequences: Sequence[TrainSequence]) -> TrainJob:
        """The M-step's fine-tuning of the policy."""
        lora = LoraConfig(r=self.policy_rank, lora_alpha=self.policy_alpha, target_modules="all-linear")
        return TrainJob(
            sequences, lora, self.policy_learning_rate, self.policy_lr_scheduler,
            num_epochs=self.policy_epochs, batch_size=self.policy_batch_size,
        )  # fmt: skip
