"""ModelConfig: what a Hugging Face config.json says about a dense decoder, checked field by field.

Reads both ways of writing it: Transformers 4 (`rope_theta`, `rope_scaling`, `torch_dtype`) and Transformers 5
(`rope_parameters`, `dtype`). Fields that a file leaves out take the value that Transformers gives them.
"""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from seal_engine.files import read_json, show
from seal_engine.model.fields import Fields
from seal_engine.model.quantize import read_quantization_config
from seal_engine.model.rope import RopeConfig, read_rope
from seal_engine.types import InputError
from seal_kernels.quantized_linear import WeightFormat

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LAYER_TYPES = ("full_attention", "sliding_attention")
# Fields that change what Transformers loads or computes, and that are accepted only as null.
UNSUPPORTED = ("per_layer_config", "transformers_weights")


@dataclass(frozen=True)
class Architecture:
    """What sets one architecture apart from plain Llama, and its defaults for fields a config.json leaves out."""

    defaults: dict[str, Any]
    qkv_bias: bool | None = None  # None: as the config's attention_bias says
    o_bias: bool | None = None
    mlp_bias: bool | None = False
    qk_norm: bool = False
    windows: bool = False  # sliding_window counts, on the layers that layer_types names
    windows_switch: bool = False  # only with use_sliding_window and, without layer_types, from max_window_layers on


ARCHITECTURES = {
    "LlamaForCausalLM": Architecture(
        {"intermediate_size": 11008, "max_position_embeddings": 2048, "vocab_size": 32000}, mlp_bias=None
    ),
    "MistralForCausalLM": Architecture(
        {
            "intermediate_size": 14336,
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
            "vocab_size": 32000,
        },
        qkv_bias=False,
        o_bias=False,
        windows=True,
    ),
    "Qwen2ForCausalLM": Architecture(
        {
            "intermediate_size": 22016,
            "max_position_embeddings": 32768,
            "num_key_value_heads": 32,
            "sliding_window": 4096,
            "vocab_size": 151936,
        },
        qkv_bias=True,
        o_bias=False,
        windows=True,
        windows_switch=True,
    ),
    "Qwen3ForCausalLM": Architecture(
        {
            "head_dim": 128,
            "intermediate_size": 22016,
            "max_position_embeddings": 32768,
            "num_key_value_heads": 32,
            "sliding_window": 4096,
            "vocab_size": 151936,
        },
        qk_norm=True,
        windows=True,
        windows_switch=True,
    ),
}
COMMON_DEFAULTS = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "sliding_window": None,
    "use_sliding_window": False,
    "max_window_layers": 28,
    "layer_types": None,
    "rope_theta": 10000.0,
}


