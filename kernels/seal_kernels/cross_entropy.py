"""Log probabilities of target tokens, and their cross entropy, straight from hidden states: lm_head and loss in one.

    z_t = weight @ hidden_t             logprobs_t = z_t[target_t] - log(sum_v exp(z_tv))

Logits exist for one chunk of tokens at a time, in one buffer that all chunks use, never as [T, V]. The gradient of
any loss of the logprobs is a multiple, row by row, of the unit gradient

    U_t = d logprobs_t / d hidden_t = sum_v (1[v = target_t] - softmax(z_t)_v) weight_v

which the forward computes while a chunk's logits are at hand. It saves U alone, in float32 so that a 16-bit gradient
is rounded once; backward is dlogprobs_t U_t.

With soft targets, K ids and weights per token as in distillation (arXiv 1503.02531), what is differentiated is

    sums_t = sum_k weights_tk logprobs_tk        U_t = sum_v (w_tv - S_t softmax(z_t)_v) weight_v

where w_tv is the weight of word v (of an id that occurs twice, both weights together) and S_t = sum_k weights_tk. The
weights are known in the forward, so one gradient per token is saved whatever K is.

Shapes: hidden [T, D]; weight [V, D], frozen; targets [T] int64, negative where a token has no target; logprobs [T].
FLOPs: 2 T D V for the logprobs and 2 T D V more for U, in matrix products of chunk_tokens rows, by the vendor's
library. Bytes per token between them, b per element: 4 V written by the product, 4 V read for the sum of exponentials,
4 V read and b V written for onehot - softmax, b V read by the second product; each chunk reads weight twice. The
products are compute bound on a GPU if the chunk is long enough, the rest is memory bound.
"""

import torch
from torch import Tensor

from seal_kernels.dispatch import LaunchConfig, apply, block_size, tl, triton, use_triton
from seal_kernels.linear import float32_product, multiply, multiply_backward

IGNORE = -1  # the target of a token without one; any negative number means the same (-100 too)
MAX_IDS = 256  # per token, of soft targets: a program compares them all with each other
# Of logits and their gradient. On a GPU a chunk reads weight twice and must be long enough to hide that: 1024 tokens of
# 152000 words in 16 bits. On a CPU, whose products are slower, fresh memory costs more than that.
CHUNK_BYTES = 896 * 2**20
CPU_CHUNK_BYTES = 224 * 2**20


