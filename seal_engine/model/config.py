"""ModelConfig: what a Hugging Face config.json says about a dense decoder, checked field by field.

Reads both ways of writing it: Transformers 4 (`rope_theta`, `rope_scaling`, `torch_dtype`) and Transformers 5
(`rope_parameters`, `dtype`). Fields that a file leaves out take the value that Transformers gives them.
"""

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seal_engine.files import read_json, show
from seal_engine.types import InputError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class Architecture:
    """What sets one architecture apart from plain Llama, and its defaults for fields a config.json leaves out."""

    defaults: dict[str, Any]
    qkv_bias: bool | None = None  # None: as the config's attention_bias says
    o_bias: bool | None = None
    mlp_bias: bool | None = False
    qk_norm: bool = False
    window_from: str = "never"  # "always": on every layer if set; "layers": from max_window_layers or layer_types


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
        window_from="always",
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
        window_from="layers",
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
        window_from="layers",
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
class RopeConfig:
    """Rotary position embedding: rope_type "default", "linear", "llama3" or "yarn", and what each of them reads."""

    rope_type: str = "default"
    rope_theta: float = 10000.0
    factor: float = 1.0
    original_max_position_embeddings: int = 0  # llama3, yarn
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float = 1.0  # yarn: scales cos and sin
    truncate: bool = True  # yarn: round the range of blended frequencies to whole dimensions

    def inverse_frequencies(self, head_dim: int) -> Tensor:
        """[head_dim / 2] float32: the angle of dimension i at position p is p times its inverse frequency.

        linear: arXiv 2306.15595. yarn: arXiv 2309.00071. llama3: wavelengths beyond original_max_position_embeddings
        / low_freq_factor are stretched by `factor`, those under original / high_freq_factor are kept, those between
        are blended linearly in original / wavelength.
        """
        period = self.rope_theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
        inverse = 1.0 / period
        if self.rope_type == "linear":
            return inverse / self.factor
        if self.rope_type == "llama3":
            turns = self.original_max_position_embeddings / (2 * math.pi / inverse)
            kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
            kept = kept.clamp(0, 1)
            return kept * inverse + (1 - kept) * inverse / self.factor
        if self.rope_type == "yarn":
            kept = 1 - self._yarn_ramp(head_dim)
            return kept * inverse + (1 - kept) * (1.0 / (self.factor * period))
        return inverse

    def _yarn_ramp(self, head_dim: int) -> Tensor:
        """[head_dim / 2]: 0 where a dimension turns more than beta_fast times over the original length, 1 where it
        turns less than beta_slow times, linear between."""

        def dimension(turns: float) -> float:
            wavelength = self.original_max_position_embeddings / (turns * 2 * math.pi)
            return head_dim * math.log(wavelength) / (2 * math.log(self.rope_theta))

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        if low == high:
            high += 0.001  # a step instead of a division by zero
        return ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)


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
    max_position_embeddings: int
    tie_word_embeddings: bool
    rope: RopeConfig
    windows: tuple[int | None, ...]  # sliding window of each layer
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    dtype: torch.dtype | None  # None: not written; the tensors' own
    raw: dict[str, Any] = field(repr=False, compare=False)  # config.json as read, for save_pretrained

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
        return ModelConfig.from_dict(read_json(directory / "config.json"), str(directory / "config.json"))

    @staticmethod
    def from_dict(raw: dict[str, Any], source: str = "config") -> "ModelConfig":
        """Check and convert the contents of a config.json. `source` names it in error messages."""
        names = raw.get("architectures")
        name = names[0] if isinstance(names, list) and len(names) == 1 else None
        if not isinstance(name, str) or name not in ARCHITECTURES:
            raise InputError(
                f"{source}: architectures: found {show(names)}; accepted: a list of one of {sorted(ARCHITECTURES)}"
            )
        kind = ARCHITECTURES[name]
        if raw.get("quantization_config") is not None:
            raise InputError(
                f"{source}: quantization_config: found {show(raw['quantization_config'])}; accepted: none "
                "(quantized checkpoints are not supported)"
            )
        read = _Fields({**COMMON_DEFAULTS, **kind.defaults, **raw}, source)

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
            max_position_embeddings=max_positions,
            tie_word_embeddings=read.boolean("tie_word_embeddings"),
            rope=_rope(read, max_positions),
            windows=_windows(read, kind.window_from, layers),
            qkv_bias=attention_bias if kind.qkv_bias is None else kind.qkv_bias,
            o_bias=attention_bias if kind.o_bias is None else kind.o_bias,
            mlp_bias=read.boolean("mlp_bias") if kind.mlp_bias is None else kind.mlp_bias,
            qk_norm=kind.qk_norm,
            dtype=_dtype(raw, source),
            raw=raw,
        )


