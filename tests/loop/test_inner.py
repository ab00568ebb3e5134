"""The inner loop over a toy engine: what makes two jobs equal, and what a trial's result depends on."""

import numpy as np
import pytest
import torch

from seal_engine import Adapter, LoraConfig, TrainJob, TrainSequence
from seal_engine.loop.domain import Candidate
from seal_engine.loop.inner import InnerLoop, derive_seed, job_key
from toy_loop import ToyDomain, ToyEngine

LONG = list(range(2000))
OTHER = [*LONG[:1000], -1, *LONG[1001:]]  # differs where a tensor's repr has its dots


@pytest.mark.parametrize(
    "made",
    [list, tuple, torch.tensor, np.array, TrainSequence, lambda ids: TrainSequence(torch.tensor(ids))],
    ids=["list", "tuple", "tensor", "array", "sequence of ints", "sequence of a tensor"],
)
def test_jobs_are_equal_by_every_token(made):
    """repr abbreviates tensors and arrays of over 1,000 entries, so that different jobs were trained as one."""
    assert job_key(TrainJob([made(LONG)])) == job_key(TrainJob([made(LONG)]))
    assert job_key(TrainJob([made(LONG)])) != job_key(TrainJob([made(OTHER)]))


@pytest.mark.parametrize(
    "fields",
    [
        {"learning_rate": 1e-4}, {"num_epochs": 2}, {"seed": 1}, {"append_eos": True}, {"lora": LoraConfig(r=4)},
        {"lora": LoraConfig(rank_pattern={"q_proj": 2})}, {"sequences": [[1, 2], [3]]}, {"sequences": ["a"]},
        {"sequences": [TrainSequence([1, 2], [0, 1])]}, {"sequences": [[{"role": "user", "content": "a"}]]},
        {"checkpoint_dir": "x"},
    ],
    ids=str,
)  # fmt: skip
def test_jobs_that_differ_in_a_field_are_different(fields):
    job = {"sequences": [[1, 2]]}
    assert job_key(TrainJob(**job)) != job_key(TrainJob(**(job | fields)))
    assert job_key(TrainJob(**(job | fields))) == job_key(TrainJob(**(job | fields)))


def test_an_adapter_to_start_from_counts_by_its_version():
    class Start(Adapter):
        def __init__(self, uid, version):
            self.uid, self.version = uid, version

    keys = {job_key(TrainJob([[1, 2]], init_from=Start(*key))) for key in ((1, 0), (1, 1), (2, 0), (1, 0))}
    assert len(keys) == 3


def test_results_are_those_of_each_candidate_alone():
    """In any order and company: what another machine computes, or this one again, is the same trial."""
    domain = ToyDomain()
    loop = InnerLoop(ToyEngine(), domain.answer_params, domain.grade, progress=False)
    candidates = [
        (Candidate("a", TrainJob(["good"]), ["first?", "second?"]), 1),
        (Candidate("b", TrainJob(["bad"]), ["first?"]), 2),
        (Candidate("c", None, ["first?"]), 3),
        (Candidate("d", None, ["first?"], rejected="no text"), 4),
        (Candidate("e", TrainJob(["diverge"]), ["first?"]), 5),
    ]

    def shown(results):
        return [(r.error, r.num_steps, r.answers, r.grades) for r in results]

    together = shown(loop.run(candidates))
    assert together == [line for one in candidates for line in shown(loop.run([one]))]
    assert together == shown(loop.run(candidates[::-1]))[::-1]
    assert [grades for _, _, _, grades in together] == [(1.0, 1.0), (0.0,), (0.0,), (), ()]
    assert [error for error, *_ in together[2:]] == [None, "no text", together[4][0]]
    assert loop.run([]) == []


def test_equal_jobs_are_trained_once_and_answer_for_all():
    engine, domain = ToyEngine(), ToyDomain()
    loop = InnerLoop(engine, domain.answer_params, domain.grade, progress=False)
    loop.run([(Candidate(f"{i}", TrainJob(["good"]), ["q?"]), i % 2) for i in range(6)])
    (jobs,) = engine.trained
    assert [job.seed for job in jobs] == [0, 1]


def test_seeds_depend_on_all_parts():
    assert derive_seed(0, "round 1", 2) == derive_seed(0, "round 1", 2)
    assert len({derive_seed(0, "a", 1), derive_seed(1, "a", 1), derive_seed(0, "b", 1), derive_seed(0, "a", 2)}) == 4
    assert all(0 <= derive_seed(i) < 2**31 for i in range(100))
