"""lora.py on the CPU: a loop over segments around the vendor's matrix product, written for few and cheap steps.

At the sizes of a miniature model the products take microseconds, so what surrounds them counts: views of adapters are
made once (AdapterViews), those of a segment's tokens by one split a tensor. A segment's products have the shapes that
it has alone, so its bits do not depend on its company. They are float32, whatever x and y are.
"""

from itertools import pairwise

import torch
from torch import Tensor

from seal_kernels.linear import in_tiles
from seal_kernels.lora_tables import AdapterViews, LoraGroup, adapter_views, keep_mask

TILE = 32  # rows of a product in deterministic mode


def _views(group: LoraGroup, inputs: int) -> list[AdapterViews]:
    if group.views is not None:
        return list(group.views)
    widths = [last - first for first, last in group.columns]
    each = zip(group.params, group.grads, group.offsets, group.ranks, strict=True)
    return [adapter_views(*one, inputs, widths) for one in each]


def _split(x: Tensor, group: LoraGroup) -> tuple[list[int], tuple[Tensor, ...]]:
    """Numbers of the segments that have tokens and an adapter on this group, and every segment's rows of x."""
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
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _product(x: Tensor, factor: Tensor, tile: int | None) -> Tensor:
    """x times factor, in tiles of so many rows."""
    return in_tiles(lambda rows: rows @ factor, x, tile)


def lora_forward_cpu(x: Tensor, y: Tensor, group: LoraGroup, row_tile: int | None) -> list[Tensor]:
    """Adds every segment's update to y [T, O]; returns the h [n, R] of the segments that have one.

    row_tile: a row's bits do not depend on how many rows its segment has, as when it is sampled token by token.
    """
    tile = None if row_tile is None else TILE
    segments, xs = _split(_widened(x), group)
    outs, views, scales, hidden = _columns(y, group), _views(group, x.shape[1]), group.scales.tolist(), []
    for s in segments:
        view = views[s]
        masks = _masks(group, s, view, len(xs[s]))
        if masks is None:
            h = _product(xs[s], view.a.T, tile)  # one pass over x for all projections
        else:
            each = zip(masks, view.a.split_with_sizes(view.ranks), strict=True)
            h = torch.cat([(xs[s] * mask) @ a.T for mask, a in each], 1)
        for m, h_m, b in zip(view.projections, h.split_with_sizes(view.ranks, 1), view.b, strict=True):
            if tile is None and y.dtype == h.dtype:
                outs[m][s].addmm_(h_m, b, alpha=scales[s][m])
            else:
                outs[m][s].add_(_product(h_m, b, tile), alpha=scales[s][m])
        hidden.append(h)
    return hidden


def lora_backward_cpu(x: Tensor, dy: Tensor, dx: Tensor | None, hidden: list[Tensor], group: LoraGroup) -> None:
    """Adds every segment's part to dx, and its gradients of A and B to the adapters' own."""
    segments, xs = _split(_widened(x), group)
    gs, views, scales = _columns(_widened(dy), group), _views(group, x.shape[1]), group.scales.tolist()
    dxs = None if dx is None else _split(dx, group)[1]
    for s, h in zip(segments, hidden, strict=True):
        view, given = views[s], xs[s]
        dh = torch.empty_like(h)
        h_parts, dh_parts = h.split_with_sizes(view.ranks, 1), dh.split_with_sizes(view.ranks, 1)
        for m, h_m, dh_m, b, db in zip(view.projections, h_parts, dh_parts, view.b, view.db, strict=True):
            g, scale = gs[m][s], scales[s][m]
            dh_m.addmm_(g, b.T, beta=0, alpha=scale)
            if db is not None:
                db.addmm_(h_m.T, g, alpha=scale)
        masks = _masks(group, s, view, len(given))
        if masks is None:
            if view.da is not None:
                view.da.addmm_(dh.T, given)
            if dxs is not None and dxs[s].dtype == dh.dtype:
                dxs[s].addmm_(dh, view.a)
            elif dxs is not None:
                dxs[s].add_(dh @ view.a)
            continue
        for i, (mask, dh_m, a) in enumerate(zip(masks, dh_parts, view.a.split_with_sizes(view.ranks), strict=True)):
            if view.da is not None:
                view.da.split_with_sizes(view.ranks)[i].addmm_(dh_m.T, given * mask)
            if dxs is not None:
                dxs[s].addcmul_(dh_m @ a, mask)
