"""Drawing the next token of each row of logits: temperature, top-k, top-p, and one random stream per row.

    w_v = floor(2^40 exp((x_v - max x) / temperature))      token = the first v with sum_{i <= v, i kept} w_i > r
    logprob = x_token - log sum_v exp(x_v)                  r = floor(u sum_{i kept} w_i),   0 <= u < 1

Filters keep, in this order, the top_k largest logits, then of these the smallest set of the most probable ones whose
weights sum to at least top_p of the total (Holtzman et al., arXiv 1904.09751). Logits equal to the last one that is
kept are kept too: both filters are one exact threshold on the logit. Temperature 0 takes the largest logit, the first
of equals. The log-probability is under the raw logits: temperature 1, no filter.

Weights are integers: their sums do not depend on the order, so that a row's token does not depend on other rows or on
how a backend cuts the vocabulary, and no rounding can draw a token that has no weight. A token 2^40 times less probable
than the likeliest has none. u is 53 bits of a hash of the row's seed and counter (Steele et al., OOPSLA 2014).

Shapes: logits [N, V]; temperature, top_p float32, top_k int32, seeds and counters int64 [N]; tokens int64, logprobs
float32 [N]. On a GPU a row is one program: one pass over it for the largest logit, one for the weights and half a pass
to draw. A filter narrows a bracket of its threshold. What the pass for the weights tells of four bounds is mostly
enough; else a pass leaves a fifth of the bracket. Once it holds at most 8,192 logits, a pass gathers them, and the
threshold is looked for among these. Passes over a row of 152,064 logits with top-p: 3 where a few hundred are likely,
6 to 7 where they are all of one normal distribution. Bytes per row, b per element: b V, from memory or the cache.
"""

import math

import numpy as np
import torch
from torch import Tensor

from seal_kernels.dispatch import LaunchConfig, block_size, tl, triton, use_triton

SCALE = float(1 << 40)  # the weight of a row's largest logit
MAX_VOCABULARY = 1 << 22  # sums of weights stay below 2^63
LIMIT = 2.0**100  # of temperatures, and of their inverses: a product with one is a number
NONE = -1  # the token of a row that has no distribution


