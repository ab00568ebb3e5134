"""The types that cross layers, and the one legend of shape letters, for the engine and its kernels.

T   tokens in a packed stream (all sequences laid end to end, no padding)
S   sequences in it; in LoRA, segments: consecutive tokens of one adapter; in AdamW, slots
D   hidden size                 F   intermediate size of the MLP
H   query heads                 K   key/value heads (H is a multiple of K)
E   head dimension              V   vocabulary
I   inputs of a projection      O   outputs of a projection
L   layers, or a sequence's length where no layer is in sight
R   rank rows of an adapter on one group of projections
M   projections of a group; in paged attention, blocks of a sequence's block table
N   rows of a matrix; in paged attention, blocks of the cache
B   tokens per block of the cache
P   pairs of a query and a key that attention multiplies: about L^2 / 2 for a sequence of length L

In costs: r is the rank of one projection, n a number of parameters, b the bytes per element. In comments on a Triton
kernel's tiles, BT stands for BLOCK_T, and so on.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from seal_engine.errors import InputError
from seal_kernels.contiguous_attention import DecodeRows
from seal_kernels.transfer import to_device


@dataclass(frozen=True)
class PackedBatch:
    """S sequences as one stream of T tokens: sequence s is tokens cu_seqlens[s] .. cu_seqlens[s + 1]."""

    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64, from 0 in each sequence
    cu_seqlens: Tensor  # [S + 1] int32
    lengths: tuple[int, ...]  # S lengths, on the host

    @property
    def max_seqlen(self) -> int:
        """The longest sequence; 0 if there is none."""
        return max(self.lengths, default=0)

    @staticmethod
    def pack(sequences: Sequence[Sequence[int]], device: torch.device) -> "PackedBatch":
        """Lay sequences of token ids end to end on `device`. Empty sequences are allowed."""
        ids, positions, cu_seqlens = to_device(device, *packed_arrays(sequences))
        return PackedBatch(ids, positions, cu_seqlens, tuple(len(s) for s in sequences))


def packed_arrays(sequences: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(token_ids [T], positions [T], cu_seqlens [S + 1]) of sequences that are laid end to end, as PackedBatch has."""
    lengths = [len(s) for s in sequences]
    token_ids = np.fromiter(chain.from_iterable(sequences), np.int64, sum(lengths))
    bounds = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    positions = np.arange(len(token_ids)) - np.repeat(bounds[:-1], lengths)
    return token_ids, positions, bounds.astype(np.int32)


@dataclass(frozen=True)
class PagedBatch:
    """New tokens of S sequences as one stream, K/V of all their tokens being in blocks of a paged cache.

    A sequence's new tokens are its last ones. Their K/V are written to the cache on the way.
    """

    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64, in their sequences
    cu_seqlens: Tensor  # [S + 1] int32: sequence s has the new tokens cu_seqlens[s] .. cu_seqlens[s + 1]
    context_lens: Tensor  # [S] int32: its tokens, new ones included
    block_tables: Tensor  # [S, M] int32: its blocks, from its first token on
    slot_mapping: Tensor  # [T] int64: block * block size + offset in it, where a new token's K/V go
    max_query: int  # most new tokens of a sequence
    max_context: int  # most tokens
    keys: Tensor  # [L, blocks, block size, K, E]
    values: Tensor
    decoding: Sequence[DecodeRows] = ()  # sequences whose K/V lie elsewhere; their contexts are 0 here, slots below 0
    shared: dict[Any, Any] = field(default_factory=dict)  # what paged_attention works out once for all layers


@dataclass(frozen=True)
class LoraConfig:
    """A LoRA adapter's shape (arXiv 2106.09685), with PEFT's names and defaults."""

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0  # probability that an element of the input to A is dropped, in training
    # Names of projections ("q_proj", "mlp.down_proj", "layers.0.self_attn.q_proj": ends of module names), "all-linear",
    # or a string that is a regular expression for whole module names, as in PEFT.
    target_modules: tuple[str, ...] | list[str] | str = ("q_proj", "v_proj")
    use_rslora: bool = False  # scale alpha / sqrt(r) (arXiv 2312.03732), not alpha / r
    rank_pattern: Mapping[str, int] = field(default_factory=dict)  # module name or pattern: its own r
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def check(self) -> None:
        """InputError naming the first field that is out of range."""
        for name in ("rank_pattern", "alpha_pattern"):
            value = getattr(self, name)
            require(isinstance(value, Mapping), f"lora.{name}", value, "an object of module names and numbers")
        for name, rank in [("r", self.r), *((f"rank_pattern[{k!r}]", v) for k, v in self.rank_pattern.items())]:
            require(is_integer(rank) and rank >= 1, f"lora.{name}", rank, "an integer >= 1")
        alphas = [
            ("lora_alpha", self.lora_alpha),
            *((f"alpha_pattern[{k!r}]", v) for k, v in self.alpha_pattern.items()),
        ]
        for name, alpha in alphas:
            require(is_number(alpha), f"lora.{name}", alpha, "a finite number")
        dropout = self.lora_dropout
        require(is_number(dropout) and 0 <= dropout < 1, "lora.lora_dropout", dropout, "0 <= lora_dropout < 1")
        targets = self.target_modules
        plain = isinstance(targets, str) or (
            isinstance(targets, list | tuple) and all(isinstance(t, str) for t in targets)
        )
        require(plain and len(targets) > 0, "lora.target_modules", targets, "names of projections")


