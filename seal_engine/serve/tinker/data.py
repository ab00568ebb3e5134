"""From the data of a forward_backward request to `Datum` objects, and from results to its reply.

Tinker's datum has N tokens and N targets beside them: target i is what token i should be followed by. Here a sequence
predicts its own next tokens, so the sequence gets one token more, whose logits nobody reads, and `target_tokens` says
what is predicted in place of the next tokens. All losses are sums over tokens: a weight that is left out is 1.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch

from seal_engine.model.adapters import Adapter
from seal_engine.serve.tinker.messages import DTYPES, FLOAT32, array, new_message
from seal_engine.training.jobs import Datum, DatumResult
from seal_engine.training.losses import LOSSES, POLICY_LOSSES
from seal_engine.types import InputError

# Losses of the SDK's list that this server refuses, and what to do instead.
REFUSED = {
    "stable_reinforce": "its formula is not public; loss_fn=importance_sampling works",
    "gspo": "ppo and cispo clip by token; loss_fn=ppo works",
    "custom": "losses are not uploaded; forward_backward_custom with a function works",
}
SETTINGS = {"clip_low_threshold": "clip_low", "clip_high_threshold": "clip_high", "beta": "beta"}
INPUTS = ("target_tokens", "weights", "logprobs", "advantages")  # of a loss; others are ignored
MAX_TARGETS = 1024  # of one token


def read_data(request: Any, adapter: Adapter) -> list[Datum]:
    """The data of a ForwardBackwardRequest. InputError naming the field, as the client knows it."""
    loss = request.loss_fn
    if loss in REFUSED:
        raise InputError(f"loss_fn: found {loss!r}: {REFUSED[loss]}; accepted: one of {list(LOSSES)}")
    if loss not in LOSSES:
        raise InputError(f"loss_fn: found {loss!r:.80}; accepted: one of {list(LOSSES)}")
    if not request.data:
        raise InputError("data: found none; accepted: at least one datum")
    config = _loss_config(request)
    return [_read_datum(datum, adapter, loss, config, f"data[{i}]") for i, datum in enumerate(request.data)]


def _loss_config(request: Any) -> dict[str, float] | None:
    """The settings of the loss by this engine's names; None: its defaults."""
    values: dict[str, Any] = dict(request.loss_fn_config)
    for key, value in request.loss_fn_config_v2.items():
        values[key] = value.text or value.number
    accepted = [key for key, name in SETTINGS.items() if name in POLICY_LOSSES.get(request.loss_fn, {})]
    for key, value in values.items():
        if key not in accepted or isinstance(value, str):
            found = f"{key!r:.80} with {value!r:.80}"
            raise InputError(f"loss_fn_config: found {found}; accepted for {request.loss_fn}: numbers as {accepted}")
    return {SETTINGS[key]: value for key, value in values.items()} or None


def _read_datum(message: Any, adapter: Adapter, loss: str, config: Mapping[str, float] | None, name: str) -> Datum:
    tokens = _tokens(message.model_input, f"{name}.model_input")
    inputs = {
        key: _tensor(tensor, f"{name}.loss_fn_inputs[{key!r:.80}]", len(tokens))
        for key, tensor in message.loss_fn_inputs.items()
        if key in INPUTS
    }
    needed = ("target_tokens",) if loss == "cross_entropy" else ("target_tokens", "logprobs", "advantages")
    for key in needed:
        if key not in inputs:
            found = sorted(message.loss_fn_inputs)
            raise InputError(f"{name}.loss_fn_inputs: found {found!r:.200}; accepted for {loss}: with {key}")
    for key in ("clip_low_threshold", "clip_high_threshold"):
        if key in message.loss_fn_inputs:
            raise InputError(f"{name}.loss_fn_inputs: found {key}; accepted: {key} in loss_fn_config, for all tokens")
    targets = inputs["target_tokens"]
    weights = inputs.get("weights", np.ones(targets.shape, np.float32))
    for key in ("weights", "logprobs", "advantages"):
        if key in inputs and inputs[key].shape != targets.shape:
            found = f"shape {list(inputs[key].shape)}"
            accepted = f"{list(targets.shape)}, as target_tokens"
            raise InputError(f"{name}.loss_fn_inputs[{key!r}]: found {found}; accepted: {accepted}")
    if targets.dtype.kind != "i":
        raise InputError(f"{name}.loss_fn_inputs['target_tokens']: found {targets.dtype}; accepted: int64")
    if targets.ndim == 2:
        sequence = [*tokens.tolist(), int(tokens[-1])]
        ids, rows = torch.from_numpy(targets), torch.from_numpy(weights)
        return Datum(adapter, sequence, loss, rows, target_ids=ids)  # type: ignore[arg-type]
    ids = targets.tolist()
    return Datum(
        adapter,
        [*tokens.tolist(), ids[-1]],
        loss,
        weights.tolist(),
        None if loss == "cross_entropy" else inputs["logprobs"].tolist(),
        None if loss == "cross_entropy" else inputs["advantages"].tolist(),
        loss_config=config,
        target_tokens=ids,
    )


