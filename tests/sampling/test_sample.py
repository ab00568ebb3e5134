"""Sampling: parity with Transformers, right draws, company that changes nothing, the cache, text, and refusals."""

import math
from collections import Counter, defaultdict
from datetime import timedelta
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

import oracle
import seal_engine.engine
from seal_engine import AdamParams, Datum, Engine, InputError, LoraConfig, SamplingParams, TrainJob
from seal_engine.model.tokenizer import Tokenizer
from seal_engine.sampling.detokenizer import Detokenizer
from seal_engine.sampling.kv_cache import KVCache

LENGTHS = [1, 40, 2, 17, 129, 5]
SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LORAS = [LoraConfig(r=3, lora_alpha=6), LoraConfig(r=5, lora_alpha=11, target_modules=SEVEN, lora_dropout=0.3)]
VOCABULARY = 1009
INFINITY = float("inf")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """A second one only waits for the first in models of this size, for long where other processes run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def engine(checkpoint):
    return Engine.from_pretrained(checkpoint("llama"), device="cpu")


@pytest.fixture(scope="module")
def exact(checkpoint):
    """Deterministic, its last layer with a window of 9."""
    return Engine.from_pretrained(checkpoint("qwen3-biases-window"), device="cpu", deterministic=True)


@pytest.fixture(scope="module")
def sharp(tmp_path_factory):
    """Its likeliest tokens have some percent each."""
    directory = oracle.save(oracle.make_model("llama"), tmp_path_factory.mktemp("sharp"))
    return Engine.from_pretrained(directory, device="cpu")


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


def train(engine, adapter, seed=0):
    """One large step."""
    engine.forward_backward([Datum(adapter, oracle.sequences([30], seed=seed)[0])])
    engine.optim_step([(adapter, AdamParams(learning_rate=0.05))])
    adapter.release_optimizer_state()


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


# Parity

WINDOWS = {  # beside those of oracle.MODELS, which are shorter than most prompts
    "longer than some prompts": ("mistral-window", {"sliding_window": 64}),
    "longer than all": ("qwen3-biases-window", {"sliding_window": 400}),
    "a block": ("qwen2-window", {"sliding_window": 16}),
}


def generated(model, ids, max_new_tokens):
    """What Transformers' greedy generate adds to a prompt, alone."""
    given = torch.tensor([ids])
    mask = torch.ones_like(given)
    with torch.no_grad():
        out = model.generate(
            input_ids=given, attention_mask=mask, do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=0
        )
    return out[0, len(ids) :].tolist()


@pytest.mark.parametrize("name", [*oracle.MODELS, *WINDOWS])
def test_greedy_tokens_equal_transformers(name, tmp_path):
    """Ragged prompts in one call; every completion crosses a block's border."""
    own, changes = WINDOWS.get(name, (name, {}))
    theirs = oracle.make_model(own, **changes)
    engine = Engine.from_pretrained(oracle.save(theirs, tmp_path / "checkpoint"), device="cpu")
    prompts = oracle.sequences(LENGTHS)
    outs = engine.generate(prompts, SamplingParams(temperature=0, max_tokens=16), progress=False)
    for ids, (ours,) in zip(prompts, tokens(outs), strict=True):
        assert ours == generated(theirs, ids, 16)


@pytest.mark.parametrize("name", ["llama-biases-tied", "mistral-window", "qwen2"])
def test_greedy_tokens_under_adapters_equal_peft(name, checkpoint, tmp_path):
    """Two adapters and the base in one call, in an order in which no adapter's prompts lie together."""
    engine = Engine.from_pretrained(checkpoint(name), device="cpu")
    adapters = [None, *(random_adapter(engine, config, seed) for seed, config in enumerate(LORAS))]
    prompts = oracle.sequences([3, 40, 2, 17, 70, 5, 9], seed=2)
    chosen = [adapters[i % 3] for i in range(len(prompts))]
    ours = tokens(engine.generate(prompts, SamplingParams(temperature=0, max_tokens=12), chosen, progress=False))
    for k, adapter in enumerate(adapters):
        model = oracle.load(checkpoint(name), torch.float32)
        if adapter is not None:
            adapter.save(tmp_path / str(k))
            model = PeftModel.from_pretrained(model, tmp_path / str(k)).eval()
        for i in range(k, len(prompts), 3):
            assert ours[i] == [generated(model, prompts[i], 12)]
    assert ours != tokens(engine.generate(prompts, SamplingParams(temperature=0, max_tokens=12), progress=False))


# Sampling is right

FILTERS = [(1.0, 0, 1.0), (0.5, 0, 1.0), (1.5, 40, 1.0), (1.0, 0, 0.7), (0.8, 50, 0.9), (3.0, 4, 0.5), (1.0, 1, 1.0)]


def filtered(logits, temperature, top_k, top_p):
    """The exact distribution of a token, float64."""
    logits = logits.double()
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -INFINITY)
    p = (logits / temperature).softmax(0)
    if top_p < 1:
        falling, order = p.sort(descending=True)
        kept = order[: int((falling.cumsum(0) < top_p).sum()) + 1]
        p = torch.zeros_like(p).index_copy(0, kept, p[kept])
    return p / p.sum()


def check_counts(counts, p):
    """Nothing is drawn that cannot be, and a chi-squared test; rare tokens are taken together."""
    total = counts.sum()
    assert counts[p == 0].sum() == 0
    order = p.argsort(descending=True)
    expected, found = p[order] * total, counts[order].double()
    bin_of = (expected.cumsum(0) / 10).long()  # at least about 10 expected in each
    bins = int(bin_of.max()) + 1
    want = torch.zeros(bins, dtype=torch.double).index_add(0, bin_of, expected)
    have = torch.zeros(bins, dtype=torch.double).index_add(0, bin_of, found)
    have, want = have[want > 0], want[want > 0]
    if len(want) > 1:
        statistic, freedom = ((have - want) ** 2 / want).sum(), torch.tensor(len(want) - 1.0).double()
        assert torch.special.gammaincc(freedom / 2, statistic / 2) > 1e-4


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), FILTERS)
def test_tokens_are_drawn_from_the_filtered_distribution(temperature, top_k, top_p, sharp):
    """Many samples of one request, and many requests whose seeds are consecutive numbers."""
    (ids,) = oracle.sequences([21])
    p = filtered(sharp.logits([ids])[0][-1], temperature, top_k, top_p)
    fields = dict(temperature=temperature, top_k=top_k, top_p=top_p, max_tokens=1)
    samples = sharp.generate([ids], params(n=2500, seed=3, **fields), progress=False, max_num_seqs=1000)
    seeds = [params(seed=seed, **fields) for seed in range(1500)]
    requests = sharp.generate([ids] * 1500, seeds, progress=False, max_num_seqs=1500)
    for outs in (samples, requests):
        drawn = [completion.token_ids[0] for out in outs for completion in out.outputs]
        check_counts(torch.bincount(torch.tensor(drawn), minlength=VOCABULARY), p)


def test_tokens_of_a_completion_are_independent_draws(sharp):
    """The joint distribution of three tokens."""
    (ids,) = oracle.sequences([15])
    joint = {(): 1.0}
    for _ in range(3):
        logits = sharp.logits([[*ids, *before] for before in joint])
        following = [filtered(own[-1], 1.0, 3, 1.0) for own in logits]
        joint = {
            (*before, token): probability * float(p[token])
            for (before, probability), p in zip(joint.items(), following, strict=True)
            for token in p.nonzero().squeeze(1).tolist()
        }
    (out,) = sharp.generate([ids], params(n=3000, top_k=3, max_tokens=3, seed=1), progress=False, max_num_seqs=3000)
    found = Counter(tuple(completion.token_ids) for completion in out.outputs)
    assert set(found) <= set(joint)
    check_counts(torch.tensor([found[t] for t in joint]), torch.tensor(list(joint.values()), dtype=torch.double))


