"""Contiguous copies of the K/V of the sequences that a CPU is decoding.

In the paged cache a sequence's tokens lie in blocks, which attention on a CPU gathers for every token it decodes, in
every layer. Here a sequence has a slot in an arena, whose slots are of one width, a power of two of tokens. A sequence
that outgrows its slot moves to an arena of twice the width. The slots of an arena are dense: the last one moves where
one is given up, so that a step reads the first n.

The K/V of new tokens are written to the slot alone. Each block that is full is copied to the paged cache before the
prefix index lists it, and what there is of the last block when a slot is given up early.
"""

from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from seal_engine.model.devices import free_memory
from seal_engine.model.transformer import Model
from seal_engine.sampling.kv_cache import KVCache
from seal_engine.sampling.scheduler import Chunk, Sequence
from seal_kernels.contiguous_attention import DecodeRows, decode_rows

LEAST_WIDTH = 64  # tokens
LEAST_BYTES = 1 << 26  # that all arenas may take where the paged cache is small


class _Arena:
    """Slots of one width, the first len(slots) of them in use."""

    def __init__(self, cache: KVCache, width: int):
        L, _, _, K, E = cache.keys.shape
        self.slots: list[_Slot] = []
        self.kv = torch.empty(L, 0, width, 2 * K, E, dtype=cache.keys.dtype)

    @property
    def width(self) -> int:
        return self.kv.shape[2]

    def shape_with(self, num_slots: int) -> torch.Size:
        """The shape of kv once there are so many slots: capacity doubles."""
        L, capacity, *slot = self.kv.shape
        return torch.Size((L, capacity if num_slots <= capacity else max(1, 2 * capacity), *slot))

    def append(self, slot: "_Slot", keys: Tensor, values: Tensor) -> None:
        """Give the slot a place here. keys, values: of its tokens, [L, tokens, K, E]."""
        n, K = len(self.slots), keys.shape[2]
        shape = self.shape_with(n + 1)
        if shape != self.kv.shape:
            kv, self.kv = self.kv, torch.empty(shape, dtype=self.kv.dtype)
            self.kv[:, :n] = kv
        place = self.kv[:, n]
        place[:, : slot.length, :K], place[:, : slot.length, K:] = keys, values
        place[:, slot.length :] = 0  # attention multiplies what no query sees by 0, which must not be NaN
        slot.arena, slot.index = self, n
        self.slots.append(slot)

    def remove(self, slot: "_Slot") -> None:
        last = self.slots.pop()
        if last is not slot:
            self.kv[:, slot.index] = self.kv[:, last.index]
            self.slots[slot.index], last.index = last, slot.index


@dataclass(eq=False)
class _Slot:
    sequence: Sequence
    cache_namespace: Hashable  # the sequence's when the slot was made: another one means other K/V
    length: int  # tokens whose K/V are valid
    arena: _Arena
    index: int = 0

    @property
    def kv(self) -> Tensor:
        """Keys and values of its tokens, [L, tokens, 2 K, E]."""
        return self.arena.kv[:, self.index, : self.length]