def token_logprobs_ref(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """All logits in hidden's dtype, then log softmax in float32 (float64 for float64 input)."""
    logits = torch.nn.functional.linear(hidden, weight.to(hidden.dtype))
    logprobs = logits.to(torch.promote_types(hidden.dtype, torch.float32)).log_softmax(-1)
    logprobs = logprobs.gather(1, targets.clamp_min(0)[:, None]).squeeze(1)
    return logprobs.masked_fill(targets < 0, 0.0)


def cross_entropy_ref(
    hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(-sum(token_weights * logprobs), logprobs) for logprobs = token_logprobs_ref(...)."""
    logprobs = token_logprobs_ref(hidden, weight, targets)
    if token_weights is None:
        return -logprobs.sum() / (targets >= 0).sum().clamp_min(1), logprobs
    return -(token_weights * logprobs).sum(), logprobs


def soft_target_logprobs_ref(hidden: Tensor, weight: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """(sums [T], logprobs [T, K]) as soft_target_logprobs has them, from all logits."""
    logits = torch.nn.functional.linear(hidden, weight.to(hidden.dtype))
    logprobs = logits.to(torch.promote_types(hidden.dtype, torch.float32)).log_softmax(-1)
    logprobs = logprobs.gather(1, ids.clamp_min(0)).masked_fill(ids < 0, 0.0)
    weights = weights.to(logprobs.dtype)
    return (weights * logprobs.masked_fill(weights == 0, 0.0)).sum(1), logprobs.detach()


def chunk_tokens(V: int, element_size: int, chunk_bytes: int) -> int:
    """Tokens whose logits are held at once: chunk_bytes of float32 logits and their gradient, whole matrix tiles.

    element_size: bytes of an element of the gradient, which is the second matrix product's input.
    """
    tokens = chunk_bytes // (V * (4 + element_size))
    return max(16, tokens - tokens % (128 if tokens >= 128 else 16))


@triton.jit
def logprob_kernel(logits_ptr, targets_ptr, logprobs_ptr, grad_ptr, V, GRAD: tl.constexpr, BLOCK_V: tl.constexpr):
    """A program has one row of logits. With GRAD it writes onehot - softmax, which may go where the logits are."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * V
    target = tl.load(targets_ptr + row)
    has_target = target >= 0
    target_col = target.to(tl.int32)
    # A target that is out of range poisons its row rather than read another's memory.
    z_target = tl.load(logits_ptr + target, mask=has_target & (target < V), other=float("nan"))
    peak = tl.full((), -3e38, tl.float32)  # finite: -inf less -inf is NaN
    total = tl.full((), 0.0, tl.float32)  # sum of exp(z - peak): of all words, whatever the target is
    others = tl.full((), 0.0, tl.float32)  # the same, the target left out: 1 - p loses digits where p ~ 1
    # the largest logit and the sum of exponentials, in one pass
    for start in range(0, V, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        z = tl.load(logits_ptr + cols, mask=cols < V, other=float("-inf"))  # [BV]
        new_peak = tl.maximum(peak, tl.max(z, axis=0))
        e, rescale = tl.exp(z - new_peak), tl.exp(peak - new_peak)
        total = total * rescale + tl.sum(e, axis=0)
        others = others * rescale + tl.sum(tl.where(cols == target_col, 0.0, e), axis=0)
        peak = new_peak
    tl.store(logprobs_ptr + row, tl.where(has_target, z_target - peak - tl.log(total), 0.0))
    if GRAD:
        grad_ptr += row * V
        for start in range(0, V, BLOCK_V):
            cols = start + tl.arange(0, BLOCK_V)
            z = tl.load(logits_ptr + cols, mask=cols < V, other=float("-inf"))  # [BV]
            grad = tl.where(cols == target_col, others, -tl.exp(z - peak)) / total
            grad = tl.where(has_target, grad, 0.0).to(grad_ptr.dtype.element_ty)
            tl.store(grad_ptr + cols, grad, mask=cols < V)


@triton.jit
def soft_logprob_kernel(
    logits_ptr, ids_ptr, weights_ptr, sums_ptr, logprobs_ptr, grad_ptr, V, K,
    GRAD: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """A program has a row of logits and its K ids. With GRAD it writes w - S softmax, which may go over the logits."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * V
    offs_k = tl.arange(0, BLOCK_K)
    ids = tl.load(ids_ptr + row * K + offs_k, mask=offs_k < K, other=-1)  # [BK]
    w = tl.load(weights_ptr + row * K + offs_k, mask=(offs_k < K) & (ids >= 0), other=0.0)  # [BK]
    # An id that is out of range poisons its row rather than read another's memory.
    z_ids = tl.load(logits_ptr + ids, mask=(ids >= 0) & (ids < V), other=float("nan"))  # [BK]
    has_id = ids >= 0
    # The likeliest of the ids: 1 - p loses digits only where p > 1/2, so only there.
    z_top = tl.max(tl.where(has_id, z_ids, -3e38), axis=0)
    top = tl.max(tl.where(has_id & (z_ids == z_top), ids, -1), axis=0).to(tl.int32)
    peak = tl.full((), -3e38, tl.float32)  # finite: -inf less -inf is NaN
    total = tl.full((), 0.0, tl.float32)  # sum of exp(z - peak)
    others = tl.full((), 0.0, tl.float32)  # the same, the likeliest id left out
    # the largest logit and the sum of exponentials, in one pass
    for start in range(0, V, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        z = tl.load(logits_ptr + cols, mask=cols < V, other=float("-inf"))  # [BV]
        new_peak = tl.maximum(peak, tl.max(z, axis=0))
        e, rescale = tl.exp(z - new_peak), tl.exp(peak - new_peak)
        total = total * rescale + tl.sum(e, axis=0)
        others = others * rescale + tl.sum(tl.where(cols == top, 0.0, e), axis=0)
        peak = new_peak
    logprobs = tl.where(has_id, z_ids - peak - tl.log(total), 0.0)  # [BK]
    tl.store(logprobs_ptr + row * K + offs_k, logprobs, mask=offs_k < K)
    tl.store(sums_ptr + row, tl.sum(tl.where(w != 0.0, w * logprobs, 0.0), axis=0))
    if GRAD:
        grad_ptr += row * V
        w_row = tl.sum(w, axis=0)
        live = tl.max(tl.where(w != 0.0, 1, 0), axis=0) > 0  # a row without weight is 0, even one that is not finite
        for start in range(0, V, BLOCK_V):
            cols = start + tl.arange(0, BLOCK_V)
            z = tl.load(logits_ptr + cols, mask=cols < V, other=float("-inf"))  # [BV]
            grad = tl.where(live, -w_row * tl.exp(z - peak) / total, 0.0)
            tl.store(grad_ptr + cols, grad.to(grad_ptr.dtype.element_ty), mask=cols < V)
        # the words that have weight, over what the loop wrote; equal ids write equal numbers
        tl.debug_barrier()
        same = (ids[:, None] == ids[None, :]) & has_id[None, :]  # [BK, BK]
        w_word = tl.sum(tl.where(same, w[None, :], 0.0), axis=1)  # [BK]
        p = tl.exp(z_ids - peak) / total
        rest = tl.where(ids == top, others / total, 1.0 - p)
        grad = tl.where(live, w_word * rest - (w_row - w_word) * p, 0.0)
        tl.store(grad_ptr + ids, grad.to(grad_ptr.dtype.element_ty), mask=has_id & (ids < V))


def launch_config(V: int) -> LaunchConfig:
    """Settings for a row of V logits: 16 elements per thread, for enough loads in flight with few rows."""
    block = min(8192, block_size(V))
    return LaunchConfig({"BLOCK_V": block}, num_warps=max(1, block // 512))


def _forward_triton(hidden: Tensor, weight: Tensor, targets: Tensor, unit: Tensor | None) -> Tensor:
    T, V = hidden.shape[0], weight.shape[0]
    chunk = min(T, chunk_tokens(V, hidden.element_size(), CHUNK_BYTES))
    logprobs = torch.empty(T, dtype=torch.float32, device=hidden.device)
    buffer = torch.empty(chunk, V, dtype=torch.float32, device=hidden.device)
    grad_buffer = buffer
    if unit is not None and hidden.dtype != torch.float32:
        grad_buffer = torch.empty(chunk, V, dtype=hidden.dtype, device=hidden.device)
    for first in range(0, T, max(1, chunk)):
        rows = slice(first, min(first + chunk, T))
        logits, grad = buffer[: rows.stop - first], grad_buffer[: rows.stop - first]
        float32_product(hidden[rows], weight.T, logits)
        tensors, options = (logits, targets[rows].contiguous(), logprobs[rows], grad), launch_config(V).options()
        logprob_kernel[(rows.stop - first,)](*tensors, V, GRAD=unit is not None, **options)
        if unit is not None:
            float32_product(grad, weight, unit[rows])
    return logprobs


def _forward_cpu(hidden: Tensor, weight: Tensor, targets: Tensor, unit: Tensor | None) -> Tensor:
    T, V = hidden.shape[0], weight.shape[0]
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    chunk = min(T, chunk_tokens(V, 4, CPU_CHUNK_BYTES))

    logprobs = torch.empty(T, dtype=dtype)
    buffer = torch.empty(chunk, V, dtype=dtype)
    for first in range(0, T, max(1, chunk)):
        rows = slice(first, min(first + chunk, T))
        h, target, z = hidden[rows].to(dtype), targets[rows, None], buffer[: rows.stop - first]
        multiply(h, weight, z)
        z_target, total = _log_softmax_parts(z, target)
        logprobs[rows] = (z_target - total.log()).squeeze(1)
        if unit is not None:
            # Summed without the target: 1 - softmax would lose the digits of the gradient where softmax is near 1.
            others = z.scatter_(1, target, 0.0).sum(1, keepdim=True)
            z.scatter_(1, target, -others)
            multiply_backward(z, weight, unit[rows]).div_(-total)
    return logprobs


def _soft_forward_triton(
    hidden: Tensor, weight: Tensor, ids: Tensor, weights: Tensor, unit: Tensor | None
) -> tuple[Tensor, Tensor]:
    T, V, K = hidden.shape[0], weight.shape[0], ids.shape[1]
    chunk = min(T, chunk_tokens(V, hidden.element_size(), CHUNK_BYTES))
    sums = torch.empty(T, dtype=torch.float32, device=hidden.device)
    logprobs = torch.empty(T, K, dtype=torch.float32, device=hidden.device)
    buffer = torch.empty(chunk, V, dtype=torch.float32, device=hidden.device)
    grad_buffer = buffer
    if unit is not None and hidden.dtype != torch.float32:
        grad_buffer = torch.empty(chunk, V, dtype=hidden.dtype, device=hidden.device)
    options = {"BLOCK_K": block_size(K), **launch_config(V).options()}
    for first in range(0, T, max(1, chunk)):
        rows = slice(first, min(first + chunk, T))
        logits, grad = buffer[: rows.stop - first], grad_buffer[: rows.stop - first]
        float32_product(hidden[rows], weight.T, logits)
        tensors = (logits, ids[rows].contiguous(), weights[rows].contiguous(), sums[rows], logprobs[rows], grad)
        soft_logprob_kernel[(rows.stop - first,)](*tensors, V, K, GRAD=unit is not None, **options)
        if unit is not None:
            float32_product(grad, weight, unit[rows])
    return sums, logprobs


def _soft_forward_cpu(
    hidden: Tensor, weight: Tensor, ids: Tensor, weights: Tensor, unit: Tensor | None
) -> tuple[Tensor, Tensor]:
    T, V, K = hidden.shape[0], weight.shape[0], ids.shape[1]
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    chunk = min(T, chunk_tokens(V, 4, CPU_CHUNK_BYTES))
    weights = weights.to(dtype).masked_fill(ids < 0, 0.0)
    logprobs = torch.empty(T, K, dtype=dtype)
    buffer = torch.empty(chunk, V, dtype=dtype)
    for first in range(0, T, max(1, chunk)):
        rows = slice(first, min(first + chunk, T))
        h, z, w = hidden[rows].to(dtype), buffer[: rows.stop - first], weights[rows]
        multiply(h, weight, z)
        has_id = ids[rows] >= 0
        z_ids = z.gather(1, ids[rows].clamp_min(0)).masked_fill(~has_id, float("-inf"))
        top = ids[rows].gather(1, z_ids.argmax(1, keepdim=True)).clamp_min(0)  # the likeliest of the ids
        at = torch.where(has_id, ids[rows], top)
        chosen, total = _log_softmax_parts(z, at)
        logprobs[rows] = (chosen - total.log()).masked_fill(~has_id, 0.0)
        if unit is not None:
            # The likeliest id is left out of a sum of its own: 1 - softmax would lose digits where softmax is near 1.
            others = z.scatter_(1, top, 0.0).sum(1, keepdim=True)
            p = chosen.exp() / total
            rest = torch.where(at == top, others / total, 1.0 - p)
            w_row = w.sum(1, keepdim=True)
            w_word = ((at[:, :, None] == at[:, None, :]) * w[:, None, :]).sum(2)
            z.mul_(-w_row / total).scatter_(1, at, w_word * rest - (w_row - w_word) * p)
            z.masked_fill_((w == 0).all(1, keepdim=True), 0.0)
            multiply_backward(z, weight, unit[rows])
    return (weights * logprobs.masked_fill(weights == 0, 0.0)).sum(1), logprobs


def _log_softmax_parts(z: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """z[n, ids[n]] - max z[n] and sum_v exp(z[n, v] - max z[n]), [N, 1]; z [N, V] becomes these exponentials.

    A row's bits depend neither on the ids nor on the other rows: torch splits the sum of a single row, so that is two.
    """
    z.sub_(z.amax(1, keepdim=True))
    chosen = z.gather(1, ids)
    z.exp_()
    total = (z.expand(2, -1) if len(z) == 1 else z).sum(1, keepdim=True)
    return chosen, total[: len(z)]


def logprobs_of(logits: Tensor, ids: Tensor) -> Tensor:
    """log softmax(logits[n])[ids[n, k]], [N, K] float32, for logits [N, V] and ids [N, K] int64; no gradient.

    One number for a token, whichever tokens are asked for; on the CPU that of token_logprobs on equal logits.
    """
    chosen, total = _log_softmax_parts(logits.detach().to(torch.float32, copy=True), ids)
    return chosen - total.log()


class TokenLogprobs(torch.autograd.Function):
    """Saves the unit gradient; on the CPU, only for the rows with a target, together with the numbers of these rows."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, needs_grad: bool) -> Tensor:
        T, rows = hidden.shape[0], None
        on_triton = use_triton(hidden, weight, targets)
        if not on_triton and bool((targets < 0).any()):
            rows = (targets >= 0).nonzero().squeeze(1)
            hidden, targets = hidden[rows], targets[rows]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        unit = torch.empty(hidden.shape, dtype=wide, device=hidden.device) if needs_grad else None
        logprobs = (_forward_triton if on_triton else _forward_cpu)(hidden, weight, targets, unit)
        ctx.save_for_backward(unit, rows)
        ctx.T, ctx.dtype = T, hidden.dtype
        return logprobs if rows is None else logprobs.new_zeros(T).index_copy_(0, rows, logprobs)

    @staticmethod
    def backward(ctx, dlogprobs: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        unit, rows = ctx.saved_tensors
        d = (dlogprobs if rows is None else dlogprobs[rows])[:, None]
        dhidden = torch.mul(unit, d, out=torch.empty(unit.shape, dtype=ctx.dtype, device=unit.device))
        dhidden.masked_fill_(d == 0, 0.0)  # a token that is not in the loss adds nothing, even one that is not finite
        if rows is not None:
            dhidden = dhidden.new_zeros(ctx.T, dhidden.shape[1]).index_copy_(0, rows, dhidden)
        return dhidden, None, None, None


class SoftTargetLogprobs(torch.autograd.Function):
    """Saves the gradient of each row's sum; the log probabilities themselves are not differentiable."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, ids: Tensor, weights: Tensor, needs_grad: bool):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        unit = torch.empty(hidden.shape, dtype=wide, device=hidden.device) if needs_grad else None
        forward = _soft_forward_triton if use_triton(hidden, weight, ids, weights) else _soft_forward_cpu
        sums, logprobs = forward(hidden, weight, ids, weights, unit)
        if needs_grad:
            ctx.mark_non_differentiable(logprobs)
        ctx.save_for_backward(unit)
        ctx.dtype = hidden.dtype
        return sums, logprobs

    @staticmethod
    def backward(ctx, dsums: Tensor, _: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (unit,) = ctx.saved_tensors
        d = dsums[:, None]
        dhidden = torch.mul(unit, d, out=torch.empty(unit.shape, dtype=ctx.dtype, device=unit.device))
        return dhidden.masked_fill_(d == 0, 0.0), None, None, None, None


def soft_target_logprobs(hidden: Tensor, weight: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """(sums, logprobs): logprobs[t, k] = log softmax(weight @ hidden[t])[ids[t, k]], float32, not differentiable, and
    sums[t] = sum_k weights[t, k] logprobs[t, k], differentiable in hidden; minus their sum is the cross entropy.

    hidden: [T, D]. weight: [V, D]; both as for token_logprobs. ids: [T, K] int64, 1 <= K <= MAX_IDS, negative where a
    token has fewer targets; they may repeat. weights: [T, K] float32 of any sign; an id of weight 0 has no part in the
    sum or its gradient, even if it is not finite. Raises ValueError on other shapes and dtypes, and on the CPU on ids
    >= V.
    """
    D, T, V = hidden.shape[-1], len(ids), weight.shape[0]
    fits = hidden.shape == (T, D) and weight.shape == (V, D) and ids.dim() == 2 and 1 <= ids.shape[1] <= MAX_IDS
    if not fits or weights.shape != ids.shape or ids.dtype != torch.int64:
        shapes = ", ".join(f"{x.dtype} {list(x.shape)}" for x in (hidden, weight, ids, weights))
        accepted = "hidden [T, D], weight [V, D], int64 ids and weights [T, K]"
        raise ValueError(f"soft_target_logprobs: {accepted}, not {shapes}")
    if use_triton(hidden, weight, ids, weights):
        if weight.dtype != hidden.dtype or hidden.dtype == torch.float64 or weights.dtype != torch.float32:
            raise ValueError(f"soft_target_logprobs: one dtype, 16 bits or float32, not {hidden.dtype}, {weight.dtype}")
    elif bool((ids >= V).any()):
        raise ValueError(f"soft_target_logprobs: id {int(ids.max())} in a vocabulary of {V}")
    needs_grad = torch.is_grad_enabled() and hidden.requires_grad
    return apply(SoftTargetLogprobs, hidden, weight, ids, weights, needs_grad)


def token_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """logprobs[t] = log softmax(weight @ hidden[t])[targets[t]], float32. Differentiable in hidden; weight is frozen.

    hidden: [T, D]. weight: [V, D], of hidden's dtype; on the CPU it may be narrower (see linear.py).
    targets: [T] int64; where negative the logprob and its gradient are 0. The CPU skips these rows; on CUDA they cost
    as much as others, since counting them would wait for the device: the caller should leave them out. Raises
    ValueError on other shapes and dtypes, and on the CPU on targets >= V. On CUDA such a row's results are NaN.
    float64 hidden (CPU) is computed and returned in float64.
    """
    D, T, V = hidden.shape[-1], targets.numel(), weight.shape[0]
    if hidden.shape != (T, D) or weight.shape != (V, D) or targets.shape != (T,) or targets.dtype != torch.int64:
        shapes = ", ".join(f"{x.dtype} {list(x.shape)}" for x in (hidden, weight, targets))
        raise ValueError(f"cross_entropy: hidden [T, D], weight [V, D] and int64 targets [T], not {shapes}")
    if use_triton(hidden, weight, targets):
        if weight.dtype != hidden.dtype or hidden.dtype == torch.float64:
            raise ValueError(f"cross_entropy: one dtype, 16 bits or float32, not {hidden.dtype} and {weight.dtype}")
    elif bool((targets >= V).any()):
        raise ValueError(f"cross_entropy: target {int(targets.max())} in a vocabulary of {V}")
    needs_grad = torch.is_grad_enabled() and hidden.requires_grad
    return apply(TokenLogprobs, hidden, weight, targets, needs_grad)


def cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(loss, logprobs): loss = -sum_t token_weights[t] * logprobs[t], a float32 scalar, and token_logprobs(...).

    token_weights: [T] float32; None weighs each of the n rows with a target 1/n. A row of weight 0 has no part in
    loss or gradient, even if it is not finite. The logprobs are attached to the graph: more losses may be made of
    them. Raises ValueError as token_logprobs does, and on other token_weights.
    """
    if token_weights is not None and token_weights.shape != targets.shape:
        raise ValueError(f"cross_entropy: token_weights must be {(*targets.shape,)}, not {(*token_weights.shape,)}")
    logprobs = token_logprobs(hidden, weight, targets)
    if token_weights is None:
        return -logprobs.sum() / (targets >= 0).sum().clamp_min(1), logprobs
    return -(token_weights * logprobs.masked_fill(token_weights == 0, 0.0)).sum(), logprobs
