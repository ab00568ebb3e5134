"""Sampling: parity with Transformers, right draws, company that changes nothing and bad input."""

import math
from collections import Counter

import pytest
import torch
from peft import PeftModel
from sampling_cases import LORAS, SEVEN, alone, finish, mixed_requests, params, random_adapter, run, sampler, tokens

import oracle
import seal_engine.engine
from seal_engine import Engine, InputError, LoraConfig, SamplingParams, TrainJob
from seal_engine.sampling.kv_cache import KVCache
from seal_engine.tiny import MODEL

LENGTHS = [1, 40, 2, 17, 129, 5]
VOCABULARY = 1009
INFINITY = float("inf")


@pytest.fixture(scope="module")
def sharp(tmp_path_factory):
    """Its likeliest tokens have some percent each."""
    directory = oracle.save(oracle.make_model("llama"), tmp_path_factory.mktemp("sharp"))
    return Engine.from_pretrained(directory, device="cpu")


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


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    FILTERS,
    ids=["no filter", "cold", "hot and top_k", "top_p", "cold and both filters", "hot and few tokens", "one token"],
)
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


@pytest.mark.parametrize(
    "top_k",
    [VOCABULARY, 5000, 2**31 - 1, 2**31, 2**63],
    ids=["the vocabulary", "more", "largest int32", "over int32", "over int64"],
)
def test_a_top_k_of_the_vocabulary_keeps_all(top_k, engine):
    wanted = engine.generate([[1, 2]], params(seed=0), progress=False)
    assert engine.generate([[1, 2]], params(seed=0, top_k=top_k), progress=False) == wanted


@pytest.mark.parametrize("name", ["temperature", "top_p"])
@pytest.mark.parametrize("value", [1e-300, 1e-46, 1e-30], ids=["far below float32", "just below float32", "tiny"])
def test_a_tiny_temperature_or_top_p_is_greedy(name, value, engine):
    wanted = engine.generate([[1, 2]], params(temperature=0), progress=False)
    assert engine.generate([[1, 2]], params(seed=0, **{name: value}), progress=False) == wanted


@pytest.mark.parametrize(
    "temperature", [1e4, 1e39, 1e300, 2**64], ids=["in float32", "over float32", "far over float32", "an integer"]
)
def test_a_huge_temperature_is_uniform(temperature, engine):
    (out,) = engine.generate([[1, 2]], params(temperature=temperature, n=3000, max_tokens=1, seed=0), progress=False)
    drawn = torch.tensor([completion.token_ids[0] for completion in out.outputs])
    check_counts(drawn.bincount(minlength=VOCABULARY), torch.full((VOCABULARY,), 1 / VOCABULARY).double())


# Company changes nothing

SETTINGS = {
    "all at once": dict(),
    "one sequence": dict(max_num_seqs=1),
    "three tokens a step": dict(budget=3, max_num_seqs=4),
    "seven tokens a step": dict(budget=7),
    "few blocks": dict(num_blocks=11),
    "few blocks, seven tokens": dict(num_blocks=10, budget=7),
    "few blocks, four sequences": dict(num_blocks=14, max_num_seqs=4, budget=50),
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
    made.scheduler.preempt = lambda sequence: (preempted.update([sequence]), original(sequence))
    made.cache.keys.fill_(math.nan)
    made.cache.values.fill_(math.nan)
    assert run(made, requests) == results
    assert run(made, requests[::-1]) == results[::-1]
    assert bool(preempted) == label.startswith("few blocks"), "what is tested did happen"


def test_generate_is_the_sampler(exact, requests, results):
    prompts, own, adapters = (list(column) for column in zip(*requests, strict=True))
    assert exact.generate(prompts, own, adapters, progress=False) == results
    assert exact.generate(prompts, own, adapters, progress=False, max_num_seqs=2, num_blocks=12) == results


@pytest.mark.parametrize("label", ["all at once", "seven tokens a step", "few blocks, four sequences"])
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


@pytest.mark.parametrize(
    "seed",
    [5 + (2 << 32), 5 + (1 << 62), 2**63 - 1],
    ids=["differs above bit 32", "differs in bit 62", "the largest seed"],
)
def test_seeds_that_differ_draw_differently(seed, engine):
    """Over their whole range; no sample of one is a sample of another."""
    outs = engine.generate([[1, 2]] * 2, [params(n=3, seed=5), params(n=3, seed=seed)], progress=False)
    assert len({tuple(completion.token_ids) for out in outs for completion in out.outputs}) == 6


def test_without_a_seed_all_differ(engine):
    outs = engine.generate([[1, 2]] * 3, params(n=3, max_tokens=10), progress=False)
    outs += engine.generate([[1, 2]], params(n=3, max_tokens=10), progress=False)
    assert len({tuple(completion.token_ids) for out in outs for completion in out.outputs}) == 12


@pytest.mark.parametrize(
    "hook", [lambda tokens, logits: logits, lambda tokens, logits: logits + 1], ids=["same logits", "new logits"]
)
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
}


