"""The verbs under all training, over any mix of adapters.

`forward_backward` adds to the gradients of the adapters in its data, `forward` computes the same losses without
gradients, `optim_step` advances any set of adapters.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from seal_engine.inputs import check_soft_targets, check_token_ids, integers
from seal_engine.model.adapters import Adapter
from seal_engine.model.lora_batch import LoraBatch
from seal_engine.model.transformer import Model
from seal_engine.training.jobs import AdamParams, Datum, DatumResult
from seal_engine.training.losses import LOSSES, POLICY_LOSSES, datum_loss
from seal_engine.types import InputError, PackedBatch, chunks, is_list, is_number, require
from seal_kernels.adamw import Hyper, adamw_step
from seal_kernels.cross_entropy import IGNORE
from seal_kernels.transfer import to_device


@dataclass(frozen=True)
class AdapterBatch:
    """One adapter's sequences in a pass. targets[i][j]: whether token j of sequence i is a target; token 0 never is.

    target_tokens[i]: what is predicted in place of sequence i's tokens, as many; None: the tokens themselves. soft[i]:
    the soft targets of sequence i's tokens, (ids, weights) [n, K] each; None: one target a token. begins: the adapter's
    gradients begin with this pass: nothing was added to them since the last optimizer step.
    """

    adapter: Adapter
    sequences: Sequence[Sequence[int]]
    targets: Sequence[Sequence[bool]]
    dropout_key: tuple[int, int] = (0, 0)
    soft: Sequence[tuple[Tensor, Tensor] | None] = ()
    target_tokens: Sequence[Sequence[int] | None] = ()
    begins: bool = False


def validate_dtype(model: Model) -> None:
    """InputError for a model that computes in float16: gradients of a mean over many tokens flush to zero there."""
    computes = str(model.compute_dtype).removeprefix("torch.")
    require(computes != "float16", "dtype", computes, "bfloat16 or float32 to train on this device; sampling takes all")


def target_logprobs(
    model: Model, batches: Sequence[AdapterBatch], recompute: str, train: bool = True
) -> tuple[Tensor, list[int], list[Tensor]]:
    """(log-probabilities of all target tokens in order, [n] float32 with a graph; how many of them each adapter has;
    for each sequence with soft targets, the log-probabilities [targets, K] themselves, detached).

    Backward from the first adds to the adapters' gradients; with train=False there is no graph. A token with soft
    targets counts as sum_k weight_k logp(id_k).
    """
    sequences = [sequence for part in batches for sequence in part.sequences]
    targets = [target for part in batches for target in part.targets]
    tokens = [sum(map(len, part.sequences)) for part in batches]
    keys = [part.dropout_key for part in batches]
    counts = [sum(map(sum, part.targets)) for part in batches]
    batch = PackedBatch.pack(sequences, model.device)
    begins = [part.begins for part in batches]
    lora = LoraBatch.make([part.adapter for part in batches], tokens, train, keys, begins)
    hidden = model.hidden_states(batch, lora, recompute=recompute)
    is_target = np.fromiter(chain.from_iterable(targets), np.bool_, sum(tokens))
    predicted = [
        sequence if instead is None else instead
        for part in batches
        for sequence, instead in zip(part.sequences, part.target_tokens or [None] * len(part.sequences), strict=True)
    ]
    target_ids = np.fromiter(chain.from_iterable(predicted), np.int64, len(is_target))[is_target]
    soft = [pair for part in batches for pair in (part.soft or [None] * len(part.sequences))]
    if not any(pair is not None for pair in soft):
        rows, ids = to_device(model.device, is_target.nonzero()[0] - 1, target_ids)
        return model.token_logprobs(hidden.index_select(0, rows), ids), counts, []
    lengths = [sum(target) for target in targets]
    is_soft = np.repeat([pair is not None for pair in soft], lengths)
    rows, hard_rows, soft_rows, hard_ids = to_device(
        model.device, is_target.nonzero()[0] - 1, (~is_soft).nonzero()[0], is_soft.nonzero()[0], target_ids[~is_soft]
    )
    hidden = hidden.index_select(0, rows)
    ids, weights = _stack_soft_targets(soft, targets, model.device)
    sums, of_ids = model.soft_target_logprobs(hidden[soft_rows], ids, weights)
    logprobs = torch.zeros(len(rows), device=model.device).index_copy(0, soft_rows, sums)
    if len(hard_rows):
        logprobs = logprobs.index_copy(0, hard_rows, model.token_logprobs(hidden[hard_rows], hard_ids))
    pairs = [(pair, n) for pair, n in zip(soft, lengths, strict=True) if pair is not None]
    each = of_ids.split([n for _, n in pairs])
    return logprobs, counts, [own[:, : pair[0].shape[1]] for own, (pair, _) in zip(each, pairs, strict=True)]


def _stack_soft_targets(
    soft: Sequence[tuple[Tensor, Tensor] | None], targets: Sequence[Sequence[bool]], device: torch.device
) -> tuple[Tensor, Tensor]:
    """(ids, weights) [soft target tokens, K] of a pass, K being the largest of its sequences'; others are padded."""
    K = max(pair[0].shape[1] for pair in soft if pair is not None)
    rows = []
    for pair, target in zip(soft, targets, strict=True):
        if pair is not None:
            mask, padding = torch.tensor(target, dtype=torch.bool), (0, K - pair[0].shape[1])
            ids = torch.nn.functional.pad(pair[0][mask], padding, value=IGNORE)
            rows.append((ids, torch.nn.functional.pad(pair[1][mask], padding)))
    ids, weights = to_device(device, *(torch.cat(parts).numpy() for parts in zip(*rows, strict=True)))
    return ids, weights