class DecodeCache:
    """`take` before a step, `flush` after it."""

    def __init__(self, cache: KVCache, limit_bytes: int):
        """cache: the paged one. limit_bytes: of all arenas; sequences beyond are decoded from their blocks."""
        self.cache = cache
        self.limit_bytes = limit_bytes
        self._arenas: dict[int, _Arena] = {}
        self._slots: dict[Sequence, _Slot] = {}

    @staticmethod
    def make(model: Model, cache: KVCache) -> "DecodeCache | None":
        """On a CPU, unless a token's bits must not depend on the batch or layers have windows.

        It takes at most twice the paged cache's memory (which, for few tokens, may be less than a slot), and a quarter
        of what is free.
        """
        if model.device.type != "cpu" or model.batch_invariant or any(layer.window for layer in model.layers):
            return None
        return DecodeCache(cache, min(max(2 * cache.num_bytes, LEAST_BYTES), free_memory(model.device) // 4))

    def clear(self) -> None:
        """Forget everything, blocks that are still to be copied too: for when all K/V are computed again."""
        self._arenas.clear()
        self._slots.clear()

    def take(self, chunks: list[Chunk]) -> list[DecodeRows]:
        """The sequences of a step that compute one token from a slot, which those get that have none, by arena."""
        first = np.cumsum([0, *(chunk.num_tokens for chunk in chunks)])
        rows = {
            chunk.sequence: row
            for chunk, row in zip(chunks, first, strict=False)
            if chunk.num_tokens == 1 and self._decodes(chunk.sequence)
        }
        for slot in list(self._slots.values()):
            known = slot.cache_namespace == slot.sequence.cache_namespace
            if slot.sequence not in rows or not known or slot.length < slot.sequence.num_computed_tokens:
                self._give_up(slot)
        for sequence in rows:
            slot = self._slots.get(sequence)
            if slot is not None:
                slot.length = sequence.num_computed_tokens
            if slot is None or slot.length == slot.arena.width:
                self._move(sequence, slot)
        taken = []
        for arena in self._arenas.values():
            if arena.slots:
                tokens = np.array([rows[slot.sequence] for slot in arena.slots])
                context_lens = torch.tensor([slot.length + 1 for slot in arena.slots])
                in_order = np.array_equal(tokens, np.arange(first[-1]))
                taken.append(decode_rows(arena.kv, None if in_order else torch.from_numpy(tokens), context_lens))
        return taken

    def flush(self) -> None:
        """Count the tokens of the step, and copy the blocks that they fill to the paged cache."""
        block_size = self.cache.pool.block_size
        for arena in self._arenas.values():
            for slot in arena.slots:
                slot.length += 1
            full = [slot for slot in arena.slots if slot.length % block_size == 0]
            if full:
                first = torch.tensor([slot.length - block_size for slot in full])
                tokens = first[:, None] + torch.arange(block_size)
                kv = arena.kv[:, torch.tensor([slot.index for slot in full])[:, None], tokens]  # [L, n, B, 2 K, E]
                blocks = torch.tensor([slot.sequence.block_table[slot.length // block_size - 1] for slot in full])
                for cache, part in zip((self.cache.keys, self.cache.values), kv.chunk(2, 3), strict=True):
                    cache.index_copy_(1, blocks, part)

    def _decodes(self, sequence: Sequence) -> bool:
        """Whether it is past its prompt, all of whose K/V go to blocks, which other samples of a request share."""
        return bool(sequence.completion.token_ids) and sequence.num_computed_tokens > 0

    def _move(self, sequence: Sequence, old: _Slot | None) -> None:
        """Give a sequence a slot, or a wider one, if memory allows; if not, it has none."""
        length = sequence.num_computed_tokens
        width = max(LEAST_WIDTH, 1 << length.bit_length())
        arena = self._arenas.setdefault(width, _Arena(self.cache, width))
        others = sum(a.kv.nbytes for a in self._arenas.values() if a is not arena)
        grown = arena.shape_with(len(arena.slots) + 1).numel() * arena.kv.element_size()
        if others + grown > self.limit_bytes:
            if old is not None:
                self._give_up(old)
            return
        if old is None:
            blocks = torch.tensor(sequence.block_table)
            keys, values = (
                cache.index_select(1, blocks).flatten(1, 2)[:, :length]
                for cache in (self.cache.keys, self.cache.values)
            )
        else:
            keys, values = old.kv.chunk(2, 2)
        self._slots[sequence] = slot = _Slot(sequence, sequence.cache_namespace, length, arena)
        arena.append(slot, keys, values)
        if old is not None:  # whose memory keys and values are views of
            old.arena.remove(old)

    def _give_up(self, slot: _Slot) -> None:
        """Remove a slot. A sequence that goes on from here finds all its K/V in its blocks."""
        sequence, block_size = slot.sequence, self.cache.pool.block_size
        behind = slot.length % block_size
        goes_on = slot.cache_namespace == sequence.cache_namespace and sequence.num_computed_tokens == slot.length
        if sequence.block_table and goes_on and behind:
            block = sequence.block_table[slot.length // block_size]
            for cache, part in zip((self.cache.keys, self.cache.values), slot.kv[:, -behind:].chunk(2, 2), strict=True):
                cache[:, block, :behind] = part
        slot.arena.remove(slot)
        del self._slots[sequence]
        if not self._slots:
            self._arenas.clear()  # a sampler may live long, and rest
