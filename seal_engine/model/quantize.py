"""Quantised frozen bases: how a matrix becomes codes and scales, and checkpoints that hold codes and scales already.

Linears are quantised; embeddings, norms, biases and lm_head stay as they are. "int8" has a scale per output, "nf4" is
bitsandbytes': blocks of 64 inputs with a scale each. Read as they are stored: FP8 with a scale per block of 128 x 128
(DeepSeek's and Qwen's files) or per output (compressed-tensors), and bitsandbytes' NF4, double quantisation included.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seal_engine.files import show
from seal_engine.model.sources import FloatSource, MappedFiles, Source, StoredTensor
from seal_engine.types import InputError
from seal_kernels.linear import FrozenWeight
from seal_kernels.quantized_linear import NF4, QuantizedWeight, WeightFormat

INT8, NF4_64 = WeightFormat("int8"), WeightFormat("nf4", 64)
FORMATS = {"int8": INT8, "nf4": NF4_64}  # what a base can be quantised to while it is loaded
QUANTIZE = tuple(FORMATS)
FP8_BLOCK = 128
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# What belongs to a quantised weight, by the end of its name.
PARTS = (
    *("weight_scale_inv", "weight_scale", "weight.absmax", "weight.quant_map", "weight.nested_absmax"),
    *("weight.nested_quant_map", "weight.quant_state.bitsandbytes__nf4", "input_scale"),
)
ACCEPTED = (
    "null, quant_method 'fp8' with weight_block_size [128, 128], 'compressed-tensors' of format 'float-quantized' with "
    "weights of 8 bits and a scale per channel or tensor, or 'bitsandbytes' with load_in_4bit and nf4"
)


def parse_quantize(quantize: str | None) -> WeightFormat | None:
    """The format of a name; None for None. InputError for any other."""
    if quantize is not None and quantize not in FORMATS:
        raise InputError(f"quantize: found {show(quantize)}; accepted: None or one of {list(FORMATS)}")
    return None if quantize is None else FORMATS[quantize]


def read_quantization_config(found: Any, source: str) -> WeightFormat | None:
    """The format of the weights that a config.json's quantization_config describes; None: they are not quantised."""
    if found is None:
        return None
    form = _described(found) if isinstance(found, dict) else None
    if form is None:
        raise InputError(f"{source}: quantization_config: found {show(found)}; accepted: {ACCEPTED}")
    return form


def _described(config: Mapping[str, Any]) -> WeightFormat | None:
    method = config.get("quant_method")
    if method == "fp8" and config.get("weight_block_size") == [FP8_BLOCK, FP8_BLOCK]:
        dynamic = config.get("activation_scheme", "dynamic") == "dynamic"
        return WeightFormat("fp8", FP8_BLOCK) if dynamic and config.get("fmt", "e4m3") == "e4m3" else None
    if method == "bitsandbytes":
        nf4 = config.get("bnb_4bit_quant_type") == "nf4" and not config.get("load_in_8bit")
        return NF4_64 if nf4 and config.get("load_in_4bit", config.get("_load_in_4bit")) else None
    if method != "compressed-tensors" or config.get("format") != "float-quantized":
        return None
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1:
        return None
    group = next(iter(groups.values()))
    weights, inputs = group.get("weights") or {}, group.get("input_activations") or {"dynamic": True}
    wanted = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
    fits = all(weights.get(name, value) == value for name, value in wanted.items())
    fits = fits and weights.get("strategy") in ("channel", "tensor") and group.get("targets") == ["Linear"]
    return WeightFormat("fp8") if fits and inputs.get("dynamic") is True else None


def is_linear(name: str) -> bool:
    """Whether a parameter of this name is the matrix of a projection, which is what is quantised."""
    module, _, kind = name.rpartition(".")
    return kind == "weight" and module.split(".")[-1] in LINEARS


# ---- floats to codes ----


@dataclass(frozen=True)
class QuantizingSource:
    """A stored matrix of numbers that is quantised on its way to the model, some rows at a time."""

    source: FloatSource

    @property
    def file(self) -> Path:
        return self.source.file

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def start(self) -> int:
        return self.source.start

    def fill(self, files: MappedFiles, parameter: FrozenWeight) -> None:
        assert isinstance(parameter, QuantizedWeight)
        order, device = self.source.row_order, parameter.device
        for first, last, values in self.source.pieces(files):
            rows = slice(first, last) if order is None else order[first:last].to(device)
            values = values.to(device, torch.float32)
            if not values.isfinite().all():
                raise InputError(f"{self.file}: tensor {self.name}: found NaN or infinity; accepted: finite weights")
            parameter.codes[rows], parameter.scales[rows] = encode(values, parameter.format)


