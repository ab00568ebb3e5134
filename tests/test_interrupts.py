"""Ctrl-C, or any exception, at any line of a step: the step happens whole or not at all, or its job fails.

An interrupt is raised at a line of the code under test by a trace function; the caller then goes on stepping, as a
front end does that outlives it.
"""

import random
import sys
from collections import Counter
from contextlib import suppress
from functools import partial

import pytest
import torch

from seal_engine import Engine, LoraConfig, SamplingParams, TrainJob
from seal_engine.tiny import MODEL

SAMPLES = 40  # lines at which an interrupt is tried, of some thousands


@pytest.fixture(scope="module")
def engine():
    return Engine.from_pretrained(MODEL, deterministic=True)


def interrupted(step, busy, folder, at):
    """Call step until there is no more to do, with one interrupt at the at-th line of a folder's code that runs.

    Returns (where the interrupt came, the number of lines that ran).
    """
    lines, where = 0, None

    def trace(frame, event, _):
        nonlocal lines, where
        if folder not in frame.f_code.co_filename:
            return None
        if event == "line":
            lines += 1
            if lines == at:
                where = f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno} {frame.f_code.co_name}"
                raise KeyboardInterrupt
        return trace

    for _ in range(1000):
        if not busy():
            break
        sys.settrace(trace)
        try:
            step()
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
    return where, lines


def test_sampling_goes_on_to_the_same_outputs(engine):
    requests = [
        ([*range(5, 25)], SamplingParams(n=3, seed=1, max_tokens=12, ignore_eos=True, logprobs=1, stop=["zzz"])),
        ([*range(5, 45)], SamplingParams(n=2, seed=2, max_tokens=12, ignore_eos=True, prompt_logprobs=True)),
        ([7] * 30, SamplingParams(n=1, seed=3, max_tokens=20, ignore_eos=True)),
    ]
    expected = [engine.generate([ids], params, progress=False)[0] for ids, params in requests]

    def run(at):
        sampler = engine.sampler(num_blocks=9, max_num_seqs=4)  # few, so that sequences are preempted
        sampler.token_budget = 20
        sampler.cache.keys.fill_(9.0)  # what is read before it is written is seen
        sampler.cache.values.fill_(9.0)
        ids = [sampler.add_request(None, *request) for request in requests]
        where, lines = interrupted(sampler.step, lambda: sampler.busy, "seal_engine/sampling", at)
        assert [sampler.poll(i) for i in ids] == expected, where
        assert sampler.num_done == len(requests), where
        sampler.check_integrity()
        assert sampler.cache.pool.num_available == 9, where
        return lines

    total = run(-1)
    assert total > 3000
    for at in random.Random(0).sample(range(1, total), SAMPLES):
        run(at)


def test_a_cancelled_request_stays_cancelled_or_goes_on(engine):
    params = SamplingParams(n=2, max_tokens=30, ignore_eos=True, seed=0)

    def run(at):
        sampler = engine.sampler(num_blocks=20)
        request_id = sampler.add_request(None, [5, 6, 7], params)
        sampler.step()
        cancel, busy = partial(sampler.cancel, request_id), lambda: sampler.poll(request_id) is None
        interrupted(cancel, busy, "seal_engine/sampling", at)
        assert not sampler.busy
        assert sampler.num_done == 1
        sampler.check_integrity()

    for at in range(1, 40):
        run(at)


def test_training_goes_on_or_the_job_fails(engine, tmp_path):
    """A job either ends with the adapter of an undisturbed one, or has an error; the others are never touched."""

    def jobs(name):
        lora = LoraConfig(r=2)
        return [
            TrainJob([[5, 6, 7], [8, 9], [10, 11, 12]], lora, num_epochs=2, gradient_accumulation_steps=2),
            TrainJob([[5, 6], [8, 9, 10, 11]], lora, checkpoint_dir=tmp_path / name, checkpoint_every=1),
            TrainJob([[20, 21, 22]], lora, num_epochs=4),
        ]

    expected = engine.train(jobs("whole"), progress=False)
    outcomes = Counter()

    def run(at):
        seen = []
        trainer = engine.trainer(token_budget=9, callback=lambda *step: seen.append(step))
        ids = [trainer.submit(job) for job in jobs(f"{at}")]
        where, lines = interrupted(trainer.step, lambda: trainer.busy, "seal_engine/training", at)
        failed = 0
        for i, whole in zip(ids, expected, strict=True):
            result = trainer.poll(i)
            assert result is not None, where
            if result.error is not None:
                assert "interrupted by" in result.error, (where, result.error)
                failed += 1
                continue
            assert result.losses == whole.losses, where
            assert torch.equal(result.adapter.params, whole.adapter.params), where
            reported = [loss for j, _, loss in seen if j == i]  # an interrupt just before a callback takes its place
            assert reported == [loss for loss in whole.losses if loss in reported], where
            assert len(reported) >= len(whole.losses) - 1, where
        outcomes[failed] += 1
        return lines

    total = run(-1)
    for at in random.Random(1).sample(range(1, total), SAMPLES):
        run(at)
    assert outcomes[0] > outcomes[1] + outcomes[2] + outcomes[3]


def test_a_callback_that_raises_loses_nothing(engine):
    """The exception comes out of step; the next step goes on where this one was, and every loss is reported once."""
    jobs = [TrainJob([[5, 6, 7], [8, 9]], LoraConfig(r=2), num_epochs=3, seed=i) for i in range(3)]
    expected = engine.train(jobs, progress=False)
    seen, raised = [], []

    def callback(job_id, step, loss):
        seen.append((job_id, step, loss))
        if len(seen) % 4 == 1:
            raised.append(step)
            raise ArithmeticError

    trainer = engine.trainer(callback=callback)
    ids = [trainer.submit(job) for job in jobs]
    while trainer.busy:
        with suppress(ArithmeticError):
            trainer.step()
    assert len(raised) > 3
    for i, whole in zip(ids, expected, strict=True):
        result = trainer.poll(i)
        assert (result.error, result.losses) == (None, whole.losses)
        assert torch.equal(result.adapter.params, whole.adapter.params)
        assert [loss for j, _, loss in seen if j == i] == whole.losses
