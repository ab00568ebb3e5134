"""Contiguous copies of the K/V of the sequences that a CPU is decoding.

In the paged cache a sequence's tokens lie in blocks, which attention on a CPU gathers for every token it decodes, in
every layer. Here a sequence has a slot in an arena, whose slots are of one width, a power of two of tokens. A sequence
that outgrows its slot moves to an arena of twice the width. The slots of an arena are dense: the last one moves where
one is given up, so that a step reads the first n.

The K/V of new tokens are written to the slot alone. Each block that is full is copied to the paged cache before the
prefix index lists it, and what there is of the last block when a slot is given up early.
"""

from collections import abc
from collections.abc import Hashable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from seal_engine.model.devices import free_memory
from seal_engine.model.graphs import power_of_two
from seal_engine.model.transformer import Model
from seal_engine.sampling.kv_cache import KVCache
from seal_engine.sampling.scheduler import Chunk, Sequence
from seal_kernels.contiguous_attention import DecodeRows, decode_rows
from seal_kernels.dispatch import ceil_div

LEAST_WIDTH = 64  # tokens
LEAST_BYTES = 1 << 26  # that all arenas may take where the paged cache is small


class _Arena:
    """Slots of one width, the first len(slots) of them in use."""

    def __init__(self, cache: KVCache, width: int):
        L, _, _, K, E = cache.keys.shape
        self.slots: list[_Slot] = []
        self.kv = torch.empty(L, 2, 0, K, width, E, dtype=cache.keys.dtype)

    @property
    def width(self) -> int:
        return self.kv.shape[4]

    @property
    def tokens(self) -> Tensor:
        """The K/V of its slots, tokens before heads as in the paged cache: [L, S, W, 2, K, E]."""
        return self.kv.permute(0, 2, 4, 1, 3, 5)

    def shape_with(self, num_slots: int) -> torch.Size:
        """The shape of kv once there are so many slots: capacity doubles."""
        L, two, capacity, *slot = self.kv.shape
        return torch.Size((L, two, capacity if num_slots <= capacity else power_of_two(num_slots), *slot))

    def append(self, slots: abc.Sequence["_Slot"]) -> Tensor:
        """Give the slots places here: [L, slots, W, 2, K, E], which are to be written."""
        first, end = len(self.slots), len(self.slots) + len(slots)
        shape = self.shape_with(end)
        if shape != self.kv.shape:
            kv, self.kv = self.kv, torch.empty(shape, dtype=self.kv.dtype)
            self.kv[:, :, :first] = kv[:, :, :first]
        for i, slot in enumerate(slots, first):
            slot.arena, slot.index = self, i
        self.slots += slots
        return self.tokens[:, first:end]

    def remove(self, slot: "_Slot") -> None:
        last = self.slots.pop()
        if last is not slot:
            self.kv[:, :, slot.index] = self.kv[:, :, last.index]
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
        """Keys and values of its tokens, [L, tokens, 2, K, E]."""
        return self.arena.tokens[:, self.index, : self.length]