def forward_backward(
    model: Model, data: Sequence[Datum], token_budget: int, recompute: str = "none"
) -> list[DatumResult]:
    """Add the gradient of every datum's loss to its adapter's gradients; returns losses and log-probabilities.

    Any mix of adapters, sequences and losses. Calls accumulate until `optim_step`. Raises InputError naming the datum
    before anything is computed; where a callable loss fails, all gradients are as they were before the call.
    """
    validate_dtype(model)
    validate_data(model, data)
    parts = list(chunks([len(datum.token_ids) for datum in data], token_budget))
    # A callable of a later part may fail after the backward pass of an earlier one.
    needs_rollback = len(parts) > 1 and any(callable(datum.loss) for datum in data)
    before = {datum.adapter: datum.adapter.grads for datum in data}
    if needs_rollback:
        before = {adapter: None if grads is None else grads.clone() for adapter, grads in before.items()}
    try:
        return [result for chunk in parts for result in _run_chunk(model, data, chunk, recompute, backward=True)]
    except BaseException:
        for adapter, grads in before.items():
            if grads is None:
                adapter.release_optimizer_state()
            elif adapter.grads is not None and needs_rollback:
                adapter.grads.copy_(grads)
        raise


def forward(model: Model, data: Sequence[Datum], token_budget: int) -> list[DatumResult]:
    """The losses and log-probabilities of `forward_backward`; no gradient changes. Dropout is off."""
    validate_data(model, data)
    parts = chunks([len(datum.token_ids) for datum in data], token_budget)
    return [result for chunk in parts for result in _run_chunk(model, data, chunk, "none", backward=False)]


def validate_data(model: Model, data: Sequence[Datum]) -> None:
    """InputError naming the first datum, and its field, that cannot be computed."""
    require(is_list(data), "data", data, "a list of Datum")
    for i, datum in enumerate(data):
        _check_datum(datum, f"data[{i}]", model)


