"""Updates that are blind to some inputs: exactly so where those span a space of few dimensions."""

import pytest
import torch

import oracle
from seal_engine import Engine, LoraConfig, TrainJob
from seal_engine.loop.null_space import input_covariances, least_used, null_space_adapter

LORA = LoraConfig(r=4, lora_alpha=4, target_modules=("down_proj", "q_proj"))


@pytest.fixture(scope="module")
def engine(checkpoint):
    return Engine.from_pretrained(checkpoint("llama"), device="cpu")


def test_the_least_used_directions():
    """Energies 90, 9 and 1 of 100: 99% leaves the third axis, 89% the second and third; at least one is always left."""
    covariance = torch.diag(torch.tensor([9.0, 90.0, 1.0]))
    assert least_used(covariance, 0.985).abs().T.tolist() == [pytest.approx([0, 0, 1], abs=1e-6)]
    assert least_used(covariance, 0.89).shape == (3, 2)
    assert least_used(covariance, 1.0).shape == (3, 1)


def test_covariances_are_of_all_tokens(engine, monkeypatch):
    """In one pass or several, and as those of each sequence, weighted by tokens; of the adapted groups alone."""
    sequences = oracle.sequences([9, 5], seed=1)
    together = input_covariances(engine, sequences, LORA)
    assert len(together) == 2 * engine.config.num_hidden_layers
    monkeypatch.setattr("seal_engine.loop.null_space.PASS_TOKENS", 1)
    apart = input_covariances(engine, sequences, LORA)
    first, second = (input_covariances(engine, [s], LORA) for s in sequences)
    for key, covariance in together.items():
        torch.testing.assert_close(covariance, apart[key], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(covariance, (9 * first[key] + 5 * second[key]) / 14, rtol=1e-4, atol=1e-6)
        assert covariance.trace() > 0


def test_what_spans_few_directions_stays_as_it_is(engine):
    """Texts of 10 tokens use at most 10 directions of every input, so with all their energy set apart an update that
    changes other texts leaves them alone, however far it is trained."""
    kept, new = oracle.sequences([10, 12], seed=2)
    start = null_space_adapter(engine, LORA, [(input_covariances(engine, [kept], LORA), 1.0)], 0.9999999, seed=3)
    job = TrainJob([new], init_from=start, freeze_a=True, num_epochs=20, learning_rate=0.1)
    (result,) = engine.train([job], progress=False)
    (before, _), (after, moved) = engine.score([kept, new]), engine.score([kept, new], result.adapter)
    assert result.losses[-1] < result.losses[0] - 0.5
    assert (after - before).abs().max() < 1e-2 < (moved - engine.score([new])[0]).abs().max()
