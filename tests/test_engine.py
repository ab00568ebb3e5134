"""Engine: what its calls return, and that a sequence's answer does not depend on its company."""

import gc
import weakref

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

import oracle
import seal_engine.engine
from compare import relative_error
from seal_engine import Engine, LoraConfig, SamplingParams, TrainJob
from seal_engine.tiny import MODEL


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = oracle.save(oracle.make_model("qwen2"), tmp_path_factory.mktemp("checkpoint"))
    vocabulary = {token: i for i, token in enumerate(["<unk>", "the", "cat", "sat"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture(scope="module")
def engine(directory):
    return Engine.from_pretrained(directory, device="cpu")


def test_text_is_tokenized(engine):
    assert engine.tokenizer.encode("the cat sat") == [1, 2, 3]
    from_text, from_ids = engine.logits(["the cat sat"])[0], engine.logits([[1, 2, 3]])[0]
    assert torch.equal(from_text, from_ids)
    assert from_text.shape == (3, 1009)
    assert torch.equal(engine.score(["the cat sat"])[0], engine.score([(1, 2, 3)])[0])


def test_no_sequences_and_single_tokens(engine):
    assert engine.logits([]) == []
    assert engine.score([]) == []
    scores = engine.score([[5], [5, 6]])
    assert [s.shape for s in scores] == [(0,), (1,)]


@pytest.mark.parametrize("budget", [1, 50, 10**6])
def test_the_token_budget_changes_nothing(engine, budget, monkeypatch):
    """Sequences longer than the budget go alone; order is kept."""
    batch = oracle.sequences([30, 3, 60, 1, 49, 8])
    expected = engine.logits(batch)
    monkeypatch.setattr(seal_engine.engine, "TOKEN_BUDGET", budget)
    for a, b in zip(engine.logits(batch), expected, strict=True):
        assert relative_error(a, b) < 1e-5
    for scores, b, ids in zip(engine.score(batch), expected, batch, strict=True):
        truth = b[:-1].log_softmax(-1).gather(1, torch.tensor(ids[1:], dtype=torch.long)[:, None]).squeeze(1)
        torch.testing.assert_close(scores, truth, rtol=1e-5, atol=1e-5)


def test_nothing_is_recorded_for_a_backward(engine):
    assert not engine.logits([[1, 2]])[0].requires_grad
    assert not engine.score([[1, 2]])[0].requires_grad


def test_one_sequence_of_nan_does_not_reach_the_others(directory):
    """The embedding of one token is NaN: sequences without it keep their bits."""
    engine = Engine.from_pretrained(directory, device="cpu")
    batch = [[10, 11, 12], [20, 21, 22, 23], [30, 31]]
    clean = engine.logits(batch)
    engine.model.embed[21] = float("nan")
    dirty = engine.logits(batch)
    assert torch.equal(clean[0], dirty[0])
    assert torch.equal(clean[2], dirty[2])
    assert dirty[1][1:].isnan().all()


def test_what_is_dropped_is_freed_at_once():
    """Adapters and weights are gigabytes on a GPU: they do not wait for the garbage collector."""
    engine = Engine.from_pretrained(MODEL)
    gc.collect()
    gc.disable()
    try:
        adapter = engine.create_adapter(LoraConfig(r=2))
        engine.generate([[5, 6]], SamplingParams(n=2, max_tokens=3), adapter, progress=False)
        list(engine.stream([[5, 6]], SamplingParams(max_tokens=3), adapter))
        (result,) = engine.train([TrainJob([[5, 6, 7]])], progress=False)
        dropped = [weakref.ref(adapter), weakref.ref(result.adapter), weakref.ref(engine.model)]
        del adapter, result
        assert [one() is None for one in dropped[:2]] == [True, True]
        del engine
        assert dropped[2]() is None
    finally:
        gc.enable()
