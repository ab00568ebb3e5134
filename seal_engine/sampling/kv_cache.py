"""The paged K/V cache: which block of memory holds whose tokens, and the memory itself.

A block holds keys and values of `block_size` consecutive tokens of one sequence, in all layers. The block table of a
sequence lists its blocks from its first token on. Sequences with a common prefix share blocks: a block counts its
references, one for each block table that lists it.

Full blocks are registered in a prefix index, as nodes of a tree: a node is its parent and the tokens of its block, in a
cache namespace that says which model computed the K/V, such as an adapter's (uid, version). A lookup compares tokens,
never only their hashes, and a node's number is never given out twice. A registered block stays readable when its last
reference goes, until its memory is needed: the least recently used block is evicted first.

One rule makes that simple: a block table lists a registered block only behind the block of its parent. So a parent has
at least as many references as a child and loses its last one no earlier: the least recently used block is a leaf.
"""

from bisect import bisect_left
from collections import Counter, OrderedDict
from collections.abc import Hashable, Sequence
from itertools import count
from typing import NamedTuple

import numpy as np
import torch

from seal_engine.model.config import ModelConfig
from seal_engine.types import is_integer, require
from seal_kernels.transfer import to_device


class OutOfBlocks(RuntimeError):  # noqa: N818 (a condition that a scheduler handles, by preempting a sequence)
    """No block is free and none can be evicted."""


class Key(NamedTuple):
    """What the prefix index finds a node by."""

    cache_namespace: Hashable
    parent: int  # number of the parent's node; 0 for the first block of a sequence
    tokens: tuple[int, ...]


class Node(NamedTuple):
    """A full block of tokens in the prefix index."""

    number: int  # from 1, never used again
    key: Key
    block: int