@pytest.mark.parametrize("top_k", [VOCABULARY, 5000, 2**31 - 1, 2**31, 2**63])
def test_a_top_k_of_the_vocabulary_keeps_all(top_k, engine):
    wanted = engine.generate([[1, 2]], params(seed=0), progress=False)
    assert engine.generate([[1, 2]], params(seed=0, top_k=top_k), progress=False) == wanted


@pytest.mark.parametrize("name", ["temperature", "top_p"])
@pytest.mark.parametrize("value", [1e-300, 1e-46, 1e-30])
def test_a_tiny_temperature_or_top_p_is_greedy(name, value, engine):
    wanted = engine.generate([[1, 2]], params(temperature=0), progress=False)
    assert engine.generate([[1, 2]], params(seed=0, **{name: value}), progress=False) == wanted


@pytest.mark.parametrize("temperature", [1e4, 1e39, 1e300, 2**64])
def test_a_huge_temperature_is_uniform(temperature, engine):
    (out,) = engine.generate([[1, 2]], params(temperature=temperature, n=3000, max_tokens=1, seed=0), progress=False)
    drawn = torch.tensor([completion.token_ids[0] for completion in out.outputs])
    check_counts(drawn.bincount(minlength=VOCABULARY), torch.full((VOCABULARY,), 1 / VOCABULARY).double())


# Company changes nothing

SETTINGS = {
    "all at once": dict(),
    "one row": dict(max_num_seqs=1),
    "three tokens a step": dict(budget=3, max_num_seqs=4),
    "seven tokens a step": dict(budget=7),
    "few blocks": dict(num_blocks=11),
    "few blocks, seven tokens": dict(num_blocks=10, budget=7),
    "few blocks, four rows": dict(num_blocks=14, max_num_seqs=4, budget=50),
}


@pytest.fixture(scope="module")
def requests(exact):
    return mixed_requests(exact)


@pytest.fixture(scope="module")
def results(exact, requests):
    """Of each by itself."""
    return alone(exact, requests)


@pytest.mark.parametrize("label", SETTINGS)
def test_company_changes_no_bit(label, exact, requests, results):
    """Tokens and log-probabilities, from a cold cache and from a warm one, in two orders; memory never written."""
    preempted = Counter()
    made = sampler(exact, **SETTINGS[label])
    original = made.scheduler.preempt
    made.scheduler.preempt = lambda row: (preempted.update([row]), original(row))
    made.cache.keys.fill_(math.nan)
    made.cache.values.fill_(math.nan)
    assert run(made, requests) == results
    assert run(made, requests[::-1]) == results[::-1]
    assert bool(preempted) == label.startswith("few blocks"), "what is tested did happen"


def test_generate_is_the_sampler(exact, requests, results):
    prompts, own, adapters = (list(column) for column in zip(*requests, strict=True))
    assert exact.generate(prompts, own, adapters, progress=False) == results
    assert exact.generate(prompts, own, adapters, progress=False, max_num_seqs=2, num_blocks=12) == results


@pytest.mark.parametrize("label", ["all at once", "seven tokens a step", "few blocks, four rows"])
def test_company_changes_no_token_in_the_normal_mode(label, engine):
    """A draw would have to fall within float32's rounding of a border between two tokens to differ."""
    requests = mixed_requests(engine)
    wanted = tokens(alone(engine, requests))
    made = sampler(engine, **SETTINGS[label])
    assert tokens(run(made, requests)) == wanted
    assert tokens(run(made, requests[::-1])) == wanted[::-1]


def test_company_changes_no_bit_of_a_bfloat16_model(checkpoint):
    engine = Engine.from_pretrained(checkpoint("qwen3"), device="cpu", dtype="bfloat16", deterministic=True)
    requests = mixed_requests(engine)[1:10:2]
    wanted = alone(engine, requests)
    assert run(sampler(engine, budget=20, num_blocks=11), requests) == wanted


def test_little_memory_changes_nothing(exact, requests, results, monkeypatch):
    """The cache takes half of what is free; where that is too little for a request, it fails alone."""
    prompts, own, adapters = (list(column) for column in zip(*requests, strict=True))
    block = KVCache.block_bytes(exact.config, torch.float32)
    monkeypatch.setattr(seal_engine.engine, "free_memory", lambda device: 2 * 10 * block + 1)
    assert exact.generate(prompts, own, adapters, progress=False) == results
    monkeypatch.setattr(seal_engine.engine, "free_memory", lambda device: 2 * 8 * block + 1)
    outs = exact.generate(prompts, own, adapters, progress=False)
    assert [out for out, ids in zip(outs, prompts, strict=True) if len(ids) < 129] == [
        out for out in results if len(out.prompt_token_ids) < 129
    ]
    assert [out.error is None for out in outs] == [len(ids) < 129 for ids in prompts]
    assert exact.sampler().cache.pool.num_blocks == 8


def test_a_sample_depends_on_seed_and_number(exact):
    (ids,) = oracle.sequences([20])
    fields = dict(max_tokens=12, logprobs=1)
    five, three, one, other = run(
        sampler(exact), [(ids, params(n=n, seed=seed, **fields)) for n, seed in ((5, 7), (3, 7), (1, 7), (5, 8))]
    )
    assert five.outputs[:3] == three.outputs
    assert five.outputs[:1] == one.outputs
    assert len({tuple(completion.token_ids) for completion in five.outputs + other.outputs}) == 10
    assert [completion.index for completion in five.outputs] == list(range(5))


@pytest.mark.parametrize("seed", [5 + (2 << 32), 5 + (1 << 62), 2**63 - 1])
def test_seeds_that_differ_draw_differently(seed, engine):
    """Over their whole range; no sample of one is a sample of another."""
    outs = engine.generate([[1, 2]] * 2, [params(n=3, seed=5), params(n=3, seed=seed)], progress=False)
    assert len({tuple(completion.token_ids) for out in outs for completion in out.outputs}) == 6


def test_without_a_seed_all_differ(engine):
    outs = engine.generate([[1, 2]] * 3, params(n=3, max_tokens=10), progress=False)
    outs += engine.generate([[1, 2]], params(n=3, max_tokens=10), progress=False)
    assert len({tuple(completion.token_ids) for out in outs for completion in out.outputs}) == 12


@pytest.mark.parametrize("hook", [lambda tokens, logits: logits, lambda tokens, logits: logits + 1])
def test_a_hook_changes_no_bit_of_others(hook, exact, requests, results):
    with_hook = ([5, 6, 7], params(logits_hook=hook, max_tokens=20, seed=1), None)
    assert run(sampler(exact), [with_hook, *requests])[1:] == results


# What is sampled is what is scored


