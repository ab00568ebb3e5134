"""Training: parity with PEFT and Hugging Face's schedules, independence of company, failures that stay alone."""

import random

import pytest
import torch

import oracle
from compare import relative_error
from seal_engine import Engine, LoraConfig, TrainJob, TrainSequence

SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ARCHITECTURES = ["llama-biases-tied", "mistral-window", "qwen2", "qwen3"]


def random_b(adapter, seed):
    """Fill B too, so that the first gradient of A is not zero."""
    generator = torch.Generator().manual_seed(seed)
    for _, _, b in adapter.projections():
        b.normal_(0, 0.05, generator=generator)
    return adapter


def masked(lengths, seed, masks=True):
    """Sequences of random tokens, some tokens masked, at least one target left."""
    generator = random.Random(seed)
    sequences = []
    for ids in oracle.sequences(lengths, seed=seed):
        mask = [int(not masks or generator.random() < 0.7) for _ in ids]
        mask[-1] = 1
        sequences.append(TrainSequence(ids, mask))
    return sequences


# Jobs that differ in every field.
JOBS = [
    dict(lora=LoraConfig(r=1, lora_alpha=1, target_modules=("q_proj", "v_proj")), learning_rate=1e-3, num_epochs=10),
    dict(
        lora=LoraConfig(r=17, lora_alpha=32, target_modules=SEVEN),
        learning_rate=3e-3, lr_scheduler="cosine", warmup_steps=3, num_epochs=4, batch_size=2,
        gradient_accumulation_steps=2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1, max_grad_norm=0.3,
    ),
    dict(
        lora=LoraConfig(r=3, lora_alpha=8, target_modules=["down_proj", "o_proj"], use_rslora=True),
        learning_rate=1e-2, lr_scheduler="constant", warmup_steps=2, num_epochs=5, batch_size=3, max_grad_norm=None,
    ),
    dict(
        lora=LoraConfig(
            r=4, target_modules="all-linear", rank_pattern={"q_proj": 9, r"layers\.1\.mlp.*": 2},
            alpha_pattern={"up_proj": 3},
        ),
        learning_rate=5e-3, num_epochs=7, gradient_accumulation_steps=4, max_grad_norm=5.0,
    ),
]  # fmt: skip
LENGTHS = [[12, 5, 30], [3, 40, 7, 2, 19, 33, 8], [9, 9, 4, 21], [2, 60, 11, 17, 5]]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_jobs_that_differ_in_every_field_equal_peft(name, checkpoint, tmp_path):
    """All in one call, each from its own initial adapter; the first 20 steps' losses and the parameters after them."""
    engine = Engine.from_pretrained(checkpoint(name), device="cpu")
    jobs, started = [], []
    for i, (fields, lengths) in enumerate(zip(JOBS, LENGTHS, strict=True)):
        start = random_b(engine.create_adapter(fields["lora"], seed=i), seed=i)
        start.save(tmp_path / str(i))
        started.append(start)
        jobs.append(TrainJob(masked(lengths, seed=i), init_from=start, seed=None, **fields))
    results = engine.train(jobs, progress=False)
    for i, (job, result) in enumerate(zip(jobs, results, strict=True)):
        assert result.error is None
        sequences = [(list(s.token_ids), list(s.loss_mask)) for s in job.sequences]
        losses, named = oracle.train_alone(checkpoint(name), tmp_path / str(i), job, sequences)
        assert result.num_steps == len(result.losses) == len(losses)
        assert result.losses[:20] == pytest.approx(losses[:20], rel=1e-5)
        assert result.losses == pytest.approx(losses, rel=1e-3)
        for module, a, b in result.adapter.projections():
            assert relative_error(a, named[f"base_model.model.{module}.lora_A.weight"]) < 1e-3
            assert relative_error(b.T, named[f"base_model.model.{module}.lora_B.weight"]) < 1e-2
        assert torch.equal(started[i].params, engine.load_adapter(tmp_path / str(i)).params), "init_from is a copy"


def test_200_steps_stay_with_peft(checkpoint, tmp_path):
    engine = Engine.from_pretrained(checkpoint("qwen2"), device="cpu")
    start = engine.create_adapter(LoraConfig(r=8, lora_alpha=16, target_modules=("q_proj", "v_proj")), seed=1)
    start.save(tmp_path / "start")
    job = TrainJob(masked([12, 20, 7, 15], 0), init_from=start, seed=None, num_epochs=50, learning_rate=1e-3)
    sequences = [(list(s.token_ids), list(s.loss_mask)) for s in job.sequences]
    losses, _ = oracle.train_alone(checkpoint("qwen2"), tmp_path / "start", job, sequences)
    result = engine.train([job], progress=False)[0]
    assert len(losses) == 200
    assert losses[-1] < losses[0] / 2, "the job learns"
    assert result.losses[:20] == pytest.approx(losses[:20], rel=1e-5)
    assert result.losses == pytest.approx(losses, rel=1e-3)


def test_a_bfloat16_base_stays_as_near_to_float32_as_pefts(checkpoint, tmp_path):
    """Distance from the run whose every number is float32, over 20 steps: the norm of the difference of the losses."""
    directory = oracle.save(oracle.make_model("qwen2").bfloat16(), tmp_path / "bfloat16")
    engine = Engine.from_pretrained(directory, device="cpu")
    start = random_b(engine.create_adapter(LoraConfig(r=8, target_modules=SEVEN), seed=1), seed=1)
    start.save(tmp_path / "start")
    job = TrainJob(masked([12, 20], 0), init_from=start, seed=None, num_epochs=10, learning_rate=1e-3)
    sequences = [(list(s.token_ids), list(s.loss_mask)) for s in job.sequences]
    truth = torch.tensor(oracle.train_alone(directory, tmp_path / "start", job, sequences)[0])
    rounded = torch.tensor(oracle.train_alone(directory, tmp_path / "start", job, sequences, torch.bfloat16)[0])
    ours = torch.tensor(engine.train([job], progress=False)[0].losses)
    assert (ours - truth).norm() <= (rounded - truth).norm()