@dataclass(frozen=True)
class ModelConfig:
    """A dense decoder: Llama 2/3, Mistral, Qwen2/2.5 or Qwen3. Field names are Hugging Face's."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int  # tokens of the longest sequence: at least the file's, see RopeConfig.max_length
    tie_word_embeddings: bool
    rope: RopeConfig
    windows: tuple[int | None, ...]  # sliding window of each layer
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    dtype: torch.dtype | None  # None: not written; the tensors' own
    raw: dict[str, Any] = field(repr=False, compare=False)  # config.json as read, for save_pretrained
    quantization: WeightFormat | None = None  # of the linears as they are stored
    directory: str | None = field(default=None, compare=False)  # of the checkpoint: adapters name it as their base

    @property
    def query_size(self) -> int:
        """H * E."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        """K * E."""
        return self.num_key_value_heads * self.head_dim

    @property
    def num_matrix_parameters(self) -> int:
        """Parameters that every token is multiplied with (N in "4N FLOPs a token"): the lm_head counts, the
        embedding table does not."""
        layer = self.hidden_size * (2 * self.query_size + 2 * self.key_value_size + 3 * self.intermediate_size)
        return self.num_hidden_layers * layer + self.vocab_size * self.hidden_size

    @staticmethod
    def from_directory(path: str | Path) -> "ModelConfig":
        """Read `path`/config.json. Raises InputError (a ValueError) naming the file and the field."""
        directory = Path(path)
        if not os.path.isdir(directory):  # unlike Path.is_dir, raises nothing for names that no file can have
            raise InputError(f"{directory}: not a directory; accepted: a Hugging Face checkpoint directory")
        config = ModelConfig.from_dict(read_json(directory / "config.json"), str(directory / "config.json"))
        return replace(config, directory=os.path.abspath(directory))

    @staticmethod
    def from_dict(raw: dict[str, Any], source: str = "config") -> "ModelConfig":
        """Check and convert the contents of a config.json. `source` names it in error messages."""
        name = _architecture(raw, source)
        kind = ARCHITECTURES[name]
        for field_name in UNSUPPORTED:
            if raw.get(field_name) is not None:
                raise InputError(f"{source}: {field_name}: found {show(raw[field_name])}; accepted: null")
        read = Fields({**COMMON_DEFAULTS, **kind.defaults, **raw}, source)

        heads = read.integer("num_attention_heads")
        hidden = read.integer("hidden_size")
        layers = read.integer("num_hidden_layers", below=2**16)  # each layer is held by itself
        kv_heads = heads if read.values["num_key_value_heads"] is None else read.integer("num_key_value_heads")
        if heads % kv_heads:
            raise InputError(
                f"{source}: num_attention_heads: {heads} is not a multiple of num_key_value_heads {kv_heads}"
            )
        if read.values["head_dim"] is None:
            if hidden % heads:
                raise read.refuse("hidden_size", f"a multiple of num_attention_heads, {heads}")
            read.values["head_dim"] = hidden // heads
        head_dim = read.integer("head_dim")
        if head_dim % 2:
            raise read.refuse("head_dim", "an even number")
        if read.values["hidden_act"] not in ("silu", "swish"):
            raise read.refuse("hidden_act", "'silu'")
        max_positions = read.integer("max_position_embeddings")
        attention_bias = read.boolean("attention_bias")
        rope = read_rope(read, max_positions)
        return ModelConfig(
            architecture=name,
            vocab_size=read.integer("vocab_size"),
            hidden_size=hidden,
            intermediate_size=read.integer("intermediate_size"),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=read.number("rms_norm_eps"),
            max_position_embeddings=rope.max_length(max_positions),
            tie_word_embeddings=read.boolean("tie_word_embeddings"),
            rope=rope,
            windows=_windows(read, kind, layers),
            qkv_bias=attention_bias if kind.qkv_bias is None else kind.qkv_bias,
            o_bias=attention_bias if kind.o_bias is None else kind.o_bias,
            mlp_bias=read.boolean("mlp_bias") if kind.mlp_bias is None else kind.mlp_bias,
            qk_norm=kind.qk_norm,
            dtype=_dtype(raw, source),
            raw=raw,
            quantization=read_quantization_config(raw.get("quantization_config"), source),
        )


def _architecture(raw: dict[str, Any], source: str) -> str:
    """The key of ARCHITECTURES: by model_type, as in Transformers, and `architectures` must not say otherwise."""
    names, model_type = raw.get("architectures"), raw.get("model_type")
    by_type = {name.removesuffix("ForCausalLM").lower(): name for name in ARCHITECTURES}
    typed = by_type.get(model_type) if isinstance(model_type, str) else None
    if not names and typed is not None:
        return typed
    name = names[0] if isinstance(names, list) and len(names) == 1 else None
    if isinstance(name, str) and name.endswith("Model"):  # saved without its lm_head
        name = f"{name.removesuffix('Model')}ForCausalLM"
    if not isinstance(name, str) or name not in ARCHITECTURES:
        accepted = f"a list of one of {sorted(ARCHITECTURES)}, or none beside a model_type of {sorted(by_type)}"
        raise InputError(f"{source}: architectures: found {show(names)}; accepted: {accepted}")
    if model_type is not None and typed != name:
        accepted = f"{name.removesuffix('ForCausalLM').lower()}, as architectures says"
        raise InputError(f"{source}: model_type: found {show(model_type)}; accepted: {accepted}")
    return name


def _dtype(raw: dict[str, Any], source: str) -> torch.dtype | None:
    key = "dtype" if raw.get("dtype") is not None else "torch_dtype"
    name = raw.get(key)
    if name is None:
        return None
    if not isinstance(name, str) or name.removeprefix("torch.") not in DTYPES:
        raise InputError(f"{source}: {key}: found {show(name)}; accepted: one of {sorted(DTYPES)}")
    return DTYPES[name.removeprefix("torch.")]


def _windows(read: Fields, kind: Architecture, layers: int) -> tuple[int | None, ...]:
    """The sliding window of each layer: the number of tokens a query sees, itself included; None for all."""
    on = kind.windows and (not kind.windows_switch or read.boolean("use_sliding_window"))
    window = read.integer("sliding_window") if on and read.values.get("sliding_window") is not None else None
    types = read.values.get("layer_types")
    if types is None:
        first = read.values["max_window_layers"] if kind.windows_switch else 0
        if type(first) is not int or first < 0:
            raise read.refuse("max_window_layers", "an integer >= 0")
        return tuple(window if i >= first else None for i in range(layers))
    known = LAYER_TYPES if window is not None else LAYER_TYPES[:1]
    if not isinstance(types, list) or len(types) != layers or any(t not in known for t in types):
        raise read.refuse("layer_types", f"a list of {layers}, each one of {list(known)}")
    return tuple(window if t == "sliding_attention" else None for t in types)