@pytest.mark.parametrize(
    ("label", "kind"),
    [("all at once", "engine"), ("seven tokens a step", "exact"), ("few blocks, seven tokens", "engine")],
)
def test_logprobs_are_scores(label, kind, request):
    """Of completions, of the most likely tokens and of prompts, from a cold cache and from a warm one."""
    engine = request.getfixturevalue(kind)
    requests = []
    for ids, own, adapter in mixed_requests(engine):
        fields = {name: getattr(own, name) for name in ("temperature", "top_k", "top_p", "n", "max_tokens", "seed")}
        requests.append((ids, params(logprobs=4, prompt_logprobs=len(ids) > 1, **fields), adapter))
    made = sampler(engine, **SETTINGS[label])
    for _ in range(2):
        outs = run(made, requests)
        samples = [(out, sample, r[2]) for out, r in zip(outs, requests, strict=True) for sample in out.outputs]
        assert len(samples) == sum(own.n for _, own, _ in requests)
        wholes = [out.prompt_token_ids + sample.token_ids for out, sample, _ in samples]
        adapters = [adapter for _, _, adapter in samples]
        scores, logits = engine.score(wholes, adapters), engine.logits(wholes, adapters)
        for (out, sample, _), score, own in zip(samples, scores, logits, strict=True):
            first = len(out.prompt_token_ids) - 1
            assert sample.logprobs == pytest.approx(score[first:].tolist(), abs=1e-5)
            assert (out.prompt_logprobs or []) == pytest.approx(score[:first].tolist(), abs=1e-5)
            values, likeliest = own.log_softmax(-1)[first:-1].topk(4)
            assert [list(top) for top in sample.top_logprobs] == likeliest.tolist()
            for top, truth in zip(sample.top_logprobs, values.tolist(), strict=True):
                assert list(top.values()) == pytest.approx(truth, abs=1e-5)


def test_logprobs_are_the_models_own(engine):
    """Whatever temperature, filters, hooks and min_tokens make of the distribution that is drawn from."""
    (ids,) = oracle.sequences([9])
    forbid = params(logits_hook=lambda tokens, logits: logits.masked_fill(logits == logits.max(), -INFINITY))
    early = SamplingParams(min_tokens=8, max_tokens=8)
    kinds = [params(temperature=0.3), params(top_k=2), params(top_p=0.2), params(temperature=0), forbid, early]
    requests = [(ids, SamplingParams(**{**vars(own), "logprobs": 2, "seed": 4}), None) for own in kinds]
    for outs in (run(sampler(engine), requests), alone(engine, requests)):
        for out in outs:
            (completion,) = out.outputs
            logprobs = engine.logits([ids + completion.token_ids])[0][8:-1].log_softmax(-1)
            drawn = logprobs.gather(1, torch.tensor(completion.token_ids)[:, None]).squeeze(1)
            assert completion.logprobs == pytest.approx(drawn.tolist(), abs=1e-5)
            assert [list(top) for top in completion.top_logprobs] == logprobs.topk(2).indices.tolist()


def test_logprobs_that_are_not_asked_for(engine):
    outs = engine.generate([[1, 2, 3]] * 3, [params(), params(logprobs=0), params(logprobs=9999)], progress=False)
    none, own, everything = (out.outputs[0] for out in outs)
    assert none.logprobs is None
    assert none.top_logprobs is own.top_logprobs is None
    assert len(own.logprobs) == 8
    assert [len(top) for top in everything.top_logprobs] == [VOCABULARY] * 8
    assert outs[0].prompt_logprobs is None


def test_a_prompt_of_one_token_has_no_logprobs(engine):
    """As its score is empty: a list as always, not None."""
    (out,) = engine.generate([[5]], params(prompt_logprobs=True), progress=False)
    assert out.prompt_logprobs == engine.score([[5]])[0].tolist()


def test_prompt_logprobs_of_a_prompt_that_was_preempted(exact):
    """In its middle: an older request grows into its blocks."""
    long, short = oracle.sequences([150, 58], seed=8)
    made = sampler(exact, num_blocks=14, budget=8)
    scored, preempted = [], set()
    original = made.scheduler.preempt

    def preempt(row):
        scored.append(len(row.request.output.prompt_logprobs or []))
        preempted.add(row.request.request_id)
        original(row)

    made.scheduler.preempt = preempt
    requests = [(short, params(max_tokens=30, seed=0), None), (long, params(prompt_logprobs=True, seed=1), None)]
    outs = run(made, requests)
    assert any(0 < n < 149 for n in scored), scored
    assert preempted == {1}, "the younger one"
    assert outs == alone(exact, requests)
    assert outs[1].prompt_logprobs == pytest.approx(exact.score([long])[0].tolist(), abs=1e-5)


# The cache


def test_prefixes_are_found(exact):
    """Of a request that was made before, and of one that goes on from its completion; eviction forgets them."""
    (ids,) = oracle.sequences([100])
    made = sampler(exact, num_blocks=12)

    def computed(ids, **fields):
        before = made.tokens_computed
        (out,) = run(made, [(ids, params(seed=1, **fields), None)])
        assert out == alone(exact, [(ids, params(seed=1, **fields), None)])[0]
        return made.tokens_computed - before, ids + out.outputs[0].token_ids

    assert computed(ids, max_tokens=30)[0] == 129
    count, longer = computed(ids, max_tokens=30)
    assert count == 129 - 96
    assert computed(longer, max_tokens=4)[0] == 2 + 3  # of 129 tokens that were computed, 128 fill blocks
    assert computed(ids[:96], max_tokens=1)[0] == 16, "the last token's logits are needed"
    assert computed([*ids[:50], 1, 2, 3], max_tokens=1)[0] == 53 - 48
    assert computed(oracle.sequences([170], seed=9)[0], max_tokens=1)[0] == 170
    assert computed(ids, max_tokens=30)[0] > 100


def test_requests_of_one_moment_share_their_prompts(exact):
    """Blocks that are just being computed for one request are waited for by the others, whatever the budget is."""
    (ids,) = oracle.sequences([100])
    other, tail = oracle.sequences([70], seed=9)[0], [1, 2, 3]
    prompts = [ids, ids, other, [*ids[:64], *tail], ids[:50], other[:10], ids]
    requests = [(prompt, params(max_tokens=10, seed=i), None) for i, prompt in enumerate(prompts)]
    wanted = alone(exact, requests)
    expected = 100 + 70 + 2 * (100 - 96) + (67 - 64) + (50 - 48) + 10 + 9 * len(prompts)
    for budget in (1000, 40, 7):
        made = sampler(exact, budget=budget)
        assert run(made, requests) == wanted
        assert made.tokens_computed == expected
        made.check_integrity()
    adapters = [random_adapter(exact, seed=i) for i in (0, 1)]
    made = sampler(exact)
    run(made, [(ids, params(max_tokens=1), adapter) for adapter in (*adapters, None, *adapters)])
    assert made.tokens_computed == 3 * 100 + 2 * 4, "each adapter has K/V of its own"


def test_samples_share_their_prompt(exact):
    (ids,) = oracle.sequences([100])
    requests = [(ids, params(n=8, max_tokens=10, seed=1), None)]
    wanted = alone(exact, requests)
    for max_num_seqs, expected in ((8, 100 + 8 * 9), (3, 100 + 8 * 9 + 5 * 4)):
        made = sampler(exact, max_num_seqs=max_num_seqs)
        assert run(made, requests) == wanted
        assert made.tokens_computed == expected
        assert made.tokens_done == 80
    made = sampler(exact, num_blocks=7 + 7)  # the prompt's, and a copy of its last block for every other sample
    assert run(made, requests) == wanted
    assert made.tokens_computed == 100 + 8 * 9, "nothing was preempted"


def test_samples_that_were_preempted_share_their_prompt_again(exact):
    """Beside six blocks of their prompt there is room for the ends of four samples: they go on four at a time."""
    (ids,) = oracle.sequences([100])
    requests = [(ids, params(n=8, max_tokens=10, seed=1), None)]
    made = sampler(exact, num_blocks=10)
    number = made.add_request(None, *requests[0])
    steps = 0
    while made.busy:
        made.step()
        steps += 1
    assert finish(made, [number]) == alone(exact, requests)
    assert steps < 40, "one at a time takes 60"