def _run_chunk(
    model: Model, data: Sequence[Datum], chunk: list[int], recompute: str, backward: bool
) -> list[DatumResult]:
    """`forward_backward`, or `forward`, of the data whose numbers are in chunk, in one pass."""
    by_adapter: dict[int, list[int]] = {}
    for i in chunk:
        by_adapter.setdefault(data[i].adapter.uid, []).append(i)
    batches = []
    for group in by_adapter.values():
        adapter = data[group[0]].adapter
        if backward:
            adapter.allocate_optimizer_state()
        sequences = [data[i].token_ids for i in group]
        targets = [[False, *[True] * (len(s) - 1)] for s in sequences]
        soft_targets = [_soft_targets(data[i]) for i in group]
        target_tokens = [_target_tokens(data[i]) for i in group]
        batches.append(AdapterBatch(adapter, sequences, targets, soft=soft_targets, target_tokens=target_tokens))
    members = list(chain.from_iterable(by_adapter.values()))
    with torch.set_grad_enabled(backward):
        joined, _, of_ids = target_logprobs(model, batches, recompute, train=backward)
    if not backward:
        joined.requires_grad_()  # for losses that are callables
    parts = joined.split([len(data[i].token_ids) - 1 for i in members])
    logprobs = dict(zip(members, parts, strict=True))
    losses = torch.stack([datum_loss(data[i], logprobs[i], f"data[{i}].loss") for i in chunk])
    if backward:
        losses.sum().backward()
    soft = [i for i in members if data[i].target_ids is not None]
    logprobs |= zip(soft, of_ids, strict=True)
    return [DatumResult(loss, logprobs[i].detach().cpu()) for i, loss in zip(chunk, losses.tolist(), strict=True)]


def _target_tokens(datum: Datum) -> Sequence[int] | None:
    """The datum's target tokens, one for each of its tokens, 0 for the first that nothing predicts."""
    if datum.target_tokens is None:
        return None
    return [0, *integers(datum.target_tokens, "target_tokens")[-(len(datum.token_ids) - 1) :]]


def _soft_targets(datum: Datum) -> tuple[Tensor, Tensor] | None:
    """The datum's soft targets as (ids, weights) [n, K], row 0 for the token that nothing predicts."""
    if datum.target_ids is None:
        return None
    columns = (torch.as_tensor(datum.target_ids), torch.as_tensor(datum.weights, dtype=torch.float32))
    ids, weights = (torch.nn.functional.pad(c, (0, 0, len(datum.token_ids) - len(c), 0)) for c in columns)
    return ids.long(), weights


def optim_step(steps: Sequence[tuple[Adapter, AdamParams]]) -> list[float]:
    """One AdamW step of every adapter in the list, all at once; gradients start at zero again.

    Returns each adapter's gradient norm before clipping. An adapter whose norm is not finite stays as it is, but for
    its gradients. Raises InputError naming the entry: an adapter without gradients, or twice.
    """
    require(is_list(steps), "steps", steps, "a list of (Adapter, AdamParams)")
    seen: set[int] = set()
    for i, entry in enumerate(steps):
        pair = isinstance(entry, Sequence) and len(entry) == 2
        accepted = "(Adapter, AdamParams)"
        require(pair and isinstance(entry[0], Adapter), f"steps[{i}]", entry, accepted)
        require(isinstance(entry[1], AdamParams), f"steps[{i}]", entry, accepted)
        adapter, hyper = entry
        try:
            hyper.check()
        except InputError as error:
            raise InputError(f"steps[{i}].{error}") from None
        if adapter.grads is None:
            raise InputError(f"steps[{i}]: adapter {adapter.uid} has no gradients; call forward_backward first")
        if adapter.uid in seen:
            raise InputError(f"steps[{i}]: adapter {adapter.uid} is in the list twice")
        seen.add(adapter.uid)
    norms = advance_adapters(steps).tolist() if steps else []
    for (adapter, _), norm in zip(steps, norms, strict=True):
        if not math.isfinite(norm):
            adapter.steps -= 1  # its moments have not moved
    return norms


