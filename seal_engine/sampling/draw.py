"""The next tokens of a step's sequences: drawn on the device, and read by the host when it needs them."""

from collections import abc
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from seal_engine.model.transformer import Model
from seal_engine.sampling.penalties import keep_min_p, penalize
from seal_engine.sampling.scheduler import Sequence
from seal_kernels.cross_entropy import logprobs_of
from seal_kernels.sampling import LIMIT, sample_tokens
from seal_kernels.transfer import HostCopy, to_device


class Drawn(NamedTuple):
    """A sequence's next token."""

    sequence: Sequence
    token: int  # -1 if the logits are not finite
    logprob: float | None  # where the request asks for it, and so for the most likely tokens
    top_logprobs: dict[int, float] | None


class Draw:
    """The next tokens of sequences, which the device may still be computing."""

    def __init__(self, model: Model, hidden: Tensor, rows: abc.Sequence[int], sequences: list[Sequence], unread: int):
        """Draw each sequence's token from its row of the hidden states [T, D].

        unread: tokens of each sequence, its last ones, that the host has not read yet. Requests must not need them.
        """
        params = [sequence.request.params for sequence in sequences]
        vocab_size = model.config.vocab_size
        last_tokens, *settings = to_device(
            hidden.device,
            np.array(rows),
            np.array([min(p.temperature, LIMIT) for p in params], dtype=np.float32),
            np.array([min(max(0, p.top_k), vocab_size) for p in params], dtype=np.int32),
            np.array([p.top_p for p in params], dtype=np.float32),
            np.array([sequence.seed for sequence in sequences]),
            np.array([len(sequence.completion.token_ids) + unread for sequence in sequences]),
        )
        if rows and list(rows) == list(range(rows[0], rows[0] + len(rows))):  # as in decoding: a view, no launch
            hidden = hidden[rows[0] : rows[-1] + 1]
        else:
            hidden = hidden.index_select(0, last_tokens)
        logits = model.logits(hidden)  # [N, V]
        self.sequences = sequences
        self.tokens, _ = sample_tokens(_adjust_logits(logits, sequences), *settings, with_logprobs=False)  # [N]
        self._logprobs = _Logprobs.of(logits, self.tokens, sequences)
        self._on_host = HostCopy(self.tokens)

    def tokens_of(self, sequences: list[Sequence]) -> Tensor:
        """The tokens of some of the sequences, on the device."""
        if sequences == self.sequences:
            return self.tokens
        rows = {sequence: i for i, sequence in enumerate(self.sequences)}
        (index,) = to_device(self.tokens.device, np.array([rows[sequence] for sequence in sequences]))
        return self.tokens.index_select(0, index)

    def read(self) -> list[Drawn]:
        """Wait for the tokens."""
        logprobs = {} if self._logprobs is None else self._logprobs.read()
        tokens = zip(self.sequences, self._on_host.tolist(), strict=True)
        return [Drawn(sequence, token, *logprobs.get(i, (None, None))) for i, (sequence, token) in enumerate(tokens)]


class _Logprobs(NamedTuple):
    """Log-probabilities of drawn tokens and of the most likely ones there.

    They are the model's own, before hooks and filters, and one computation: a token that is among the most likely ones
    has one number.
    """

    counts: dict[int, int]  # of most likely tokens, for each row whose request asks for them
    ids: HostCopy  # [rows, 1 + k], the drawn token first
    values: HostCopy

    @staticmethod
    def of(logits: Tensor, tokens: Tensor, sequences: abc.Sequence[Sequence]) -> "_Logprobs | None":
        wanted = [sequence.request.params.logprobs for sequence in sequences]
        counts = {i: count for i, count in enumerate(wanted) if count is not None}
        if not counts:
            return None
        (rows,) = to_device(logits.device, np.array(list(counts)))
        logits, tokens = logits[rows], tokens[rows, None].clamp_min(0)
        k = min(max(counts.values()), logits.shape[1])
        ids = torch.cat([tokens, logits.topk(k, dim=1).indices], 1)
        return _Logprobs(counts, HostCopy(ids), HostCopy(logprobs_of(logits, ids)))

    def read(self) -> dict[int, tuple[float, dict[int, float]]]:
        read = {}
        for (i, n), ids, values in zip(self.counts.items(), self.ids.tolist(), self.values.tolist(), strict=True):
            read[i] = values[0], dict(zip(ids[1 : 1 + n], values[1 : 1 + n], strict=True))
        return read


def _adjust_logits(logits: Tensor, sequences: abc.Sequence[Sequence]) -> Tensor:
    """Apply hooks, min_tokens, penalties and min_p. Returns the logits, a copy if any row changed."""
    adjusted = logits
    for i, sequence in enumerate(sequences):
        request, output_ids = sequence.request, sequence.completion.token_ids
        params, hook = request.params, request.params.logits_hook
        stop_ids = request.stop_ids if len(output_ids) < params.min_tokens else ()  # not to be sampled yet
        if not (hook or stop_ids or params.penalizes or params.min_p):
            continue
        if adjusted is logits:
            adjusted = logits.clone()
        if hook:
            try:
                adjusted[i] = hook(list(output_ids), adjusted[i].clone())
            except Exception as error:
                request.output.error = f"logits_hook: {type(error).__name__}: {error}"
        if stop_ids:
            adjusted[i, [token for token in stop_ids if 0 <= token < logits.shape[1]]] = float("-inf")
        if params.penalizes:
            adjusted[i] = penalize(adjusted[i].float(), request.output.prompt_token_ids, output_ids, params)
        if params.min_p:
            adjusted[i] = keep_min_p(adjusted[i], params)
    return adjusted
