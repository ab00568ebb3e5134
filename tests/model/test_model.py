"""Parity with Transformers: logits, scores and gradients of random small checkpoints that Transformers saved."""

import pytest
import torch

import oracle
from compare import relative_error
from seal_engine import Engine
from seal_engine.types import PackedBatch
from seal_kernels.cross_entropy import cross_entropy

LENGTHS = [1, 40, 2, 17, 129, 5]


def embedding_gradients(engine: Engine, batch: list[list[int]]) -> torch.Tensor:
    packed = PackedBatch.pack(batch, engine.model.device)
    embeddings = engine.model.embeddings(packed.token_ids).requires_grad_()
    hidden = engine.model.hidden_states(packed, embeddings=embeddings)
    targets = torch.cat([torch.tensor([*ids[1:], -1]) for ids in batch])
    loss, _ = cross_entropy(hidden, engine.model.lm_head, targets, torch.ones(len(targets)))
    return torch.autograd.grad(loss, embeddings)[0]


@pytest.mark.parametrize("name", oracle.MODELS)
def test_float32_equals_transformers(name, tmp_path):
    theirs = oracle.make_model(name)
    engine = Engine.from_pretrained(oracle.save(theirs, tmp_path / "checkpoint"), device="cpu")
    batch = oracle.sequences(LENGTHS)
    logits = engine.logits(batch)
    for ours, truth in zip(logits, oracle.logits(theirs, batch), strict=True):
        assert ours.dtype == torch.float32
        assert relative_error(ours, truth) < 1e-5
    for scores, ours, ids in zip(engine.score(batch), logits, batch, strict=True):
        truth = ours[:-1].double().log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1)
        assert scores.dtype == torch.float32
        torch.testing.assert_close(scores.double(), truth, rtol=1e-5, atol=2e-6)
    assert relative_error(embedding_gradients(engine, batch), oracle.embedding_gradients(theirs, batch)) < 1e-5


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.bfloat16) for name in oracle.MODELS] + [("qwen2", torch.float16), ("qwen3", torch.float16)],
)
def test_16_bit_is_no_further_from_the_truth_than_transformers(name, dtype, tmp_path):
    """The truth: float64 arithmetic on the same rounded parameters."""
    directory = oracle.save(oracle.make_model(name).to(dtype), tmp_path / "checkpoint")
    theirs = oracle.load(directory, dtype)
    engine = Engine.from_pretrained(directory, device="cpu")
    assert engine.model.dtype == dtype
    batch = oracle.sequences([1, 40, 11])
    ours, rounded = torch.cat(engine.logits(batch)), torch.cat(oracle.logits(theirs, batch))
    our_gradient, rounded_gradient = embedding_gradients(engine, batch), oracle.embedding_gradients(theirs, batch)
    theirs = oracle.load(directory, torch.float64)
    truth = torch.cat(oracle.logits(theirs, batch))
    assert relative_error(ours, truth) <= 1.5 * relative_error(rounded, truth)
    truth = oracle.embedding_gradients(theirs, batch)
    assert relative_error(our_gradient, truth) <= 1.5 * relative_error(rounded_gradient, truth)
