"""The demo's whole loop, timed and recorded: accuracy of every method over three seeds, and the control.

The control is the same loop, but each self-edit is given the reward of another: what then remains of the gain does not
come from rewards.
"""

import shutil
from time import perf_counter

import pytest

import measure
from seal_engine import runs
from seal_engine.cli.run import DEMOS
from seal_engine.loop.ledger import Ledger

SEEDS = (0, 1, 2)
pytestmark = pytest.mark.skipif(measure.DEVICE.type == "cuda", reason="the miniature is for machines without a GPU")


def run_demo(task, control, benchmark, record, results, directory):
    """Run a demo in a new directory; record its table and what it took, and keep its puzzles."""
    settings = {"seeds": SEEDS, "shuffle_rewards": control}
    start = perf_counter()
    run = lambda: runs.start(DEMOS[task], settings, directory, lambda line: None, progress=False)  # noqa: E731
    benchmark.pedantic(run, rounds=1, iterations=1)
    seconds = perf_counter() - start
    with Ledger.read(directory) as ledger:
        found, trials = runs.rows(ledger), ledger.trials()
    for row in found:
        record(
            task=task, rewards="shuffled" if control else "own", method=row.name,
            accuracy=row.mean, sd=row.deviation, seeds=len(row.accuracies), accuracies=list(row.accuracies),
        )  # fmt: skip
    adapters, tokens = sum(trial.num_steps > 0 for trial in trials), sum(trial.num_tokens for trial in trials)
    record(task=task, rewards="shuffled" if control else "own", method="the whole run", seconds=seconds,
           adapters=adapters, tokens=tokens)  # fmt: skip
    if results is not None and not control:
        puzzles = directory / "puzzles.json"
        if puzzles.exists():
            shutil.copy(puzzles, results / f"demo_{task}_puzzles_{measure.DEVICE.type}.json")


@pytest.mark.parametrize("control", [False, True], ids=["rewards", "shuffled rewards"])
def test_demo(benchmark, record, request, tmp_path, control):
    run_demo("knowledge", control, benchmark, record, request.config.getoption("--record"), tmp_path / "run")
