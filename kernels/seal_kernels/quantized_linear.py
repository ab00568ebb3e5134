"""Product with a frozen, quantised weight matrix: y = x W^T + b, backward dx = dy W, where W = code x scale.

    int8   code an integer from -127 to 127                 a scale per output
    fp8    code an e4m3 number                              a scale per output, or per block of inputs
    nf4    code one of 16 quantiles of a normal (QLoRA, arXiv 2305.14314), two in a byte, the first in the high bits;
           a scale per block of 64 inputs

Shapes: x [T, I], W [O, I], b [O], y [T, O]; codes [O, I] bytes (nf4 [O, ceil(I / 2)]); scales [O, G] float32, each for
`group` consecutive inputs. FLOPs: 2 T I O each way, as for a plain matrix.

Bytes: a large pass decodes the matrix once into a scratch of x's dtype (I O read, 2 I O written and read again) and
uses the vendor's product, forward and backward with the same values. A pass of few rows, which is bound by reading W,
decodes inside the product: I O bytes, half of those for nf4, in place of 2 I O.

A scale per output leaves the codes as they are, which 16 bits hold exactly: it multiplies y, or dy, instead. Scales per
block are multiplied in, in float32, and the product is rounded to the dtype of products. On the CPU codes are decoded
a slice of rows at a time into a scratch that stays in the cache, and torch's product of bfloat16 rows and int8 weights
takes passes of few rows (benchmarks/bench_quantize.py).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from seal_kernels.dispatch import LaunchConfig, ceil_div, tl, triton, use_triton
from seal_kernels.linear import (
    INVARIANT_ROWS,
    SLICE_ELEMENTS,
    float32_product,
    frozen_linear,
    in_tiles,
    multiplies_bfloat16,
    multiply,
)  # fmt: skip

KINDS = ("int8", "fp8", "nf4")  # int8: scales per output; nf4: per block
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
FUSED_ROWS = 32  # rows up to which a GPU decodes inside the product
INT8_ROWS = 16  # rows up to which torch's product with int8 weights is faster than decoding them (measured)


class WeightFormat(NamedTuple):
    """How a matrix is quantised."""

    kind: str  # one of KINDS
    group: int | None = None  # inputs that share a scale; None: all

    def nbytes(self, outputs: int, inputs: int) -> int:
        """Bytes of a matrix: its codes and its float32 scales."""
        code_bytes = ceil_div(inputs, 2) if self.kind == "nf4" else inputs
        return outputs * (code_bytes + 4 * ceil_div(inputs, self.group or inputs))


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A matrix W [O, I] as codes and scales, and its products. Make one with `empty`, and fill codes and scales."""

    format: WeightFormat
    codes: Tensor  # int8 [O, I]; fp8: uint8 [O, I]; nf4: uint8 [O, ceil(I / 2)]
    scales: Tensor  # [O, G] float32
    inputs: int
    dtype: torch.dtype  # of products, and of W where scales are per block

    @staticmethod
    def empty(
        form: WeightFormat, outputs: int, inputs: int, dtype: torch.dtype, device: torch.device
    ) -> "QuantizedWeight":
        """Uninitialised codes and scales."""
        width, code_dtype = inputs, torch.int8 if form.kind == "int8" else torch.uint8
        if form.kind == "nf4":
            width = ceil_div(inputs, 2)
        codes = torch.empty(outputs, width, dtype=code_dtype, device=device)
        scales = torch.empty(outputs, ceil_div(inputs, form.group or inputs), device=device)
        return QuantizedWeight(form, codes, scales, inputs, dtype)

    @property
    def shape(self) -> torch.Size:
        """[O, I]."""
        return torch.Size((len(self.codes), self.inputs))

    @property
    def device(self) -> torch.device:
        """Of codes and scales."""
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes

    @property
    def scales_outputs(self) -> bool:
        """Whether scales are per output, so that they multiply y rather than W."""
        return self.format.group is None

    def dim(self) -> int:
        """Of a matrix."""
        return 2

    def split(self, sizes: Sequence[int]) -> list["QuantizedWeight"]:
        """Views of consecutive rows, as of a tensor."""
        parts = zip(self.codes.split(list(sizes)), self.scales.split(list(sizes)), strict=True)
        return [QuantizedWeight(self.format, codes, scales, self.inputs, self.dtype) for codes, scales in parts]

    def dequantize(self) -> Tensor:
        """[O, I] float32: the W that forward and backward multiply by."""
        wide = _decode(self, torch.float32 if self.scales_outputs else self.dtype).float()
        return wide * self.scales if self.scales_outputs else wide

    def forward(self, x: Tensor, bias: Tensor | None, batch_invariant: bool, dtype: torch.dtype) -> Tensor:
        """x W^T + b in dtype, outside autograd; see `linear.frozen_linear_forward`."""
        if use_triton(x, self.codes, self.scales, bias):
            y = _forward_triton(x, self, batch_invariant, dtype)
        elif batch_invariant:
            y = in_tiles(lambda tile: _forward_cpu(tile, self, dtype, few=False), x, INVARIANT_ROWS)
        else:
            y = _forward_cpu(x, self, dtype, few=len(x) <= INT8_ROWS)
        return y if bias is None else y.add_(bias)

    def backward(self, dy: Tensor, batch_invariant: bool, dtype: torch.dtype) -> Tensor:
        """dx = dy W in dtype, outside autograd; see `linear.frozen_linear_backward`."""
        if use_triton(dy, self.codes, self.scales):
            return _backward_triton(dy, self, batch_invariant, dtype)
        if batch_invariant:
            return in_tiles(lambda tile: _backward_cpu(tile, self, dtype), dy, INVARIANT_ROWS)
        return _backward_cpu(dy, self, dtype)


