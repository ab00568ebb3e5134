"""The loop over a toy engine and domain: which self-edits are kept, what is recorded, and how a run goes on.

The toy policy writes "good" or "bad"; an adapter trained on "good" answers rightly, and a policy that was fine-tuned on
"good" writes it more often. So every number follows from seeds, in milliseconds.
"""

import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest

from seal_engine.errors import RunError
from seal_engine.loop.config import LoopConfig
from seal_engine.loop.domain import InvalidSelfEditError, SelfEditSource, UngradedError
from seal_engine.loop.inner import mean_accuracy, standard_error
from seal_engine.loop.ledger import Ledger
from seal_engine.loop.records import Trial
from seal_engine.training.jobs import TrainJob, TrainResult
from seal_engine.types import InputError
from toy_loop import CONFIG, ToyDomain, ToyEngine, run

ROOT = Path(__file__).parents[2]


def accuracies(contents):
    return {name: unit["accuracy"] for name, unit in contents["steps"].items() if "accuracy" in unit}


def test_a_run_gets_better_by_its_rewards(tmp_path):
    contents, said, _ = run(tmp_path / "run", CONFIG)
    found = accuracies(contents)
    before, after = found["seed 0, evaluation 0"], found["seed 0, evaluation 2"]
    assert found["seed 0, no adapter, accuracy"] == 0
    assert after > before
    assert len(contents["policies"]) == 2
    assert any("round 1: mean reward" in line for line in said)
    # 6 contexts x 3 self-edits x 2 repeats, but for those refused, and the base once.
    edits = [e for e in contents["self_edits"] if e["phase"] == "round 1"]
    trained = [t for t in contents["trials"] if t["phase"] == "round 1"]
    assert len(edits) == 18
    assert len(trained) == 2 * len(edits)
    refused = {(e["context"], e["index"]): e["rejected"] for e in edits}
    assert any(refused.values())
    assert all(t["error"] == refused[t["context"], t["index"]] for t in trained)


def test_the_same_seed_gives_the_same_run_and_another_one_another(tmp_path):
    first, again = (run(tmp_path / name, CONFIG)[0] for name in ("a", "b"))
    assert first == again
    other = run(tmp_path / "c", replace(CONFIG, seeds=(5,)))[0]
    assert [e["text"] for e in other["self_edits"]] != [e["text"] for e in first["self_edits"]]


def test_seeds_begin_from_the_checkpoint(tmp_path):
    both = run(tmp_path / "both", replace(CONFIG, seeds=(0, 1)))[0]
    alone = run(tmp_path / "alone", replace(CONFIG, seeds=(1,)))[0]
    assert [t for t in both["trials"] if t["seed"] == 1] == alone["trials"]


def test_rewards_that_are_shuffled_choose_blindly(tmp_path):
    """With the control, what is kept is as good as what was written, over many contexts."""
    wide = replace(CONFIG, rounds=1, contexts=200, self_edits=4, repeats=1, resamples=0, trials_per_step=1000)

    def share(config):
        contents = run(tmp_path / f"{config.shuffle_rewards}", config, ToyDomain(200))[0]
        edits = {(e["context"], e["index"]): e["text"] for e in contents["self_edits"] if e["phase"] == "round 1"}
        kept = contents["policies"][0]["kept"]
        return fmean(edits[tuple(key)] == "good" for key in kept)

    assert share(wide) > 0.6
    assert share(replace(wide, shuffle_rewards=True)) < 0.45  # a third of what can be trained is good


def test_shuffled_rewards_change_nothing_before_they_are_used(tmp_path):
    """Run and control have the same self-edits and evaluations until the first policy update."""
    own, blind = (run(tmp_path / f"{s}", replace(CONFIG, shuffle_rewards=s))[0] for s in (False, True))
    first = ("evaluation 0", "round 1", "no adapter")
    for table in ("self_edits", "trials"):
        early = [[row for row in made[table] if row["phase"].startswith(first)] for made in (own, blind)]
        assert early[0] == early[1] != []
    assert own["policies"] != blind["policies"]


class GivenDomain(ToyDomain):
    """Contexts whose rewards are given: reward_of[context][index]."""

    def __init__(self, rewards):
        super().__init__(len(rewards))
        self.rewards = rewards
        texts = [[f"edit {i} {j}" for j in range(len(own))] for i, own in enumerate(rewards)]
        self._sources = {"given": SelfEditSource(lambda contexts, _: texts[: len(contexts)])}


