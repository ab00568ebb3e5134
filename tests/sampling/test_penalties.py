"""Penalties and min_p: the tokens are those that vLLM's equations, computed in float64 by a hook, give."""

import math
from collections import Counter

import pytest
import torch
from sampling_cases import params, random_adapter, tokens

import oracle
from seal_engine import Engine
from seal_engine.sampling import draw as draw_module
from seal_engine.sampling import sampler as sampler_module

PROMPTS = oracle.sequences([3, 40, 17], seed=7)
SETTINGS = {
    "frequency": dict(frequency_penalty=0.7),
    "presence": dict(presence_penalty=1.5),
    "presence that rewards": dict(presence_penalty=-2.0),
    "repetition": dict(repetition_penalty=1.3),
    "repetition that rewards": dict(repetition_penalty=0.5),
    "min_p": dict(min_p=0.2),
    "only the most likely": dict(min_p=1.0),
    "all": dict(frequency_penalty=0.3, presence_penalty=-0.2, repetition_penalty=1.2, min_p=0.05),
}


@pytest.fixture(scope="module")
def sharp(tmp_path_factory):
    """Its likeliest tokens have some percent each, so that min_p and penalties decide."""
    return Engine.from_pretrained(oracle.save(oracle.make_model("llama"), tmp_path_factory.mktemp("sharp")), "cpu")


def direct(prompt, temperature, frequency_penalty=0.0, presence_penalty=0.0, repetition_penalty=1.0, min_p=0.0):
    """A hook that computes the equations token by token, in Python's floats."""

    def hook(output_ids, logits):
        row, counts = logits.double().tolist(), Counter(output_ids)
        for token in {*prompt, *output_ids}:
            row[token] = row[token] / repetition_penalty if row[token] > 0 else row[token] * repetition_penalty
        for token, count in counts.items():
            row[token] -= frequency_penalty * count + presence_penalty
        peak = max(row)
        if min_p and temperature:
            row = [x if math.exp((x - peak) / temperature) >= min_p else -math.inf for x in row]
        return torch.tensor(row, dtype=logits.dtype)

    return hook


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_tokens_are_those_of_the_equations(sharp, setting, temperature):
    """Long enough that tokens repeat, in one batch with a request that has no penalty and keeps its tokens."""
    fields = dict(temperature=temperature, max_tokens=16, seed=5)
    adapter = random_adapter(sharp)
    own = [params(**fields, **setting), params(**fields, **setting), params(**fields)]
    ours = sharp.generate(PROMPTS, own, [None, adapter, None], progress=False)
    hooks = [direct(PROMPTS[i], temperature, **setting) for i in range(2)]
    theirs = [params(**fields, logits_hook=hooks[0]), params(**fields, logits_hook=hooks[1]), params(**fields)]
    assert tokens(ours) == tokens(sharp.generate(PROMPTS, theirs, [None, adapter, None], progress=False))


def test_a_penalty_changes_what_is_sampled(sharp):
    """So that the equality above says something: repeated tokens are gone with the largest presence penalty."""
    fields = dict(temperature=0.9, max_tokens=40, seed=5)
    (none,), (penalized,) = (
        tokens(sharp.generate(PROMPTS[:1], params(**fields, presence_penalty=p), progress=False))[0] for p in (0, 2)
    )
    assert len(set(penalized)) > len(set(none))


def test_neutral_values_change_nothing(sharp, monkeypatch):
    """Neither the tokens nor what is computed: no row of logits is copied."""
    monkeypatch.delattr(draw_module, "penalize")
    monkeypatch.delattr(draw_module, "keep_min_p")
    neutral = dict(frequency_penalty=0, presence_penalty=0.0, repetition_penalty=1, min_p=0.0)
    fields = dict(temperature=1.0, seed=3)
    plain = sharp.generate(PROMPTS, params(**fields), progress=False)
    assert tokens(sharp.generate(PROMPTS, params(**fields, **neutral), progress=False)) == tokens(plain)


def test_reported_log_probabilities_are_the_models_own(sharp):
    """As with other settings: before any penalty."""
    own = params(temperature=0, logprobs=0, presence_penalty=2, repetition_penalty=1.5)
    (out,) = sharp.generate(PROMPTS[:1], own, progress=False)
    completion = out.outputs[0]
    (score,) = sharp.score([[*PROMPTS[0], *completion.token_ids]])
    assert completion.logprobs == pytest.approx(score[len(PROMPTS[0]) - 1 :].tolist(), abs=1e-4)


@pytest.mark.parametrize("budget", [5, 2048], ids=["a prompt in chunks", "a prompt at once"])
def test_the_most_likely_tokens_of_a_prompt(sharp, budget, monkeypatch):
    """For tokens 1 .. n - 1: the numbers of log-softmax; a token that is most likely has the largest one exactly."""
    monkeypatch.setattr(sampler_module, "LOGIT_ROWS", 4)
    prompt = PROMPTS[1]
    greedy = sharp.generate([prompt], params(temperature=0, max_tokens=6), progress=False)[0].outputs[0].token_ids
    made = sharp.sampler(num_blocks=50)
    made.token_budget = budget
    request_id = made.add_request(None, [*prompt, *greedy], params(prompt_logprobs=3, max_tokens=1))
    while made.busy:
        made.step()
    out = made.poll(request_id)
    table = sharp.logits([[*prompt, *greedy]])[0].double().log_softmax(1)
    assert out.prompt_logprobs is not None
    assert out.prompt_top_logprobs is not None
    assert len(out.prompt_logprobs) == len(out.prompt_top_logprobs) == len(prompt) + 5
    for i, (value, top) in enumerate(zip(out.prompt_logprobs, out.prompt_top_logprobs, strict=True)):
        target = [*prompt, *greedy][i + 1]
        assert value == pytest.approx(float(table[i, target]), abs=1e-4)
        assert list(top.values()) == pytest.approx(table[i].topk(3).values.tolist(), abs=1e-4)
        if target in top:
            assert top[target] == value
    for i, token in enumerate(greedy, len(prompt) - 1):
        assert token in out.prompt_top_logprobs[i]
        assert max(out.prompt_top_logprobs[i].values()) == out.prompt_logprobs[i]
