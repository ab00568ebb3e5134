"""AdamW on many tensors at once (Loshchilov & Hutter, arXiv 1711.05101), each clipped by its own gradient norm.

A slot is one adapter: parameters p, gradient g and moments m, v, flat and of equal length. With its own learning rate
l, decay w, betas b1 and b2, eps, and count t of its steps, this step included:

    g <- g min(1, max_norm / (|g| + 1e-6))
    p <- p (1 - l w)        m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2
    p <- p - l / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps)        g <- 0

A slot whose norm is not finite keeps its p, m and v to the bit, and its g is zeroed too: its caller sees the norm.

Bytes per element, float32: 4 for the norm, then 32 (four tensors read and written: g is zeroed in the same pass).
About 15 FLOPs per element: memory bound. Sums have a fixed order in which no other slot takes part. Limits of the
launch: 65535 slots.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from seal_kernels.dispatch import LaunchConfig, ceil_div, tl, triton, use_triton
from seal_kernels.transfer import to_device


@dataclass(frozen=True)
class Hyper:
    """Hyper-parameters: sequences of S numbers, one per slot."""

    learning_rate: Sequence[float]
    beta1: Sequence[float]
    beta2: Sequence[float]
    eps: Sequence[float]
    weight_decay: Sequence[float]
    step: Sequence[int]  # from 1: the count once this step is done
    max_grad_norm: Sequence[float | None]  # None or inf: gradients are not clipped


@triton.jit
def _slot(slots_ptr, slot, ALIGNED: tl.constexpr):
    """(p, g, m, v, their length) of a slot, from its record of addresses."""
    at = slots_ptr + slot * 5
    p, g = tl.load(at).to(tl.pointer_type(tl.float32)), tl.load(at + 1).to(tl.pointer_type(tl.float32))
    m, v = tl.load(at + 2).to(tl.pointer_type(tl.float32)), tl.load(at + 3).to(tl.pointer_type(tl.float32))
    size = tl.load(at + 4)
    if ALIGNED:
        p, g, m, v = tl.multiple_of(p, 16), tl.multiple_of(g, 16), tl.multiple_of(m, 16), tl.multiple_of(v, 16)
        size = tl.multiple_of(size, 4)
    return p, g, m, v, size


@triton.jit
def square_sums_kernel(
    slots_ptr, sums_ptr,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):
    slot = tl.program_id(1).to(tl.int64)
    _, g_ptr, _, _, size = _slot(slots_ptr, slot, ALIGNED)
    first = tl.program_id(0).to(tl.int64) * (BLOCK * BLOCKS)
    if first >= size:
        return
    acc = tl.zeros([BLOCK], dtype=tl.float32)
    for block in range(BLOCKS):
        at = first + block * BLOCK + tl.arange(0, BLOCK)
        g = tl.load(g_ptr + at, mask=at < size, other=0.0)  # [BLOCK]
        acc += g * g
    tl.store(sums_ptr + slot * tl.num_programs(0) + tl.program_id(0), tl.sum(acc, axis=0))


@triton.jit
def norm_kernel(
    slots_ptr, sums_ptr, norms_ptr,
    programs,
    SPAN: tl.constexpr, BLOCK: tl.constexpr,
):
    slot = tl.program_id(0).to(tl.int64)
    count = tl.cdiv(tl.load(slots_ptr + slot * 5 + 4), SPAN).to(tl.int32)
    acc = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, count, BLOCK):
        at = first + tl.arange(0, BLOCK)
        acc += tl.load(sums_ptr + slot * programs + at, mask=at < count, other=0.0)
    tl.store(norms_ptr + slot, tl.sqrt_rn(tl.sum(acc, axis=0)))


@triton.jit
def adamw_kernel(
    slots_ptr, hyper_ptr, norms_ptr,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):
    slot = tl.program_id(1).to(tl.int64)
    p_ptr, g_ptr, m_ptr, v_ptr, size = _slot(slots_ptr, slot, ALIGNED)
    first = tl.program_id(0).to(tl.int64) * (BLOCK * BLOCKS)
    if first >= size:
        return
    hyper_ptr += slot * 8
    keep, step_size, inverse_root = tl.load(hyper_ptr), tl.load(hyper_ptr + 1), tl.load(hyper_ptr + 2)
    rest1, beta2, rest2 = tl.load(hyper_ptr + 3), tl.load(hyper_ptr + 4), tl.load(hyper_ptr + 5)
    eps, max_norm = tl.load(hyper_ptr + 6), tl.load(hyper_ptr + 7)
    norm = tl.load(norms_ptr + slot)
    touched = tl.where(norm < float("inf"), size, 0)  # nothing where the norm is not finite
    clip = tl.minimum(max_norm / (norm + 1e-6), 1.0)
    for block in range(BLOCKS):
        at = first + block * BLOCK + tl.arange(0, BLOCK)
        mask = at < touched
        g = tl.load(g_ptr + at, mask=mask, other=0.0) * clip  # [BLOCK]
        m = tl.load(m_ptr + at, mask=mask, other=0.0)  # [BLOCK]
        v = tl.load(v_ptr + at, mask=mask, other=0.0)  # [BLOCK]
        p = tl.load(p_ptr + at, mask=mask, other=0.0)  # [BLOCK]
        m += rest1 * (g - m)
        v = beta2 * v + rest2 * (g * g)
        p = p * keep - step_size * (m / (tl.sqrt_rn(v) * inverse_root + eps))
        tl.store(p_ptr + at, p, mask=mask)
        tl.store(m_ptr + at, m, mask=mask)
        tl.store(v_ptr + at, v, mask=mask)
        tl.store(g_ptr + at, tl.zeros([BLOCK], dtype=tl.float32), mask=at < size)


# A thread reads 16 bytes of a tensor at once. A program takes SPAN elements of a slot in several blocks, so that few
# blocks lie past the end of the shorter slots.
SPAN = 16384
LAUNCH_CONFIGS = {
    "square_sums": LaunchConfig({"BLOCK": 4096, "BLOCKS": SPAN // 4096}, num_warps=8),
    "norm": LaunchConfig({"SPAN": SPAN, "BLOCK": 1024}, num_warps=4),
    "adamw": LaunchConfig({"BLOCK": 2048, "BLOCKS": SPAN // 2048}, num_warps=8),
}


def _step_triton(slots: Sequence[Sequence[Tensor]], hyper: Hyper) -> Tensor:
    device, S = slots[0][0].device, len(slots)
    table = np.array([[*(t.data_ptr() for t in slot), slot[0].numel()] for slot in slots], dtype=np.int64)
    aligned = bool((table % [16, 16, 16, 16, 4] == 0).all())
    rate, beta1, beta2, eps, decay, step = (
        np.array(x, dtype=np.float64)
        for x in (hyper.learning_rate, hyper.beta1, hyper.beta2, hyper.eps, hyper.weight_decay, hyper.step)
    )
    max_norm = np.array([float("inf") if x is None else x for x in hyper.max_grad_norm])
    # In the order that the kernel loads them; bias corrections in float64, as one minus almost one needs.
    columns = (
        1 - rate * decay, rate / (1 - beta1**step), (1 - beta2**step) ** -0.5,
        1 - beta1, beta2, 1 - beta2, eps, max_norm,
    )
    programs = ceil_div(int(table[:, 4].max()), SPAN)
    table, numbers = to_device(device, table, np.stack(columns, axis=1).astype(np.float32))
    sums = torch.empty(S, programs, dtype=torch.float32, device=device)
    norms = torch.empty(S, dtype=torch.float32, device=device)
    if programs:
        square_sums_kernel[(programs, S)](table, sums, ALIGNED=aligned, **LAUNCH_CONFIGS["square_sums"].options())
    norm_kernel[(S,)](table, sums, norms, programs, **LAUNCH_CONFIGS["norm"].options())
    if programs:
        adamw_kernel[(programs, S)](table, numbers, norms, ALIGNED=aligned, **LAUNCH_CONFIGS["adamw"].options())
    return norms


def _step_cpu(slots: Sequence[Sequence[Tensor]], hyper: Hyper, zero_grads: bool) -> Tensor:
    norms = []
    for s, (p, g, m, v) in enumerate(slots):
        norm = torch.linalg.vector_norm(g)
        norms.append(norm)
        if norm.isfinite():
            limit = hyper.max_grad_norm[s]
            # The fused step divides by grad_scale. Steps of a part that the cache holds are slower: calls cost more.
            torch._fused_adamw_(  # pyright: ignore[reportPrivateImportUsage]
                [p], [g], [m], [v], [], [torch.tensor(float(hyper.step[s]))],
                lr=hyper.learning_rate[s], beta1=hyper.beta1[s], beta2=hyper.beta2[s], eps=hyper.eps[s],
                weight_decay=hyper.weight_decay[s], amsgrad=False, maximize=False,
                grad_scale=None if limit is None or norm + 1e-6 <= limit else (norm + 1e-6) / limit,
            )
        if zero_grads:
            g.zero_()
    return torch.stack(norms)


def adamw_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    hyper: Hyper,
    zero_grads: bool = True,
) -> Tensor:
    """One step of AdamW on each of S slots, in place; gradients are zeroed. Returns their norms [S] before clipping.

    zero_grads=False: the caller overwrites them, so that they may have any value after the step (a GPU zeroes them at
    no cost).

    Tensors: S of each kind, a slot's four of one length, flat, contiguous, float32, on one device. A slot whose norm
    is not finite is left as it is but for its gradient. Raises ValueError on tensors or numbers that do not match.
    """
    tensors = (params, grads, exp_avgs, exp_avg_sqs)
    if len({len(x) for x in (*tensors, *vars(hyper).values())}) != 1:
        raise ValueError(f"adamw: {len(params)} slots, but not of every tensor and hyper-parameter")
    slots = list(zip(*tensors, strict=True))
    for slot in slots:
        if any(t.shape != slot[0].shape or t.dtype != torch.float32 or not t.is_contiguous() for t in slot):
            raise ValueError(f"adamw: a slot's tensors must be contiguous float32 of one shape: {tuple(slot[0].shape)}")
        if slot[0].dim() != 1:
            raise ValueError(f"adamw: tensors must be flat, not {tuple(slot[0].shape)}")
    if any(step < 1 for step in hyper.step):
        raise ValueError("adamw: steps count from 1")
    if not slots:
        return torch.empty(0)
    with torch.no_grad():
        if use_triton(*(t for slot in slots for t in slot)):
            return _step_triton(slots, hyper)
        return _step_cpu(slots, hyper, zero_grads)