class BlockPool:
    """Host bookkeeping of blocks 0 .. num_blocks - 1: each is referenced, free, or evictable (registered only)."""

    def __init__(self, num_blocks: int, block_size: int = 16):
        """Raises InputError unless both are at least 1."""
        for name, value in (("num_blocks", num_blocks), ("block_size", block_size)):
            require(is_integer(value) and value >= 1, name, value, "an integer >= 1")
        self.num_blocks, self.block_size = num_blocks, block_size
        self.reset()

    def reset(self) -> None:
        """Forget all references and all registered blocks: every block is free."""
        num_blocks = self.num_blocks
        self._references = [0] * num_blocks
        self._free = list(reversed(range(num_blocks)))  # a stack: low numbers go first
        self._evictable: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._nodes: list[Node | None] = [None] * num_blocks  # the node of each block; None: not registered
        self._index: dict[Key, Node] = {}
        self._numbers = count(1)

    @property
    def num_available(self) -> int:
        """The number of blocks that `allocate` can give: free and evictable ones."""
        return len(self._free) + len(self._evictable)

    def allocate(self, n: int) -> list[int] | None:
        """Return n blocks with one reference each, evicting as needed; None, changing nothing, if there are too few."""
        if n > self.num_available:
            return None
        blocks = []
        for _ in range(n):
            if self._free:
                block = self._free.pop()
            else:
                block, _ = self._evictable.popitem(last=False)
                node = self._nodes[block]
                assert node is not None, block
                del self._index[node.key]
                self._nodes[block] = None
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def share(self, blocks: Sequence[int]) -> None:
        """Add a reference to each of a block table's first blocks (or all): another sequence continues them."""
        for block in blocks:
            self._check_listed(block)
            self._references[block] += 1

    def free(self, blocks: Sequence[int]) -> None:
        """Remove a reference from each of a block table's last blocks (or all), given in the table's order.

        The last block is freed first, so that it is evicted before those that lead to it.
        """
        for block in reversed(blocks):
            self._check_listed(block)
            self._references[block] -= 1
            if not self._references[block]:
                if self._nodes[block] is None:
                    self._free.append(block)
                else:
                    self._evictable[block] = None

    def match(self, cache_namespace: Hashable, tokens: Sequence[int]) -> list[int]:
        """Return the blocks of the longest registered prefix of the tokens, and add a reference to each.

        At least one token is left to compute: a sampler needs the logits of the last one.
        """
        blocks: list[int] = []
        parent = 0
        for i in range((len(tokens) - 1) // self.block_size):
            node = self._index.get(self._key(cache_namespace, parent, tokens, i))
            if node is None:
                break
            self._evictable.pop(node.block, None)
            self._references[node.block] += 1
            blocks.append(node.block)
            parent = node.number
        return blocks

    def register(
        self, cache_namespace: Hashable, tokens: Sequence[int], blocks: Sequence[int], num_computed: int
    ) -> None:
        """Register the full blocks of a block table's first num_computed tokens in the prefix index.

        Call it whenever tokens were computed: a bisection skips the blocks that are registered already. Where an equal
        prefix is registered with another block, that block stays and the table's blocks stay out from there on.
        """
        full = num_computed // self.block_size
        if full > len(blocks) or full * self.block_size > len(tokens):
            raise ValueError(f"{num_computed} tokens computed, of {len(tokens)} in {len(blocks)} blocks")
        # Registered blocks come first in a table.
        first = bisect_left(blocks, True, hi=full, key=lambda block: self._nodes[block] is None)
        last = self._nodes[blocks[first - 1]] if first else None
        if last is not None and last.key.cache_namespace != cache_namespace:
            computed_under = last.key.cache_namespace
            raise ValueError(f"blocks computed under {computed_under!r} are continued under {cache_namespace!r}")
        parent = last.number if last is not None else 0
        for i in range(first, full):
            key = self._key(cache_namespace, parent, tokens, i)
            if key in self._index:
                break
            self._check_listed(blocks[i])
            parent = next(self._numbers)
            self._nodes[blocks[i]] = self._index[key] = Node(parent, key, blocks[i])

    def copy_on_write(self, blocks: list[int], i: int) -> tuple[int, int] | None:
        """Make blocks[i] a block that its block table may write to: neither shared nor registered.

        Returns None if it is one already. Otherwise a new block replaces it in the table, and (old, new) is returned
        for the caller to copy the K/V. Raises OutOfBlocks, changing nothing, if no block is left. A sequence is written
        at its end: ValueError if a shared or registered block follows.
        """
        old = blocks[i]
        if i + 1 < len(blocks) and not self._is_exclusive(blocks[i + 1]):
            raise ValueError(f"block {old} is to be written, but shared or indexed blocks follow: free them first")
        if self._is_exclusive(old):
            return None
        new = self.allocate(1)
        if new is None:
            raise OutOfBlocks(f"all {self.num_blocks} blocks are in use")
        blocks[i] = new[0]
        self.free([old])
        return old, new[0]

    def check_integrity(self, tables: Sequence[Sequence[int]]) -> None:
        """Raise a RuntimeError that names the first inconsistent block; tables: block tables of all live sequences."""

        def check(condition: bool, block: int, message: str) -> None:
            if not condition:
                raise RuntimeError(f"block {block}: {message}")

        listed = Counter(block for table in tables for block in table)
        free = Counter(self._free)
        for block in (*listed, *free, *self._evictable):
            check(0 <= block < self.num_blocks, block, "there is no such block")
        for block, (references, node) in enumerate(zip(self._references, self._nodes, strict=True)):
            check(references == listed[block], block, f"{references} references, but {listed[block]} times in tables")
            states = [free[block] > 0, block in self._evictable, references > 0]
            once = free[block] <= 1 and states.count(True) == 1
            check(once, block, "must be in one place: free, evictable or referenced")
            check(references > 0 or (node is None) == bool(free[block]), block, "must be evictable if it is indexed")
            check(node is None or self._index.get(node.key) is node, block, "has a node that the index does not know")
        numbers = {node.number: node for node in self._index.values()}
        age = {block: i for i, block in enumerate(self._evictable)}
        for key, node in self._index.items():
            block = node.block
            check(key == node.key and self._nodes[block] is node, block, "is indexed with a node that is not its own")
            check(len(key.tokens) == self.block_size, block, f"is indexed with {len(key.tokens)} tokens")
            if key.parent:
                parent = numbers.get(key.parent)
                parent_namespace = None if parent is None else parent.key.cache_namespace
                check(parent_namespace == key.cache_namespace, block, "is indexed, but its parent is not")
                if parent is not None and parent.block in age:
                    first = age.get(block, len(age)) < age[parent.block]
                    check(first, block, f"is indexed, but its parent {parent.block} would be evicted first")
        for table in tables:
            before = 0  # the number of the node before; -1 behind a block without one
            for block in table:
                node = self._nodes[block]
                check(node is None or node.key.parent == before, block, "is in a table, but not behind its parent")
                before = -1 if node is None else node.number

    def _is_exclusive(self, block: int) -> bool:
        """True if one block table lists the block and no prefix can match it."""
        return self._references[block] == 1 and self._nodes[block] is None

    def _check_listed(self, block: int) -> None:
        """Raise a ValueError if the block is in no block table: it can be neither shared, freed nor registered."""
        if block < 0 or not self._references[block]:
            raise ValueError(f"block {block} is in no table")

    def _key(self, cache_namespace: Hashable, parent: int, tokens: Sequence[int], i: int) -> Key:
        return Key(cache_namespace, parent, tuple(tokens[i * self.block_size : (i + 1) * self.block_size]))


class KVCache:
    """Keys and values [L, num_blocks, block_size, K, E] of all layers, and the pool that says whose they are."""

    def __init__(
        self, config: ModelConfig, num_blocks: int, dtype: torch.dtype, device: torch.device, block_size: int = 16
    ):
        """Memory is not initialised. Raises InputError unless num_blocks and block_size are at least 1."""
        self.pool = BlockPool(num_blocks, block_size)
        heads = config.num_key_value_heads, config.head_dim
        shape = 2, config.num_hidden_layers, num_blocks, block_size, *heads
        self._memory = torch.empty(shape, dtype=dtype, device=device)  # one tensor, so that a copy is one copy
        self.keys, self.values = self._memory

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy the K/V of (old, new) blocks, reading all before writing any. ValueError if two new ones are equal."""
        if not pairs:
            return
        if len({new for _, new in pairs}) < len(pairs):
            raise ValueError(f"blocks are copied onto the same block: {pairs}")
        old, new = to_device(self._memory.device, *np.array(pairs).T)
        self._memory.index_copy_(2, new, self._memory.index_select(2, old))

    @property
    def num_bytes(self) -> int:
        """The memory of the cache."""
        return self._memory.nbytes

    @staticmethod
    def block_bytes(config: ModelConfig, dtype: torch.dtype, block_size: int = 16) -> int:
        """Return the memory of one block: its keys and values in all layers."""
        return 2 * config.num_hidden_layers * block_size * config.key_value_size * dtype.itemsize
