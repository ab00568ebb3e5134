"""What the sampling tests share: adapters, requests, and running a sampler to its end with every step checked."""

import torch

import oracle
from seal_engine import LoraConfig, SamplingParams

SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LORAS = [LoraConfig(r=3, lora_alpha=6), LoraConfig(r=5, lora_alpha=11, target_modules=SEVEN, lora_dropout=0.3)]


def random_adapter(engine, config=LORAS[1], seed=0):
    """B random too, so that it changes the logits."""
    adapter = engine.create_adapter(config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for _, _, b in adapter.projections():
        b.normal_(0, 0.1, generator=generator)
    return adapter


def params(**fields):
    return SamplingParams(**{"max_tokens": 8, "ignore_eos": True, **fields})


def sampler(engine, num_blocks=200, budget=None, **options):
    made = engine.sampler(num_blocks=num_blocks, **options)
    if budget is not None:
        made.token_budget = budget
    return made


def finish(sampler, ids=None):
    """Step to the end: every step gets on, stays within the budget and leaves the blocks in order."""
    for _ in range(2000):
        if not sampler.busy:
            break
        before = sampler.tokens_computed
        sampler.step()
        assert 0 < sampler.tokens_computed - before <= sampler.token_budget
        sampler.check_integrity()
    assert not sampler.busy
    assert sampler.cache.pool.num_available == sampler.cache.pool.num_blocks
    return [sampler.poll(i) for i in ids or []]


def run(sampler, requests):
    """requests: (prompt, params, adapter)."""
    return finish(sampler, [sampler.add_request(None, *request) for request in requests])


def alone(engine, requests):
    return [engine.generate([ids], own, [adapter], progress=False)[0] for ids, own, adapter in requests]


def tokens(outputs):
    return [[completion.token_ids for completion in output.outputs] for output in outputs]


def mixed_requests(engine):
    """Adapters or none, greedy or drawn, some with a common beginning; most leave a block half full."""
    adapters = [None, *(random_adapter(engine, config, seed) for seed, config in enumerate(LORAS))]
    prompts = oracle.sequences([1, 40, 2, 17, 129, 5, 16, 33, 64], seed=5)
    prompts += [[*prompts[4][:k], k] for k in (16, 40, 90)]
    some = [
        dict(temperature=0.0, max_tokens=20),
        dict(temperature=1.0, n=3, max_tokens=11),
        dict(temperature=0.7, top_k=30, n=2, logprobs=2),
        dict(temperature=1.4, top_p=0.8, prompt_logprobs=True, n=2, logprobs=0),
        dict(top_k=5, top_p=0.9, max_tokens=17, min_tokens=3, ignore_eos=False),
    ]
    return [(ids, params(**{**some[i % 5], "seed": 100 + i}), adapters[i % 3]) for i, ids in enumerate(prompts)]
