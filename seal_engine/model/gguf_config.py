"""From a GGUF file's metadata to what a config.json says, and from its names of tensors to Hugging Face's.

Keys of the architecture that are not read here decide numbers that this engine would get wrong, and are refused.
"""

import math
import os
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from seal_engine.files import show
from seal_engine.model.config import ModelConfig
from seal_engine.model.gguf import FLOATS, GGUFFile
from seal_engine.model.rope import RopeConfig
from seal_engine.types import InputError

ARCHITECTURES = {  # general.architecture -> Hugging Face's class
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
PERMUTED = ("llama", "mistral")  # whose q and k have the two halves of a head interleaved
ROPE_FACTORS = "rope_freqs.weight"
SIZES = {  # key of the architecture -> field of config.json
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
}
READ_KEYS = (
    *SIZES,
    *("attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.sliding_window"),
    *("attention.layer_norm_rms_epsilon", "vocab_size", "rope.dimension_count", "rope.freq_base", "rope.scaling.type"),
    *("rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.attn_factor"),
    "rope.scaling.finetuned",
)
NO_EXPERTS = ("expert_count", "expert_used_count")  # accepted as 0
TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
STOP_IDS = ("eos", "eot", "eom")  # of tokenizer.ggml.*_token_id: tokens that end a text, a turn, a message


def read_gguf_config(file: GGUFFile) -> ModelConfig:
    """The configuration that the metadata and the names of the tensors describe. InputError naming the key."""
    prefix = file.require("general.architecture", str)
    if prefix not in ARCHITECTURES:
        accepted = f"one of {sorted(ARCHITECTURES)}"
        raise InputError(f"{file.path}: general.architecture: found {show(prefix)}; accepted: {accepted}")
    _validate_keys(file, prefix)
    raw: dict[str, Any] = {"architectures": [ARCHITECTURES[prefix]], "model_type": prefix, "hidden_act": "silu"}
    raw |= {field: file.require(f"{prefix}.{key}", int) for key, field in SIZES.items()}
    heads = raw["num_attention_heads"]
    raw["num_key_value_heads"] = file.get(f"{prefix}.attention.head_count_kv", int, heads)
    raw["head_dim"] = _head_dim(file, prefix, raw["hidden_size"], heads)
    raw["rms_norm_eps"] = _shortest(file.require(f"{prefix}.attention.layer_norm_rms_epsilon", float))
    raw["vocab_size"] = file.get(f"{prefix}.vocab_size", int, len(file.get("tokenizer.ggml.tokens", list, [])))
    raw["tie_word_embeddings"] = "output.weight" not in file.tensors
    if prefix == "mistral":
        raw["sliding_window"] = file.get(f"{prefix}.attention.sliding_window", int)
    if prefix in ("llama", "qwen3"):
        raw["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    if prefix == "llama":
        raw["mlp_bias"] = "blk.0.ffn_gate.bias" in file.tensors
    raw["rope_theta"] = _shortest(file.get(f"{prefix}.rope.freq_base", float, 10000.0))
    raw["rope_scaling"] = _rope_scaling(file, prefix, raw)
    for name in ("bos", "eos"):
        if (token_id := file.get(f"tokenizer.ggml.{name}_token_id", int)) is not None:
            raw[f"{name}_token_id"] = token_id
    if len(stop_ids := read_gguf_stop_ids(file)) > 1:
        raw["eos_token_id"] = stop_ids
    config = ModelConfig.from_dict(raw, str(file.path))
    return replace(config, dtype=_dtype(file), directory=os.path.abspath(file.path))


def read_gguf_stop_ids(file: GGUFFile) -> list[int]:
    """The ids that end a completion, without repeats."""
    ids = (file.get(f"tokenizer.ggml.{name}_token_id", int) for name in STOP_IDS)
    return list(dict.fromkeys(token_id for token_id in ids if token_id is not None))


def hugging_face_name(name: str) -> str | None:
    """A GGUF tensor's name in a Hugging Face checkpoint; None where it has none."""
    module, _, kind = name.rpartition(".")
    if kind not in ("weight", "bias"):
        return None
    if module in TENSORS:
        return f"{TENSORS[module]}.{kind}"
    block, _, rest = module.partition(".")
    number, _, module = rest.partition(".")
    if block != "blk" or not number.isdecimal() or module not in LAYER_TENSORS:
        return None
    return f"model.layers.{int(number)}.{LAYER_TENSORS[module]}.{kind}"


def row_order(config: ModelConfig, name: str) -> Tensor | None:
    """For each stored row of a projection the row of Hugging Face's: int64; None where they are the same.

    GGUF turns neighbouring elements of a head for llama, Hugging Face those that are half a head apart.
    """
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None or config.raw["model_type"] not in PERMUTED:
        return None
    rows = torch.arange(heads * config.head_dim).view(heads, 2, config.head_dim // 2)
    return rows.transpose(1, 2).reshape(-1)


def _validate_keys(file: GGUFFile, prefix: str) -> None:
    known = {f"{prefix}.{key}" for key in READ_KEYS}
    for key, value in file.metadata.items():
        if not key.startswith(f"{prefix}.") or key in known:
            continue
        if key.removeprefix(f"{prefix}.") not in NO_EXPERTS or value:
            accepted = f"none: the keys that are read are {sorted(known)}"
            raise InputError(f"{file.path}: {key}: found {show(value)}; accepted: {accepted}")
    if file.get("split.count", int, 1) > 1:
        raise InputError(f"{file.path}: split.count: found {file.metadata['split.count']}; accepted: 1: a whole file")


def _head_dim(file: GGUFFile, prefix: str, hidden_size: int, heads: int) -> int:
    head_dim = hidden_size // max(1, heads)
    if prefix in PERMUTED:  # whose older files say it only there
        head_dim = file.get(f"{prefix}.rope.dimension_count", int, head_dim)
    head_dim = file.get(f"{prefix}.attention.key_length", int, head_dim)
    for key in ("rope.dimension_count", "attention.value_length"):
        value = file.get(f"{prefix}.{key}", int, head_dim)
        if value != head_dim:
            raise InputError(f"{file.path}: {prefix}.{key}: found {value}; accepted: {head_dim}, the size of a head")
    return head_dim


def _shortest(value: float) -> float:
    """The shortest decimal of a float32, as people wrote it: 1e-05, not 9.999999747378752e-06."""
    return float(str(torch.tensor(value, dtype=torch.float32).numpy()))


def _dtype(file: GGUFFile) -> torch.dtype:
    """That of the matrices if they are all of one; float32, which holds what blocks stand for, otherwise."""
    types = {tensor.type_name for tensor in file.tensors.values() if len(tensor.shape) > 1}
    return FLOATS.get(types.pop(), torch.float32) if len(types) == 1 else torch.float32


def _rope_scaling(file: GGUFFile, prefix: str, raw: dict[str, Any]) -> dict[str, Any] | None:
    key = f"{prefix}.rope.scaling"
    kind = file.get(f"{key}.type", str, "none")
    if kind not in ("none", "linear", "yarn"):
        accepted = "one of ['none', 'linear', 'yarn']"
        raise InputError(f"{file.path}: {key}.type: found {show(kind)}; accepted: {accepted}")
    if ROPE_FACTORS in file.tensors:
        if kind != "none":
            raise InputError(f"{file.path}: {key}.type: found {show(kind)}; accepted: none beside {ROPE_FACTORS}")
        return _llama3_scaling(file, raw["head_dim"], raw["rope_theta"])
    if kind == "none":
        return None
    scaling = {"rope_type": kind, "factor": _shortest(file.require(f"{key}.factor", float))}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = file.require(f"{key}.original_context_length", int)
        if (attention_factor := file.get(f"{key}.attn_factor", float)) is not None:
            scaling["attention_factor"] = _shortest(attention_factor)
    return scaling


def _llama3_scaling(file: GGUFFile, head_dim: int, theta: float) -> dict[str, Any]:
    """Llama 3's scaling, from what it divides each frequency by: the file has no other trace of it.

    The share of a frequency that is kept is (turns - low) / (high - low), between 0 and 1: a line in the frequency.
    Where it is 0, a frequency turns `low` times over the original length. Only ratios matter, so low is about 1.
    """
    factors = _rope_factors(file, head_dim)
    frequencies = RopeConfig(rope_theta=theta).inverse_frequencies(head_dim).double()  # falling
    factor = factors.max()
    kept = (1 / factors - 1 / factor) / (1 - 1 / factor)  # falls from 1 to 0
    first, last = int((kept > 1 - 1e-6).sum()) - 1, len(kept) - int((kept < 1e-6).sum())  # last of 1, first of 0
    slope, middle = _steepest(frequencies, kept, first, last)
    lowest = frequencies[middle] - kept[middle] / slope
    original = max(1, round(float(2 * math.pi / lowest)))
    turns = original / (2 * math.pi)
    bounds = float(lowest * turns), float((lowest + 1 / slope) * turns)
    for low, high in (tuple(round(bound, 2) for bound in bounds), bounds):  # as people wrote them, or as they fit
        scaling = {
            "rope_type": "llama3",
            "factor": _shortest(float(factor)),
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": original,
        }
        ours = RopeConfig(**scaling, rope_theta=theta).inverse_frequencies(head_dim)
        if torch.allclose(frequencies / ours, factors, rtol=1e-5):
            return scaling
    raise InputError(f"{file.path}: tensor {ROPE_FACTORS}: found {show(factors.tolist())}; accepted: Llama 3's")


def _rope_factors(file: GGUFFile, head_dim: int) -> Tensor:
    """[head_dim / 2] float64, from 1 up."""
    stored = file.tensors[ROPE_FACTORS]
    if stored.type_name != "F32" or stored.shape != (head_dim // 2,):
        found = f"{stored.type_name} {list(stored.shape)}"
        raise InputError(f"{file.path}: tensor {ROPE_FACTORS}: found {found}; accepted: F32 {[head_dim // 2]}")
    with open(file.path, "rb") as stream:
        stream.seek(stored.start)
        factors = torch.frombuffer(bytearray(stream.read(stored.stop - stored.start)), dtype=torch.float32).double()
    if not (factors.isfinite().all() and factors[0] == 1 and factors.min() == 1 and factors.max() > 1):
        raise InputError(f"{file.path}: tensor {ROPE_FACTORS}: found {show(factors.tolist())}; accepted: from 1 up")
    return factors


def _steepest(x: Tensor, y: Tensor, first: int, last: int) -> tuple[Tensor, int]:
    """(slope, number of a point on it) of the line between y = 1 at `first` and y = 0 at `last`.

    Two points between the two lie on it. With fewer, any line will do that is steep enough to be 1 and 0 there.
    """
    if last - first > 2:
        return (y[first + 1] - y[last - 1]) / (x[first + 1] - x[last - 1]), first + 1
    middle = first + 1
    pairs = [(first, middle), (middle, last)] if last > middle else [(first, middle)]
    return torch.stack([(y[i] - y[j]) / (x[i] - x[j]) for i, j in pairs]).max(), middle
