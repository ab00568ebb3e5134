"""The continual experiment: methods on a small model, and whole runs of the miniature that are interrupted anywhere."""

import json
import random
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import oracle
from command import fork_command
from seal_engine import Engine, LoraConfig, TrainJob, runs
from seal_engine.cli.main import main
from seal_engine.loop.continual_config import METHODS, ContinualConfig
from seal_engine.loop.continual_data import SharedTexts, divergence
from seal_engine.loop.continual_methods import SCALES, Lesson, choose_scale, make_method
from seal_engine.loop.continual_results import read_result
from seal_engine.loop.ledger import Ledger
from seal_engine.loop.retrieval import BM25, Router
from seal_engine.tiny import MODEL
from seal_engine.types import InputError

LORA = LoraConfig(r=2, lora_alpha=4, target_modules=("q_proj", "v_proj"))
SMALL = {
    "sequences": 2, "passages": 2, "base_samples": 24, "probe_contexts": 1, "probe_writing": 1, "null_space_rank": 8,
    "epochs": 2,
}  # fmt: skip
TEXTS = oracle.sequences([9, 12, 7, 10, 8, 11], seed=1)


class Texts(SharedTexts):
    """Shared texts over a model without a tokenizer: routers know words only."""

    def router(self):
        return Router(BM25(["x y"]), ["z"])


@pytest.fixture(scope="module")
def shared(checkpoint):
    engine = Engine.from_pretrained(checkpoint("llama"), device="cpu")
    config = ContinualConfig(null_space_rank=4, null_space_learning_rate=1e-2, distil_top_k=3)
    return Texts(engine, config, 0, TEXTS[:4], lambda context: TEXTS[5])


def lesson(i, rate=5e-3):
    job = TrainJob([TEXTS[i], TEXTS[i + 1]], LORA, rate, num_epochs=3, batch_size=2, seed=7)
    return Lesson(f"context {i}", f"title{i}", f"text {i}", job)


def learn(method, lessons):
    """One sequence learns lessons one after another; returns the jobs' results."""
    results = []
    for one in lessons:
        (result,) = method.shared.engine.train([method.job(0, one)], progress=False)
        assert result.error is None
        method.adopt(0, one, method.block(0, one, result))
        results.append(result)
    return results


def test_merge_is_what_merging_into_the_weights_is(shared, checkpoint):
    """As published: train on the base, merge into it, train on that, merge; the second job meets the first update."""
    method = make_method("merge", shared, 1)
    results = learn(method, [lesson(0), lesson(2)])
    literal = Engine.from_pretrained(checkpoint("llama"), device="cpu")
    for i, result in zip((0, 2), results, strict=True):
        (alone,) = literal.train([lesson(i).job], progress=False)
        assert result.losses == pytest.approx(alone.losses, rel=1e-4)
        literal.merge(alone.adapter)
    for kept, truth in zip(shared.engine.score(TEXTS, method.writer(0)), literal.score(TEXTS), strict=True):
        torch.testing.assert_close(kept, truth, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_what_is_adopted_again_answers_alike(name, shared):
    """A run that goes on has blocks alone: from them every method comes to the same systems, bit for bit."""
    method, again = make_method(name, shared, 1), make_method(name, shared, 1)
    lessons = [lesson(0), lesson(2)]
    blocks = []
    for one in lessons:
        (result,) = shared.engine.train([method.job(0, one)], progress=False)
        blocks.append(method.block(0, one, result))
        method.adopt(0, one, blocks[-1])
    for one, block in zip(lessons, blocks, strict=True):
        again.adopt(0, one, block)
    for context, text in (("context 0", "title0"), ("context 2", "title2"), ("another", "unknown")):
        found, truth = (m.route(0, context, [text])[0] for m in (again, method))
        assert (found is None) == (truth is None)
        assert found is None or torch.equal(found.params, truth.params)
    assert again.bytes_kept == method.bytes_kept


def test_a_bank_asks_the_edit_that_a_question_names(shared):
    bank = make_method("bank", shared, 1)
    learn(bank, [lesson(0), lesson(2)])
    adapters = [block.adapter for block in bank.blocks[0]]
    bank.routers[0].threshold = 0.1
    assert bank.route(0, "", ["title2 title2", "title0", "neither"]) == [adapters[1], adapters[0], None]
    bank.forget(0, 0)
    bank.routers[0].threshold = 0.1
    assert bank.route(0, "", ["title2", "title0"]) == [adapters[1], None]
    assert bank.writer(0) is None


@pytest.mark.parametrize(
    ("new", "kept", "scale"),
    [
        pytest.param([5, 1, 2, 3], [2, 2.04, 2.02, 2.0], 1.0, id="the largest that keeps the budget"),
        pytest.param([5, 1, 2, 3], [2, 2.30, 2.05, 2.0], 0.5, id="a smaller one where the largest does not"),
        pytest.param([5, 1, 6, 3], [2, 2.30, 2.01, 2.0], 0.25, id="none that makes the new text less likely"),
        pytest.param([5, 1, 2, 3], [2, 9.00, 9.00, 9.0], 0.0, id="nothing where none keeps it"),
    ],
)
def test_the_gate_chooses(new, kept, scale):
    """Losses without the update, then at scales 1, 0.5 and 0.25; the budget is 0.05."""
    assert choose_scale([1.0, 0.5, 0.25], new, kept, 0.05 + 1e-9) == scale


def test_the_gate_scales_the_update_and_not_its_square(shared, monkeypatch):
    """A block kept at 1/8 adds an eighth of the update's products to the weights."""
    method = make_method("gate", shared, 1)
    monkeypatch.setattr("seal_engine.loop.continual_methods.choose_scale", lambda *_: 0.125)
    ((result),) = learn(method, [lesson(0)])
    whole, gated = result.adapter.projections_with_scales(), method.writer(0).projections_with_scales()
    for (_, a, b, scale), (_, a8, b8, scale8) in zip(whole, gated, strict=True):
        torch.testing.assert_close(scale8 * a8.T @ b8, scale * a.T @ b / 8)
    assert SCALES[0] == 1
    assert len(SCALES) == 8


def test_distilled_targets_are_what_the_model_predicts_after_the_prompt(shared):
    """Row i + 1 has the likeliest words after the prompt and i + 1 tokens of the text; probabilities sum to 1."""
    (made,) = shared.distil("any", [TEXTS[0]])
    logits = shared.engine.logits([TEXTS[5] + TEXTS[0]])[0][len(TEXTS[5]) :]
    top = logits[:-1].softmax(-1).topk(3)
    assert made.token_ids == TEXTS[0]
    assert made.target_ids[1:] == top.indices.tolist()
    weights = torch.tensor(made.target_weights[1:])
    torch.testing.assert_close(weights, top.values / top.values.sum(-1, keepdim=True))


def test_divergence_is_zero_for_the_base_and_positive_for_an_update(shared):
    """KL(base || base) = 0 exactly; against another system by its definition, in float64."""
    method = make_method("merge", shared, 1)
    learn(method, [lesson(0)])
    zero, found = divergence(shared.engine, [None, method.writer(0)], TEXTS[:2])
    pairs = [shared.engine.logits(TEXTS[:2], adapter) for adapter in (None, method.writer(0))]
    p, q = (torch.cat(logits).double().log_softmax(-1) for logits in pairs)
    assert zero == 0
    assert found == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), rel=1e-4)