class DecodeCache:
    """`take` before a step, `flush` after it if sequences were taken."""

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
            sequence, known = slot.sequence, slot.cache_namespace == slot.sequence.cache_namespace
            waits = not rows and sequence.block_table and slot.length == sequence.num_computed_tokens
            goes_on = sequence in rows and slot.length >= sequence.num_computed_tokens
            if not (known and (waits or goes_on)):
                self._give_up(slot)
        if not rows:  # a step of prompts
            return []
        wanted: dict[int, list[Sequence]] = {}  # by width, those that need a slot or a wider one
        for sequence in rows:
            slot = self._slots.get(sequence)
            if slot is not None:
                slot.length = sequence.num_computed_tokens
            if slot is None or slot.length == slot.arena.width:
                length = sequence.num_computed_tokens
                wanted.setdefault(max(LEAST_WIDTH, 1 << length.bit_length()), []).append(sequence)
        for width, sequences in wanted.items():
            self._place(width, sequences)
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
                kv = arena.tokens[:, torch.tensor([slot.index for slot in full])[:, None], tokens]  # [L, n, B, 2, K, E]
                blocks = torch.tensor([slot.sequence.block_table[slot.length // block_size - 1] for slot in full])
                for cache, part in zip((self.cache.keys, self.cache.values), kv.unbind(3), strict=True):
                    cache.index_copy_(1, blocks, part)

    def _decodes(self, sequence: Sequence) -> bool:
        """Whether it is past its prompt, all of whose K/V go to blocks, which other samples of a request share."""
        return bool(sequence.completion.token_ids) and sequence.num_computed_tokens > 0

    def _place(self, width: int, sequences: list[Sequence]) -> None:
        """Give sequences slots of this width, new ones or in place of narrower ones; none to those beyond the limit."""
        arena = self._arenas.setdefault(width, _Arena(self.cache, width))
        others = sum(a.kv.nbytes for a in self._arenas.values() if a is not arena)
        n, room = len(sequences), self.limit_bytes - others
        while n and arena.shape_with(len(arena.slots) + n).numel() * arena.kv.element_size() > room:
            n -= 1
        narrower = [self._slots[sequence] for sequence in sequences[:n] if sequence in self._slots]
        moved = [replace(slot) for slot in narrower]
        new = [
            _Slot(sequence, sequence.cache_namespace, sequence.num_computed_tokens, arena)
            for sequence in sequences[:n]
            if sequence not in self._slots
        ]
        places = arena.append([*moved, *new])
        for old, place in zip(narrower, places.unbind(1), strict=False):
            place[:, : old.length] = old.kv
            place[:, old.length :] = 0  # attention multiplies what no query sees by 0, which must not be NaN
            old.arena.remove(old)
        if new:
            self._read_blocks(new, places[:, len(moved) :])
        self._slots |= {slot.sequence: slot for slot in (*moved, *new)}
        for sequence in sequences[n:]:
            if sequence in self._slots:
                self._give_up(self._slots[sequence])

    def _read_blocks(self, slots: list[_Slot], places: Tensor) -> None:
        """Write the K/V of the slots' sequences to their places [L, slots, W, 2, K, E], and zeros behind them."""
        block_size, W, lengths = self.cache.pool.block_size, places.shape[2], torch.tensor([s.length for s in slots])
        blocks = torch.zeros(len(slots), ceil_div(int(lengths.max()), block_size), dtype=torch.int64)
        for row, slot in zip(blocks, slots, strict=True):
            own = torch.tensor(slot.sequence.block_table[: len(row)])
            row[: len(own)] = own
        read = min(W, blocks.shape[1] * block_size)
        behind = (torch.arange(read) >= lengths[:, None])[:, :, None, None]
        for place, *caches in zip(places, self.cache.keys, self.cache.values, strict=True):
            for cache, part in zip(caches, place.unbind(2), strict=True):
                part[:, :read] = cache[blocks].flatten(1, 2)[:, :read].masked_fill_(behind, 0)
            place[:, read:] = 0

    def _give_up(self, slot: _Slot) -> None:
        """Remove a slot. A sequence that goes on from here finds all its K/V in its blocks."""
        sequence, block_size = slot.sequence, self.cache.pool.block_size
        behind = slot.length % block_size
        goes_on = slot.cache_namespace == sequence.cache_namespace and sequence.num_computed_tokens == slot.length
        if sequence.block_table and goes_on and behind:
            block = sequence.block_table[slot.length // block_size]
            for cache, part in zip((self.cache.keys, self.cache.values), slot.kv[:, -behind:].unbind(2), strict=True):
                cache[:, block, :behind] = part
        slot.arena.remove(slot)
        del self._slots[sequence]
        if not self._slots:
            self._arenas.clear()  # a sampler may live long, and rest