def test_an_adapters_blocks_are_its_own(exact):
    """Three adapters, two of them equal in their parameters, and the base: one prompt, no block in common."""
    (ids,) = oracle.sequences([70])
    adapters = [None, random_adapter(exact), random_adapter(exact), random_adapter(exact, seed=1)]
    requests = [(ids, params(temperature=0), adapter) for adapter in adapters]
    made = sampler(exact)
    first = [run(made, [request])[0] for request in requests]
    assert made.tokens_computed == 4 * 77
    assert first == alone(exact, requests)
    assert first[1] == first[2]
    assert len({tuple(out.outputs[0].token_ids) for out in first}) == 3
    assert run(made, requests) == first
    assert made.tokens_computed == 4 * 77 + 4 * (77 - 64)


def test_training_between_calls_leaves_nothing_stale(exact):
    (ids,) = oracle.sequences([70])
    adapter, other = random_adapter(exact), random_adapter(exact, seed=1)
    requests = [(ids, params(temperature=0, logprobs=1), a) for a in (adapter, other, None)]
    made = sampler(exact)
    first = run(made, requests)
    train(exact, adapter)
    before = made.tokens_computed
    again = run(made, requests)
    assert made.tokens_computed - before == 77 + 2 * (77 - 64), "only what was not trained is found"
    assert again == alone(exact, requests)
    assert again[0] != first[0]
    assert again[1:] == first[1:]


def test_rows_keep_their_order_when_their_adapter_is_trained(checkpoint):
    """The one that came first stays the last to be preempted."""
    engine = Engine.from_pretrained(checkpoint("llama"), device="cpu")
    adapter, made = random_adapter(engine), sampler(engine)
    for ids in oracle.sequences([20, 30, 10]):
        made.add_request(None, ids, params(), adapter)
    for _ in range(2):
        train(engine, adapter)
        made.step()
        assert [row.request.request_id for row in made.scheduler.running] == [0, 1, 2]


@pytest.mark.parametrize("steps", [1, 2, 4, 9])
@pytest.mark.parametrize("how", ["train", "merge"])
def test_training_in_the_middle_of_requests_leaves_nothing_stale(steps, how, checkpoint):
    """In the middle of prompts and of completions: from then on all is as if it were asked for only then."""
    engine = Engine.from_pretrained(checkpoint("llama-biases-tied"), device="cpu", deterministic=True)
    prompts = oracle.sequences([40, 21, 3], seed=6)
    adapter, other = random_adapter(engine), random_adapter(engine, seed=1)
    fields = dict(temperature=0, logprobs=1)
    requests = [(ids, params(n=2, max_tokens=10, **fields), a) for ids in prompts for a in (adapter, other, None)]
    made = sampler(engine, budget=60)
    numbers = [made.add_request(None, *request) for request in requests]
    for _ in range(steps):
        made.step()
    drawn = {}
    for i, request in zip(numbers, requests, strict=True):
        for k, completion in enumerate(made.output(i).outputs):
            drawn[i, k] = list(completion.token_ids), list(completion.logprobs), request
    before = run(sampler(engine), requests)
    if how == "train":
        train(engine, adapter)
    else:
        engine.merge(adapter)
    affected = {at for at, (ids, _, r) in drawn.items() if len(ids) < 10 and (how == "merge" or r[2] is adapter)}
    rest = {
        at: (r[0] + ids, params(max_tokens=10 - len(ids), **fields), r[2])
        for at, (ids, _, r) in drawn.items()
        if at in affected
    }
    later = dict(zip(rest, run(sampler(engine), list(rest.values())), strict=True))
    outs = dict(zip(numbers, finish(made, numbers), strict=True))
    changed = 0
    for at, (ids, logprobs, _) in drawn.items():
        completion, old = outs[at[0]].outputs[at[1]], before[at[0]].outputs[at[1]]
        if at not in affected:
            assert completion == old
        else:
            (then,) = later[at].outputs
            assert completion.token_ids == ids + then.token_ids
            assert completion.logprobs == logprobs + then.logprobs
            changed += completion != old
    assert changed


@pytest.mark.parametrize("preempted", [False, True])
def test_prompt_logprobs_are_of_one_model(preempted, checkpoint):
    """Of the adapter as it is when the prompt has been read, not partly as it was before it was trained."""
    engine = Engine.from_pretrained(checkpoint("llama"), device="cpu", deterministic=True)
    (ids,) = oracle.sequences([60])
    adapter = random_adapter(engine)
    made = sampler(engine, budget=16)
    i = made.add_request(None, ids, params(prompt_logprobs=True, seed=1), adapter)
    for _ in range(2):
        made.step()
    assert 0 < len(made.output(i).prompt_logprobs) < 59
    if preempted:
        made.scheduler.preempt(next(iter(made.scheduler.running)))
    train(engine, adapter)
    (out,) = finish(made, [i])
    assert out.prompt_logprobs == pytest.approx(engine.score([ids], adapters=adapter)[0].tolist(), abs=1e-5)


BEGINNINGS = oracle.sequences([48, 48], seed=12)
ADD = st.tuples(
    st.just("add"), st.sampled_from([0, 1]), st.integers(1, 48), st.integers(0, 2), st.integers(0, 2),
    st.integers(1, 4), st.integers(1, 9), st.sampled_from([0.0, 1.0]), st.booleans(),
)  # fmt: skip
EVENTS = st.lists(
    st.one_of(ADD, ADD, st.tuples(st.just("step"), st.integers(1, 6)), st.tuples(st.just("cancel"), st.integers(0, 9))),
    min_size=4,
    max_size=14,
)


@pytest.fixture(scope="module")
def of_each(exact):
    """Adapters, and what every request that was ever made here gives by itself."""
    return [None, *(random_adapter(exact, config, seed) for seed, config in enumerate(LORAS))], {}


@settings(max_examples=20, deadline=timedelta(seconds=20), suppress_health_check=list(HealthCheck))
@given(
    events=EVENTS,
    num_blocks=st.integers(4, 12),
    max_num_seqs=st.integers(1, 8),
    budget=st.sampled_from([5, 17, 40, 2048]),
)
def test_whatever_is_asked_for_is_finished(events, num_blocks, max_num_seqs, budget, exact, of_each):
    """Requests come and are cancelled at any time, with few blocks: nothing is lost, and none changes another's."""
    adapters, known = of_each
    made = sampler(exact, num_blocks=num_blocks, budget=budget, max_num_seqs=max_num_seqs)
    asked, cancelled = [], set()
    for kind, *values in events:
        if kind == "add":
            beginning, length, tail, a, n, max_tokens, temperature, prompt_logprobs = values
            ids = BEGINNINGS[beginning][:length] + [500 + i for i in range(tail)]
            own = params(
                n=n, max_tokens=max_tokens, temperature=temperature, seed=3, prompt_logprobs=prompt_logprobs, logprobs=0
            )
            i = made.add_request(None, ids, own, adapters[a])
            assert i == len(asked)
            asked.append(((beginning, length, tail, a, n, max_tokens, temperature, prompt_logprobs), (ids, own, a)))
        elif kind == "step":
            for _ in range(values[0]):
                made.step()
                assert len(made.scheduler.running) <= max_num_seqs
                made.check_integrity()
        elif values[0] < len(asked):
            done = made.poll(values[0])
            made.cancel(values[0])
            assert made.poll(values[0]) is not None
            made.check_integrity()
            cancelled |= set() if done else {values[0]}
    finish(made)
    assert made.num_done == len(asked)
    for i, (key, (ids, own, a)) in enumerate(asked):
        if key not in known:
            known[key] = alone(exact, [(ids, own, adapters[a])])[0]
        out = made.poll(i)
        if i not in cancelled:
            assert out == known[key]
            continue
        assert "cancelled" in {completion.finish_reason for completion in out.outputs}
        for completion, whole in zip(out.outputs, known[key].outputs, strict=True):
            if completion.finish_reason == "cancelled":
                assert len(completion.token_ids) < len(whole.token_ids)
                assert completion.token_ids == whole.token_ids[: len(completion.token_ids)]
            else:
                assert completion == whole


