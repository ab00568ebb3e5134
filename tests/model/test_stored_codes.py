"""Checkpoints whose weights are codes already: written here by the formats' public definitions, then read.

The definitions: FP8 in blocks is weight = e4m3 x weight_scale_inv of its block of 128 x 128 (DeepSeek-V3, section
3.3; Qwen's FP8 files); compressed-tensors' float-quantized is e4m3 x weight_scale of the row; bitsandbytes' NF4 is
quant_map[code] x absmax of each 64 consecutive numbers of the flat matrix, two codes in a byte, the first in the high
bits, where absmax itself may be nested_quant_map[code] x nested_absmax of 256 of them, plus nested_offset.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import oracle
from compare import relative_error
from seal_engine import Engine, InputError, LoraConfig, TrainJob
from seal_kernels.quantized_linear import NF4, QuantizedWeight

SIZES = {"hidden_size": 320, "intermediate_size": 192, "num_attention_heads": 5, "num_key_value_heads": 1}
LINEARS = tuple(f"{name}_proj.weight" for name in ("q", "k", "v", "o", "gate", "up", "down"))
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False},
            "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
        }
    },
}
BITSANDBYTES = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "load_in_8bit": False,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
}
Written = tuple[dict[str, torch.Tensor], torch.Tensor]  # tensors by the ends of their names; the numbers they stand for


def fp8_blocks(w: torch.Tensor) -> Written:
    O, I = w.shape
    codes = torch.empty(O, I, dtype=torch.float8_e4m3fn)
    scales, numbers = torch.empty(-(-O // 128), -(-I // 128)), torch.empty(O, I)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
            scales[i, j] = w[block].abs().max() / 448
            codes[block] = (w[block] / scales[i, j]).to(torch.float8_e4m3fn)
            numbers[block] = codes[block].float() * scales[i, j]
    return {"weight": codes, "weight_scale_inv": scales}, numbers


def fp8_rows(w: torch.Tensor) -> Written:
    scales = (w.abs().amax(1, keepdim=True) / 448).bfloat16()
    codes = (w / scales.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scales}, codes.float() * scales.float()


def fp8_tensor(w: torch.Tensor) -> Written:
    scale = w.abs().max().view(1) / 448
    codes = (w / scale).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scale}, codes.float() * scale


def nf4(w: torch.Tensor, double: bool) -> Written:
    table, flat = torch.tensor(NF4), w.reshape(-1, 64)
    absmax = flat.abs().amax(1)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(w.shape)}
    parts = {"weight.quant_map": table, "weight.absmax": absmax}
    if double:
        offset, nested_table = absmax.mean(), torch.linspace(-1, 1, 256) ** 3
        padded = torch.nn.functional.pad(absmax - offset, (0, -len(absmax) % 256)).view(-1, 256)
        nested = padded.abs().amax(1)
        codes = ((padded / nested[:, None])[:, :, None] - nested_table).abs().argmin(2).view(-1)[: len(absmax)]
        absmax = nested_table[codes] * nested.repeat_interleave(256)[: len(codes)] + offset
        parts |= {
            "weight.absmax": codes.to(torch.uint8),
            "weight.nested_absmax": nested,
            "weight.nested_quant_map": nested_table,
        }
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset.item()}
    codes = ((flat / absmax[:, None])[:, :, None] - table).abs().argmin(2)
    pairs = codes.view(-1, 2).to(torch.uint8)
    parts["weight"] = ((pairs[:, 0] << 4) | pairs[:, 1])[:, None]
    parts["weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return parts, (table[codes] * absmax[:, None]).view(w.shape)


FILES = {
    "fp8-blocks": (FP8, fp8_blocks),
    "fp8-channel": (COMPRESSED, fp8_rows),
    "fp8-tensor": (COMPRESSED, fp8_tensor),
    "nf4": (BITSANDBYTES, lambda w: nf4(w, double=False)),
    "nf4-double": (BITSANDBYTES, lambda w: nf4(w, double=True)),
}


def write(kind: str, directory: Path) -> dict[str, torch.Tensor]:
    """A checkpoint with codes in place of its linears; returns the numbers of every parameter."""
    config, quantise = FILES[kind]
    model = oracle.make_model("llama", **SIZES)
    oracle.save(model, directory)
    numbers, stored = {}, {}
    for name, tensor in load_file(directory / "model.safetensors").items():
        numbers[name] = stored[name] = tensor
        if name.endswith(LINEARS):
            parts, numbers[name] = quantise(tensor)
            del stored[name]
            stored |= {name.removesuffix("weight") + end: part.contiguous() for end, part in parts.items()}
    save_file(stored, directory / "model.safetensors", {"format": "pt"})
    written = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(written | {"quantization_config": config}))
    return numbers


@pytest.mark.parametrize("kind", FILES)
def test_logits_are_those_of_the_numbers_that_codes_stand_for(kind, tmp_path):
    numbers = write(kind, tmp_path / "model")
    engine = Engine.from_pretrained(tmp_path / "model", "cpu")
    for name, weight in engine.model.named_tensors():
        if isinstance(weight, QuantizedWeight):
            torch.testing.assert_close(weight.dequantize(), numbers[name], rtol=1e-6, atol=1e-7)
    theirs = oracle.make_model("llama", **SIZES)
    theirs.load_state_dict(numbers)
    batch = oracle.sequences([40, 3])
    for ours, truth in zip(engine.logits(batch), oracle.logits(theirs, batch), strict=True):
        assert relative_error(ours, truth) < 1e-5


@pytest.mark.parametrize("kind", ["fp8-blocks", "fp8-channel", "nf4-double"])
def test_adapters_are_trained_on_such_bases(kind, tmp_path):
    write(kind, tmp_path / "model")
    engine = Engine.from_pretrained(tmp_path / "model", "cpu", "bfloat16")
    job = TrainJob(
        oracle.sequences([30]), LoraConfig(r=4, target_modules="all-linear"), learning_rate=3e-3, num_epochs=4
    )
    result = engine.train([job], progress=False)[0]
    assert result.error is None
    assert result.losses[-1] < result.losses[0]
    with pytest.raises(InputError, match=r"quantize: found .* stored as (fp8|nf4); accepted: None"):
        Engine.from_pretrained(tmp_path / "model", "cpu", quantize="int8")


BROKEN_CONFIGS = {
    "another method": {"quant_method": "gptq", "bits": 4},
    "blocks of another size": {**FP8, "weight_block_size": [64, 64]},
    "scales of activations": {**FP8, "activation_scheme": "static"},
    "4 bits of another kind": {**BITSANDBYTES, "bnb_4bit_quant_type": "fp4"},
    "8 bits": {**BITSANDBYTES, "load_in_4bit": False, "load_in_8bit": True},
    "packed": {**COMPRESSED, "format": "pack-quantized"},
    "no object": "fp8",
}


@pytest.mark.parametrize("case", BROKEN_CONFIGS)
def test_other_quantisations_are_refused(case, tmp_path):
    write("fp8-blocks", tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(config | {"quantization_config": BROKEN_CONFIGS[case]}))
    with pytest.raises(
        InputError, match=r"config.json: quantization_config: found .*; accepted: null, quant_method 'fp8'"
    ):
        Engine.from_pretrained(tmp_path / "model", "cpu")


Q = "model.layers.0.self_attn.q_proj."
BROKEN_TENSORS = {
    "no scales": ("fp8-blocks", lambda t: t.pop(Q + "weight_scale_inv"), "q_proj.weight_scale_inv is missing beside"),
    "scales of another shape": (
        "fp8-blocks",
        lambda t: t.update({Q + "weight_scale_inv": torch.ones(2, 2)}),
        r"weight_scale_inv: found torch.float32 \[2, 2\]; accepted: floats \[\(3, 3\)\]",
    ),
    "a linear in floats": (
        "fp8-blocks",
        lambda t: t.update({Q + "weight": torch.ones(320, 320).bfloat16()}),
        "q_proj.weight: found torch.bfloat16; accepted: torch.float8_e4m3fn",
    ),
    "scales of another format": (
        "fp8-channel",
        lambda t: t.update({Q + "input_scale": torch.ones(1)}),
        "q_proj.input_scale has no place beside",
    ),
    "no state": ("nf4", lambda t: t.pop(Q + "weight.quant_state.bitsandbytes__nf4"), "nf4 is missing beside"),
    "a state that is no JSON": (
        "nf4",
        lambda t: t.update({Q + "weight.quant_state.bitsandbytes__nf4": torch.zeros(4, dtype=torch.uint8)}),
        "bitsandbytes__nf4: not JSON",
    ),
    "fewer codes": (
        "nf4",
        lambda t: t.update({Q + "weight": t[Q + "weight"][:-64]}),
        "q_proj.weight: found .*accepted",
    ),
    "other quantiles": (
        "nf4",
        lambda t: t.update({Q + "weight.quant_map": torch.linspace(-1, 1, 16)}),
        "quant_map: found .*accepted: NF4's",
    ),
    "half of double quantisation": (
        "nf4-double",
        lambda t: t.pop(Q + "weight.nested_absmax"),
        "weight.nested_absmax is missing",
    ),
}


@pytest.mark.parametrize("case", BROKEN_TENSORS)
def test_broken_files_name_the_tensor(case, tmp_path):
    kind, change, message = BROKEN_TENSORS[case]
    write(kind, tmp_path / "model")
    tensors = load_file(tmp_path / "model/model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model/model.safetensors")
    with pytest.raises(InputError, match=message) as caught:
        Engine.from_pretrained(tmp_path / "model", "cpu")
    assert str(tmp_path / "model") in str(caught.value)


def test_codes_are_refused_where_the_config_does_not_tell_of_them(tmp_path):
    """As a file of another dtype always was."""
    write("fp8-blocks", tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="found dtype F8_E4M3; accepted: one of"):
        Engine.from_pretrained(tmp_path / "model", "cpu")


def test_bitsandbytes_state_is_read(tmp_path):
    """What the library itself packs for a checkpoint, double quantisation included; 8-bit codes and all."""
    functional = pytest.importorskip("bitsandbytes.functional")
    write("nf4-double", tmp_path / "model")
    file = tmp_path / "model/model.safetensors"
    tensors = load_file(file)
    torch.manual_seed(0)
    values = torch.randn(320, 320)
    codes, state = functional.quantize_4bit(values, blocksize=64, quant_type="nf4", compress_statistics=True)
    packed = {Q + "weight." + name: part for name, part in state.as_dict(packed=True).items()}
    assert packed.keys() <= tensors.keys()
    save_file(tensors | packed | {Q + "weight": codes}, file)
    engine = Engine.from_pretrained(tmp_path / "model", "cpu")
    ours = dict(engine.model.named_tensors())[Q + "weight"].dequantize()
    torch.testing.assert_close(ours, functional.dequantize_4bit(codes, state), rtol=1e-5, atol=1e-6)
    shutil.rmtree(tmp_path / "model")
