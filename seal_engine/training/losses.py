"""The losses of `forward_backward`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from seal_engine.training.jobs import Datum
from seal_engine.types import InputError


def datum_loss(datum: Datum, logprobs: Tensor, name: str) -> Tensor:
    """The datum's loss of its [n - 1] log-probabilities."""
    if callable(datum.loss):
        loss = datum.loss(logprobs)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            accepted = "a scalar tensor computed from the log-probabilities"
            raise InputError(f"{name}: the callable returned {loss!r:.80}; accepted: {accepted}")
        return loss.reshape(())

    def column(values: Sequence[float] | None) -> Tensor | None:
        if values is None:
            return None
        return torch.as_tensor(values, dtype=torch.float32).to(logprobs.device)[-len(logprobs) :]

    terms = -logprobs
    if datum.loss == "importance_sampling":
        old, advantages = column(datum.old_logprobs), column(datum.advantages)
        if old is not None and advantages is not None:
            terms = -advantages * (logprobs - old).exp()
    weights = column(datum.weights)
    return terms.mean() if weights is None else (weights * terms).sum()