class GivenEngine(ToyEngine):
    def __init__(self, rewards):
        super().__init__()
        self.rewards = rewards

    def generate(self, prompts, params, adapters, progress):
        outputs = super().generate(prompts, params, adapters, progress)
        for output, adapter in zip(outputs, adapters or [None] * len(prompts), strict=True):
            if adapter is not None and adapter.text.startswith("edit"):
                _, i, j = adapter.text.split()
                output.outputs[0].text = str(self.rewards[int(i)][int(j)])
        return outputs


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"keep": "best"}, [(0, 1), (1, 0), (2, 0)]),  # the first of equals
        ({"keep": "best", "keep_reward": 0.3}, [(0, 1), (1, 0)]),
        ({"keep": "gain"}, [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]),  # the base has 0
        ({"keep": "gain", "keep_reward": 0.5}, [(0, 1), (0, 2), (1, 0)]),
        ({"keep": "top", "keep_fraction": 3 / 7}, [(0, 1), (0, 2), (1, 0)]),
        ({"keep": "top", "keep_fraction": 0.0}, []),
        ({"keep": "best", "keep_reward": 2.0}, []),
    ],
)
def test_rules_of_keeping(tmp_path, settings, expected):
    rewards = [[0.25, 0.75, 0.75], [0.5, 0.25], [0.0, 0.0]]
    config = LoopConfig(rounds=1, repeats=1, self_edit_source="given", **settings)
    domain = GivenDomain(rewards)
    domain.grade_one = lambda answer: 0.0 if answer in ("right", "wrong") else float(answer)
    contents, _, _ = run(tmp_path / "run", config, domain, GivenEngine(rewards))
    (policy,) = contents["policies"]
    assert policy["kept"] == [[f"train {i}", j] for i, j in expected]
    assert (policy["path"] is None) == (not expected)


def test_what_the_policy_learns_from(tmp_path):
    """Prompt and self-edit as they were sampled, the end token included; the loss is the self-edit's alone."""
    engine = ToyEngine()
    contents, _, _ = run(tmp_path / "run", replace(CONFIG, rounds=1), engine=engine)
    (update,) = [jobs[0] for jobs in engine.trained if jobs[0].checkpoint_dir is not None]
    assert len(update.sequences) == len(contents["policies"][0]["kept"]) > 0
    for sequence, (context, index) in zip(update.sequences, contents["policies"][0]["kept"], strict=True):
        (edit,) = [
            e for e in contents["self_edits"] if (e["phase"], e["context"], e["index"]) == ("round 1", context, index)
        ]
        prompt = list(map(ord, f"write {context}"))
        assert sequence.token_ids == [*prompt, *edit["token_ids"]]
        assert sequence.loss_mask == [0] * len(prompt) + [1] * len(edit["token_ids"])
        assert edit["token_ids"][-1] == 9
    assert update.lora.r == CONFIG.policy_rank
    assert not list((tmp_path / "run").glob("checkpoint*"))


def test_keeping_the_policy_as_an_adapter(tmp_path):
    engine = ToyEngine()
    contents, _, _ = run(tmp_path / "run", replace(CONFIG, policy_update="adapter"), engine=engine)
    assert engine.merged == []
    found = accuracies(contents)
    assert found["seed 0, evaluation 2"] > found["seed 0, evaluation 0"]


def test_refused_self_edits_are_drawn_again_within_a_bound(tmp_path):
    contents, said, _ = run(tmp_path / "run", replace(CONFIG, rounds=1, contexts=40, resamples=2), ToyDomain(40))
    edits = [e for e in contents["self_edits"] if e["phase"] == "round 1"]
    assert {e["attempts"] for e in edits} == {1, 2, 3}
    assert all(e["attempts"] == 3 for e in edits if e["rejected"])
    refused = sum(e["rejected"] is not None for e in edits)
    assert 0 < refused < 10
    assert f"seed 0, round 1: {refused} of 120 self-edits were rejected" in said
    kept = {tuple(key) for key in contents["policies"][0]["kept"]}
    assert not kept & {(e["context"], e["index"]) for e in edits if e["rejected"]}


