"""A job as a list of passes, and the learning rate of each of its optimizer steps.

How a job is cut depends on the job and the token budget alone, so its adapter does not depend on which jobs share its
passes.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from seal_engine.model.adapter_stack import top_mask
from seal_engine.model.adapters import Adapter
from seal_engine.training.jobs import AdamParams, TrainJob, TrainSequence
from seal_engine.types import chunks
from seal_kernels.dispatch import ceil_div


def lr_at_step(job: TrainJob, step: int, total: int) -> float:
    """The learning rate of optimizer step `step` (from 0) of `total`, as Hugging Face's schedules give it."""
    if step < job.warmup_steps:
        return job.learning_rate * step / job.warmup_steps
    if job.lr_scheduler == "constant":
        return job.learning_rate
    progress = (step - job.warmup_steps) / max(1, total - job.warmup_steps)
    if job.lr_scheduler == "cosine":
        return job.learning_rate * max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))
    return job.learning_rate * max(0.0, 1 - progress)


@dataclass(frozen=True)
class MicroStep:
    """What one pass does for a job: some of the sequences of one of its optimizer steps."""

    members: list[int]  # indices of the sequences
    weight: float  # of each target token: 1 / the number of target tokens of the whole optimizer step
    begins_step: bool
    ends_step: bool


class JobState:
    """A job that is being trained."""

    def __init__(self, job_id: int, job: TrainJob, sequences: list[TrainSequence], adapter: Adapter, token_budget: int):
        self.job_id = job_id
        self.job = job
        self.ids = [list(sequence.token_ids) for sequence in sequences]
        self.targets = [target_mask(sequence) for sequence in sequences]
        self.soft = [soft_targets(sequence) for sequence in sequences]
        self.adapter = adapter
        # 1 where the adapter is trained, 0 where it stays as it is; None: all of it is trained.
        whole = job.on_top_of is None and not job.freeze_a
        self.trained = None if whole else top_mask(adapter, job.lora.r, job.freeze_a)
        self.token_budget = token_budget
        microbatches = ceil_div(len(sequences), job.batch_size)
        self.steps_per_epoch = ceil_div(microbatches, job.gradient_accumulation_steps)
        self.total_steps = self.steps_per_epoch * job.num_epochs
        self.losses: list[float] = []
        self.step_loss = 0.0
        self.num_micro_steps = 0
        self.num_tokens = 0
        self.micro_steps = self._micro_steps()
        self.next = next(self.micro_steps, None)

    @property
    def next_tokens(self) -> int:
        """Tokens of the next micro-step; 0 after the last one."""
        return 0 if self.next is None else sum(len(self.ids[i]) for i in self.next.members)

    def _micro_steps(self) -> Iterator[MicroStep]:
        """All micro-steps of the job in order. They depend on the job and the token budget alone."""
        job = self.job
        sequences_per_step = job.batch_size * job.gradient_accumulation_steps
        for epoch in range(job.num_epochs):
            order = list(range(len(self.ids)))
            if job.seed is not None:
                generator = torch.Generator().manual_seed((job.seed * 1_000_003 + epoch) % 2**63)
                order = torch.randperm(len(order), generator=generator).tolist()
            for first in range(0, len(order), sequences_per_step):
                members = order[first : first + sequences_per_step]
                count = sum(sum(self.targets[i]) for i in members)
                yield from self._split_by_budget(members, 1.0 / max(1, count))

    def _split_by_budget(self, members: list[int], weight: float) -> Iterator[MicroStep]:
        """An optimizer step's sequences, split into microbatches, and these by the token budget."""
        cuts: list[list[int]] = []
        for first in range(0, len(members), self.job.batch_size):
            micro = members[first : first + self.job.batch_size]
            cuts += [[micro[i] for i in cut] for cut in chunks([len(self.ids[i]) for i in micro], self.token_budget)]
        for i, cut in enumerate(cuts):
            yield MicroStep(cut, weight, begins_step=i == 0, ends_step=i == len(cuts) - 1)

    def advance(self) -> None:
        """Move on to the next micro-step."""
        self.num_tokens += self.next_tokens
        self.num_micro_steps += 1
        self.next = next(self.micro_steps, None)

    def adam(self) -> AdamParams:
        """The hyper-parameters of the optimizer step that is due."""
        job = self.job
        rate = lr_at_step(job, self.adapter.steps, self.total_steps)
        return AdamParams(rate, job.betas, job.eps, job.weight_decay, job.max_grad_norm)


def soft_targets(sequence: TrainSequence) -> tuple[Tensor, Tensor] | None:
    """The sequence's soft targets as (ids int64, weights float32), [n, K] each; None: its tokens are the targets."""
    if sequence.target_ids is None:
        return None
    return torch.tensor(sequence.target_ids), torch.tensor(sequence.target_weights, dtype=torch.float32)


def target_mask(sequence: TrainSequence) -> list[bool]:
    """Whether each token is a target; the first one never is, as nothing predicts it."""
    mask = sequence.loss_mask
    return [False] + ([True] * (len(sequence.token_ids) - 1) if mask is None else [bool(m) for m in mask[1:]])