def random_jobs(count, seed=0):
    generator = random.Random(seed)
    jobs = []
    for i in range(count):
        lengths = [generator.randint(2, 30) for _ in range(generator.randint(1, 4))]
        lora = LoraConfig(
            r=generator.choice([1, 2, 3, 8, 17]),
            lora_dropout=generator.choice([0.0, 0.0, 0.2]),
            target_modules=tuple(generator.sample(SEVEN, generator.randint(1, 7))),
        )
        jobs.append(
            TrainJob(
                masked(lengths, seed=i), lora, learning_rate=generator.choice([1e-4, 1e-3, 1e-2]), seed=i,
                lr_scheduler=generator.choice(["linear", "cosine", "constant"]), num_epochs=generator.randint(1, 2),
                batch_size=generator.randint(1, 3), gradient_accumulation_steps=generator.randint(1, 2),
            )
        )  # fmt: skip
    return jobs


def test_200_jobs_together_equal_each_alone_bit_for_bit(checkpoint):
    engine = Engine.from_pretrained(checkpoint("llama"), device="cpu", deterministic=True)
    jobs = random_jobs(200)
    together = engine.train(jobs, progress=False)
    for i, job in enumerate(jobs):
        alone = engine.train([job], progress=False)[0]
        assert together[i].error is None
        assert together[i].losses == alone.losses, i
        assert torch.equal(together[i].adapter.params, alone.adapter.params), i


def test_company_changes_only_rounding_otherwise(checkpoint):
    engine = Engine.from_pretrained(checkpoint("llama"), device="cpu")
    jobs = random_jobs(24, seed=1)
    together = engine.train(jobs, progress=False, token_budget=300)
    for i, job in enumerate(jobs):
        alone = engine.train([job], progress=False, token_budget=300)[0]
        assert together[i].losses == pytest.approx(alone.losses, rel=1e-4)


def test_failures_stay_alone(checkpoint):
    """A rate of 1e9, a loss that becomes NaN, and impossible jobs: each has its error, the others keep their bits."""
    engine = Engine.from_pretrained(checkpoint("llama"), device="cpu", deterministic=True)
    good = random_jobs(6, seed=2)
    poisoned = engine.create_adapter(LoraConfig(r=2), seed=0)
    poisoned.params[3] = float("nan")
    ids = [1, 2, 3, 4]
    bad = {
        "diverged": TrainJob(
            [list(range(40))], LoraConfig(r=4, target_modules=SEVEN), learning_rate=1e9, num_epochs=10
        ),
        "is nan": TrainJob([ids], init_from=poisoned),
        "found id int 5000": TrainJob([ids, [5000, 2]]),
        "at most 512": TrainJob([list(range(600))]),
        "sequences: found": TrainJob([]),
        r"sequences\[0\]: found no token": TrainJob([[]]),
        "no token to predict": TrainJob([[7]]),
        "loss_mask: found 3": TrainJob([TrainSequence(ids, [1, 1, 1])]),
        "lora.r: found 0": TrainJob([ids], LoraConfig(r=0)),
        "lora.rank_pattern: found 3": TrainJob([ids], LoraConfig(rank_pattern=3)),
        "match no module": TrainJob([ids], LoraConfig(target_modules=("q_proj", "wq"))),
        "learning_rate: found nan": TrainJob([ids], learning_rate=float("nan")),
        "lr_scheduler": TrainJob([ids], lr_scheduler="step"),
        "num_epochs": TrainJob([ids], num_epochs=0),
        "betas": TrainJob([ids], betas=(0.9, 1.0)),
        "accepted: text or a list": TrainJob([3.5]),
        "accepted: a TrainJob": "job",
    }
    mixed = engine.train([*bad.values(), *good], progress=False)
    for message, result in zip(bad, mixed, strict=False):
        assert result.adapter is None, message
        with pytest.raises(AssertionError, match=message):
            raise AssertionError(result.error)
    clean = engine.train(good, progress=False)
    for a, b in zip(clean, mixed[len(bad) :], strict=True):
        assert b.error is None
        assert a.losses == b.losses
        assert torch.equal(a.adapter.params, b.adapter.params)


def test_a_trainer_that_lives_long_forgets_what_is_released(checkpoint):
    """Neither results nor adapters stay: what finished jobs took of the memory bound is free again."""
    trainer = Engine.from_pretrained(checkpoint("qwen2"), device="cpu").trainer(memory_bytes=2**30)
    for _ in range(3):
        job_ids = [trainer.submit(TrainJob([[5, 6, 7]], LoraConfig(r=4))) for _ in range(2)]
        job_ids.append(trainer.submit(TrainJob([])))
        waiting = trainer.submit(TrainJob([[5, 6, 7]], LoraConfig(r=4), num_epochs=1000))
        trainer.step()
        trainer.cancel(waiting)
        while trainer.busy:
            trainer.step()
        for job_id in (*job_ids, waiting):
            trainer.release(job_id)
        assert trainer.num_done == 0
        assert trainer._finished == []
        assert trainer._finished_bytes == 0
    assert trainer.poll(job_ids[0]) is None
