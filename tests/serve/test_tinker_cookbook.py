"""Recipes of tinker-cookbook, unchanged, each a process of its own as users start it, against this server.

benchmarks/tinker_recipes.py starts them, with stand-ins for the model and the data; docs/tinker.md has what they reach
on a language model. The shipped miniature is none: it learns what it is shown, but samples nothing that is rewarded.
"""

from importlib.util import find_spec

import pytest

pytest.importorskip("tinker", reason="the Tinker SDK is not installed")

from tinker_cases import SDK_CONNECTIONS, tinker_server

import tinker_recipes
from seal_engine.tiny import MODEL

pytestmark = SDK_CONNECTIONS
LIBRARIES = ("tinker_cookbook", "datasets", "chz", "math_verify", "pylatexenc")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A working directory with a model and data sets by the names that the recipes ask for."""
    for library in LIBRARIES:
        if find_spec(library) is None:
            pytest.skip(f"{library} is not installed; docs/tinker.md says how")
    directory = tmp_path_factory.mktemp("cookbook")
    tinker_recipes.write_stand_ins(directory, MODEL)
    return directory


@pytest.fixture(scope="module")
def server(engine, tmp_path_factory):
    names = ["--served-model-name", tinker_recipes.NAME]
    with tinker_server(engine, tmp_path_factory.mktemp("tinker"), *names) as running_server:
        yield running_server


def test_sl_loop_and_rl_loop(directory, server):
    """Supervised steps, saved with the optimizer, of which the loss falls; rl_loop finds the checkpoint and goes on."""
    losses = tinker_recipes.run("sl_loop", directory, server.url, learning_rate=1e-2, batch_size=20)
    assert len(losses) == 8
    assert losses[-1] < 0.7 * losses[0]
    rewards = tinker_recipes.run("rl_loop", directory, server.url, max_steps=10, group_size=4, max_tokens=8)
    assert len(rewards) == 2
    assert all(0 <= reward <= 1 for reward in rewards)


def test_sl_basic_and_what_goes_on_from_it(directory, server):
    """The loss falls; rl_basic loads the checkpoint, and distillation has it as the teacher of the base, to which the
    divergence falls, on samples that nobody seeds: from 6 to 10 to 0.1 to 3.9 in five runs."""
    losses = tinker_recipes.run("sl_basic", directory, server.url, learning_rate=1e-2, max_steps=8)
    assert losses[-1] < 0.7 * losses[0]
    rewards = tinker_recipes.run("rl_basic", directory, server.url, max_steps=2, max_tokens=8)
    assert len(rewards) == 2
    assert all(-0.1 <= reward <= 1 for reward in rewards)
    divergences = tinker_recipes.run(
        "on_policy_distillation", directory, server.url, max_steps=20, max_tokens=8, learning_rate=2e-3
    )
    assert sum(divergences[-5:]) / 5 < 0.7 * divergences[0]


def test_dpo(directory, server):
    """A loss of its own, differentiated by the client: it begins at log 2 and falls."""
    losses = tinker_recipes.run("dpo", directory, server.url, max_steps=5, learning_rate=1e-3)
    assert losses[0] == pytest.approx(0.693, abs=0.01)
    assert losses[-1] < 0.5
