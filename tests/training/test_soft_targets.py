"""Soft targets through the verbs and the trainer, and training on top of an adapter that stays as it is."""

import re
from dataclasses import replace

import pytest
import torch
from peft import PeftModel

import oracle
from compare import relative_error
from seal_engine import Datum, Engine, InputError, LoraConfig, TrainJob, TrainSequence
from seal_engine.model.adapter_stack import compact, stack_adapters, top_block

LORA = LoraConfig(r=4, lora_alpha=6, target_modules=("q_proj", "v_proj", "down_proj"))
V = 1009


@pytest.fixture(scope="module")
def engine(checkpoint):
    return Engine.from_pretrained(checkpoint("llama"), device="cpu")


def random_adapter(engine, seed, lora=LORA):
    """B random too, so that the adapter does something and A has a gradient."""
    adapter = engine.create_adapter(lora, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for _, _, b in adapter.projections():
        b.normal_(0, 0.1, generator=generator)
    return adapter


def soft(rows, K, seed):
    """Ids and weights of both signs, [rows, K]."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, V, (rows, K), generator=generator)
    return ids, torch.randn(rows, K, generator=generator)


def gradient(adapter):
    return torch.cat([part.flatten() for _, *parts in adapter.projections(adapter.grads) for part in parts])


def test_the_loss_equals_autograd_in_float64(engine, checkpoint, tmp_path):
    """Transformers and PEFT in float64: log softmax of all logits, gather, weigh. Rows are n or n - 1, K differs, and a
    datum without soft targets lies between: all in one pass."""
    adapter = random_adapter(engine, 1)
    first, second, third = oracle.sequences([9, 6, 12], seed=5)
    wide, narrow = soft(9, 5, 1), soft(11, 1, 2)
    data = [
        Datum(adapter, first, weights=wide[1].tolist(), target_ids=wide[0].tolist()),
        Datum(adapter, second),
        Datum(adapter, third, weights=narrow[1].numpy(), target_ids=narrow[0]),
    ]
    results = engine.forward_backward(data)
    adapter.save(tmp_path / "adapter")
    base = oracle.load(checkpoint("llama"), torch.float64)
    peft = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True).double().eval()
    columns = [wide, (torch.tensor(second)[:, None], torch.full((6, 1), 1 / 5)), narrow]
    for datum, result, (ids, weights) in zip(data, results, columns, strict=True):
        logits = peft(input_ids=torch.tensor([datum.token_ids])).logits[0, :-1]
        logprobs = logits.log_softmax(-1).gather(1, ids[-len(logits) :])
        loss = -(weights[-len(logits) :] * logprobs).sum()
        loss.backward()
        assert result.loss == pytest.approx(loss.item(), rel=1e-5)
        assert relative_error(result.logprobs.reshape(logprobs.shape), logprobs) < 1e-5
    truth = {n.replace(".default", ""): p.grad for n, p in peft.named_parameters() if p.requires_grad}
    for module, da, db in adapter.projections(adapter.grads):
        assert relative_error(da, truth[f"base_model.model.{module}.lora_A.weight"]) < 1e-5
        assert relative_error(db.T, truth[f"base_model.model.{module}.lora_B.weight"]) < 1e-5


def test_one_id_a_token_is_plain_cross_entropy(engine):
    """target_ids [n, 1] that are the tokens themselves: the loss and the gradient of the datum without them."""
    (ids,) = oracle.sequences([14], seed=3)
    weights = torch.linspace(-1, 2, 14).tolist()
    plain, targets = random_adapter(engine, 2), random_adapter(engine, 2)
    (first,) = engine.forward_backward([Datum(plain, ids, weights=weights)])
    rows = Datum(targets, ids, weights=[[w] for w in weights], target_ids=[[i] for i in ids])
    (second,) = engine.forward_backward([rows])
    assert second.loss == pytest.approx(first.loss, rel=1e-6)
    assert second.logprobs.shape == (13, 1)
    torch.testing.assert_close(second.logprobs[:, 0], first.logprobs)
    assert relative_error(gradient(targets), gradient(plain)) < 1e-6


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_job_with_soft_targets(deterministic, checkpoint):
    """Soft targets that are the tokens themselves train the adapter that the tokens train, end token included; in a
    batch-invariant engine the products are tiles, which must give the same."""
    engine = Engine.from_pretrained(checkpoint("llama"), device="cpu", deterministic=deterministic)
    sequences = oracle.sequences([9, 6, 12], seed=4)
    masks = [[1] * 9, [0, 0, 1, 1, 1, 1], [1] * 12]
    hard = [TrainSequence(ids, mask) for ids, mask in zip(sequences, masks, strict=True)]
    # A second id of weight 0 is padding; the last sequence stays as it is, so that one step has both kinds.
    same = [
        TrainSequence(s.token_ids, s.loss_mask, [[i, 7] for i in s.token_ids], [[1.0, 0.0]] * len(s.token_ids))
        for s in hard[:2]
    ]
    jobs = [TrainJob(s, LORA, num_epochs=3, batch_size=2, append_eos=True) for s in (hard, [*same, hard[2]])]
    first, second = engine.train(jobs, progress=False)
    assert first.error is None
    assert second.losses == pytest.approx(first.losses, rel=1e-5)
    assert relative_error(second.adapter.params, first.adapter.params) < 1e-4


def test_training_on_top_is_training_on_the_merged_base(checkpoint):
    """The update below is in the base's weights in one case, and beside them in the other: equal but for rounding. What
    is below keeps its bits; what was trained is the new block alone."""
    engine = Engine.from_pretrained(checkpoint("llama"), device="cpu")
    below = random_adapter(engine, 3)
    job = dict(sequences=oracle.sequences([9, 6, 12], seed=6), lora=LORA, num_epochs=3, learning_rate=1e-3)
    (on_top,) = engine.train([TrainJob(**job, on_top_of=below)], progress=False)
    engine.merge(below)
    (merged,) = engine.train([TrainJob(**job)], progress=False)
    assert on_top.losses == pytest.approx(merged.losses, rel=1e-5)
    assert on_top.adapter.config.r == 8
    block = top_block(on_top.adapter, 4, LORA)
    assert relative_error(block.params, merged.adapter.params) < 1e-4
    for (_, a, b), (_, a_all, b_all) in zip(below.projections(), on_top.adapter.projections(), strict=True):
        assert torch.equal(a, a_all[:4])
        assert torch.equal(b, b_all[:4])


def test_a_frozen_a_keeps_its_bits(engine):
    """B alone is trained, from a block that is handed in, on top of another adapter and without one."""
    below, start = random_adapter(engine, 3), random_adapter(engine, 8)
    job = TrainJob(oracle.sequences([9, 6]), init_from=start, freeze_a=True)
    for result, rows in zip(engine.train([job, replace(job, on_top_of=below)], progress=False), (4, 8), strict=True):
        for (_, a, b), (_, a_all, b_all) in zip(start.projections(), result.adapter.projections(), strict=True):
            assert len(a_all) == rows
            assert torch.equal(a, a_all[-4:])
            assert not torch.equal(b, b_all[-4:])


def test_a_stack_is_the_sum_of_its_parts(checkpoint):
    """Scores under a stack equal those of a base into which the parts were merged, each with its factor and scale."""
    engine = Engine.from_pretrained(checkpoint("llama"), device="cpu")
    other = LoraConfig(r=2, lora_alpha=8, target_modules=LORA.target_modules, use_rslora=True)
    parts = [(random_adapter(engine, 5), 1.0), (random_adapter(engine, 6, other), -0.5)]
    sequences = oracle.sequences([9, 30], seed=7)
    stacked = engine.score(sequences, stack_adapters(parts))
    for adapter, factor in parts:
        for _, _, b in adapter.projections():
            b.mul_(factor)
        engine.merge(adapter)
    for found, truth in zip(stacked, engine.score(sequences), strict=True):
        torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-5)


def test_a_compact_stack_is_the_same_update(engine):
    """Full rank holds any update: 40 rows on projections of 32 inputs or outputs become 32, scores stay."""
    lora = LoraConfig(r=40, lora_alpha=10, target_modules=("q_proj", "v_proj", "gate_proj", "down_proj"))
    wide = random_adapter(engine, 9, replace(lora, r=400))
    full = compact(wide)
    assert full.config.r == max(min(a.shape[1], b.shape[1]) for _, a, b in wide.projections()) < 400
    small = random_adapter(engine, 9)
    assert compact(small) is small
    sequences = oracle.sequences([9, 30], seed=7)
    for found, truth in zip(engine.score(sequences, full), engine.score(sequences, wide), strict=True):
        torch.testing.assert_close(found, truth, rtol=1e-3, atol=1e-4)


IDS = [1, 2, 3]
BAD = {
    "one row too few": ({"target_ids": [[1]], "weights": [[1.0]]}, r"target_ids: found .* 3 or 2 rows of K numbers"),
    "no second dimension": ({"target_ids": [1, 2], "weights": [1.0, 1.0]}, r"target_ids: found \[1, 2\]"),
    "no ids": ({"target_ids": [[], []], "weights": [[], []]}, r"target_ids: .*1 <= K"),
    "ragged": ({"target_ids": [[1, 2], [3]], "weights": [[1, 1], [1, 1]]}, r"target_ids: found \[\[1, 2\], \[3\]\]"),
    "fractions": ({"target_ids": [[1.5], [2.0]], "weights": [[1], [1]]}, r"target_ids: .*accepted: integers"),
    "an id too large": ({"target_ids": [[1], [1009]], "weights": [[1], [1]]}, r"target_ids: .*ids from 0 to 1008"),
    "an id below 0": ({"target_ids": [[1], [-1]], "weights": [[1], [1]]}, r"target_ids: .*ids from 0 to 1008"),
    "no weights": ({"target_ids": [[1], [2]]}, r"weights: found None; accepted: 3 or 2 rows"),
    "weights of another shape": ({"target_ids": [[1], [2]], "weights": [[1], [1], [1]]}, r"weights: .*as data"),
    "weights NaN": ({"target_ids": [[1], [2]], "weights": [[1], [float("nan")]]}, r"weights: .*finite numbers"),
    "another loss": ({"target_ids": [[1], [2]], "weights": [[1], [1]], "loss": "importance_sampling"}, r"loss: found"),
    "advantages": ({"target_ids": [[1], [2]], "weights": [[1], [1]], "advantages": [1, 1]}, r"advantages: found"),
}


@pytest.mark.parametrize("label", BAD)
def test_bad_soft_targets(engine, label):
    fields, message = BAD[label]
    with pytest.raises(InputError, match=rf"data\[0\]\.{message}"):
        engine.forward_backward([Datum(random_adapter(engine, 0), IDS, **fields)])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sequences": [TrainSequence(IDS, None, [[1]] * 3)]}, r"sequences\[0\]\.target_weights: found None"),
        ({"sequences": [TrainSequence(IDS, None, [[1]] * 2, [[1.0]] * 2)]}, r"target_ids: .*accepted: 3 rows"),
        ({"on_top_of": "text"}, "on_top_of: found str; accepted: an Adapter"),
        ({"on_top_of": "adapter", "weight_decay": 0.1}, "weight_decay: found 0.1; accepted: 0 beside on_top_of"),
        ({"on_top_of": "adapter", "lora": LoraConfig(lora_dropout=0.1)}, "lora.lora_dropout: found 0.1"),
        ({"on_top_of": "adapter", "lora": LoraConfig(target_modules=("o_proj",))}, "config.target_modules: found"),
        ({"freeze_a": True, "weight_decay": 0.1}, "weight_decay: found 0.1; accepted: 0 beside on_top_of or freeze_a"),
        ({"freeze_a": 1}, "freeze_a: found 1; accepted: True or False"),
    ],
)
def test_jobs_that_are_refused(engine, fields, message):
    fields = {"sequences": [IDS], "lora": LORA} | fields
    fields = {k: random_adapter(engine, 0) if v == "adapter" else v for k, v in fields.items()}
    (result,) = engine.train([TrainJob(**fields)], progress=False)
    assert result.adapter is None

    assert re.search(message, result.error), result.error