def test_what_is_refused_for_good_is_not_drawn_again(tmp_path):
    class Final(ToyDomain):
        def job(self, context, self_edit):
            if "refuse" in self_edit:
                raise InvalidSelfEditError("trains nothing", retryable=False)
            return TrainJob([self_edit])

    contents, _, _ = run(tmp_path / "run", replace(CONFIG, rounds=1, contexts=12), Final())
    edits = [e for e in contents["self_edits"] if e["phase"] == "round 1"]
    assert {e["attempts"] for e in edits} == {1}
    assert {e["rejected"] for e in edits} == {None, "trains nothing"}


def test_equal_jobs_are_trained_once(tmp_path):
    engine = ToyEngine()
    config = LoopConfig(rounds=1, self_edits=8, repeats=3, resamples=5)
    contents, _, _ = run(tmp_path / "run", config, ToyDomain(5), engine)
    inner = [jobs for jobs in engine.trained if jobs[0].checkpoint_dir is None]
    assert max(map(len, inner)) == 2 * 3  # "good" and "bad", three seeds
    trials = [t for t in contents["trials"] if t["phase"] == "round 1"]
    assert len(trials) == 5 * 8 * 3
    assert len({t["train_seed"] for t in trials}) == 3


def test_one_adapter_for_all_contexts(tmp_path):
    engine = ToyEngine()
    contents, _, _ = run(
        tmp_path / "run", LoopConfig(rounds=0, continued_pretraining=2, resamples=5), ToyDomain(4), engine
    )
    joint = [job for jobs in engine.trained for job in jobs if len(job.sequences) > 1]
    assert [len(job.sequences) for job in joint] == [4 * 2]
    asked = [t for t in contents["trials"] if t["phase"].endswith("one adapter for all")]
    assert len(asked) == 4


def test_one_adapter_for_all_is_asked_by_those_whose_self_edits_were_refused(tmp_path):
    texts = {"held out 0": ["good", "refuse me"], "held out 1": ["refuse me", "refuse me"], "held out 2": ["bad"] * 2}

    class Written(ToyEngine):
        def generate(self, prompts, params, adapters, progress):
            outputs = super().generate(prompts, params, adapters, progress)
            for i, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
                if prompt.startswith("write"):
                    output.outputs[0].text = texts[prompt.removeprefix("write ")][i % 2]
            return outputs

    config = LoopConfig(rounds=0, continued_pretraining=2, resamples=0)
    contents, _, _ = run(tmp_path / "run", config, ToyDomain(3), Written())
    asked = [t for t in contents["trials"] if t["phase"].endswith("one adapter for all")]
    assert [t["grades"] for t in asked] == [[1.0, 1.0]] * 3
    alone = [t for t in contents["trials"] if t["phase"] == "evaluation 0, self-edits"]
    assert [(t["error"], t["grades"]) for t in alone] == [(None, [1.0] * 2), ("no text", []), (None, [0.0] * 2)]
    assert accuracies(contents)["seed 0, evaluation 0"] == pytest.approx(1 / 3)


def test_a_job_that_diverges_counts_as_wrong(tmp_path):
    source = SelfEditSource(lambda contexts, _: [["diverge", "good"] for _ in contexts])
    config = LoopConfig(rounds=1, repeats=1, self_edit_source="given")
    contents, said, _ = run(tmp_path / "run", config, ToyDomain(3, {"given": source}))
    failed = [t for t in contents["trials"] if t["error"]]
    assert failed
    assert all((t["answers"], t["grades"]) == ([], []) for t in failed)
    assert contents["policies"][0]["kept"] == [[f"train {i}", 1] for i in range(3)]
    assert any(line.endswith("3 failed to train") for line in said)


def test_what_was_not_graded_is_left_out_and_said(tmp_path):
    grades = iter([None] + [1.0] * 10_000)
    domain = ToyDomain(20, grade=lambda answer: next(grades))
    contents, said, _ = run(tmp_path / "run", LoopConfig(rounds=0), domain)
    assert contents["steps"]["seed 0, no adapter, accuracy"]["ungraded"] == 1
    assert contents["steps"]["seed 0, no adapter, accuracy"]["accuracy"] == 1.0
    assert "seed 0, no adapter: 1.000, 1 answers without a grade" in said


def test_too_many_without_a_grade_stop_the_run_which_can_go_on(tmp_path):
    domain = ToyDomain(5, grade=lambda answer: None)
    with pytest.raises(UngradedError, match=r"no adapter: 8 of 8 answers could not be graded.*max_ungraded"):
        run(tmp_path / "run", CONFIG, domain)
    assert run(tmp_path / "run", CONFIG)[0] == run(tmp_path / "other", CONFIG)[0]


