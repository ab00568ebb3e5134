"""Each part of the engine once, in seconds (`make smoke`): a first look at a change, not in place of the tests."""

from dataclasses import replace

import pytest
import torch

import toy_loop
from compare import DEVICE, check
from seal_engine import Engine, LoraConfig, SamplingParams, TrainJob
from seal_engine.cli.main import main
from seal_engine.tiny import MODEL
from seal_kernels.rms_norm import rms_norm, rms_norm_ref


@pytest.fixture(scope="module")
def engine():
    return Engine.from_pretrained(MODEL, device=DEVICE, dtype="float32")


def test_the_command_line_is_imported(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "Self-adapting language models" in capsys.readouterr().out


def test_a_kernel_equals_its_reference():
    torch.manual_seed(0)
    x, dy = torch.randn(7, 96, device=DEVICE), torch.randn(7, 96, device=DEVICE)
    weight = torch.randn(96, device=DEVICE)
    check(lambda x: rms_norm(x, weight, 1e-5), lambda x: rms_norm_ref(x, weight, 1e-5), [x], [dy])


def test_a_training_step_changes_an_adapter_and_a_sample_shows_it(engine):
    """Two adapters in one call: each is another one after its step, and answers in its own words."""
    texts = ["Where does Ann Lee live? Oslo", "Where does Ann Lee live? Lima"]
    lora = LoraConfig(r=8, lora_alpha=32, target_modules="all-linear")
    first = engine.train([TrainJob([text], lora, learning_rate=1e-2, num_epochs=1) for text in texts], progress=False)
    assert [(result.error, result.num_steps) for result in first] == [(None, 1), (None, 1)]
    assert not torch.equal(first[0].adapter.params, first[1].adapter.params)
    results = engine.train(
        [TrainJob([text], lora, learning_rate=1e-2, num_epochs=20) for text in texts], progress=False
    )
    assert all(result.losses[-1] < result.losses[0] / 2 for result in results)
    greedy = SamplingParams(temperature=0, max_tokens=1)
    prompts, adapters = ["Where does Ann Lee live?"] * 2, [result.adapter for result in results]
    outputs = engine.generate(prompts, greedy, adapters=adapters, progress=False)
    assert [output.outputs[0].text.strip() for output in outputs] == ["Oslo", "Lima"]


def test_the_loop_on_a_toy_domain(tmp_path):
    contents, lines, _ = toy_loop.run(tmp_path, replace(toy_loop.CONFIG, rounds=1))
    assert [policy["round"] for policy in contents["policies"]] == [1]
    assert any(line.startswith("seed 0, round 1: mean reward") for line in lines)
