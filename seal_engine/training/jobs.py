"""What a front end asks of training, and what it gets back: jobs, data for the two verbs, and their results."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from seal_engine.model.adapters import Adapter
from seal_engine.types import InputError, LoraConfig, is_integer, is_list, is_number, require, require_integers
from seal_kernels.dispatch import ceil_div

SCHEDULERS = ("linear", "cosine", "constant")


@dataclass(frozen=True)
class TrainSequence:
    """Tokens to train on. loss_mask: a 0 or 1 a token; the loss is taken where a token with a 1 is predicted.

    None: on every token but the first.

    target_ids, target_weights: soft targets, K ids and weights a token, in place of the token itself. A token's loss is
    then -sum_k weight_k logp(id_k), which is the forward KL divergence to the weights, up to a constant, where these
    are probabilities. Row i stands for token i; row 0 is not used. With append_eos the end token is its own target.
    """

    token_ids: Sequence[int]
    loss_mask: Sequence[int] | None = None
    target_ids: Sequence[Sequence[int]] | None = None  # [n, K]
    target_weights: Sequence[Sequence[float]] | None = None  # [n, K]


@dataclass(frozen=True)
class TrainJob:
    """One adapter's whole training. Defaults are those of Hugging Face's Trainer and of the published SEAL recipe.

    An optimizer step's loss is the mean over its unmasked target tokens, accumulated microbatches included.
    """

    sequences: Sequence["str | Sequence[int] | TrainSequence | Sequence[Mapping[str, Any]]"]  # the last: a chat
    lora: LoraConfig = field(default_factory=LoraConfig)
    learning_rate: float = 1e-3
    lr_scheduler: str = "linear"  # "linear", "cosine" or "constant", after warmup_steps of linear warm-up
    warmup_steps: int = 0
    num_epochs: int = 1
    batch_size: int = 1  # sequences a microbatch
    gradient_accumulation_steps: int = 1  # microbatches an optimizer step
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0
    seed: int | None = 0  # shuffles each epoch, draws A and dropout; None keeps the order (and draws as 0 does)
    init_from: Adapter | None = None  # start from a copy of this adapter; its config replaces `lora`
    # Train a new adapter, `lora` or a copy of init_from, on top of this one, which stays as it is. The result is one
    # adapter that holds both; see `model.adapter_stack`.
    on_top_of: Adapter | None = None
    freeze_a: bool = False  # train B alone, A stays as drawn or as in init_from (LoRA-FA, arXiv 2308.03303)
    append_eos: bool = False  # add the end token to every sequence, as a target
    checkpoint_dir: str | Path | None = None  # save here and, if a checkpoint of this same job is here, go on from it
    checkpoint_every: int = 100  # optimizer steps between checkpoints

    def check(self) -> None:
        """InputError naming the first field that is out of range; sequences are checked against the model later."""
        require(isinstance(self.lora, LoraConfig), "lora", self.lora, "a LoraConfig")
        self.lora.check()
        AdamParams(self.learning_rate, self.betas, self.eps, self.weight_decay, self.max_grad_norm).check()
        require(self.lr_scheduler in SCHEDULERS, "lr_scheduler", self.lr_scheduler, f"one of {list(SCHEDULERS)}")
        require_integers(
            self, warmup_steps=0, num_epochs=1, batch_size=1, gradient_accumulation_steps=1, checkpoint_every=1
        )
        seed = self.seed
        require(seed is None or (is_integer(seed) and 0 <= seed < 2**63), "seed", seed, "None or an integer >= 0")
        require(isinstance(self.freeze_a, bool), "freeze_a", self.freeze_a, "True or False")
        if self.on_top_of is not None or self.freeze_a:
            decay = self.weight_decay
            require(decay == 0, "weight_decay", decay, "0 beside on_top_of or freeze_a, for parts that stay")
        if self.on_top_of is not None:
            dropout = self.lora.lora_dropout
            require(dropout == 0, "lora.lora_dropout", dropout, "0 beside on_top_of, from which nothing is dropped")
        place = self.checkpoint_dir
        require(place is None or isinstance(place, str | Path), "checkpoint_dir", place, "None or a path")
        require(
            is_list(self.sequences) and len(self.sequences) > 0,
            "sequences",
            self.sequences,
            "a list of at least one sequence",
        )


def min_sequential_steps(job: TrainJob) -> int:
    """How many passes a job takes at least, one after the other; 0 for what cannot be trained."""
    try:
        require(isinstance(job, TrainJob), "job", job, "a TrainJob")
        job.check()
    except InputError:
        return 0
    return job.num_epochs * ceil_div(len(job.sequences), job.batch_size)


@dataclass(frozen=True)
class AdamParams:
    """Hyper-parameters of one AdamW step (arXiv 1711.05101) of one adapter."""

    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float | None = None  # clip this adapter's gradient to this norm; None: do not

    def check(self) -> None:
        """InputError naming the first field that is out of range."""
        for name in ("learning_rate", "eps", "weight_decay"):
            value = getattr(self, name)
            require(is_number(value) and value >= 0, name, value, "a finite number >= 0")
        betas = self.betas
        plain = isinstance(betas, Sequence) and len(betas) == 2 and all(is_number(b) and 0 <= b < 1 for b in betas)
        require(plain, "betas", betas, "two numbers, each 0 <= beta < 1")
        norm = self.max_grad_norm
        require(norm is None or (is_number(norm) and norm > 0), "max_grad_norm", norm, "None or a number > 0")


@dataclass
class TrainResult:
    """What became of a job. A job that failed has an error, the losses until then, and no adapter."""

    adapter: Adapter | None
    losses: list[float]  # one an optimizer step
    num_steps: int
    error: str | None = None
    num_tokens: int = 0  # that it was trained on, all epochs together


@dataclass(frozen=True)
class Datum:
    """One sequence for `forward_backward`, with the loss of its tokens' log-probabilities under `adapter`.

    loss "cross_entropy": -sum_i weights[i] logp(token i). "importance_sampling", "ppo", "cispo" or "dro": losses of
    old_logprobs and advantages, each token's times weights[i] (losses.py has the formulas); loss_config: their
    settings, clip_low and clip_high of r, or beta. Or any function of the [n - 1] float32 log-probabilities of tokens
    1 .. n - 1 to a scalar tensor. Per-token fields have n entries (the first, of a token that nothing predicts, is not
    used) or n - 1. weights None: each 1 / (n - 1), the mean.

    target_tokens: the tokens whose log-probabilities are meant, in place of tokens 1 .. n - 1 of the sequence.

    target_ids: soft targets for "cross_entropy", K ids for each of n or n - 1 tokens in place of the tokens themselves;
    weights, of the same shape and any sign, are then needed, and the loss is minus the sum over i and k of
    weights[i][k] logp(target_ids[i][k]). Ids may repeat; one of weight 0 is padding.
    """

    adapter: Adapter
    token_ids: Sequence[int]
    loss: "str | Callable[[Tensor], Tensor]" = "cross_entropy"
    weights: Sequence[float] | Sequence[Sequence[float]] | None = None
    old_logprobs: Sequence[float] | None = None
    advantages: Sequence[float] | None = None
    target_ids: Sequence[Sequence[int]] | None = None
    loss_config: Mapping[str, float] | None = None
    target_tokens: Sequence[int] | None = None


@dataclass(frozen=True)
class DatumResult:
    """loss, and logprobs [n - 1] float32 of tokens 1 .. n - 1, or [n - 1, K] of target_ids, on the CPU."""

    loss: float
    logprobs: Tensor