def test_a_self_edit_that_is_too_long_for_the_policy_is_measured_but_not_learned(tmp_path):
    texts = {"train 0": ["good" * 500, "bad"], "train 1": ["bad", "good"]}
    source = SelfEditSource(lambda contexts, _: [texts.get(context, ["bad"]) for context in contexts])
    config = LoopConfig(rounds=1, repeats=1, self_edit_source="w")
    contents, said, _ = run(tmp_path / "run", config, ToyDomain(2, {"w": source}))
    trials = [t for t in contents["trials"] if t["phase"] == "round 1"]
    assert [t["grades"] for t in trials] == [[1.0] * 2, [0.0] * 2, [0.0] * 2, [1.0] * 2]
    assert contents["policies"][0]["kept"] == [["train 1", 1]]
    assert "round 1: 1 kept self-edits are left out: longer than the model" in said


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["refuse me"], "round 1: every self-edit was rejected, the first one as: no text"),
        (["unknown"], "round 1: none of 6 adapters could be trained; the first: no such module"),
    ],
)
def test_a_run_in_which_nothing_can_be_trained_stops(tmp_path, texts, message):
    class Picky(ToyEngine):
        def train(self, jobs, progress):
            if any("unknown" in str(job.sequences) for job in jobs):
                return [TrainResult(None, [], 0, "no such module") for _ in jobs]
            return super().train(jobs, progress)

    calls = iter([["good"]])
    source = SelfEditSource(lambda contexts, _: [next(calls, texts)] * len(contexts))
    config = LoopConfig(rounds=1, repeats=3, self_edit_source="w")
    with pytest.raises(RunError, match=message):
        run(tmp_path / "run", config, ToyDomain(2, {"w": source}), Picky())


def test_a_best_attempt_counts_for_an_oracle(tmp_path):
    source = SelfEditSource(lambda contexts, _: [["bad", "good"] for _ in contexts], aggregate="max")
    contents, _, _ = run(tmp_path / "run", LoopConfig(rounds=0), ToyDomain(3, {"oracle": source}))
    assert accuracies(contents)["seed 0, oracle, accuracy"] == 1.0
    trial = Trial(0, "p", "c", 0, 0, 0, 1, 1, None, None, ("a", "b"), (1.0, None), 0.0)
    others = [trial, replace(trial, index=1, grades=(0.0, 0.0)), replace(trial, context="d", grades=(None, None))]
    assert mean_accuracy(others) == 0.5
    assert mean_accuracy(others, aggregate="max") == 1.0
    assert mean_accuracy(others[2:]) is None


def test_the_standard_error_is_over_contexts():
    """Contexts of 1 (trials of 1 and 1) and 0.5 (1 and 0): sd 0.5 / sqrt(2), over the root of two contexts 0.25."""
    trial = Trial(0, "p", "c", 0, 0, 0, 1, 1, None, None, ("a",), (1.0,), 0.0)
    trials = [
        trial,
        replace(trial, index=1),
        *(replace(trial, context="d", index=i, grades=(g,)) for i, g in ((0, 1.0), (1, 0.0))),
    ]
    assert standard_error(trials) == pytest.approx(0.25)
    assert standard_error(trials, aggregate="max") == 0
    assert standard_error(trials[:2]) is None


def test_a_writer_that_could_not_write(tmp_path):
    """Nothing for one context of ten is left out and counted; for more, the run stops, and can go on."""
    nothing = {"held out 3"}
    source = SelfEditSource(lambda contexts, _: [[] if c in nothing else ["good"] for c in contexts])
    contents, _, _ = run(tmp_path / "run", LoopConfig(rounds=0), ToyDomain(10, {"some": source}))
    assert [e["rejected"] for e in contents["self_edits"] if e["rejected"]] == ["could not be had"]
    measured = contents["steps"]["seed 0, some, accuracy"]
    assert (measured["accuracy"], measured["contexts"]) == (1.0, 9)
    nothing.add("held out 5")
    with pytest.raises(UngradedError, match="some: 2 of 10 self-edits could not be had"):
        run(tmp_path / "other", LoopConfig(rounds=0), ToyDomain(10, {"some": source}))
    nothing.remove("held out 5")
    assert run(tmp_path / "other", LoopConfig(rounds=0), ToyDomain(10, {"some": source}))[0] == contents
    with pytest.raises(InputError, match="self_edit_source: found 'nobody'"):
        run(tmp_path / "other", LoopConfig(self_edit_source="nobody"))