class PagedArrays(NamedTuple):
    """The tensors of a PagedBatch, its cache aside, as arrays on the host."""

    token_ids: np.ndarray
    positions: np.ndarray
    cu_seqlens: np.ndarray
    context_lens: np.ndarray
    block_tables: np.ndarray
    slot_mapping: np.ndarray

    def padded(self, S: int, M: int) -> "PagedArrays":
        """A decode step's arrays for S sequences and M blocks of each. Added sequences have no token and no slot."""
        added = S - len(self.token_ids)
        return PagedArrays(
            np.pad(self.token_ids, (0, added)),
            np.pad(self.positions, (0, added)),
            np.pad(self.cu_seqlens, (0, added), mode="edge"),
            np.pad(self.context_lens, (0, added)),
            np.pad(self.block_tables, ((0, added), (0, M - self.block_tables.shape[1]))),
            np.pad(self.slot_mapping, (0, added), constant_values=-1),
        )

    def batch(self, keys: Tensor, values: Tensor, decoding: Sequence[DecodeRows] = ()) -> PagedBatch:
        """The batch on the device of a cache's keys and values, [L, blocks, block size, K, E]."""
        max_query, max_context = int(np.diff(self.cu_seqlens).max()), int(self.context_lens.max())
        return paged_batch(to_device(keys.device, *self), max_query, max_context, keys, values, decoding)


def paged_batch(
    tensors: Sequence[Tensor],
    max_query: int,
    max_context: int,
    keys: Tensor,
    values: Tensor,
    decoding: Sequence[DecodeRows] = (),
) -> PagedBatch:
    """A batch of the tensors that PagedArrays lists, in its order."""
    token_ids, positions, cu_seqlens, context_lens, block_tables, slot_mapping = tensors
    sizes = max_query, max_context, keys, values, decoding
    return PagedBatch(token_ids, positions, cu_seqlens, context_lens, block_tables, slot_mapping, *sizes)


def setting(default: Any, text: str, choices: Sequence[str] | None = None) -> Any:
    """A field of a configuration: its default, and what the command line says of it."""
    return field(default=default, metadata={"help": text, "choices": choices})


def chunks(lengths: Sequence[int], token_budget: int) -> Iterator[list[int]]:
    """Numbers of sequences in order, as many at a time as fit the budget, at least one."""
    chunk: list[int] = []
    tokens = 0
    for i, length in enumerate(lengths):
        if chunk and tokens + length > token_budget:
            yield chunk
            chunk, tokens = [], 0
        chunk.append(i)
        tokens += length
    if chunk:
        yield chunk


def is_integer(value: Any) -> bool:
    """True for an int that is no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """True for a finite int or float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def is_list(value: Any) -> bool:
    """True for a sequence that is no text."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray)


def require(condition: bool, name: str, found: Any, accepted: str) -> None:
    """InputError naming the field, what was found and what is accepted, unless condition holds."""
    if not condition:
        raise InputError(f"{name}: found {found!r:.100}; accepted: {accepted}")


def require_integers(owner: Any, **minimum: int) -> None:
    """InputError for the first named field of `owner` that is no integer, or is below its minimum."""
    for name, least in minimum.items():
        value = getattr(owner, name)
        require(is_integer(value) and value >= least, name, value, f"an integer >= {least}")


@contextmanager
def renamed_errors(names: Mapping[str, str]) -> Iterator[None]:
    """An InputError of the block names a field as the user knows it. names: field -> the setting or flag for it."""
    try:
        yield
    except InputError as error:
        raise InputError(rename_field(str(error), names)) from None


def rename_field(message: str, names: Mapping[str, str]) -> str:
    """An InputError's message with the field that it begins with renamed, if `names` has it."""
    field_name, colon, rest = message.partition(":")
    return names.get(field_name, field_name) + colon + rest
