"""The losses of sampled tokens: loss and gradient against float64, written out from their definitions."""

import math

import pytest
import torch

from seal_engine import Engine, InputError, LoraConfig
from seal_engine.training.jobs import Datum
from seal_engine.training.losses import POLICY_LOSSES, datum_loss

LOGPROBS, OLD = [-0.2, -1.0, -3.0, -0.5], [-0.9, -1.0, -1.0, -0.4]  # r = 2.01, 1, 0.135, 0.905
ADVANTAGES, WEIGHTS = [1.5, -2.0, 0.5, -1.0], [1.0, 0.5, 2.0, -1.0]
IDS = [1, 2, 3, 4, 5]


def term(loss, logp, old, advantage):
    """One token's term and its derivative, by hand."""
    r = math.exp(logp - old)
    if loss == "importance_sampling":
        return -r * advantage, -r * advantage
    if loss == "ppo":
        clipped = min(max(r, 0.8), 1.2)
        kept = r * advantage <= clipped * advantage
        return -min(r * advantage, clipped * advantage), -r * advantage if kept else 0.0
    if loss == "cispo":
        clipped = min(r, 4.0)
        return -clipped * advantage * logp, -clipped * advantage
    return -(advantage * logp - 0.025 * (logp - old) ** 2), -(advantage - 0.05 * (logp - old))


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["mean", "weighted"])
@pytest.mark.parametrize("loss", POLICY_LOSSES)
def test_loss_and_gradient(loss, weights):
    """ppo's second token has r = 1 and its fourth r A = clip(r) A, so both pass their gradient; the first is clipped at
    1.2, the third, of a positive advantage, is not (min takes r A below 0.8)."""
    logprobs = torch.tensor(LOGPROBS, requires_grad=True)
    datum = Datum(None, IDS, loss, weights=weights, old_logprobs=OLD, advantages=ADVANTAGES)
    value = datum_loss(datum, logprobs, "loss")
    value.backward()
    factors = [0.25] * 4 if weights is None else weights
    terms = [term(loss, *numbers) for numbers in zip(LOGPROBS, OLD, ADVANTAGES, strict=True)]
    assert value.item() == pytest.approx(sum(w * t for w, (t, _) in zip(factors, terms, strict=True)), rel=1e-6)
    assert logprobs.grad.tolist() == pytest.approx([w * d for w, (_, d) in zip(factors, terms, strict=True)], rel=1e-6)


@pytest.mark.parametrize(
    ("loss", "config"), [("ppo", {"clip_high": 3.0}), ("cispo", {"clip_high": 1.0}), ("dro", {"beta": 1})]
)
def test_settings_count(loss, config):
    """A ratio of 2.01 is not clipped below 3 (ppo), is clipped to 1 (cispo); beta 1 weighs 0.7^2 / 2 = 0.245 (dro)."""
    datum = Datum(None, IDS[:2], loss, old_logprobs=[-0.9], advantages=[1.5], loss_config=config)
    value = datum_loss(datum, torch.tensor([-0.2], requires_grad=True), "loss").item()
    assert value == pytest.approx({"ppo": -1.5 * math.exp(0.7), "cispo": 0.3, "dro": 0.3 + 0.245}[loss], rel=1e-6)


@pytest.mark.parametrize("loss", ["ppo", "cispo"])
def test_a_ratio_beyond_float32_is_clipped_like_any_other(loss):
    """exp(1000) is infinite, and 0 times that NaN: the gradient of a clipped ratio must be 0 (ppo) or its bound's."""
    logprobs = torch.tensor([-1.0], requires_grad=True)
    datum_loss(Datum(None, IDS[:2], loss, old_logprobs=[-1001.0], advantages=[1.0]), logprobs, "loss").backward()
    assert logprobs.grad.tolist() == [0.0 if loss == "ppo" else -4.0]


@pytest.mark.parametrize(
    ("loss", "config", "message"),
    [
        pytest.param(
            "ppo", {"beta": 1.0}, r"loss_config: found .*accepted: settings of this loss: \['clip_low'", id="other"
        ),
        pytest.param(
            "cross_entropy", {"beta": 1.0}, r"accepted: settings of this loss: \[\]", id="a loss without settings"
        ),
        pytest.param("dro", {"beta": math.nan}, r"loss_config\['beta'\]: found nan; accepted: a number >= 0", id="NaN"),
        pytest.param("cispo", {"clip_low": 5}, "accepted: clip_low <= clip_high", id="bounds that cross"),
    ],
)
def test_settings_that_make_no_sense_are_refused(checkpoint, loss, config, message):
    engine = Engine.from_pretrained(checkpoint("llama"))
    adapter = engine.create_adapter(LoraConfig(r=2))
    fields = {"old_logprobs": OLD, "advantages": ADVANTAGES} if loss != "cross_entropy" else {}
    with pytest.raises(InputError, match=message):
        engine.forward_backward([Datum(adapter, IDS, loss, loss_config=config, **fields)])