def test_a_finished_run_does_nothing(tmp_path):
    first = run(tmp_path / "run", CONFIG)[0]
    engine = ToyEngine()
    assert run(tmp_path / "run", CONFIG, engine=engine)[0] == first
    assert engine.trained == []


KILLED = """
    import os, random, signal, sys
    sys.path[:0] = {paths!r}
    import toy_loop

    class Dying(toy_loop.ToyEngine):
        left = 0
        def __getattribute__(self, name):
            if name in ("train", "generate", "merge", "load_adapter"):
                Dying.left -= 1
                if Dying.left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            return super().__getattribute__(name)

    draw, deaths, finished = random.Random(0), 0, False
    for run in range(5):
        finished = False
        while not finished:
            Dying.left = draw.randrange(12)
            child = os.fork()
            if not child:
                toy_loop.run(f"{{sys.argv[1]}} {{run}}", toy_loop.CONFIG, engine=Dying())
                os._exit(0)
            status = os.waitpid(child, 0)[1]
            assert status in (0, signal.SIGKILL), status
            finished = status == 0
            deaths += not finished
    print(deaths)
"""


def test_a_run_that_is_killed_goes_on_to_the_same_end(tmp_path):
    """Five runs, each killed at random calls of the engine until one attempt gets through: 30 times and more."""
    expected = run(tmp_path / "whole", CONFIG)[0]
    script = tmp_path / "killed.py"
    paths = [str(ROOT / name) for name in ("", "kernels", "tests")]
    script.write_text(textwrap.dedent(KILLED).format(paths=paths))
    command = [sys.executable, str(script), str(tmp_path / "run")]
    process = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert int(process.stdout) >= 30
    for i in range(5):
        with Ledger.read(tmp_path / f"run {i}") as ledger:
            assert ledger.snapshot() == expected


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seeds", ()), ("seeds", (1, 1)), ("seeds", (-1,)), ("rounds", -1), ("self_edits", 0), ("repeats", 0),
        ("temperature", -1.0), ("top_p", 0.0), ("max_tokens", 0), ("keep", "all"), ("keep_fraction", 1.5),
        ("policy_rank", 0), ("policy_update", "both"), ("trials_per_step", 0), ("max_ungraded", float("nan")),
        ("policy_learning_rate", float("inf")), ("keep_reward", float("nan")),
    ],
)  # fmt: skip
def test_settings_out_of_range(field, value):
    with pytest.raises(InputError, match=field.removesuffix("ank")):
        LoopConfig(**{field: value})


def test_a_finished_run_goes_on_with_more_rounds(tmp_path):
    """A round depends on those before it alone, so two and then one more are three."""
    two = run(tmp_path / "run", replace(CONFIG, seeds=(0, 1)))[0]
    more = run(tmp_path / "run", replace(CONFIG, seeds=(0, 1), rounds=3))[0]
    assert len(two["policies"]) == 4
    assert more == run(tmp_path / "at once", replace(CONFIG, seeds=(0, 1), rounds=3))[0]


@pytest.mark.parametrize(
    ("settings", "end"),
    [
        ({}, "so the policy learns from noise. With --keep-reward X only"),
        ({"keep_reward": 0.01}, "no self-edit is kept, and the policy stays as it is"),
    ],
    ids=["noise", "a least reward"],
)
def test_rewards_that_are_all_zero_are_warned_of(settings, end, tmp_path):
    """A grader that finds every answer wrong tells no self-edit from another: six contexts of three self-edits each."""
    config = replace(CONFIG, rounds=1, **settings)
    contents, said, _ = run(tmp_path / "run", config, ToyDomain(grade=lambda answer: 0.0))
    (line,) = [line for line in said if "warning" in line]
    assert line.startswith("seed 0, round 1: warning: all 18 rewards are 0: ")
    assert end in line
    assert bool(contents["policies"][0]["kept"]) == (not settings)
    rewarded = run(tmp_path / "rewarded", config)[1]
    assert not any("warning" in line for line in rewarded)
    assert not any("warning" in line for line in run(tmp_path / "run", config, ToyDomain(grade=lambda _: 0.0))[1])