@pytest.mark.parametrize("label", FAILING_HOOKS)
def test_a_hook_that_fails_fails_its_request_alone(label, exact):
    """With a sample that still waits, where three sequences run at once."""
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


# Cancelling and asking


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
        (first, 0, None),
        (second, 0, None),
        (first, 0, "length"),
        (second, 0, None),
    ]
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
    "top_k": [-2, 1.0, None, True, "1"],
    "min_p": [-0.1, 1.1, math.nan, None, "0.1", True],
    "repetition_penalty": [0, 0.001, 101, -1, math.inf, None, "1", True],
    "frequency_penalty": [-2.1, 2.1, math.nan, None, "1", True],
    "presence_penalty": [-2.1, 2.1, math.nan, None, "1", True],
    "max_tokens": [0, -1, 1.5, True, "1"],
    "min_tokens": [-1, 1.5, None, True, 65],
    "stop": ["", [""], ["a", ""], 5, ["a", 5], {"a"}, b"a"],
    "stop_token_ids": [5, [1.0], ["1"], [True], {5}, "5"],
    "ignore_eos": [1, None, "yes"],
    "seed": [-1, 2**63, 1.0, True, "1"],
    "logprobs": [-1, 1.0, True, "1"],
    "prompt_logprobs": [-1, 1.5, None, "yes"],
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
        dict(min_p=1, repetition_penalty=0.01, frequency_penalty=-2, presence_penalty=2, prompt_logprobs=0),
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("deterministic", [False, True], ids=["normal", "deterministic"])
def test_a_token_has_one_log_probability(dtype, deterministic):
    """Sampled or among the most likely: clients compare the two for equality to see what is greedy.

    They agreed in 4 of 40 cases when two formulas computed them. Scores come from the same formula on hidden states of
    another attention kernel, so they are equal to rounding.
    """
    engine = Engine.from_pretrained(MODEL, dtype=dtype, deterministic=deterministic)
    ids = [[5, 9, 100, 7], [40, 41], [8] * 20]
    fields = {"max_tokens": 12, "logprobs": 5, "seed": 0, "ignore_eos": True}
    requests = [(i, params(temperature=t, n=2, **fields), None) for i in ids for t in (0, 1)]
    outs = run(sampler(engine), requests)
    compared = 0
    for out in outs:
        for sample in out.outputs:
            for token, own, top in zip(sample.token_ids, sample.logprobs, sample.top_logprobs, strict=True):
                assert top.get(token, own) == own
                compared += token in top
            if out is not outs[0]:
                continue
            assert all(max(top.values()) == own for own, top in zip(sample.logprobs, sample.top_logprobs, strict=True))
    assert compared > 60
    if deterministic:
        wholes = [out.prompt_token_ids + sample.token_ids for out in outs for sample in out.outputs]
        sampled = [sample.logprobs for out in outs for sample in out.outputs]
        scores = [score.tolist() for score in engine.score(wholes)]
        for score, own in zip(scores, sampled, strict=True):
            assert own == pytest.approx(score[-12:], abs=1e-5)
