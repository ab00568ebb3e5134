"""Parity with Transformers on a CUDA device: the same checks as test_model.py, through the Triton kernels."""

import pytest
import torch

import oracle
from compare import relative_error
from seal_engine import Engine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: run benchmarks/gpu.sh on one"),
]
LENGTHS = [1, 40, 2, 17, 129, 5]


@pytest.mark.parametrize("name", oracle.MODELS)
def test_float32_equals_transformers(name, tmp_path):
    """Truth by Transformers on the CPU in float64; both GPU results stand beside it."""
    directory = oracle.save(oracle.make_model(name), tmp_path)
    engine = Engine.from_pretrained(directory, device="cuda")
    batch = oracle.sequences(LENGTHS)
    truth = torch.cat(oracle.logits(oracle.load(directory, torch.float64), batch))
    assert relative_error(torch.cat(engine.logits(batch)), truth) < 1e-5
    scores = torch.cat(engine.score(batch))
    logprobs = [t.log_softmax(-1) for t in truth.split(LENGTHS)]
    expected = torch.cat(
        [
            p[:-1].gather(1, torch.tensor(ids[1:], dtype=torch.long)[:, None])[:, 0]
            for p, ids in zip(logprobs, batch, strict=True)
        ]
    )
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", oracle.MODELS)
def test_bfloat16_is_no_further_from_the_truth_than_transformers(name, tmp_path):
    directory = oracle.save(oracle.make_model(name).to(torch.bfloat16), tmp_path)
    engine = Engine.from_pretrained(directory, device="cuda")
    batch = oracle.sequences(LENGTHS)
    rounded = torch.cat(oracle.logits(oracle.load(directory, torch.bfloat16), batch))
    truth = torch.cat(oracle.logits(oracle.load(directory, torch.float64), batch))
    assert relative_error(torch.cat(engine.logits(batch)), truth) <= 1.5 * relative_error(rounded, truth)
