"""Rotary position embeddings: what config.json says of them, read as Transformers 5 reads it, and their frequencies."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seal_engine.files import show
from seal_engine.model.fields import Fields
from seal_engine.types import InputError

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
# What Transformers reads for one of these types, and YaRN's "finetuned", which says how a model was trained.
ROPE_KEYS = frozenset(
    (
        *("rope_type", "type", "rope_theta", "partial_rotary_factor", "factor"),
        *("original_max_position_embeddings", "low_freq_factor", "high_freq_factor", "attention_factor"),
        *("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", "finetuned"),
    )
)


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

    def max_length(self, max_positions: int) -> int:
        """The longest sequence: max_position_embeddings, or what the scaling reaches where that was not raised."""
        reach = {"linear": max_positions, "yarn": self.original_max_position_embeddings}.get(self.rope_type, 0)
        return max(max_positions, int(min(self.factor * reach, 2**31 - 1)))


def read_rope(read: Fields, max_positions: int) -> RopeConfig:
    """From `rope_parameters` (Transformers 5), or from `rope_theta` and `rope_scaling` (Transformers 4).

    As in Transformers, a `rope_scaling` replaces `rope_parameters` as a whole: model cards tell users to add it. Keys
    that another rope type reads are passed over, as there; keys that no type reads are refused.
    """
    key = "rope_scaling" if read.values.get("rope_scaling") else "rope_parameters"
    written = read.values.get(key)
    if not isinstance(written, dict | None):
        raise read.refuse(key, "an object or null")
    # The names inside go first, but for the original length: Transformers takes the one written outside.
    values = {"rope_theta": read.values["rope_theta"], **(written or {})}
    outer_length = read.values.get("original_max_position_embeddings")
    if outer_length is not None:
        values["original_max_position_embeddings"] = outer_length
    rope = Fields(values, f"{read.source}: {key}" if written else read.source)
    rope_type = values.get("rope_type", values.get("type", "default"))
    if rope_type not in ROPE_TYPES:
        raise InputError(f"{rope.source}: rope_type: found {show(rope_type)}; accepted: one of {list(ROPE_TYPES)}")
    for fields in (rope, read):
        if fields.values.get("partial_rotary_factor", 1.0) not in (1, None):
            raise fields.refuse("partial_rotary_factor", "1.0")
    for name, value in values.items():
        if name not in ROPE_KEYS and value is not None:
            raise rope.refuse(name, f"none: the keys that are read are {sorted(ROPE_KEYS)}")
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
    return _yarn(rope, theta, factor, original)


def _yarn(rope: Fields, theta: float, factor: float, original: int) -> RopeConfig:
    def optional(name: str, default: float) -> float:
        return default if rope.values.get(name) is None else rope.number(name)

    if theta == 1.0:
        raise rope.refuse("rope_theta", "a number above 1 for yarn")
    fast, slow = optional("beta_fast", 32.0), optional("beta_slow", 1.0)
    if fast < slow:
        raise rope.refuse("beta_fast", f"a number not below beta_slow, {slow}")
    rope.values.setdefault("truncate", True)
    return RopeConfig(
        "yarn",
        theta,
        factor,
        original,
        beta_fast=fast,
        beta_slow=slow,
        attention_factor=optional("attention_factor", _yarn_attention_factor(rope.values, factor, optional)),
        truncate=rope.boolean("truncate"),
    )


def _yarn_attention_factor(values: dict[str, Any], factor: float, optional) -> float:
    """The scale of cos and sin when none is written: 0.1 ln(factor) + 1, or a ratio of two such (DeepSeek)."""

    def scale(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if values.get("mscale") and values.get("mscale_all_dim"):
        return scale(optional("mscale", 1.0)) / scale(optional("mscale_all_dim", 1.0))
    return scale(1.0)