@dataclass
class _Fields:
    """Typed access to a mapping's fields; every refusal names the source and the field."""

    values: dict[str, Any]
    source: str

    def refuse(self, name: str, accepted: str) -> InputError:
        found = show(self.values[name]) if name in self.values else "nothing"
        return InputError(f"{self.source}: {name}: found {found}; accepted: {accepted}")

    def integer(self, name: str, below: int = 2**31) -> int:
        value = self.values.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < below:
            raise self.refuse(name, f"a positive integer below {below}")
        return value

    def number(self, name: str, least: float = torch.finfo(torch.float32).tiny) -> float:
        value = self.values.get(name)
        most = torch.finfo(torch.float32).max  # beyond these bounds, float32 turns a number into 0 or infinity
        if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most:
            raise self.refuse(name, f"a number from {least:g} to {most:g}")
        return float(value)

    def boolean(self, name: str) -> bool:
        value = self.values.get(name)
        if not isinstance(value, bool):
            raise self.refuse(name, "true or false")
        return value


def _dtype(raw: dict[str, Any], source: str) -> torch.dtype | None:
    key = "dtype" if raw.get("dtype") is not None else "torch_dtype"
    name = raw.get(key)
    if name is None:
        return None
    if not isinstance(name, str) or name.removeprefix("torch.") not in DTYPES:
        raise InputError(f"{source}: {key}: found {show(name)}; accepted: one of {sorted(DTYPES)}")
    return DTYPES[name.removeprefix("torch.")]


def _rope(read: _Fields, max_positions: int) -> RopeConfig:
    """From `rope_parameters` (Transformers 5) or `rope_theta` and `rope_scaling` (Transformers 4)."""
    key = "rope_parameters" if read.values.get("rope_parameters") is not None else "rope_scaling"
    written = read.values.get(key)
    if not isinstance(written, dict | None):
        raise read.refuse(key, "an object or null")
    # The file's own names go first: a length written beside the rope fields goes before one written inside.
    values = {"rope_theta": read.values["rope_theta"], **(written or {})}
    outer_length = read.values.get("original_max_position_embeddings")
    if outer_length is not None:
        values["original_max_position_embeddings"] = outer_length
    rope = _Fields(values, f"{read.source}: {key}" if written else read.source)
    rope_type = values.get("rope_type", values.get("type", "default"))
    if rope_type not in ROPE_TYPES:
        raise InputError(f"{rope.source}: rope_type: found {show(rope_type)}; accepted: one of {list(ROPE_TYPES)}")
    for fields in (rope, read):
        if fields.values.get("partial_rotary_factor", 1.0) not in (1, None):
            raise fields.refuse("partial_rotary_factor", "1.0")
    theta = rope.number("rope_theta", least=1.0)
    if rope_type == "default":
        return RopeConfig(rope_theta=theta)
    factor = rope.number("factor", least=1.0)
    if rope_type == "linear":
        return RopeConfig("linear", theta, factor)
    if values.get("original_max_position_embeddings") is None:
        values["original_max_position_embeddings"] = max_positions
    original = rope.integer("original_max_position_embeddings")
    if rope_type == "llama3":
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        if low >= high:
            raise rope.refuse("high_freq_factor", f"a number above low_freq_factor, {low}")
        return RopeConfig("llama3", theta, factor, original, low, high)

    def optional(name: str, default: float) -> float:
        return default if values.get(name) is None else rope.number(name)

    if values.get("truncate") is None:
        values["truncate"] = True
    if theta == 1.0:
        raise rope.refuse("rope_theta", "a number above 1 for yarn")
    fast, slow = optional("beta_fast", 32.0), optional("beta_slow", 1.0)
    if fast < slow:
        raise rope.refuse("beta_fast", f"a number not below beta_slow, {slow}")
    return RopeConfig(
        "yarn",
        theta,
        factor,
        original,
        beta_fast=fast,
        beta_slow=slow,
        attention_factor=optional("attention_factor", _yarn_attention_factor(values, factor, optional)),
        truncate=rope.boolean("truncate"),
    )


def _yarn_attention_factor(values: dict[str, Any], factor: float, optional) -> float:
    """The scale of cos and sin when none is written: 0.1 ln(factor) + 1, or a ratio of two such (DeepSeek)."""

    def scale(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if values.get("mscale") and values.get("mscale_all_dim"):
        return scale(optional("mscale", 1.0)) / scale(optional("mscale_all_dim", 1.0))
    return scale(1.0)


def _windows(read: _Fields, window_from: str, layers: int) -> tuple[int | None, ...]:
    """The sliding window of each layer: the number of tokens a query sees, itself included; None for all."""
    if window_from == "never":
        return (None,) * layers
    window = read.values.get("sliding_window")
    if window_from == "always":
        return (None if window is None else read.integer("sliding_window"),) * layers
    if not read.boolean("use_sliding_window") or window is None:
        window = None
    else:
        window = read.integer("sliding_window")
    types = read.values.get("layer_types")
    if types is None:
        first = read.values["max_window_layers"]
        if type(first) is not int or first < 0:
            raise read.refuse("max_window_layers", "an integer >= 0")
        return tuple(window if i >= first else None for i in range(layers))
    known = ("full_attention", "sliding_attention")
    if not isinstance(types, list) or len(types) != layers or any(t not in known for t in types):
        raise read.refuse("layer_types", f"a list of {layers}, each one of {list(known)}")
    return tuple(window if t == "sliding_attention" else None for t in types)