def uniform(seeds: Tensor, counters: Tensor) -> Tensor:
    """[N] float64 in [0, 1): 53 bits of a hash of (seed, counter), the same on every backend. For CPU tensors."""
    golden = np.uint64(0x9E3779B97F4A7C15)

    def mixed(z: np.ndarray) -> np.ndarray:
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
        return z ^ (z >> np.uint64(31))

    seed, counter = seeds.numpy().view(np.uint64), counters.numpy().view(np.uint64)
    z = mixed(mixed(seed + golden) + (counter + np.uint64(1)) * golden)
    return torch.from_numpy((z >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def _weights(probabilities: Tensor) -> Tensor:
    """int64 weights of probabilities relative to the largest."""
    return (probabilities * SCALE).long()


def _inverse(temperature: Tensor) -> Tensor:
    return temperature.clamp(1 / LIMIT, LIMIT).reciprocal()


def sample_tokens_ref(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, seeds: Tensor, counters: Tensor
) -> tuple[Tensor, Tensor]:
    """The equations in Python's integers, one row after the other."""
    tokens, logprobs = [], []
    u = uniform(seeds.cpu(), counters.cpu()).tolist()
    for n, row in enumerate(logits.float().cpu()):
        x, peak = row.tolist(), row.max()
        if row.isnan().any() or not peak.isfinite():
            tokens.append(NONE)
            logprobs.append(math.nan)
            continue
        token, t, k, p = x.index(max(x)), float(temperature[n]), int(top_k[n]), float(top_p[n])
        if t > 0:
            w = _weights(((row - peak) * _inverse(temperature[n].cpu())).exp()).tolist()
            kept = sorted(range(len(x)), key=lambda v: -x[v])
            if 0 < k < len(x):
                kept = [v for v in kept if x[v] >= x[kept[k - 1]]]
            if p < 1:
                mass, target = 0, max(1, int(p * sum(w[v] for v in kept)))
                for v in kept:
                    mass += w[v]
                    if mass >= target:
                        break
                kept = [i for i in kept if x[i] >= x[v]]
            total = sum(w[v] for v in kept)
            left = min(int(u[n] * total), total - 1)
            for token in sorted(kept):
                left -= w[token]
                if left < 0:
                    break
        tokens.append(token)
        logprobs.append(float(row.double().log_softmax(0)[token]))
    return torch.tensor(tokens, device=logits.device), torch.tensor(logprobs, device=logits.device)


@triton.jit
def _mixed(z):
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def _uniform(seed, counter):
    """The kernel's `uniform`."""
    z = _mixed(seed.to(tl.uint64, bitcast=True) + 0x9E3779B97F4A7C15)
    z = _mixed(z + (counter.to(tl.uint64, bitcast=True) + 1) * 0x9E3779B97F4A7C15)
    return (z >> 11).to(tl.int64).to(tl.float64) * (1.0 / (1 << 53))


@triton.jit
def _order(x):
    """A float32 as an integer of the same order, zeros equal; in 64 bits, where the next one never overflows."""
    magnitude = tl.abs(x).to(tl.int32, bitcast=True).to(tl.int64)
    return tl.where(x < 0, -magnitude, magnitude)


@triton.jit
def _float(order):
    """The float32 of an ordered integer."""
    magnitude = tl.abs(order).to(tl.int32).to(tl.float32, bitcast=True)
    return tl.where(order < 0, -magnitude, magnitude)


@triton.jit
def _load(x_ptr, start, n, BLOCK: tl.constexpr):
    cols = start + tl.arange(0, BLOCK)
    return tl.load(x_ptr + cols, mask=cols < n, other=float("-inf")).to(tl.float32)


@triton.jit
def _weight(x, peak, inverse, SCALE: tl.constexpr):
    return (tl.exp((x - peak) * inverse) * SCALE).to(tl.int64)


@triton.jit
def _at_least(x_ptr, n, bounds, peak, inverse, SCALE: tl.constexpr, BLOCK: tl.constexpr):
    """(counts, weights) of those of n numbers that are at least each of the bounds [B], ordered integers: one pass."""
    B: tl.constexpr = bounds.shape[0]
    lowest = _float(bounds)[:, None]
    # a thread adds up its 8 numbers of a block, so that it keeps one sum of each kind
    count = tl.zeros([B, BLOCK // 8], dtype=tl.int32)
    mass = tl.zeros([B, BLOCK // 8], dtype=tl.int64)
    for start in range(0, n, BLOCK):
        x = _load(x_ptr, start, n, BLOCK)  # [BLOCK]
        counted = x[None, :] >= lowest  # [B, BLOCK]
        weight = tl.where(counted, _weight(x, peak, inverse, SCALE)[None, :], 0)
        count += tl.sum(tl.reshape(counted.to(tl.int32), [B, 8, BLOCK // 8]), axis=1)
        mass += tl.sum(tl.reshape(weight, [B, 8, BLOCK // 8]), axis=1)
    return tl.sum(count, axis=1), tl.sum(mass, axis=1)


@triton.jit
def _bracket(bounds, counts, masses, need, low, inside, total, high, outside, beyond, WEIGHTS: tl.constexpr):
    """The bracket [low, high) of a threshold, narrowed by the counts and masses of other bounds [B].

    At low there are enough: inside logits of weight total. At high there are too few: outside ones of weight beyond.
    """
    if WEIGHTS:
        enough = masses >= need
    else:
        enough = counts >= need
    low = tl.maximum(low, tl.max(tl.where(enough, bounds, low), axis=0))
    inside = tl.minimum(inside, tl.min(tl.where(enough, counts, inside), axis=0))
    total = tl.minimum(total, tl.min(tl.where(enough, masses, total), axis=0))
    high = tl.minimum(high, tl.min(tl.where(enough, high, bounds), axis=0))
    outside = tl.maximum(outside, tl.max(tl.where(enough, outside, counts), axis=0))
    beyond = tl.maximum(beyond, tl.max(tl.where(enough, beyond, masses), axis=0))
    return low, inside, total, high, outside, beyond


@triton.jit
def _narrow(
    x_ptr, n, limit, above, heavier, need, low, inside, total, high, outside, beyond, peak, inverse,
    WEIGHTS: tl.constexpr, SCALE: tl.constexpr, BLOCK: tl.constexpr,
):
    """The bracket once it holds at most `limit` logits, or equal ones: a pass over n numbers leaves a fifth of it.

    Among the numbers are all logits of the bracket; above, heavier: the count and weight of greater ones that are not.
    """
    while (inside - outside > limit) & (high - low > 1):
        # fifths of the numbers, not of their bits: around 0 most floats are tiny
        fifth = _float(high) * 0.2 - _float(low) * 0.2
        bounds = _order(_float(low) + fifth * (1 + tl.arange(0, 4)))  # [4]
        bounds = tl.minimum(tl.maximum(bounds, low + 1), high - 1)
        counts, masses = _at_least(x_ptr, n, bounds, peak, inverse, SCALE, BLOCK)
        low, inside, total, high, outside, beyond = _bracket(
            bounds, above + counts, heavier + masses, need, low, inside, total, high, outside, beyond, WEIGHTS
        )
    return low, inside, total, high, outside, beyond


@triton.jit
def _gather(logits_ptr, candidates_ptr, low, high, V, BLOCK: tl.constexpr):
    """Write the logits of a bracket to candidates, for all threads of the program."""
    low, high = _float(low), _float(high)
    written = tl.full((), 0, tl.int32)
    for start in range(0, V, BLOCK):
        x = _load(logits_ptr, start, V, BLOCK)  # [BLOCK]
        taken = (x >= low) & (x < high)
        tl.store(candidates_ptr + written + tl.cumsum(taken.to(tl.int32), axis=0) - 1, x, mask=taken)
        written += tl.sum(taken.to(tl.int32), axis=0)
    tl.debug_barrier()


@triton.jit
def _threshold(
    logits_ptr, candidates_ptr, bounds, counts, masses, low, inside, total, need, peak, inverse, V,
    WEIGHTS: tl.constexpr, SCALE: tl.constexpr, BLOCK: tl.constexpr, CANDIDATES: tl.constexpr,
):
    """(low, inside, total) for the highest low at which `need` logits (or logits of that weight) are at least as high.

    At the low that comes in there are enough; counts and masses are those of the bounds. The bracket is narrowed until
    its logits are few enough to be gathered, then among these until it holds one.
    """
    low, inside, total, high, outside, beyond = _bracket(
        bounds, counts, masses, need, low, inside, total, _order(peak) + 1, inside * 0, total * 0, WEIGHTS
    )
    low, inside, total, high, outside, beyond = _narrow(
        logits_ptr, V, CANDIDATES, 0, 0, need, low, inside, total, high, outside, beyond, peak, inverse,
        WEIGHTS, SCALE, BLOCK,
    )
    if (inside - outside > 1) & (high - low > 1):
        _gather(logits_ptr, candidates_ptr, low, high, V, BLOCK)
        low, inside, total, high, outside, beyond = _narrow(
            candidates_ptr, inside - outside, 1, outside, beyond, need, low, inside, total, high, outside, beyond,
            peak, inverse, WEIGHTS, SCALE, BLOCK,
        )
    return low, inside, total


@triton.jit
def sample_kernel(
    logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, seeds_ptr, counters_ptr, candidates_ptr, tokens_ptr,
    logprobs_ptr,
    V,
    stride_n,
    SCALE: tl.constexpr, LIMIT: tl.constexpr, BLOCK_V: tl.constexpr, CANDIDATES: tl.constexpr,
):
    """A program has one row. Bounds of logits are ordered integers. logprobs_ptr may be None."""
    HALF: tl.constexpr = BLOCK_V // 2  # of loops that keep more per number, which would spill with whole blocks
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride_n
    candidates_ptr += row * CANDIDATES
    # the largest logit and the first place where it stands
    largest = tl.full([BLOCK_V], float("-inf"), dtype=tl.float32)
    index = tl.zeros([BLOCK_V], dtype=tl.int32)
    wrong = tl.zeros([BLOCK_V], dtype=tl.int32)
    for start in range(0, V, BLOCK_V):
        x = _load(logits_ptr, start, V, BLOCK_V)  # [BV]
        index = tl.where(x > largest, start + tl.arange(0, BLOCK_V), index)
        largest = tl.where(x > largest, x, largest)
        wrong |= ((x != x) | (x == float("inf"))).to(tl.int32)
    peak = tl.max(largest, axis=0)
    token = tl.min(tl.where(largest == peak, index, V), axis=0)
    if (tl.max(wrong, axis=0) > 0) | (peak == float("-inf")):
        tl.store(tokens_ptr + row, -1)
        if logprobs_ptr is not None:
            tl.store(logprobs_ptr + row, float("nan"))
        return

    temperature = tl.load(temperature_ptr + row)
    if temperature > 0.0:
        temperature = tl.minimum(tl.maximum(temperature, 1.0 / LIMIT), LIMIT)
        inverse = 1.0 / temperature
        k, p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row)
        # the logits that have any weight, down to 30 temperatures below the peak; and those down to 13, 3 and 0
        depths = (3 - tl.arange(0, 4)) * (3 - tl.arange(0, 4)) * (30.0 / 9.0) * temperature
        bounds = tl.maximum(_order(peak - depths), -2139095039)  # [4], at least the lowest finite float32
        counts, masses = _at_least(logits_ptr, V, bounds, peak, inverse, SCALE, HALF)
        low, inside, total = tl.min(bounds, axis=0), tl.max(counts, axis=0), tl.max(masses, axis=0)
        if (k > 0) & (k < inside):
            low, inside, total = _threshold(
                logits_ptr, candidates_ptr, bounds, counts, masses, low, inside, total, k, peak, inverse, V,
                False, SCALE, HALF, CANDIDATES,
            )
        if p < 1.0:
            need = tl.maximum((p.to(tl.float64) * total.to(tl.float64)).to(tl.int64), 1)
            low, inside, total = _threshold(
                logits_ptr, candidates_ptr, bounds, counts, masses, low, inside, total, need, peak, inverse, V,
                True, SCALE, HALF, CANDIDATES,
            )
        # draw: the first token at which the sum of kept weights exceeds u times their total
        u = _uniform(tl.load(seeds_ptr + row), tl.load(counters_ptr + row))
        left = tl.minimum((u * total.to(tl.float64)).to(tl.int64), total - 1)
        bound = _float(low)
        start = token * 0
        while start < V:
            x = _load(logits_ptr, start, V, HALF)  # [HALF]
            weight = tl.where(x >= bound, _weight(x, peak, inverse, SCALE), 0)
            mass = tl.sum(weight, axis=0)
            if mass > left:
                cols = start + tl.arange(0, HALF)
                token = tl.min(tl.where(tl.cumsum(weight, axis=0) > left, cols, V), axis=0)
                start = V
            else:
                left -= mass
                start += HALF
    tl.store(tokens_ptr + row, token.to(tl.int64))
    if logprobs_ptr is not None:  # under the raw logits
        total = tl.zeros([BLOCK_V], dtype=tl.int64)
        for start in range(0, V, BLOCK_V):
            total += _weight(_load(logits_ptr, start, V, BLOCK_V), peak, 1.0, SCALE)
        log_total = tl.log(tl.sum(total, axis=0).to(tl.float32) / SCALE)
        tl.store(logprobs_ptr + row, tl.load(logits_ptr + token).to(tl.float32) - peak - log_total)


def launch_config(V: int) -> LaunchConfig:
    """Settings for a row of V logits: 16 elements per thread, for enough loads in flight with few rows."""
    block = min(8192, max(2048, block_size(V)))
    return LaunchConfig({"BLOCK_V": block, "CANDIDATES": block}, num_warps=block // 512, maxnreg=128)


def _sample_triton(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, seeds: Tensor, counters: Tensor,
    with_logprobs: bool,
) -> tuple[Tensor, Tensor | None]:
    N, V = logits.shape
    config = launch_config(V)
    tokens = torch.empty(N, dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(N, dtype=torch.float32, device=logits.device) if with_logprobs else None
    candidates = torch.empty(N, config.blocks["CANDIDATES"], dtype=torch.float32, device=logits.device)
    if N:
        sample_kernel[(N,)](
            logits, temperature, top_k, top_p, seeds, counters, candidates, tokens, logprobs, V, logits.stride(0),
            SCALE=SCALE, LIMIT=LIMIT, **config.options(),
        )
    return tokens, logprobs


def _bounds(x: Tensor, peak: Tensor, inverse: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """The lowest logit that is kept [N, 1]. numpy sorts many times faster than torch does."""
    V = x.shape[1]
    order = torch.from_numpy(np.sort(x.numpy(), axis=1))  # rising
    mass = _weights(((order - peak) * inverse).exp_()).cumsum(1)
    k = torch.where((top_k > 0) & (top_k < V), top_k, V).long()
    lowest = order.gather(1, V - k)
    before = torch.searchsorted(order, lowest)  # logits that top-k leaves out
    total = mass[:, -1:] - torch.where(before > 0, mass.gather(1, (before - 1).clamp_min(0)), 0)
    need = (top_p.double() * total.double()).long().clamp_min(1)
    nucleus = order.gather(1, torch.searchsorted(mass, mass[:, -1:] - need, right=True).clamp_max(V - 1))
    return torch.where(top_p < 1, nucleus, lowest)


def _sample_cpu(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, seeds: Tensor, counters: Tensor,
    with_logprobs: bool,
) -> tuple[Tensor, Tensor | None]:
    x, V = logits.detach().float(), logits.shape[1]
    tokens = torch.from_numpy(x.numpy().argmax(1))[:, None]  # the first of equals, or the first NaN
    peak = x.gather(1, tokens)
    wrong = ~peak.isfinite()
    if wrong.any():
        x, peak = x.masked_fill(wrong, 0.0), peak.masked_fill(wrong, 0.0)
    rows = (temperature > 0).nonzero().squeeze(1)
    if not len(rows) and not with_logprobs:
        return tokens.masked_fill_(wrong, NONE).squeeze(1), None
    depth = x - peak
    raw = _weights(depth.exp())
    if len(rows):

        def of_rows(tensor: Tensor) -> Tensor:
            return tensor if len(rows) == len(x) else tensor[rows]

        inverse, k, p = (of_rows(setting)[:, None] for setting in (_inverse(temperature), top_k, top_p))
        filtered = ((k > 0) & (k < V) | (p < 1)).squeeze(1)
        weights = of_rows(raw)
        if filtered.any() or (inverse != 1).any():
            relative = (of_rows(depth) * inverse).exp_()
            if filtered.any():
                bounds = torch.full_like(inverse, -math.inf)
                bounds[filtered] = _bounds(*(part[filtered] for part in (of_rows(x), of_rows(peak), inverse, k, p)))
                relative *= of_rows(x) >= bounds
            weights = _weights(relative)
        mass = weights.cumsum(1)
        total = mass[:, -1:]
        u = uniform(seeds, counters)[rows, None]
        drawn = torch.minimum((u * total.double()).long(), total - 1)
        tokens[rows] = torch.searchsorted(mass, drawn, right=True)
    if not with_logprobs:
        return tokens.masked_fill_(wrong, NONE).squeeze(1), None
    logprobs = (x.gather(1, tokens) - peak).double() - (raw.sum(1, keepdim=True).double() / SCALE).log()
    return tokens.masked_fill_(wrong, NONE).squeeze(1), logprobs.float().masked_fill_(wrong, math.nan).squeeze(1)


def sample_tokens(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, seeds: Tensor, counters: Tensor,
    *, with_logprobs: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """(tokens int64 [N], logprobs float32 [N]) of the next token of each row, on logits' device. No gradient.

    logits: [N, V], float32 or 16 bits, last dimension contiguous, V at most 2^22; -inf for a token that must not be
    drawn. temperature: float32 [N], 0 for the largest logit, the first of equals. top_k: int32 [N], 0 for all. top_p:
    float32 [N], 1 for all; at least one token is kept. seeds, counters: int64 [N], of any value: a row's token is a
    function of its logits, its settings and these two alone. logprobs are under the raw logits; with_logprobs False:
    None, which saves a pass.
    A row that holds a NaN or inf, or nothing above -inf, has token -1 and logprob NaN. Raises ValueError on shapes and
    dtypes that do not match; settings that make no sense are the caller's to refuse.
    """
    N, V = logits.shape if logits.dim() == 2 else (-1, 0)
    if not 0 < V <= MAX_VOCABULARY or not logits.is_floating_point() or logits.stride(1) != 1:
        raise ValueError(f"sample_tokens: logits must be [N, V] with contiguous rows, not {tuple(logits.shape)}")
    dtypes = (torch.float32, torch.int32, torch.float32, torch.int64, torch.int64)
    args = (temperature, top_k, top_p, seeds, counters)
    for name, x, dtype in zip(("temperature", "top_k", "top_p", "seeds", "counters"), args, dtypes, strict=True):
        if x.shape != (N,) or x.dtype != dtype or (N > 1 and x.stride(0) != 1):
            raise ValueError(f"sample_tokens: {name} must be {dtype} [{N}], not {x.dtype} {tuple(x.shape)}")
    backend = _sample_triton if use_triton(logits, *args) else _sample_cpu
    return backend(logits, *args, with_logprobs)