def _tokens(chunks: Sequence[Any], name: str) -> np.ndarray:
    """The token ids of a model input, [N]."""
    for i, chunk in enumerate(chunks):
        if not chunk.HasField("encoded_text"):
            raise InputError(f"{name}[{i}]: found a chunk without text; accepted: token ids: this model reads no other")
    parts = [array(chunk.encoded_text.tokens, DTYPES[3], f"{name}.tokens") for chunk in chunks]
    tokens = np.concatenate(parts) if parts else np.empty(0, np.int32)
    if not len(tokens):
        raise InputError(f"{name}: found no token; accepted: at least one")
    return tokens


def _tensor(message: Any, name: str, length: int) -> np.ndarray:
    """A tensor of `length` rows, [N] or [N, K]; what a sparse one leaves out is 0."""
    dtype = DTYPES.get(message.dtype)
    if dtype is None:
        raise InputError(f"{name}: found dtype {message.dtype}; accepted: 1 (float32), 2 (int64) or 3 (int32)")
    sparse = message.HasField("sparse_csr")
    values = array(message.sparse_csr.values if sparse else message.dense, dtype, name)
    shape = tuple(message.shape) if message.shape or sparse else values.shape
    fits = len(shape) in (1, 2) and shape[0] == length and (len(shape) == 1 or 1 <= shape[1] <= MAX_TARGETS)
    if not fits or (not sparse and values.size != np.prod(shape)):
        accepted = f"[{length}] or [{length}, K], as many rows as tokens, K from 1 to {MAX_TARGETS}"
        raise InputError(f"{name}: found {values.size} numbers of shape {list(shape)!r:.80}; accepted: {accepted}")
    if not sparse:
        return values.reshape(shape)
    return _dense(message.sparse_csr, values, shape, name)


def _dense(csr: Any, values: np.ndarray, shape: tuple[int, ...], name: str) -> np.ndarray:
    """The dense array of compressed sparse rows."""
    bounds = array(csr.crow_indices, DTYPES[2], f"{name}.crow_indices")
    columns = array(csr.col_indices, DTYPES[2], f"{name}.col_indices")
    valid = len(shape) == 2 and len(bounds) == shape[0] + 1 and len(columns) == len(values)
    valid = valid and bounds[0] == 0 and bounds[-1] == len(values) and bool((np.diff(bounds) >= 0).all())
    if not valid or not ((columns >= 0) & (columns < shape[1])).all():
        found = f"{len(bounds)} row bounds and {len(columns)} columns for {len(values)} numbers"
        raise InputError(f"{name}: found {found}; accepted: a CSR tensor of shape {list(shape)}")
    dense = np.zeros(shape, values.dtype)
    dense[np.repeat(np.arange(shape[0]), np.diff(bounds)), columns] = values
    return dense


def write_output(results: Sequence[DatumResult]) -> bytes:
    """A ForwardBackwardOutput: the sum of the losses, and each datum's log-probabilities, [N] or [N, K].

    The data of one record have one K, so consecutive data of another K are another record.
    """
    output = new_message("ForwardBackwardOutput")
    output.loss_fn_output_type = "ArrayRecord"
    output.metrics["loss:sum"] = sum(result.loss for result in results)
    arrays = [result.logprobs.numpy() for result in results]
    for trailing, group in groupby(arrays, key=lambda logprobs: logprobs.shape[1:]):
        members = list(group)
        record = output.loss_fn_outputs.add(type_tag="ArrayRecord", num_datums=len(members))
        field = record.fields["logprobs"]
        field.data = b"".join(logprobs.astype(DTYPES[FLOAT32]).tobytes() for logprobs in members)
        sizes = [logprobs.size * DTYPES[FLOAT32].itemsize for logprobs in members]
        field.offsets = np.cumsum([0, *sizes], dtype=DTYPES[2]).tobytes()
        field.dtype = FLOAT32
        field.trailing_shape.extend(trailing)
    return output.SerializeToString()