# Text

SPACE_STOP, CJK_END, WORD, CUT = 256, 257, 258, 259
PIECES = [b" stop", "東".encode()[1:] + b"x", b" word", b"ab" + "東".encode()[:1]]
END, OTHER, UNKNOWN = 260, 261, 900


@pytest.fixture(scope="module")
def talker(engine):
    """Tokens 0 .. 255 are bytes, then PIECES, then an end token and another special token; 900 has no text."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    letters = {byte: chr(byte if byte in printable else next(others)) for byte in range(256)}
    vocabulary = {letters[byte]: byte for byte in range(256)}
    vocabulary |= {"".join(letters[byte] for byte in piece): 256 + i for i, piece in enumerate(PIECES)}
    backend = Backend(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    backend.decoder = decoders.ByteLevel()  # pyright: ignore
    backend.add_special_tokens(["<|end|>", "<|other|>"])
    tokenizer = Tokenizer(backend, {"eos_token": "<|end|>"})
    assert tokenizer.encode("a東<|end|><|other|>") == [97, *"東".encode(), END, OTHER]
    assert tokenizer.decode([97, CUT, CJK_END, WORD]) == "aab東x word"
    return Engine(engine.model, tokenizer=tokenizer)


def saying(*scripts):
    """A hook that forces these tokens, one script a request."""

    def hook(script):
        def force(tokens, logits):
            logits = torch.full_like(logits, -INFINITY)
            logits[script[len(tokens)]] = 0.0
            return logits

        return force

    return [hook(script) for script in scripts]


def say(engine, scripts, stream=False, **fields):
    own = [
        SamplingParams(logits_hook=hook, **{"max_tokens": len(script), **fields})
        for script, hook in zip(scripts, saying(*scripts), strict=True)
    ]
    prompts = [[1, 2]] * len(scripts)
    return list(engine.stream(prompts, own)) if stream else engine.generate(prompts, own, progress=False)


def said(engine, script, stops=(), stop_ids=(END,)):
    """(tokens, text, finish reason): a completion ends with the first token that completes a stop text."""
    decode = engine.tokenizer.decode
    for k, token in enumerate(script, 1):
        if token in stop_ids:
            return script[:k], decode(script[: k - 1], True, True), "stop"
        text = decode(script[:k], True, True)
        found = [text.find(stop) for stop in stops if stop in text]
        if found:
            return script[:k], text[: min(found)], "stop"
    return script, decode(script, True, True), "length"


def check_said(engine, scripts, stops):
    """What generate gives, and that a stream's deltas add up to it without a character being taken back."""
    wanted = [said(engine, script, stops) for script in scripts]
    outs = say(engine, scripts, stop=stops)
    assert [(o.token_ids, o.text, o.finish_reason) for out in outs for o in out.outputs] == wanted
    streamed = defaultdict(lambda: ([], "", None))
    for delta in say(engine, scripts, stream=True, stop=stops):
        ids, text, reason = streamed[delta.request_id]
        assert reason is None, "nothing follows the end"
        streamed[delta.request_id] = (ids + delta.token_ids, text + delta.text, delta.finish_reason)
    assert [streamed[i] for i in range(len(scripts))] == wanted


CHARACTERS = st.sampled_from(["a", "b", "ab", " ", "é", "東", "🌍", "\n", "stop"])
SCRIPTS = st.lists(
    st.one_of(
        CHARACTERS.map(lambda text: list(text.encode())),
        st.sampled_from([[SPACE_STOP], [WORD], [OTHER], [END], [UNKNOWN], [0xE6], [0x9D], [0xE6, CJK_END]]),
    ),
    min_size=1,
    max_size=10,
).map(lambda parts: [token for part in parts for token in part])
STOPS = st.lists(st.sampled_from(["ab", "ba", "a a", "stop", " stop", "東", "東x", "é東", "b🌍", "aab", "\n\n", "x w"]))


def test_of_stop_texts_that_end_together_the_longest_counts(talker):
    check_said(talker, [list(b"xaab"), list(b"xab"), [97, SPACE_STOP]], ["ab", "aab", "stop", " stop", "a stop"])


@settings(max_examples=25, deadline=timedelta(seconds=20), suppress_health_check=list(HealthCheck))
@given(scripts=st.lists(SCRIPTS, min_size=1, max_size=12), stops=STOPS)
def test_texts_end_at_stop_texts(scripts, stops, talker):
    check_said(talker, scripts, stops)


@pytest.mark.parametrize(
    ("script", "stops"),
    [
        ([CUT, CJK_END, 97], ["ab"]),  # the token that completes the stop text begins a character
        ([CUT], ["ab"]),  # which is never completed, as the completion ends
        ([97, CUT, END], ["ab"]),
        ([120, CUT, 0x9D, 0xB1, 98], ["b東", "xab"]),
    ],
)
def test_a_stop_text_before_part_of_a_character_ends_it(script, stops, talker):
    check_said(talker, [script], stops)


def test_a_stream_holds_back_only_what_may_change(talker):
    """Characters come with their last token; text that may become a stop text when it cannot any more."""
    script = list("ab st é東 s".encode())
    texts = [delta.text for delta in say(talker, [script], stream=True)]
    assert texts == ["a", "b", " ", "s", "t", " ", "", "é", "", "", "東", " ", "s"]
    texts = [delta.text for delta in say(talker, [script], stream=True, stop=["stop", " stop"])]
    assert texts == ["a", "b", "", "", "", " st", "", " é", "", "", "東", "", " s"]
    made = talker.sampler(num_blocks=9)
    made.add_request(None, [1], params(logits_hook=saying(script)[0]))
    assert [made.step()[0].text for _ in range(8)] == [""] * 8, "no text without `stream`"
    assert made.output(0).outputs[0].text == "ab st é"


def test_streaming_is_generating(talker):
    """Tokens, texts and finish reasons of prompts with adapters, n samples and preemption."""
    adapter = random_adapter(talker)
    prompts = ["ab", "東京", [5] * 40, "x"]
    own = [
        params(n=n, max_tokens=30, seed=n, stop=list("abcdefghijklmnoprsté"), ignore_eos=False) for n in (1, 3, 2, 4)
    ]
    adapters = [None, adapter, adapter, None]
    outs = talker.generate(prompts, own, adapters, progress=False)
    found = defaultdict(lambda: ([], "", None))
    for delta in talker.stream(prompts, own, adapters, num_blocks=12, max_num_seqs=4):
        ids, text, reason = found[delta.request_id, delta.index]
        assert reason is None
        found[delta.request_id, delta.index] = (ids + delta.token_ids, text + delta.text, delta.finish_reason)
    wanted = {(i, o.index): (o.token_ids, o.text, o.finish_reason) for i, out in enumerate(outs) for o in out.outputs}
    assert found == wanted
    assert [out.prompt for out in outs] == ["ab", "東京", None, "x"]
    assert outs[1].prompt_token_ids == list("東京".encode())
    assert {reason for _, _, reason in wanted.values()} == {"stop", "length"}


def test_detokenizing_takes_linear_time(talker):
    decoded = []

    def decode(ids):
        decoded.append(len(ids))
        return talker.tokenizer.decode(ids)

    text = Detokenizer(decode, ["stop", "\n\n"])
    script = list("A sentence with some é, 東 and 🌍. ".encode()) * 20
    for token in script:
        assert text.add(token) is None
    assert text.text == talker.tokenizer.decode(script)
    assert sum(decoded) < 12 * len(script)