def quantized_linear_ref(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """The equation in x's dtype."""
    return torch.nn.functional.linear(x, weight.dequantize().to(x.dtype), None if bias is None else bias.to(x.dtype))


@lru_cache
def nf4_table(device: torch.device) -> Tensor:
    """[16] float32: the numbers that NF4's codes stand for."""
    return torch.tensor(NF4, device=device)


@triton.jit
def _decoded(codes_ptr, table_ptr, rows, columns, stride, mask, KIND: tl.constexpr):
    """[BO, BI] float32: what the codes at (rows, columns) stand for, without their scale. KIND: a number in KINDS."""
    at = codes_ptr + rows.to(tl.int64)[:, None] * stride
    if KIND == 2:  # nf4
        packed = tl.load(at + (columns // 2)[None, :], mask=mask, other=0).to(tl.int32)
        return tl.load(table_ptr + ((packed >> (4 - 4 * (columns % 2))[None, :]) & 15))
    codes = tl.load(at + columns[None, :], mask=mask, other=0)
    if KIND == 0:  # int8
        return codes.to(tl.float32)
    # e4m3 by integers, as GPUs before sm_89 lack the conversion: its bits in float16's places are 1/256 of the number
    bits = codes.to(tl.int32)
    half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.int16).to(tl.float16, bitcast=True)
    return tl.where((bits & 0x7F) == 0x7F, float("nan"), half.to(tl.float32) * 256.0)


@triton.jit
def dequantize_kernel(
    codes_ptr, scales_ptr, table_ptr, out_ptr,
    O, I, G, group,
    stride_codes,
    KIND: tl.constexpr, GROUPED: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):
    """out [O, I] = codes, with GROUPED times their scales. A program makes one tile."""
    rows = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    columns = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    mask = (rows < O)[:, None] & (columns < I)[None, :]
    w = _decoded(codes_ptr, table_ptr, rows, columns, stride_codes, mask, KIND)  # [BO, BI]
    if GROUPED:
        w *= tl.load(scales_ptr + rows[:, None] * G + (columns // group)[None, :], mask=mask, other=0.0)
    out_at = out_ptr + rows.to(tl.int64)[:, None] * I + columns[None, :]
    tl.store(out_at, w.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def quantized_linear_kernel(
    x_ptr, codes_ptr, scales_ptr, table_ptr, y_ptr,
    T, O, I, G, group,
    stride_x, stride_codes,
    KIND: tl.constexpr, GROUPED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):
    """y = x W^T. A program makes one tile of y: all inputs of a block of outputs, for a block of tokens."""
    tokens = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    rows = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    acc = tl.zeros([BLOCK_T, BLOCK_O], dtype=tl.float32)
    for start in range(0, I, BLOCK_I):
        columns = start + tl.arange(0, BLOCK_I)
        x_at = x_ptr + tokens.to(tl.int64)[:, None] * stride_x + columns[None, :]
        x = tl.load(x_at, mask=(tokens < T)[:, None] & (columns < I)[None, :], other=0.0)  # [BT, BI]
        mask = (rows < O)[:, None] & (columns < I)[None, :]
        w = _decoded(codes_ptr, table_ptr, rows, columns, stride_codes, mask, KIND)  # [BO, BI]
        if GROUPED:
            w *= tl.load(scales_ptr + rows[:, None] * G + (columns // group)[None, :], mask=mask, other=0.0)
        # add x w^T over this block of inputs; codes that are masked away meet zeros of x
        acc = tl.dot(x, tl.trans(w.to(x.dtype)), acc, input_precision="ieee")  # [BT, BO]
    if not GROUPED:
        acc *= tl.load(scales_ptr + rows, mask=rows < O, other=0.0)[None, :]
    y_at = y_ptr + tokens.to(tl.int64)[:, None] * O + rows[None, :]
    tl.store(y_at, acc.to(y_ptr.dtype.element_ty), mask=(tokens < T)[:, None] & (rows < O)[None, :])


def launch_config(kernel_name: str, dtype: torch.dtype) -> LaunchConfig:
    """Settings of kernel "dequantize" or "product" for x of dtype. Few outputs per program: many read W at once."""
    if kernel_name == "dequantize":
        return LaunchConfig({"BLOCK_O": 16, "BLOCK_I": 128}, num_warps=4)
    if dtype == torch.float32:
        return LaunchConfig({"BLOCK_T": 16, "BLOCK_O": 32, "BLOCK_I": 32}, num_warps=4, num_stages=2)
    return LaunchConfig({"BLOCK_T": 16, "BLOCK_O": 32, "BLOCK_I": 128}, num_warps=4, num_stages=3)


def _sizes(weight: QuantizedWeight) -> tuple[int, int, int, int]:
    outputs, inputs = weight.shape
    return outputs, inputs, weight.scales.shape[1], weight.format.group or inputs


def _constants(weight: QuantizedWeight) -> dict[str, int | bool]:
    return {"KIND": KINDS.index(weight.format.kind), "GROUPED": not weight.scales_outputs}


def _decode_triton(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    config, (O, I, G, group) = launch_config("dequantize", dtype), _sizes(weight)
    out = torch.empty(O, I, dtype=dtype, device=weight.device)
    grid = (ceil_div(I, config.blocks["BLOCK_I"]), ceil_div(O, config.blocks["BLOCK_O"]))
    dequantize_kernel[grid](
        weight.codes, weight.scales, nf4_table(weight.device), out, O, I, G, group, weight.codes.stride(0),
        **_constants(weight), **config.options(),
    )
    return out


def _forward_triton(x: Tensor, weight: QuantizedWeight, batch_invariant: bool, dtype: torch.dtype) -> Tensor:
    O, I, G, group = _sizes(weight)
    if len(x) > FUSED_ROWS or batch_invariant:
        wide = _decode_triton(weight, x.dtype)
        y = frozen_linear(x, wide, None, batch_invariant, dtype)
        return y.mul_(weight.scales[:, 0]) if weight.scales_outputs else y
    config, x = launch_config("product", x.dtype), x if x.stride(1) == 1 else x.contiguous()
    y = torch.empty(len(x), O, dtype=dtype, device=x.device)
    if len(x):
        grid = (ceil_div(O, config.blocks["BLOCK_O"]), ceil_div(len(x), config.blocks["BLOCK_T"]))
        quantized_linear_kernel[grid](
            x, weight.codes, weight.scales, nf4_table(weight.device), y, len(x), O, I, G, group,
            x.stride(0), weight.codes.stride(0), **_constants(weight), **config.options(),
        )
    return y


def _backward_triton(dy: Tensor, weight: QuantizedWeight, batch_invariant: bool, dtype: torch.dtype) -> Tensor:
    if weight.scales_outputs:
        dy = dy * weight.scales[:, 0].to(dy.dtype)
    wide = _decode_triton(weight, dy.dtype)

    def product(dy: Tensor) -> Tensor:
        return float32_product(dy, wide, dy.new_empty(len(dy), weight.inputs, dtype=dtype))

    return in_tiles(product, dy, INVARIANT_ROWS) if batch_invariant else product(dy)


def _decode(weight: QuantizedWeight, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """[O, I] codes in dtype, times their scales where those are per block; in out, if there is one."""
    (O, I), scales = weight.shape, weight.scales
    out = torch.empty(O, I, dtype=dtype, device=weight.device) if out is None else out
    if weight.format.kind == "int8":
        out.copy_(weight.codes)
    elif weight.scales_outputs:
        out.copy_(weight.codes.view(torch.float8_e4m3fn))
    if weight.scales_outputs:
        return out
    if weight.format.kind == "fp8":
        wide = weight.codes.view(torch.float8_e4m3fn).float()
    else:
        wide = _nf4_pairs(weight.device)[weight.codes.int()].view(torch.float32)[:, :I]
    group = weight.format.group or I
    if I % group == 0:
        wide.view(O, -1, group).mul_(scales[:, :, None])
    else:
        wide.mul_(scales.repeat_interleave(group, 1)[:, :I])
    return out.copy_(wide)


@lru_cache
def _nf4_pairs(device: torch.device) -> Tensor:
    """[256] int64: the bits of the two float32 numbers of each byte."""
    table, byte = nf4_table(device), torch.arange(256, device=device)
    return torch.stack([table[byte >> 4], table[byte & 15]], 1).view(torch.int64).squeeze(1)


def _slices(weight: QuantizedWeight, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """(rows, those rows decoded) that cover weight; each tensor is valid until the next is asked for."""
    rows = max(1, min(len(weight.codes), SLICE_ELEMENTS // weight.inputs))
    scratch = torch.empty(rows, weight.inputs, dtype=dtype)
    start = 0
    for part in weight.split([len(codes) for codes in weight.codes.split(rows)]):
        yield slice(start, start + len(part.codes)), _decode(part, dtype, scratch[: len(part.codes)])
        start += len(part.codes)


def _product_dtype(x: Tensor, weight: QuantizedWeight) -> torch.dtype:
    """bfloat16 where `linear` would round x to it, else x's, at least float32."""
    if weight.dtype == torch.bfloat16 and x.dtype in (torch.float32, torch.bfloat16) and multiplies_bfloat16():
        return torch.bfloat16
    return torch.promote_types(x.dtype, torch.float32)


def _forward_cpu(x: Tensor, weight: QuantizedWeight, dtype: torch.dtype, few: bool) -> Tensor:
    x = x.to(_product_dtype(x, weight))
    if few and x.dtype == torch.bfloat16 and weight.format.kind == "int8":
        scales = weight.scales[:, 0].bfloat16()  # which they are already: see model/quantize.py
        return torch.ops.aten._weight_int8pack_mm(x.contiguous(), weight.codes, scales).to(dtype)
    y = x.new_empty(len(x), len(weight.codes), dtype=dtype)
    for rows, wide in _slices(weight, x.dtype):
        multiply(x, wide, y[:, rows])
    return y.mul_(weight.scales[:, 0]) if weight.scales_outputs else y


def _backward_cpu(dy: Tensor, weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    if weight.scales_outputs:
        dy = dy * weight.scales[:, 0]
    dy = dy.to(_product_dtype(dy, weight))
    out = dy.new_zeros(len(dy), weight.inputs, dtype=torch.promote_types(dy.dtype, torch.float32))
    for rows, wide in _slices(weight, dy.dtype):
        if dy.dtype == out.dtype:
            out.addmm_(dy[:, rows], wide)
        else:
            out.add_(torch.mm(dy[:, rows], wide))
    return out.to(dtype)


def quantized_linear(
    x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None, batch_invariant: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """x [T, I] times a quantised weight [O, I] transposed plus bias [O]: [T, O]. Differentiable in x only.

    batch_invariant, dtype: as of `frozen_linear`, which takes quantised weights, too. Raises ValueError on shapes that
    do not match.
    """
    return frozen_linear(x, weight, bias, batch_invariant, dtype)
