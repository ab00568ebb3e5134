"""The loss of a job's part of a pass, and the losses that a Datum can ask for.

    cross_entropy           -sum_i weights_i logp(token_i)
    cross_entropy, soft     -sum_ik weights_ik logp(id_ik)      target_ids and weights [n, K]
    importance_sampling     -sum_i weights_i advantages_i exp(logp(token_i) - old_logprobs_i)

With soft targets (distillation, arXiv 1503.02531) the weights of a token are probabilities of a teacher, and the loss
is KL(teacher || model) plus the teacher's entropy; weights of any sign are a linear loss of the K log-probabilities.
The sum over k is made where the logits are (seal_kernels/cross_entropy.py), so a token comes here as one number.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seal_engine.training.jobs import Datum
from seal_engine.types import InputError
from seal_kernels.transfer import to_device

# Losses of a sampled token by its old log-probability and advantage, and the defaults of their settings.
POLICY_LOSSES: dict[str, dict[str, float]] = {
    "importance_sampling": {},
    "ppo": {"clip_low": 0.8, "clip_high": 1.2},
    "cispo": {"clip_low": 0.0, "clip_high": 4.0},
    "dro": {"beta": 0.05},
}
LOSSES = ("cross_entropy", *POLICY_LOSSES)
VANISHING = ("importance_sampling", "ppo", "cispo")  # where the advantage is 0
MAX_DIFFERENCE = 80.0  # of log-probabilities: exp of it is a float32, and beyond any bound of a ratio


def job_losses(logprobs: Tensor, counts: Sequence[int], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """(losses [jobs] float64, d losses / d logprobs [n] float32) of the jobs in a pass, each with target tokens of it.

    A job's loss is minus the sum of its target tokens' log-probabilities times its weight: 1 / the target tokens of the
    whole optimizer step, so that the parts of a step sum to its mean. logprobs: [n] float32, the first counts[0] of
    them the first job's, and so on.
    """
    arrays = loss_gradient(counts, weights), -np.array(weights), np.array(counts)
    gradient, scales, lengths = to_device(logprobs.device, *arrays)
    # unsafe: lengths are not checked, for which the host would wait
    sums = torch.segment_reduce(logprobs.detach().double(), "sum", lengths=lengths, unsafe=True)
    return sums * scales, gradient


def loss_gradient(counts: Sequence[int], weights: Sequence[float]) -> np.ndarray:
    """d losses / d logprobs of `job_losses`, [n] float32, which no log-probability has a part in."""
    return np.repeat(-np.array(weights), counts).astype(np.float32)


def datum_loss(datum: Datum, logprobs: Tensor, name: str) -> Tensor:
    """The datum's loss of its [n - 1] log-probabilities; with soft targets these are weighted sums over the K ids."""
    if datum.target_ids is not None:
        return -logprobs.sum()
    if callable(datum.loss):
        loss = datum.loss(logprobs)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            accepted = "a scalar tensor computed from the log-probabilities"
            raise InputError(f"{name}: the callable returned {loss!r:.80}; accepted: {accepted}")
        return loss.reshape(())

    def column(values: Sequence[Any] | None) -> Tensor | None:
        if values is None:
            return None
        return torch.as_tensor(values, dtype=torch.float32).to(logprobs.device)[-len(logprobs) :]

    # A token without weight or advantage is left out before anything is computed from it: 0 times infinity is NaN, in
    # the gradient, too.
    weights, advantages, old = column(datum.weights), column(datum.advantages), column(datum.old_logprobs)
    live = torch.ones_like(logprobs, dtype=torch.bool)
    for factor in (weights, advantages if datum.loss in VANISHING else None):
        live = live if factor is None else live & (factor != 0)
    logprobs = torch.where(live, logprobs, 0.0)
    terms = -logprobs
    if datum.loss in POLICY_LOSSES and advantages is not None and old is not None:
        settings = {**POLICY_LOSSES[str(datum.loss)], **(datum.loss_config or {})}
        terms = _policy_terms(str(datum.loss), logprobs, torch.where(live, old, 0.0), advantages, settings)
    return terms.mean() if weights is None else (weights * terms).sum()


def _policy_terms(
    loss: str, logprobs: Tensor, old: Tensor, advantages: Tensor, settings: Mapping[str, float]
) -> Tensor:
    """Each token's term [n] of a policy loss; with r = exp(logprob - old) and the advantage A:

    importance_sampling: -r A
    ppo: -min(r A, clip(r) A) (arXiv 1707.06347)
    cispo: -clip(r) A logprob, without a gradient through clip(r) (arXiv 2506.13585)
    dro: -(A logprob - beta / 2 (logprob - old)^2) (arXiv 2405.19107)
    """
    difference = logprobs - old
    if loss == "dro":
        return -(advantages * logprobs - settings["beta"] / 2 * difference.square())
    if loss == "importance_sampling":
        return -advantages * difference.exp()
    ratio = difference.clamp(max=MAX_DIFFERENCE).exp()
    clipped = ratio.clamp(settings["clip_low"], settings["clip_high"])
    if loss == "cispo":
        return -clipped.detach() * advantages * logprobs
    return -torch.minimum(ratio * advantages, clipped * advantages)