def test_stop_ids(talker):
    script = [97, OTHER, 98, UNKNOWN, 99, END, 100, 101]

    def one(**fields):
        (out,) = say(talker, [script], **fields)
        (completion,) = out.outputs
        return len(completion.token_ids), completion.text, completion.finish_reason

    assert one() == (6, "abc", "stop")
    assert one(ignore_eos=True) == (8, "abcde", "length")
    assert one(stop_token_ids=[98]) == (3, "a", "stop")
    assert one(stop_token_ids=[UNKNOWN], ignore_eos=True) == (4, "ab", "stop")
    assert one(stop_token_ids=[101, -5, 2**80], ignore_eos=True) == (8, "abcd", "stop")
    assert one(stop_token_ids=[OTHER], stop="c") == (2, "a", "stop")
    assert one(stop="c") == (5, "ab", "stop")
    assert one(max_tokens=5) == (5, "abc", "length")
    assert one(max_tokens=6) == (6, "abc", "stop")


def test_stop_ids_without_a_tokenizer_are_the_checkpoints(engine):
    outs = say(engine, [[5, 2, 7]]) + say(engine, [[5, 2, 7]], ignore_eos=True)
    assert [out.outputs[0].token_ids for out in outs] == [[5, 2], [5, 2, 7]]
    assert [out.outputs[0].finish_reason for out in outs] == ["stop", "length"]


def test_texts_that_were_not_finished(talker):
    """Cancelled or failed: what was said until then."""

    def failing(tokens, logits):
        return saying([97, OTHER, 98])[0](tokens, logits)  # has no fourth token

    made = sampler(talker)
    cancelled = made.add_request(None, [1], params(logits_hook=saying([99, 100, 101])[0], stop="no"))
    failed = made.add_request(None, [1], params(logits_hook=failing))
    never = made.add_request(None, [1], params())
    made.cancel(never)
    for _ in range(2):
        made.step()
    made.cancel(cancelled)
    outs = finish(made, [cancelled, failed, never])
    assert [(out.outputs[0].text, out.outputs[0].finish_reason) for out in outs] == [
        ("cd", "cancelled"), ("ab", None), ("", "cancelled"),
    ]  # fmt: skip
    assert "IndexError" in outs[1].error


def test_min_tokens(talker):
    """No stop id is drawn before, of the model or of the request; others are as likely as ever."""

    def like_ending(tokens, logits):
        logits[[END, 7, 8]] += 100.0
        return logits

    own = [SamplingParams(min_tokens=k, stop_token_ids=[7], logits_hook=like_ending, seed=0) for k in (0, 1, 5, 64)]
    outs = [out.outputs[0] for out in talker.generate([[1]] * 4, own, progress=False)]
    assert len(outs[0].token_ids) >= 1
    for completion, least in zip(outs, (0, 1, 5, 64), strict=True):
        drawn = completion.token_ids
        assert all(token == 8 for token in drawn[: max(least, len(drawn) - 1)])
        assert len(drawn) >= least
        assert completion.finish_reason == ("length" if least == 64 else "stop")
    (out,) = talker.generate([[1]], SamplingParams(min_tokens=3, stop_token_ids=range(VOCABULARY)), progress=False)
    assert "not finite" in out.error, "there is nothing else to draw"


def test_max_tokens(engine):
    """None: to the model's length, which a prompt may all but fill."""
    long = oracle.sequences([511, 500, 490])
    own = [params(max_tokens=most) for most in (None, None, 4)]
    outs = [out.outputs[0] for out in engine.generate(long, own, progress=False)]
    assert [(len(o.token_ids), o.finish_reason) for o in outs] == [(1, "length"), (12, "length"), (4, "length")]
    (out,) = engine.generate(long[:1], params(max_tokens=50), progress=False)
    assert len(out.outputs[0].token_ids) == 1
    assert engine.generate([[1]], progress=False)[0].outputs[0].finish_reason in ("length", "stop")


def test_prompts_of_any_kind(engine):
    wanted = engine.generate([[1, 2, 3]], params(seed=0), progress=False)
    for prompt in ((1, 2, 3), torch.tensor([1, 2, 3]), np.array([1, 2, 3], dtype=np.uint16), range(1, 4)):
        assert engine.generate((prompt,), params(seed=0), progress=False) == wanted
    assert engine.generate([], progress=False) == []
    assert list(engine.stream([])) == []


def test_text_without_a_tokenizer(engine):
    wanted, refused = engine.generate([[1, 2]] * 2, [params(seed=0), params(stop="a")], progress=False)
    assert wanted.outputs[0].text == ""
    assert "stop: found texts, but there is no tokenizer" in refused.error
    deltas = list(engine.stream([[1, 2]], params(seed=0)))
    assert [token for delta in deltas for token in delta.token_ids] == wanted.outputs[0].token_ids
    assert "".join(delta.text for delta in deltas) == ""


# Hooks


def test_a_hook_decides_what_is_drawn_from(engine):
    seen = []

    def without_the_best(tokens, logits):
        assert logits.shape == (VOCABULARY,)
        seen.append((list(tokens), int(logits.argmax())))
        tokens.append(-1)  # its own copy
        logits[logits.argmax()] = -INFINITY
        return logits.double()

    (out,) = engine.generate([[1, 2, 3]], params(temperature=0, logits_hook=without_the_best), progress=False)
    drawn = out.outputs[0].token_ids
    assert [tokens for tokens, _ in seen] == [drawn[:k] for k in range(8)]
    logits = engine.logits([[1, 2, 3, *drawn]])[0][2:-1]
    assert [best for _, best in seen] == logits.argmax(1).tolist()
    assert drawn == logits.topk(2).indices[:, 1].tolist()


def raising(tokens, logits):
    if len(tokens) == 3:
        raise KeyError("my own mistake")
    return logits


def returning(value):
    return lambda tokens, logits: value if len(tokens) == 3 else logits


FAILING_HOOKS = {
    "raises": (raising, "logits_hook: KeyError: 'my own mistake'"),
    "NaN": (returning(torch.full((VOCABULARY,), math.nan)), "token 3: the logits are not finite"),
    "one inf": (returning(torch.zeros(VOCABULARY).index_fill(0, torch.tensor(9), INFINITY)), "token 3: the logits"),
    "nothing left": (returning(torch.full((VOCABULARY,), -INFINITY)), "token 3: the logits are not finite"),
    "None": (returning(None), "logits_hook: "),
    "too few": (returning(torch.zeros(5)), "logits_hook: RuntimeError"),
    "two rows": (returning(torch.zeros(2, VOCABULARY)), "logits_hook: RuntimeError"),
    "text": (returning("no"), "logits_hook: "),
}  # fmt: skip


@pytest.mark.parametrize("label", FAILING_HOOKS)
def test_a_hook_that_fails_fails_its_request_alone(label, exact):
    """With a sample that still waits for a row, where there are three."""
    hook, message = FAILING_HOOKS[label]
    good = [([4, 5, 6], params(n=2, seed=1), None), (oracle.sequences([40])[0], params(seed=2), None)]
    wanted = alone(exact, good)
    for n, max_num_seqs in ((2, 256), (5, 3)):
        bad = ([1, 2, 3], params(n=n, logits_hook=hook, seed=3), None)
        failed, *others = run(sampler(exact, budget=30, max_num_seqs=max_num_seqs), [bad, *good])
        assert others == wanted
        assert message in failed.error
        lengths = [len(completion.token_ids) for completion in failed.outputs]
        assert lengths == [3, 3] if n == 2 else lengths[0] == 3 and lengths[4] == 0
        assert {completion.finish_reason for completion in failed.outputs} == {None}


