"""The scheduler under a sampler: shared prefixes, stale K/V, preemption, interrupted steps, cancelled requests."""

from collections import Counter
from datetime import timedelta
from itertools import product

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sampling_cases import LORAS, alone, finish, params, random_adapter, run, sampler

import oracle
from seal_engine import AdamParams, Datum, Engine
from seal_engine.sampling import scheduler
from seal_engine.sampling.scheduler import MAX_PROMPT_STEPS


def train(engine, adapter, seed=0):
    """One large step."""
    engine.forward_backward([Datum(adapter, oracle.sequences([30], seed=seed)[0])])
    engine.optim_step([(adapter, AdamParams(learning_rate=0.05))])
    adapter.release_optimizer_state()


def test_prompts_that_fill_a_step_are_alone_in_it_on_a_cpu(exact):
    """At most MAX_PROMPT_STEPS times in a row: then each sequence that is being continued gets its token."""
    made = sampler(exact, num_blocks=60, budget=8)
    made.add_request(None, [1, 2, 3], params(max_tokens=40, seed=0, ignore_eos=True))
    (delta,) = made.step()
    for seed, ids in enumerate(oracle.sequences([40] * 4, seed=8)):
        made.add_request(None, ids, params(max_tokens=1, seed=seed))
    computed, continued = [], []
    while len(made.scheduler.running) > 1 or made.scheduler.waiting:
        before = made.tokens_computed
        deltas = made.step()
        computed.append(made.tokens_computed - before)
        continued.append(any(own.request_id == delta.request_id for own in deltas))
    assert MAX_PROMPT_STEPS == 8
    assert continued == [*[*[False] * 8, True] * 2, False, False, True]
    assert computed == [*[8] * 20, 3], "of 160 tokens two are left for the last step"


def test_prompt_logprobs_of_a_prompt_that_was_preempted(exact, monkeypatch):
    """In its middle: an older request grows into its blocks."""
    monkeypatch.setattr(scheduler, "MAX_PROMPT_STEPS", 0)
    long, short = oracle.sequences([150, 58], seed=8)
    made = sampler(exact, num_blocks=14, budget=8)
    scored, preempted = [], set()
    original = made.scheduler.preempt

    def preempt(sequence):
        scored.append(len(sequence.request.output.prompt_logprobs or []))
        preempted.add(sequence.request.request_id)
        original(sequence)

    made.scheduler.preempt = preempt
    requests = [(short, params(max_tokens=30, seed=0), None), (long, params(prompt_logprobs=True, seed=1), None)]
    outs = run(made, requests)
    assert any(0 < n < 149 for n in scored), scored
    assert preempted == {1}, "the younger one"
    assert outs == alone(exact, requests)
    assert outs[1].prompt_logprobs == pytest.approx(exact.score([long])[0].tolist(), abs=1e-5)


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


def test_sequences_keep_their_order_when_their_adapter_is_trained(checkpoint):
    """The one that came first stays the last to be preempted."""
    engine = Engine.from_pretrained(checkpoint("llama"), device="cpu")
    adapter, made = random_adapter(engine), sampler(engine)
    for ids in oracle.sequences([20, 30, 10]):
        made.add_request(None, ids, params(), adapter)
    for _ in range(2):
        train(engine, adapter)
        made.step()
        assert [sequence.request.request_id for sequence in made.scheduler.running] == [0, 1, 2]


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


@pytest.mark.parametrize("preempted", [False, True], ids=["running", "preempted before"])
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
    st.just("add"),
    st.sampled_from([0, 1]),
    st.integers(1, 48),
    st.integers(0, 2),
    st.integers(0, 2),
    st.integers(1, 4),
    st.integers(1, 9),
    st.sampled_from([0.0, 1.0]),
    st.booleans(),
)
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
