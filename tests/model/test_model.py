"""Parity with Transformers: logits, scores and gradients of random small checkpoints that Transformers saved."""

import pytest
import torch

import oracle
from compare import relative_error
from seal_engine import Engine, LoraConfig
from seal_engine.model import transformer
from seal_engine.types import PackedBatch
from seal_kernels import packed
from seal_kernels.cross_entropy import cross_entropy
from seal_kernels.packed import multiplies_bfloat16

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


@pytest.mark.skipif(not multiplies_bfloat16(), reason="this CPU does not multiply bfloat16")
@pytest.mark.parametrize("adapted", [False, True], ids=["base", "all-linear adapter"])
@pytest.mark.parametrize("name", ["llama", "llama-biases-tied", "qwen3"])
def test_packed_bfloat16_is_no_further_from_the_truth_than_unpacked(name, adapted, tmp_path, monkeypatch):
    """Where matrices are packed, SwiGLU is part of the gate's and the up-projection's products, but for adapters."""
    monkeypatch.setattr(packed, "MIN_ELEMENTS", 1)
    fused, packed_swiglu = [], transformer.packed_swiglu
    monkeypatch.setattr(transformer, "packed_swiglu", lambda *args: fused.append(args) or packed_swiglu(*args))
    directory = oracle.save(oracle.make_model(name).to(torch.bfloat16), tmp_path / "checkpoint")
    batch = oracle.sequences([1, 40, 11])

    def logits(dtype, pack):
        engine = Engine.from_pretrained(directory, device="cpu", dtype=dtype, pack_weights=pack)
        adapter = engine.create_adapter(LoraConfig(r=3, target_modules="all-linear"), seed=0) if adapted else None
        for _, _, b in () if adapter is None else adapter.projections():
            b.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
        fused.clear()
        return torch.cat(engine.logits(batch, adapter)), len(fused)

    truth, none = logits("float32", False)
    (unpacked, before), (ours, layers) = logits("bfloat16", False), logits("bfloat16", True)
    assert (none, before, layers) == (0, 0, 0 if adapted else 3)
    assert relative_error(ours, truth) <= 1.2 * relative_error(unpacked, truth)
