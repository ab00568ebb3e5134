"""lora.py on the CPU: a loop over segments around the vendor's matrix product, written for few and cheap steps.

At the sizes of a miniature model the products take microseconds, so what surrounds them counts: views of adapters are
made once (AdapterViews), views of the segments' tokens by one split per tensor. The shapes of a segment's products
follow from that segment, so its bits do not depend on the other segments. Products are float32, whatever x and y are.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor

from seal_kernels.linear import in_tiles
from seal_kernels.lora_tables import AdapterViews, LoraGroup, adapter_views

INVARIANT_ROWS = 32  # rows of every product in batch-invariant mode


def keep_mask(seed: int, probability: float, rows: int, columns: int) -> Tensor:
    """[rows, columns] float32: 0 where dropped, 1 / (1 - probability) where kept.

    Element (i, j) hashes its counter i * columns + j with the seed, in 32-bit integers (multiply and xor-shift
    rounds), so that the forward, the backward and every backend draw the same mask.
    """
    word = (1 << 32) - 1
    x = torch.arange(rows * columns, dtype=torch.int64).mul_(0x9E3779B9).add_(int(seed)).bitwise_and_(word)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x.bitwise_xor_(x >> shift).mul_(factor).bitwise_and_(word)
    x.bitwise_xor_(x >> 16)
    kept = x >= math.floor(probability * (1 << 32))
    return kept.view(rows, columns).float().div_(1 - probability)


def _views(group: LoraGroup, inputs: int) -> list[AdapterViews]:
    if group.views is not None:
        return list(group.views)
    widths = [last - first for first, last in group.columns]
    segments = zip(group.params, group.grads, group.offsets, group.ranks, strict=True)
    return [adapter_views(*segment, inputs, widths) for segment in segments]


def _split(x: Tensor, group: LoraGroup) -> tuple[list[int], tuple[Tensor, ...]]:
    """(numbers of the segments that have tokens and an adapter on this group, every segment's rows of x)."""
    lengths = [end - start for start, end in pairwise(group.bounds)]
    adapted = group.ranks.sum(1).tolist()
    return [s for s, length in enumerate(lengths) if length and adapted[s]], x.split_with_sizes(lengths)


def _columns(y: Tensor, group: LoraGroup) -> list[tuple[Tensor, ...]]:
    """Every segment's rows of y, for each projection's columns."""
    return [_split(y[:, first:last], group)[1] for first, last in group.columns]


def _masks(group: LoraGroup, s: int, views: AdapterViews, rows: int) -> list[Tensor] | None:
    """Dropout's mask [rows, I] of each adapted projection; None where nothing is dropped."""
    if group.dropout is None or group.seeds is None or not group.dropout[s] > 0:
        return None
    return [keep_mask(group.seeds[s, m], group.dropout[s], rows, views.a.shape[1]) for m in views.projections]


def _widened(x: Tensor) -> Tensor:
    """x in float32 at least. By segments: a whole 16-bit stream at once would be fresh memory in each call."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _product(x: Tensor, factor: Tensor, batch_invariant: bool) -> Tensor:
    return in_tiles(lambda rows: rows @ factor, x, INVARIANT_ROWS) if batch_invariant else x @ factor


def lora_forward_cpu(x: Tensor, y: Tensor, group: LoraGroup, batch_invariant: bool) -> list[Tensor]:
    """Adds every segment's update to y [T, O]; returns h [n, R] of each segment that has an update.

    batch_invariant: a row's bits do not depend on how many rows its segment has, as when it is sampled token by token.
    """
    segments, xs = _split(x, group)
    outs, views, scales, hidden = _columns(y, group), _views(group, x.shape[1]), group.scales.tolist(), []
    for s in segments:
        view, x_s = views[s], _widened(xs[s])
        masks = _masks(group, s, view, len(x_s))
        if masks is None:
            h = _product(x_s, view.a.T, batch_invariant)  # one pass over x for all projections
        else:
            masked = zip(masks, view.a.split_with_sizes(view.ranks), strict=True)
            h = torch.cat([(x_s * mask) @ a.T for mask, a in masked], 1)
        for m, h_m, b in zip(view.projections, h.split_with_sizes(view.ranks, 1), view.b, strict=True):
            if y.dtype == h.dtype and not batch_invariant:
                outs[m][s].addmm_(h_m, b, alpha=scales[s][m])
            else:
                outs[m][s].add_(_product(h_m, b, batch_invariant), alpha=scales[s][m])
        hidden.append(h)
    return hidden


def lora_backward_cpu(x: Tensor, dy: Tensor, dx: Tensor | None, hidden: list[Tensor], group: LoraGroup) -> None:
    """Adds every segment's part to dx, and its gradients of A and B to the adapters' own (see LoraGroup.overwrite)."""
    segments, xs = _split(x, group)
    gs, views, scales = _columns(dy, group), _views(group, x.shape[1]), group.scales.tolist()
    dxs = None if dx is None else _split(dx, group)[1]
    for s, h in zip(segments, hidden, strict=True):
        view, x_s, beta = views[s], _widened(xs[s]), int(group.overwrite is None or not group.overwrite[s])
        dh = torch.empty_like(h)
        h_parts, dh_parts = h.split_with_sizes(view.ranks, 1), dh.split_with_sizes(view.ranks, 1)
        for m, h_m, dh_m, b, db in zip(view.projections, h_parts, dh_parts, view.b, view.db, strict=True):
            g, scale = _widened(gs[m][s]), scales[s][m]
            dh_m.addmm_(g, b.T, beta=0, alpha=scale)
            if db is not None:
                db.addmm_(h_m.T, g, beta=beta, alpha=scale)
        masks = _masks(group, s, view, len(x_s))
        if masks is None:
            if view.da is not None:
                view.da.addmm_(dh.T, x_s, beta=beta)
            if dxs is not None and dxs[s].dtype == dh.dtype:
                dxs[s].addmm_(dh, view.a)
            elif dxs is not None:
                dxs[s].add_(dh @ view.a)
            continue
        for i, (mask, dh_m, a) in enumerate(zip(masks, dh_parts, view.a.split_with_sizes(view.ranks), strict=True)):
            if view.da is not None:
                view.da.split_with_sizes(view.ranks)[i].addmm_(dh_m.T, x_s * mask, beta=beta)
            if dxs is not None:
                dxs[s].addcmul_(dh_m @ a, mask)