@pytest.mark.parametrize("where", ["hidden_states", "logits", "hook"])
def test_a_step_that_is_interrupted_is_made_again(where, exact, monkeypatch):
    """By Ctrl-C, or by a GPU that has no memory left: nothing hangs, and nothing is lost or drawn twice."""
    (ids,) = oracle.sequences([32])
    requests = [(ids, params(n=3, seed=1, logprobs=0), None), ([5], params(seed=2), None)]
    wanted = alone(exact, requests)
    calls = Counter()

    def interrupted(function):
        def call(*arguments):
            calls.update(["made"])
            if calls["made"] in (1, 4, 9):
                raise KeyboardInterrupt
            return function(*arguments)

        return call

    made = sampler(exact, max_num_seqs=3)
    if where == "hook":
        requests[1] = ([5], params(seed=2, logits_hook=interrupted(lambda tokens, logits: logits)), None)
    else:
        monkeypatch.setattr(exact.model, where, interrupted(getattr(exact.model, where)))
    numbers = [made.add_request(None, *request) for request in requests]
    interrupts = 0
    for _ in range(100):
        try:
            made.step()
        except KeyboardInterrupt:
            interrupts += 1
        made.check_integrity()
    assert not made.busy
    assert interrupts == 3
    assert finish(made, numbers) == wanted


# Cancelling and asking


def test_requests_are_cancelled_at_any_time(exact):
    """Waiting, in the middle of a prompt, between samples that were forked, when some of them are done, and after."""
    prompts = oracle.sequences([40, 40, 20], seed=7)
    own = [params(n=3, max_tokens=6, seed=1), params(seed=2, n=2), params(seed=3)]
    requests = [(ids, p, None) for ids, p in zip(prompts, own, strict=True)]
    wanted = alone(exact, requests)
    for steps, k in product((0, 1, 2, 3, 5, 8, 12), range(3)):
        made = sampler(exact, num_blocks=12, budget=30, max_num_seqs=4)
        ids = [made.add_request(None, *request) for request in requests]
        for _ in range(steps):
            made.step()
        before = made.poll(ids[k])
        made.cancel(ids[k])
        made.check_integrity()
        outs = finish(made, ids)
        assert [out for i, out in enumerate(outs) if i != k] == [out for i, out in enumerate(wanted) if i != k]
        if before is not None:
            assert outs[k] == wanted[k]
            continue
        assert outs[k].error is None
        for completion, whole in zip(outs[k].outputs, wanted[k].outputs, strict=True):
            assert completion.finish_reason in ("cancelled", "length")
            assert completion.token_ids == whole.token_ids[: len(completion.token_ids)]
            assert (completion.finish_reason == "length") == (len(completion.token_ids) == len(whole.token_ids))


def test_cancelling_in_a_hook(exact):
    """Its own request, and one that is drawn for in the same step."""
    made = sampler(exact)
    good = ([7, 8], params(seed=9, n=2), None)

    def cancel(number):
        return lambda tokens, logits: (made.cancel(number) if len(tokens) == 2 else None, logits)[1]

    requests = [([1, 2], params(n=2, seed=1, logits_hook=cancel(0)), None), ([3], params(seed=2), None)]
    requests += [([4], params(seed=3, logits_hook=cancel(1)), None), good]
    outs = run(made, requests)
    assert [[len(c.token_ids) for c in out.outputs] for out in outs] == [[2, 2], [2], [8], [8, 8]]
    assert [out.outputs[0].finish_reason for out in outs] == ["cancelled", "cancelled", "length", "length"]
    assert [outs[3]] == alone(exact, [good])


def test_polling(exact):
    made = sampler(exact)
    assert not made.busy
    assert made.step() == []
    first, second = (made.add_request(None, [1, 2], params(max_tokens=n, seed=0)) for n in (2, 4))
    assert made.poll(first) is None
    assert made.output(first).outputs[0].token_ids == []
    deltas = [delta for _ in range(2) for delta in made.step()]
    assert [(d.request_id, d.index, d.finish_reason) for d in deltas] == [
        (first, 0, None), (second, 0, None), (first, 0, "length"), (second, 0, None),
    ]  # fmt: skip
    assert made.poll(first).outputs[0].finish_reason == "length"
    assert made.poll(second) is None
    assert made.output(second).outputs[0].token_ids == [d.token_ids[0] for d in deltas if d.request_id == second]
    assert made.num_done == 1
    made.cancel(first)
    assert made.poll(first).outputs[0].finish_reason == "length"
    for unknown in (-1, 2, "0", None, 1.5, True):
        for call in (made.poll, made.cancel, made.output):
            with pytest.raises(InputError, match=r"request_id: found .*; accepted: an id that add_request returned"):
                call(unknown)
    finish(made)
    assert made.num_done == 2


# Bad input

BAD_PARAMS = {
    "n": [0, -1, 1.0, True, None, "1"],
    "temperature": [-0.1, math.nan, math.inf, None, "1", True, 10**400],
    "top_p": [0, -0.5, 1.01, math.nan, None, "1", True, 10**400],
    "top_k": [-1, 1.0, None, True, "1"],
    "max_tokens": [0, -1, 1.5, True, "1"],
    "min_tokens": [-1, 1.5, None, True, 65],
    "stop": ["", [""], ["a", ""], 5, ["a", 5], {"a"}, b"a"],
    "stop_token_ids": [5, [1.0], ["1"], [True], {5}, "5"],
    "ignore_eos": [1, None, "yes"],
    "seed": [-1, 2**63, 1.0, True, "1"],
    "logprobs": [-1, 1.0, True, "1"],
    "prompt_logprobs": [1, None, "yes"],
    "logits_hook": [5, "hook"],
}


@pytest.mark.parametrize("name", BAD_PARAMS)
def test_params_out_of_range_are_refused(name):
    assert set(BAD_PARAMS) == set(SamplingParams.__dataclass_fields__)
    for value in BAD_PARAMS[name]:
        with pytest.raises(InputError, match=rf"^{name}: found .*; accepted: "):
            SamplingParams(**{name: value})


def test_params_in_range():
    for fields in (
        dict(n=1, temperature=0, top_p=1, top_k=0, max_tokens=None, min_tokens=10**9, seed=2**63 - 1, logprobs=0),
        dict(temperature=0.0, top_p=1e-9, stop=("a", "b"), stop_token_ids=(), max_tokens=5, min_tokens=5),
        dict(stop=[], stop_token_ids=[1, 2], seed=0),
    ):
        SamplingParams(**fields)


BAD_PROMPTS = {
    "empty": ([], "found no token"),
    "the model's length": ([1] * 512, "prompt: found 512 tokens; accepted: fewer than 512"),
    "too long": ([1] * 600, "found 600 tokens"),
    "id too high": ([1, VOCABULARY], "token 1: found id int 1009"),
    "id negative": ([-1], "token 0: found id int -1"),
    "no integer": ([1.0], "found list"),
    "bool": ([True], "found list"),
    "None": (None, "found NoneType"),
    "text without tokenizer": ("text", "tokenizer"),
    "list of texts": (["text"], "found list"),
}


def test_a_bad_prompt_fails_alone(exact):
    bad = [ids for ids, _ in BAD_PROMPTS.values()]
    good = oracle.sequences([5, 20, 40])
    prompts = [*good[:1], *bad, *good[1:]]
    outs = exact.generate(prompts, params(seed=1, n=2), progress=False)
    assert [outs[0], *outs[-2:]] == alone(exact, [(ids, params(seed=1, n=2), None) for ids in good])
    for out, (label, (_, message)) in zip(outs[1:-2], BAD_PROMPTS.items(), strict=True):
        assert message in (out.error or ""), label
        assert out.outputs == []
    for k in range(len(bad)):
        with pytest.raises(InputError, match=r"^prompts\[1\]: (?!prompts)"):
            exact.stream([good[0], bad[k]])


