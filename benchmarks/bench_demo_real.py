"""The demo with a real language model: accuracy, its standard error over passages, and what each method trains.

The control is the same loop, but each self-edit is given the reward of another. With the same seed it shares with the
demo all that comes before the policy's update, and so it measures none of the baselines that cost most.
"""

from statistics import fmean
from typing import Any

import pytest

import measure
from gguf_files import smollm2  # pyright: ignore[reportMissingImports]
from seal_engine import runs
from seal_engine.cli.run import DEMOS
from seal_engine.loop.inner import standard_error
from seal_engine.loop.ledger import Ledger
from seal_engine.loop.records import BASELINE, EVALUATION, Phase
from seal_engine.loop.restem import SELF_EDITS
from seal_engine.real.conclusion import changes, conclusion, interval

SEEDS = (0, 1, 2)
pytestmark = pytest.mark.skipif(measure.DEVICE.type == "cuda", reason="the demo is for machines without a GPU")


def describe(ledger: Ledger) -> list[dict[str, Any]]:
    """A row per method: accuracy, its spread, optimizer steps and tokens per adapter; a row of the whole run."""
    trials = {}
    for trial in ledger.trials():
        phase = Phase.parse(trial.phase)
        if phase.stage == BASELINE or phase.method == SELF_EDITS:
            after = f"after round {phase.round}" if phase.round else "before any round"
            name = f"{SELF_EDITS}, {after}" if phase.stage == EVALUATION else phase.method
            trials.setdefault(name, []).append(trial)
    lines: list[dict[str, Any]] = []
    for row in runs.rows(ledger):
        own = trials[row.name]
        lines.append(
            dict(
                method=row.name, accuracy=row.mean, sd=row.deviation, se=standard_error(own), seeds=len(row.accuracies),
                accuracies=list(row.accuracies),
                steps=fmean(trial.num_steps for trial in own), tokens=fmean(trial.num_tokens for trial in own),
            )
        )  # fmt: skip
    every, steps, (change, low, high) = ledger.trials(), ledger.steps(), interval(changes(ledger))
    lines.append(
        dict(
            method="the whole run", seeds=len(ledger.config["seeds"]), seconds=sum(step[2] for step in steps),
            cpu_seconds=sum(step[3] or 0.0 for step in steps),
            change=change, change_low=low, change_high=high, conclusion=conclusion(ledger),
            adapters=sum(trial.num_steps > 0 for trial in every), tokens=sum(trial.num_tokens for trial in every),
        )
    )  # fmt: skip
    return lines


@pytest.mark.parametrize("control", [False, True], ids=["rewards", "shuffled rewards"])
def test_demo(benchmark, record, tmp_path, control):
    values = {"seeds": SEEDS, "model": str(smollm2()), "shuffle_rewards": control}
    values |= {"passage_copies": 0} if control else {}
    run = lambda: runs.start(DEMOS["real"], values, tmp_path, lambda line: None, progress=False)  # noqa: E731
    benchmark.pedantic(run, rounds=1, iterations=1)
    with Ledger.read(tmp_path) as ledger:
        for row in describe(ledger):
            record(task="real", rewards="shuffled" if control else "own", **row)
