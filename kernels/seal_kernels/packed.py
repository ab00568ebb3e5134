"""Frozen matrices in the layout of oneDNN's products, which a CPU multiplies few rows with faster than a plain matrix.

    y = x W^T + b, as in linear.py, for x of few rows: sampling; dx = dy W, where float32 is faster for many rows, too
    y = silu(x G^T + g) * (x U^T + u), as in swiglu.py, for the rows of one matrix of bfloat16: G, then U

torch's products read a plain matrix; for one to some dozens of rows they reach half of the memory's bandwidth, or
rearrange the matrix in each call. A packed copy is made once per matrix and takes as many bytes again. Which product is
faster follows from dtype, rows and CPU alone, not from a measurement at run time: the choice decides the bits of a
result, and a resumed run must have those of an uninterrupted one. docs/decisions.md has the measurements.

The second product gates while sums are still float32, so that only silu's result and y are rounded, and the gate's and
the up-projection's are never written. It needs copies of G and U by themselves, which then serve the first one, too.
"""

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

MIN_ELEMENTS = 1 << 18  # a smaller matrix stays in a core's cache, and calls cost more than products
MAX_ROWS = 512
_ATTRIBUTE = "_packed"  # of a matrix that may be packed


@dataclass
class _Packed:
    """Copies of equal parts of a matrix, one behind the other, and one of the whole transposed, for backward."""

    parts: int
    version: int = -1  # of the matrix, when they were made
    copies: list[Tensor] = field(default_factory=list)  # none before the first use
    transposed: Tensor | None = None  # None before the first use


@lru_cache
def is_available() -> bool:
    """Whether this torch can pack matrices."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


@lru_cache
def packs_all_rows() -> bool:
    """Whether packed products are the fastest for all numbers of rows, as on a CPU of AMD.

    Elsewhere one row of bfloat16, and few and many of float32, take the matrix unpacked.
    """
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


@lru_cache
def multiplies_bfloat16() -> bool:
    """Whether this CPU has matrix instructions for bfloat16."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def pad_rows(x: Tensor) -> Tensor:
    """x [T, I] with rows of zeros added, at most an eighth of T: eight numbers of rows for each power of two.

    For each new number of rows of bfloat16 oneDNN writes a program, some 0.7 ms and 0.5 MB a matrix, and keeps 1,024.
    """
    step = 1 << ((x.shape[0] - 1).bit_length() - 4) if x.shape[0] > 16 else 1
    missing = -x.shape[0] % step
    return torch.nn.functional.pad(x, (0, 0, 0, missing)) if missing else x


def packs(dtype: torch.dtype) -> bool:
    """Whether packing serves matrices of this dtype on this CPU; where it only widens bfloat16, not that."""
    return is_available() and (dtype == torch.float32 or (dtype == torch.bfloat16 and multiplies_bfloat16()))


def can_pack(weight: object) -> bool:
    """Whether packing serves this matrix at all: a large tensor of floats on a CPU."""
    if not isinstance(weight, Tensor):
        return False
    fits = weight.device.type == "cpu" and packs(weight.dtype)
    return fits and weight.dim() == 2 and weight.numel() >= MIN_ELEMENTS and weight.is_contiguous()


def allow_packing(weight: object, gated: bool = False) -> None:
    """Let products with the matrix use a packed copy, which is made when it is first needed; if packing serves it.

    gated: the matrix is that of a SwiGLU, which packed_swiglu multiplies.
    """
    if isinstance(weight, Tensor) and can_pack(weight):
        setattr(weight, _ATTRIBUTE, _Packed(2 if gated and weight.dtype == torch.bfloat16 else 1))


def num_copies(dtype: torch.dtype) -> int:
    """Copies of a matrix where packing serves its dtype, if it is trained through."""
    return 2 if dtype == torch.float32 and packs_all_rows() else 1


def _current(weight: Tensor) -> _Packed:
    """What belongs to the matrix, without copies where it has been changed since they were made."""
    packed: _Packed = getattr(weight, _ATTRIBUTE)
    if packed.version != weight._version:
        packed.version, packed.copies, packed.transposed = weight._version, [], None
    return packed


def _copies(weight: Tensor) -> list[Tensor]:
    """The packed copies of the matrix's parts."""
    packed = _current(weight)
    if not packed.copies:
        packed.copies = [torch.ops.mkldnn._reorder_linear_weight(part, None) for part in weight.chunk(packed.parts)]
    return packed.copies


def prefers_packed(x: Tensor, weight: Tensor) -> bool:
    """Whether x [n, I] times this matrix is to be a product with its packed copy."""
    if not hasattr(weight, _ATTRIBUTE):
        return False
    if weight.dtype == torch.bfloat16:
        return 0 < x.shape[0] <= MAX_ROWS
    if x.dtype != torch.float32:
        return False
    return x.shape[0] > 0 if packs_all_rows() else 2 < x.shape[0] <= MAX_ROWS


def packed_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [n, I] W^T + b in W's dtype, by packed copies.

    One row of bfloat16 may take the matrix unpacked, where that product reads it at the memory's speed.
    """
    x = x.to(weight.dtype)
    if x.shape[0] == 1 and weight.dtype == torch.bfloat16 and not packs_all_rows():
        y = torch.mv(weight, x[0])[None]
        return y if bias is None else y.add_(bias)
    rows, copies = (x if x.dtype == torch.float32 else pad_rows(x)).contiguous(), _copies(weight)
    if len(copies) == 1:
        y = torch.ops.mkldnn._linear_pointwise(rows, copies[0], bias, "none", [], "")
    else:
        pairs = zip(copies, (None, None) if bias is None else bias.chunk(2), strict=True)
        y = torch.cat([torch.ops.mkldnn._linear_pointwise(rows, copy, own, "none", [], "") for copy, own in pairs], 1)
    return y if rows.shape[0] == x.shape[0] else y[: x.shape[0]]


def prefers_packed_backward(dy: Tensor, weight: Tensor) -> bool:
    """Whether dy [n, O] times this matrix is to be packed_backward_product's."""
    allowed = hasattr(weight, _ATTRIBUTE) and packs_all_rows()
    return allowed and weight.dtype == dy.dtype == torch.float32 and dy.shape[0] > 0


def packed_backward_product(dy: Tensor, weight: Tensor) -> Tensor:
    """dy [n, O] W: [n, I], in float32."""
    packed = _current(weight)
    if packed.transposed is None:
        packed.transposed = torch.ops.mkldnn._reorder_linear_weight(weight.T.contiguous(), None)
    return torch.ops.mkldnn._linear_pointwise(dy.contiguous(), packed.transposed, None, "none", [], "")


def fuses_swiglu(x: Tensor, weight: Tensor) -> bool:
    """Whether the SwiGLU of x [n, I] times this matrix is to be packed_swiglu's. It has no gradient."""
    packed: _Packed | None = getattr(weight, _ATTRIBUTE, None)
    least = 1 if packs_all_rows() else 2
    return x.dtype == torch.bfloat16 and packed is not None and packed.parts == 2 and least <= x.shape[0] <= MAX_ROWS


def packed_swiglu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """swiglu(x W^T + b) for x [n, I] and W [2 F, I] of bfloat16: [n, F]."""
    rows, (gate, up) = pad_rows(x).contiguous(), _copies(weight)
    gate_bias, up_bias = (None, None) if bias is None else bias.chunk(2)
    activated = torch.ops.mkldnn._linear_pointwise(rows, gate, gate_bias, "swish", [], "")
    return torch.ops.mkldnn._linear_pointwise.binary(rows, activated, up, up_bias, "mul")[: x.shape[0]]
