"""Penalties on tokens that a text has already, and min_p: what changes a row of logits before it is sampled from.

vLLM's definitions. With c(v) the number of times that token v was sampled, T the temperature and x the logits:

    repetition   x(v) / r if x(v) > 0, else x(v) r, for tokens of the prompt and of the completion
    frequency    x(v) - f c(v)
    presence     x(v) - p if c(v) > 0
    min_p        only tokens whose probability at temperature T is at least min_p times the largest one
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from seal_engine.sampling.requests import SamplingParams


def penalize(logits: Tensor, prompt_ids: Sequence[int], output_ids: Sequence[int], params: SamplingParams) -> Tensor:
    """A row of logits [V] with the request's repetition, frequency and presence penalties applied, in this order."""
    counts = torch.zeros(len(logits), device=logits.device)
    if output_ids:
        ids = torch.tensor(output_ids, device=logits.device)
        counts.index_add_(0, ids, torch.ones(len(output_ids), device=logits.device))
    if params.repetition_penalty != 1:
        seen = counts > 0
        seen[torch.tensor(prompt_ids, device=logits.device)] = True
        repeated = torch.where(logits > 0, logits / params.repetition_penalty, logits * params.repetition_penalty)
        logits = torch.where(seen, repeated, logits)
    return logits - params.frequency_penalty * counts - params.presence_penalty * (counts > 0)


def keep_min_p(logits: Tensor, params: SamplingParams) -> Tensor:
    """A row of logits [V], -inf where the probability is below min_p times the largest. A temperature of 0 keeps all:
    it takes the largest anyway."""
    if params.temperature == 0:
        return logits
    least = logits.max() + params.temperature * math.log(params.min_p)
    return logits.masked_fill(logits < least, float("-inf"))