def advance_adapters(steps: Sequence[tuple[Adapter, AdamParams]], zero_grads: bool = True) -> Tensor:
    """`optim_step` without checks; the gradient norms [adapters] stay on the device. zero_grads: see adamw_step."""
    params, grads, exp_avgs, exp_avg_sqs = [], [], [], []
    for adapter, _ in steps:
        if adapter.grads is None or adapter.moments is None:
            raise InputError(f"adapter {adapter.uid} is not being trained")
        adapter.steps += 1
        adapter.version += 1
        params.append(adapter.params)
        grads.append(adapter.grads)
        exp_avgs.append(adapter.moments[0])
        exp_avg_sqs.append(adapter.moments[1])
    hyper = Hyper(
        learning_rate=[h.learning_rate for _, h in steps],
        beta1=[h.betas[0] for _, h in steps],
        beta2=[h.betas[1] for _, h in steps],
        eps=[h.eps for _, h in steps],
        weight_decay=[h.weight_decay for _, h in steps],
        step=[adapter.steps for adapter, _ in steps],
        max_grad_norm=[h.max_grad_norm for _, h in steps],
    )
    return adamw_step(params, grads, exp_avgs, exp_avg_sqs, hyper, zero_grads)


def _check_datum(datum: Datum, name: str, model: Model) -> None:
    require(isinstance(datum, Datum), name, datum, "a Datum")
    require(isinstance(datum.adapter, Adapter), f"{name}.adapter", datum.adapter, "an Adapter")
    datum.adapter.check_model(model.config, f"{name}.adapter")
    check_token_ids(integers(datum.token_ids, f"{name}.token_ids"), f"{name}.token_ids", model.config)
    n = len(datum.token_ids)
    require(
        n >= 2, f"{name}.token_ids", datum.token_ids, "at least two tokens: the second is the first that is predicted"
    )
    known = callable(datum.loss) or datum.loss in LOSSES
    require(known, f"{name}.loss", datum.loss, f"one of {list(LOSSES)} or a callable")
    _check_loss_config(datum, f"{name}.loss_config")
    if datum.target_ids is not None:
        require(datum.loss == "cross_entropy", f"{name}.loss", datum.loss, "cross_entropy beside target_ids")
        for field in ("old_logprobs", "advantages", "target_tokens"):
            require(getattr(datum, field) is None, f"{name}.{field}", getattr(datum, field), "None beside target_ids")
        fields = (f"{name}.target_ids", f"{name}.weights")
        check_soft_targets(datum.target_ids, datum.weights, (n, n - 1), model.config.vocab_size, fields)
        return
    if datum.target_tokens is not None:
        tokens = integers(datum.target_tokens, f"{name}.target_tokens")
        require(len(tokens) in (n, n - 1), f"{name}.target_tokens", f"{len(tokens)} entries", f"{n} or {n - 1} ids")
        check_token_ids(tokens, f"{name}.target_tokens", model.config)
    needed = {"old_logprobs", "advantages"} if datum.loss in POLICY_LOSSES else set()
    for field in ("weights", "old_logprobs", "advantages"):
        values = getattr(datum, field)
        if values is None:
            require(field not in needed, f"{name}.{field}", values, f"{n - 1} numbers")
            continue
        require(not callable(datum.loss), f"{name}.{field}", values, "None with a callable loss")
        try:
            column = torch.as_tensor(values, dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            column = torch.empty(())
        require(column.dim() == 1, f"{name}.{field}", values, f"{n} or {n - 1} numbers")
        require(len(column) in (n, n - 1), f"{name}.{field}", f"{len(column)} entries", f"{n} or {n - 1} numbers")
        require(bool(column.isfinite().all()), f"{name}.{field}", values, "finite numbers")


def _check_loss_config(datum: Datum, name: str) -> None:
    if datum.loss_config is None:
        return
    defaults = {} if callable(datum.loss) else POLICY_LOSSES.get(datum.loss, {})
    fits = isinstance(datum.loss_config, Mapping) and datum.loss_config.keys() <= defaults.keys()
    require(fits, name, datum.loss_config, f"settings of this loss: {list(defaults)}")
    for key, value in datum.loss_config.items():
        require(is_number(value) and value >= 0, f"{name}[{key!r}]", value, "a number >= 0")
    settings = {**defaults, **datum.loss_config}
    ordered = settings.get("clip_low", 0) <= settings.get("clip_high", 0)
    require(ordered, name, datum.loss_config, "clip_low <= clip_high")