def test_an_adapter_of_another_model_fails_alone(engine, checkpoint):
    other = random_adapter(Engine.from_pretrained(checkpoint("qwen2"), device="cpu"))
    own = random_adapter(engine)
    good, bad, base = engine.generate([[1, 2]] * 3, params(seed=0), [own, other, None], progress=False)
    assert "adapter: an adapter of another model" in bad.error
    assert good.error is base.error is None
    assert [good, base] == alone(engine, [([1, 2], params(seed=0), a) for a in (own, None)])


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("text",), {}, "prompts: found str"),
        ((5,), {}, "prompts: found int"),
        (([[1]], [params()] * 2), {}, "params: found list"),
        (([[1]], [None]), {}, r"params\[0\]: found NoneType"),
        (([[1]], {"n": 1}), {}, "params: found dict"),
        (([[1]], None, [None] * 2), {}, "adapters: found list"),
        (([[1]], None, ["a"]), {}, r"adapters\[0\]: found str"),
        (([[1]], None, 5), {}, "adapters: found int"),
        (([[1]],), dict(num_blocks=0), "num_blocks: found 0"),
        (([[1]],), dict(num_blocks=1.5), r"num_blocks: found 1\.5"),
        (([[1]],), dict(max_num_seqs=0), "max_num_seqs: found 0"),
        (([[1]],), dict(max_num_seqs=-3), "max_num_seqs: found -3"),
        (([[1]],), dict(max_num_seqs=1.5), r"max_num_seqs: found 1\.5"),
        (([[1]],), dict(max_num_seqs="all"), "max_num_seqs: found 'all'"),
    ],
)
def test_calls_that_are_refused(arguments, options, message, engine):
    for verb in (engine.generate, engine.stream):
        with pytest.raises(InputError, match=message):
            verb(*arguments, **options)


@pytest.mark.parametrize("prompt", [None, 5, "text", [1.5], ["a"], [True], [None]])
def test_a_request_without_token_ids_fails_alone(prompt, exact):
    """As its own front end may hand it to the sampler."""
    made = sampler(exact)
    bad, good = made.add_request(None, prompt, params()), made.add_request(None, [1, 2], params(seed=0))
    assert made.poll(bad).error is not None
    assert finish(made, [good]) == alone(exact, [([1, 2], params(seed=0), None)])


def test_a_request_that_the_cache_cannot_hold_fails_alone(exact):
    """Two blocks hold 32 tokens; a last one is drawn, but never computed."""
    fits, over, long = ([1] * 30, params(max_tokens=3, seed=1)), ([1] * 30, params(max_tokens=4)), ([1] * 40, params())
    unbounded, short = ([1], params(max_tokens=None)), ([1], params(max_tokens=32, n=4, seed=0))
    made = sampler(exact, num_blocks=2)
    outs = run(made, [(*request, None) for request in (over, fits, long, unbounded, short)])
    for i in (0, 2, 3):
        assert "accepted: at most 33, which the K/V cache holds" in outs[i].error
        assert outs[i].outputs == []
    assert [len(outs[1].outputs[0].token_ids), *(len(c.token_ids) for c in outs[4].outputs)] == [3, 32, 32, 32, 32]
    assert [outs[1], outs[4]] == alone(exact, [(*fits, None), (*short, None)])


def test_an_adapter_of_nan_fails_alone(exact, requests, results):
    """Others keep their bits, in its steps and in the blocks that were its own."""
    bad = random_adapter(exact)
    bad.params.fill_(math.nan)
    ids = oracle.sequences([100, 30])
    broken = [(ids[0], params(prompt_logprobs=True, n=2), bad), (ids[1], params(temperature=0), bad)]
    made = sampler(exact, num_blocks=30, budget=64)
    outs = run(made, [broken[0], *requests, broken[1]])
    assert outs[1:-1] == results
    assert run(made, requests) == results
    for out in (outs[0], outs[-1]):
        assert out.error == "token 0: the logits are not finite"
        assert {(*completion.token_ids, completion.finish_reason) for completion in out.outputs} == {(None,)}


# Beside training


def jobs():
    sequences = oracle.sequences([12, 30, 7, 21], seed=3)
    loras = [LoraConfig(r=2), LoraConfig(r=4, target_modules=SEVEN, lora_dropout=0.2), LoraConfig(r=3)]
    return [TrainJob(sequences, lora, learning_rate=1e-2, num_epochs=i + 1, seed=i) for i, lora in enumerate(loras)]


def test_training_and_sampling_take_turns(exact, requests, results):
    """Both give what they give apart; adapters are sampled from while they are trained, and when they are done."""
    trainer, made = exact.trainer(token_budget=40), sampler(exact, num_blocks=14, budget=48, max_num_seqs=6)
    trained = exact.train(jobs(), progress=False, token_budget=40)
    job_ids = [trainer.submit(job) for job in jobs()]
    ids = [made.add_request(None, *request) for request in requests]
    watching = []
    while trainer.busy or made.busy:
        trainer.step()
        for run_ in trainer._resident:
            if len(watching) < 12:
                watching.append(made.add_request(None, [1, 2, 3], params(max_tokens=3, n=2), run_.adapter))
        for _ in range(3):
            made.step()
            made.check_integrity()
    beside = [trainer.result(i) for i in job_ids]
    for result, own in zip(beside, trained, strict=True):
        assert result.losses == own.losses
        assert torch.equal(result.adapter.params, own.adapter.params)
    assert finish(made, ids) == results
    assert len(watching) == 12
    assert all(made.poll(i).error is None and len(made.poll(i).outputs[1].token_ids) == 3 for i in watching)
    after = [([1, 2, 3], params(temperature=0, n=2), result.adapter) for result in beside]
    fresh = [([1, 2, 3], params(temperature=0, n=2), own.adapter) for own in trained]
    assert run(made, after) == alone(exact, fresh)


def test_a_released_request_leaves_nothing(exact):
    sampler = exact.sampler(num_blocks=20)
    first = sampler.add_request(None, [1, 2, 3], SamplingParams(max_tokens=4, ignore_eos=True))
    second = sampler.add_request(None, [1, 2, 3], SamplingParams(max_tokens=4, ignore_eos=True))
    sampler.step()
    sampler.release(first)
    sampler.check_integrity()
    with pytest.raises(InputError, match="request_id"):
        sampler.poll(first)
    while sampler.busy:
        sampler.step()
    assert sampler.poll(second).outputs[0].finish_reason == "length"
    assert sampler.num_done == 1
    assert sampler.cache.pool.num_available == 20


def test_a_stream_tells_of_a_failure(exact):
    """A request that fails on the way says so in its last delta, and the other goes on."""

    def fails(tokens, logits):
        if len(tokens) == 2:
            raise RuntimeError("no more")
        return logits

    params = [SamplingParams(max_tokens=5, ignore_eos=True, logits_hook=hook) for hook in (fails, None)]
    deltas = list(exact.stream([[1, 2], [3, 4]], params))
    failed = [delta for delta in deltas if delta.request_id == 0]
    assert [len(delta.token_ids) for delta in failed] == [1, 1, 0]
    assert failed[-1].error == "logits_hook: RuntimeError: no more"
    assert all(delta.error is None for delta in deltas if delta is not failed[-1])
    assert sum(len(delta.token_ids) for delta in deltas if delta.request_id == 1) == 5
