"""From what a caller hands over, texts, token ids or chats, to checked token ids."""

from collections.abc import Callable, Mapping, Sequence
from operator import index
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seal_engine.files import show
from seal_engine.model.config import ModelConfig
from seal_engine.model.tokenizer import Tokenizer
from seal_engine.training.jobs import TrainJob, TrainSequence
from seal_engine.types import InputError, require
from seal_kernels.cross_entropy import MAX_IDS


class Inputs:
    """Turns sequences into token ids of one model, naming the sequence in every refusal."""

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: Callable[[], Tokenizer],
        end_token_id: Callable[[], int | None],
        stop_token_ids: Callable[[], Sequence[int]],
    ):
        """tokenizer: called when text is first seen; raises InputError where there is none. end_token_id: called for
        the id that ends a training sequence. stop_token_ids: called for all ids that end one.
        """
        self.config = config
        self.tokenizer = tokenizer
        self.end_token_id = end_token_id
        self.stop_token_ids = stop_token_ids

    def sequences(self, sequences: Sequence[str | Sequence[int]]) -> list[list[int]]:
        """Token ids of a list of texts or token id lists. Raises InputError naming the sequence."""
        if isinstance(sequences, str) or not isinstance(sequences, Sequence):
            raise InputError(f"sequences: found {show(sequences)}; accepted: a list of texts or token id lists")
        return [self.token_ids(sequence, f"sequences[{i}]") for i, sequence in enumerate(sequences)]

    def token_ids(self, sequence: str | Sequence[int], name: str) -> list[int]:
        """The token ids of one sequence, or InputError naming it: empty, too long, ids outside the vocabulary."""
        ids = self._encode(sequence, name) if isinstance(sequence, str) else integers(sequence, name)
        self._check(ids, name)
        return ids

    def _encode(self, text: str, name: str) -> list[int]:
        try:
            return self.tokenizer().encode(text)
        except InputError as error:
            raise InputError(f"{name}: {error}") from None

    def _check(self, ids: list[int], name: str) -> None:
        check_token_ids(ids, name, self.config)

    def train_sequences(self, job: TrainJob) -> list[TrainSequence]:
        """A job's sequences with their loss masks, the end token added where the job asks for it."""
        sequences = [self._train_sequence(s, f"sequences[{i}]", job.append_eos) for i, s in enumerate(job.sequences)]
        if not any(any(mask[1:]) for mask in (s.loss_mask for s in sequences) if mask is not None):
            raise InputError("sequences: found no token to predict; accepted: at least one sequence of two tokens")
        return sequences

    def _train_sequence(self, sequence: Any, name: str, append_eos: bool) -> TrainSequence:
        mask: list[int] | None = None
        soft: tuple[Tensor, Tensor] | None = None
        if isinstance(sequence, TrainSequence):
            ids = integers(sequence.token_ids, f"{name}.token_ids")
            if sequence.loss_mask is not None:
                loss_mask = sequence.loss_mask
                if not isinstance(loss_mask, Sequence | Tensor | np.ndarray) or isinstance(loss_mask, str):
                    raise InputError(f"{name}.loss_mask: found {show(loss_mask)}; accepted: 0 or 1 for each token")
                given = list(loss_mask)
                if len(given) != len(ids):
                    raise InputError(f"{name}.loss_mask: found {len(given)} entries; accepted: {len(ids)}, one a token")
                if any(m not in (0, 1) for m in given):
                    raise InputError(f"{name}.loss_mask: found {show(given)}; accepted: 0 or 1 for each token")
                mask = [int(m) for m in given]
            if sequence.target_ids is not None or sequence.target_weights is not None:
                fields = (f"{name}.target_ids", f"{name}.target_weights")
                values = sequence.target_ids, sequence.target_weights
                soft = check_soft_targets(*values, (len(ids),), self.config.vocab_size, fields)
        elif isinstance(sequence, str):
            ids = self._encode(sequence, name)
        elif isinstance(sequence, Sequence) and sequence and all(isinstance(m, Mapping) for m in sequence):
            ids, mask = self._chat(sequence, name)
        else:
            ids = integers(sequence, name)
        mask = [1] * len(ids) if mask is None else mask
        if append_eos and ids and ids[-1] in self.stop_token_ids():
            mask = [*mask[:-1], 1]  # the sequence has its end, which is a target
        elif append_eos:
            ids, mask = [*ids, self._end_token()], [*mask, 1]
        self._check(ids, name)
        if soft is None:
            return TrainSequence(ids, mask)
        target_ids, weights = soft
        if len(ids) > len(target_ids):
            end = torch.full((1, target_ids.shape[1]), ids[-1])
            target_ids, weights = torch.cat([target_ids, end]), torch.cat([weights, torch.eye(1, weights.shape[1])])
        return TrainSequence(ids, mask, target_ids.tolist(), weights.tolist())

    def _chat(self, messages: Sequence[Any], name: str) -> tuple[list[int], list[int]]:
        """A chat through the model's template. The loss is on what its {% generation %} blocks wrote; on every token
        if the template has none."""
        try:
            if self.tokenizer().has_generation_blocks:
                return self.tokenizer().apply_chat_template_with_mask(list(messages))
            ids = self.tokenizer().apply_chat_template(list(messages))
            return ids, [1] * len(ids)
        except InputError as error:
            raise InputError(f"{name}: {error}") from None

    def _end_token(self) -> int:
        end = self.end_token_id()
        if end is None:
            raise InputError("append_eos: neither the configs nor the tokenizer name an end token")
        return end