def encode(values: Tensor, form: WeightFormat) -> tuple[Tensor, Tensor]:
    """(codes, scales) of numbers [rows, I] float32, in a format of FORMATS."""
    return _encode_int8(values) if form == INT8 else _encode_nf4(values, NF4_64.group or 0)


def _encode_int8(values: Tensor) -> tuple[Tensor, Tensor]:
    """Round to nearest of 127 steps each way. Scales are bfloat16 numbers, rounded up: torch's product takes those."""
    largest = values.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    scales = (largest / 127).bfloat16()
    scales = torch.where(scales.float() * 127 < largest, _next_up(scales), scales).float()
    return (values / scales).round_().clamp_(-127, 127).to(torch.int8), scales


def _next_up(positive: Tensor) -> Tensor:
    """The next larger bfloat16."""
    return (positive.view(torch.int16) + 1).view(torch.bfloat16)


def _encode_nf4(values: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """The nearest of the 16 numbers times the block's largest magnitude."""
    rows, inputs = values.shape
    padded = torch.nn.functional.pad(values, (0, -inputs % group)).view(rows, -1, group)
    scales = padded.abs().amax(2)
    shares = (
        (padded / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, :, None]).view(rows, -1)[:, :inputs].contiguous()
    )
    codes = torch.bucketize(shares, _nf4_bounds(values.device), out_int32=True).to(torch.uint8)
    codes = torch.nn.functional.pad(codes, (0, inputs % 2))
    return (codes[:, ::2] << 4) | codes[:, 1::2], scales


@lru_cache
def _nf4_bounds(device: torch.device) -> Tensor:
    """[15]: halfway between neighbours of the 16 numbers."""
    table = torch.tensor(NF4, dtype=torch.float64)
    return ((table[1:] + table[:-1]) / 2).float().to(device)


# ---- codes as they are stored ----


@dataclass(frozen=True)
class StoredCodes:
    """A matrix that is stored as codes, and what its scales follow from, by the ends of their names."""

    form: WeightFormat
    weight: StoredTensor
    parts: Mapping[str, StoredTensor]
    shape: tuple[int, ...]  # [O, I]

    @property
    def file(self) -> Path:
        return self.weight.file

    @property
    def name(self) -> str:
        return self.weight.name

    @property
    def start(self) -> int:
        return self.weight.start

    def fill(self, files: MappedFiles, parameter: FrozenWeight) -> None:
        assert isinstance(parameter, QuantizedWeight)
        codes = files.read(self.weight.file, self.weight.start, self.weight.stop)
        parameter.codes.copy_(codes.view(parameter.codes.shape))
        files.release(self.weight.file, self.weight.start, self.weight.stop)
        parameter.scales.copy_(self._scales(files))

    def _scales(self, files: MappedFiles) -> Tensor:
        """[O, G] float32."""
        O = self.shape[0]
        if self.form.kind == "nf4":
            return self._absmax(files).view(O, -1)
        if self.form.group is None:
            return self._read(files, "weight_scale").float().view(-1, 1).expand(O, 1)
        blocks = self._read(files, "weight_scale_inv").float()  # [ceil(O / 128), ceil(I / 128)]
        return blocks.repeat_interleave(FP8_BLOCK, 0)[:O]

    def _absmax(self, files: MappedFiles) -> Tensor:
        """The blocks' largest magnitudes; with double quantisation from 8-bit codes with scales of their own."""
        absmax = self._read(files, "weight.absmax")
        if absmax.dtype != torch.uint8:
            return absmax.float()
        state = _quant_state(self.parts, files, self.name)
        table, scales = (self._read(files, f"weight.nested_{name}").float() for name in ("quant_map", "absmax"))
        size = int(state["nested_blocksize"])
        return table[absmax.long()] * scales.repeat_interleave(size)[: len(absmax)] + float(state["nested_offset"])

    def _read(self, files: MappedFiles, part: str) -> Tensor:
        return _read(files, self.parts[part])


def _read(files: MappedFiles, stored: StoredTensor) -> Tensor:
    return stored.values(files.read(stored.file, stored.start, stored.stop)).clone()


