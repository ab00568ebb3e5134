"""Contiguous K/V of sequences that are being decoded: the tokens are those from blocks, whoever comes and leaves."""

import pytest
import torch
from sampling_cases import params, random_adapter

from seal_engine.sampling.decode_cache import DecodeCache


def requests(engine):
    """Prompts around the borders of blocks (16) and of slots (64), samples that share a prompt, two models at once."""
    generator = torch.Generator().manual_seed(0)
    adapter = random_adapter(engine)
    lengths = [1, 2, 15, 16, 17, 17, 40, 60, 63, 64, 65, 100]
    prompts = [torch.randint(engine.config.vocab_size, (n,), generator=generator).tolist() for n in lengths]
    prompts[5] = prompts[4]
    own = [params(max_tokens=(3, 50, 20)[i % 3], n=1 + i % 3, seed=i, temperature=1.0) for i in range(len(prompts))]
    return prompts, own, [None, adapter] * (len(prompts) // 2)


def tokens(outputs):
    assert [output.error for output in outputs if output.error] == []
    return [[completion.token_ids for completion in output.outputs] for output in outputs]


@pytest.mark.parametrize("num_blocks", [None, 24], ids=["enough blocks", "preempted"])
def test_the_tokens_are_those_from_blocks(engine, monkeypatch, num_blocks):
    """Slots are taken, outgrown, given up and moved together; a slot that is wrong by one token gives other tokens."""
    prompts, own, adapters = requests(engine)
    taken = []
    take = DecodeCache.take
    monkeypatch.setattr(DecodeCache, "take", lambda self, chunks: taken.append(take(self, chunks)) or taken[-1])
    outputs = engine.generate(prompts, own, adapters, progress=False, num_blocks=num_blocks, max_num_seqs=8)
    assert any(len(rows) == 2 for rows in taken), "slots of two widths"
    assert any(rows and rows[0].tokens is not None for rows in taken), "beside prompts, or in another order"
    monkeypatch.setattr(DecodeCache, "make", staticmethod(lambda model, cache: None))
    assert tokens(outputs) == tokens(engine.generate(prompts, own, adapters, progress=False, max_num_seqs=8))


def test_without_memory_for_slots_sequences_are_decoded_from_blocks(engine, monkeypatch):
    """A limit that some slots fit and wider ones do not: the tokens are the same, and no byte above it is taken."""
    prompts, own, adapters = requests(engine)
    wanted = tokens(engine.generate(prompts, own, adapters, progress=False))
    sampler = engine.sampler(num_blocks=400)
    cache = sampler.decode_cache
    cache.limit_bytes = 5 * 64 * 2 * sampler.cache.keys[0, 0, 0].nbytes * len(sampler.cache.keys)  # five slots of 64
    ids = [sampler.add_request(None, *request) for request in zip(prompts, own, adapters, strict=True)]
    most = 0
    while sampler.busy:
        sampler.step()
        most = max(most, sum(arena.kv.nbytes for arena in cache._arenas.values()))
    assert 0 < most <= cache.limit_bytes
    assert tokens([sampler.poll(i) for i in ids]) == wanted


def test_what_is_left_finds_its_prefix_in_blocks(engine):
    """Blocks that were filled from slots serve a later prompt that begins with what was sampled."""
    prompt = list(range(20))
    (first,) = engine.generate([prompt], params(max_tokens=60, temperature=0.0), progress=False)
    longer = prompt + first.outputs[0].token_ids
    sampler = engine.sampler(num_blocks=64)
    for ids in (prompt, longer):
        request = sampler.add_request(None, ids, params(max_tokens=60 if ids is prompt else 20, temperature=0.0))
        while sampler.busy:
            sampler.step()
    assert sampler.scheduler.tokens_reused == 64, "four full blocks, the last three of them sampled"
    (alone,) = engine.generate([longer], params(max_tokens=20, temperature=0.0), progress=False)
    assert sampler.poll(request).outputs[0].token_ids == alone.outputs[0].token_ids


def test_a_slot_holds_no_number_of_an_earlier_sequence(engine):
    """Behind a sequence's tokens a slot is zero: what a NaN left there would reach everyone, as 0 times NaN is NaN."""
    sampler = engine.sampler(num_blocks=64)
    for i in range(2):  # two slots, side by side
        sampler.add_request(None, list(range(i, 30 + i)), params(max_tokens=8, temperature=0.0))
    for _ in range(2):
        sampler.step()
    (arena,) = sampler.decode_cache._arenas.values()
    assert len(arena.slots) == 2
    arena.kv[:, :, 1] = float("nan")
    sampler.cancel(1)
    sampler.add_request(None, [5], params(max_tokens=8, temperature=0.0))
    while sampler.busy:
        sampler.step()
    assert [sampler.poll(i).error for i in range(3)] == [None] * 3
    assert len(sampler.poll(2).outputs[0].token_ids) == 8


def test_sequences_keep_their_slots_while_prompts_are_computed(engine, monkeypatch):
    """They wait, and go on where they were: no slot is given up, and the tokens are those of each request alone."""
    own, prompts = params(max_tokens=12, temperature=0.0), [list(range(20)), list(range(40)), list(range(5, 85))]
    alone = [tokens(engine.generate([ids], own, progress=False))[0] for ids in prompts]
    sampler = engine.sampler(num_blocks=64)
    sampler.token_budget = 16
    ids = [sampler.add_request(None, prompt, own) for prompt in prompts[:2]]
    while len(sampler.output(ids[1]).outputs[0].token_ids) < 3:
        sampler.step()
    cache, give_up, given_up = sampler.decode_cache, DecodeCache._give_up, []
    monkeypatch.setattr(DecodeCache, "_give_up", lambda self, slot: given_up.append(slot) or give_up(self, slot))
    before = [(slot.index, slot.length) for slot in cache._slots.values()]
    ids.append(sampler.add_request(None, prompts[2], own))
    for _ in range(5):
        assert sampler.step() == [] or sampler.output(ids[2]).outputs[0].token_ids
        assert [(slot.index, slot.length) for slot in cache._slots.values()] == before
    assert len(before) == 2
    assert given_up == []
    while sampler.busy:
        sampler.step()
    assert tokens([sampler.poll(i) for i in ids]) == alone