def test_replay_mixes_as_many_earlier_sequences(shared):
    """Ratio 1: every epoch has the new sequences and as many old ones; as many steps as without."""
    method = make_method("replay", shared, 1)
    learn(method, [lesson(0)])
    job = method.job(0, lesson(2))
    new, old = lesson(2).job.sequences, lesson(0).job.sequences
    assert len(job.sequences) == 3 * 4
    assert all(sum(s in new for s in job.sequences[i : i + 4]) == 2 for i in (0, 4, 8))
    assert all(s in new + old for s in job.sequences)
    assert job.batch_size == 4
    assert job.on_top_of is method.writer(0)


FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
COMMAND = ["run", "continual-miniature", *FLAGS, "--quiet", "--out"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A small run of all methods, uninterrupted."""
    begun, directory = time.monotonic(), tmp_path_factory.mktemp("continual") / "whole"
    assert main([*COMMAND, str(directory), "--json"]) == 0
    return SimpleNamespace(directory=directory, seconds=time.monotonic() - begun)


@pytest.mark.xdist_group("continual run")
def test_a_run_and_its_files(whole):
    """Every method is measured in every cell below the diagonal; SEAL's summary says the same."""
    with Ledger.read(whole.directory) as ledger:
        result, snapshot = read_result(ledger), ledger.snapshot()
    assert [m.name for m in result.methods] == list(runs.TASKS["continual-miniature"].defaults["methods"])
    for method in result.methods:
        assert [[cell is None for cell in row] for row in method.matrices[0]] == [
            [False] * 2,
            [False, True],
            [False] * 2,
        ]
        assert method.tokens > 0
        assert None not in method.probes.values()
    by_name = {method.name: method for method in result.methods}
    assert by_name["oracle"].transfer == 0
    assert by_name["oracle"].kl == 0
    assert by_name["oracle"].probes["reading"] == result.untrained["reading"]
    assert set(by_name["bank"].routing) == {"routed", "routed by first word", "routed without title", "routed to none"}
    assert by_name["merge"].over_merge == (0, 0, 0)
    summary = json.loads((whole.directory / "seed-0-merge-summary.json").read_text())
    assert set(summary) == {
        "mean_over_sequences", "std_over_sequences", "n_sequences", "n_datapoints", "dataset", "base_model",
    }  # fmt: skip
    assert (summary["n_sequences"], summary["n_datapoints"], summary["base_model"]) == (2, 2, "model")
    cells = [m[2][0] for m in by_name["merge"].matrices]
    assert summary["mean_over_sequences"][2][0] == pytest.approx(sum(cells) / 2)
    edits = [e for e in snapshot["self_edits"] if e["phase"].startswith("step 1, ")]
    assert len({e["text"] for e in edits}) == 2, "equal systems write equal self-edits"
    for times in (result.seconds, result.cpu_seconds):  # parts of the steps, and the whole run with writing and probes
        assert list(times) == ["preparing", "training", "keeping", "asking", "everything"]
        assert 0 < times["training"] < sum(times[name] for name in times if name != "everything") < times["everything"]


@pytest.mark.xdist_group("continual run")
def test_a_run_that_stops_before_every_step_ends_with_the_same_bits(whole, tmp_path, monkeypatch):
    """Each step is computed, lost before it is recorded, and computed again by a new process's objects."""
    finish, lost = Ledger.finish, set()

    def lose_once(ledger, step, **records):
        if step not in lost:
            lost.add(step)
            raise KeyboardInterrupt
        finish(ledger, step, **records)

    monkeypatch.setattr(Ledger, "finish", lose_once)
    command = [*COMMAND, str(tmp_path / "run")]
    attempts = 1
    while main(command) == 130:
        attempts += 1
    assert attempts == len(lost) + 1 == 8  # untrained, base samples, two steps of writing and learning, probes
    with Ledger.read(tmp_path / "run") as ledger, Ledger.read(whole.directory) as truth:
        assert ledger.snapshot() == truth.snapshot()
    for step in (1, 2):
        name = f"adapters/seed-0-step-{step}.safetensors"
        assert (tmp_path / "run" / name).read_bytes() == (whole.directory / name).read_bytes()


@pytest.mark.xdist_group("continual run")
def test_a_run_that_is_killed_ends_with_the_same_bits(whole, tmp_path):
    """kill -9 twice at moments drawn at random, then to the end."""
    draw = random.Random(2)
    for fraction in (draw.uniform(0.1, 0.5), draw.uniform(0.2, 0.6), None):
        process = fork_command(*COMMAND, tmp_path / "run")
        process.join(None if fraction is None else whole.seconds * fraction)
        process.kill()
        process.join()
    assert process.exitcode == 0
    with Ledger.read(tmp_path / "run") as ledger, Ledger.read(whole.directory) as truth:
        assert ledger.snapshot() == truth.snapshot()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"methods": ("merge", "magic")}, "methods: found .*magic.*accepted: different ones of merge"),
        ({"methods": ("merge", "merge")}, "methods: found"),
        ({"sequences": 0}, "sequences: found 0; accepted: an integer >= 1"),
        ({"null_space_energy": 1.5}, "null_space_energy: found 1.5; accepted: 0 to 1"),
        ({"retriever": "magic"}, "retriever: found 'magic'"),
        ({"edit_writer": "magic"}, "edit_writer: found 'magic'"),
        ({"replay_ratio": -1}, "replay_ratio: found -1"),
        ({"seeds": ()}, "seeds: found"),
    ],
)
def test_settings_that_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        replace(ContinualConfig(), **fields)


