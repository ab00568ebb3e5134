"""Recipes of tinker-cookbook, unchanged, each a process of its own as users start it, against this server.

They know models by name and load data by name, and both libraries take a directory of that name first: the shipped
miniature stands in for the model, a few lines of JSON for the data.
"""

import json
import os
import random
import subprocess
import sys
from importlib.util import find_spec

import pytest

pytest.importorskip("tinker", reason="the Tinker SDK is not installed")

from tinker_cases import SDK_CONNECTIONS, tinker_server

from seal_engine.tiny import MODEL

pytestmark = SDK_CONNECTIONS
LIBRARIES = ("tinker_cookbook", "datasets", "chz", "math_verify", "pylatexenc")
NAME = "Qwen/Qwen3-8B-Base"  # one that the cookbook has a renderer for that needs no special tokens
SUFFIX = " Provide a numerical answer without units, written inside \\boxed{}."  # that rl_loop adds to questions
QUESTION = "Which digit is it?"


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """A working directory: a model and two data sets by the names that the recipes ask for. Chats answer with a digit
    from 1 to 4 by chance; of the questions to reward, the answer is 3."""
    for library in LIBRARIES:
        if find_spec(library) is None:
            pytest.skip(f"{library} is not installed; docs/tinker.md says how")
    directory = tmp_path_factory.mktemp("cookbook")
    (directory / NAME).parent.mkdir(parents=True)
    (directory / NAME).symlink_to(MODEL)
    rng = random.Random(0)
    chats, questions = directory / "HuggingFaceH4/no_robots", directory / "openai/gsm8k"
    for folder in (chats, questions):
        folder.mkdir(parents=True)
    turns = ((QUESTION + SUFFIX, f"\\boxed{{{rng.randint(1, 4)}}}") for _ in range(128))
    rows = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in turns]
    (chats / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    row = json.dumps({"question": QUESTION, "answer": "It is three.\n#### 3"})
    (questions / "train.jsonl").write_text("\n".join([row] * 640))
    config = "configs:\n- config_name: main\n  data_files:\n  - split: train\n    path: train.jsonl\n"
    (questions / "README.md").write_text(f"---\n{config}---\n")
    return directory


@pytest.fixture(scope="module")
def server(engine, tmp_path_factory):
    with tinker_server(engine, tmp_path_factory.mktemp("tinker"), "--served-model-name", NAME) as running_server:
        yield running_server


def run(recipe, directory, server, **options):
    """The metrics of a recipe's steps."""
    environment = {
        **os.environ, "TINKER_BASE_URL": server.url, "TINKER_API_KEY": "tml-local", "TINKER_TELEMETRY": "0",
        "HF_HOME": str(directory / "hub"), "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    options = {"log_path": "run", "model_name": NAME, "lora_rank": 8, "learning_rate": 1e-2, **options}
    command = [sys.executable, "-m", f"tinker_cookbook.recipes.{recipe}", *(f"{k}={v}" for k, v in options.items())]
    process = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stderr[-3000:]
    return [json.loads(line) for line in (directory / "run" / "metrics.jsonl").read_text().splitlines()]


def test_sl_loop_and_rl_loop(stand_ins, server):
    """Supervised steps, saved with the optimizer; rl_loop finds the checkpoint and goes on from it. The loss falls. No
    reward moves, for the miniature is no language model and boxes no answer: docs/tinker.md has the rewards of one."""
    losses = [step["train_mean_nll"] for step in run("sl_loop", stand_ins, server, batch_size=16)]
    assert len(losses) == 8
    assert losses[-1] < 0.7 * losses[0]
    options = dict(batch_size=4, group_size=4, max_tokens=8, max_steps=10, loss_fn="importance_sampling")
    steps = run("rl_loop", stand_ins, server, **options)[8:]
    assert [step["step"] for step in steps] == [8, 9]
    assert all(0 <= step["reward/total"] <= 1 for step in steps)
