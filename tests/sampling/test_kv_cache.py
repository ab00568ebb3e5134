"""The block pool against a model of it that keeps whole prefixes and what every block holds, and its parts alone."""

from collections import Counter
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from seal_engine.model.config import ModelConfig
from seal_engine.sampling.kv_cache import BlockPool, KVCache, OutOfBlocks
from seal_engine.types import InputError

TAILS = st.lists(st.integers(0, 1), min_size=1, max_size=3)
TOKENS = st.builds(lambda n, tail: [0] * n + tail, st.integers(0, 8), TAILS)  # beginnings must often be equal
PICK = st.integers(0, 99)


@dataclass(eq=False)
class Live:
    """A sequence whose first `computed` tokens have their K/V in its blocks."""

    namespace: tuple[str, int]
    tokens: list[int]
    blocks: list[int] = field(default_factory=list)
    computed: int = 0


class SequencesOfAPool(RuleBasedStateMachine):
    """Sequences come, are computed in chunks, grow, fork, shrink and go, with copy on write and preemption.

    In place of K/V, `memory` holds what they were computed from: the namespace, and all tokens up to their own.
    """

    @initialize(num_blocks=st.integers(1, 12), block_size=st.integers(1, 4))
    def make(self, num_blocks, block_size):
        self.pool = BlockPool(num_blocks, block_size)
        self.size = block_size
        self.namespaces = [("base", 0), ("adapter", 0)]
        self.live: list[Live] = []
        self.waiting: list[Live] = []
        self.memory = {}  # (block, offset): (namespace, tokens)
        self.indexed = {}  # (namespace, tokens of whole blocks): block
        self.idle = {}  # indexed block without references: (when it lost the last one, how deep it is)
        self.clock = 0

    def references(self):
        return Counter(block for sequence in self.live for block in sequence.blocks)

    def available(self, held=()):
        """(free blocks, evictable blocks in the order they must go); held: by a sequence that is not live yet."""
        free = set(range(self.pool.num_blocks)) - {*self.references(), *held, *self.idle}
        assert self.pool.num_available == len(free) + len(self.idle)
        return free, sorted(self.idle, key=self.idle.__getitem__)

    def took(self, blocks, free, idle):
        """Check that these new blocks are the ones to take, and forget what they were."""
        evicted = set(idle[: max(0, len(blocks) - len(free))])
        assert len(set(blocks)) == len(blocks)
        assert set(blocks) & set(idle) == evicted
        assert set(blocks) - evicted <= free
        self.idle = {block: age for block, age in self.idle.items() if block not in evicted}
        self.indexed = {prefix: block for prefix, block in self.indexed.items() if block not in evicted}
        for namespace, tokens in self.indexed:
            assert len(tokens) == self.size or (namespace, tokens[: -self.size]) in self.indexed, (
                "leaves are evicted first"
            )
        self.memory = {at: value for at, value in self.memory.items() if at[0] not in blocks}

    def released(self):
        """Tables have become shorter."""
        self.clock += 1
        references = self.references()
        for (_, tokens), block in self.indexed.items():
            if not references[block]:
                self.idle.setdefault(block, (self.clock, -len(tokens)))

    def allocate(self, n, held=()):
        free, idle = self.available(held)
        blocks = self.pool.allocate(n)
        assert (blocks is None) == (n > len(free) + len(idle))
        if blocks is not None:
            assert len(blocks) == n
            self.took(blocks, free, idle)
        return blocks

    def num_blocks(self, num_tokens):
        return -(-num_tokens // self.size)

    def admit(self, sequence):
        expected = []
        for end in range(self.size, len(sequence.tokens), self.size):
            block = self.indexed.get((sequence.namespace, tuple(sequence.tokens[:end])))
            if block is None:
                break
            expected.append(block)
        matched = self.pool.match(sequence.namespace, sequence.tokens)
        assert matched == expected
        assert len(matched) * self.size < len(sequence.tokens)
        for block in matched:
            self.idle.pop(block, None)
        new = self.allocate(self.num_blocks(len(sequence.tokens)) - len(matched), held=matched)
        if new is None:
            self.pool.free(matched)
            self.released()
            return False
        sequence.blocks, sequence.computed = matched + new, len(matched) * self.size
        self.live.append(sequence)
        return True

    def pick(self, number):
        return self.live[number % len(self.live)]

    @rule(namespace=st.integers(0, 1), tokens=TOKENS)
    def start(self, namespace, tokens):
        self.admit(Live(self.namespaces[namespace], tokens))

    @rule(namespace=st.integers(0, 1), tokens=TOKENS)
    def score(self, namespace, tokens):
        """A whole life at once, so that many have been before."""
        if self.admit(Live(self.namespaces[namespace], tokens)):
            self.compute(-1, len(tokens))
            self.index(-1)
            self.leave(-1, preempt=False)

    @precondition(lambda self: self.waiting)
    @rule()
    def resume(self):
        if self.admit(self.waiting[0]):
            del self.waiting[0]

    @precondition(lambda self: self.live)
    @rule(number=PICK, n=st.integers(1, 20))
    def compute(self, number, n):
        """A chunk of the prompt, or what was generated; blocks that are not the sequence's own are copied first."""
        sequence = self.pick(number)
        for at in range(sequence.computed, min(sequence.computed + n, len(sequence.tokens))):
            i, offset = divmod(at, self.size)
            before, old = list(sequence.blocks), sequence.blocks[i]
            own = self.references()[old] == 1 and old not in self.indexed.values()
            free, idle = self.available()
            if not own and not free and not idle:
                with pytest.raises(OutOfBlocks):
                    self.pool.copy_on_write(sequence.blocks, i)
                assert sequence.blocks == before
                break
            pair = self.pool.copy_on_write(sequence.blocks, i)
            new = sequence.blocks[i]
            assert sequence.blocks == [*before[:i], new, *before[i + 1 :]]
            assert pair == (None if own else (old, new))
            if pair:
                self.took([new], free, idle)
                self.released()
                for row in range(self.size):
                    self.memory[new, row] = self.memory.get((old, row))
            assert self.references()[new] == 1
            assert new not in self.indexed.values()
            self.memory[new, offset] = sequence.namespace, tuple(sequence.tokens[: at + 1])
            sequence.computed = at + 1

    @precondition(lambda self: self.live)
    @rule(number=PICK)
    def index(self, number):
        sequence = self.pick(number)
        self.pool.register(sequence.namespace, sequence.tokens, sequence.blocks, sequence.computed)
        for i in range(sequence.computed // self.size):
            prefix = sequence.namespace, tuple(sequence.tokens[: (i + 1) * self.size])
            if self.indexed.setdefault(prefix, sequence.blocks[i]) != sequence.blocks[i]:
                break

    @precondition(lambda self: self.live)
    @rule(number=PICK, tokens=TOKENS)
    def generate(self, number, tokens):
        sequence = self.pick(number)
        new = self.allocate(self.num_blocks(len(sequence.tokens) + len(tokens)) - len(sequence.blocks))
        if new is not None:
            sequence.tokens += tokens
            sequence.blocks += new

    @precondition(lambda self: self.live)
    @rule(number=PICK, n=st.integers(1, 3))
    def fork(self, number, n):
        sequence = self.pick(number)
        tokens = sequence.tokens[: sequence.computed]
        for _ in range(n if tokens else 0):
            blocks = sequence.blocks[: self.num_blocks(len(tokens))]
            self.pool.share(blocks)
            self.live.append(Live(sequence.namespace, list(tokens), blocks, len(tokens)))

    @precondition(lambda self: self.live)
    @rule(number=PICK, length=st.integers(1, 11), tokens=TOKENS)
    def rewrite(self, number, length, tokens):
        """Take back the last tokens and go on with others: what is written first may lie in an indexed block."""
        sequence = self.pick(number)
        del sequence.tokens[length:]
        sequence.computed = min(sequence.computed, len(sequence.tokens))
        keep = self.num_blocks(len(sequence.tokens))
        self.pool.free(sequence.blocks[keep:])
        del sequence.blocks[keep:]
        self.released()
        self.generate(number, tokens)
        self.compute(number, len(sequence.tokens))

    @precondition(lambda self: self.live)
    @rule(number=PICK, preempt=st.booleans())
    def leave(self, number, preempt):
        sequence = self.live.pop(number % len(self.live))
        self.pool.free(sequence.blocks)
        self.released()
        if preempt:
            self.waiting.append(sequence)

    @rule(namespace=st.integers(0, 1))
    def train(self, namespace):
        name, version = self.namespaces[namespace]
        self.namespaces[namespace] = name, version + 1

    @invariant()
    def blocks_hold_what_their_tables_say(self):
        for sequence in getattr(self, "live", []):
            for at in range(sequence.computed):
                held = self.memory[sequence.blocks[at // self.size], at % self.size]
                assert held == (sequence.namespace, tuple(sequence.tokens[: at + 1]))

    @invariant()
    def pool_is_whole(self):
        if hasattr(self, "pool"):
            self.pool.check_integrity([sequence.blocks for sequence in self.live])
            assert self.pool.num_available == self.pool.num_blocks - len(self.references())

    def teardown(self):
        while getattr(self, "live", []):
            self.leave(0, preempt=False)
        if hasattr(self, "pool"):
            assert self.allocate(self.pool.num_blocks) is not None, "nothing is lost"


TestBlockPool = SequencesOfAPool.TestCase
TestBlockPool.settings = settings(max_examples=300, stateful_step_count=50, deadline=None)


def new_blocks(pool, n):
    blocks = pool.allocate(n)
    assert blocks is not None
    return blocks


def filled(pool, namespace, tokens):
    """The table of a sequence that is computed and indexed as far as its blocks are full; it keeps its references."""
    table = pool.match(namespace, tokens)
    table += new_blocks(pool, -(-len(tokens) // pool.block_size) - len(table))
    pool.register(namespace, tokens, table, len(tokens))
    return table


def test_allocate_all_or_nothing():
    pool = BlockPool(3)
    assert pool.num_available == 3
    assert new_blocks(pool, 0) == []
    assert pool.allocate(4) is None
    first = new_blocks(pool, 2)
    assert pool.allocate(2) is None
    assert pool.num_available == 1
    pool.check_integrity([first])
    last = new_blocks(pool, 1)
    assert sorted(first + last) == [0, 1, 2]
    pool.free(first)
    assert pool.num_available == 2
    pool.check_integrity([last])


def test_shared_blocks_are_freed_by_the_last():
    pool = BlockPool(2)
    table = new_blocks(pool, 2)
    pool.share(table)
    pool.free(table)
    assert pool.num_available == 0
    pool.free(table)
    assert pool.num_available == 2


@pytest.mark.parametrize(
    ("verb", "block"),
    [
        ("free", 0),
        ("free", 1),
        ("free", -1),
        ("share", 0),
        ("share", 1),
        ("share", -1),
        ("register", 0),
        ("register", -1),
    ],
)
def test_only_blocks_in_use_are_shared_freed_or_registered(verb, block):
    """Block 0 is free, block 1 evictable, and -1 must not count from the end, where a block is in use."""
    pool = BlockPool(3, block_size=1)
    blocks = new_blocks(pool, 3)
    pool.register("base", [5, 6], blocks[1:2], 1)
    pool.free(blocks[:2])
    verbs = {"free": pool.free, "share": pool.share, "register": lambda table: pool.register("other", [5], table, 1)}
    with pytest.raises(ValueError, match=f"block {block} is in no table"):
        verbs[verb]([block])
    pool.check_integrity([blocks[2:]])


def test_match_takes_whole_blocks_and_leaves_a_token():
    pool = BlockPool(8, block_size=2)
    table = filled(pool, "base", [1, 2, 3, 4, 5])
    for tokens, blocks in [
        ([], 0),
        ([1], 0),
        ([1, 2], 0),
        ([1, 2, 3], 1),
        ([1, 2, 9, 4, 5], 1),
        ([3, 4, 5], 0),
        ([1, 2, 3, 4], 1),
        ([1, 2, 3, 4, 5], 2),
        ([1, 2, 3, 4, 5, 6, 7], 2),
    ]:
        found = pool.match("base", tokens)
        assert found == table[:blocks], tokens
        pool.check_integrity([table, found])
        pool.free(found)


def test_match_stays_in_its_cache_namespace():
    pool = BlockPool(8, block_size=2)
    table = filled(pool, (7, 0), [1, 2, 3])
    assert pool.match((7, 1), [1, 2, 3]) == []
    assert pool.match((8, 0), [1, 2, 3]) == []
    assert pool.match((7, 0), [1, 2, 3]) == table[:1]


def test_equal_blocks_under_other_parents_are_other_blocks():
    pool = BlockPool(8, block_size=1)
    first, second = filled(pool, "base", [1, 3, 3]), filled(pool, "base", [2, 3, 3])
    assert not set(first) & set(second)
    assert pool.match("base", [2, 3, 3, 0]) == second


def test_an_indexed_block_outlives_its_sequence_until_memory_is_needed():
    pool = BlockPool(3, block_size=1)
    table = filled(pool, "base", [1, 2])
    pool.free(table)
    assert pool.num_available == 3
    assert pool.match("base", [1, 2, 3]) == table
    pool.free(table)
    new_blocks(pool, 3)
    assert pool.match("base", [1, 2, 3]) == []


def test_eviction_is_least_recently_used_and_leaves_first():
    pool = BlockPool(6, block_size=1)
    trunk = filled(pool, "base", [1, 2])
    left, right = filled(pool, "base", [1, 2, 3])[2:], filled(pool, "base", [1, 2, 4])[2:]
    pool.free(trunk + left)
    pool.free(trunk + right)
    pool.free(trunk)
    other = filled(pool, "base", [9])
    pool.free(other)
    pool.free(pool.match("base", [1, 2, 3, 0]))  # used again: after the others
    spare = new_blocks(pool, 1)
    order = [new_blocks(pool, 1)[0] for _ in range(5)]
    assert order == [*right, *other, *left, *reversed(trunk)]
    pool.check_integrity([spare, order])


def test_an_evicted_parent_leaves_nothing_behind():
    pool = BlockPool(2, block_size=1)
    pool.free(filled(pool, "base", [1, 2]))
    spare = new_blocks(pool, 2)
    pool.free(spare)
    table = filled(pool, "base", [1])
    found = pool.match("base", [1, 2, 3])
    assert found == table, "the new block of [1] is not the parent of the old block of [2]"
    pool.check_integrity([table, found])


def test_register_keeps_what_is_there_and_goes_on_once_it_is_gone():
    pool = BlockPool(4, block_size=1)
    tokens = [1, 2]
    first, second = new_blocks(pool, 1), new_blocks(pool, 2)  # computed side by side: neither could match the other
    pool.register("base", tokens, first, 1)
    pool.register("base", tokens, second, 2)
    found = pool.match("base", [1, 2, 3])
    assert found == first
    pool.check_integrity([first, second, found])
    pool.free(first)
    pool.free(found)
    spare = new_blocks(pool, 2)
    assert first[0] in spare
    pool.register("base", tokens, second, 2)
    assert pool.match("base", [1, 2, 3]) == second


def test_register_takes_what_is_computed_and_full():
    pool = BlockPool(4, block_size=2)
    tokens = [1, 2, 3, 4, 5]
    table = new_blocks(pool, 3)
    for computed, blocks in [(0, 0), (1, 0), (2, 1), (3, 1), (3, 1), (4, 2), (5, 2)]:
        pool.register("base", tokens, table, computed)
        found = pool.match("base", [*tokens, 6])
        assert found == table[:blocks]
        pool.free(found)


class Counted(list):
    """Counts the elements that are read."""

    reads = 0

    def __getitem__(self, at):
        part = super().__getitem__(at)
        self.reads += len(part) if isinstance(at, slice) else 1
        return part


def test_register_of_a_growing_sequence_is_cheap():
    """Each token is read once; of its blocks, a logarithm of them a call."""
    pool = BlockPool(64, block_size=4)
    tokens, table = Counted(range(256)), Counted(new_blocks(pool, 64))
    for computed in range(257):
        pool.register("base", tokens, table, computed)
    assert tokens.reads == 256
    assert table.reads <= 257 * 10
    assert pool.match("base", [*range(256), 0]) == table


def test_register_rejects_what_cannot_be():
    pool = BlockPool(4, block_size=2)
    table = new_blocks(pool, 2)
    for tokens, blocks in (([1, 2, 3], table), ([1, 2, 3, 4], table[:1])):
        with pytest.raises(ValueError, match="4 tokens computed"):
            pool.register("base", tokens, blocks, 4)
    pool.register((7, 0), [1, 2, 3, 4], table, 2)
    with pytest.raises(ValueError, match=r"under \(7, 0\) are continued under \(7, 1\)"):
        pool.register((7, 1), [1, 2, 3, 4], table, 4)
    pool.check_integrity([table])


def test_a_block_of_its_own_is_written_in_place():
    pool = BlockPool(1)
    table = new_blocks(pool, 1)
    assert pool.copy_on_write(table, 0) is None
    assert table == [0]


def test_a_shared_block_is_copied():
    pool = BlockPool(3)
    table = new_blocks(pool, 2)
    fork = list(table)
    pool.share(fork)
    old = table[1]
    assert pool.copy_on_write(fork, 1) == (old, fork[1])
    assert fork[0] == table[0]
    assert fork[1] not in table
    pool.check_integrity([table, fork])
    assert pool.copy_on_write(table, 1) is None


def test_an_indexed_block_is_copied_and_stays():
    pool = BlockPool(2, block_size=1)
    table = filled(pool, "base", [1])
    old = table[0]
    assert pool.copy_on_write(table, 0) == (old, table[0])
    pool.check_integrity([table])
    assert pool.match("base", [1, 2]) == [old]


def test_out_of_blocks_changes_nothing():
    pool = BlockPool(1, block_size=1)
    table = filled(pool, "base", [1])
    with pytest.raises(OutOfBlocks, match="all 1 blocks"):
        pool.copy_on_write(table, 0)
    assert table == [0]
    pool.check_integrity([table])


@pytest.mark.parametrize("how", ["indexed", "shared"])
def test_only_the_end_of_a_sequence_is_written(how):
    """Its own first block in front of what others hold would make their tables' second block the child of another."""
    pool = BlockPool(6, block_size=1)
    table = new_blocks(pool, 2)
    if how == "indexed":
        pool.register("base", [1, 2], table, 2)
    else:
        pool.share(table)
    before = list(table)
    with pytest.raises(ValueError, match=f"block {table[0]} is to be written, but"):
        pool.copy_on_write(table, 0)
    assert table == before


def broken_pool():
    """Block 0 is free, 1 <- 2 evictable, 3 <- 4 indexed in a table, 5 in it alone."""
    pool = BlockPool(6, block_size=1)
    spare, idle, table = new_blocks(pool, 1), new_blocks(pool, 2), new_blocks(pool, 3)
    pool.register("base", [1, 2], idle, 2)
    pool.register("base", [3, 4, 5], table, 2)
    pool.free(idle)
    pool.free(spare)
    pool.check_integrity([table])
    assert table == [3, 4, 5]
    return pool, table


def move(pool, block, **fields):
    """Give the block's node other fields, in the index as well."""
    node = pool._nodes[block]
    del pool._index[node.key]
    node = node._replace(key=node.key._replace(**fields))
    pool._index[node.key] = pool._nodes[block] = node


@pytest.mark.parametrize(
    ("block", "damage"),
    [
        pytest.param(5, lambda pool, table: table.pop(), id="no table lists a referenced block"),
        pytest.param(3, lambda pool, table: table.append(3), id="listed twice"),
        pytest.param(9, lambda pool, table: table.append(9), id="listed, but there is no such block"),
        pytest.param(9, lambda pool, table: pool._free.append(9), id="free, but there is no such block"),
        pytest.param(
            -1, lambda pool, table: pool._evictable.update({-1: None}), id="evictable, but there is no such block"
        ),
        pytest.param(5, lambda pool, table: pool._references.__setitem__(5, 2), id="too many references"),
        pytest.param(0, lambda pool, table: pool._free.remove(0), id="lost"),
        pytest.param(0, lambda pool, table: pool._free.append(0), id="free twice"),
        pytest.param(5, lambda pool, table: pool._free.append(5), id="free and referenced"),
        pytest.param(3, lambda pool, table: pool._evictable.update({3: None}), id="evictable and referenced"),
        pytest.param(
            0,
            lambda pool, table: (pool._free.remove(0), pool._evictable.update({0: None})),
            id="evictable without a node",
        ),
        pytest.param(
            1, lambda pool, table: (pool._evictable.clear(), pool._free.extend([1, 2])), id="free with a node"
        ),
        pytest.param(4, lambda pool, table: pool._index.pop(pool._nodes[4].key), id="node not in the index"),
        pytest.param(
            2,
            lambda pool, table: pool._index.update({pool._nodes[2].key: pool._nodes[2]._replace(block=1)}),
            id="index has another block's node",
        ),
        pytest.param(
            5,
            lambda pool, table: pool._index.update({("base", 0, (8,)): pool._nodes[4]._replace(block=5)}),
            id="index has a node under another key",
        ),
        pytest.param(
            4,
            lambda pool, table: pool._index.pop(pool._nodes[3].key) and pool._nodes.__setitem__(3, None),
            id="parent is not indexed",
        ),
        pytest.param(4, lambda pool, table: move(pool, 4, cache_namespace="other"), id="parent in another namespace"),
        pytest.param(4, lambda pool, table: move(pool, 4, parent=99), id="no such parent"),
        pytest.param(4, lambda pool, table: move(pool, 4, parent=0), id="first in a table, but a child"),
        pytest.param(4, lambda pool, table: move(pool, 4, tokens=(4, 5)), id="wrong number of tokens"),
        pytest.param(2, lambda pool, table: pool._evictable.move_to_end(2), id="evicted after its parent"),
        pytest.param(4, lambda pool, table: table.reverse(), id="in a table before its parent"),
    ],
)
def test_integrity_names_the_block(block, damage):
    pool, table = broken_pool()
    damage(pool, table)
    with pytest.raises(RuntimeError, match=f"^block {block}: "):
        pool.check_integrity([table])


CONFIG = ModelConfig.from_dict(
    {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 12,
        "intermediate_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "vocab_size": 5,
    }
)


def numbered_cache():
    cache = KVCache(CONFIG, 5, torch.float32, torch.device("cpu"), block_size=3)
    for i, tensor in enumerate((cache.keys, cache.values)):
        tensor.copy_(torch.arange(tensor.numel()).view_as(tensor) + 1000 * i)
    return cache


def test_cache_shapes_and_bytes():
    cache = numbered_cache()
    for tensor in (cache.keys, cache.values):
        assert tensor.shape == (2, 5, 3, 1, 4)
        assert tensor.is_contiguous()
    assert cache.pool.num_blocks == 5
    assert cache.pool.block_size == 3
    for dtype in (torch.float32, torch.bfloat16):
        cache = KVCache(CONFIG, 7, dtype, torch.device("cpu"))
        assert cache.keys.dtype == dtype
        assert 7 * KVCache.block_bytes(CONFIG, dtype) == cache.keys.nbytes + cache.values.nbytes


@pytest.mark.parametrize(
    "pairs",
    [[], [(0, 4)], [(1, 2), (1, 3)], [(0, 1), (1, 2)], [(3, 4), (4, 3)]],
    ids=["nothing", "one block", "one block to two", "a block that is overwritten too", "two blocks change places"],
)
def test_cache_copy(pairs):
    """Of all layers; every block is read before any is written."""
    cache, before = numbered_cache(), numbered_cache()
    cache.copy(pairs)
    source = {block: block for block in range(5)} | {new: old for old, new in pairs}
    for block, old in source.items():
        assert torch.equal(cache.keys[:, block], before.keys[:, old])
        assert torch.equal(cache.values[:, block], before.values[:, old])


def test_cache_copy_onto_one_block_twice():
    cache = numbered_cache()
    with pytest.raises(ValueError, match="onto the same block"):
        cache.copy([(0, 2), (1, 2)])


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "4", None])
def test_sizes_are_checked(value):
    with pytest.raises(InputError, match=r"num_blocks: found .*; accepted: an integer >= 1"):
        KVCache(CONFIG, value, torch.float32, torch.device("cpu"))
    with pytest.raises(InputError, match=r"block_size: found .*; accepted: an integer >= 1"):
        KVCache(CONFIG, 1, torch.float32, torch.device("cpu"), block_size=value)
