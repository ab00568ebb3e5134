"""Product with a frozen weight matrix: y = x W^T + b, backward dx = dy W. No gradient for W or b.

Shapes: x [T, I], W [O, I], b [O]; y [T, O]. 2 T I O FLOPs each way, by the vendor's matrix product.

On the CPU activations are float32 where products do not round them. Where the CPU has matrix instructions for bfloat16
(AMX, AVX512-BF16), a product with bfloat16 weights rounds x and y to bfloat16, sums being float32: three to six times
as fast as float32; rows are padded to one of a few numbers (pad_rows in packed.py). What lies between two such products
may then stay bfloat16, as it is rounded on both sides anyway: x and y need not be of one dtype. Elsewhere 16-bit
products are three times slower than float32 ones, so a 16-bit weight is widened, a slice of rows at a time into a
scratch that stays in the cache: its memory stays 16-bit (benchmarks/bench_linear.py).

The vendor's product gives a row other bits when the number of rows changes (it may split the sum over I differently).
A batch-invariant product takes x in tiles of exactly INVARIANT_ROWS rows, the last one padded with zeros: a row's bits
then depend on that row alone (checked on a CPU for many sizes and places in the tile).
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Union

import torch
from torch import Tensor

from seal_kernels.dispatch import apply
from seal_kernels.packed import (
    multiplies_bfloat16,
    packed_backward_product,
    packed_product,
    pad_rows,
    prefers_packed,
    prefers_packed_backward,
)

if TYPE_CHECKING:
    from seal_kernels.quantized_linear import QuantizedWeight

FrozenWeight = Union[Tensor, "QuantizedWeight"]  # a quantised weight brings its products

INVARIANT_ROWS = 128  # rows of every batch-invariant product: large enough to be fast
ROUNDED_ROWS = 512  # rows of x that are rounded to bfloat16 at a time
FEW_ROWS = 256  # up to which W x^T is faster than x W^T: the library rearranges the right-hand operand in each call
SLICE_ELEMENTS = 1 << 20  # 4 MiB in float32: small enough to stay in the last-level cache until it is used


def frozen_linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The equation in x's dtype."""
    return torch.nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _native(x: Tensor, weight: Tensor) -> bool:
    """Whether to round x to bfloat16 rather than to widen weight: on a CPU that multiplies bfloat16."""
    rounds = weight.dtype == torch.bfloat16 and x.dtype in (torch.float32, torch.bfloat16)
    return rounds and not x.is_cuda and multiplies_bfloat16()