def check_token_ids(ids: Sequence[int], name: str, config: ModelConfig) -> None:
    """InputError naming the sequence: no token, more than the model takes, or ids outside the vocabulary."""
    if not ids:
        raise InputError(f"{name}: found no token; accepted: at least one")
    longest, vocab_size = config.max_position_embeddings, config.vocab_size
    if len(ids) > longest:
        raise InputError(f"{name}: found {len(ids)} tokens; accepted: at most {longest} (max_position_embeddings)")
    if min(ids) < 0 or max(ids) >= vocab_size:
        position, token = next((i, token) for i, token in enumerate(ids) if not 0 <= token < vocab_size)
        raise InputError(f"{name}: token {position}: found id {show(token)}; accepted: 0 to {vocab_size - 1}")


def check_soft_targets(
    ids: Any, weights: Any, lengths: Sequence[int], vocab_size: int, names: tuple[str, str]
) -> tuple[Tensor, Tensor]:
    """Soft targets as (ids int64, weights float32), [n, K] each, n one of `lengths`. InputError by one of the names."""
    columns = []
    for values, name, dtype in zip((ids, weights), names, (None, torch.float32), strict=True):
        try:
            columns.append(torch.as_tensor(values, dtype=dtype))
        except (TypeError, ValueError, RuntimeError, OverflowError):
            columns.append(torch.empty(()))
        shapes = f"{' or '.join(map(str, lengths))} rows of K numbers, 1 <= K <= {MAX_IDS}"
        shape = columns[-1].shape
        fits = len(shape) == 2 and shape[0] in lengths and 1 <= shape[1] <= MAX_IDS
        require(fits, name, values if len(shape) != 2 else f"{list(shape)} numbers", shapes)
    target_ids, target_weights = columns
    whole = not target_ids.is_floating_point() and target_ids.dtype != torch.bool
    require(whole, names[0], ids, "integers")
    inside = bool(((target_ids >= 0) & (target_ids < vocab_size)).all())
    require(inside, names[0], ids, f"ids from 0 to {vocab_size - 1}")
    same = target_weights.shape == target_ids.shape
    require(same, names[1], f"{list(target_weights.shape)} numbers", f"{list(target_ids.shape)}, as {names[0]}")
    require(bool(target_weights.isfinite().all()), names[1], weights, "finite numbers")
    return target_ids.long(), target_weights


def integers(values: Any, name: str) -> list[int]:
    """A list of Python integers from a sequence, tensor or array of them; bools and floats are refused."""
    plain = values.tolist() if isinstance(values, Tensor | np.ndarray) else values
    try:
        if not isinstance(plain, Sequence) or isinstance(plain, str | bytes | bytearray) or bool in map(type, plain):
            raise TypeError
        return [index(value) for value in plain]
    except TypeError:
        raise InputError(f"{name}: found {show(values)}; accepted: text or a list of integers") from None


def broadcast(values: Any, count: int, kind: Any, name: str, accepted: str) -> Sequence[Any]:
    """One for each of `count`: a list of that many, or one for all."""
    if isinstance(values, kind):
        return [values] * count
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != count:
        raise InputError(f"{name}: found {show(values)}; accepted: {accepted}, or a list of {count} of them")
    for i, value in enumerate(values):
        if not isinstance(value, kind):
            raise InputError(f"{name}[{i}]: found {show(value)}; accepted: {accepted}")
    return values