def gather_codes(stored: Mapping[str, StoredTensor], form: WeightFormat) -> dict[str, Source]:
    """What fills each parameter of a quantised checkpoint: linears with the tensors that belong to them, the others.

    Raises InputError naming the tensor: parts that are missing or of another dtype or shape, other codes than NF4's.
    """
    sources: dict[str, Source] = {}
    with MappedFiles() as files:
        for name, tensor in stored.items():
            if name.endswith(PARTS) and is_linear(_owner(name)):
                continue
            if not is_linear(name):
                sources[name] = FloatSource(tensor)
                continue
            parts = {end: stored[_part(name, end)] for end in PARTS if _part(name, end) in stored}
            sources[name] = _checked_nf4(tensor, parts, files) if form == NF4_64 else _checked_fp8(tensor, parts, form)
    return sources


def _part(name: str, end: str) -> str:
    return name.removesuffix("weight") + end


def _owner(name: str) -> str:
    end = next(end for end in PARTS if name.endswith(end))
    return name.removesuffix(end) + "weight"


def _checked_fp8(weight: StoredTensor, parts: Mapping[str, StoredTensor], form: WeightFormat) -> StoredCodes:
    _validate_dtype(weight, torch.float8_e4m3fn)
    (O, I), scale = weight.shape, "weight_scale" if form.group is None else "weight_scale_inv"
    shapes = [(-(-O // FP8_BLOCK), -(-I // FP8_BLOCK))] if form.group else [(O, 1), (O,), (1,), ()]
    _validate_parts(weight, parts, [scale], [])
    if parts[scale].shape not in shapes or parts[scale].dtype not in (torch.float32, torch.bfloat16, torch.float16):
        found = f"{parts[scale].dtype} {list(parts[scale].shape)}"
        raise InputError(f"{weight.file}: tensor {parts[scale].name}: found {found}; accepted: floats {shapes}")
    return StoredCodes(form, weight, parts, weight.shape)


def _checked_nf4(weight: StoredTensor, parts: Mapping[str, StoredTensor], files: MappedFiles) -> StoredCodes:
    _validate_dtype(weight, torch.uint8)
    nested = ["weight.nested_absmax", "weight.nested_quant_map"]
    required = ["weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4"]
    double = "weight.absmax" in parts and parts["weight.absmax"].dtype == torch.uint8
    _validate_parts(weight, parts, [*required, *nested] if double else required, nested)
    state = _quant_state(parts, files, weight.name)
    shape = tuple(state.get("shape", ()))
    group = NF4_64.group or 0
    if state.get("blocksize") != group or len(shape) != 2 or shape[1] % group:
        accepted = f"blocksize {group} and a matrix whose rows are whole blocks"
        raise InputError(f"{weight.file}: tensor {weight.name}: quant_state: found {show(state)}; accepted: {accepted}")
    elements = shape[0] * shape[1]
    if weight.stop - weight.start != elements // 2 or parts["weight.absmax"].shape != (elements // group,):
        found = f"{list(weight.shape)} and absmax {list(parts['weight.absmax'].shape)}"
        raise InputError(f"{weight.file}: tensor {weight.name}: found {found}; accepted: those of {list(shape)}")
    table = _read(files, parts["weight.quant_map"]).float()
    if table.shape != (16,) or not torch.allclose(table, torch.tensor(NF4), atol=1e-6):
        raise InputError(
            f"{weight.file}: tensor {weight.name}: quant_map: found {show(table.tolist())}; accepted: NF4's"
        )
    return StoredCodes(NF4_64, weight, parts, shape)


def _quant_state(parts: Mapping[str, StoredTensor], files: MappedFiles, name: str) -> dict[str, Any]:
    stored = parts["weight.quant_state.bitsandbytes__nf4"]
    try:
        return dict(json.loads(bytes(_read(files, stored).numpy()).decode()))
    except (ValueError, TypeError) as error:
        raise InputError(f"{stored.file}: tensor {stored.name}: not JSON: {error}; accepted: {name}'s state") from None


def _validate_dtype(weight: StoredTensor, dtype: torch.dtype) -> None:
    if weight.dtype != dtype:
        accepted = f"{dtype}: all linears of a quantised checkpoint are"
        raise InputError(f"{weight.file}: tensor {weight.name}: found {weight.dtype}; accepted: {accepted}")


def _validate_parts(
    weight: StoredTensor, parts: Mapping[str, StoredTensor], required: list[str], also: list[str]
) -> None:
    for end in required:
        if end not in parts:
            raise InputError(f"{weight.file}: tensor {_part(weight.name, end)} is missing beside {weight.name}")
    for end in parts.keys() - {*required, *also}:
        raise InputError(f"{weight.file}: tensor {parts[end].name} has no place beside {weight.name}")