def widened_slices(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """(rows, weight[rows] in dtype) for consecutive slices of rows that cover weight.

    Each tensor is valid until the next is asked for: all share one scratch.
    """
    rows = max(1, min(len(weight), SLICE_ELEMENTS // weight.shape[1]))
    scratch = torch.empty(rows, weight.shape[1], dtype=dtype, device=weight.device)
    for start in range(0, len(weight), rows):
        part = weight[start : start + rows]
        yield slice(start, start + len(part)), scratch[: len(part)].copy_(part)


def in_tiles(product: Callable[[Tensor], Tensor], x: Tensor, tile_rows: int) -> Tensor:
    """product(x) by products of exactly tile_rows rows, the last of them padded with zeros."""
    if not len(x):
        return product(x)
    padded = torch.nn.functional.pad(x, (0, 0, 0, -len(x) % tile_rows))
    return torch.cat([product(tile.contiguous()) for tile in padded.split(tile_rows)])[: len(x)]


def _rounded_product(x: Tensor, factor: Tensor, out: Tensor) -> Tensor:
    """out = x times factor in factor's dtype, some rows at a time: what is converted stays in the cache."""
    if len(x) > ROUNDED_ROWS:
        for x_rows, out_rows in zip(x.split(ROUNDED_ROWS), out.split(ROUNDED_ROWS), strict=True):
            _rounded_product(x_rows, factor, out_rows)
        return out
    x = pad_rows(x.to(factor.dtype))
    if len(x) <= FEW_ROWS and factor.T.is_contiguous():
        return out.copy_(torch.mm(factor.T, x.T).T[: len(out)])
    if (len(x), x.dtype) == (len(out), out.dtype):
        return torch.mm(x, factor, out=out)
    return out.copy_(torch.mm(x, factor)[: len(out)])


def float32_product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out = a @ b in float32, also of 16-bit matrices; on a GPU whose torch lacks that, rounded to 16 bits."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    if not a.is_cuda:  # Triton's interpreter
        return torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)
    if hasattr(torch.ops.aten.mm, "dtype_out"):
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return out.copy_(torch.mm(a, b))


def multiply(x: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """out [T, O] = x W^T; on the CPU x, weight and out may be of three dtypes, on a GPU out may be float32."""
    if _native(x, weight):
        return _rounded_product(x, weight.T, out)
    if x.dtype == weight.dtype == out.dtype:
        return torch.mm(x, weight.T, out=out)
    if x.is_cuda:
        return float32_product(x, weight.T, out)
    x = x.to(out.dtype)
    for rows, wide in widened_slices(weight, out.dtype):
        torch.mm(x, wide.T, out=out[:, rows])
    return out


def multiply_backward(dy: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """out [T, I] = dy W; on the CPU dy, weight and out may be of three dtypes."""
    if _native(dy, weight):
        return _rounded_product(dy, weight, out)
    if dy.dtype == weight.dtype == out.dtype:
        return torch.mm(dy, weight, out=out)
    dy = dy.to(out.dtype)
    out.zero_()
    for rows, wide in widened_slices(weight, out.dtype):
        torch.addmm(out, dy[:, rows], wide, out=out)
    return out


def frozen_linear_forward(
    x: Tensor, weight: FrozenWeight, bias: Tensor | None, batch_invariant: bool, dtype: torch.dtype
) -> Tensor:
    """x W^T + b in dtype, outside autograd."""
    if not isinstance(weight, Tensor):
        return weight.forward(x, bias, batch_invariant, dtype)

    def product(x: Tensor) -> Tensor:
        if not batch_invariant and prefers_packed(x, weight):
            return packed_product(x, weight, bias).to(dtype)
        if x.dtype == weight.dtype == dtype:
            padded = pad_rows(x) if _native(x, weight) else x
            return torch.nn.functional.linear(padded, weight, bias)[: len(x)]
        y = multiply(x, weight, x.new_empty(len(x), len(weight), dtype=dtype))
        return y if bias is None else y.add_(bias)

    return in_tiles(product, x, INVARIANT_ROWS) if batch_invariant else product(x)


def frozen_linear_backward(dy: Tensor, weight: FrozenWeight, batch_invariant: bool, dtype: torch.dtype) -> Tensor:
    """dx = dy W in dtype, outside autograd."""
    if not isinstance(weight, Tensor):
        return weight.backward(dy, batch_invariant, dtype)

    def product(dy: Tensor) -> Tensor:
        if not batch_invariant and prefers_packed_backward(dy, weight):
            return packed_backward_product(dy, weight).to(dtype)
        return multiply_backward(dy, weight, dy.new_empty(len(dy), weight.shape[1], dtype=dtype))

    return in_tiles(product, dy, INVARIANT_ROWS) if batch_invariant else product(dy)


class FrozenLinear(torch.autograd.Function):
    """Keeps only the weight (no copy)."""

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: FrozenWeight, bias: Tensor | None, batch_invariant: bool, dtype: torch.dtype
    ) -> Tensor:
        ctx.weight, ctx.batch_invariant, ctx.dtype = weight, batch_invariant, x.dtype
        return frozen_linear_forward(x, weight, bias, batch_invariant, dtype)

    @staticmethod
    def backward(ctx, dy: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return frozen_linear_backward(dy, ctx.weight, ctx.batch_invariant, ctx.dtype), None, None, None, None


def check_linear(x: Tensor, weight: FrozenWeight, bias: Tensor | None) -> None:
    """ValueError unless x is [T, I], weight [O, I] and bias [O] or None."""
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"frozen_linear: x is {tuple(x.shape)}, weight is {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"frozen_linear: bias is {tuple(bias.shape)}, weight is {tuple(weight.shape)}")


def frozen_linear(
    x: Tensor,
    weight: FrozenWeight,
    bias: Tensor | None = None,
    batch_invariant: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """x [T, I] times weight [O, I] transposed plus bias [O]: [T, O]. Differentiable in x only.

    weight and bias may be in a narrower dtype than x. batch_invariant: a row's result does not depend on the other
    rows, bit for bit. dtype: of the result, by default x's; on a GPU that or float32. Raises ValueError on shapes
    that do not match.
    """
    check_linear(x, weight, bias)
    return apply(FrozenLinear, x, weight, bias, batch_invariant, x.dtype if dtype is None else dtype)