def test_more_passages_than_there_are_are_refused(tmp_path, capsys):
    options = ["--sequences=1", "--passages=9", "--held-out-contexts=8", "--out", str(tmp_path / "run")]
    assert main(["run", "continual-miniature", *options]) == 2
    assert "passages: found 9; accepted: at most 8" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_passages_from_a_file(tmp_path):
    """`run continual` on data in SEAL's format, with passages of its own for the probe; sequences share passages."""
    people = [
        ("Ann Lee", "Oslo"),
        ("Ben Kirk", "Rome"),
        ("Sue Hill", "Lima"),
        ("Tom West", "Paris"),
        ("Kim Dale", "Kyoto"),
    ]
    passages = [
        {
            "title": name,
            "context": f"In {town} stands the small house. Such is the life of {name}.",
            "questions": [{"question": f"Where does {name} live?", "answer": town}],
        }
        for name, town in people
    ]
    (tmp_path / "data.json").write_text(json.dumps(passages[:4]))
    (tmp_path / "probe.json").write_text(json.dumps(passages[4:]))
    options = {
        "model": MODEL, "data": tmp_path / "data.json", "probe-data": tmp_path / "probe.json", "held-out-contexts": 3,
        "methods": "merge,bank", "sequences": 2, "passages": 2, "max-tokens": 20, "epochs": 1, "base-samples": 4,
        "answer-tokens": 4, "out": tmp_path / "run",
    }  # fmt: skip
    assert main(["run", "continual", "--quiet", *(f"--{name}={value}" for name, value in options.items())]) == 0
    with Ledger.read(tmp_path / "run") as ledger:
        result = read_result(ledger)
    assert [m.name for m in result.methods] == ["merge", "bank"]
    assert result.untrained["knowledge"] is not None
    assert result.methods[0].kept is not None
    assert main(["resume", str(tmp_path / "run"), "--quiet"]) == 0
